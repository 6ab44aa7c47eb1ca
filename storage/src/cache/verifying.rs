//! Layers that have arrived are verified, one after the other, when nobody waits for anything.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::{CacheInner, RestOptions, quiet::Quiet};
use crate::{
    layer_core::LayerCore,
    verify::{UnderWay, verify},
};

/// The pause after a failed verification grows to this many times its first length.
const FAILURE_PAUSE_FACTOR_MAX: u32 = 64;

/// Of the layers whose verification failed, by number: how often, and until when they are left alone.
type Failures = HashMap<u64, (u32, Instant)>;

/// Verifies every open layer that is complete, until the cache is gone.
pub(super) async fn verify_layers(cache: Weak<CacheInner>, runtime: Handle, options: RestOptions) {
    let (mut failures, mut held) = (Failures::new(), Quiet::new(options.start_up_max));
    loop {
        // The last handle of the cache or of a layer may be ours: it must go where blocking is allowed.
        let Some(inner) = cache.upgrade() else { return };
        let quiet = options.quiet;
        let chosen = runtime.spawn_blocking(move || {
            let next = next_layer(&inner, &mut failures, quiet, &mut held);
            (failures, held, next)
        });
        let Ok((known, known_held, next)) = chosen.await else { return };
        (failures, held) = (known, known_held);
        let Some((layer, under_way)) = next else {
            tokio::time::sleep(options.quiet / 4).await;
            continue;
        };
        let verified = verify(under_way, Some(options.bytes_per_second)).await;
        let number = layer.number;
        if let Err(error) = &verified {
            let count = failures.get(&number).map_or(0, |(count, _)| *count);
            let factor = 1u32.checked_shl(count).map_or(FAILURE_PAUSE_FACTOR_MAX, |n| n.min(FAILURE_PAUSE_FACTOR_MAX));
            failures.insert(number, (count + 1, Instant::now() + options.failure_pause * factor));
            tracing::debug!(blob = %layer.blob(), %error, "layer cannot be verified yet");
        }
        if runtime.spawn_blocking(move || drop((layer, verified))).await.is_err() {
            return;
        }
    }
}

fn next_layer(
    cache: &Arc<CacheInner>,
    failures: &mut Failures,
    quiet: Duration,
    held: &mut Quiet,
) -> Option<(Arc<LayerCore>, UnderWay)> {
    let now = Instant::now();
    let open = cache.open_layers();
    failures.retain(|number, _| open.iter().any(|layer| layer.core().number == *number));
    let since = now.checked_sub(quiet)?;
    open.into_iter().filter(|layer| layer.is_complete()).find_map(|layer| {
        let layer = layer.core();
        let is_left_alone = failures.get(&layer.number).is_some_and(|(_, until)| now < *until);
        if is_left_alone {
            return None;
        }
        let under_way = UnderWay::begin(layer, &cache.scheduler)?;
        held.is_time(cache.scheduler.is_quiet_since(since), now).then(|| (layer.clone(), under_way))
    })
}
