//! Cached content is compared with its checksums now and then, slowly, when nobody waits for anything.

use std::{
    num::NonZeroU64,
    sync::Weak,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::{CacheInner, quiet::Quiet};

/// Plain bytes of a step.
const STEP_LEN: u64 = 8 << 20;
/// Nobody has to have waited for this long.
const QUIET: Duration = Duration::from_secs(5);
/// A step is held up for this long at most: somebody may be waiting for a registry that does not answer.
const HELD_MAX: Duration = Duration::from_secs(30);
/// From the end of a pass over all layers to the next one: disks lose bits over months.
const PASS_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked whether there are layers, or whether it is quiet.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Where a pass stands: number of a layer, and offset in it.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    layer: u64,
    offset: u64,
}

/// Compares everything again and again, until the cache is gone.
pub(super) async fn scrub_layers(cache: Weak<CacheInner>, runtime: Handle, rate: NonZeroU64) {
    let (mut position, mut quiet) = (Position::default(), Quiet::new(HELD_MAX));
    loop {
        // The last handle of the cache or of a layer may be ours: it must go where blocking is allowed.
        let Some(inner) = cache.upgrade() else { return };
        let started = Instant::now();
        let stepped = runtime.spawn_blocking(move || (step(&inner, position, &mut quiet), quiet));
        let Ok((next, known)) = stepped.await else { return };
        quiet = known;
        let pause = match next {
            Step::Wait => LOOK_INTERVAL,
            Step::Done(next) => {
                position = next;
                Duration::from_millis(STEP_LEN.saturating_mul(1000) / rate).saturating_sub(started.elapsed())
            }
            Step::End => {
                position = Position::default();
                PASS_PAUSE
            }
        };
        tokio::time::sleep(pause).await;
    }
}

enum Step {
    /// Somebody waits for something, or there is nothing yet.
    Wait,
    /// A part was compared; the next one begins here.
    Done(Position),
    /// All layers were compared.
    End,
}

fn step(cache: &CacheInner, from: Position, quiet: &mut Quiet) -> Step {
    let (mut open, now) = (cache.open_layers(), Instant::now());
    let is_quiet = || now.checked_sub(QUIET).is_some_and(|since| cache.scheduler.is_quiet_since(since));
    if open.is_empty() || !quiet.is_time(is_quiet(), now) {
        return Step::Wait;
    }
    open.sort_by_key(|layer| layer.core().number);
    let Some(layer) = open.iter().find(|layer| layer.core().number >= from.layer) else { return Step::End };
    let number = layer.core().number;
    let start = if number == from.layer { from.offset } else { 0 };
    let end = start.saturating_add(STEP_LEN);
    if let Err(error) = layer.inner().heal(start..end) {
        tracing::warn!(blob = %layer.lazy_layer().blob, %error, "cached content cannot be compared or healed now");
    }
    if end >= layer.index().space_len() {
        return Step::Done(Position { layer: number + 1, offset: 0 });
    }
    Step::Done(Position { layer: number, offset: end })
}
