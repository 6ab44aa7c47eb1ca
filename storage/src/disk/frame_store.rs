//! The content of one layer on disk: what is there, how it gets in, how bytes come out.
//!
//! Everything that depends on the order "data before bit, bit before read" stands here. There is no
//! network and no waiting in this file.
//!
//! Locks, each taken while those before it may be held: `flushed` over everything that makes content durable, `writing`
//! over one write to the page cache. Threads that serve reads take neither.

use std::{
    io,
    ops::Range,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use format_spec::{Digest, records::PLAIN_ALIGN};
use tokio::sync::Notify;

use crate::{
    disk::{
        DiskFile,
        directory::{CopySource, LayerDirectory},
        health::PageChecksum,
        mapping::LayerIndex,
        page_map::PageMap,
        presence::{Counts, Presence, PresenceBits, frame_runs, needed_frames},
        proof::Proof,
        unchecked::Unchecked,
        unkept::Unkept,
    },
    sync::{
        Condvar, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock,
    },
};

/// Longest run of files assembled for one write, in bytes. Memory for a longer one would go back to the system each time.
const RUN_LEN_MAX: usize = 64 << 10;

/// As long as it is the same, everything that was written to the file is still in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

/// Frames by number with their plain bytes, which the disk did not take.
pub(crate) type UnkeptFrames = Vec<(u32, Bytes)>;

/// Knowledge of content while it is written.
#[derive(Debug, Default)]
pub(crate) struct Writing {
    /// One a page with content, 0 where it is not there; none at all once the layer is sealed.
    pub(crate) checksums: Vec<u32>,
}

/// The content of one layer.
#[derive(Debug)]
pub(crate) struct FrameStore {
    directory: LayerDirectory,
    index: LayerIndex,
    index_digest: Digest,
    data: RwLock<Arc<DiskFile>>,
    presence: Presence,
    proof: Proof,
    has_unwritten_bits: AtomicBool,
    unkept: Arc<Unkept>,
    is_disk_refusing: AtomicBool,
    /// Held from the look at what is there until what was written is said to be.
    writing: Mutex<Writing>,
    /// Changes when content is given up, while `writing` is held.
    epoch: AtomicU64,
    /// The bits of the file `presence`; held while content is made durable.
    flushed: Mutex<PresenceBits>,
    /// Whether everything is there and durable.
    seal: Mutex<bool>,
    sealed: Condvar,
    /// Hears that everything is there, and that nothing but a flush is missing.
    flush_soon: Arc<Notify>,
    /// Content of an earlier process.
    pub(crate) unchecked: Unchecked,
    /// Pages that were damaged, since the layer was opened.
    pub(crate) healed_pages: AtomicU64,
}

impl FrameStore {
    /// Opens the files beside an index that was verified against `index_digest`.
    ///
    /// `flush_soon` is notified when a flush would seal the layer. Content is looked at when it is used.
    pub(crate) fn open(
        directory: LayerDirectory,
        index: LayerIndex,
        index_digest: Digest,
        flush_soon: Arc<Notify>,
        unkept: Arc<Unkept>,
    ) -> io::Result<Self> {
        let map = Arc::new(PageMap::of(&index));
        let counts = Counts::of(&index, &map);
        let (data, mut bits) = directory.open_data(index.space_len(), counts, &index_digest)?;
        let kept = directory.open_presence()?;
        // A file that stays empty needs nothing written of it.
        let is_kept = kept.is_some() || index.space_len() == 0;
        let unchecked = Unchecked::new(counts, &bits.pages, kept);
        let presence = Presence::new(&index, map, bits.clone());
        let proof = Proof::open(&directory, &index, index_digest, presence.is_complete())?;
        // A layer of holes alone is complete before anything is written of it.
        let is_sealed = presence.is_complete() && is_kept;
        let mut checksums = std::mem::take(&mut bits.checksums);
        if is_sealed {
            checksums = Vec::new();
        } else {
            let pages = usize::try_from(counts.pages).map_err(io::Error::other)?;
            if checksums.len() != pages {
                // Zeros that the allocator need not write: they take no memory before they are used.
                checksums = vec![0; pages];
            }
        }
        let store = Self {
            proof,
            directory,
            index_digest,
            data: RwLock::new(Arc::new(data)),
            has_unwritten_bits: AtomicBool::new(presence.is_complete() && !is_sealed),
            unkept,
            is_disk_refusing: AtomicBool::new(false),
            writing: Mutex::new(Writing { checksums }),
            epoch: AtomicU64::new(0),
            flushed: Mutex::new(presence.snapshot()),
            seal: Mutex::new(is_sealed),
            sealed: Condvar::new(),
            flush_soon,
            unchecked,
            healed_pages: AtomicU64::new(0),
            presence,
            index,
        };
        store.ask_for_seal();
        Ok(store)
    }

    /// The file with the content, as it is now.
    pub(crate) fn data(&self) -> Arc<DiskFile> {
        self.data.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another file has the content from now on. Content that it lacks is missing already.
    pub(crate) fn set_data(&self, data: DiskFile) {
        *self.data.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(data);
    }

    pub(crate) fn index_digest(&self) -> &Digest {
        &self.index_digest
    }

    pub(crate) fn writing(&self) -> &Mutex<Writing> {
        &self.writing
    }

    pub(crate) fn flushed(&self) -> &Mutex<PresenceBits> {
        &self.flushed
    }

    /// Content is given up; the caller holds `writing`.
    pub(crate) fn next_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Pages with these numbers are missing from now on.
    pub(crate) fn clear_pages(&self, numbers: &[u64]) {
        self.presence.clear_pages(&self.index, numbers);
    }

    /// The file is not known to be whole any longer.
    pub(crate) fn unseal(&self) {
        *lock(&self.seal) = false;
    }

    /// There is something to flush.
    pub(crate) fn note_change(&self) {
        self.has_unwritten_bits.store(true, Ordering::Release);
        self.ask_for_seal();
    }

    /// The presence of content.
    pub(crate) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// The index.
    pub(crate) fn index(&self) -> &LayerIndex {
        &self.index
    }

    /// The proof of its truth.
    pub(crate) fn proof(&self) -> &Proof {
        &self.proof
    }

    /// Frames that hold file content.
    pub(crate) fn needed_frame_count(&self) -> u64 {
        needed_frames(&self.index, 0..self.index.space_len()).count() as u64
    }

    /// Frames with file content that is there, however it came.
    pub(crate) fn present_frame_count(&self) -> u64 {
        let frames = needed_frames(&self.index, 0..self.index.space_len());
        frames.filter(|frame| self.presence.has_content_of(&self.index, *frame)).count() as u64
    }

    /// Whether all content is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.presence.is_complete()
    }

    /// Whether no page of it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.presence.is_empty()
    }

    /// Whether everything is there and durable: nothing is ever written to the file again.
    pub(crate) fn is_sealed(&self) -> bool {
        *lock(&self.seal)
    }

    /// Waits until a complete layer is sealed, or for so long.
    pub(crate) fn wait_for_seal(&self, timeout: Duration) {
        let wait =
            self.sealed.wait_timeout_while(lock(&self.seal), timeout, |is_sealed| !*is_sealed && self.is_complete());
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    /// The file that holds the content, if it is sealed and what an earlier process left in it was compared.
    pub(crate) fn sealed_data_path(&self) -> Option<PathBuf> {
        (self.is_sealed() && self.unchecked.is_empty()).then(|| self.directory.data_path())
    }

    /// Everything may be there by now, and nobody should wait long for the flush that is missing.
    fn ask_for_seal(&self) {
        if self.is_complete() && !self.is_sealed() {
            self.flush_soon.notify_one();
        }
    }

    /// Whether a frame is there.
    pub(crate) fn has_frame(&self, frame: u32) -> bool {
        self.presence.has_frame(frame)
    }

    /// Whether all content of a frame is there, however it came.
    pub(crate) fn has_content_of(&self, frame: u32) -> bool {
        self.presence.has_content_of(&self.index, frame)
    }

    /// Whether all content of a plain range is there.
    pub(crate) fn has(&self, plain: &Range<u64>) -> bool {
        self.presence.has(&self.index, plain)
    }

    /// The parts of a plain range that are not there, ascending.
    pub(crate) fn missing_runs(&self, plain: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        self.presence.missing_runs(plain).filter(|run| !self.has(run))
    }

    /// The frames that must come before a plain range can be read, ascending.
    pub(crate) fn missing_frames(&self, plain: &Range<u64>) -> impl Iterator<Item = u32> + use<'_> {
        self.presence.missing_frames(&self.index, plain)
    }

    /// The parts of a plain range whose pages are there, ascending.
    pub(crate) fn present_runs(&self, plain: Range<u64>) -> Vec<Range<u64>> {
        let (mut present, mut next) = (Vec::new(), plain.start);
        for missing in self.presence.missing_runs(&plain) {
            present.push(next..missing.start);
            next = missing.end;
        }
        present.push(next..plain.end);
        present.retain(|run| !run.is_empty());
        present
    }

    /// Reads content that is there, and zeros where none is.
    pub(crate) fn read_content(&self, plain_offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.data().read_sparse(plain_offset, buffer)
    }

    /// Where the file holds something from an offset on: in between it reads as zeros.
    pub(crate) fn next_stored(&self, plain_offset: u64) -> io::Result<u64> {
        self.data().next_stored(plain_offset)
    }

    /// Cuts a plain range where the space ends.
    pub(crate) fn clip(&self, offset: u64, len: usize) -> Range<u64> {
        let end = offset.saturating_add(len as u64).min(self.index.space_len());
        offset.min(end)..end
    }

    /// Reads from `offset`, if all content needed is there, in `extra` or among the frames the disk did not take.
    ///
    /// `Ok(None)` when some is missing. Otherwise the bytes read: all of `buffer`, or less where the space ends. The error
    /// of [`Self::check`] where content of an earlier process is not what was written.
    pub(crate) fn read_present(
        &self,
        offset: u64,
        buffer: &mut [u8],
        extra: &UnkeptFrames,
    ) -> io::Result<Option<usize>> {
        let plain = self.clip(offset, buffer.len());
        let len = usize::try_from(plain.end - plain.start).map_err(io::Error::other)?;
        let buffer = &mut buffer[..len];
        // The file before the bits: what a new file lacks is missing before it is here. And what turns out to be damaged is
        // missing before it counts as compared.
        let (epoch, data) = (self.epoch(), self.data());
        // Bytes that are to be compared are compared as the reader gets them, not read twice.
        let is_read = !self.unchecked.is_empty() && self.presence.has_pages(&plain);
        if is_read {
            data.read_sparse(plain.start, buffer)?;
        }
        self.check(&data, &plain, is_read.then_some(&*buffer))?;
        let mut from_memory = UnkeptFrames::new();
        if !self.presence.has_pages(&plain) {
            for frame in self.missing_frames(&plain) {
                match extra.iter().find(|(number, _)| *number == frame).cloned().or_else(|| self.find_unkept(frame)) {
                    Some(unkept) => from_memory.push(unkept),
                    None => return Ok(None),
                }
            }
        }
        if !is_read {
            data.read_sparse(plain.start, buffer)?;
        }
        if !Arc::ptr_eq(&data, &self.data()) || is_read && epoch != self.epoch() {
            // Its place was taken meanwhile, or content was given up, for a reason.
            return Ok(None);
        }
        for (frame, content) in &from_memory {
            self.for_each_piece(*frame, content, |piece_offset, piece| {
                copy_overlap(piece_offset, piece, plain.start, buffer);
                Ok(())
            })?;
        }
        Ok(Some(len))
    }

    /// Writes the verified content of a frame; afterwards it is there.
    ///
    /// What came by another way before stays as it is.
    pub(crate) fn write_frame(&self, frame: u32, content: &[u8]) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut run_offset = 0;
        let mut written = Vec::new();
        let mut writing = lock(&self.writing);
        self.for_each_piece(frame, content, |piece_offset, piece| {
            // Files follow each other in both orders, so nothing but zeros lies between two pieces. Gaps shorter
            // than a block take no more disk when written, and save a system call a file.
            let run_end: u64 = run_offset + run.len() as u64;
            let is_near = piece_offset >= run_end && piece_offset - run_end < PLAIN_ALIGN;
            if !run.is_empty() && (!is_near || run.len() + piece.len() > RUN_LEN_MAX) {
                written.extend(self.write_missing(run_offset, &run)?);
                run.clear();
            }
            if run.is_empty() {
                if piece.len() >= RUN_LEN_MAX {
                    written.extend(self.write_missing(piece_offset, piece)?);
                    return Ok(());
                }
                run_offset = piece_offset;
            }
            let gap_len = usize::try_from(piece_offset - run_offset).map_err(io::Error::other)?;
            run.resize(gap_len, 0);
            run.extend_from_slice(piece);
            Ok(())
        })?;
        written.extend(self.write_missing(run_offset, &run)?);
        self.presence.note_frame(&self.index, frame);
        self.keep_checksums(&mut writing, &written);
        self.take_checksums(&mut writing, frame_runs(&self.index, frame));
        drop(writing);
        self.note_disk_took_it();
        Ok(())
    }

    /// Writes a part of a hot piece that starts at `plain_offset`; afterwards its pages are there.
    ///
    /// It must start with a page, and end with one or with its file.
    pub(crate) fn write_pages(&self, plain_offset: u64, content: &[u8]) -> io::Result<()> {
        let plain = plain_offset..plain_offset.saturating_add(content.len() as u64);
        if !self.presence.has_pages(&plain) {
            let mut writing = lock(&self.writing);
            let written = self.write_missing(plain_offset, content)?;
            self.presence.note_pages(&plain);
            self.keep_checksums(&mut writing, &written);
            self.take_checksums(&mut writing, std::iter::once(plain));
            drop(writing);
            self.note_disk_took_it();
        }
        Ok(())
    }

    /// Writes verified bytes that may start and end inside pages; [`Self::note_written`] makes them readable.
    pub(crate) fn write_bytes(&self, plain_offset: u64, content: &[u8]) -> io::Result<()> {
        let _writing = lock(&self.writing);
        self.write_missing(plain_offset, content).map(drop)
    }

    /// [`Self::write_bytes`] has written a plain range: what it completes is there afterwards.
    ///
    /// `written_until` says where the bytes end that were written at an offset, these included. All of them were since
    /// `epoch`; if content was given up meanwhile, nothing is known of them.
    pub(crate) fn note_written(&self, epoch: Epoch, plain: &Range<u64>, written_until: impl Fn(u64) -> Option<u64>) {
        let mut writing = lock(&self.writing);
        if epoch != self.epoch() {
            return;
        }
        self.presence.note_written(&self.index, plain, written_until);
        // A frame that has become whole has pages elsewhere too.
        let frames = needed_frames(&self.index, plain.clone()).flat_map(|frame| frame_runs(&self.index, frame));
        self.take_checksums(&mut writing, frames.chain(std::iter::once(plain.clone())));
        drop(writing);
        self.note_disk_took_it();
    }

    /// Content that is written from now on stays as long as this is the same.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Writes what of `content` lies in pages that are not there; the caller holds `writing`. Returns the checksums of
    /// the pages that it has written wholly.
    ///
    /// All content comes through here, and here it is decided that a page that is there is never written again,
    /// whatever comes for it later: who has read it, or has the file mounted, sees one content.
    fn write_missing(&self, offset: u64, content: &[u8]) -> io::Result<Vec<PageChecksum>> {
        let position = |at: u64| usize::try_from(at - offset).map_err(io::Error::other);
        let mut written = Vec::new();
        for run in self.presence.missing_runs(&(offset..offset.saturating_add(content.len() as u64))) {
            let content = &content[position(run.start)?..position(run.end)?];
            self.data().write_all_at(content, run.start)?;
            written.extend(self.checksums_of(run.start, content));
        }
        Ok(written)
    }

    fn note_disk_took_it(&self) {
        if self.is_disk_refusing.swap(false, Ordering::AcqRel) {
            self.unkept.forget(self.index_digest);
        }
        // Late content of a sealed layer has changed nothing.
        if !self.is_sealed() {
            self.has_unwritten_bits.store(true, Ordering::Release);
            self.ask_for_seal();
        }
    }

    /// Whether the directory has the file `dedup`.
    pub(crate) fn is_dedup_kept(&self) -> bool {
        matches!(self.directory.open_dedup(), Ok(Some(_)))
    }

    /// What other layers may copy from this one.
    pub(crate) fn copy_source(&self) -> io::Result<CopySource> {
        let (data, map) = (self.data().try_clone()?, self.presence.map().clone());
        Ok(CopySource::new(data, map, self.presence.snapshot().pages))
    }

    /// Keeps a frame in memory for a while because the disk did not take it.
    pub(crate) fn keep_in_memory(&self, frame: u32, content: Bytes) {
        self.unkept.keep(self.index_digest, frame, content);
        self.is_disk_refusing.store(true, Ordering::Release);
    }

    /// Whether the disk did not take the last frame: then there is no place for frames that nobody waits for.
    pub(crate) fn is_disk_refusing(&self) -> bool {
        self.is_disk_refusing.load(Ordering::Acquire)
    }

    fn find_unkept(&self, frame: u32) -> Option<(u32, Bytes)> {
        self.unkept.find(self.index_digest, frame).map(|content| (frame, content))
    }

    /// Makes durable what arrived: first data, then its bits.
    ///
    /// When the data cannot be made durable, what arrived since the last flush counts as missing again: the kernel may
    /// have given up any of it.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut flushed = lock(&self.flushed);
        // A sealed layer has nothing to write, also where a late writer of content that was there says otherwise: its
        // checksums are in the file alone.
        if !self.has_unwritten_bits.swap(false, Ordering::AcqRel) || self.is_sealed() {
            return Ok(());
        }
        let (mut bits, data) = {
            let writing = lock(&self.writing);
            let bits = self.presence.snapshot();
            (PresenceBits { checksums: writing.checksums.clone(), ..bits }, self.data())
        };
        if let Err(error) = data.sync_data() {
            let mut writing = lock(&self.writing);
            self.next_epoch();
            self.presence.forget(&self.index, &flushed);
            for (number, checksum) in (0..).zip(&mut writing.checksums) {
                *checksum = if self.presence.has_number(number) { *checksum } else { 0 };
            }
            self.doubt();
            return Err(error);
        }
        if let Err(error) = self.directory.write_presence(&bits, self.presence.counts(), &self.index_digest) {
            self.has_unwritten_bits.store(true, Ordering::Release);
            return Err(error);
        }
        let is_complete = bits.page_count() == self.presence.counts().pages;
        bits.checksums = Vec::new();
        *flushed = bits;
        if is_complete {
            // They are in the file.
            lock(&self.writing).checksums = Vec::new();
            *lock(&self.seal) = true;
            self.sealed.notify_all();
        }
        Ok(())
    }

    /// The directory. A directory that was moved away with [`LayerDirectory::bury`] is not written to any longer; open
    /// readers go on.
    pub(crate) fn directory(&self) -> &LayerDirectory {
        &self.directory
    }

    /// Calls `piece` with plain offset and bytes for every run of file content in a frame, ascending.
    pub(crate) fn for_each_piece(
        &self,
        frame: u32,
        content: &[u8],
        mut piece: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(record) = self.index.frames().get(frame as usize) else { return Ok(()) };
        let tar = record.tar_range();
        let extents = self.index.extents();
        for extent in self.index.extents_in_tar(&tar).filter_map(|number| extents.get(number)) {
            let extent_tar = extent.tar_range();
            let overlap = extent_tar.start.max(tar.start)..extent_tar.end.min(tar.end);
            let start = usize::try_from(overlap.start.saturating_sub(tar.start)).map_err(io::Error::other)?;
            let end = usize::try_from(overlap.end.saturating_sub(tar.start)).map_err(io::Error::other)?;
            let bytes =
                content.get(start..end).ok_or_else(|| io::Error::other("frame is shorter than its index says"))?;
            piece(extent.plain_offset.get().saturating_add(overlap.start - extent_tar.start), bytes)?;
        }
        Ok(())
    }
}

impl Drop for FrameStore {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::warn!(layer = %self.directory.path().display(), %error, "what arrived last is fetched again");
        }
    }
}

/// Copies the part of `piece`, which lies at `piece_offset`, that falls into `buffer` at `buffer_offset`.
fn copy_overlap(piece_offset: u64, piece: &[u8], buffer_offset: u64, buffer: &mut [u8]) {
    let start = piece_offset.max(buffer_offset);
    let end = (piece_offset + piece.len() as u64).min(buffer_offset + buffer.len() as u64);
    if start >= end {
        return;
    }
    let position = |offset: u64, base: u64| usize::try_from(offset - base).expect("inside a slice");
    buffer[position(start, buffer_offset)..position(end, buffer_offset)]
        .copy_from_slice(&piece[position(start, piece_offset)..position(end, piece_offset)]);
}
