//! One reader's wait for several things to arrive.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use format_spec::Digest;

use crate::{
    disk::frame_store::UnkeptFrames,
    error::ReadError,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        lock,
    },
};

type Done = Box<dyn FnOnce(Result<UnkeptFrames, ReadError>) + Send>;

/// A read that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaitingRead {
    /// When the reader asked.
    pub since: Instant,
    /// Where it begins in the plain address space.
    pub offset: u64,
}

/// Calls back once: when all that was added has arrived, when something has failed, or when it is dropped before.
pub(crate) struct Wait {
    blob: Digest,
    read: Option<WaitingRead>,
    remaining: AtomicUsize,
    unkept: Mutex<UnkeptFrames>,
    done: Mutex<Option<Done>>,
}

impl Wait {
    /// A wait for nothing yet; it ends with the [`Self::end_of_parts`] that its maker owes it at the earliest.
    ///
    /// `read` is the reader whose wait it is, if it is one; `done` gets the frames that the disk did not take.
    pub(crate) fn new(
        blob: Digest,
        read: Option<WaitingRead>,
        done: impl FnOnce(Result<UnkeptFrames, ReadError>) + Send + 'static,
    ) -> Arc<Self> {
        let (remaining, done) = (AtomicUsize::new(1), Mutex::new(Some(Box::new(done) as Done)));
        Arc::new(Self { blob, read, remaining, unkept: Mutex::default(), done })
    }

    /// The reader whose wait it is; `None` where nobody is blocked.
    pub(crate) fn read(&self) -> Option<WaitingRead> {
        self.read
    }

    /// Waits for one thing more: a frame, or what may make frames needless.
    pub(crate) fn add_part(&self) {
        self.remaining.fetch_add(1, Ordering::AcqRel);
    }

    /// Nothing further will be added.
    pub(crate) fn end_of_parts(&self) {
        self.count_down();
    }

    /// One thing that is no frame is over: its bytes are in the cache, or will not come this way.
    pub(crate) fn part_ended(&self) {
        self.count_down();
    }

    /// One of the frames is there: in the cache, or as `unkept` when the disk did not take it.
    pub(crate) fn frame_arrived(&self, frame: u32, unkept: Option<Bytes>) {
        if let Some(content) = unkept {
            lock(&self.unkept).push((frame, content));
        }
        self.count_down();
    }

    /// One of the frames will not come: the wait ends at once.
    pub(crate) fn fail(&self, error: ReadError) {
        let done = lock(&self.done).take();
        if let Some(done) = done {
            done(Err(error));
        }
    }

    /// Whether it has called back.
    pub(crate) fn is_over(&self) -> bool {
        lock(&self.done).is_none()
    }

    fn count_down(&self) {
        if self.remaining.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let done = lock(&self.done).take();
        if let Some(done) = done {
            done(Ok(std::mem::take(&mut lock(&self.unkept))));
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.fail(ReadError::Stopped(self.blob));
    }
}

impl std::fmt::Debug for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wait").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}
