//! What a running request and the scheduler know of each other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// Shared by a request, which counts what it receives, and the scheduler, which may end it.
#[derive(Debug, Default)]
pub(crate) struct Link {
    received: AtomicU64,
    /// Whether the request waits for its source at this moment, not for the disk or a processor.
    is_waiting: AtomicBool,
    cancelled: Notify,
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

    /// Waits for [`Self::cancel`].
    pub(crate) async fn cancelled(&self) {
        self.cancelled.notified().await;
    }
}
