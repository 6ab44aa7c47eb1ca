//! Content of an earlier process, as far as it was not compared with its checksums since the layer was opened.
//!
//! The disk may have changed it meanwhile, however that process ended. So every page of it is compared once: before the
//! first read of it is answered, before the kernel gets the file, or by the scrub, whichever comes first
//! ([`crate::disk::health`]).

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc};

use crate::{
    disk::{
        bitmap::Bitmap,
        presence::{Counts, PresenceBits},
    },
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        lock,
    },
};

/// The pages of one layer that are still to be compared, by their numbers. Safe from many threads.
#[derive(Debug)]
pub(crate) struct Unchecked {
    pages: Bitmap,
    page_count: u64,
    /// The file `presence` of then: it has the checksums, which memory need not hold. Let go with the last page.
    presence: Mutex<Option<Arc<File>>>,
    checksums_offset: u64,
    is_wanted: AtomicBool,
}

impl Unchecked {
    /// Those of the words `present`; `presence` is the file that says so.
    pub(crate) fn new(counts: Counts, present: &[u64], presence: Option<File>) -> Self {
        Self {
            pages: Bitmap::new(present.to_vec()),
            page_count: counts.pages,
            presence: Mutex::new(presence.map(Arc::new)),
            checksums_offset: PresenceBits::checksums_offset(counts),
            is_wanted: AtomicBool::new(false),
        }
    }

    /// Whether nothing is left to compare: all that it costs a read from then on.
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.set_count() == 0
    }

    /// Number of pages that are left.
    pub(crate) fn count(&self) -> u64 {
        self.pages.set_count()
    }

    /// Whether a page is still to be compared.
    pub(crate) fn has(&self, number: u64) -> bool {
        self.pages.is_set(number)
    }

    /// The first page from one on that is.
    pub(crate) fn next(&self, from: u64) -> Option<u64> {
        self.pages.find(from..self.page_count, true)
    }

    /// Pages are what was written, or are there no longer.
    pub(crate) fn note_checked(&self, numbers: Range<u64>) {
        self.pages.clear(numbers);
        if self.is_empty() {
            *lock(&self.presence) = None;
        }
    }

    /// The checksums that pages had then; `None` when all were compared meanwhile.
    ///
    /// # Errors
    ///
    /// When the file cannot be read: then nothing is known of the pages.
    pub(crate) fn checksums_of(&self, numbers: &Range<u64>) -> io::Result<Option<Vec<u32>>> {
        let Some(presence) = lock(&self.presence).clone() else { return Ok(None) };
        let mut bytes = vec![0; usize::try_from((numbers.end - numbers.start) * 4).map_err(io::Error::other)?];
        presence.read_exact_at(&mut bytes, self.checksums_offset + numbers.start * 4)?;
        let checksums = bytes.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")));
        Ok(Some(checksums.collect()))
    }

    /// Somebody would mount the file, and has not the time to wait.
    pub(crate) fn want(&self) {
        self.is_wanted.store(true, Ordering::Release);
    }

    /// Whether somebody would.
    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }
}
