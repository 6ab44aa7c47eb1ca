//! Cached content is compared with its checksums: once soon after an earlier process left it, and all of it now and then.
//!
//! Both slowly, and giving way to readers. Content of an earlier process that a reader or a mount is about to use does
//! not wait for this ([`crate::disk::unchecked`]).

use std::{
    num::NonZeroU64,
    sync::Weak,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::{CacheInner, quiet::Quiet};
use crate::layer::Layer;

/// Bytes of content of a step.
const STEP_LEN: u64 = 8 << 20;
/// Nobody has to have waited for this long.
const QUIET: Duration = Duration::from_secs(5);
/// A pass is held up for this long at most: somebody may be waiting for a registry that does not answer.
const HELD_MAX: Duration = Duration::from_secs(30);
/// An earlier process's content is compared so many times slower while somebody waits, and everything else not at all.
const BUSY_FACTOR: u64 = 8;
/// Bytes a second, at least, where a container reads through the daemon for lack of the comparison.
const WANTED_RATE: u64 = 64 << 20;
/// From the end of a pass over all layers to the next one: disks lose bits over months.
const PASS_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked whether there is something to do.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Where the work stands; layers by number.
#[derive(Debug)]
struct Position {
    /// The layer whose unchecked content was looked at last.
    unchecked: u64,
    /// Layer and offset at which the pass goes on.
    pass: (u64, u64),
    /// When the next pass begins.
    pass_from: Instant,
    quiet: Quiet,
}

/// Compares again and again, until the cache is gone. Without a `rate` only what would be mounted otherwise.
pub(super) async fn scrub_layers(cache: Weak<CacheInner>, runtime: Handle, rate: Option<NonZeroU64>) {
    let pass_from = Instant::now() + PASS_PAUSE;
    let mut position = Position { unchecked: 0, pass: (0, 0), pass_from, quiet: Quiet::new(HELD_MAX) };
    loop {
        // The last handle of the cache or of a layer may be ours: it must go where blocking is allowed.
        let Some(inner) = cache.upgrade() else { return };
        let started = Instant::now();
        let stepped = runtime.spawn_blocking(move || {
            let pause = step(&inner, &mut position, rate);
            (position, pause)
        });
        let Ok((next, pause)) = stepped.await else { return };
        position = next;
        tokio::time::sleep(pause.saturating_sub(started.elapsed())).await;
    }
}

/// Does one step; returns how long after its beginning the next one follows.
fn step(cache: &CacheInner, position: &mut Position, rate: Option<NonZeroU64>) -> Duration {
    let mut open = cache.open_layers();
    open.sort_by_key(|layer| layer.core().number);
    let now = Instant::now();
    let is_quiet = now.checked_sub(QUIET).is_some_and(|since| cache.scheduler.is_quiet_since(since));
    if let Some((layer, is_wanted)) = next_unchecked(&open, position.unchecked, rate.is_some()) {
        position.unchecked = layer.core().number;
        let rate = rate.map_or(WANTED_RATE, NonZeroU64::get);
        return match check_step(layer) {
            false => LOOK_INTERVAL,
            true if is_wanted => pace(rate.max(WANTED_RATE)),
            true if is_quiet => pace(rate),
            true => pace(rate / BUSY_FACTOR),
        };
    }
    match rate {
        Some(rate) if position.pass_from <= now && position.quiet.is_time(is_quiet, now) => {
            pass_step(&open, position, rate)
        }
        _ => LOOK_INTERVAL,
    }
}

/// The time that a step takes at so many bytes a second.
fn pace(rate: u64) -> Duration {
    Duration::from_millis(STEP_LEN.saturating_mul(1000) / rate.max(1))
}

/// The layer in which content of an earlier process is compared next, and whether somebody would mount it: those in turn
/// first, then the others.
fn next_unchecked(open: &[Layer], last: u64, is_everything_meant: bool) -> Option<(&Layer, bool)> {
    let in_turn = || {
        let after = open.partition_point(|layer| layer.core().number <= last);
        let (before, after) = open.split_at(after);
        after.iter().chain(before).filter(|layer| !layer.core().store.unchecked.is_empty())
    };
    let wanted = in_turn().find(|layer| layer.core().store.unchecked.is_wanted());
    let any = || in_turn().next().filter(|_| is_everything_meant);
    wanted.map(|layer| (layer, true)).or_else(|| any().map(|layer| (layer, false)))
}

/// Compares a part of what an earlier process left; whether that was possible.
fn check_step(layer: &Layer) -> bool {
    let Some(part) = layer.core().store.next_unchecked(0, STEP_LEN) else { return true };
    layer.inner().check(part).inspect_err(|error| note_failure(layer, error)).is_ok()
}

fn note_failure(layer: &Layer, error: &std::io::Error) {
    tracing::warn!(blob = %layer.lazy_layer().blob, %error, "cached content cannot be compared or healed now");
}

/// Compares the next part of everything.
fn pass_step(open: &[Layer], position: &mut Position, rate: NonZeroU64) -> Duration {
    let (number, offset) = position.pass;
    let Some(layer) = open.iter().find(|layer| layer.core().number >= number) else {
        if !open.is_empty() {
            position.pass = (0, 0);
            position.pass_from = Instant::now() + PASS_PAUSE;
        }
        return LOOK_INTERVAL;
    };
    let found = layer.core().number;
    let start = if found == number { offset } else { 0 };
    let Some(part) = layer.core().store.next_content(start, STEP_LEN) else {
        position.pass = (found + 1, 0);
        return Duration::ZERO;
    };
    position.pass = (found, part.end);
    if let Err(error) = layer.inner().heal(part) {
        note_failure(layer, &error);
    }
    pace(rate.get())
}
