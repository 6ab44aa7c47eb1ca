//! Numbers that look like chance and are the same in every run.

pub(crate) struct Numbers(u64);

impl Numbers {
    /// splitmix64: neighbouring seeds give numbers that have nothing to do with each other.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`; 0 where that is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(crate) fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Changes a few bytes at one place: a bit, a byte, extreme values, one more or less.
    pub(crate) fn change_bytes(&mut self, bytes: &mut [u8]) -> Option<usize> {
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(8)).min(bytes.len());
        let byte = bytes.get_mut(at)?;
        match self.below(6) {
            0 | 1 => *byte ^= 1 << self.below(8),
            2 => *byte = self.byte(),
            3 => *byte = byte.wrapping_add(1),
            4 => *byte = byte.wrapping_sub(1),
            _ => bytes[at..end].fill(if self.below(2) == 0 { 0 } else { 0xff }),
        }
        Some(at)
    }
}
