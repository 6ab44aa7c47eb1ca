//! How long whoever is in no hurry waits for those who are.

use std::time::{Duration, Instant};

/// Somebody who begins when nobody waits for anything, but is not held up for ever by somebody who does: he may be
/// waiting for a registry that does not answer.
#[derive(Debug)]
pub(super) struct Quiet {
    held_max: Duration,
    /// Since when there was something to do and somebody was in the way.
    held_since: Option<Instant>,
}

impl Quiet {
    /// One who is held up for `held_max` at the longest.
    pub(super) fn new(held_max: Duration) -> Self {
        Self { held_max, held_since: None }
    }

    /// Whether to begin with what there is to do; `is_quiet` says that nobody is in the way.
    pub(super) fn is_time(&mut self, is_quiet: bool, now: Instant) -> bool {
        if is_quiet {
            self.held_since = None;
            return true;
        }
        now.duration_since(*self.held_since.get_or_insert(now)) >= self.held_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn somebody_who_waits_for_ever_holds_up_for_a_while() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut quiet = Quiet::new(second * 30);
        assert!(quiet.is_time(true, start));
        let is_time: Vec<bool> = (0..40).map(|passed| quiet.is_time(false, start + second * passed)).collect();
        assert_eq!(is_time, [[false; 30].as_slice(), &[true; 10]].concat());
        assert!(quiet.is_time(true, start + second * 40));
        assert!(!quiet.is_time(false, start + second * 41));
    }
}
