//! Mounts a lazy image in this process: what `lazuli mount` does.

use std::{path::Path, sync::Arc};

use control::RemoteLayer;
use format_spec::{Digest, LazyLayer};
use fusefs::{Mount, MountOptions, mount_image};
use storage::{Source, SourceError};

use converter::{
    blob::file_source::FileSource,
    image::{
        ImageSource,
        platform::Platform,
        resolve::{ResolveError, ResolvedImage, resolve_image},
    },
    layer::{
        LayerError, empty_layer,
        lazy::{LazyLayerError, find_lazy_layer},
    },
};

/// An image cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Finding the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A layer is no lazy one.
    #[error("layer {0} is an ordinary layer: convert the image first, with lazuli convert")]
    Ordinary(Digest),
    /// Finding out whether a layer is lazy.
    #[error(transparent)]
    LazyLayer(#[from] LazyLayerError),
    /// The image has no layers, and the layer that takes their place cannot be made.
    #[error("making an empty layer: {0}")]
    Empty(#[from] LayerError),
    /// A bug or a lack of memory: a thread ended early.
    #[error("the mount ended abnormally")]
    Aborted,
    /// The mount.
    #[error(transparent)]
    Mount(#[from] fusefs::Error),
}

/// Mounts the image for `platform` at `source` on the directory `mount_point`.
///
/// # Errors
///
/// When the image is not there or not lazy, or the mode, the mount point or the cache cannot be used; then
/// nothing is mounted.
pub(crate) async fn mount(
    source: &ImageSource,
    platform: Option<&Platform>,
    mount_point: &Path,
    cache_root: &Path,
    options: MountOptions,
) -> Result<Mount, MountError> {
    let image = resolve_image(source, platform).await?;
    let name = source.name();
    let mut layers = lazy_layers(source, &image).await?;
    let mut empty = None;
    if layers.is_empty() {
        let made = tokio::task::spawn_blocking(empty_layer).await.map_err(|_| MountError::Aborted)??;
        layers.push(made.layer);
        empty = Some(made);
    }
    let layers = layers.into_iter().map(|layer| RemoteLayer { layer, image: name.clone() }).collect();
    let source = source.clone();
    let factory = move |remote: &RemoteLayer| match &empty {
        Some(empty) => Ok(Arc::new(FileSource::unnamed(Arc::clone(&empty.file))) as Arc<dyn Source>),
        None => layer_source(&source, &remote.layer),
    };
    Ok(mount_image(layers, Arc::new(factory), cache_root, mount_point, options).await?)
}

/// The layers of an image, lowest first, which all have to be lazy.
async fn lazy_layers(source: &ImageSource, image: &ResolvedImage) -> Result<Vec<LazyLayer>, MountError> {
    let mut layers = Vec::with_capacity(image.manifest.layers.len());
    for descriptor in &image.manifest.layers {
        let lazy = find_lazy_layer(source, descriptor).await?;
        layers.push(lazy.ok_or(MountError::Ordinary(descriptor.digest))?);
    }
    Ok(layers)
}

fn layer_source(image: &ImageSource, layer: &LazyLayer) -> Result<Arc<dyn Source>, SourceError> {
    image.blob_source(&layer.blob, layer.blob_len).map_err(|error| SourceError::refused(error.to_string()))
}
