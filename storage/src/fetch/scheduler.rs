//! Carries out what the state machine of `scheduler/` decides: locks it, tells it the time, starts and ends requests,
//! fails waits.
//!
//! One lock for the node: it is held for map operations only, and each of them belongs to a network request. Nothing of
//! a caller runs under it, and no last handle of a layer is dropped there, which could write to the disk.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use format_spec::Digest;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, oneshot},
};

use crate::{
    error::ReadError,
    fetch::{
        decode::{SharedWorkspaces, Workspaces},
        places::{Place, Places},
        wait::{Wait, WaitingRead},
    },
    layer_core::LayerCore,
    sync::{Mutex, lock},
};

mod health;
mod looks;
mod machine;
mod options;
mod rotation;
mod slot;
mod standing;
#[cfg(test)]
mod tests;
mod turns;
mod watch;

use machine::{Effect, Machine, Waiter};

pub use machine::Activity;
pub(crate) use machine::{Fetch, Outcome, StreamKind};
pub use options::{Priority, RequestLimits, RequestOptions};
pub(crate) use slot::Slot;

/// How often it is looked what time has changed, as long as anything is wanted.
const TICK: Duration = Duration::from_millis(100);
/// A layer's failing reads are told in the log once in this time.
const LOG_PAUSE: Duration = Duration::from_secs(10);

/// Begins a request for frames, and does not wait for it.
pub(crate) type StartRequest = fn(&Arc<Scheduler>, Arc<LayerCore>, Arc<Place>, Fetch);

/// The pending frames of all layers of a cache.
#[derive(Debug)]
pub(crate) struct Scheduler {
    runtime: Handle,
    patience: Option<Duration>,
    start_request: StartRequest,
    decoders: [Arc<Semaphore>; 3],
    workspaces: SharedWorkspaces,
    state: Mutex<State>,
    /// Wakes [`watch`].
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    machine: Machine<Arc<Wait>>,
    layers: HashMap<u64, Known>,
    /// Waiters for a slot, by ticket: of which layer.
    streams: HashMap<u64, (u64, oneshot::Sender<Slot>)>,
    is_dispatching: bool,
}

/// Knowledge of a layer that is open or being opened.
#[derive(Debug)]
struct Known {
    places: Arc<Places>,
    layer: Weak<LayerCore>,
    /// When its failures were told last, and how many were not since.
    told: Option<(Instant, u64)>,
    /// The same of failures that its readers do not see but as a pause.
    told_waiting: Option<(Instant, u64)>,
}

/// A received frame. Dropped, it fails.
#[derive(Debug)]
pub(crate) struct InFlight {
    scheduler: Arc<Scheduler>,
    pub(crate) layer: Arc<LayerCore>,
    pub(crate) frame: u32,
    request: u64,
    is_settled: bool,
}

impl Waiter for Arc<Wait> {
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self, other)
    }

    fn is_over(&self) -> bool {
        Wait::is_over(self)
    }

    fn read(&self) -> Option<WaitingRead> {
        Wait::read(self)
    }
}

impl Scheduler {
    /// A scheduler whose requests `start` begins on `runtime`. A reader waits as long as `patience`, `None` leaves that to
    /// the source.
    pub(crate) fn new(
        runtime: Handle,
        options: RequestOptions,
        patience: Option<Duration>,
        start: StartRequest,
    ) -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let changed = Arc::new(Notify::new());
        let state = State {
            machine: Machine::new(options, patience),
            layers: HashMap::new(),
            streams: HashMap::new(),
            is_dispatching: false,
        };
        let scheduler = Arc::new(Self {
            runtime,
            patience,
            start_request: start,
            decoders: [2 * processors, processors, processors].map(|count| Arc::new(Semaphore::new(count))),
            workspaces: SharedWorkspaces::default(),
            state: Mutex::new(state),
            changed: changed.clone(),
        });
        scheduler.runtime.spawn(watch(Arc::downgrade(&scheduler), changed));
        scheduler
    }

    /// How long a reader waits; `None` leaves that to the source.
    pub(crate) fn patience(&self) -> Option<Duration> {
        self.patience
    }

    /// A layer is going to be opened; frames can be wanted of it after [`Self::set_layer`].
    pub(crate) fn add_layer(&self, number: u64, blob: Digest, places: &Arc<Places>) {
        let known = Known { places: places.clone(), layer: Weak::new(), told: None, told_waiting: None };
        let mut state = lock(&self.state);
        state.layers.insert(number, known);
        // Nothing is wanted of it yet, so there is nothing to do.
        state.machine.set_places(number, blob, places.to_refs(), Instant::now());
    }

    /// The layer is open.
    pub(crate) fn set_layer(&self, layer: &Arc<LayerCore>) {
        if let Some(known) = lock(&self.state).layers.get_mut(&layer.number) {
            known.layer = Arc::downgrade(layer);
        }
    }

    /// A layer that is open, or being opened, has other places than before.
    pub(crate) fn places_changed(self: &Arc<Self>, number: u64, blob: Digest) {
        let mut state = lock(&self.state);
        if let Some(known) = state.layers.get(&number) {
            let places = known.places.to_refs();
            state.machine.set_places(number, blob, places, Instant::now());
        }
        drop(state);
        self.dispatch();
    }

    /// Wants frames of a layer; `wait` waits for those that are not there.
    pub(crate) fn want(
        self: &Arc<Self>,
        layer: &Arc<LayerCore>,
        frames: impl IntoIterator<Item = u32>,
        priority: Priority,
        wait: Option<&Arc<Wait>>,
    ) {
        let records = layer.store.index().frames();
        let frames = frames.into_iter().filter_map(|frame| Some((frame, records.get(frame as usize)?.blob_range())));
        let mut state = lock(&self.state);
        if layer.is_removed() {
            drop(state);
            wait.inspect(|wait| wait.fail(ReadError::Stopped(layer.blob())));
            return;
        }
        let is_present = |frame| layer.store.has_frame(frame);
        let parts = state.machine.want(layer.number, frames, priority, wait, is_present, Instant::now());
        // Under the lock: no frame arrives before it is counted.
        wait.inspect(|wait| (0..parts).for_each(|_| wait.add_part()));
        drop(state);
        self.dispatch();
    }

    /// Lets `wait`, which waits for something of a layer, fail at `deadline`.
    pub(crate) fn wait_until(&self, deadline: Instant, layer: u64, wait: &Arc<Wait>) {
        lock(&self.state).machine.wait_until(deadline, layer, wait.clone());
        self.changed.notify_one();
    }

    /// Waits for a slot for a request of the caller's own; `None` when the layer is no longer fetched.
    pub(crate) async fn slot(self: &Arc<Self>, layer: u64, kind: StreamKind) -> Option<Slot> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            let ticket = state.machine.want_stream(layer, kind, Instant::now())?;
            state.streams.insert(ticket, (layer, sender));
        }
        self.dispatch();
        receiver.await.ok()
    }

    /// Ends what waits for a layer that is gone; what is being decoded arrives.
    pub(crate) fn forget(self: &Arc<Self>, layer: u64) {
        let mut state = lock(&self.state);
        let streams: Vec<_> = state.streams.extract_if(|_, (of, _)| *of == layer).collect();
        state.machine.forget(layer, Instant::now());
        let known = state.layers.remove(&layer);
        drop(state);
        drop((streams, known));
        self.dispatch();
    }

    /// Drops what only the fetching of the rest wants of these frames of a layer.
    pub(crate) fn drop_background(self: &Arc<Self>, layer: u64, frames: Range<u32>) {
        lock(&self.state).machine.drop_background(layer, &frames, Instant::now());
        self.dispatch();
    }

    /// Something more urgent than the rest has come, or has been begun, in another way than by frames.
    pub(crate) fn note_urgent(&self) {
        lock(&self.state).machine.note_urgent_now(Instant::now());
    }

    /// Permits to decode frames of a class: bounds the memory for them.
    pub(crate) fn decoders(&self, priority: Priority) -> Arc<Semaphore> {
        self.decoders[priority as usize].clone()
    }

    /// The workspaces in which frames are decoded.
    pub(crate) fn workspaces(&self) -> Arc<Workspaces> {
        self.workspaces.get()
    }

    /// The runtime that requests run on.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Whether a request has still to bring a frame.
    pub(crate) fn is_wanted(&self, request: u64, layer: &LayerCore, frame: u32) -> bool {
        lock(&self.state).machine.is_wanted(request, layer.number, frame)
    }

    /// A request brings all of a layer: what is missing comes with it from now on.
    pub(crate) fn take_all(self: &Arc<Self>, request: u64, layer: &Arc<LayerCore>) {
        let frames = (0..).zip(layer.store.index().frames()).map(|(frame, record)| (frame, record.blob_range()));
        let is_present = |frame| layer.store.has_frame(frame);
        lock(&self.state).machine.take_all(request, frames, is_present, Instant::now());
        self.dispatch();
    }

    /// The bytes of a frame have come with a request; `None` if somebody else brings it by now.
    pub(crate) fn receive(self: &Arc<Self>, request: u64, layer: &Arc<LayerCore>, frame: u32) -> Option<InFlight> {
        let is_wanted = lock(&self.state).machine.receive(request, layer.number, frame, Instant::now());
        self.dispatch();
        let in_flight =
            || InFlight { scheduler: self.clone(), layer: layer.clone(), frame, request, is_settled: false };
        is_wanted.then(in_flight)
    }

    /// A stream has brought right bytes.
    pub(crate) fn stream_works(&self, request: u64) {
        lock(&self.state).machine.stream_works(request);
    }

    /// A request has ended.
    pub(crate) fn end(self: &Arc<Self>, request: u64, outcome: Outcome) {
        lock(&self.state).machine.end(request, outcome, Instant::now());
        self.dispatch();
    }

    /// Does what the machine wants done.
    fn dispatch(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        // A runtime that is shutting down drops a request inside `spawn`, and its end comes back here: the loop
        // below sees to it, instead of a recursion.
        if state.is_dispatching {
            return;
        }
        state.is_dispatching = true;
        while let Some(effect) = state.machine.next_effect() {
            match effect {
                Effect::Fetch(fetch) => {
                    let parts = state.layers.get(&fetch.layer).map(|known| known.parts(fetch.place));
                    drop(state);
                    self.start(fetch, parts.unwrap_or_default());
                }
                Effect::Grant { ticket, grant } => {
                    let stream = state.streams.remove(&ticket);
                    let place = stream.as_ref().and_then(|(layer, _)| state.layers.get(layer)?.places.get(grant.place));
                    drop(state);
                    match (stream, place) {
                        // A slot that nobody takes ends when it is dropped.
                        (Some((_, sender)), Some(place)) => drop(sender.send(Slot::new(self, place, grant))),
                        _ => lock(&self.state).machine.end(grant.request, Outcome::Lost, Instant::now()),
                    }
                }
                Effect::Cancel(link) => {
                    drop(state);
                    link.cancel();
                }
                Effect::Fail { layer, place, waits, error } => {
                    let mut known = state.layers.get_mut(&layer).filter(|_| !waits.is_empty());
                    let untold = known.as_mut().and_then(|known| tell(&mut known.told, Instant::now()));
                    let place = known.and_then(|known| known.places.get(place?));
                    drop(state);
                    if let Some(untold) = untold {
                        log_failure(&error, place.as_deref(), waits.len(), untold);
                    }
                    self.fail(waits, error);
                }
                Effect::Tell { layer, place, error } => {
                    let mut known = state.layers.get_mut(&layer);
                    let untold = known.as_mut().and_then(|known| tell(&mut known.told_waiting, Instant::now()));
                    let place = known.and_then(|known| known.places.get(place));
                    drop(state);
                    if let Some(untold) = untold {
                        let place = place.map(|place| place.description.to_string()).unwrap_or_default();
                        tracing::warn!(%error, place, untold, "request failed, reads wait");
                    }
                }
            }
            state = lock(&self.state);
        }
        state.is_dispatching = false;
        let is_idle = state.machine.is_idle();
        drop(state);
        if !is_idle {
            self.changed.notify_one();
        }
    }

    fn start(self: &Arc<Self>, fetch: Fetch, parts: (Option<Arc<LayerCore>>, Option<Arc<Place>>)) {
        let number = fetch.request;
        match parts {
            (Some(layer), Some(place)) => (self.start_request)(self, layer, place, fetch),
            _ => lock(&self.state).machine.end(number, Outcome::Lost, Instant::now()),
        }
    }

    fn fail(&self, waits: Vec<Arc<Wait>>, error: ReadError) {
        if waits.is_empty() {
            return;
        }
        // This may be the reactor, where callers' code must not run. A runtime that has ended drops it.
        let failing = Failing { waits, error };
        self.runtime.spawn_blocking(move || drop(failing));
    }
}

/// Fails waits when it is dropped.
struct Failing {
    waits: Vec<Arc<Wait>>,
    error: ReadError,
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.waits.iter().for_each(|wait| wait.fail(self.error.clone()));
    }
}

impl Known {
    /// The layer, and the place with a number.
    fn parts(&self, place: u64) -> (Option<Arc<LayerCore>>, Option<Arc<Place>>) {
        (self.layer.upgrade(), self.places.get(place))
    }
}

/// Whether a failure is told in the log now, after `told`; then how many were not.
fn tell(told: &mut Option<(Instant, u64)>, now: Instant) -> Option<u64> {
    match told {
        Some((at, untold)) if now.duration_since(*at) < LOG_PAUSE => {
            *untold += 1;
            None
        }
        told => told.replace((now, 0)).map(|(_, untold)| untold).or(Some(0)),
    }
}

fn log_failure(error: &ReadError, place: Option<&Place>, reads: usize, untold: u64) {
    let place = place.map(|place| place.description.to_string()).unwrap_or_default();
    match error {
        ReadError::Corrupt { blob, frame, expected, found } => {
            tracing::error!(%blob, frame, %expected, %found, place, untold, "frame refused: wrong digest");
        }
        ReadError::Undecodable { blob, frame, reason, .. } => {
            tracing::error!(%blob, frame, reason, place, untold, "frame refused: wrong content");
        }
        ReadError::Stopped(_) => {}
        error => tracing::warn!(%error, place, reads, untold, "reads fail"),
    }
}

/// Tells the machine the time, as long as the scheduler is there.
async fn watch(scheduler: Weak<Scheduler>, changed: Arc<Notify>) {
    loop {
        let is_idle = {
            let Some(scheduler) = scheduler.upgrade() else { return };
            let is_idle = {
                let machine = &mut lock(&scheduler.state).machine;
                machine.tick(Instant::now());
                machine.is_idle()
            };
            scheduler.dispatch();
            is_idle
        };
        match is_idle {
            true => changed.notified().await,
            false => tokio::time::sleep(TICK).await,
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.changed.notify_one();
    }
}

impl InFlight {
    /// It is in the cache, or `unkept` when the disk did not take it. Call it on a thread that may block.
    pub(crate) fn arrived(mut self, unkept: Option<&Bytes>) {
        self.is_settled = true;
        let waits =
            lock(&self.scheduler.state).machine.arrive(self.request, self.layer.number, self.frame, Instant::now());
        self.scheduler.dispatch();
        waits.iter().for_each(|wait| wait.frame_arrived(self.frame, unkept.cloned()));
    }

    /// Its digest is another one.
    pub(crate) fn refuse(mut self, error: ReadError) {
        self.is_settled = true;
        let (request, layer, frame) = (self.request, self.layer.number, self.frame);
        lock(&self.scheduler.state).machine.refuse(request, layer, frame, error, Instant::now());
        self.scheduler.dispatch();
    }

    /// It will not come, however often it is asked for.
    pub(crate) fn fail(mut self, error: ReadError) {
        self.settle(error);
    }

    fn settle(&mut self, error: ReadError) {
        self.is_settled = true;
        let (request, layer, frame) = (self.request, self.layer.number, self.frame);
        lock(&self.scheduler.state).machine.fail(request, layer, frame, error, Instant::now());
        self.scheduler.dispatch();
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.is_settled {
            self.settle(ReadError::Stopped(self.layer.blob()));
        }
    }
}
