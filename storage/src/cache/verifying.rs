//! Layers that have arrived are verified, one of each source at a time, when nobody waits for anything.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Instant,
};

use tokio::{runtime::Handle, task::JoinSet};

use super::{CacheInner, RestOptions, quiet::Quiet, shares::SourceName};
use crate::{
    layer_core::LayerCore,
    verify::{Pace, UnderWay, verify},
};

/// The pause after a failed verification grows to this many times its first length.
const FAILURE_PAUSE_FACTOR_MAX: u32 = 64;

/// The state that is kept between two verifications; layers are known by their numbers.
struct Plan {
    options: RestOptions,
    /// Of the layers whose verification failed: how often, and until when they are left alone.
    failures: HashMap<u64, (u32, Instant)>,
    /// The sources of those that are under way: one that is slow holds up its own layers only.
    busy: HashMap<u64, SourceName>,
    quiet: Quiet,
}

/// Verifies every open layer that is complete, until the cache is gone.
pub(super) async fn verify_layers(cache: Weak<CacheInner>, runtime: Handle, options: RestOptions) {
    let (pace, look_interval) = (Arc::new(Pace::new(options.bytes_per_second)), options.quiet / 4);
    let quiet = Quiet::new(options.start_up_max);
    let mut plan = Plan { options, failures: HashMap::new(), busy: HashMap::new(), quiet };
    let mut verifications = JoinSet::new();
    loop {
        // The last handle of the cache or of a layer may be ours: it must go where blocking is allowed.
        let Some(inner) = cache.upgrade() else { return };
        let chosen = runtime.spawn_blocking(move || {
            let next = plan.next_layer(&inner, Instant::now());
            (plan, next)
        });
        let Ok((chosen_plan, next)) = chosen.await else { return };
        plan = chosen_plan;
        if let Some((layer, under_way)) = next {
            verifications.spawn(verify_in_time(layer, under_way, pace.clone(), runtime.clone()));
            continue;
        }
        tokio::select! {
            Some(ended) = verifications.join_next() => {
                let Ok(Some((number, is_verified))) = ended else { return };
                plan.note_end(number, is_verified, Instant::now());
            }
            () = tokio::time::sleep(look_interval) => {}
        }
    }
}

/// Verifies a layer; its number, and whether there is a verdict. `None` when the process ends.
async fn verify_in_time(
    layer: Arc<LayerCore>,
    under_way: UnderWay,
    pace: Arc<Pace>,
    runtime: Handle,
) -> Option<(u64, bool)> {
    let verified = verify(under_way, Some(&pace)).await;
    if let Err(error) = &verified {
        tracing::debug!(blob = %layer.blob(), %error, "layer cannot be verified yet");
    }
    let (number, is_verified) = (layer.number, verified.is_ok());
    runtime.spawn_blocking(move || drop((layer, verified))).await.ok()?;
    Some((number, is_verified))
}

impl Plan {
    /// A layer to verify now, if now is the time.
    fn next_layer(&mut self, cache: &Arc<CacheInner>, now: Instant) -> Option<(Arc<LayerCore>, UnderWay)> {
        let open = cache.open_layers();
        self.failures.retain(|number, _| open.iter().any(|layer| layer.core().number == *number));
        let since = now.checked_sub(self.options.quiet)?;
        open.into_iter().filter(|layer| layer.is_complete() && layer.verdict().is_none()).find_map(|layer| {
            let layer = layer.core();
            let is_left_alone = self.failures.get(&layer.number).is_some_and(|(_, until)| now < *until);
            let source = cache.scheduler.source_of(layer.number);
            if is_left_alone || self.busy.values().any(|busy| *busy == source) {
                return None;
            }
            let under_way = UnderWay::begin(layer, &cache.scheduler)?;
            let is_time = self.quiet.is_time(cache.scheduler.is_quiet_since(since), now);
            is_time.then(|| {
                self.busy.insert(layer.number, source);
                (layer.clone(), under_way)
            })
        })
    }

    fn note_end(&mut self, number: u64, is_verified: bool, now: Instant) {
        self.busy.remove(&number);
        if is_verified {
            return;
        }
        let count = self.failures.get(&number).map_or(0, |(count, _)| *count);
        let factor = 1u32.checked_shl(count).map_or(FAILURE_PAUSE_FACTOR_MAX, |n| n.min(FAILURE_PAUSE_FACTOR_MAX));
        self.failures.insert(number, (count + 1, now + self.options.failure_pause * factor));
    }
}
