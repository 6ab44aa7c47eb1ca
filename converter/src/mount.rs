//! Mounts a lazy image in this process: what `lazuli mount` does.

use std::{path::Path, sync::Arc};

use format_spec::{Digest, LazyLayer, annotation::AnnotationError};
use fusefs::{Mount, control::RemoteLayer, mount_image};
use storage::{Source, SourceError};

use crate::{
    image::ImageSource,
    manifest::{Descriptor, Platform},
    resolve::{ResolveError, ResolvedImage, resolve_image},
};

/// An image cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Finding the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A layer is no lazy one.
    #[error("layer {0} is an ordinary layer: convert the image first, with lazuli convert")]
    Ordinary(Digest),
    /// A layer says that it is lazy, in words that mean nothing.
    #[error("layer {digest}: {error}")]
    Annotations {
        /// The blob.
        digest: Digest,
        /// What is wrong with its annotations.
        error: AnnotationError,
    },
    /// A layer says that it is lazy, but describes another blob.
    #[error("layer {0}: its annotations describe another blob: convert the image again")]
    OtherBlob(Digest),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] fusefs::Error),
}

/// Mounts the image for `platform` at `source` on the directory `mount_point`.
///
/// # Errors
///
/// When the image is not there or not lazy, or FUSE, the mount point or the cache cannot be used; then
/// nothing is mounted.
pub async fn mount(
    source: &ImageSource,
    platform: Option<&Platform>,
    mount_point: &Path,
    cache_root: &Path,
) -> Result<Mount, MountError> {
    let image = resolve_image(source, platform).await?;
    let name = source.name();
    let layers = lazy_layers(&image)?.into_iter();
    let layers = layers.map(|layer| RemoteLayer { layer, image: name.clone() }).collect();
    let source = source.clone();
    let factory = move |remote: &RemoteLayer| layer_source(&source, &remote.layer);
    Ok(mount_image(layers, Arc::new(factory), cache_root, mount_point).await?)
}

/// The layers of an image, lowest first, which all have to be lazy.
///
/// # Errors
///
/// The first layer that is not.
pub fn lazy_layers(image: &ResolvedImage) -> Result<Vec<LazyLayer>, MountError> {
    image.manifest.layers.iter().map(lazy_layer).collect()
}

fn lazy_layer(descriptor: &Descriptor) -> Result<LazyLayer, MountError> {
    let digest = descriptor.digest;
    let lazy = LazyLayer::from_annotations(|key| descriptor.annotation(key));
    let lazy = lazy.map_err(|error| MountError::Annotations { digest, error })?;
    let lazy = lazy.ok_or(MountError::Ordinary(digest))?;
    if lazy.blob != digest || lazy.blob_len != descriptor.size {
        return Err(MountError::OtherBlob(digest));
    }
    Ok(lazy)
}

fn layer_source(image: &ImageSource, layer: &LazyLayer) -> Result<Arc<dyn Source>, SourceError> {
    image.blob_source(&layer.blob, layer.blob_len).map_err(|error| SourceError(error.to_string()))
}
