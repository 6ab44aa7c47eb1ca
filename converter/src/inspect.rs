//! What an image consists of, seen cheaply: of a lazy layer only its index and dedup section are read.
//!
//! `docs/JSON.md` explains the names of the fields. Bytes are counted where they are stored: content without holes, each hard link once.

mod hot_pack;
mod overlap;
mod recorded;

use format_spec::{
    Digest, FormatError, Index, LazyLayer,
    dedup::{self, DedupPiece},
};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

pub use self::{
    hot_pack::{HotEntry, HotPackFacts, ReasonFacts},
    recorded::{RecordedProfile, recorded_profile},
};
use crate::{
    image::{
        ImageError, ImageSource,
        manifest::Descriptor,
        platform::Platform,
        resolve::{ResolveError, resolve_image},
    },
    layer::{
        lazy::{LayerKind, LazyLayerError, dedup_range, layer_kind},
        sign::signatures_of,
    },
};

/// Layers asked for side by side.
const LAYERS_AT_ONCE: usize = 4;

/// An image as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImageFacts {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the config: the image ID.
    pub config_digest: Digest,
    /// `os/architecture[/variant]`.
    pub platform: String,
    /// The layers, lowest first.
    pub layers: Vec<LayerFacts>,
    /// All layers together.
    pub total: Total,
}

/// Sums over the layers of an image, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Number of lazy layers.
    pub lazy_layer_count: usize,
    /// Length of all blobs.
    pub compressed_len: u64,
    /// Length of the lazy blobs.
    pub lazy_compressed_len: u64,
    /// Length of the tar streams of the lazy layers.
    pub lazy_plain_len: u64,
    /// Length of their indexes, compressed.
    pub index_len: u64,
    /// Length of their hot packs, compressed.
    pub hot_pack_len: u64,
    /// Content that a layer has twice.
    pub duplicate_len: u64,
    /// Content that a lower layer has already.
    pub duplicate_of_lower_len: u64,
    /// Content of lazy layers that later lazy layers hide.
    pub hidden_len: u64,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerFacts {
    /// Digest of the blob.
    pub digest: Digest,
    /// Digest of the tar stream, by the config.
    pub diff_id: Digest,
    /// Media type.
    pub media_type: String,
    /// Length of the blob, in bytes.
    pub compressed_len: u64,
    /// What makes it lazy; `None` for an ordinary layer.
    pub lazy_by: Option<LazyBy>,
    /// Ids of the keys of which it has signatures, by its own word: nothing is verified here.
    pub signed_by: Vec<String>,
    /// What its index says.
    #[serde(flatten)]
    pub lazy: Option<LazyFacts>,
}

/// Who says that a layer is lazy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LazyBy {
    /// The annotations of its descriptor.
    Annotations,
    /// The footer of its blob alone: no node will know it.
    Footer,
}

/// What the index of a layer says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LazyFacts {
    /// Length of the tar stream, in bytes.
    pub plain_len: u64,
    /// Length of the blob in parts of that of the tar stream.
    pub ratio: f64,
    /// Content of regular files, in bytes.
    pub content_len: u64,
    /// Number of inodes: files, directories, links, devices.
    pub inode_count: u64,
    /// Number of frames.
    pub frame_count: u64,
    /// Compressed lengths of frames, in bytes.
    pub frame_compressed_len: Spread,
    /// Plain lengths of frames, in bytes.
    pub frame_plain_len: Spread,
    /// Compressed length of the index, in bytes.
    pub index_len: u64,
    /// Length of the index as a node keeps it, in bytes.
    pub index_plain_len: u64,
    /// Length of the hot pack in the blob, in bytes; 0 without one.
    pub hot_pack_len: u64,
    /// Content of the hot pack, if there is one.
    pub hot_pack: Option<HotPackFacts>,
    /// Length of the dedup section in the blob, in bytes; 0 without one.
    pub dedup_len: u64,
    /// Figures of the dedup section, if there is one.
    pub dedup: Option<DedupFacts>,
    /// Content that later lazy layers hide.
    pub hidden: HiddenFacts,
}

/// How numbers spread; all 0 when there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: u64,
    /// The one in the middle.
    pub median: u64,
    /// The largest.
    pub max: u64,
}

/// Figures of a dedup section, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DedupFacts {
    /// Number of pieces whose digests it holds.
    pub piece_count: u64,
    /// Length of those pieces.
    pub held_len: u64,
    /// Length of the pieces that this layer has more than once, each counted but for its first time.
    pub duplicate_len: u64,
    /// Length of the pieces that a lower layer has.
    pub duplicate_of_lower_len: u64,
}

/// Files of a layer that the merged tree does not show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HiddenFacts {
    /// Number of regular files.
    pub file_count: u64,
    /// Their content, in bytes.
    pub hidden_len: u64,
}

/// An image cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Finding it.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Finding out whether a layer is lazy.
    #[error(transparent)]
    LazyLayer(#[from] LazyLayerError),
    /// Reading it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An index or a dedup section is damaged.
    #[error("layer {digest}: {error}: `lazuli check` says what else is wrong")]
    Format {
        /// The blob.
        digest: Digest,
        /// What is wrong.
        error: FormatError,
    },
    /// The layers do not make a tree.
    #[error(transparent)]
    Merge(#[from] tree::merge::MergeError),
}

/// A lazy layer whose index has been read.
struct OpenLayer {
    lazy: LazyLayer,
    lazy_by: LazyBy,
    index: Index<Vec<u8>>,
    pieces: Vec<DedupPiece>,
}

/// Looks at the image for `platform` at `source`; lists what is in hot packs `with_hot_files`.
///
/// # Errors
///
/// When manifest, config, an index or a dedup section cannot be read or is damaged.
pub async fn inspect_image(
    source: &ImageSource,
    platform: Option<&Platform>,
    with_hot_files: bool,
) -> Result<ImageFacts, InspectError> {
    let image = resolve_image(source, platform).await?;
    let descriptors = &image.manifest.layers;
    let opened: Vec<Option<OpenLayer>> = stream::iter(descriptors)
        .map(|descriptor| open_layer(source, descriptor))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    let lazy: Vec<&OpenLayer> = opened.iter().flatten().collect();
    let mut hidden = overlap::hidden(&lazy)?.into_iter();
    let mut dedup = overlap::duplicates(&lazy).into_iter();
    let mut layers = Vec::with_capacity(descriptors.len());
    for ((descriptor, diff_id), open) in descriptors.iter().zip(&image.diff_ids).zip(&opened) {
        let facts = open.as_ref().map(|open| LazyFacts {
            hidden: hidden.next().unwrap_or_default(),
            dedup: dedup.next().flatten(),
            ..lazy_facts(open, descriptor, with_hot_files)
        });
        layers.push(LayerFacts {
            digest: descriptor.digest,
            diff_id: *diff_id,
            media_type: descriptor.media_type.clone(),
            compressed_len: descriptor.size,
            lazy_by: open.as_ref().map(|open| open.lazy_by),
            signed_by: open.as_ref().map(|_| signed_by(descriptor)).unwrap_or_default(),
            lazy: facts,
        });
    }
    let (digest, config_digest) = (image.digest, image.manifest.config.digest);
    Ok(ImageFacts { digest, config_digest, platform: image.platform.to_string(), total: total(&layers), layers })
}

/// Reads the index of a layer; `None` if it is ordinary.
async fn open_index(
    source: &ImageSource,
    descriptor: &Descriptor,
) -> Result<Option<(LazyLayer, LazyBy, Index<Vec<u8>>)>, InspectError> {
    let (lazy, lazy_by) = match layer_kind(source, descriptor).await? {
        LayerKind::Ordinary => return Ok(None),
        LayerKind::Annotated(lazy) => (lazy, LazyBy::Annotations),
        LayerKind::FooterOnly(lazy) => (lazy, LazyBy::Footer),
    };
    let failed = |error| InspectError::Format { digest: descriptor.digest, error };
    let compressed = source.blob_range(descriptor, lazy.index.range()).await?;
    let index = Index::from_compressed(&compressed, &lazy.index).map_err(failed)?;
    Ok(Some((lazy, lazy_by, index)))
}

/// Reads index and dedup section of a layer; `None` if it is ordinary.
async fn open_layer(source: &ImageSource, descriptor: &Descriptor) -> Result<Option<OpenLayer>, InspectError> {
    let Some((lazy, lazy_by, index)) = open_index(source, descriptor).await? else { return Ok(None) };
    let failed = |error| InspectError::Format { digest: descriptor.digest, error };
    let mut pieces = Vec::new();
    if let (Some(section), Some(range)) = (index.dedup(), dedup_range(&lazy, &index)) {
        let compressed = source.blob_range(descriptor, range).await?;
        pieces = dedup::decompress(&compressed, section, index.space_len()).map_err(failed)?;
    }
    Ok(Some(OpenLayer { lazy, lazy_by, index, pieces }))
}

fn signed_by(descriptor: &Descriptor) -> Vec<String> {
    let signed = signatures_of(descriptor).and_then(Result::ok);
    signed.into_iter().flat_map(|signed| signed.signatures).map(|signature| signature.key.to_string()).collect()
}

/// What one index says by itself.
fn lazy_facts(open: &OpenLayer, descriptor: &Descriptor, with_hot_files: bool) -> LazyFacts {
    let OpenLayer { lazy, index, .. } = open;
    let plain_len = index.tar_len();
    let frames = index.frames();
    LazyFacts {
        plain_len,
        ratio: descriptor.size as f64 / plain_len.max(1) as f64,
        content_len: index.extents().iter().map(|extent| extent.len.get()).fold(0, u64::saturating_add),
        inode_count: index.inodes().len() as u64,
        frame_count: frames.len() as u64,
        frame_compressed_len: spread(frames.iter().map(|frame| frame.compressed_len.get().into())),
        frame_plain_len: spread(frames.iter().map(|frame| frame.plain_len.get().into())),
        index_len: lazy.index.compressed_len,
        index_plain_len: lazy.index.plain_len,
        hot_pack_len: index.hot_len(),
        hot_pack: hot_pack::facts(index, with_hot_files),
        dedup_len: index.dedup().map_or(0, |section| section.compressed_len.get()),
        dedup: None,
        hidden: HiddenFacts::default(),
    }
}

fn spread(values: impl Iterator<Item = u64>) -> Spread {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    let at = |place: usize| values.get(place).copied().unwrap_or(0);
    Spread { min: at(0), median: at(values.len() / 2), max: at(values.len().saturating_sub(1)) }
}

fn total(layers: &[LayerFacts]) -> Total {
    let mut total = Total::default();
    // Lengths that manifests and indexes say are a stranger's numbers.
    let add = |sum: &mut u64, len: u64| *sum = sum.saturating_add(len);
    for layer in layers {
        add(&mut total.compressed_len, layer.compressed_len);
        let Some(lazy) = &layer.lazy else { continue };
        total.lazy_layer_count += 1;
        add(&mut total.lazy_compressed_len, layer.compressed_len);
        add(&mut total.lazy_plain_len, lazy.plain_len);
        add(&mut total.index_len, lazy.index_len);
        add(&mut total.hot_pack_len, lazy.hot_pack_len);
        add(&mut total.hidden_len, lazy.hidden.hidden_len);
        let dedup = lazy.dedup.unwrap_or_default();
        add(&mut total.duplicate_len, dedup.duplicate_len);
        add(&mut total.duplicate_of_lower_len, dedup.duplicate_of_lower_len);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_has_ends_and_middle() {
        assert_eq!(spread([5, 1, 9, 3].into_iter()), Spread { min: 1, median: 5, max: 9 });
        assert_eq!(spread([7].into_iter()), Spread { min: 7, median: 7, max: 7 });
        assert_eq!(spread(std::iter::empty()), Spread::default());
    }
}
