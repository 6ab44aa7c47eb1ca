//! Who waits for which frame, and which request is made next.
//!
//! A frame that is not in the cache is *pending* while somebody wants it: queued, or part of a running
//! request. However many readers wait for it, it is pending once. Each [`Priority`] has requests of its
//! own, so a blocked read never waits for a prefetch to end; one that wants a frame deep inside a
//! running prefetch takes the frame out of it.
//!
//! One lock for the node: it is held for map operations only, and each of them belongs to a network
//! request.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use format_spec::{Frame, index::FRAME_COMPRESSED_LEN_MAX};
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    cache::CacheOptions,
    error::ReadError,
    frame_store::lock,
    layer::{Activity, LayerInner, Priority},
    transfer::{self, Request},
    wait::Wait,
};

/// Longest range of one request, unless a single frame is longer; in compressed bytes. Long enough that the
/// round trip does not show, short enough that several requests share a link fairly.
const REQUEST_LEN_MAX: u64 = 4 << 20;
/// A read takes a frame out of a running prefetch when more bytes than this come before it.
pub(crate) const WAIT_LEN_MAX: u64 = 512 << 10;
/// Times a frame is asked for again when the bytes were wrong or did not come.
const RETRIES_MAX: u32 = 2;
const PRIORITY_COUNT: usize = 3;

/// The pending frames of all layers of a cache.
#[derive(Debug)]
pub(crate) struct Scheduler {
    runtime: Handle,
    requests_max: [usize; PRIORITY_COUNT],
    decoders: [Arc<Semaphore>; PRIORITY_COUNT],
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pending: HashMap<FrameKey, Pending>,
    /// Frames in the order they were wanted. An entry whose frame is no longer queued in this class is stale.
    queues: [VecDeque<Queued>; PRIORITY_COUNT],
    running: HashMap<u64, Running>,
    running_count: [usize; PRIORITY_COUNT],
    next_request: u64,
    is_dispatching: bool,
    /// When something was last wanted, or came, that is more urgent than the rest.
    last_urgent: Option<Instant>,
}

/// Number of a layer and number of a frame.
type FrameKey = (u64, u32);

#[derive(Debug)]
struct Queued {
    layer: Arc<LayerInner>,
    frame: u32,
}

#[derive(Debug)]
struct Pending {
    priority: Priority,
    waits: Vec<Arc<Wait>>,
    retry_count: u32,
    /// The running request that brings it; `None` while it is queued.
    request: Option<u64>,
}

#[derive(Debug)]
struct Running {
    priority: Priority,
    received_until: Arc<AtomicU64>,
}

/// A pending frame in the hands of a running request. Dropped, it fails.
#[derive(Debug)]
pub(crate) struct InFlight {
    scheduler: Arc<Scheduler>,
    pub(crate) layer: Arc<LayerInner>,
    pub(crate) frame: u32,
    request: u64,
    is_settled: bool,
}

impl Scheduler {
    /// A scheduler that makes its requests on `runtime`.
    pub(crate) fn new(runtime: Handle, options: &CacheOptions) -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            runtime,
            requests_max: [options.read_requests_max, options.hot_requests_max, options.background_requests_max]
                .map(|count| count.max(1)),
            decoders: [2 * processors, processors, processors].map(|count| Arc::new(Semaphore::new(count))),
            state: Mutex::default(),
        })
    }

    /// Wants frames of a layer; `wait` waits for those that are not there.
    pub(crate) fn want(
        self: &Arc<Self>,
        layer: &Arc<LayerInner>,
        frames: impl IntoIterator<Item = u32>,
        priority: Priority,
        wait: Option<&Arc<Wait>>,
    ) {
        let mut state = lock(&self.state);
        if layer.is_removed() {
            drop(state);
            wait.inspect(|wait| wait.fail(ReadError::Stopped(layer.blob())));
            return;
        }
        for frame in frames {
            state.want(layer, frame, priority, wait);
        }
        drop(state);
        self.dispatch();
    }

    /// Ends the waits for frames of a removed layer that no request brings yet; running requests notice themselves.
    pub(crate) fn forget(&self, layer: &LayerInner) {
        let mut state = lock(&self.state);
        let is_forgotten = |key: &FrameKey, pending: &mut Pending| key.0 == layer.number && pending.request.is_none();
        let forgotten: Vec<_> = state.pending.extract_if(|key, pending| is_forgotten(key, pending)).collect();
        drop(state);
        for wait in forgotten.iter().flat_map(|(_, pending)| &pending.waits) {
            wait.fail(ReadError::Stopped(layer.blob()));
        }
    }

    /// What is wanted of a layer at this moment.
    pub(crate) fn activity(&self, layer: &LayerInner) -> Activity {
        let state = lock(&self.state);
        let mut activity = Activity::default();
        for ((_, frame), pending) in state.pending.iter().filter(|((number, _), _)| *number == layer.number) {
            activity.frames_wanted += 1;
            activity.frames_under_way += u64::from(pending.request.is_some());
            if !pending.waits.is_empty() {
                activity.frames_awaited.push(*frame);
            }
        }
        activity.frames_awaited.sort_unstable();
        activity
    }

    /// Whether nothing more urgent than the rest is under way, or was later than `since`.
    pub(crate) fn is_quiet_since(&self, since: Instant) -> bool {
        let state = lock(&self.state);
        let is_under_way = state.pending.values().any(|pending| pending.priority < Priority::Background);
        !is_under_way && state.last_urgent.is_none_or(|last| last <= since)
    }

    /// Something more urgent than the rest has come, or has been begun, in another way than by frames.
    pub(crate) fn note_urgent(&self) {
        lock(&self.state).note_urgent(Priority::HotPack);
    }

    /// Permits to decode frames of a class: bounds the memory for them.
    pub(crate) fn decoders(&self, priority: Priority) -> Arc<Semaphore> {
        self.decoders[priority as usize].clone()
    }

    /// The runtime that requests run on.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Starts requests as long as there are queued frames and free places.
    pub(crate) fn dispatch(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        // A runtime that is shutting down drops a request inside `spawn`, and its end comes back here: the loop
        // below sees to it, instead of a recursion.
        if state.is_dispatching {
            return;
        }
        state.is_dispatching = true;
        while let Some(request) = self.next_request(&mut state) {
            drop(state);
            self.runtime.spawn(transfer::run(request));
            state = lock(&self.state);
        }
        state.is_dispatching = false;
    }

    fn next_request(self: &Arc<Self>, state: &mut State) -> Option<Request> {
        for priority in [Priority::Read, Priority::HotPack, Priority::Background] {
            let class = priority as usize;
            while state.running_count[class] < self.requests_max[class] {
                let Some(Queued { layer, frame }) = state.queues[class].pop_front() else { break };
                let number = state.next_request;
                let frames = state.start_neighbours(&layer, frame, priority, number);
                let Some(first) = frames.first() else { continue };
                let received_until = Arc::new(AtomicU64::new(first.blob_offset.get()));
                state.next_request += 1;
                state.running_count[class] += 1;
                state.running.insert(number, Running { priority, received_until: received_until.clone() });
                let in_flight = (frame..)
                    .zip(frames)
                    .map(|(frame, record)| {
                        let (scheduler, layer) = (self.clone(), layer.clone());
                        (InFlight { scheduler, layer, frame, request: number, is_settled: false }, record)
                    })
                    .collect();
                return Some(Request {
                    scheduler: self.clone(),
                    layer,
                    priority,
                    number,
                    frames: in_flight,
                    received_until,
                });
            }
        }
        None
    }

    /// A request has ended.
    pub(crate) fn end_request(self: &Arc<Self>, number: u64) {
        let mut state = lock(&self.state);
        if let Some(running) = state.running.remove(&number) {
            state.running_count[running.priority as usize] -= 1;
            state.note_urgent(running.priority);
        }
        drop(state);
        self.dispatch();
    }

    /// Queues frames again that a request did not bring.
    ///
    /// With an `error` this counts as a failure, and frames that failed too often end with it.
    pub(crate) fn requeue(
        self: &Arc<Self>,
        frames: impl DoubleEndedIterator<Item = InFlight>,
        error: Option<&ReadError>,
    ) {
        let (mut has_failed, mut failed_waits) = (false, Vec::new());
        let mut state = lock(&self.state);
        // The queue is filled at its front, last frame first: these have waited longest.
        for mut in_flight in frames.rev() {
            in_flight.is_settled = true;
            let Some(pending) = state.pending_in(&in_flight) else { continue };
            pending.retry_count += u32::from(error.is_some());
            if pending.retry_count > RETRIES_MAX {
                has_failed = true;
                failed_waits.extend(state.settle(&in_flight));
                continue;
            }
            pending.request = None;
            let class = pending.priority as usize;
            state.queues[class].push_front(Queued { layer: in_flight.layer.clone(), frame: in_flight.frame });
        }
        drop(state);
        if has_failed && let Some(error) = error {
            self.fail_waits(failed_waits, error.clone());
        }
        self.dispatch();
    }

    /// These frames will not come: everybody who waits gets the error.
    ///
    /// All of them at once, so that a read that comes when the error is known asks the source anew.
    pub(crate) fn fail(&self, frames: impl IntoIterator<Item = InFlight>, error: ReadError) {
        let mut waits = Vec::new();
        let mut state = lock(&self.state);
        for mut in_flight in frames {
            in_flight.is_settled = true;
            waits.extend(state.settle(&in_flight));
        }
        drop(state);
        self.fail_waits(waits, error);
    }

    fn fail_waits(&self, waits: Vec<Arc<Wait>>, error: ReadError) {
        match &error {
            ReadError::Corrupt { blob, frame, expected, found } => {
                tracing::error!(%blob, frame, %expected, %found, "frame refused: wrong digest");
            }
            ReadError::Undecodable { blob, frame, reason, .. } => {
                tracing::error!(%blob, frame, reason, "frame refused: wrong content");
            }
            error => tracing::warn!(%error, wait_count = waits.len(), "frames not fetched"),
        }
        // This may be the reactor, where callers' code must not run.
        self.runtime.spawn_blocking(move || waits.iter().for_each(|wait| wait.fail(error.clone())));
    }
}

impl State {
    fn want(&mut self, layer: &Arc<LayerInner>, frame: u32, priority: Priority, wait: Option<&Arc<Wait>>) {
        let key = (layer.number, frame);
        // A frame stops being pending after it became present: asked in this order, it is never missed.
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.waits.extend(wait.cloned());
            wait.inspect(|wait| wait.add_part());
            if priority >= pending.priority {
                return;
            }
            pending.priority = priority;
            if let Some(request) = pending.request {
                // A request that runs no longer has received it: it is being decoded.
                let running = self.running.get(&request).filter(|_| priority == Priority::Read);
                if !running.is_some_and(|running| running.is_far_from(layer, frame)) {
                    return;
                }
                pending.request = None;
            }
        } else if layer.store.has_frame(frame) {
            return;
        } else {
            wait.inspect(|wait| wait.add_part());
            let waits = wait.cloned().into_iter().collect();
            self.pending.insert(key, Pending { priority, waits, retry_count: 0, request: None });
        }
        self.note_urgent(priority);
        self.queues[priority as usize].push_back(Queued { layer: layer.clone(), frame });
    }

    fn note_urgent(&mut self, priority: Priority) {
        if priority < Priority::Background {
            self.last_urgent = Some(Instant::now());
        }
    }

    /// What is known of a frame, unless a read has taken it over.
    fn pending_in(&mut self, in_flight: &InFlight) -> Option<&mut Pending> {
        self.pending.get_mut(&in_flight.key()).filter(|pending| pending.request == Some(in_flight.request))
    }

    /// Ends that a frame is pending; returns who waits for it.
    fn settle(&mut self, in_flight: &InFlight) -> Vec<Arc<Wait>> {
        if self.pending_in(in_flight).is_none() {
            return Vec::new();
        }
        self.pending.remove(&in_flight.key()).map(|pending| pending.waits).unwrap_or_default()
    }

    /// Takes a queued frame and the queued ones right after it out of their queue, for one request.
    ///
    /// Empty if `first` is no longer queued in this class.
    fn start_neighbours(
        &mut self,
        layer: &Arc<LayerInner>,
        first: u32,
        priority: Priority,
        request: u64,
    ) -> Vec<Frame> {
        let mut frames: Vec<Frame> = Vec::new();
        let mut len = 0;
        for (number, record) in (first..).zip(layer.store.index().frames().iter().skip(first as usize)) {
            let pending = self.pending.get_mut(&(layer.number, number));
            let Some(pending) = pending.filter(|pending| pending.request.is_none() && pending.priority == priority)
            else {
                break;
            };
            len += u64::from(record.compressed_len.get().min(FRAME_COMPRESSED_LEN_MAX));
            if len > REQUEST_LEN_MAX && !frames.is_empty() {
                break;
            }
            pending.request = Some(request);
            frames.push(*record);
        }
        frames
    }
}

impl Running {
    fn is_far_from(&self, layer: &LayerInner, frame: u32) -> bool {
        let frame_start = layer.store.index().frames().get(frame as usize).map_or(0, |frame| frame.blob_offset.get());
        frame_start.saturating_sub(self.received_until.load(Ordering::Acquire)) > WAIT_LEN_MAX
    }
}

impl InFlight {
    fn key(&self) -> FrameKey {
        (self.layer.number, self.frame)
    }

    /// Whether its request still has to bring it: no read has taken it over.
    pub(crate) fn is_wanted(&self) -> bool {
        lock(&self.scheduler.state).pending_in(self).is_some()
    }

    /// It is in the cache, or `unkept` when the disk did not take it. Call it on a thread that may block.
    pub(crate) fn arrived(mut self, unkept: Option<&Bytes>) {
        self.is_settled = true;
        let waits = lock(&self.scheduler.state).settle(&self);
        waits.iter().for_each(|wait| wait.frame_arrived(self.frame, unkept.cloned()));
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let waits = lock(&self.scheduler.state).settle(self);
        let error = ReadError::Stopped(self.layer.blob());
        self.scheduler.runtime.spawn_blocking(move || waits.iter().for_each(|wait| wait.fail(error.clone())));
    }
}
