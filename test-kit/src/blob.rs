//! Blobs of lazy layers, put together of parts that a test makes or changes (`SPEC.md` 2).

use format_spec::{
    CompressedIndex, Digest, Footer, Frame, HotFrame, LazyLayer,
    footer::{EMPTY_FRAME, SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
    records::DedupLocation,
};

/// Fast: tests compare what they read, not how long it is.
const LEVEL: i32 = 1;

/// Frames of a tar stream, one behind the other.
#[derive(Debug, Clone, Default)]
pub struct Frames {
    /// Their bytes, with which the blob begins.
    pub bytes: Vec<u8>,
    /// Their records in the index.
    pub records: Vec<Frame>,
}

impl Frames {
    /// A whole tar stream, a frame for each `plain_len` bytes of it.
    pub fn of(tar: &[u8], plain_len: usize) -> Self {
        let mut frames = Self::default();
        tar.chunks(plain_len).for_each(|plain| frames.push(plain, plain.len()));
        frames
    }

    /// Adds a frame of these bytes, of which the index says that there are `plain_len`.
    pub fn push(&mut self, plain: &[u8], plain_len: usize) {
        self.push_compressed(&zstd::bulk::compress(plain, LEVEL).expect("in memory"), plain_len);
    }

    /// Adds a frame that is compressed, or pretends to be.
    pub fn push_compressed(&mut self, compressed: &[u8], plain_len: usize) {
        self.records.push(Frame {
            blob_offset: (self.bytes.len() as u64).into(),
            tar_offset: self.records.last().map_or(0, |frame| frame.tar_range().end).into(),
            compressed_len: short(compressed.len()).into(),
            plain_len: short(plain_len).into(),
            digest: *Digest::of(compressed).as_bytes(),
        });
        self.bytes.extend_from_slice(compressed);
    }
}

/// The record of a frame of the hot pack in the index.
pub fn hot_frame(compressed: &[u8], plain_len: usize) -> HotFrame {
    HotFrame {
        compressed_len: short(compressed.len()).into(),
        plain_len: short(plain_len).into(),
        digest: *Digest::of(compressed).as_bytes(),
    }
}

/// The record of the dedup section in the index.
pub fn dedup_location(section: &CompressedIndex) -> DedupLocation {
    DedupLocation {
        compressed_len: (section.bytes.len() as u64).into(),
        plain_len: section.plain_len.into(),
        digest: *section.digest.as_bytes(),
    }
}

/// The parts of a blob but for the footer. Hot pack and dedup section are left out where they have no bytes.
#[derive(Debug, Clone, Copy)]
pub struct BlobParts<'a> {
    /// Frames of the tar stream; where it has no bytes, the one that says so takes their place.
    pub frames: &'a [u8],
    /// The index.
    pub index: &'a CompressedIndex,
    /// Frames of the hot pack.
    pub hot_pack: &'a [u8],
    /// The compressed dedup section.
    pub dedup: &'a [u8],
}

impl BlobParts<'_> {
    /// The blob, and the words of a manifest about it.
    pub fn assemble(&self) -> (Vec<u8>, LazyLayer) {
        let mut blob = if self.frames.is_empty() { EMPTY_FRAME.to_vec() } else { self.frames.to_vec() };
        let index = self.index.location(blob.len() as u64 + SKIPPABLE_HEADER_LEN);
        let (hot_len, dedup_len) = (self.hot_pack.len() as u64, self.dedup.len() as u64);
        let parts = [
            (SkippableKind::Index, self.index.bytes.as_slice()),
            (SkippableKind::HotPack, self.hot_pack),
            (SkippableKind::Dedup, self.dedup),
        ];
        for (kind, bytes) in parts.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
            blob.extend(skippable_header(kind, bytes.len() as u64).expect("tests make small blobs"));
            blob.extend(bytes);
        }
        blob.extend(Footer::new(&index, hot_len, dedup_len).to_frame());
        let layer = LazyLayer { blob: Digest::of(&blob), blob_len: blob.len() as u64, index, hot_len };
        (blob, layer)
    }
}

fn short(len: usize) -> u32 {
    u32::try_from(len).expect("tests make small frames")
}
