//! Skippable frames and the footer that ends every layer blob (SPEC.md 2, 3).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::{
    digest::Digest,
    limits::INDEX_LEN_MAX,
    records::{FORMAT_VERSION, IndexLocation},
    table::{FormatError, before_checksum},
};

/// Length of a skippable frame's header: magic number and content length (RFC 8878 3.1.2).
pub const SKIPPABLE_HEADER_LEN: u64 = 8;
/// The beginning of a blob whose tar stream has no bytes (SPEC.md 2): a zstd frame that decompresses to nothing.
pub const EMPTY_FRAME: [u8; 9] = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x00, 0x01, 0x00, 0x00];
/// Length of the footer's content.
pub const FOOTER_LEN: u64 = size_of::<Footer>() as u64;
/// Length of the skippable frame that holds the footer: the last bytes of a blob.
pub const FOOTER_FRAME_LEN: u64 = SKIPPABLE_HEADER_LEN + FOOTER_LEN;
/// First eight bytes of the footer's content.
pub const FOOTER_MAGIC: [u8; 8] = *b"LAZULIFT";

/// What a skippable frame holds; the value is its zstd magic number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SkippableKind {
    /// The compressed index.
    Index = 0x184D_2A51,
    /// Copies of what a start-up reads: zstd frames.
    HotPack = 0x184D_2A52,
    /// Content digests of files and pieces: one zstd frame.
    Dedup = 0x184D_2A53,
    /// The footer.
    Footer = 0x184D_2A5F,
}

/// The header of a skippable frame with `content_len` bytes of content.
///
/// `None` if the content is longer than a skippable frame can say (4 GiB).
pub fn skippable_header(kind: SkippableKind, content_len: u64) -> Option<[u8; 8]> {
    let len = u32::try_from(content_len).ok()?;
    let mut header = [0; 8];
    header[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    header[4..].copy_from_slice(&len.to_le_bytes());
    Some(header)
}

/// Content of the footer (SPEC.md 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// [`FOOTER_MAGIC`].
    pub magic: [u8; 8],
    /// Format version.
    pub version: U32,
    /// Zero.
    pub reserved: U32,
    /// Features a reader may ignore.
    pub features_compatible: U64,
    /// Features a reader must know.
    pub features_incompatible: U64,
    /// Offset of the compressed index in the blob.
    pub index_offset: U64,
    /// Length of the compressed index, in bytes.
    pub index_compressed_len: U64,
    /// Length of the index, in bytes.
    pub index_plain_len: U64,
    /// SHA-256 of the compressed index.
    pub index_digest: [u8; 32],
    /// Offset of the hot pack; 0 without one.
    pub hot_offset: U64,
    /// Length of the hot pack; 0 without one.
    pub hot_len: U64,
    /// Offset of the dedup section; 0 without one.
    pub dedup_offset: U64,
    /// Length of the dedup section; 0 without one.
    pub dedup_len: U64,
    /// Zero.
    pub reserved2: U32,
    /// CRC-32 of the footer up to here.
    pub crc32: U32,
}
const _: () = assert!(size_of::<Footer>() == 128);

impl Footer {
    /// A footer for a blob with this index, hot pack and dedup section; the last two may have length 0.
    pub fn new(index: &IndexLocation, hot_len: u64, dedup_len: u64) -> Self {
        let behind = |end: u64, len: u64| if len > 0 { end + SKIPPABLE_HEADER_LEN } else { 0 };
        let hot_offset = behind(index.range().end, hot_len);
        let hot_end = if hot_len > 0 { hot_offset + hot_len } else { index.range().end };
        let dedup_offset = behind(hot_end, dedup_len);
        let mut footer = Self {
            magic: FOOTER_MAGIC,
            version: FORMAT_VERSION.into(),
            reserved: 0.into(),
            features_compatible: 0.into(),
            features_incompatible: 0.into(),
            index_offset: index.offset.into(),
            index_compressed_len: index.compressed_len.into(),
            index_plain_len: index.plain_len.into(),
            index_digest: *index.digest.as_bytes(),
            hot_offset: hot_offset.into(),
            hot_len: hot_len.into(),
            dedup_offset: dedup_offset.into(),
            dedup_len: dedup_len.into(),
            reserved2: 0.into(),
            crc32: 0.into(),
        };
        footer.crc32 = footer.checksum().into();
        footer
    }

    fn checksum(&self) -> u32 {
        crc32fast::hash(before_checksum(self.as_bytes()))
    }

    /// The footer as the skippable frame that ends a blob.
    pub fn to_frame(&self) -> Vec<u8> {
        let header = skippable_header(SkippableKind::Footer, FOOTER_LEN).expect("128 fits");
        [&header, self.as_bytes()].concat()
    }

    /// The fields as they stand in the last [`FOOTER_FRAME_LEN`] bytes of a blob, whatever they say; `None` where no
    /// skippable frame of that length ends it.
    pub fn in_frame(frame: &[u8]) -> Option<Self> {
        let header = skippable_header(SkippableKind::Footer, FOOTER_LEN).expect("128 fits");
        Self::read_from_bytes(frame.strip_prefix(&header)?).ok()
    }

    /// Reads the last [`FOOTER_FRAME_LEN`] bytes of a blob of `blob_len` bytes.
    ///
    /// Returns where the index lies and how long the hot pack behind it is. `Ok(None)` when the blob does not
    /// end with a Lazuli footer: an ordinary layer.
    ///
    /// # Errors
    ///
    /// When there is a footer that cannot be right: checksum, version, features, positions.
    pub fn from_frame(frame: &[u8], blob_len: u64) -> Result<Option<(IndexLocation, u64)>, FormatError> {
        let header = skippable_header(SkippableKind::Footer, FOOTER_LEN).expect("128 fits");
        let Some(footer) = frame.strip_prefix(&header).and_then(|content| Self::ref_from_bytes(content).ok()) else {
            return Ok(None);
        };
        if footer.magic != FOOTER_MAGIC {
            return Ok(None);
        }
        if footer.checksum() != footer.crc32.get() {
            return Err(FormatError::Checksum {
                what: "footer",
                expected: footer.crc32.get(),
                found: footer.checksum(),
            });
        }
        if footer.version != FORMAT_VERSION {
            return Err(FormatError::Version { what: "footer", found: footer.version.get() });
        }
        if footer.features_incompatible.get() != 0 {
            return Err(FormatError::Features { what: "footer", bits: footer.features_incompatible.get() });
        }
        let index = IndexLocation {
            offset: footer.index_offset.get(),
            compressed_len: footer.index_compressed_len.get(),
            plain_len: footer.index_plain_len.get(),
            digest: Digest::from_bytes(footer.index_digest),
        };
        let end = [index.compressed_len, footer.hot_len.get(), footer.dedup_len.get(), FOOTER_FRAME_LEN]
            .into_iter()
            .try_fold(index.offset, u64::checked_add);
        let is_inside = end.is_some_and(|end| end <= blob_len);
        if !is_inside || index.plain_len > INDEX_LEN_MAX {
            return Err(FormatError::Rule { what: "footer", number: 0, rule: "the index lies outside the blob" });
        }
        let expected = Self::new(&index, footer.hot_len.get(), footer.dedup_len.get());
        if (footer.hot_offset, footer.dedup_offset) != (expected.hot_offset, expected.dedup_offset) {
            return Err(FormatError::Rule {
                what: "footer",
                number: 0,
                rule: "hot pack or dedup section are misplaced",
            });
        }
        Ok(Some((index, footer.hot_len.get())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: IndexLocation =
        IndexLocation { offset: 8, compressed_len: 10, plain_len: 20, digest: Digest::from_bytes([7; 32]) };

    #[test]
    fn a_footer_locates_the_index() {
        let frame = Footer::new(&INDEX, 0, 0).to_frame();
        assert_eq!(frame.len() as u64, FOOTER_FRAME_LEN);
        assert_eq!(Footer::from_frame(&frame, 18 + FOOTER_FRAME_LEN), Ok(Some((INDEX, 0))));
        let frame = Footer::new(&INDEX, 30, 40).to_frame();
        assert_eq!(Footer::from_frame(&frame, 18 + 78 + 8 + FOOTER_FRAME_LEN), Ok(Some((INDEX, 30))));
        assert_eq!(Footer::from_frame(&[0; 136], 1 << 20), Ok(None));
    }

    #[test]
    fn refuses_positions_outside_the_blob_and_any_changed_byte() {
        let frame = Footer::new(&INDEX, 0, 0).to_frame();
        assert!(Footer::from_frame(&frame, 17 + FOOTER_FRAME_LEN).is_err());
        for position in 16..frame.len() {
            let mut changed = frame.clone();
            changed[position] ^= 1;
            assert!(Footer::from_frame(&changed, 1 << 20).is_err(), "{position}");
        }
    }

    #[test]
    fn the_empty_frame_is_a_frame_with_nothing_in_it() {
        assert_eq!(zstd::bulk::decompress(&EMPTY_FRAME, 1).expect("a frame"), b"");
        assert_eq!(zstd::stream::decode_all(&EMPTY_FRAME[..]).expect("a frame"), b"");
    }

    #[test]
    fn zstd_skips_the_footer() {
        let frame = zstd::bulk::compress(b"tar", 3).expect("in memory");
        let blob = [frame, Footer::new(&INDEX, 0, 0).to_frame()].concat();
        assert_eq!(zstd::decode_all(blob.as_slice()).expect("valid frames"), b"tar");
    }
}
