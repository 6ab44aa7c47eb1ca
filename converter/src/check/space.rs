//! Digests of ranges of the plain address space, computed from the tar stream as it passes by.

use std::ops::Range;

use format_spec::{Digest, DigestHasher, Extent};

const ZEROS: [u8; 4096] = [0; 4096];

/// Hashes what some ranges hold. The tar stream comes in order; ranges may come in any and overlap.
#[derive(Debug)]
pub(crate) struct SpaceHasher<'a> {
    extents: &'a [Extent],
    next_extent: usize,
    /// Ranges by their start, with their places in the caller's order.
    waiting: Vec<(Range<u64>, usize)>,
    next_waiting: usize,
    active: Vec<Active>,
    digests: Vec<Option<Digest>>,
}

#[derive(Debug)]
struct Active {
    place: usize,
    /// Everything before it is hashed.
    position: u64,
    end: u64,
    hasher: DigestHasher,
}

impl Active {
    fn add_zeros(&mut self, end: u64) {
        while self.position < end.min(self.end) {
            let len = (end.min(self.end) - self.position).min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..usize::try_from(len).expect("at most a page")]);
            self.position += len;
        }
    }
}

impl<'a> SpaceHasher<'a> {
    pub(crate) fn new(extents: &'a [Extent], ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut waiting: Vec<_> = ranges.into_iter().zip(0..).collect();
        waiting.sort_by_key(|(range, _)| range.start);
        let digests = vec![None; waiting.len()];
        Self { extents, next_extent: 0, waiting, next_waiting: 0, active: Vec::new(), digests }
    }

    /// Takes the bytes of the tar stream at `tar_offset`, which follow those taken before.
    pub(crate) fn update(&mut self, tar_offset: u64, bytes: &[u8]) {
        let tar_end = tar_offset + bytes.len() as u64;
        while let Some(extent) = self.extents.get(self.next_extent) {
            let tar = extent.tar_range();
            let (start, end) = (tar.start.max(tar_offset), tar.end.min(tar_end));
            if start < end {
                let part = position(start - tar_offset)..position(end - tar_offset);
                self.update_plain(extent.plain_offset.get() + (start - tar.start), &bytes[part]);
            }
            if tar.end > tar_end {
                break;
            }
            self.next_extent += 1;
        }
    }

    fn update_plain(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        self.activate(end);
        for active in &mut self.active {
            // What no extent covers is zeros.
            active.add_zeros(offset);
            let (from, to) = (active.position.max(offset), active.end.min(end));
            if from < to {
                active.hasher.update(&bytes[position(from - offset)..position(to - offset)]);
                active.position = to;
            }
        }
        self.retire();
    }

    fn activate(&mut self, end: u64) {
        while let Some((range, place)) = self.waiting.get(self.next_waiting).filter(|(range, _)| range.start < end) {
            let hasher = DigestHasher::default();
            self.active.push(Active { place: *place, position: range.start, end: range.end, hasher });
            self.next_waiting += 1;
        }
    }

    fn retire(&mut self) {
        for active in self.active.extract_if(.., |active| active.position >= active.end) {
            self.digests[active.place] = Some(active.hasher.finish());
        }
    }

    /// The digests of all ranges in the caller's order.
    pub(crate) fn finish(mut self) -> Vec<Digest> {
        self.activate(u64::MAX);
        for active in &mut self.active {
            active.add_zeros(active.end);
        }
        self.retire();
        self.digests.into_iter().map(|digest| digest.unwrap_or_else(|| Digest::of(&[]))).collect()
    }
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).expect("inside a buffer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(tar: u64, plain: u64, len: u64) -> Extent {
        Extent { tar_offset: tar.into(), plain_offset: plain.into(), len: len.into() }
    }

    /// A tar stream in pieces of any length, holes and gaps, ranges that overlap and come in any order.
    #[test]
    fn digests_are_those_of_the_plain_address_space() {
        let tar: Vec<u8> = (0u8..=255).cycle().take(3000).collect();
        let extents = [extent(512, 0, 100), extent(700, 4096, 300), extent(1000, 5000, 50), extent(2000, 8192, 1000)];
        let mut space = vec![0; 12288];
        for extent in &extents {
            let (tar_range, plain) = (extent.tar_range(), extent.plain_range());
            space[position(plain.start)..position(plain.end)]
                .copy_from_slice(&tar[position(tar_range.start)..position(tar_range.end)]);
        }
        let ranges = [8192..9192, 0..100, 0..4096, 50..5050, 4096..5100, 5050..8200, 9192..12288, 10000..12000];
        let expected: Vec<_> =
            ranges.iter().map(|range| Digest::of(&space[position(range.start)..position(range.end)])).collect();
        for piece_len in [1, 7, 512, 3000] {
            let mut hasher = SpaceHasher::new(&extents, ranges.clone());
            for (number, piece) in tar.chunks(piece_len).enumerate() {
                hasher.update((number * piece_len) as u64, piece);
            }
            assert_eq!(hasher.finish(), expected, "{piece_len}");
        }
    }
}
