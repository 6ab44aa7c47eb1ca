//! The best rate at which one request brought bytes: how fast the way to a place is, as far as that was seen.

use std::time::Duration;

use crate::sync::atomic::{AtomicU64, Ordering};

/// Shorter answers say more about round trips, and about what a socket had kept ready, than about a rate.
const RATED_LEN_MIN: u64 = 1 << 20;

/// The best rate so far, in bytes a second; 0 before one was seen.
#[derive(Debug, Default)]
pub(crate) struct BestRate(AtomicU64);

impl BestRate {
    /// So many bytes of an answer have come since its head.
    pub(crate) fn note(&self, len: u64, time: Duration) {
        if len < RATED_LEN_MIN {
            return;
        }
        let nanoseconds = time.as_nanos().max(1);
        let rate = u128::from(len) * Duration::from_secs(1).as_nanos() / nanoseconds;
        self.0.fetch_max(u64::try_from(rate).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes a second; `None` where no answer was long enough.
    pub(crate) fn bytes_per_second(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_rate_of_long_answers_is_kept() {
        let rate = BestRate::default();
        rate.note(RATED_LEN_MIN - 1, Duration::from_nanos(1));
        assert_eq!(rate.bytes_per_second(), None);
        rate.note(2 << 20, Duration::from_secs(2));
        rate.note(8 << 20, Duration::from_secs(2));
        rate.note(1 << 20, Duration::from_secs(1));
        assert_eq!(rate.bytes_per_second(), Some(4 << 20));
    }
}
