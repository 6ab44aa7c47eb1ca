//! A source that does as it is asked. Those that lie, fail or wait stand beside the tests that need them.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use storage::{FetchFuture, FetchWideFuture, Source, WideStream};

/// A blob in memory, which counts how often it is asked.
#[derive(Debug)]
pub struct HonestSource {
    blob: Bytes,
    request_count: AtomicUsize,
}

impl HonestSource {
    /// A source of this blob.
    pub fn new(blob: impl Into<Bytes>) -> Arc<Self> {
        Arc::new(Self { blob: blob.into(), request_count: AtomicUsize::new(0) })
    }

    /// Requests so far.
    pub fn request_count(&self) -> usize {
        self.request_count.load(Ordering::Relaxed)
    }
}

impl Source for HonestSource {
    fn origin(&self) -> Option<String> {
        None
    }

    /// Cut at the end of the blob.
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        self.request_count.fetch_add(1, Ordering::Relaxed);
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(self.blob.len());
        let piece = self.blob.slice(at(range.start)..at(range.end));
        async move { Ok(stream::iter([Ok(piece)]).boxed()) }.boxed()
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        WideStream::exact(range.clone(), self.fetch(range))
    }
}
