//! The annotations of a layer descriptor (SPEC.md 8).
//!
//! containerd hands annotations under `containerd.io/snapshot/` to a snapshotter as snapshot labels,
//! so these few values are all a node needs to mount a layer: no manifest, no extra round trip.

use std::{collections::BTreeMap, ops::Range};

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    footer::{FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN},
    limits::INDEX_LEN_MAX,
    records::{FORMAT_VERSION, IndexLocation},
};

/// Format version, decimal. Present on every lazy layer, and what marks one.
pub const VERSION: &str = "containerd.io/snapshot/lazuli/version";
/// Digest of the layer blob itself, as in the descriptor: labels do not carry it everywhere.
pub const BLOB_DIGEST: &str = "containerd.io/snapshot/lazuli/blob.digest";
/// Length of the layer blob in bytes, decimal.
pub const BLOB_LEN: &str = "containerd.io/snapshot/lazuli/blob.len";
/// Offset of the compressed index in the blob (of its skippable frame's content), decimal.
pub const INDEX_OFFSET: &str = "containerd.io/snapshot/lazuli/index.offset";
/// Length of the compressed index in bytes, decimal.
pub const INDEX_COMPRESSED_LEN: &str = "containerd.io/snapshot/lazuli/index.compressed-len";
/// Length of the index after decompression in bytes, decimal.
pub const INDEX_PLAIN_LEN: &str = "containerd.io/snapshot/lazuli/index.plain-len";
/// SHA-256 of the compressed index.
pub const INDEX_DIGEST: &str = "containerd.io/snapshot/lazuli/index.digest";

/// Length of the hot pack in bytes, decimal; absent without one. It lies directly behind the index.
pub const HOT_LEN: &str = "containerd.io/snapshot/lazuli/hot.len";

/// Digest of the blob that the layer was converted from; no snapshot label.
pub const SOURCE_DIGEST: &str = "io.lazuli.source.digest";
/// Digest of the tar stream in it.
pub const SOURCE_DIFF_ID: &str = "io.lazuli.source.diff-id";
/// What of the converter's options has shaped the layer: equal texts and equal digests mean that it can be used again.
pub const SOURCE_OPTIONS: &str = "io.lazuli.source.options";

/// All annotations of a lazy layer.
pub const ALL: [&str; 8] =
    [VERSION, BLOB_DIGEST, BLOB_LEN, INDEX_OFFSET, INDEX_COMPRESSED_LEN, INDEX_PLAIN_LEN, INDEX_DIGEST, HOT_LEN];

/// What names a layer on a node ([`LazyLayer::id`]).
pub type LayerId = Digest;

/// A layer that can be mounted lazily: all a node must be told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LazyLayer {
    /// Digest of the layer blob.
    pub blob: Digest,
    /// Length of the layer blob, in bytes.
    pub blob_len: u64,
    /// Its index.
    pub index: IndexLocation,
    /// Length of the hot pack, in bytes; 0 without one.
    #[serde(default)]
    pub hot_len: u64,
}

/// Annotations name a lazy layer but do not describe one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// One of the annotations is missing.
    #[error("annotation {0} is missing")]
    Missing(&'static str),
    /// One of the annotations has no usable value.
    #[error("annotation {key} has value {value:?}, expected {expected}")]
    Malformed {
        /// The annotation.
        key: &'static str,
        /// What stands there, shortened.
        value: String,
        /// What should.
        expected: &'static str,
    },
    /// The layer was written by a newer Lazuli.
    #[error(
        "layer format version {0}, this lazuli reads version {FORMAT_VERSION}: upgrade it or convert the image again"
    )]
    Version(u32),
}

impl LazyLayer {
    /// What names the layer on a node: the digest of its index.
    ///
    /// It covers all that is believed of a layer that is read in parts. The blob digest does not serve: nobody
    /// who reads a part can check it, so an image could claim a blob of another one under an index of its own.
    pub fn id(&self) -> LayerId {
        self.index.digest
    }

    /// The bytes of the blob behind its frames that a node may want: index, hot pack and dedup section, as far as there are
    /// such (SPEC.md 2).
    pub fn behind_frames(&self) -> Range<u64> {
        let index = self.index.range();
        index.start..self.blob_len.saturating_sub(FOOTER_FRAME_LEN).max(index.end)
    }

    /// The bytes of the blob that hold the dedup section; `None` without one.
    pub fn dedup_range(&self) -> Option<Range<u64>> {
        let before = self.hot_range().map_or(self.index.range().end, |hot| hot.end);
        let dedup = before.saturating_add(SKIPPABLE_HEADER_LEN)..self.behind_frames().end;
        (dedup.start < dedup.end).then_some(dedup)
    }

    /// The bytes of the blob that hold the hot pack, if there is one.
    pub fn hot_range(&self) -> Option<Range<u64>> {
        let start = self.index.range().end.saturating_add(SKIPPABLE_HEADER_LEN);
        (self.hot_len > 0).then(|| start..start.saturating_add(self.hot_len))
    }

    /// The annotations that describe this layer, sorted by key.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let mut annotations: BTreeMap<_, _> = [
            (VERSION, FORMAT_VERSION.to_string()),
            (BLOB_DIGEST, self.blob.to_string()),
            (BLOB_LEN, self.blob_len.to_string()),
            (INDEX_OFFSET, self.index.offset.to_string()),
            (INDEX_COMPRESSED_LEN, self.index.compressed_len.to_string()),
            (INDEX_PLAIN_LEN, self.index.plain_len.to_string()),
            (INDEX_DIGEST, self.index.digest.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        if self.hot_len > 0 {
            annotations.insert(HOT_LEN.to_owned(), self.hot_len.to_string());
        }
        annotations
    }

    /// Reads what [`Self::to_annotations`] wrote; `lookup` finds a value by key.
    ///
    /// `Ok(None)` for an ordinary layer: one without the version annotation.
    ///
    /// # Errors
    ///
    /// When the version annotation is there but the others do not describe a layer.
    pub fn from_annotations<'a>(lookup: impl Fn(&str) -> Option<&'a str>) -> Result<Option<Self>, AnnotationError> {
        let Some(version) = lookup(VERSION) else { return Ok(None) };
        let version = parse(VERSION, version, "a decimal number")?;
        if version != FORMAT_VERSION {
            return Err(AnnotationError::Version(version));
        }
        let text = |key: &'static str| lookup(key).ok_or(AnnotationError::Missing(key));
        let number = |key| text(key).and_then(|value| parse::<u64>(key, value, "a decimal number"));
        let digest = |key| text(key).and_then(|value| parse::<Digest>(key, value, "a sha256 digest"));
        let layer = Self {
            blob: digest(BLOB_DIGEST)?,
            blob_len: number(BLOB_LEN)?,
            index: IndexLocation {
                offset: number(INDEX_OFFSET)?,
                compressed_len: number(INDEX_COMPRESSED_LEN)?,
                plain_len: number(INDEX_PLAIN_LEN)?,
                digest: digest(INDEX_DIGEST)?,
            },
            hot_len: if lookup(HOT_LEN).is_some() { number(HOT_LEN)? } else { 0 },
        };
        let refuse =
            |key, value: u64, expected| Err(AnnotationError::Malformed { key, value: value.to_string(), expected });
        if layer.index.offset.checked_add(layer.index.compressed_len).is_none_or(|end| end > layer.blob_len) {
            return refuse(INDEX_OFFSET, layer.index.offset, "an index inside the blob");
        }
        if layer.hot_range().is_some_and(|range| range.end > layer.blob_len) {
            return refuse(HOT_LEN, layer.hot_len, "a hot pack inside the blob");
        }
        if layer.index.plain_len > INDEX_LEN_MAX || layer.index.compressed_len > INDEX_LEN_MAX {
            return refuse(INDEX_PLAIN_LEN, layer.index.plain_len, "an index of at most 1 GiB");
        }
        Ok(Some(layer))
    }
}

fn parse<T: std::str::FromStr>(key: &'static str, value: &str, expected: &'static str) -> Result<T, AnnotationError> {
    value.parse().map_err(|_| AnnotationError::Malformed { key, value: value.chars().take(100).collect(), expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> LazyLayer {
        LazyLayer {
            blob: Digest::of(b"blob"),
            blob_len: 1000,
            index: IndexLocation { offset: 800, compressed_len: 100, plain_len: 640, digest: Digest::of(b"index") },
            hot_len: 50,
        }
    }

    fn read(annotations: &BTreeMap<String, String>) -> Result<Option<LazyLayer>, AnnotationError> {
        LazyLayer::from_annotations(|key| annotations.get(key).map(String::as_str))
    }

    #[test]
    fn behind_the_frames_lie_index_hot_pack_and_dedup_section() {
        let end = 1000 - FOOTER_FRAME_LEN;
        let with = LazyLayer { index: IndexLocation { offset: 100, ..layer().index }, ..layer() };
        assert_eq!(
            (with.behind_frames(), with.hot_range(), with.dedup_range()),
            (100..end, Some(208..258), Some(266..end))
        );
        let without_pack = LazyLayer { hot_len: 0, ..with };
        assert_eq!((without_pack.hot_range(), without_pack.dedup_range()), (None, Some(208..end)));
        let without_section = LazyLayer { blob_len: 258 + FOOTER_FRAME_LEN, ..with };
        assert_eq!((without_section.behind_frames(), without_section.dedup_range()), (100..258, None));
        let too_short = LazyLayer { blob_len: 0, ..with };
        assert_eq!((too_short.behind_frames(), too_short.dedup_range()), (100..200, None));
    }

    #[test]
    fn annotations_describe_a_layer_completely() {
        assert_eq!(read(&layer().to_annotations()), Ok(Some(layer())));
        assert_eq!(read(&BTreeMap::new()), Ok(None));
    }

    #[test]
    fn refuses_each_missing_or_malformed_annotation() {
        for key in layer().to_annotations().keys().filter(|key| *key != VERSION) {
            let mut annotations = layer().to_annotations();
            annotations.insert(key.clone(), "no".to_owned());
            assert!(read(&annotations).is_err(), "{key}");
            annotations.remove(key);
            let expected = if key == HOT_LEN {
                Ok(Some(LazyLayer { hot_len: 0, ..layer() }))
            } else {
                read(&annotations).inspect(|_| panic!("{key} is missed by nobody"))
            };
            assert_eq!(read(&annotations), expected);
        }
    }

    #[test]
    fn refuses_an_index_outside_the_blob_and_another_version() {
        for outside in [LazyLayer { blob_len: 899, ..layer() }, LazyLayer { hot_len: 193, ..layer() }] {
            assert!(matches!(read(&outside.to_annotations()), Err(AnnotationError::Malformed { .. })), "{outside:?}");
        }
        assert!(read(&LazyLayer { hot_len: 92, ..layer() }.to_annotations()).is_ok());
        let mut newer = layer().to_annotations();
        newer.insert(VERSION.to_owned(), "2".to_owned());
        assert_eq!(read(&newer), Err(AnnotationError::Version(2)));
    }
}
