//! The waits of a layer's readers since this process opened it: how many, how long, and the longest one by one.
//!
//! A read that finds its bytes passes this by. One that waits takes a lock at its beginning and one at its end, beside a
//! request that takes milliseconds.

use std::{
    cmp::Reverse,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    fetch::wait::WaitingRead,
    sync::{Mutex, lock},
};

/// Waits that are remembered one by one. More would not be read by anybody, and each is a path to find.
const LONGEST_MAX: usize = 32;

/// The thing that a read waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitCause {
    /// A look at what other layers have, or a copy from one.
    OtherLayers,
    /// The hot pack, which was on its way.
    HotPack,
    /// A frame that it made this process ask for.
    Frame,
    /// A frame that was asked for already: for another reader, ahead of one, or with the rest of the layer.
    FrameUnderWay,
}

/// A wait that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PastWait {
    /// Where the read began in the plain address space.
    pub offset: u64,
    /// When it began, since the layer was opened.
    pub began_after: Duration,
    /// How long it waited.
    pub lasted: Duration,
    /// The thing that took most of that time.
    pub cause: WaitCause,
}

/// The waits of a layer's readers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waits {
    /// Reads that waited, or wait.
    pub count: u64,
    /// Their times together, up to now.
    pub total: Duration,
    /// The time during which at least one of them waited.
    pub blocked: Duration,
    /// The longest of those that are over, longest first.
    pub longest: Vec<PastWait>,
}

/// Counts the waits of one layer.
#[derive(Debug)]
pub(crate) struct WaitLog {
    opened: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Those that are over, but for the time in `blocked` that is not.
    past: Waits,
    waiting_count: u32,
    /// The times since the opening at which those who wait began, together.
    waiting_since_sum: Duration,
    /// Since when at least one waits.
    blocked_since: Option<Instant>,
}

impl WaitLog {
    /// Nobody has waited; the layer is opened now.
    pub(crate) fn new(now: Instant) -> Self {
        Self { opened: now, state: Mutex::default() }
    }

    /// The waits until now.
    pub(crate) fn waits(&self, now: Instant) -> Waits {
        let state = lock(&self.state);
        let mut waits = state.past.clone();
        let waiting = (self.time_at(now) * state.waiting_count).saturating_sub(state.waiting_since_sum);
        waits.count += u64::from(state.waiting_count);
        waits.total += waiting;
        waits.blocked += state.blocked_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        waits
    }

    /// A read waits since then.
    fn begin(&self, since: Instant) {
        let mut state = lock(&self.state);
        state.waiting_count += 1;
        state.waiting_since_sum += self.time_at(since);
        state.blocked_since.get_or_insert(since);
    }

    /// A read of which [`Self::begin`] was told waits no longer.
    fn end(&self, read: WaitingRead, cause: WaitCause, now: Instant) {
        let began_after = self.time_at(read.since);
        let lasted = now.saturating_duration_since(read.since);
        let mut state = lock(&self.state);
        state.waiting_count = state.waiting_count.saturating_sub(1);
        state.waiting_since_sum = state.waiting_since_sum.saturating_sub(began_after);
        if state.waiting_count == 0
            && let Some(since) = state.blocked_since.take()
        {
            state.past.blocked += now.saturating_duration_since(since);
        }
        state.past.count += 1;
        state.past.total += lasted;
        let longest = &mut state.past.longest;
        if longest.len() == LONGEST_MAX && longest.last().is_some_and(|shortest| shortest.lasted >= lasted) {
            return;
        }
        let place = longest.partition_point(|other| other.lasted >= lasted);
        longest.insert(place, PastWait { offset: read.offset, began_after, lasted, cause });
        longest.truncate(LONGEST_MAX);
    }

    fn time_at(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.opened)
    }
}

/// A blocked reader: counted from the first thing on that he waits for, until this is dropped.
#[derive(Debug)]
pub(crate) struct BlockedRead {
    log: Arc<WaitLog>,
    read: WaitingRead,
    /// The things that he waited for, one after the other, and since when.
    causes: Vec<(WaitCause, Instant)>,
}

impl BlockedRead {
    /// A reader who has asked at this moment, and waits for nothing yet.
    pub(crate) fn new(log: Arc<WaitLog>, offset: u64) -> Self {
        Self { log, read: WaitingRead { since: Instant::now(), offset }, causes: Vec::new() }
    }

    /// The read.
    pub(crate) fn read(&self) -> WaitingRead {
        self.read
    }

    /// From now on he waits for this.
    pub(crate) fn waits_for(&mut self, cause: WaitCause) {
        if self.causes.is_empty() {
            self.log.begin(self.read.since);
        }
        self.causes.push((cause, Instant::now()));
    }
}

impl Drop for BlockedRead {
    fn drop(&mut self) {
        let now = Instant::now();
        if let Some(cause) = longest_cause(&self.causes, now) {
            self.log.end(self.read, cause, now);
        }
    }
}

/// The cause that lasted longest, each until the next one began.
fn longest_cause(causes: &[(WaitCause, Instant)], now: Instant) -> Option<WaitCause> {
    let ends = causes.iter().skip(1).map(|(_, began)| *began).chain([now]);
    let timed = causes.iter().zip(ends).map(|((cause, began), end)| (end.saturating_duration_since(*began), *cause));
    // Of equal ones the first.
    timed.min_by_key(|(lasted, _)| Reverse(*lasted)).map(|(_, cause)| cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    struct Clock(Instant);

    impl Clock {
        fn at(&self, count: u64) -> Instant {
            self.0 + ms(count)
        }
    }

    /// A log that was told of these waits, each from one millisecond to another, in the order of what happened.
    fn log_of(waits: &[(u64, u64)]) -> (Clock, WaitLog) {
        let clock = Clock(Instant::now());
        let log = WaitLog::new(clock.at(0));
        let begins = waits.iter().map(|(begin, _)| (*begin, 0, *begin));
        let ends = waits.iter().map(|(begin, end)| (*end, 1, *begin));
        let mut events: Vec<_> = begins.chain(ends).collect();
        events.sort_unstable();
        for (time, kind, begin) in events {
            match kind {
                0 => log.begin(clock.at(begin)),
                _ => {
                    let read = WaitingRead { since: clock.at(begin), offset: begin };
                    log.end(read, WaitCause::Frame, clock.at(time));
                }
            }
        }
        (clock, log)
    }

    fn sums(waits: &Waits) -> (u64, Duration, Duration) {
        (waits.count, waits.total, waits.blocked)
    }

    #[test]
    fn overlapping_waits_add_up_and_block_once() {
        let check = |waits: &[(u64, u64)], total, blocked| {
            let (clock, log) = log_of(waits);
            let found = log.waits(clock.at(100));
            assert_eq!(sums(&found), (waits.len() as u64, ms(total), ms(blocked)), "{waits:?}");
        };
        check(&[], 0, 0);
        check(&[(10, 30)], 20, 20);
        check(&[(10, 30), (20, 40), (15, 25)], 50, 30);
        // One after the other, with nobody between, and at the same moment.
        check(&[(10, 20), (50, 60)], 20, 20);
        check(&[(10, 20), (20, 30), (10, 20)], 30, 20);
    }

    #[test]
    fn who_waits_still_is_counted_up_to_now() {
        let (clock, log) = log_of(&[(10, 20)]);
        log.begin(clock.at(40));
        log.begin(clock.at(50));
        let waits = log.waits(clock.at(60));
        assert_eq!((sums(&waits), waits.longest.len()), ((3, ms(40), ms(30)), 1));
        log.end(WaitingRead { since: clock.at(40), offset: 0 }, WaitCause::HotPack, clock.at(70));
        assert_eq!(sums(&log.waits(clock.at(80))), (3, ms(10 + 30 + 30), ms(10 + 40)));
    }

    #[test]
    fn the_longest_waits_are_kept_whatever_their_order() {
        let count = LONGEST_MAX as u64 + 10;
        for is_rising in [true, false] {
            let len = |number: u64| if is_rising { number + 1 } else { count - number };
            let waits: Vec<_> = (0..count).map(|number| (number * 1000, number * 1000 + len(number))).collect();
            let (clock, log) = log_of(&waits);
            let found = log.waits(clock.at(count * 1000));
            let longest: Vec<_> = found.longest.iter().map(|wait| wait.lasted).collect();
            let expected: Vec<_> = (1..=count).rev().take(LONGEST_MAX).map(ms).collect();
            assert_eq!((longest, found.count), (expected, count));
            let first = found.longest[0];
            let number = if is_rising { count - 1 } else { 0 };
            assert_eq!((first.offset, first.began_after), (number * 1000, ms(number * 1000)));
        }
    }

    #[test]
    fn the_cause_is_what_took_longest() {
        let clock = Clock(Instant::now());
        let causes = [(WaitCause::OtherLayers, clock.at(0)), (WaitCause::Frame, clock.at(5))];
        assert_eq!(longest_cause(&causes, clock.at(30)), Some(WaitCause::Frame));
        assert_eq!(longest_cause(&causes, clock.at(9)), Some(WaitCause::OtherLayers));
        assert_eq!(longest_cause(&causes, clock.at(10)), Some(WaitCause::OtherLayers));
        assert_eq!(longest_cause(&[], clock.at(10)), None);
    }
}
