//! Effects of time: readers who have waited long enough, requests that are too slow, places that are asked too.

use std::time::{Duration, Instant};

use super::{
    machine::{Class, Effect, FrameState, Machine, Outcome, Pending, StreamKind, Waiter},
    options::Priority,
    turns::Slots,
};
use crate::{
    error::ReadError,
    fetch::{places::PlaceRef, source::SourceError},
};

/// A request below this rate loses its slot when somebody else waits for one, shares the place with it, or there is
/// another place: less than a modem, and no layer of a usable size comes at it within a reader's patience.
const RATE_MIN: u64 = 16 << 10;
/// Bytes a second below which a request has failed, whoever waits: a connection that is dead, or meant to be.
const STALLED_RATE: u64 = 1 << 10;

impl<W: Waiter> Machine<W> {
    /// Whether time changes nothing.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.pending.is_empty()
            && self.readers.is_empty()
            && self.given_up.is_empty()
            && !self.layers.values().any(super::machine::LayerState::has_queue)
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.given_up.retain(|_, (until, _)| now < *until);
        self.queue_deferred(now);
        self.end_readers(now);
        self.end_slow_requests(now);
        self.rotate(now);
        self.ask_next_places(now);
        self.advance(now);
    }

    /// Readers whose patience is over get the last failure of their layer.
    fn end_readers(&mut self, now: Instant) {
        self.readers.retain(|(_, _, wait)| !wait.is_over());
        let due: Vec<_> = self.readers.extract_if(.., |(deadline, _, _)| *deadline <= now).collect();
        let mut layers: Vec<u64> = due.iter().map(|(_, layer, _)| *layer).collect();
        layers.sort_unstable();
        layers.dedup();
        for layer in layers {
            let waits = due.iter().filter(|(_, of, _)| *of == layer).map(|(_, _, wait)| wait.clone()).collect();
            self.give_up(layer, waits, now);
        }
    }

    /// Nobody of `waits` waits for frames of a layer any longer.
    fn give_up(&mut self, layer: u64, waits: Vec<W>, now: Instant) {
        let Some((place, error)) = self.overdue(layer, &waits) else { return };
        let until = now + self.options.failure_memory;
        for key in self.end_waits(layer, place, waits, error.clone(), now) {
            self.given_up.insert(key, (until, error.clone()));
        }
    }

    /// The error for readers of a layer whose patience is over: the frame that has not come, from where, and why, as
    /// far as anybody knows.
    fn overdue(&self, layer: u64, waits: &[W]) -> Option<(Option<u64>, ReadError)> {
        let (place, error) = self.layers.get(&layer)?.failure();
        let is_waited_for =
            |pending: &Pending<W>| pending.waits.iter().any(|wait| waits.iter().any(|of| of.is_same(wait)));
        let frames = self.pending.iter().filter(|(key, pending)| key.0 == layer && is_waited_for(pending));
        let (Some(((_, frame), pending)), ReadError::Source { blob, error }) =
            (frames.min_by_key(|(key, _)| key.1), &error)
        else {
            return Some((place, error));
        };
        let asked = match pending.state {
            FrameState::Coming { request, .. } => self.running.get(&request).map(|running| running.place.number),
            _ => None,
        };
        let message =
            format!("frame {frame} has not come in {:?}: {}", self.patience.unwrap_or_default(), error.message);
        Some((place.or(asked), ReadError::Source { blob: *blob, error: SourceError { message, ..error.clone() } }))
    }

    fn end_slow_requests(&mut self, now: Instant) {
        let looked_at = self.running.keys().filter_map(|request| Some((*request, self.verdict(*request, now)?)));
        let looked_at: Vec<_> = looked_at.collect();
        for (request, verdict) in looked_at {
            if let Some(running) = self.running.get_mut(&request) {
                running.sample = (now, running.link.received());
                if let Some(outcome) = verdict {
                    running.link.set_reason(match &outcome {
                        Outcome::Failed(error) => error.clone(),
                        _ => SourceError::passing("bytes came too slowly"),
                    });
                    self.effects.push_back(Effect::Cancel(running.link.clone()));
                    self.end(request, outcome, now);
                }
            }
        }
    }

    /// The verdict on a request whose time has come to be looked at.
    fn verdict(&self, request: u64, now: Instant) -> Option<Option<Outcome>> {
        let running = self.running.get(&request)?;
        if !running.link.is_waiting() {
            return Some(None);
        }
        let layer = self.layers.get(&running.layer)?;
        let other_place =
            layer.places.iter().any(|state| state.place.number != running.place.number && !state.is_paused(now));
        let (since, before) = running.sample;
        let (received, elapsed) = (running.link.received(), now.duration_since(since));
        if received == 0 {
            let is_opening = running.class == Class::Stream(StreamKind::Opening);
            let answer_max =
                if is_opening && other_place { self.options.opening_answer_max } else { self.options.answer_max };
            let error = || SourceError::passing(format!("no answer within {} s", seconds(answer_max)));
            return (elapsed >= answer_max).then(|| Some(Outcome::Failed(error())));
        }
        if elapsed < self.options.rate_window {
            return None;
        }
        let came = received.saturating_sub(before);
        if came < bytes_in(elapsed, STALLED_RATE) {
            let error = SourceError::passing(format!("{came} bytes came in {} s", seconds(elapsed)));
            return Some(Some(Outcome::Failed(error)));
        }
        let shares = |other: &super::machine::Running| other.place.source == running.place.source;
        let is_in_the_way = other_place
            || self.running.values().filter(|other| shares(other)).count() > 1
            || self.layers.values().any(super::machine::LayerState::has_queue);
        let is_slow = came < bytes_in(elapsed, RATE_MIN);
        Some((is_slow && is_in_the_way).then_some(Outcome::Slow))
    }

    /// Reads that wait for the first byte of one place are asked for at the next place too.
    fn ask_next_places(&mut self, now: Instant) {
        let is_late = |running: &super::machine::Running| {
            let is_read = running.class == Class::Frames(Priority::Read);
            let has_begun = running.link.received() > 0;
            is_read && !running.is_hedged && !has_begun && now >= running.started + self.options.hedge_after
        };
        let late: Vec<u64> =
            self.running.iter().filter(|(_, running)| is_late(running)).map(|(request, _)| *request).collect();
        for request in late {
            if let Some(place) = self.next_place(request, now) {
                self.start_hedge(request, place, now);
            }
        }
    }

    /// Another place for a request that has a slot for it.
    fn next_place(&self, request: u64, now: Instant) -> Option<PlaceRef> {
        let running = self.running.get(&request)?;
        let taken = self.taken(running.class);
        let slots = Slots::new(&taken, self.limits(running.class));
        let layer = self.layers.get(&running.layer)?;
        let has_slot = |place: &PlaceRef, window: usize| {
            let standing = self.standings.of(&place.source);
            slots.is_open(running.layer, place.number, window) && slots.has_room_for(&place.source, standing)
        };
        let others = layer.places.iter().filter(|state| state.place.number != running.place.number);
        let mut others = others.filter(|state| !state.is_paused(now));
        others.find(|state| has_slot(&state.place, state.window)).map(|state| state.place.clone())
    }
}

fn bytes_in(time: Duration, bytes_per_second: u64) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).saturating_mul(bytes_per_second) / 1000
}

/// For people: never zero for a time that is shorter in tests.
fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).round() / 10.0
}
