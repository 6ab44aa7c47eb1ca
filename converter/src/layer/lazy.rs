//! Whether a layer is lazy, and who says so: the annotations of its descriptor or the footer of its blob.
//!
//! Annotations are covered by the manifest digest and can be believed at once. A footer is covered by the
//! blob digest alone: tools that rebuild manifests drop annotations, and then it is all there is. Who acts
//! on a footer reads the whole blob first; who only shows it need not.

use std::ops::Range;

use bytes::Bytes;
use format_spec::{
    Digest, DigestHasher, Footer, FormatError, Index, LazyLayer,
    annotation::{self, AnnotationError},
    footer::{FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN},
};
use futures_util::StreamExt;

use crate::image::{
    ImageError, ImageSource,
    manifest::{Descriptor, media_type},
};

/// Says that a layer is lazy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// It can be read as a whole only.
    Ordinary,
    /// The annotations say so.
    Annotated(LazyLayer),
    /// Only the footer says so; nobody has compared the blob with its digest yet.
    FooterOnly(LazyLayer),
}

/// A layer says that it is lazy, in a way that cannot be right.
#[derive(Debug, thiserror::Error)]
pub enum LazyLayerError {
    /// Reading it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The annotations mean nothing.
    #[error("layer {digest}: {error}")]
    Annotations {
        /// The blob.
        digest: Digest,
        /// What is wrong with them.
        error: AnnotationError,
    },
    /// The footer means nothing.
    #[error("layer {digest}: {error}")]
    Footer {
        /// The blob.
        digest: Digest,
        /// What is wrong with it.
        error: FormatError,
    },
}

/// What a descriptor's annotations say; `None` without any, or when they describe another blob.
///
/// Tools that compress a layer anew may carry annotations along: those are of no use, and no damage.
///
/// # Errors
///
/// When the annotations are there and mean nothing.
pub fn annotated_layer(descriptor: &Descriptor) -> Result<Option<LazyLayer>, LazyLayerError> {
    let digest = descriptor.digest;
    let lazy = LazyLayer::from_annotations(|key| descriptor.annotation(key))
        .map_err(|error| LazyLayerError::Annotations { digest, error })?;
    Ok(lazy.filter(|lazy| lazy.blob == digest && lazy.blob_len == descriptor.size))
}

/// Looks at the annotations and, without them, at the last bytes of a zstd blob.
///
/// # Errors
///
/// When the blob cannot be read, or annotations or footer mean nothing.
pub async fn layer_kind(source: &ImageSource, descriptor: &Descriptor) -> Result<LayerKind, LazyLayerError> {
    if let Some(lazy) = annotated_layer(descriptor)? {
        return Ok(LayerKind::Annotated(lazy));
    }
    let Some(footer_start) = footer_start(descriptor) else { return Ok(LayerKind::Ordinary) };
    let frame = source.blob_range(descriptor, footer_start..descriptor.size).await?;
    Ok(footer_layer(descriptor, &frame)?.map_or(LayerKind::Ordinary, LayerKind::FooterOnly))
}

/// The lazy layer that `descriptor` points to, believable: a footer is taken from a blob that was read and
/// compared with its digest. `None` for an ordinary layer.
///
/// # Errors
///
/// When the blob cannot be read or is damaged, or annotations or footer mean nothing.
pub async fn find_lazy_layer(
    source: &ImageSource,
    descriptor: &Descriptor,
) -> Result<Option<LazyLayer>, LazyLayerError> {
    match layer_kind(source, descriptor).await? {
        LayerKind::Ordinary => Ok(None),
        LayerKind::Annotated(lazy) => Ok(Some(lazy)),
        LayerKind::FooterOnly(_) => footer_layer(descriptor, &verified_footer(source, descriptor).await?),
    }
}

/// The descriptor of a lazy layer, with the annotations that it may have lost.
pub fn annotate(mut descriptor: Descriptor, lazy: Option<LazyLayer>) -> Descriptor {
    if let Some(lazy) = lazy {
        // Annotations that stood there may have been said of another blob.
        let mut annotations = descriptor.annotations.take().unwrap_or_default();
        annotations.retain(|key, _| !annotation::ALL.contains(&key.as_str()));
        annotations.extend(lazy.to_annotations());
        descriptor.annotations = Some(annotations);
    }
    descriptor
}

/// Where the dedup section of a layer lies in its blob, if it has one: behind hot pack or index.
pub fn dedup_range<B: AsRef<[u8]>>(lazy: &LazyLayer, index: &Index<B>) -> Option<Range<u64>> {
    let len = index.dedup()?.compressed_len.get();
    let end = lazy.hot_range().map_or(lazy.index.range().end, |range| range.end);
    let start = end.saturating_add(SKIPPABLE_HEADER_LEN);
    Some(start..start.saturating_add(len))
}

/// Where the footer stands in a blob that may have one.
fn footer_start(descriptor: &Descriptor) -> Option<u64> {
    let is_zstd = media_type::ZSTD_LAYERS.contains(&descriptor.media_type.as_str());
    // Blobs that lie elsewhere need not be here.
    let may_have_one = is_zstd && !descriptor.is_elsewhere();
    descriptor.size.checked_sub(FOOTER_FRAME_LEN).filter(|_| may_have_one)
}

fn footer_layer(descriptor: &Descriptor, frame: &[u8]) -> Result<Option<LazyLayer>, LazyLayerError> {
    let (digest, blob_len) = (descriptor.digest, descriptor.size);
    let found = Footer::from_frame(frame, blob_len).map_err(|error| LazyLayerError::Footer { digest, error })?;
    Ok(found.map(|(index, hot_len)| LazyLayer { blob: digest, blob_len, index, hot_len }))
}

/// The last bytes of a blob that hashes to its digest.
async fn verified_footer(source: &ImageSource, descriptor: &Descriptor) -> Result<Vec<u8>, LazyLayerError> {
    let digest = descriptor.digest;
    let mut stream = source.blob_stream(&digest).await?;
    let mut hasher = DigestHasher::default();
    let mut tail = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece: Bytes = piece.map_err(|error| ImageError::Stream { digest, reason: error.message })?;
        hasher.update(&piece);
        tail.extend_from_slice(&piece);
        let surplus = (tail.len() as u64).saturating_sub(FOOTER_FRAME_LEN);
        tail.drain(..usize::try_from(surplus).expect("less than there is"));
    }
    let found = hasher.finish();
    if found == digest { Ok(tail) } else { Err(ImageError::Digest { expected: digest, found }.into()) }
}
