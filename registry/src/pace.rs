//! How slowly an answer may come: a number of bytes in a length of time, not some byte now and then.
//!
//! Only time that somebody waits for the other side counts: whoever takes the bytes may take his time.

use std::time::Duration;

/// An answer must bring so many bytes in each [`Limit::window`], or all that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) window: Duration,
    pub(crate) len_min: u64,
}

/// Bytes that arrive, against a limit.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// In the present window.
    waited: Duration,
    received_len: u64,
}

impl Pace {
    /// How much longer to wait for the next bytes.
    pub(crate) fn patience(&self, limit: Limit) -> Duration {
        limit.window.saturating_sub(self.waited)
    }

    /// Bytes have arrived after a wait.
    pub(crate) fn arrived(&mut self, len: u64, waited: Duration, limit: Limit) {
        self.waited += waited;
        self.received_len += len;
        if self.received_len >= limit.len_min {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_uses_up_the_patience_that_enough_bytes_renew() {
        let second = Duration::from_secs(1);
        let limit = Limit { window: 5 * second, len_min: 1000 };
        let mut pace = Pace::default();
        for left in [4, 3, 2] {
            pace.arrived(1, second, limit);
            assert_eq!(pace.patience(limit), left * second);
        }
        pace.arrived(997, second, limit);
        assert_eq!(pace.patience(limit), 5 * second);
        for _ in 0..5 {
            pace.arrived(1, second, limit);
        }
        assert_eq!(pace.patience(limit), Duration::ZERO);
    }

    #[test]
    fn bytes_that_lie_ready_cost_no_patience() {
        let limit = Limit { window: Duration::from_secs(5), len_min: 1 << 20 };
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.arrived(1000, Duration::ZERO, limit);
        }
        assert_eq!(pace.patience(limit), Duration::from_secs(5));
    }
}
