//! Blobs and manifests that go from one place to another as they are.

use std::{io::Write, sync::Arc};

use bytes::Bytes;
use format_spec::{Digest, DigestHasher};
use futures_util::StreamExt;
use serde::Deserialize;

use crate::image::{
    ImageDestination, ImageError, ImageSource, StoredManifest,
    manifest::{Descriptor, null_is_empty},
    resolve::parse,
};

/// The blobs that a manifest names. (`blobs` is what artifact manifests had before OCI 1.1.)
#[derive(Debug, Deserialize)]
pub(crate) struct Blobs {
    config: Option<Descriptor>,
    #[serde(default, deserialize_with = "null_is_empty")]
    layers: Vec<Descriptor>,
    #[serde(default, deserialize_with = "null_is_empty")]
    blobs: Vec<Descriptor>,
}

impl Blobs {
    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(&self.layers).chain(&self.blobs)
    }
}

/// Brings all blobs of a manifest to the destination, but not the manifest; returns how many bytes had to be moved.
///
/// # Errors
///
/// When a blob cannot be read or written, or is not what its digest says.
pub(crate) async fn copy_blobs(
    source: &ImageSource,
    destination: &ImageDestination,
    manifest: &StoredManifest,
) -> Result<u64, ImageError> {
    let blobs: Blobs = parse(manifest)?;
    let mut moved_len = 0;
    for descriptor in blobs.iter() {
        moved_len += copy_blob(source, destination, descriptor).await?;
    }
    Ok(moved_len)
}

/// Brings one blob to the destination, unless it is there; returns how many bytes had to be moved.
///
/// A blob with addresses of its own (`urls`) stays where it is.
///
/// # Errors
///
/// When it cannot be read or written, or is not what its digest says.
pub(crate) async fn copy_blob(
    source: &ImageSource,
    destination: &ImageDestination,
    descriptor: &Descriptor,
) -> Result<u64, ImageError> {
    let (digest, len) = (descriptor.digest, descriptor.size);
    if descriptor.is_elsewhere()
        || destination.has_blob(&digest, len).await?
        || destination.mount_blob(source, &digest).await?
    {
        return Ok(0);
    }
    if let Some(content) = descriptor.embedded() {
        destination.put_bytes(&digest, &content).await?;
        return Ok(len);
    }
    let mut stream = source.blob_stream(&digest).await?;
    let mut spool = destination.spool()?;
    let mut hasher = DigestHasher::default();
    let failed = |reason: String| ImageError::Stream { digest, reason };
    let mut copied_len = 0;
    while let Some(piece) = stream.next().await {
        let piece: Bytes = piece.map_err(|error| failed(error.message))?;
        copied_len += piece.len() as u64;
        if copied_len > len {
            return Err(failed(format!("it is longer than the {len} bytes that its descriptor says")));
        }
        hasher.update(&piece);
        spool.write_all(&piece).map_err(|error| failed(format!("writing it to a temporary file: {error}")))?;
    }
    let found: Digest = hasher.finish();
    if found != digest {
        return Err(ImageError::Digest { expected: digest, found });
    }
    destination.put_file(&digest, len, &spool, Arc::new(|_| {})).await?;
    Ok(len)
}
