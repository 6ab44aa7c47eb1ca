//! What nobody has asked for: fetched when nobody asks for anything else, so that no layer stays incomplete.
//!
//! One step at a time for each source, a few for the whole cache, at a bounded rate: of the source that has had the
//! least time, and there of the layer that was opened first among those that do not fail. A source that is slow, or
//! does not answer, holds up its own layers only. It begins when start-ups are over: when no reader has waited for a
//! while, and no hot pack is on its way. A reader who comes during a step has requests of its own, and a step waits a
//! moment while they are under way.
//!
//! A layer of which readers want much at once that nobody expected is *pressed*: a program that reads all of its image, an
//! index or weights. Frames that come one by one, each after a round trip, would take longer than all of it in a row. So
//! the rest of it comes at once, from where readers are, at any rate: between their requests the link is never idle.

use std::{
    collections::HashMap,
    num::NonZeroU64,
    ops::Range,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use format_spec::limits::FRAME_PLAIN_LEN_MAX;
use tokio::{runtime::Handle, task::JoinSet};

use super::{
    CacheInner,
    quiet::Quiet,
    shares::{Shares, SourceName},
};
use crate::{fetch::scheduler::Priority, layer::Layer};

/// Plain bytes of a step: a request or two.
const STEP_LEN: u64 = 8 << 20;
/// Steps at the same time: one of each source, so that some may hang.
const STEPS_MAX: usize = 4;
/// Those of a pressed layer: the link is busy while a step is decoded.
const PRESSED_STEPS_MAX: usize = 2;
/// A layer is pressed when readers have made more than this part of its blob come, within these bounds: less is what a
/// start reads beside the hot pack.
const PRESSED_PART: u64 = 8;
const PRESSED_LEN: Range<u64> = 16 << 20..32 << 20;
/// The pause after a failed step grows to this many times its first length.
const FAILURE_PAUSE_FACTOR_MAX: u32 = 64;

/// When the rest of layers is fetched, and how fast.
#[derive(Debug, Clone)]
pub struct RestOptions {
    /// Its rate.
    pub bytes_per_second: NonZeroU64,
    /// Nobody has to have waited for this long: pauses of a start-up are shorter.
    pub quiet: Duration,
    /// A container that reads something new again and again is taken to have started after this time; and nobody, who
    /// may be waiting for a registry that does not answer, holds up a step for longer.
    pub start_up_max: Duration,
    /// A step that takes longer has failed: other layers may come from a place that answers.
    pub step_max: Duration,
    /// A layer of which a step failed is left alone for this long, then twice as long each time, up to an hour by
    /// default; what a reader wants of it is asked for all the same.
    pub failure_pause: Duration,
}

impl RestOptions {
    /// The usual times, at a rate.
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            quiet: Duration::from_secs(1),
            start_up_max: Duration::from_secs(30),
            step_max: Duration::from_secs(20),
            failure_pause: Duration::from_secs(60),
        }
    }

    /// How often it is looked whether there is something to do.
    fn look_interval(&self) -> Duration {
        self.quiet / 4
    }
}

// A step brings what it begins with.
const _: () = assert!(STEP_LEN >= FRAME_PLAIN_LEN_MAX as u64);

/// What is remembered of the layers, between two steps.
struct Plan {
    options: RestOptions,
    /// By the number of the layer.
    incomplete: HashMap<u64, Incomplete>,
    /// The steps that run.
    busy: Vec<Busy>,
    shares: Shares,
    /// No step begins before: the rate.
    not_before: Instant,
    quiet: Quiet,
}

/// A step that runs.
struct Busy {
    /// That of the layer.
    number: u64,
    source: SourceName,
    missing: Range<u64>,
    /// Its bytes do not count for the rate.
    is_pressed: bool,
}

impl Busy {
    fn end(&self) -> u64 {
        self.missing.start.saturating_add(STEP_LEN)
    }
}

/// A layer that has not arrived completely.
struct Incomplete {
    since: Instant,
    /// Content before this was tried.
    from: u64,
    failure_count: u32,
    not_before: Instant,
}

/// What to fetch next.
struct Step {
    layer: Layer,
    /// What must be there afterwards.
    missing: Range<u64>,
}

/// How a step went.
struct EndedStep {
    number: u64,
    started: Instant,
    has_arrived: bool,
    fetched: u64,
    missing: Range<u64>,
}

/// Fetches what is missing of every open layer, until the cache is gone.
pub(super) async fn fetch_rest(cache: Weak<CacheInner>, runtime: Handle, options: RestOptions) {
    let mut plan = Plan::new(options.clone(), Instant::now());
    let mut steps = JoinSet::new();
    loop {
        // The last handle of the cache or of a layer may be ours: it must go where blocking is allowed.
        let Some(inner) = cache.upgrade() else { return };
        let chosen = runtime.spawn_blocking(move || {
            let step = plan.next_step(&inner, Instant::now());
            (plan, step)
        });
        let Ok((chosen_plan, step)) = chosen.await else { return };
        plan = chosen_plan;
        if let Some(step) = step {
            steps.spawn(take(step, runtime.clone(), options.step_max));
            continue;
        }
        tokio::select! {
            Some(ended) = steps.join_next() => {
                let Ok(Some(ended)) = ended else { return };
                plan.note_step(ended, Instant::now());
            }
            () = tokio::time::sleep(options.look_interval()) => {}
        }
    }
}

/// Fetches a step. One that takes too long is given up, and its requests with it.
async fn take(Step { layer, missing }: Step, runtime: Handle, step_max: Duration) -> Option<EndedStep> {
    let (started, number, before) = (Instant::now(), layer.core().number, layer.core().fetched_bytes());
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let range = missing.start..missing.start.saturating_add(STEP_LEN);
    let dropped = range.clone();
    layer.fetch(range, Priority::Background, move |arrived| drop(sender.send(arrived)));
    let is_answered = tokio::time::timeout(step_max, receiver).await.is_ok();
    if !is_answered {
        let frames: Vec<u32> = layer.core().store.missing_frames(&dropped).collect();
        if let (Some(first), Some(last)) = (frames.iter().min(), frames.iter().max()) {
            layer.inner().scheduler.drop_background(number, *first..last.saturating_add(1));
        }
    }
    let ended = runtime.spawn_blocking(move || {
        // The content that came counts, not the answer: a full disk is no error there.
        let has_arrived = is_answered && layer.core().store.has(&missing);
        let fetched = layer.core().fetched_bytes().saturating_sub(before);
        drop(layer);
        EndedStep { number, started, has_arrived, fetched, missing }
    });
    ended.await.ok()
}

/// Whether readers want much at once of a layer that nobody expected.
fn is_pressed(layer: &Layer, now: Instant) -> bool {
    let len = layer.lazy_layer().index.offset / PRESSED_PART;
    layer.core().demanded_lately(now) > len.clamp(PRESSED_LEN.start, PRESSED_LEN.end)
}

/// The first content from a plain offset on that is not there and that no step brings.
fn first_free(layer: &Layer, mut from: u64, busy: &[Busy]) -> Option<Range<u64>> {
    let of_layer = || busy.iter().filter(|busy| busy.number == layer.core().number);
    loop {
        let mut missing = layer.core().first_missing(from)?;
        // A run that a step ends inside of begins before it: without this it would be found again for ever.
        missing.start = missing.start.max(from);
        let step = of_layer().find(|busy| (busy.missing.start..busy.end()).contains(&missing.start));
        match step {
            Some(busy) => from = busy.end(),
            None => return Some(missing),
        }
    }
}

/// How long fetching so many bytes takes at a rate.
fn step_time(bytes: u64, bytes_per_second: NonZeroU64) -> Duration {
    Duration::from_millis(bytes.saturating_mul(1000) / bytes_per_second)
}

impl Plan {
    fn new(options: RestOptions, now: Instant) -> Self {
        let (incomplete, busy) = (HashMap::new(), Vec::new());
        let quiet = Quiet::new(options.start_up_max);
        Self { options, incomplete, busy, shares: Shares::default(), not_before: now, quiet }
    }

    /// What to fetch now, if now is the time.
    fn next_step(&mut self, cache: &Arc<CacheInner>, now: Instant) -> Option<Step> {
        if self.busy.len() >= STEPS_MAX {
            return None;
        }
        let mut open = cache.open_layers();
        self.note_complete(&open);
        open.retain(|layer| !layer.is_complete());
        for layer in &open {
            let new = Incomplete { since: now, from: 0, failure_count: 0, not_before: now };
            self.incomplete.entry(layer.core().number).or_insert(new);
        }
        self.incomplete.retain(|number, _| open.iter().any(|layer| layer.core().number == *number));
        let is_starting_up = open.iter().any(|layer| layer.inner().is_warming_up());
        let sources: HashMap<u64, SourceName> =
            self.incomplete.keys().map(|number| (*number, cache.scheduler.source_of(*number))).collect();
        let source_of = |layer: &Layer| sources.get(&layer.core().number).cloned().flatten();
        self.shares.retain(|wanted| sources.values().any(|source| source == wanted));
        // Of a source those that fail last, so that they keep no other waiting.
        open.sort_by_key(|layer| {
            let number = layer.core().number;
            let failure_count = self.incomplete.get(&number).map(|known| known.failure_count);
            (self.shares.time_of(&source_of(layer)), failure_count, number)
        });
        open.into_iter().find_map(|layer| {
            let number = layer.core().number;
            let known = self.incomplete.get_mut(&number)?;
            let has_started = now.duration_since(known.since) >= self.options.start_up_max;
            let quiet = if has_started { Duration::ZERO } else { self.options.quiet };
            let is_pressed = !is_starting_up && known.failure_count == 0 && is_pressed(&layer, now);
            let source = source_of(&layer);
            let steps = self.busy.iter().filter(|busy| busy.source == source);
            let steps_max = if is_pressed { PRESSED_STEPS_MAX } else { 1 };
            if now < known.not_before || steps.count() >= steps_max {
                return None;
            }
            if !is_pressed {
                let is_quiet = !is_starting_up && cache.scheduler.is_quiet_since(now.checked_sub(quiet)?);
                if now < self.not_before || !self.quiet.is_time(is_quiet, now) {
                    return None;
                }
            }
            let from = if is_pressed { layer.core().read_end() } else { known.from };
            let missing = first_free(&layer, from, &self.busy);
            let missing = missing.or_else(|| if is_pressed { first_free(&layer, 0, &self.busy) } else { None });
            if missing.is_none() {
                // What failed is tried again from the beginning.
                known.from = 0;
            }
            let missing = missing?;
            self.shares.begin(&source);
            self.busy.push(Busy { number, source, missing: missing.clone(), is_pressed });
            Some(Step { layer, missing })
        })
    }

    /// Tells of each layer once that it has become complete.
    fn note_complete(&mut self, open: &[Layer]) {
        for layer in open.iter().filter(|layer| layer.is_complete()) {
            if self.incomplete.remove(&layer.core().number).is_some() {
                tracing::info!(blob = %layer.lazy_layer().blob, description = %layer.description(), "layer is complete");
            }
        }
    }

    fn note_step(&mut self, step: EndedStep, now: Instant) {
        let is_it = |busy: &Busy| busy.number == step.number && busy.missing == step.missing;
        let ended = self.busy.iter().position(is_it).map(|place| self.busy.swap_remove(place));
        if let Some(busy) = &ended {
            self.shares.end(&busy.source, now.duration_since(step.started));
        }
        if !ended.is_some_and(|busy| busy.is_pressed) {
            let time = step_time(step.fetched, self.options.bytes_per_second);
            self.not_before = self.not_before.max(step.started) + time;
        }
        let Some(known) = self.incomplete.get_mut(&step.number) else { return };
        if step.has_arrived {
            known.failure_count = 0;
            return;
        }
        known.from = step.missing.end;
        let factor = 1u32
            .checked_shl(known.failure_count)
            .map_or(FAILURE_PAUSE_FACTOR_MAX, |factor| factor.min(FAILURE_PAUSE_FACTOR_MAX));
        known.not_before = now + self.options.failure_pause * factor;
        known.failure_count += 1;
    }
}
