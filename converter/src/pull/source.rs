//! The image as the registry has it: every manifest on the way to the one for this host, and its layers.

use bytes::Bytes;
use format_spec::Digest;

use crate::{
    image::{ImageError, ImageSource, StoredManifest},
    manifest::{Descriptor, ImageConfig, ImageIndex, ImageManifest, Platform},
    pull::PullError,
};

/// Indexes within indexes followed at most; real ones have one level.
const INDEX_DEPTH_MAX: usize = 4;

/// An image to pull.
#[derive(Debug)]
pub(super) struct PulledImage {
    /// From what the reference names to the manifest of the image; at least one.
    pub(super) manifests: Vec<PulledManifest>,
    /// The config.
    pub(super) config: Descriptor,
    /// Its content, verified.
    pub(super) config_bytes: Bytes,
    /// The layers, lowest first.
    pub(super) layers: Vec<ImageLayer>,
}

/// A manifest or index, and what it refers to.
#[derive(Debug)]
pub(super) struct PulledManifest {
    pub(super) descriptor: Descriptor,
    pub(super) bytes: Bytes,
    pub(super) config: Option<Digest>,
    pub(super) layers: Vec<Digest>,
    pub(super) manifests: Vec<Digest>,
}

/// A layer, and what its content must hash to.
#[derive(Debug)]
pub(super) struct ImageLayer {
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: Digest,
}

impl PulledImage {
    /// Finds the image for this host.
    pub(super) async fn resolve(source: &ImageSource) -> Result<Self, PullError> {
        let host = Platform::host();
        let mut manifests = Vec::new();
        let mut stored = source.manifest().await?;
        while is_index(&stored) {
            if manifests.len() == INDEX_DEPTH_MAX {
                let reason = format!("more than {INDEX_DEPTH_MAX} indexes within one another");
                return Err(PullError::NoImage { digest: stored.digest, reason });
            }
            let index: ImageIndex = parse(&stored)?;
            let next = source.manifest_of(&choose(&index, &host)?).await?;
            let mut pulled = PulledManifest::of(&stored);
            pulled.manifests = index.manifests.iter().map(|manifest| manifest.digest).collect();
            manifests.push(pulled);
            stored = next;
        }
        let manifest: ImageManifest = parse(&stored)?;
        let mut pulled = PulledManifest::of(&stored);
        pulled.config = Some(manifest.config.digest);
        pulled.layers = manifest.layers.iter().map(|layer| layer.digest).collect();
        manifests.push(pulled);
        let config_bytes = source.config(&manifest.config).await?;
        let layers = layers(stored.digest, manifest.layers, &config_bytes, &host)?;
        Ok(Self { manifests, config: manifest.config, config_bytes, layers })
    }
}

impl PulledManifest {
    fn of(stored: &StoredManifest) -> Self {
        Self {
            descriptor: Descriptor::of(&stored.media_type, &stored.bytes),
            bytes: stored.bytes.clone(),
            config: None,
            layers: Vec::new(),
            manifests: Vec::new(),
        }
    }
}

fn is_index(stored: &StoredManifest) -> bool {
    matches!(stored.media_type.as_str(), registry::media_type::OCI_INDEX | registry::media_type::DOCKER_LIST)
}

fn choose(index: &ImageIndex, host: &Platform) -> Result<Descriptor, PullError> {
    let found = index.manifests.iter().find(|manifest| match &manifest.platform {
        Some(platform) => host.accepts(&platform.os, &platform.architecture, platform.variant.as_deref()),
        // An index of one image need not say for which platform it is; the config does.
        None => index.manifests.len() == 1,
    });
    found.cloned().ok_or_else(|| no_platform(host, index.platforms()))
}

fn layers(
    manifest: Digest,
    descriptors: Vec<Descriptor>,
    config: &Bytes,
    host: &Platform,
) -> Result<Vec<ImageLayer>, PullError> {
    let no_image = |reason| PullError::NoImage { digest: manifest, reason };
    let config: ImageConfig =
        serde_json::from_slice(config).map_err(|error| no_image(format!("its config is none of an image: {error}")))?;
    if !host.accepts(&config.os, &config.architecture, config.variant.as_deref()) {
        return Err(no_platform(host, format!("{}/{}", config.os, config.architecture)));
    }
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != descriptors.len() {
        let reason = format!("it has {} layers, its config says {}", descriptors.len(), diff_ids.len());
        return Err(no_image(reason));
    }
    let layers = descriptors.into_iter().zip(diff_ids);
    Ok(layers.map(|(descriptor, diff_id)| ImageLayer { descriptor, diff_id }).collect())
}

fn no_platform(host: &Platform, available: String) -> PullError {
    PullError::Platform { host: host.clone(), available }
}

fn parse<T: serde::de::DeserializeOwned>(stored: &StoredManifest) -> Result<T, ImageError> {
    serde_json::from_slice(&stored.bytes).map_err(|error| ImageError::Malformed {
        what: format!("manifest {}", stored.digest),
        reason: error.to_string(),
    })
}
