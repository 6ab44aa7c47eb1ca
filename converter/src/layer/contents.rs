//! What the frames of a layer hold of its files: the pieces of the dedup section.
//!
//! A piece is the content of a small file, or what one frame holds of a large one. It is hashed while
//! its frame is compressed, when nothing is known yet but its place in the tar stream; where it lies in
//! the plain address space is known when the index is built.

use std::ops::Range;

use format_spec::{Digest, Extent, dedup::DedupPiece};

/// Content of one file in the tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContentPiece {
    /// Where it stands in the tar stream.
    pub(crate) tar: Range<u64>,
    /// SHA-256 of it.
    pub(crate) digest: Digest,
}

/// Places `pieces` in the plain address space; leaves out those of files that have no name left.
///
/// Both run in tar order; a piece lies inside one extent or outside all.
pub(crate) fn dedup_pieces(extents: &[Extent], pieces: &[ContentPiece]) -> Vec<DedupPiece> {
    let mut extents = extents.iter().peekable();
    let mut placed = Vec::with_capacity(pieces.len());
    for piece in pieces {
        while extents.next_if(|extent| extent.tar_range().end <= piece.tar.start).is_some() {}
        let Some(extent) = extents.peek() else { break };
        let tar = extent.tar_range();
        if tar.start <= piece.tar.start && piece.tar.end <= tar.end {
            placed.push(DedupPiece {
                plain_offset: (extent.plain_offset.get() + (piece.tar.start - tar.start)).into(),
                len: (piece.tar.end - piece.tar.start).into(),
                digest: *piece.digest.as_bytes(),
            });
        }
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(tar: u64, plain: u64, len: u64) -> Extent {
        Extent { tar_offset: tar.into(), plain_offset: plain.into(), len: len.into() }
    }

    fn places(extents: &[Extent], pieces: &[Range<u64>]) -> Vec<Range<u64>> {
        let digest = Digest::of(b"");
        let pieces: Vec<_> = pieces.iter().map(|tar| ContentPiece { tar: tar.clone(), digest }).collect();
        dedup_pieces(extents, &pieces).iter().map(DedupPiece::plain_range).collect()
    }

    #[test]
    fn pieces_of_large_files_lie_one_after_the_other() {
        let extents = [extent(512, 0, 10), extent(1536, 4096, 9000)];
        let found = places(&extents, &[512..522, 1536..6000, 6000..10_536]);
        assert_eq!(found, [0..10, 4096..8560, 8560..13_096]);
    }

    #[test]
    fn pieces_of_files_that_were_replaced_are_left_out() {
        let extents = [extent(512, 0, 10), extent(4096, 4096, 5)];
        assert_eq!(places(&extents, &[512..522, 1536..1600, 4096..4101, 8192..8200]), [0..10, 4096..4101]);
    }
}
