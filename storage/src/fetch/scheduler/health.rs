//! Health of one place of one layer: whether it works, and when it may be asked again.

use std::time::{Duration, Instant};

use super::options::RequestOptions;
use crate::fetch::{
    places::PlaceRef,
    source::{SourceError, SourceErrorKind},
};

/// Requests of one layer that a place may have at the same time as long as nothing speaks against it: no limit, as
/// those of [`RequestOptions`] are lower.
const WINDOW_MAX: usize = 64;

/// The observed state of a place.
#[derive(Debug)]
pub(crate) struct PlaceState {
    pub(crate) place: PlaceRef,
    /// Failures since it worked last.
    failures: u32,
    failed_at: Option<Instant>,
    not_before: Option<Instant>,
    /// Requests that it may have at the same time: halved when they are too slow or one fails, more with each frame.
    pub(crate) window: usize,
}

impl PlaceState {
    pub(crate) fn new(place: PlaceRef) -> Self {
        Self { place, failures: 0, failed_at: None, not_before: None, window: WINDOW_MAX }
    }

    /// Whether it is not to be asked now.
    pub(crate) fn is_paused(&self, now: Instant) -> bool {
        self.not_before.is_some_and(|not_before| now < not_before)
    }

    /// Right bytes have come from it.
    pub(crate) fn work(&mut self) {
        *self = Self { window: (self.window + 1).min(WINDOW_MAX), ..Self::new(self.place.clone()) };
    }

    /// A request that was begun at `started` has failed.
    ///
    /// Many that were under way fail together: they count once.
    pub(crate) fn fail(&mut self, started: Instant, error: &SourceError, now: Instant, options: &RequestOptions) {
        if self.failed_at.is_some_and(|failed_at| started < failed_at) {
            return;
        }
        self.failures += 1;
        self.failed_at = Some(now);
        let pause = pause(self.failures, error, options);
        self.window = if pause.is_zero() { (self.window / 2).max(1) } else { 1 };
        self.not_before = self.not_before.max(now.checked_add(pause));
    }

    /// So many requests at once are too many, or this is a bad place.
    pub(crate) fn slow_down(&mut self, running_count: usize) {
        self.window = (self.window.min(running_count) / 2).max(1);
    }
}

/// How long a place is left alone after its `failures`th failure in a row.
///
/// A connection that broke off is tried again at once the first time.
fn pause(failures: u32, error: &SourceError, options: &RequestOptions) -> Duration {
    let doublings = match error.kind {
        SourceErrorKind::Passing => failures.checked_sub(2),
        SourceErrorKind::Refused | SourceErrorKind::Unusable => failures.checked_sub(1),
    };
    let own = doublings.map_or(Duration::ZERO, |doublings| {
        options.pause_min.saturating_mul(1u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(options.pause_max)
    });
    own.max(error.retry_after.unwrap_or_default().min(options.retry_after_max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(failures: std::ops::Range<u32>, error: &SourceError) -> Vec<u128> {
        failures.map(|failures| pause(failures, error, &RequestOptions::default()).as_millis()).collect()
    }

    #[test]
    fn pauses_grow_to_a_few_seconds() {
        let refused = SourceError::refused("no");
        assert_eq!(milliseconds(1..8, &refused), [250, 500, 1000, 2000, 4000, 4000, 4000]);
        assert_eq!(milliseconds(1..8, &SourceError::unusable("a page")), milliseconds(1..8, &refused));
        assert_eq!(milliseconds(1000..1001, &refused), [4000]);
    }

    #[test]
    fn a_connection_that_breaks_is_tried_again_at_once_the_first_time() {
        assert_eq!(milliseconds(1..5, &SourceError::passing("reset")), [0, 250, 500, 1000]);
    }

    #[test]
    fn what_the_source_asks_for_is_a_hint() {
        let after = |seconds| SourceError {
            retry_after: Some(Duration::from_secs(seconds)),
            ..SourceError::passing("come back later")
        };
        assert_eq!(milliseconds(1..3, &after(2)), [2000, 2000]);
        assert_eq!(milliseconds(7..8, &after(2)), [4000]);
        assert_eq!(milliseconds(1..2, &after(3600)), [15_000]);
    }

    #[test]
    fn requests_that_fail_together_count_once() {
        let (start, options) = (Instant::now(), RequestOptions::default());
        let mut place = PlaceState::new(PlaceRef { number: 1, source: "s".into() });
        let refused = SourceError::refused("no");
        for _ in 0..16 {
            place.fail(start, &refused, start + options.pause_min, &options);
        }
        assert!(place.is_paused(start + options.pause_min));
        assert!(!place.is_paused(start + options.pause_min * 2));
        assert_eq!((place.failures, place.window), (1, 1));
        place.fail(start + options.pause_min * 2, &refused, start + options.pause_min * 2, &options);
        assert_eq!((place.failures, place.window), (2, 1));
        place.work();
        assert!(!place.is_paused(start));
        assert_eq!((place.failures, place.window), (0, 2));
    }
}
