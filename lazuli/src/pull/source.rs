//! The image as the registry has it: every manifest on the way to the one for this host, and its layers.

use bytes::Bytes;
use format_spec::Digest;

use converter::image::{
    ImageSource, StoredManifest,
    manifest::{Descriptor, ImageIndex},
    platform::Platform,
    resolve::{find_manifest, parse},
};

use crate::pull::PullError;

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
        let found = find_manifest(source, None).await?;
        let image = found.read(source, Some(&Platform::host())).await?;
        let mut manifests = Vec::with_capacity(found.indexes.len() + 1);
        for stored in &found.indexes {
            let mut pulled = PulledManifest::of(stored);
            pulled.manifests = parse::<ImageIndex>(stored)?.known().map(|entry| entry.digest).collect();
            manifests.push(pulled);
        }
        let mut pulled = PulledManifest::of(&found.stored);
        pulled.config = Some(image.manifest.config.digest);
        pulled.layers = image.manifest.layers.iter().map(|layer| layer.digest).collect();
        manifests.push(pulled);
        let layers = image.manifest.layers.into_iter().zip(image.diff_ids);
        let layers = layers.map(|(descriptor, diff_id)| ImageLayer { descriptor, diff_id }).collect();
        Ok(Self { manifests, config: image.manifest.config, config_bytes: image.config, layers })
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
