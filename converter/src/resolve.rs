//! From a name to one image: through indexes to the manifest for a platform, its config and diff IDs.

use bytes::Bytes;
use format_spec::{Digest, index::LAYER_COUNT_MAX};

use crate::{
    image::{ImageError, ImageSource, StoredManifest},
    manifest::{Descriptor, DescriptorPlatform, ImageConfig, ImageIndex, ImageManifest, Platform, media_type},
};

/// Indexes within indexes followed at most; real ones have one level.
pub(crate) const INDEX_DEPTH_MAX: usize = 4;

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
    /// The platform that the config says.
    pub platform: DescriptorPlatform,
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
    let Some(image) = read_image(source, &stored).await? else {
        let reason = match parse::<ImageManifest>(&stored) {
            Ok(manifest) => format!("no container image: its config is of type {:?}", manifest.config.media_type),
            Err(_) => "no container image".to_owned(),
        };
        return Err(ResolveError::NoImage { digest: stored.digest, reason });
    };
    image.check_platform(platform)?;
    Ok(image)
}

/// The image that a manifest describes; `None` for a manifest of something else: an artifact.
///
/// What makes an image is the type of its config, and a layer that unpacks: attestations and Wasm modules come with
/// such configs, but with layers of their own types.
///
/// # Errors
///
/// When the manifest or the config cannot be understood, or they contradict each other.
pub(crate) async fn read_image(
    source: &ImageSource,
    stored: &StoredManifest,
) -> Result<Option<ResolvedImage>, ResolveError> {
    let digest = stored.digest;
    let no_image = |reason: String| ResolveError::NoImage { digest, reason };
    use registry::media_type::{DOCKER_MANIFEST, OCI_MANIFEST};
    // Artifact manifests of before OCI 1.1 have no config.
    if !matches!(stored.media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST) {
        return Ok(None);
    }
    let manifest: ImageManifest = parse(stored)?;
    let config_type = manifest.config.media_type.as_str();
    let has_image_config = matches!(config_type, media_type::OCI_CONFIG | media_type::DOCKER_CONFIG);
    let unpacks = |layer: &Descriptor| media_type::is_file_system(&layer.media_type);
    if !has_image_config || !(manifest.layers.is_empty() || manifest.layers.iter().any(unpacks)) {
        return Ok(None);
    }
    let config_bytes = source.config(&manifest.config).await?;
    let config: ImageConfig =
        serde_json::from_slice(&config_bytes).map_err(|error| no_image(format!("its config: {error}")))?;
    let (layer_count, diff_id_count) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layer_count != diff_id_count || layer_count > LAYER_COUNT_MAX {
        return Err(no_image(format!("it has {layer_count} layers, its config says {diff_id_count}")));
    }
    let ImageConfig { os, architecture, variant, rootfs } = config;
    let platform = DescriptorPlatform { os, architecture, variant, rest: Default::default() };
    Ok(Some(ResolvedImage { digest, manifest, config: config_bytes, diff_ids: rootfs.diff_ids, platform }))
}

impl ResolvedImage {
    /// # Errors
    ///
    /// When the config says another platform than `wanted`.
    pub(crate) fn check_platform(&self, wanted: Option<&Platform>) -> Result<(), ResolveError> {
        let DescriptorPlatform { os, architecture, variant, .. } = &self.platform;
        match wanted.filter(|wanted| !wanted.accepts(os, architecture, variant.as_deref())) {
            None => Ok(()),
            Some(wanted) => {
                let available = format!("{os}/{architecture}");
                Err(ResolveError::Platform { wanted: wanted.clone(), available })
            }
        }
    }
}

/// Follows indexes to the manifest for the platform.
pub(crate) async fn find_manifest(
    source: &ImageSource,
    platform: Option<&Platform>,
) -> Result<StoredManifest, ResolveError> {
    let mut stored = source.manifest().await?;
    for _ in 0..INDEX_DEPTH_MAX {
        if !stored.is_index() {
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

pub(crate) fn parse<T: serde::de::DeserializeOwned>(stored: &StoredManifest) -> Result<T, ImageError> {
    serde_json::from_slice(&stored.bytes).map_err(|error| ImageError::Malformed {
        what: format!("manifest {}", stored.digest),
        reason: error.to_string(),
    })
}
