//! How often something may be said.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Keys that are remembered; with more of them all are forgotten, and each may be said again.
const KEYS_MAX: usize = 1024;

/// Counts what was said by a key, in windows of time.
#[derive(Debug)]
pub(super) struct Repeats<K> {
    windows: HashMap<K, Window>,
    count_max: u32,
    window: Duration,
}

#[derive(Debug)]
struct Window {
    begun: Instant,
    count: u32,
    left_out: u64,
}

/// The fate of something that is to be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is said, and so much of the same kind was not in the window before.
    Write {
        /// How much.
        left_out: u64,
    },
    /// It is said, and is the last one for a while.
    WriteAsLast,
    /// It is not said.
    LeaveOut,
}

impl<K: Eq + Hash> Repeats<K> {
    /// Lets `count_max` of a kind pass in each `window`.
    pub(super) fn new(count_max: u32, window: Duration) -> Self {
        Self { windows: HashMap::new(), count_max, window }
    }

    /// Whether another one of the kind `key` may be said.
    pub(super) fn admit(&mut self, key: K, now: Instant) -> Admission {
        if self.windows.len() >= KEYS_MAX && !self.windows.contains_key(&key) {
            self.windows.clear();
        }
        let window = self.windows.entry(key).or_insert(Window { begun: now, count: 0, left_out: 0 });
        let mut left_out = 0;
        if now.saturating_duration_since(window.begun) >= self.window {
            left_out = window.left_out;
            *window = Window { begun: now, count: 0, left_out: 0 };
        }
        window.count = window.count.saturating_add(1);
        if window.count > self.count_max {
            window.left_out = window.left_out.saturating_add(1);
            Admission::LeaveOut
        } else if window.count == self.count_max && self.count_max > 1 {
            Admission::WriteAsLast
        } else {
            Admission::Write { left_out }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_said_so_often_in_a_window_and_what_is_left_out_is_counted() {
        let mut repeats = Repeats::new(3, Duration::from_secs(60));
        let start = Instant::now();
        let said: Vec<_> = (0..100).map(|_| repeats.admit("read failed", start)).collect();
        assert_eq!(said[..2], [Admission::Write { left_out: 0 }; 2]);
        assert_eq!(said[2], Admission::WriteAsLast);
        assert!(said[3..].iter().all(|admission| *admission == Admission::LeaveOut));
        assert_eq!(repeats.admit("something else", start), Admission::Write { left_out: 0 });
        assert_eq!(repeats.admit("read failed", start + Duration::from_secs(59)), Admission::LeaveOut);
        let later = start + Duration::from_secs(60);
        assert_eq!(repeats.admit("read failed", later), Admission::Write { left_out: 98 });
        assert_eq!(repeats.admit("read failed", later), Admission::Write { left_out: 0 });
    }

    #[test]
    fn kinds_beyond_number_take_no_memory_beyond_bounds() {
        let mut repeats = Repeats::new(3, Duration::from_secs(60));
        let start = Instant::now();
        for kind in 0..10 * KEYS_MAX {
            assert_eq!(repeats.admit(kind, start), Admission::Write { left_out: 0 });
            assert!(repeats.windows.len() <= KEYS_MAX);
        }
    }
}
