//! Which content of a layer was read, in the order of first touch: the recording of a start.
//!
//! Noted is what containers' reads ask for, so the kernel's read-ahead belongs to it, and what it reads without asking,
//! from its page cache or from the files of complete layers, does not.

use std::{collections::BTreeMap, ops::Range, time::Instant};

use crate::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
    lock,
};

/// A run of the plain address space that was read first at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Touch {
    /// When.
    pub at: Instant,
    /// What.
    pub plain: Range<u64>,
}

/// The recording of one layer: under way between its begin and its end, at no cost for reads otherwise.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Nothing of the layer was in the cache when it was opened.
    was_empty: bool,
    was_read: AtomicBool,
    is_on: AtomicBool,
    touched: Mutex<Touched>,
}

impl Recorder {
    /// No recording yet.
    pub(crate) fn new(was_empty: bool) -> Self {
        let (was_read, is_on) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { was_empty, was_read, is_on, touched: Mutex::default() }
    }

    /// Begins anew, with nothing recorded. Of more than `touches_max` touches the first are remembered.
    pub(crate) fn begin(&self, touches_max: usize) {
        *lock(&self.touched) = Touched { touches_max, ..Touched::default() };
        self.is_on.store(true, Ordering::Release);
    }

    /// Ends, and forgets what was recorded.
    pub(crate) fn end(&self) {
        self.is_on.store(false, Ordering::Release);
        *lock(&self.touched) = Touched::default();
    }

    /// Notes a read.
    pub(crate) fn note(&self, plain: &Range<u64>) {
        // Written once: readers on many processors share the line.
        if !self.was_read.load(Ordering::Relaxed) {
            self.was_read.store(true, Ordering::Relaxed);
        }
        if self.is_on.load(Ordering::Acquire) {
            lock(&self.touched).note(plain.clone(), Instant::now());
        }
    }

    /// Everything that was recorded, in the order of time.
    pub(crate) fn touches(&self) -> Vec<Touch> {
        lock(&self.touched).touches.clone()
    }

    /// How many touches that are.
    pub(crate) fn touch_count(&self) -> usize {
        lock(&self.touched).touches.len()
    }

    /// Whether nothing of the layer was here when it was opened, and nothing of it was read since.
    pub(crate) fn is_fresh(&self) -> bool {
        self.was_empty && !self.was_read.load(Ordering::Relaxed)
    }
}

/// The ranges that were read of one layer.
#[derive(Debug, Default)]
struct Touched {
    /// In the order of time; their ranges do not overlap.
    touches: Vec<Touch>,
    /// All of it: starts and ends of runs that neither overlap nor touch each other.
    runs: BTreeMap<u64, u64>,
    /// Most touches that are remembered: a start that touches more is not recorded further.
    touches_max: usize,
}

impl Touched {
    /// Notes a read.
    fn note(&mut self, plain: Range<u64>, at: Instant) {
        if plain.is_empty() || self.touches.len() >= self.touches_max {
            return;
        }
        let before = self.runs.range(..=plain.start).next_back().map(|(start, end)| *start..*end);
        if before.as_ref().is_some_and(|run| run.end >= plain.end) {
            return;
        }
        // From the first run that touches this range to the last one: all become one.
        let first = before.filter(|run| run.end >= plain.start).map_or(plain.start, |run| run.start);
        let joined: Vec<_> = self.runs.range(first..=plain.end).map(|(start, end)| *start..*end).collect();
        let mut next = plain.start;
        for run in &joined {
            if run.start > next {
                self.touches.push(Touch { at, plain: next..run.start });
            }
            next = next.max(run.end);
            self.runs.remove(&run.start);
        }
        if next < plain.end {
            self.touches.push(Touch { at, plain: next..plain.end });
        }
        self.runs.insert(first.min(plain.start), next.max(plain.end));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOUCHES_MAX: usize = 1000;

    fn noted(reads: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut touched = Touched { touches_max: TOUCHES_MAX, ..Touched::default() };
        let at = Instant::now();
        reads.iter().for_each(|read| touched.note(read.clone(), at));
        touched.touches.into_iter().map(|touch| touch.plain).collect()
    }

    #[test]
    fn only_what_is_new_is_noted_and_in_the_order_of_reads() {
        assert_eq!(noted(&[10..20, 0..5, 10..20, 12..18]), [10..20, 0..5]);
        assert_eq!(noted(&[10..20, 30..40, 0..50]), [10..20, 30..40, 0..10, 20..30, 40..50]);
        assert_eq!(noted(&[10..20, 20..30, 15..35]), [10..20, 20..30, 30..35]);
        assert_eq!(noted(&[10..20, 5..10, 0..20]), [10..20, 5..10, 0..5]);
    }

    #[test]
    fn a_start_that_touches_too_much_is_not_recorded_further() {
        let reads: Vec<_> = (0..TOUCHES_MAX as u64 + 10).map(|number| number * 10..number * 10 + 1).collect();
        assert_eq!(noted(&reads).len(), TOUCHES_MAX);
    }

    #[test]
    fn reads_are_recorded_between_begin_and_end_only() {
        let recorder = Recorder::new(true);
        assert!(recorder.is_fresh());
        recorder.note(&(0..10));
        assert!(!recorder.is_fresh() && recorder.touch_count() == 0);
        recorder.begin(2);
        for start in [20, 0, 40] {
            recorder.note(&(start..start + 10));
        }
        let ranges: Vec<_> = recorder.touches().into_iter().map(|touch| touch.plain).collect();
        assert_eq!(ranges, [20..30, 0..10]);
        recorder.begin(2);
        assert_eq!(recorder.touch_count(), 0, "it begins anew");
        recorder.note(&(0..10));
        recorder.end();
        recorder.note(&(20..30));
        assert_eq!(recorder.touches(), []);
    }

    proptest! {
        #[test]
        fn every_byte_that_was_read_is_noted_once_where_it_was_read_first(
            reads in prop::collection::vec((0_u64..60, 0_u64..20), 0..30)
        ) {
            let reads: Vec<_> = reads.into_iter().map(|(start, len)| start..start + len).collect();
            let mut expected = Vec::new();
            for byte in reads.iter().cloned().flatten() {
                if !expected.contains(&byte) {
                    expected.push(byte);
                }
            }
            let found: Vec<u64> = noted(&reads).into_iter().flatten().collect();
            prop_assert_eq!(found, expected);
        }
    }
}
