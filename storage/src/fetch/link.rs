//! The mutual knowledge of a running request and the scheduler.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use tokio::sync::Notify;

use crate::fetch::source::SourceError;

/// Shared by a request, which counts what it receives, and the scheduler, which may end it.
#[derive(Debug, Default)]
pub(crate) struct Link {
    received: AtomicU64,
    /// Whether the request waits for its source at this moment, not for the disk or a processor.
    is_waiting: AtomicBool,
    /// Whether another source has its slot now.
    is_displaced: AtomicBool,
    cancelled: Notify,
    /// Why it is ended, where that is the source's fault.
    reason: OnceLock<SourceError>,
}

impl Link {
    /// Bytes have come from the source.
    pub(crate) fn count(&self, len: usize) {
        self.received.fetch_add(len as u64, Ordering::AcqRel);
    }

    /// How many have.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Says that the source's turn has begun or ended.
    pub(crate) fn set_waiting(&self, is_waiting: bool) {
        self.is_waiting.store(is_waiting, Ordering::Release);
    }

    /// Whether it is the source's turn.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting.load(Ordering::Acquire)
    }

    /// Ends the request, at once or as soon as it waits for its source again.
    pub(crate) fn cancel(&self) {
        self.cancelled.notify_one();
    }

    /// Another source has the slot of the request now.
    pub(crate) fn displace(&self) {
        self.is_displaced.store(true, Ordering::Release);
    }

    /// Whether one has.
    pub(crate) fn is_displaced(&self) -> bool {
        self.is_displaced.load(Ordering::Acquire)
    }

    /// Says why the request is going to be ended.
    pub(crate) fn set_reason(&self, reason: SourceError) {
        // The first reason is the one.
        let _ = self.reason.set(reason);
    }

    /// Waits for [`Self::cancel`]; returns why.
    pub(crate) async fn cancelled(&self) -> SourceError {
        self.cancelled.notified().await;
        self.reason.get().cloned().unwrap_or_else(|| SourceError::passing("the request was given up"))
    }
}
