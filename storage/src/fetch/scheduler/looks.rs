//! Looks at what is wanted and under way: questions to the machine, which change nothing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Scheduler, machine::Activity};
use crate::{layer_core::LayerCore, sync::lock};

/// How often who is in no hurry looks whether readers still wait, and how long he lets them go first: they may wait for
/// something that never comes.
const GIVE_WAY_STEP: Duration = Duration::from_millis(3);
const GIVE_WAY_MAX: Duration = Duration::from_millis(300);

impl Scheduler {
    /// The frames of a layer that are wanted at this moment, and by whom.
    pub(crate) fn activity(&self, layer: u64) -> Activity {
        lock(&self.state).machine.activity(layer, Instant::now())
    }

    /// Whether all of some frames of a layer have been asked for already, or are here.
    pub(crate) fn are_under_way(&self, layer: u64, frames: &[u32]) -> bool {
        let machine = &lock(&self.state).machine;
        frames.iter().all(|frame| machine.is_under_way(layer, *frame))
    }

    /// Those of some frames that are not here, and that nobody has wanted yet.
    pub(crate) fn unwanted(&self, layer: &LayerCore, frames: &[u32]) -> Vec<u32> {
        let machine = &lock(&self.state).machine;
        let is_unwanted = |frame: &u32| !layer.store.has_frame(*frame) && !machine.is_pending(layer.number, *frame);
        frames.iter().copied().filter(is_unwanted).collect()
    }

    /// Those of some frames that somebody wants.
    pub(crate) fn wanted(&self, layer: &LayerCore, frames: &[u32]) -> Vec<u32> {
        let machine = &lock(&self.state).machine;
        frames.iter().copied().filter(|frame| machine.is_pending(layer.number, *frame)).collect()
    }

    /// Whether nothing more urgent than the rest is under way, or was later than `since`.
    pub(crate) fn is_quiet_since(&self, since: Instant) -> bool {
        lock(&self.state).machine.is_quiet_since(since)
    }

    /// Waits while requests of blocked readers bring something from the same source: they get all of the link.
    pub(crate) async fn let_readers_go_first(&self, request: u64) {
        let until = Instant::now() + GIVE_WAY_MAX;
        while lock(&self.state).machine.is_beside_reads(request, Instant::now()) && Instant::now() < until {
            tokio::time::sleep(GIVE_WAY_STEP).await;
        }
    }

    /// The source that a layer would be fetched from now, as far as that is shared with others.
    pub(crate) fn source_of(&self, layer: u64) -> Option<Arc<str>> {
        lock(&self.state).machine.source_of(layer, Instant::now())
    }
}
