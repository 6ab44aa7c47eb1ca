//! What nobody has asked for: fetched when nobody asks for anything else, so that no layer stays incomplete.
//!
//! One step at a time for the whole cache, layer by layer in the order they were opened, at a bounded rate. It begins
//! when start-ups are over: when no reader has waited for a while, and no hot pack is on its way. A reader who comes
//! during a step has requests of its own, and shares the link with what is left of one step.

use std::{
    collections::HashMap,
    num::NonZeroU64,
    ops::Range,
    sync::Weak,
    time::{Duration, Instant},
};

use super::CacheInner;
use crate::{
    layer::{Layer, Priority},
    scheduler::Scheduler,
};

/// Nobody has to have waited for this long: pauses of a start-up are shorter.
const QUIET: Duration = Duration::from_secs(1);
/// A container that reads something new again and again is taken to have started after this time.
const START_UP_MAX: Duration = Duration::from_secs(30);
/// How often it is looked whether there is something to do.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Plain bytes of a step: a request or two.
const STEP_LEN: u64 = 8 << 20;
/// A layer of which a step failed is left alone for this long; what a reader wants of it is asked for all the same.
const FAILURE_PAUSE: Duration = Duration::from_secs(60);

/// What is remembered of a layer that has not arrived completely.
struct Incomplete {
    since: Instant,
    not_before: Instant,
}

/// Fetches what is missing of every open layer, until the cache is gone.
pub(super) async fn fetch_rest(cache: Weak<CacheInner>, bytes_per_second: NonZeroU64) {
    // By the number of the layer, which grows in the order of opening.
    let mut incomplete: HashMap<u64, Incomplete> = HashMap::new();
    loop {
        let Some(inner) = cache.upgrade() else { return };
        let step = next_step(inner.open_layers(), &inner.scheduler, &mut incomplete);
        drop(inner);
        let Some((layer, missing)) = step else {
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        };
        let (started, before) = (Instant::now(), layer.progress().fetched_bytes);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let range = missing.start..missing.start.saturating_add(STEP_LEN);
        layer.fetch(range, Priority::Background, move |arrived| drop(sender.send(arrived)));
        let has_arrived = matches!(receiver.await, Ok(Ok(()))) && layer.inner().store.has(&missing);
        if !has_arrived && let Some(layer) = incomplete.get_mut(&layer.inner().number) {
            layer.not_before = Instant::now() + FAILURE_PAUSE;
        }
        let fetched = layer.progress().fetched_bytes.saturating_sub(before);
        drop(layer);
        tokio::time::sleep(step_time(fetched, bytes_per_second).saturating_sub(started.elapsed())).await;
    }
}

/// How long fetching so many bytes takes at a rate.
fn step_time(bytes: u64, bytes_per_second: NonZeroU64) -> Duration {
    Duration::from_millis(bytes.saturating_mul(1000) / bytes_per_second)
}

/// What to fetch now: the first content that is missing of the layer that was opened first.
fn next_step(
    mut open: Vec<Layer>,
    scheduler: &Scheduler,
    incomplete: &mut HashMap<u64, Incomplete>,
) -> Option<(Layer, Range<u64>)> {
    let now = Instant::now();
    let is_new = |layer: &Layer| !incomplete.contains_key(&layer.inner().number);
    open.retain(|layer| !(layer.is_complete() && is_new(layer)));
    let (complete, mut open): (Vec<_>, Vec<_>) = open.into_iter().partition(Layer::is_complete);
    for layer in complete {
        tracing::info!(blob = %layer.lazy_layer().blob, description = %layer.description(), "layer is complete");
    }
    incomplete.retain(|number, _| open.iter().any(|layer| layer.inner().number == *number));
    for layer in &open {
        incomplete.entry(layer.inner().number).or_insert(Incomplete { since: now, not_before: now });
    }
    if open.iter().any(|layer| layer.inner().is_starting_up()) {
        return None;
    }
    open.sort_unstable_by_key(|layer| layer.inner().number);
    open.into_iter().find_map(|layer| {
        let known = incomplete.get(&layer.inner().number)?;
        let quiet = if now.duration_since(known.since) < START_UP_MAX { QUIET } else { Duration::ZERO };
        let may_begin = now >= known.not_before
            && !layer.inner().store.is_disk_refusing()
            && scheduler.is_quiet_since(now.checked_sub(quiet)?);
        let missing = if may_begin { layer.inner().first_missing() } else { None };
        missing.map(|missing| (layer, missing))
    })
}
