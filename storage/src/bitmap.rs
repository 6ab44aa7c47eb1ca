//! Which frames of a layer are there: one bit a frame, in memory and as the file `frames`.
//!
//! The file is bound to the layer's index by its digest and ends with a CRC-32. Whatever does not fit
//! is treated as "nothing there": the price is bytes fetched again, never a wrong byte.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use format_spec::Digest;

/// First eight bytes of the file `frames`.
const MAGIC: [u8; 8] = *b"LAZULIFR";
/// Magic number, index digest and bit count.
const HEADER_LEN: usize = 8 + 32 + 8;
const CRC_LEN: usize = 4;
const WORD_BITS: usize = u64::BITS as usize;

/// Bits that many threads set and look at.
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Vec<AtomicU64>,
    set_count: AtomicUsize,
}

impl Bitmap {
    /// All bits of `bits`, which [`decode`] returned or [`Self::snapshot`] made.
    pub(crate) fn new(bits: Vec<u64>) -> Self {
        let set_count = bits.iter().map(|word| word.count_ones() as usize).sum();
        Self { words: bits.into_iter().map(AtomicU64::new).collect(), set_count: AtomicUsize::new(set_count) }
    }

    /// Whether a bit is set; what was written before it was set is seen afterwards.
    pub(crate) fn is_set(&self, bit: u32) -> bool {
        let (word, mask) = position(bit);
        self.words.get(word).is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Sets a bit.
    pub(crate) fn set(&self, bit: u32) {
        let (word, mask) = position(bit);
        let Some(word) = self.words.get(word) else { return };
        if word.fetch_or(mask, Ordering::AcqRel) & mask == 0 {
            self.set_count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Clears every bit that is set in `bits`.
    pub(crate) fn clear_all(&self, bits: &[u64]) {
        for (word, mask) in self.words.iter().zip(bits) {
            let cleared = word.fetch_and(!mask, Ordering::AcqRel) & mask;
            self.set_count.fetch_sub(cleared.count_ones() as usize, Ordering::AcqRel);
        }
    }

    /// Number of bits set.
    pub(crate) fn set_count(&self) -> usize {
        self.set_count.load(Ordering::Acquire)
    }

    /// The bits as they are now.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }
}

/// No bits of `bit_count`.
pub(crate) fn empty(bit_count: u32) -> Vec<u64> {
    vec![0; (bit_count as usize).div_ceil(WORD_BITS)]
}

/// Sets a bit of plain words; `false` for one past their end.
pub(crate) fn set_in(bits: &mut [u64], bit: u32) -> bool {
    let (word, mask) = position(bit);
    bits.get_mut(word).map(|word| *word |= mask).is_some()
}

fn position(bit: u32) -> (usize, u64) {
    (bit as usize / WORD_BITS, 1 << (bit as usize % WORD_BITS))
}

/// The content of the file `frames`.
pub(crate) fn encode(bits: &[u64], bit_count: u32, index: &Digest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + bits.len() * 8 + CRC_LEN);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(index.as_bytes());
    bytes.extend_from_slice(&u64::from(bit_count).to_le_bytes());
    bits.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// Reads what [`encode`] wrote for a layer with this index; `None` for anything else.
pub(crate) fn decode(bytes: &[u8], bit_count: u32, index: &Digest) -> Option<Vec<u64>> {
    let (content, crc32) = bytes.split_at_checked(bytes.len().checked_sub(CRC_LEN)?)?;
    if crc32fast::hash(content).to_le_bytes() != crc32 {
        return None;
    }
    let (header, words) = content.split_at_checked(HEADER_LEN)?;
    let expected = [&MAGIC[..], index.as_bytes(), &u64::from(bit_count).to_le_bytes()].concat();
    if header != expected || words.len() != empty(bit_count).len() * 8 {
        return None;
    }
    let bits: Vec<u64> =
        words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight"))).collect();
    let spare_bits = bits.len() * WORD_BITS - bit_count as usize;
    let spare_is_zero = bits.last().is_none_or(|last| spare_bits == 0 || last >> (WORD_BITS - spare_bits) == 0);
    spare_is_zero.then_some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: Digest = Digest::from_bytes([7; 32]);

    fn sample(bit_count: u32) -> Vec<u64> {
        let mut bits = empty(bit_count);
        (0..bit_count).step_by(3).for_each(|bit| assert!(set_in(&mut bits, bit)));
        bits
    }

    #[test]
    fn file_form_is_reversible() {
        for bit_count in [0, 1, 63, 64, 65, 1000] {
            let bits = sample(bit_count);
            assert_eq!(decode(&encode(&bits, bit_count, &INDEX), bit_count, &INDEX), Some(bits), "{bit_count}");
        }
    }

    #[test]
    fn refuses_any_changed_byte_other_length_and_other_index() {
        let bytes = encode(&sample(65), 65, &INDEX);
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            assert_eq!(decode(&changed, 65, &INDEX), None, "byte {position}");
            assert_eq!(decode(&bytes[..position], 65, &INDEX), None, "length {position}");
        }
        assert_eq!(decode(&bytes, 66, &INDEX), None);
        assert_eq!(decode(&bytes, 65, &Digest::from_bytes([8; 32])), None);
    }

    #[test]
    fn refuses_bits_past_the_count() {
        assert_eq!(decode(&encode(&[1 << 5], 5, &INDEX), 5, &INDEX), None);
    }

    #[test]
    fn counts_each_bit_once() {
        let bitmap = Bitmap::new(empty(70));
        [3, 3, 69].into_iter().for_each(|bit| bitmap.set(bit));
        assert_eq!(
            (bitmap.set_count(), bitmap.is_set(3), bitmap.is_set(4), bitmap.is_set(4000)),
            (2, true, false, false)
        );
        bitmap.clear_all(&[1 << 3 | 1 << 4, 0]);
        assert_eq!((bitmap.set_count(), bitmap.snapshot()), (1, vec![0, 1 << 5]));
    }
}
