//! Bits that many threads set and look at without locks.

use std::ops::Range;

use crate::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;

/// A row of bits of fixed length.
///
/// What was written before a bit was set is seen by who sees the bit. Of two threads that each set one bit and then
/// look at the other's, at least one sees both (hence `SeqCst`).
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Vec<AtomicU64>,
    set_count: AtomicU64,
}

impl Bitmap {
    /// The bits of `words`, which [`Self::snapshot`] made or [`empty`].
    pub(crate) fn new(words: Vec<u64>) -> Self {
        let set_count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Self { words: words.into_iter().map(AtomicU64::new).collect(), set_count: AtomicU64::new(set_count) }
    }

    /// Whether a bit is set; those past the end are not.
    pub(crate) fn is_set(&self, bit: u64) -> bool {
        self.words.get(word_of(bit)).is_some_and(|word| word.load(Ordering::SeqCst) >> (bit % WORD_BITS) & 1 == 1)
    }

    /// Whether all bits of a range are set.
    pub(crate) fn are_set(&self, range: Range<u64>) -> bool {
        self.find(range, false).is_none()
    }

    /// The first bit of a range that is set, or that is not.
    pub(crate) fn find(&self, range: Range<u64>, is_set: bool) -> Option<u64> {
        let mut bit = range.start;
        while bit < range.end {
            let Some(word) = self.words.get(word_of(bit)) else { return (!is_set).then_some(bit) };
            let word = word.load(Ordering::SeqCst);
            let candidates = (if is_set { word } else { !word }) >> (bit % WORD_BITS);
            if candidates != 0 {
                let found = bit + u64::from(candidates.trailing_zeros());
                return (found < range.end).then_some(found);
            }
            bit = (bit / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }

    /// Sets all bits of a range.
    pub(crate) fn set(&self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            let Some(word) = self.words.get(word) else { return };
            let new = mask & !word.fetch_or(mask, Ordering::SeqCst);
            self.set_count.fetch_add(u64::from(new.count_ones()), Ordering::SeqCst);
        }
    }

    /// Clears all bits of a range.
    pub(crate) fn clear(&self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            let Some(word) = self.words.get(word) else { return };
            let cleared = word.fetch_and(!mask, Ordering::SeqCst) & mask;
            self.set_count.fetch_sub(u64::from(cleared.count_ones()), Ordering::SeqCst);
        }
    }

    /// Clears every bit that is set in `words`.
    pub(crate) fn clear_all(&self, words: &[u64]) {
        for (word, mask) in self.words.iter().zip(words) {
            let cleared = word.fetch_and(!mask, Ordering::SeqCst) & mask;
            self.set_count.fetch_sub(u64::from(cleared.count_ones()), Ordering::SeqCst);
        }
    }

    /// Number of bits set.
    pub(crate) fn set_count(&self) -> u64 {
        self.set_count.load(Ordering::SeqCst)
    }

    /// The bits as they are now.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }
}

/// The words of `bit_count` bits, none of them set.
pub(crate) fn empty(bit_count: u64) -> Vec<u64> {
    vec![0; word_of(bit_count.div_ceil(WORD_BITS).saturating_mul(WORD_BITS))]
}

/// Whether words have no bit set past the first `bit_count`.
pub(crate) fn has_no_spare_bits(words: &[u64], bit_count: u64) -> bool {
    let used = bit_count % WORD_BITS;
    used == 0 || words.last().is_none_or(|last| last >> used == 0)
}

fn word_of(bit: u64) -> usize {
    usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX)
}

/// The words that a range of bits lies in, each with its bits.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let Range { mut start, end } = range;
    std::iter::from_fn(move || {
        let (word, first) = (word_of(start), start % WORD_BITS);
        let count = (WORD_BITS - first).min(end.saturating_sub(start));
        start += count;
        (count > 0).then(|| (word, (u64::MAX >> (WORD_BITS - count)) << first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_bit_once() {
        let bitmap = Bitmap::new(empty(70));
        [3..4, 3..4, 69..70].into_iter().for_each(|range| bitmap.set(range));
        assert_eq!(
            (bitmap.set_count(), bitmap.is_set(3), bitmap.is_set(4), bitmap.is_set(4000)),
            (2, true, false, false)
        );
        bitmap.clear_all(&[1 << 3 | 1 << 4, 0]);
        assert_eq!((bitmap.set_count(), bitmap.snapshot()), (1, vec![0, 1 << 5]));
        [60..70, 60..400].into_iter().for_each(|range| bitmap.clear(range));
        assert_eq!((bitmap.set_count(), bitmap.snapshot()), (0, vec![0, 0]));
    }

    #[test]
    fn ranges_are_what_their_bits_are() {
        for (start, end) in [(0, 0), (0, 1), (0, 64), (63, 65), (5, 191), (64, 128), (190, 192), (7, 7)] {
            let bitmap = Bitmap::new(empty(192));
            bitmap.set(start..end);
            let set: Vec<u64> = (0..192).filter(|bit| bitmap.is_set(*bit)).collect();
            assert_eq!(set, (start..end).collect::<Vec<_>>());
            assert_eq!(bitmap.set_count(), end - start);
            assert!(bitmap.are_set(start..end));
            assert!(!bitmap.are_set(start..end + 1));
            assert_eq!(bitmap.find(0..192, true), (start..end).next());
            assert_eq!(bitmap.find(start..192, false), Some(end).filter(|end| *end < 192));
            assert_eq!(bitmap.find(191..200, false), Some(if end == 192 { 192 } else { 191 }));
        }
    }
}
