//! From a name to one image: through indexes to the manifest for a platform, its config and diff IDs.

use bytes::Bytes;
use format_spec::{Digest, index::LAYER_COUNT_MAX};

use crate::{
    image::{ImageError, ImageSource, StoredManifest},
    manifest::{ImageConfig, ImageIndex, ImageManifest, Platform, media_type},
};

/// Indexes within indexes followed at most; real ones have one level.
const INDEX_DEPTH_MAX: usize = 4;

/// One image.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The config as it is stored, verified.
    pub config: Bytes,
    /// Digests of the layers' tar streams, as many as there are layers.
    pub diff_ids: Vec<Digest>,
}

/// An image cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Reading it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is none for the platform.
    #[error("no image for {wanted}; there is: {available}; choose one with --platform")]
    Platform {
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: String,
    },
    /// The manifest describes no container image.
    #[error("manifest {digest}: {reason}")]
    NoImage {
        /// The manifest.
        digest: Digest,
        /// What it is instead.
        reason: String,
    },
}

/// Finds the image for `platform` at `source`: by default the one for this host, or the only one.
///
/// # Errors
///
/// When it is not there, is for other platforms, or is no container image.
pub async fn resolve_image(source: &ImageSource, platform: Option<&Platform>) -> Result<ResolvedImage, ResolveError> {
    let stored = find_manifest(source, platform).await?;
    let digest = stored.digest;
    let no_image = |reason: String| ResolveError::NoImage { digest, reason };
    let manifest: ImageManifest = parse(&stored)?;
    let config_type = manifest.config.media_type.as_str();
    if !matches!(config_type, media_type::OCI_CONFIG | media_type::DOCKER_CONFIG) {
        return Err(no_image(format!("no container image: its config is of type {config_type:?}")));
    }
    let config_bytes = source.config(&manifest.config).await?;
    let config: ImageConfig =
        serde_json::from_slice(&config_bytes).map_err(|error| no_image(format!("its config: {error}")))?;
    let (layer_count, diff_id_count) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layer_count != diff_id_count || layer_count > LAYER_COUNT_MAX {
        return Err(no_image(format!("it has {layer_count} layers, its config says {diff_id_count}")));
    }
    if let Some(wanted) = platform
        && !wanted.accepts(&config.os, &config.architecture, config.variant.as_deref())
    {
        let available = format!("{}/{}", config.os, config.architecture);
        return Err(ResolveError::Platform { wanted: wanted.clone(), available });
    }
    Ok(ResolvedImage { digest, manifest, config: config_bytes, diff_ids: config.rootfs.diff_ids })
}

/// Follows indexes to the manifest for the platform.
async fn find_manifest(source: &ImageSource, platform: Option<&Platform>) -> Result<StoredManifest, ResolveError> {
    let mut stored = source.manifest().await?;
    for _ in 0..INDEX_DEPTH_MAX {
        if !matches!(stored.media_type.as_str(), registry::media_type::OCI_INDEX | registry::media_type::DOCKER_LIST) {
            return Ok(stored);
        }
        let index: ImageIndex = parse(&stored)?;
        let wanted = platform.cloned().unwrap_or_else(Platform::host);
        let found = index.manifests.iter().find(|manifest| match &manifest.platform {
            Some(found) => wanted.accepts(&found.os, &found.architecture, found.variant.as_deref()),
            // An index of one image need not say for which platform it is; the config does.
            None => index.manifests.len() == 1,
        });
        let Some(found) = found else {
            return Err(ResolveError::Platform { wanted, available: index.platforms() });
        };
        stored = source.manifest_of(found).await?;
    }
    let reason = format!("more than {INDEX_DEPTH_MAX} indexes within one another");
    Err(ResolveError::NoImage { digest: stored.digest, reason })
}

fn parse<T: serde::de::DeserializeOwned>(stored: &StoredManifest) -> Result<T, ImageError> {
    serde_json::from_slice(&stored.bytes).map_err(|error| ImageError::Malformed {
        what: format!("manifest {}", stored.digest),
        reason: error.to_string(),
    })
}
