//! How missing content comes into the cache: copied from another layer, with the hot pack, or as frames.
//!
//! What is near is waited for: a look at what other layers have, a copy, the next part of a hot pack that is being
//! received. It may fail to bring what it should; then, and for everything else, frames are fetched.

use std::{ops::Range, sync::Arc};

use crate::{
    disk::{frame_store::UnkeptFrames, presence::frame_runs},
    error::ReadError,
    fetch::{scheduler::Priority, wait::Wait},
    layer::LayerInner,
    waits::{BlockedRead, WaitCause},
    warm::{Warm, dedup::CopyPlan, hot_pack::HotStream},
};

/// Times that somebody waits for what is near before only frames are fetched: once to hear what other layers have,
/// once for the bytes.
const NEAR_ROUNDS_MAX: u32 = 2;

/// Gets the frames that the disk did not take.
pub(crate) type Arrived = Box<dyn FnOnce(Result<UnkeptFrames, ReadError>) + Send>;

/// What of some runs comes without their frames.
#[derive(Debug, Default)]
struct Near {
    /// Somebody is looking what other layers have.
    is_sought: bool,
    copies: Option<(Arc<CopyPlan>, Vec<usize>)>,
    hot: Option<(Arc<HotStream>, Vec<usize>)>,
}

impl LayerInner {
    /// Brings what is missing of a plain range; `done` hears when it has come or one part failed.
    pub(crate) fn bring(self: &Arc<Self>, plain: Range<u64>, priority: Priority, done: Arrived) {
        // A reader waits so long for everything together, whatever it turns out to be.
        let blocked = (priority == Priority::Read).then(|| BlockedRead::new(self.core.waits.clone(), plain.start));
        self.bring_in_rounds(plain, priority, blocked, UnkeptFrames::new(), NEAR_ROUNDS_MAX, done);
    }

    fn bring_in_rounds(
        self: &Arc<Self>,
        plain: Range<u64>,
        priority: Priority,
        mut blocked: Option<BlockedRead>,
        mut unkept: UnkeptFrames,
        near_rounds_left: u32,
        done: Arrived,
    ) {
        let mut runs = vec![plain.clone()];
        let near = if near_rounds_left > 0 { self.near(&mut runs, priority) } else { Near::default() };
        let frames: Vec<u32> = {
            let is_unkept = |frame: &u32| unkept.iter().any(|(number, _)| number == frame);
            let frames = runs.iter().flat_map(|run| self.core.store.missing_frames(run));
            let mut frames: Vec<u32> = frames.filter(|frame| !is_unkept(frame)).collect();
            frames.dedup();
            frames
        };
        let inner = self.clone();
        let is_last_round = near.is_nothing();
        if let Some(blocked) = &mut blocked
            && let Some(cause) = self.cause(&near, &frames)
        {
            blocked.waits_for(cause);
        }
        let read = blocked.as_ref().map(BlockedRead::read);
        let wait = Wait::new(self.core.blob(), read, move |arrived| match arrived {
            Err(error) => {
                drop(blocked);
                done(Err(error));
            }
            Ok(more) => {
                unkept.extend(more);
                if is_last_round {
                    drop(blocked);
                    return done(Ok(unkept));
                }
                inner.bring_in_rounds(plain, priority, blocked, unkept, near_rounds_left - 1, done);
            }
        });
        near.join(self, &wait);
        if !(is_last_round && frames.is_empty()) {
            let patience = self.scheduler.patience();
            let deadline = read.zip(patience).and_then(|(read, patience)| read.since.checked_add(patience));
            deadline.inspect(|deadline| self.scheduler.wait_until(*deadline, self.core.number, &wait));
        }
        self.scheduler.want(&self.core, frames, priority, Some(&wait));
        wait.end_of_parts();
    }

    /// The thing that a reader of this waits for: what takes longest, if there are several; `None` if all is there.
    fn cause(&self, near: &Near, frames: &[u32]) -> Option<WaitCause> {
        if !frames.is_empty() {
            let are_under_way = self.scheduler.are_under_way(self.core.number, frames);
            return Some(if are_under_way { WaitCause::FrameUnderWay } else { WaitCause::Frame });
        }
        if near.hot.is_some() {
            return Some(WaitCause::HotPack);
        }
        (!near.is_nothing()).then_some(WaitCause::OtherLayers)
    }

    /// Takes out of `runs` what is there or comes without frames.
    fn near(&self, runs: &mut Vec<Range<u64>>, priority: Priority) -> Near {
        *runs = runs.iter().flat_map(|run| self.core.store.missing_runs(run)).collect();
        let mut near = Near::default();
        if runs.is_empty() {
            return near;
        }
        let warm = self.warm();
        let (plan, hot) = match &*warm {
            Warm::Nothing => return near,
            Warm::Sought(_) => {
                runs.clear();
                return Near { is_sought: true, ..near };
            }
            Warm::Hot(hot) => (None, Some(hot)),
            Warm::Copies(plan, hot) => (Some(plan), hot.as_ref()),
        };
        if let Some(plan) = plan.filter(|plan| plan.is_current(&self.core.store)) {
            let (pieces, left) = plan.take(runs);
            *runs = left;
            near.copies = (!pieces.is_empty()).then(|| (plan.clone(), pieces));
        }
        if let Some(stream) = hot {
            let (frames, left) = stream.take(runs, priority == Priority::Read);
            *runs = left;
            near.hot = (!frames.is_empty()).then(|| (stream.clone(), frames));
        }
        near
    }

    /// Whether what is missing of a frame is there or comes without it.
    pub(crate) fn is_frame_coming(&self, frame: u32) -> bool {
        let mut runs = frame_runs(self.core.store.index(), frame).collect();
        self.near(&mut runs, Priority::HotPack);
        runs.is_empty()
    }

    /// The frames that a plain range misses and that come with nothing that is on its way, ascending.
    pub(crate) fn frames_to_fetch(&self, plain: Range<u64>) -> Vec<u32> {
        let mut runs = vec![plain];
        self.near(&mut runs, Priority::HotPack);
        runs.iter().flat_map(|run| self.core.store.missing_frames(run)).collect()
    }

    /// Copies one piece from another layer; whether there is a point in copying more. Blocks.
    pub(crate) fn copy(&self, plan: &CopyPlan, piece: usize) -> bool {
        if self.core.is_removed() || !plan.is_current(&self.core.store) {
            return false;
        }
        match plan.copy(&self.core.store, piece) {
            Ok(len) => {
                self.core.count_copied(len);
                true
            }
            Err(error) => {
                tracing::debug!(blob = %self.core.blob(), %error, "content cannot be copied");
                false
            }
        }
    }
}

impl Near {
    fn is_nothing(&self) -> bool {
        !self.is_sought && self.copies.is_none() && self.hot.is_none()
    }

    /// Makes `wait` wait for all of it.
    fn join(self, layer: &Arc<LayerInner>, wait: &Arc<Wait>) {
        if self.is_sought {
            layer.warm().join(|| {
                wait.add_part();
                wait.clone()
            });
        }
        if let Some((plan, pieces)) = self.copies {
            wait.add_part();
            let (layer, wait) = (layer.clone(), wait.clone());
            layer.core.runtime().clone().spawn_blocking(move || {
                for piece in pieces {
                    layer.copy(&plan, piece);
                }
                wait.part_ended();
            });
        }
        if let Some((stream, frames)) = self.hot {
            frames.into_iter().for_each(|frame| stream.join(frame, wait));
        }
    }
}
