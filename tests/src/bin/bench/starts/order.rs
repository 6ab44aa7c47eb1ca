//! The order in which ways take their turns: by chance, and the same again for the same seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// Numbers of Steele, Lea and Flood's SplitMix64 (2014).
#[derive(Debug)]
pub(crate) struct Order(u64);

impl Order {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed for a run that names none: short enough to be typed.
    pub(crate) fn any_seed() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::from(now.subsec_micros())
    }

    /// All of them, in an order by chance (Fisher and Yates).
    pub(crate) fn shuffled<T: Copy>(&mut self, all: &[T]) -> Vec<T> {
        let mut turns = all.to_vec();
        for last in (1..turns.len()).rev() {
            let chosen = self.next() % (last as u64 + 1);
            turns.swap(last, usize::try_from(chosen).unwrap_or(last));
        }
        turns
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_order_and_every_way_a_turn() {
        let turns = |seed| Order::new(seed).shuffled(&[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(turns(7), turns(7));
        assert_ne!(turns(7), turns(8));
        let mut sorted = turns(7);
        sorted.sort_unstable();
        assert_eq!(sorted, [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
