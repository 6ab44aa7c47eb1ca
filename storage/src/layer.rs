//! One layer: its index, and its plain address space as far as it has arrived.

use std::{io, ops::Range, sync::Arc};

use format_spec::{Index, LazyLayer};
use serde_json::Value;

use crate::error::ReadError;

/// The index of a layer, mapped into memory.
pub type LayerIndex = Index<memmap2::Mmap>;

/// How urgent bytes are. Each class has requests of its own, so a read never waits behind a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody is blocked until they are there.
    Read,
    /// They will be read soon: hot pack and read-ahead.
    HotPack,
    /// The rest.
    Background,
}

/// How much of a layer has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Frames in the cache.
    pub frames_present: u64,
    /// Frames that hold file content.
    pub frames_total: u64,
    /// Compressed bytes that this process fetched, index included.
    pub fetched_bytes: u64,
}

/// A layer of the cache. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Layer {
    inner: Arc<LayerInner>,
}

#[derive(Debug)]
struct LayerInner {
    layer: LazyLayer,
    description: Value,
    index: LayerIndex,
}

impl Layer {
    /// What names this layer.
    pub fn lazy_layer(&self) -> &LazyLayer {
        &self.inner.layer
    }

    /// What the caller of `Cache::layer` gave last.
    pub fn description(&self) -> Value {
        self.inner.description.clone()
    }

    /// The index.
    pub fn index(&self) -> &LayerIndex {
        &self.inner.index
    }

    /// Reads from the plain address space what is there already; never waits for the source.
    ///
    /// `Ok(None)` when a frame is missing: see [`Self::read_then`]. Otherwise the number of bytes read: all of
    /// `buffer`, or less where the space ends.
    ///
    /// # Errors
    ///
    /// When the cache file cannot be read.
    pub fn read_at_if_present(&self, offset: u64, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let _ = (offset, buffer);
        Ok(None)
    }

    /// Reads `len` bytes at `offset` of the plain address space, fetching what is missing; does not block.
    ///
    /// `done` gets exactly the bytes asked for, cut where the space ends. It runs at once on the calling
    /// thread when everything is there, else later on a worker thread where it may block shortly.
    pub fn read_then(&self, offset: u64, len: usize, done: impl FnOnce(Result<Vec<u8>, ReadError>) + Send + 'static) {
        let _ = (offset, len);
        done(Err(ReadError::Stopped(self.inner.layer.blob)));
    }

    /// Like [`Self::read_then`], blocking; not for threads of a runtime.
    ///
    /// # Errors
    ///
    /// [`ReadError::Corrupt`] when a frame does not match its digest: never returns unverified bytes.
    /// [`ReadError::Source`] when the source gave up; a later call may succeed.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let _ = (offset, len);
        Err(ReadError::Stopped(self.inner.layer.blob))
    }

    /// Like [`Self::read_then`], as a future.
    ///
    /// # Errors
    ///
    /// Those of [`Self::read`].
    pub async fn read_async(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let _ = (offset, len);
        Err(ReadError::Stopped(self.inner.layer.blob))
    }

    /// Brings the frames of a plain range into the cache; does not block.
    ///
    /// `done` runs when all are there or one failed: at once on the calling thread, or on a worker thread.
    pub fn fetch(
        &self,
        plain: Range<u64>,
        priority: Priority,
        done: impl FnOnce(Result<(), ReadError>) + Send + 'static,
    ) {
        let _ = (plain, priority);
        done(Err(ReadError::Stopped(self.inner.layer.blob)));
    }

    /// Whether every frame with file content is in the cache.
    pub fn is_complete(&self) -> bool {
        false
    }

    /// How much has arrived.
    pub fn progress(&self) -> Progress {
        Progress::default()
    }

    /// Makes what arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn flush(&self) -> Result<(), ReadError> {
        Ok(())
    }
}
