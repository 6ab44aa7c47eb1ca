//! The chunks of a file: one for all of it, or shorter ones where some of them have no content.

use std::ops::Range;

use format_spec::Extent;

use super::layout::{BLOCK_LEN, CHUNK_BLOCK_BITS_MAX};

/// Shortest chunk of a file with holes, as `log2` of its blocks: 1 MiB, which is what overlayfs copies at a time.
const SPARSE_BITS_MIN: u8 = 8;
/// `log2` of the chunks that a file with holes has at most: 32 KiB of image a file.
const SPARSE_COUNT_BITS_MAX: u8 = 12;

/// How a file is cut.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    /// `log2` of the blocks in a chunk.
    pub(super) bits: u8,
    /// Of each chunk.
    pub(super) has_content: Vec<bool>,
}

/// The chunks of the file that lies in `blocks` of its layer, which has these extents, ascending; `None` if nothing is
/// known of them.
pub(super) fn chunks_of(blocks: &Range<u64>, extents: Option<&[Extent]>) -> Chunks {
    let all_bits = (blocks.end - blocks.start).next_power_of_two().ilog2();
    let all_bits = u8::try_from(all_bits).expect("at most 32");
    let whole_bits = all_bits.min(CHUNK_BLOCK_BITS_MAX);
    let count = |bits: u8| usize::try_from((blocks.end - blocks.start).div_ceil(1 << bits)).expect("few chunks");
    let whole = || Chunks { bits: whole_bits, has_content: vec![true; count(whole_bits)] };
    let Some(extents) = extents.filter(|_| whole_bits > SPARSE_BITS_MIN) else { return whole() };
    let bits = SPARSE_BITS_MIN.max(all_bits.saturating_sub(SPARSE_COUNT_BITS_MAX));
    let mut has_content = vec![false; count(bits)];
    let plain = blocks.start * BLOCK_LEN..blocks.end * BLOCK_LEN;
    let first = extents.partition_point(|extent| extent.plain_range().end <= plain.start);
    let chunk_of = |offset: u64| usize::try_from(((offset - plain.start) / BLOCK_LEN) >> bits).expect("few chunks");
    for extent in extents.iter().skip(first).map(Extent::plain_range).take_while(|extent| extent.start < plain.end) {
        let (start, end) = (extent.start.max(plain.start), extent.end.min(plain.end));
        if start < end {
            has_content[chunk_of(start)..=chunk_of(end - 1)].fill(true);
        }
    }
    if has_content.iter().all(|has_content| *has_content) { whole() } else { Chunks { bits, has_content } }
}

#[cfg(test)]
// One range of content is meant.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn extents(ranges: &[Range<u64>]) -> Vec<Extent> {
        let extent = |range: &Range<u64>| Extent {
            tar_offset: 0.into(),
            plain_offset: range.start.into(),
            len: (range.end - range.start).into(),
        };
        ranges.iter().map(extent).collect()
    }

    /// Of a file of so many MiB that begins 3 blocks into its layer.
    fn chunks(len_mib: u64, content: &[Range<u64>]) -> Chunks {
        let start = 3 * BLOCK_LEN;
        let content: Vec<_> = content.iter().map(|range| start + range.start..start + range.end).collect();
        chunks_of(&(3..3 + len_mib * 256), Some(&extents(&content)))
    }

    #[test]
    fn a_file_full_of_content_is_one_chunk() {
        assert_eq!(chunks(4, &[0..4 * MIB]), Chunks { bits: 10, has_content: vec![true] });
        assert_eq!(chunks(4, &[0..1, MIB..MIB + 1, 3 * MIB - 1..3 * MIB + 1]).bits, 10, "holes in every chunk");
        assert_eq!(chunks_of(&(3..1027), None), Chunks { bits: 10, has_content: vec![true] });
        assert_eq!(chunks(1, &[]), Chunks { bits: 8, has_content: vec![true] }, "too short to be worth it");
    }

    #[test]
    fn chunks_without_content_are_holes() {
        let sparse = chunks(4, &[MIB + 5..MIB + 6]);
        assert_eq!(sparse, Chunks { bits: 8, has_content: vec![false, true, false, false] });
        let across = chunks(4, &[2 * MIB - 1..2 * MIB + 1]);
        assert_eq!(across.has_content, [false, true, true, false]);
        assert_eq!(chunks(3, &[]).has_content, [false; 3]);
    }

    #[test]
    fn content_of_neighbours_is_not_taken_for_the_files_own() {
        let extents = extents(&[0..3 * BLOCK_LEN, 3 * BLOCK_LEN + 2 * MIB..3 * BLOCK_LEN + 9 * MIB]);
        assert_eq!(chunks_of(&(3..3 + 512), Some(&extents)).has_content, [false; 2]);
    }

    #[test]
    fn the_longest_file_has_few_chunks() {
        let longest = chunks_of(&(0..u64::from(u32::MAX) - 1), Some(&[]));
        assert_eq!((longest.bits, longest.has_content.len()), (20, 4096));
    }
}
