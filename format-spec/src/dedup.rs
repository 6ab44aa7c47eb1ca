//! The dedup section: digests of what files contain, for nodes that may have it already (SPEC.md 5.9).
//!
//! It is fetched off the start-up path. What it says is a hint: who copies bytes because of it hashes
//! them first, so a section that lies costs a comparison and nothing else.

use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U64};

use crate::{
    builder::CompressedIndex,
    digest::Digest,
    records::DedupLocation,
    table::{self, FormatError, NewSection, Unread},
};

/// Section kind of the pieces.
pub const PIECES: u32 = 32;

/// The content of a file, or a piece of a large one (SPEC.md 5.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DedupPiece {
    /// Offset in the plain address space.
    pub plain_offset: U64,
    /// Length in bytes, at least 1.
    pub len: U64,
    /// SHA-256 of these bytes.
    pub digest: [u8; 32],
}
const _: () = assert!(size_of::<DedupPiece>() == 48);

impl DedupPiece {
    /// The bytes of the plain address space.
    pub fn plain_range(&self) -> Range<u64> {
        let start = self.plain_offset.get();
        start..start.saturating_add(self.len.get())
    }

    /// The digest of the content.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.digest)
    }
}

/// Writes a dedup section; `pieces` ascend and do not overlap.
///
/// # Errors
///
/// When zstd fails.
pub fn compress(pieces: &[DedupPiece]) -> Result<CompressedIndex, FormatError> {
    let section =
        NewSection { kind: PIECES, record_len: size_of::<DedupPiece>(), delta_words: 0b11, bytes: pieces.as_bytes() };
    CompressedIndex::of(table::encode(0, 0, &[section]))
}

/// Reads a dedup section and checks it; `space_len` is the length of the layer's plain address space.
///
/// # Errors
///
/// When the bytes are not those of the digest, or break a rule of SPEC.md 5.10.
pub fn decompress(compressed: &[u8], location: &DedupLocation, space_len: u64) -> Result<Vec<DedupPiece>, FormatError> {
    pieces(&open(compressed, location)?, space_len)
}

/// Decompresses a dedup section into the open form.
///
/// # Errors
///
/// When the bytes are not those of the digest, or no container of the format.
pub fn open(compressed: &[u8], location: &DedupLocation) -> Result<Vec<u8>, FormatError> {
    let found = Digest::of(compressed);
    let expected = Digest::from_bytes(location.digest);
    if found != expected {
        return Err(FormatError::Digest { what: "dedup section", expected, found });
    }
    let bytes = table::decompress(compressed, location.plain_len.get())?;
    let (_, entries) = table::parse(&bytes)?;
    table::check_sections(&bytes, entries)?;
    Ok(bytes)
}

/// The parts of a dedup section in open form that no reader looks at: both lengths of its header are 0 (SPEC.md 5.9).
///
/// # Errors
///
/// When header or section table are damaged.
pub fn unread(open: &[u8]) -> Result<Unread, FormatError> {
    let mut unread = Unread::of(open, &[PIECES])?;
    let (header, _) = table::parse(open)?;
    unread.has_stray_bytes |= header.tar_len != 0 || header.space_len != 0;
    Ok(unread)
}

/// The pieces in the open form of a dedup section.
///
/// # Errors
///
/// When they break a rule of SPEC.md 5.10.
pub fn pieces(open: &[u8], space_len: u64) -> Result<Vec<DedupPiece>, FormatError> {
    let (_, entries) = table::parse(open)?;
    let entry = entries.iter().find(|entry| entry.kind == PIECES);
    let section = entry.and_then(table::section_range).and_then(|range| open.get(range)).unwrap_or_default();
    let rule = |number, rule| FormatError::Rule { what: "dedup piece", number, rule };
    let pieces = <[DedupPiece]>::ref_from_bytes(section).map_err(|_| rule(0, "record length of another version"))?;
    let mut end = 0;
    for (number, piece) in (0..).zip(pieces) {
        let range = piece.plain_range();
        if piece.len == 0 || range.start < end || range.end > space_len {
            return Err(rule(number, "it is empty, out of order or outside the plain address space"));
        }
        end = range.end;
    }
    Ok(pieces.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(section: &CompressedIndex) -> DedupLocation {
        DedupLocation {
            compressed_len: (section.bytes.len() as u64).into(),
            plain_len: section.plain_len.into(),
            digest: *section.digest.as_bytes(),
        }
    }

    fn piece(offset: u64, len: u64) -> DedupPiece {
        DedupPiece { plain_offset: offset.into(), len: len.into(), digest: *Digest::of(b"content").as_bytes() }
    }

    #[test]
    fn pieces_come_back() {
        let pieces = [piece(0, 5), piece(4096, 1)];
        let section = compress(&pieces).unwrap();
        assert_eq!(decompress(&section.bytes, &location(&section), 5000), Ok(pieces.to_vec()));
    }

    #[test]
    fn refuses_other_bytes_overlaps_and_pieces_outside() {
        let section = compress(&[piece(0, 5), piece(4, 1)]).unwrap();
        assert!(matches!(
            decompress(&section.bytes, &location(&section), 5000),
            Err(FormatError::Rule { number: 1, .. })
        ));
        let section = compress(&[piece(0, 5)]).unwrap();
        assert!(decompress(&section.bytes, &location(&section), 4).is_err());
        assert!(matches!(decompress(b"other", &location(&section), 5), Err(FormatError::Digest { .. })));
    }
}
