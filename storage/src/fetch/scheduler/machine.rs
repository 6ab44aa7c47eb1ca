//! Waiters for frames, and the choice of the next request: a state machine without clock, threads or network.
//!
//! Events are told to it, with the time at which they happened; what is to be done about them is taken from it as
//! [`Effect`]s. A frame that is not in the cache is *pending* while somebody wants it: queued, coming with a request
//! (or two, where the next place is asked too), or received and being decoded. However many readers wait for it, it is
//! pending once.
//!
//! `turns.rs` decides who has the next slot, `rotation.rs` who gives one up, `standing.rs` knows the sources, `health.rs`
//! when a place may be asked, `watch.rs` what time changes.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::Entry},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use format_spec::{Digest, limits::FRAME_COMPRESSED_LEN_MAX};

use super::{
    health::PlaceState,
    options::{Priority, RequestLimits, RequestOptions},
    standing::Standings,
    turns::{Candidate, Taken, choose},
};
use crate::{
    error::ReadError,
    fetch::{link::Link, places::PlaceRef, source::SourceError, wait::WaitingRead},
};

/// Longest range of one request, unless a single frame is longer; in compressed bytes. Long enough that the
/// round trip does not show, short enough that several requests share a link fairly.
const REQUEST_LEN_MAX: u64 = 4 << 20;
/// A read takes a frame out of a running prefetch when more bytes than this come before it.
const WAIT_LEN_MAX: u64 = 512 << 10;
/// A request for a reader that takes longer is not given way to: its source may never answer.
const READ_TIME: Duration = Duration::from_secs(2);
/// Times a frame is asked for again when its bytes were wrong, or once for each place if there are more.
const RETRIES_MAX: usize = 2;
const PRIORITY_COUNT: usize = 3;
const STREAM_KIND_COUNT: usize = 2;

/// Somebody who waits for frames.
pub(crate) trait Waiter: Clone {
    /// Whether it is the same one.
    fn is_same(&self, other: &Self) -> bool;
    /// Whether it waits no longer.
    fn is_over(&self) -> bool;
    /// The reader that it is; `None` for whoever brings something without being blocked.
    fn read(&self) -> Option<WaitingRead>;
}

/// The purpose of requests. Each class has slots of its own, so a blocked read never waits for a prefetch to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Frames(Priority),
    /// A stream that somebody else receives: see [`Machine::want_stream`].
    Stream(StreamKind),
}

/// The purposes of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamKind {
    /// To open a layer: its index, its hot pack, its dedup section.
    Opening,
    /// To verify one.
    Proof,
}

impl Class {
    pub(super) const ALL: [Self; 5] = [
        Self::Frames(Priority::Read),
        Self::Stream(StreamKind::Opening),
        Self::Stream(StreamKind::Proof),
        Self::Frames(Priority::HotPack),
        Self::Frames(Priority::Background),
    ];
}

/// An action that is to be done.
#[derive(Debug)]
pub(crate) enum Effect<W> {
    /// Ask for frames.
    Fetch(Fetch),
    /// A stream may begin.
    Grant { ticket: u64, grant: Grant },
    /// End this request: nothing of it is wanted any longer.
    Cancel(Arc<Link>),
    /// These will not get what they wait for.
    Fail { layer: u64, place: Option<u64>, waits: Vec<W>, error: ReadError },
    /// A request has failed that readers go on waiting for: somebody may want to know why.
    Tell { layer: u64, place: u64, error: SourceError },
}

/// A request to make.
#[derive(Debug, Clone)]
pub(crate) struct Fetch {
    pub(crate) request: u64,
    pub(crate) layer: u64,
    pub(crate) place: u64,
    pub(crate) priority: Priority,
    /// Neighbours in the blob.
    pub(crate) frames: Range<u32>,
    pub(crate) link: Arc<Link>,
}

/// A slot for a stream.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) request: u64,
    pub(crate) place: u64,
    pub(crate) link: Arc<Link>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It brought what was still wanted of it.
    Done,
    /// The source gave up.
    Failed(SourceError),
    /// It came too slowly: others go first.
    Slow,
    /// Its turn was over, and a source that had none has its slot now.
    Displaced,
    /// Its task is gone, as when the process shuts down.
    Lost,
}

/// The fetching of a layer at one moment, frame by frame; not what its hot pack brings, but for the reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Activity {
    /// Frames that somebody wants: a reader, read-ahead, or the fetching of the rest.
    pub frames_wanted: u64,
    /// Those of them that a request is bringing.
    pub frames_under_way: u64,
    /// The numbers of those that a reader is blocked for, ascending.
    pub frames_awaited: Vec<u32>,
    /// The reads that wait, longest first, for whatever brings their bytes.
    pub reads: Vec<WaitingRead>,
    /// The last failure of the layer, as long as nothing has come since.
    pub failure: Option<String>,
    /// Whether nobody who has the layer may be asked at this moment: each has failed a moment ago.
    pub is_paused: bool,
}

/// Number of a layer and number of a frame.
pub(super) type FrameKey = (u64, u32);

#[derive(Debug)]
pub(crate) struct Machine<W> {
    pub(super) options: RequestOptions,
    /// How long a read waits; `None` fails it with its source.
    pub(super) patience: Option<Duration>,
    pub(super) pending: HashMap<FrameKey, Pending<W>>,
    pub(super) layers: BTreeMap<u64, LayerState>,
    pub(super) running: BTreeMap<u64, Running>,
    pub(super) standings: Standings,
    /// Until when each reader is ready to wait.
    pub(super) readers: Vec<(Instant, u64, W)>,
    /// Frames that readers did not get a moment ago, until when that is remembered, and why.
    pub(super) given_up: HashMap<FrameKey, (Instant, ReadError)>,
    /// Frames whose bytes were wrong a moment ago and that somebody wants again: queued at that time.
    pub(super) deferred: Vec<(Instant, FrameKey)>,
    pub(super) effects: VecDeque<Effect<W>>,
    next_number: u64,
    /// When something was last wanted, or came, that is more urgent than the rest.
    last_urgent: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Pending<W> {
    pub(super) priority: Priority,
    pub(super) waits: Vec<W>,
    /// Where it lies in the blob.
    blob: Range<u64>,
    /// The places whose bytes were wrong, one for each time.
    wrong_places: Vec<u64>,
    pub(super) state: FrameState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameState {
    Queued,
    /// With a request, and with another one of the next place that took too long at the first.
    Coming {
        request: u64,
        hedge: Option<u64>,
    },
    /// In the hands of who decodes it.
    Received {
        request: u64,
        place: u64,
    },
}

#[derive(Debug)]
pub(super) struct LayerState {
    pub(super) blob: Digest,
    /// Newest first.
    pub(super) places: Vec<PlaceState>,
    /// The place that worked last.
    pub(super) preferred: Option<u64>,
    /// Frames in the order they were wanted. An entry whose frame is no longer queued in this class is stale.
    queues: [VecDeque<u32>; PRIORITY_COUNT],
    /// Streams of each kind that wait for a slot.
    tickets: [VecDeque<u64>; STREAM_KIND_COUNT],
    last_turn: u64,
    pub(super) last_failure: Option<(u64, SourceError)>,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) class: Class,
    pub(super) layer: u64,
    pub(super) place: PlaceRef,
    /// Empty for a stream.
    pub(super) frames: Range<u32>,
    blob_start: u64,
    pub(super) link: Arc<Link>,
    pub(super) started: Instant,
    /// When its rate was last looked at, and what had been received then.
    pub(super) sample: (Instant, u64),
    /// Whether the next place is asked too, or this is that.
    pub(super) is_hedged: bool,
    /// Whether it brings all of the layer: see [`Machine::take_all`].
    is_whole: bool,
    /// Whether right bytes have come with it.
    pub(super) has_brought: bool,
}

impl<W: Waiter> Machine<W> {
    pub(crate) fn new(options: RequestOptions, patience: Option<Duration>) -> Self {
        Self {
            options,
            patience,
            pending: HashMap::new(),
            layers: BTreeMap::new(),
            running: BTreeMap::new(),
            standings: Standings::default(),
            readers: Vec::new(),
            given_up: HashMap::new(),
            deferred: Vec::new(),
            effects: VecDeque::new(),
            next_number: 0,
            last_urgent: None,
        }
    }

    /// The next thing to do.
    pub(crate) fn next_effect(&mut self) -> Option<Effect<W>> {
        self.effects.pop_front()
    }

    /// Says where a layer comes from, newest first: a new layer, or one whose places have changed.
    pub(crate) fn set_places(&mut self, layer: u64, blob: Digest, places: Vec<PlaceRef>, now: Instant) {
        let state = self.layers.entry(layer).or_insert_with(|| LayerState::new(blob));
        let mut known = std::mem::take(&mut state.places);
        let keep = |place: PlaceRef| {
            let position = known.iter().position(|known| known.place.number == place.number);
            position.map_or_else(|| PlaceState::new(place), |position| known.swap_remove(position))
        };
        state.places = places.into_iter().map(keep).collect();
        self.advance(now);
    }

    /// Wants frames of a layer, each with its range in the blob; returns for how many of them `wait` waits now, with one
    /// for a failure that it is going to hear of.
    ///
    /// `is_present` says what is in the cache: it is asked about frames that are not pending, and a frame stops being
    /// pending after it became present, so that it is never missed.
    pub(crate) fn want(
        &mut self,
        layer: u64,
        frames: impl IntoIterator<Item = (u32, Range<u64>)>,
        priority: Priority,
        wait: Option<&W>,
        is_present: impl Fn(u32) -> bool,
        now: Instant,
    ) -> usize {
        let mut parts = 0;
        for (frame, blob) in frames {
            match self.want_frame((layer, frame), blob, priority, wait, &is_present, now) {
                Ok(is_pending) => parts += usize::from(is_pending && wait.is_some()),
                Err((place, error)) => {
                    // One part that never ends: the wait fails a moment later, and is not complete before.
                    parts += usize::from(wait.is_some());
                    self.end_waits(layer, place, wait.cloned().into_iter().collect(), error, now);
                    break;
                }
            }
        }
        self.advance(now);
        parts
    }

    /// Whether the frame is pending now, or why it will not come.
    fn want_frame(
        &mut self,
        key: FrameKey,
        blob: Range<u64>,
        priority: Priority,
        wait: Option<&W>,
        is_present: impl Fn(u32) -> bool,
        now: Instant,
    ) -> Result<bool, (Option<u64>, ReadError)> {
        let (number, frame) = key;
        let Some(layer) = self.layers.get_mut(&number) else { return Ok(false) };
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.waits.extend(wait.cloned());
            if priority >= pending.priority {
                return Ok(true);
            }
            pending.priority = priority;
            match pending.state {
                FrameState::Queued => {}
                FrameState::Received { .. } => return Ok(true),
                FrameState::Coming { request, .. } => {
                    let running = self.running.get(&request).filter(|_| priority == Priority::Read);
                    if !running.is_some_and(|running| running.is_far_from(pending.blob.start)) {
                        return Ok(true);
                    }
                    pending.state = FrameState::Queued;
                }
            }
        } else if is_present(frame) {
            return Ok(false);
        } else {
            let mut not_before = None;
            if let Some((until, error)) = self.given_up.get(&key).filter(|(until, _)| now < *until) {
                // Wrong bytes may be right ones soon, and nobody has waited for them yet.
                let has_waited = matches!(error, ReadError::Source { .. });
                if has_waited || priority != Priority::Read {
                    return Err((None, error.clone()));
                }
                not_before = Some(*until);
            }
            if priority != Priority::Read && !layer.has_open_place(now) {
                return Err(layer.failure());
            }
            let waits = wait.cloned().into_iter().collect();
            let (wrong_places, state) = (Vec::new(), FrameState::Queued);
            self.pending.insert(key, Pending { priority, waits, blob, wrong_places, state });
            if let Some(not_before) = not_before {
                self.deferred.push((not_before, key));
                return Ok(true);
            }
        }
        layer.queues[priority as usize].push_back(frame);
        self.note_urgent(priority, now);
        Ok(true)
    }

    /// A reader waits for something of a layer, until `deadline`.
    pub(crate) fn wait_until(&mut self, deadline: Instant, layer: u64, wait: W) {
        self.readers.push((deadline, layer, wait));
    }

    /// Wants a slot for a request that somebody else makes: [`Effect::Grant`] names the ticket that this returns.
    pub(crate) fn want_stream(&mut self, layer: u64, kind: StreamKind, now: Instant) -> Option<u64> {
        let ticket = self.new_number();
        self.layers.get_mut(&layer)?.tickets[kind as usize].push_back(ticket);
        self.advance(now);
        Some(ticket)
    }

    /// Right bytes have come with a stream.
    pub(crate) fn stream_works(&mut self, request: u64) {
        if let Some(running) = self.running.get_mut(&request)
            && let Some(layer) = self.layers.get_mut(&running.layer)
        {
            running.has_brought = true;
            self.standings.note_right(&running.place.source);
            layer.work(running.place.number);
        }
    }

    /// A request brings all of its layer, because its source gives nothing less: whatever is missing comes with it,
    /// also what was to come otherwise, so that nobody has the blob sent again.
    pub(crate) fn take_all(
        &mut self,
        request: u64,
        frames: impl IntoIterator<Item = (u32, Range<u64>)>,
        is_present: impl Fn(u32) -> bool,
        now: Instant,
    ) {
        let Some(running) = self.running.get_mut(&request) else { return };
        running.is_whole = true;
        let layer = running.layer;
        let mut others = Vec::new();
        for (frame, blob) in frames {
            let key = (layer, frame);
            // In this order no frame is missed that is just arriving.
            if let Entry::Vacant(vacant) = self.pending.entry(key) {
                if is_present(frame) {
                    continue;
                }
                // Nobody waits for it; but it comes, so that nothing of the rest need be asked for meanwhile.
                let (priority, wrong_places, state) = (Priority::HotPack, Vec::new(), FrameState::Queued);
                vacant.insert(Pending { priority, waits: Vec::new(), blob, wrong_places, state });
            }
            let Some(pending) = self.pending.get_mut(&key) else { continue };
            match pending.state {
                FrameState::Received { .. } => continue,
                FrameState::Coming { request, hedge } => others.extend([Some(request), hedge].into_iter().flatten()),
                FrameState::Queued => {}
            }
            pending.state = FrameState::Coming { request, hedge: None };
            running.frames = 0..running.frames.end.max(frame.saturating_add(1));
        }
        others.sort_unstable();
        others.dedup();
        others.into_iter().filter(|other| *other != request).for_each(|other| self.cancel_if_idle(other, now));
        self.advance(now);
    }

    /// Whether a request has still to bring a frame: no other has taken it over.
    pub(crate) fn is_wanted(&self, request: u64, layer: u64, frame: u32) -> bool {
        self.pending.get(&(layer, frame)).is_some_and(|pending| pending.state.is_coming_with(request))
    }

    /// The bytes of a frame are there; whether they are wanted, and then decoded.
    pub(crate) fn receive(&mut self, request: u64, layer: u64, frame: u32, now: Instant) -> bool {
        let Some(place) = self.running.get(&request).map(|running| running.place.number) else { return false };
        let Some(pending) = self.pending.get_mut(&(layer, frame)) else { return false };
        let FrameState::Coming { request: first, hedge } = pending.state else { return false };
        if !pending.state.is_coming_with(request) {
            return false;
        }
        pending.state = FrameState::Received { request, place };
        // The first answer wins.
        if let Some(loser) = if first == request { hedge } else { Some(first) } {
            self.take_from(loser, now);
            self.advance(now);
        }
        true
    }

    /// A frame is in the cache; returns who waits for it.
    pub(crate) fn arrive(&mut self, request: u64, layer: u64, frame: u32, now: Instant) -> Vec<W> {
        let Some((pending, place)) = self.settle(request, layer, frame) else { return Vec::new() };
        self.note_urgent(pending.priority, now);
        if let Some(running) = self.running.get_mut(&request) {
            running.has_brought = true;
        }
        if let Some(layer) = self.layers.get_mut(&layer) {
            layer.work(place);
            if let Some(state) = layer.place_mut(place) {
                self.standings.note_right(&state.place.source);
            }
        }
        self.given_up.retain(|key, _| key.0 != layer);
        self.advance(now);
        pending.waits
    }

    /// The bytes of a frame are wrong: it is asked for again, elsewhere if there is another place, or given up.
    pub(crate) fn refuse(&mut self, request: u64, layer: u64, frame: u32, error: ReadError, now: Instant) {
        let key = (layer, frame);
        let Some(pending) = self.pending.get_mut(&key) else { return };
        let FrameState::Received { request: by, place } = pending.state else { return };
        let Some(state) = self.layers.get_mut(&layer).filter(|_| by == request) else { return };
        pending.wrong_places.push(place);
        let is_enough = pending.wrong_places.len() > RETRIES_MAX.max(state.places.len().saturating_sub(1));
        if is_enough || !pending.is_wanted() {
            return self.fail(request, layer, frame, error, now);
        }
        pending.state = FrameState::Queued;
        state.queues[pending.priority as usize].push_front(frame);
        self.advance(now);
    }

    /// A frame that was received will not come to anybody.
    pub(crate) fn fail(&mut self, request: u64, layer: u64, frame: u32, error: ReadError, now: Instant) {
        let Some((pending, place)) = self.settle(request, layer, frame) else { return };
        if !matches!(error, ReadError::Stopped(_)) {
            self.given_up.insert((layer, frame), (now + self.options.failure_memory, error.clone()));
        }
        self.end_waits(layer, Some(place), pending.waits, error, now);
        self.advance(now);
    }

    /// A request has ended; what it did not bring is asked for again, or fails.
    ///
    /// All that failed fails at once, so that a read that comes when the error is known asks the source anew.
    pub(crate) fn end(&mut self, request: u64, outcome: Outcome, now: Instant) {
        let Some(running) = self.running.remove(&request) else { return };
        if running.class != Class::Frames(Priority::Background) {
            self.last_urgent = Some(now);
        }
        self.note_end_of_turn(request, &running, Some(&outcome), now);
        self.judge(&running, &outcome, now);
        let (mut failed, mut is_waited_for) = (Vec::new(), false);
        // The queue is filled at its front, last frame first: these have waited longest.
        for frame in running.frames.clone().rev() {
            let key = (running.layer, frame);
            let Some(pending) = self.pending.get_mut(&key) else { continue };
            if !pending.state.detach(request) {
                continue;
            }
            let Some(layer) = self.layers.get_mut(&running.layer) else { continue };
            let is_asked_again = match &outcome {
                _ if !pending.is_wanted() => false,
                Outcome::Done | Outcome::Slow | Outcome::Displaced => true,
                Outcome::Lost => false,
                Outcome::Failed(_) => match pending.priority {
                    Priority::Read if self.patience.is_some() => true,
                    _ => layer.has_open_place(now),
                },
            };
            let queue = &mut layer.queues[pending.priority as usize];
            is_waited_for |= is_asked_again && pending.priority == Priority::Read;
            match outcome {
                _ if !is_asked_again => failed.extend(self.pending.remove(&key).map(|pending| pending.waits)),
                Outcome::Slow | Outcome::Displaced => queue.push_back(frame),
                _ => queue.push_front(frame),
            }
        }
        if let Outcome::Failed(error) = &outcome
            && is_waited_for
        {
            let (layer, place, error) = (running.layer, running.place.number, error.clone());
            self.effects.push_back(Effect::Tell { layer, place, error });
        }
        if !failed.is_empty() {
            let state = self.layers.get(&running.layer);
            let blob = state.map_or(Digest::of(b""), |state| state.blob);
            let error = match outcome {
                Outcome::Failed(error) => ReadError::Source { blob, error },
                _ => ReadError::Stopped(blob),
            };
            let waits = failed.into_iter().flatten().filter(|wait| !wait.is_over()).collect();
            self.end_waits(running.layer, Some(running.place.number), waits, error, now);
        }
        self.advance(now);
    }

    fn judge(&mut self, running: &Running, outcome: &Outcome, now: Instant) {
        let at_place = self.running.values().filter(|other| other.place.number == running.place.number).count();
        let Some(layer) = self.layers.get_mut(&running.layer) else { return };
        match outcome {
            Outcome::Failed(error) => layer.fail(running, error, now, &self.options),
            Outcome::Slow => layer.slow_down(running.place.number, at_place + 1, now),
            Outcome::Done | Outcome::Displaced | Outcome::Lost => {}
        }
    }

    /// Nothing more is wanted of a layer; what is being decoded arrives.
    pub(crate) fn forget(&mut self, layer: u64, now: Instant) {
        let is_forgotten =
            |key: &FrameKey, state: FrameState| key.0 == layer && !matches!(state, FrameState::Received { .. });
        let forgotten = self.pending.extract_if(|key, pending| is_forgotten(key, pending.state));
        let waits: Vec<W> = forgotten.flat_map(|(_, pending)| pending.waits).collect();
        let ended: Vec<u64> =
            self.running.iter().filter(|(_, running)| running.layer == layer).map(|(number, _)| *number).collect();
        for running in ended.iter().filter_map(|number| self.running.remove(number)) {
            self.effects.push_back(Effect::Cancel(running.link));
        }
        self.given_up.retain(|key, _| key.0 != layer);
        if let Some(state) = self.layers.remove(&layer) {
            let places = || self.layers.values().flat_map(|layer| &layer.places);
            self.standings.retain(|source| places().any(|state| &*state.place.source == source));
            self.effects.push_back(Effect::Fail { layer, place: None, waits, error: ReadError::Stopped(state.blob) });
        }
        self.advance(now);
    }

    /// Drops what only the fetching of the rest wants of these frames of a layer, and the requests that bring nothing else.
    pub(crate) fn drop_background(&mut self, layer: u64, frames: &Range<u32>, now: Instant) {
        let is_dropped = |key: &FrameKey, pending: &Pending<W>| {
            let is_received = matches!(pending.state, FrameState::Received { .. });
            key.0 == layer && frames.contains(&key.1) && pending.priority == Priority::Background && !is_received
        };
        let dropped: Vec<_> = self.pending.extract_if(|key, pending| is_dropped(key, pending)).collect();
        let requests: Vec<u64> = self.running.keys().copied().collect();
        requests.into_iter().for_each(|request| self.cancel_if_idle(request, now));
        let waits: Vec<W> = dropped.into_iter().flat_map(|(_, pending)| pending.waits).collect();
        if let Some(state) = self.layers.get(&layer).filter(|_| !waits.is_empty()) {
            let (place, error) = state.failure();
            self.end_waits(layer, place, waits, error, now);
        }
        self.advance(now);
    }

    /// `waits` get `error`, and wait for nothing of the layer any longer.
    pub(super) fn end_waits(
        &mut self,
        layer: u64,
        place: Option<u64>,
        waits: Vec<W>,
        error: ReadError,
        now: Instant,
    ) -> Vec<FrameKey> {
        let (mut unwanted, mut requests) = (Vec::new(), Vec::new());
        let of_layer = self.pending.iter_mut().filter(|(key, _)| key.0 == layer && !waits.is_empty());
        for (key, pending) in of_layer {
            let before = pending.waits.len();
            pending.waits.retain(|wait| !waits.iter().any(|ended| ended.is_same(wait)));
            let is_received = matches!(pending.state, FrameState::Received { .. });
            if pending.waits.len() < before && !pending.is_wanted() && !is_received {
                unwanted.push(*key);
            }
        }
        for pending in unwanted.iter().filter_map(|key| self.pending.remove(key)) {
            if let FrameState::Coming { request, hedge } = pending.state {
                requests.extend([Some(request), hedge].into_iter().flatten());
            }
        }
        requests.into_iter().for_each(|request| self.cancel_if_idle(request, now));
        self.effects.push_back(Effect::Fail { layer, place, waits, error });
        unwanted
    }

    /// The demand for a layer at this moment.
    pub(crate) fn activity(&self, layer: u64, now: Instant) -> Activity {
        let mut activity = Activity::default();
        if let Some(state) = self.layers.get(&layer) {
            activity.failure = state.last_failure.as_ref().map(|(_, error)| error.message.clone());
            activity.is_paused = !state.places.is_empty() && !state.has_open_place(now);
        }
        let of_layer = self.readers.iter().filter(|(_, of, _)| *of == layer);
        let mut waits: Vec<&W> = of_layer.map(|(_, _, wait)| wait).collect();
        for ((_, frame), pending) in self.pending.iter().filter(|((number, _), _)| *number == layer) {
            activity.frames_wanted += 1;
            activity.frames_under_way += u64::from(pending.state != FrameState::Queued);
            // Whoever fetches the rest waits too, and for him nobody is blocked.
            if pending.priority == Priority::Read && pending.is_awaited() {
                activity.frames_awaited.push(*frame);
                waits.extend(&pending.waits);
            }
        }
        activity.reads = waits.into_iter().filter(|wait| !wait.is_over()).filter_map(Waiter::read).collect();
        // One read may wait for several frames.
        activity.reads.sort_unstable();
        activity.reads.dedup();
        activity.frames_awaited.sort_unstable();
        activity
    }

    /// Whether somebody wants a frame that is not here.
    pub(crate) fn is_pending(&self, layer: u64, frame: u32) -> bool {
        self.pending.contains_key(&(layer, frame))
    }

    /// Whether blocked readers share the link with a request: they have asked its source a moment ago, and wait for
    /// nothing that it brings itself.
    pub(crate) fn is_beside_reads(&self, request: u64, now: Instant) -> bool {
        let Some(own) = self.running.get(&request) else { return false };
        let is_new = |other: &Running| now.saturating_duration_since(other.started) < READ_TIME;
        let is_read = |other: &Running| other.class == Class::Frames(Priority::Read) && is_new(other);
        let is_awaited = |frame: u32| {
            let pending = self.pending.get(&(own.layer, frame));
            let pending = pending.filter(|pending| pending.state.is_coming_with(request));
            pending.is_some_and(|pending| pending.priority == Priority::Read && pending.is_awaited())
        };
        let is_beside = self.running.values().any(|other| is_read(other) && other.place.source == own.place.source);
        is_beside && !own.frames.clone().any(is_awaited)
    }

    /// Whether a request brings a frame, or has brought it.
    pub(crate) fn is_under_way(&self, layer: u64, frame: u32) -> bool {
        self.pending.get(&(layer, frame)).is_some_and(|pending| pending.state != FrameState::Queued)
    }

    /// Whether nothing more urgent than the rest is under way, or was later than `since`.
    pub(crate) fn is_quiet_since(&self, since: Instant) -> bool {
        let is_urgent = |pending: &Pending<W>| pending.priority < Priority::Background && pending.is_wanted();
        let is_under_way = self.pending.values().any(is_urgent);
        !is_under_way && self.last_urgent.is_none_or(|last| last <= since)
    }

    /// Something more urgent than the rest has come, or has been begun, in another way than by frames.
    pub(crate) fn note_urgent_now(&mut self, now: Instant) {
        self.last_urgent = Some(now);
    }

    /// The source, shared with others, of the place that the layer asks, or would ask next.
    pub(crate) fn source_of(&self, layer: u64, now: Instant) -> Option<Arc<str>> {
        let layer = self.layers.get(&layer)?;
        let place = layer.place_for(&[], now).or(layer.places.first())?;
        Some(place.place.source.clone())
    }

    fn note_urgent(&mut self, priority: Priority, now: Instant) {
        if priority < Priority::Background {
            self.last_urgent = Some(now);
        }
    }

    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Ends that a received frame is pending.
    fn settle(&mut self, request: u64, layer: u64, frame: u32) -> Option<(Pending<W>, u64)> {
        let state = self.pending.get(&(layer, frame))?.state;
        match state {
            FrameState::Received { request: by, place } if by == request => {
                self.pending.remove(&(layer, frame)).map(|pending| (pending, place))
            }
            _ => None,
        }
    }

    /// Takes all frames that another request brings too from a request, and ends it if nothing is left.
    fn take_from(&mut self, request: u64, now: Instant) {
        let Some(running) = self.running.get(&request) else { return };
        for frame in running.frames.clone() {
            if let Some(pending) = self.pending.get_mut(&(running.layer, frame)) {
                pending.state.detach_shared(request);
            }
        }
        self.cancel_if_idle(request, now);
    }

    /// Ends a request for frames that has nothing more to bring.
    pub(super) fn cancel_if_idle(&mut self, request: u64, now: Instant) {
        let Some(running) = self.running.get(&request).filter(|running| !running.frames.is_empty()) else { return };
        let mut frames = running.frames.clone();
        let has_frame = frames.any(|frame| {
            let pending = self.pending.get(&(running.layer, frame));
            pending.is_some_and(|pending| pending.state.is_coming_with(request))
        });
        if !has_frame && let Some(running) = self.running.remove(&request) {
            self.note_end_of_turn(request, &running, None, now);
            self.effects.push_back(Effect::Cancel(running.link));
        }
    }

    /// Queues what was deferred until now.
    pub(super) fn queue_deferred(&mut self, now: Instant) {
        for (_, (number, frame)) in self.deferred.extract_if(.., |(not_before, _)| *not_before <= now) {
            let pending = self.pending.get(&(number, frame)).filter(|pending| pending.state == FrameState::Queued);
            if let (Some(pending), Some(layer)) = (pending, self.layers.get_mut(&number)) {
                layer.queues[pending.priority as usize].push_back(frame);
            }
        }
    }

    /// Starts requests as long as there are queued frames and free slots.
    pub(super) fn advance(&mut self, now: Instant) {
        for class in Class::ALL {
            while self.start_one(class, now) {}
        }
    }

    /// The layers that have something to ask for, each with the place that it would ask.
    pub(super) fn candidates(&mut self, class: Class, now: Instant) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (number, layer) in &mut self.layers {
            let Some(avoided) = layer.front(*number, class, &self.pending) else { continue };
            if let Some(PlaceState { place, window, .. }) = layer.place_for(avoided, now) {
                let (place, source, standing) = (place.number, place.source.clone(), self.standings.of(&place.source));
                let (layer, window, last_turn) = (*number, *window, layer.last_turn);
                candidates.push(Candidate { layer, place, source, window, last_turn, standing });
            }
        }
        candidates
    }

    fn start_one(&mut self, class: Class, now: Instant) -> bool {
        let candidates = self.candidates(class, now);
        if candidates.is_empty() {
            return false;
        }
        let running = self.taken(class);
        let Some(chosen) = choose(&candidates, &running, self.limits(class)) else { return false };
        let place = PlaceRef { number: chosen.place, source: chosen.source.clone() };
        match class {
            Class::Stream(kind) => self.start_stream(chosen.layer, place, kind, now),
            Class::Frames(priority) => self.start_frames(chosen.layer, place, priority, now),
        }
        true
    }

    /// The slots that are taken, seen from a class.
    pub(super) fn taken(&self, class: Class) -> Vec<Taken> {
        let taken = |running: &Running| Taken {
            layer: running.layer,
            place: running.place.number,
            source: running.place.source.clone(),
            is_of_class: running.class == class,
            is_proven: self.standings.of(&running.place.source).is_proven,
        };
        self.running.values().map(taken).collect()
    }

    pub(super) fn limits(&self, class: Class) -> RequestLimits {
        match class {
            Class::Frames(Priority::Read) => self.options.read,
            Class::Stream(StreamKind::Opening) => self.options.opening,
            Class::Stream(StreamKind::Proof) => self.options.proof,
            Class::Frames(Priority::HotPack) => self.options.hot,
            Class::Frames(Priority::Background) => self.options.background,
        }
    }

    fn start_stream(&mut self, layer: u64, place: PlaceRef, kind: StreamKind, now: Instant) {
        let state = self.layers.get_mut(&layer);
        let Some(ticket) = state.and_then(|layer| layer.tickets[kind as usize].pop_front()) else { return };
        let number = place.number;
        let (request, link) = self.start(Class::Stream(kind), layer, place, 0..0, 0, now);
        self.effects.push_back(Effect::Grant { ticket, grant: Grant { request, place: number, link } });
    }

    /// Takes a queued frame and the queued ones right after it out of their queue, for one request.
    fn start_frames(&mut self, layer: u64, place: PlaceRef, priority: Priority, now: Instant) {
        let Some(state) = self.layers.get_mut(&layer) else { return };
        let Some(first) = state.queues[priority as usize].pop_front() else { return };
        let Some(pending) = self.pending.get(&(layer, first)) else { return };
        let (avoided, blob_start) = (pending.wrong_places.clone(), pending.blob.start);
        let (mut last, mut len) = (first, 0);
        for frame in first.. {
            let neighbour = self.pending.get(&(layer, frame)).filter(|pending| {
                pending.state == FrameState::Queued && pending.priority == priority && pending.wrong_places == avoided
            });
            let Some(pending) = neighbour else { break };
            len += (pending.blob.end - pending.blob.start).min(u64::from(FRAME_COMPRESSED_LEN_MAX));
            if len > REQUEST_LEN_MAX && frame != first {
                break;
            }
            last = frame;
        }
        let frames = first..last.saturating_add(1);
        let number = place.number;
        let (request, link) = self.start(Class::Frames(priority), layer, place, frames.clone(), blob_start, now);
        for frame in frames.clone() {
            if let Some(pending) = self.pending.get_mut(&(layer, frame)) {
                pending.state = FrameState::Coming { request, hedge: None };
            }
        }
        self.effects.push_back(Effect::Fetch(Fetch { request, layer, place: number, priority, frames, link }));
    }

    fn start(
        &mut self,
        class: Class,
        layer: u64,
        place: PlaceRef,
        frames: Range<u32>,
        blob_start: u64,
        now: Instant,
    ) -> (u64, Arc<Link>) {
        let (request, link) = (self.new_number(), Arc::new(Link::default()));
        if let Some(state) = self.layers.get_mut(&layer) {
            state.last_turn = request;
        }
        self.standings.note_turn(&place.source, request);
        let (sample, is_hedged) = ((now, 0), false);
        let running = Running {
            class,
            layer,
            place,
            frames,
            blob_start,
            link: link.clone(),
            started: now,
            sample,
            is_hedged,
            is_whole: false,
            has_brought: false,
        };
        self.running.insert(request, running);
        (request, link)
    }

    /// Asks the next place for what a request has not begun to bring.
    pub(super) fn start_hedge(&mut self, request: u64, place: PlaceRef, now: Instant) {
        let Some(running) = self.running.get_mut(&request) else { return };
        running.is_hedged = true;
        let (class, layer, frames, blob_start) =
            (running.class, running.layer, running.frames.clone(), running.blob_start);
        let Class::Frames(priority) = class else { return };
        let number = place.number;
        let (hedge, link) = self.start(class, layer, place, frames.clone(), blob_start, now);
        if let Some(running) = self.running.get_mut(&hedge) {
            running.is_hedged = true;
        }
        for frame in frames.clone() {
            if let Some(pending) = self.pending.get_mut(&(layer, frame))
                && pending.state == (FrameState::Coming { request, hedge: None })
            {
                pending.state = FrameState::Coming { request, hedge: Some(hedge) };
            }
        }
        self.effects.push_back(Effect::Fetch(Fetch { request: hedge, layer, place: number, priority, frames, link }));
    }
}

impl<W: Waiter> Pending<W> {
    /// Whether somebody waits for it still.
    fn is_awaited(&self) -> bool {
        self.waits.iter().any(|wait| !wait.is_over())
    }

    /// Whether it is to come: a read is for those who wait.
    pub(super) fn is_wanted(&self) -> bool {
        self.priority != Priority::Read || self.is_awaited()
    }
}

impl FrameState {
    pub(super) fn is_coming_with(self, number: u64) -> bool {
        matches!(self, Self::Coming { request, hedge } if request == number || hedge == Some(number))
    }

    /// Takes a frame from a request; whether nobody brings it now, and it is queued.
    fn detach(&mut self, number: u64) -> bool {
        if !self.detach_shared(number) && self.is_coming_with(number) {
            *self = Self::Queued;
            return true;
        }
        false
    }

    /// Takes a frame from a request if another one brings it too.
    fn detach_shared(&mut self, number: u64) -> bool {
        match *self {
            Self::Coming { request, hedge: Some(hedge) } if request == number || hedge == number => {
                *self = Self::Coming { request: if request == number { hedge } else { request }, hedge: None };
                true
            }
            _ => false,
        }
    }
}

impl LayerState {
    fn new(blob: Digest) -> Self {
        Self {
            blob,
            places: Vec::new(),
            preferred: None,
            queues: Default::default(),
            tickets: Default::default(),
            last_turn: 0,
            last_failure: None,
        }
    }

    /// Whether something of a class is queued; then the places that it should not come from.
    ///
    /// Drops what is stale from the front of the queue.
    fn front<'a, W>(
        &mut self,
        number: u64,
        class: Class,
        pending: &'a HashMap<FrameKey, Pending<W>>,
    ) -> Option<&'a [u64]> {
        let priority = match class {
            Class::Frames(priority) => priority,
            Class::Stream(kind) => return (!self.tickets[kind as usize].is_empty()).then_some(&[]),
        };
        let queue = &mut self.queues[priority as usize];
        while let Some(frame) = queue.front() {
            match pending.get(&(number, *frame)) {
                Some(pending) if pending.state == FrameState::Queued && pending.priority == priority => {
                    return Some(&pending.wrong_places);
                }
                _ => queue.pop_front(),
            };
        }
        None
    }

    /// The place to ask now: the one that worked last, else the newest; those in `avoided` only if there is no other.
    pub(super) fn place_for(&self, avoided: &[u64], now: Instant) -> Option<&PlaceState> {
        let open = self.places.iter().filter(|state| !state.is_paused(now));
        open.min_by_key(|state| {
            let number = state.place.number;
            let wrong_count = avoided.iter().filter(|avoided| **avoided == number).count();
            (wrong_count, Some(number) != self.preferred)
        })
    }

    pub(super) fn has_open_place(&self, now: Instant) -> bool {
        self.places.iter().any(|state| !state.is_paused(now))
    }

    /// Whether frames or streams wait for a slot; stale entries count too.
    pub(super) fn has_queue(&self) -> bool {
        self.tickets.iter().any(|tickets| !tickets.is_empty()) || self.queues.iter().any(|queue| !queue.is_empty())
    }

    fn place_mut(&mut self, number: u64) -> Option<&mut PlaceState> {
        self.places.iter_mut().find(|state| state.place.number == number)
    }

    fn work(&mut self, place: u64) {
        self.last_failure = None;
        if let Some(state) = self.place_mut(place) {
            state.work();
            self.preferred = Some(place);
        }
    }

    fn fail(&mut self, running: &Running, error: &SourceError, now: Instant, options: &RequestOptions) {
        let number = running.place.number;
        self.last_failure = Some((number, error.clone()));
        if let Some(state) = self.place_mut(number) {
            state.fail(running.started, error, now, options);
        }
    }

    fn slow_down(&mut self, place: u64, running_count: usize, now: Instant) {
        if let Some(state) = self.place_mut(place) {
            state.slow_down(running_count);
        }
        let other = self.places.iter().find(|state| state.place.number != place && !state.is_paused(now));
        if let Some(other) = other {
            self.preferred = Some(other.place.number);
        }
    }

    /// Why nothing comes, and from where.
    pub(super) fn failure(&self) -> (Option<u64>, ReadError) {
        let (place, error) = match &self.last_failure {
            Some((place, error)) => (Some(*place), error.clone()),
            None => (None, SourceError::passing("nobody answers, or sends enough")),
        };
        (place, ReadError::Source { blob: self.blob, error })
    }
}

impl Running {
    fn is_far_from(&self, frame_start: u64) -> bool {
        let received_until = self.blob_start.saturating_add(self.link.received());
        !self.is_whole && frame_start.saturating_sub(received_until) > WAIT_LEN_MAX
    }
}
