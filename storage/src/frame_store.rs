//! The content of one layer on disk: what is there, how it gets in, how bytes come out.
//!
//! Everything that depends on the order "data before bit, bit before read" stands here. There is no
//! network and no waiting in this file.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use format_spec::{Digest, index::PLAIN_ALIGN};

use crate::{
    dedup::CopySource,
    directory::LayerDirectory,
    layer::LayerIndex,
    presence::{Counts, Presence, PresenceBits, needed_frames},
    proof::Proof,
};

/// Frames kept in memory when the disk does not take them; older ones give way. At usual frame sizes a few
/// megabytes a layer, enough that the reads of one file do not fetch the same frame again and again.
const UNKEPT_FRAMES_MAX: usize = 8;
/// Longest run of files assembled for one write, in bytes.
const WRITE_LEN_MAX: usize = 1 << 20;

/// Frames by number with their plain bytes, which the disk did not take.
pub(crate) type UnkeptFrames = Vec<(u32, Bytes)>;

/// The content of one layer.
#[derive(Debug)]
pub(crate) struct FrameStore {
    directory: LayerDirectory,
    index: LayerIndex,
    index_digest: Digest,
    data: File,
    presence: Presence,
    proof: Proof,
    has_unwritten_bits: AtomicBool,
    unkept: Mutex<VecDeque<(u32, Bytes)>>,
    has_unkept: AtomicBool,
    is_disk_refusing: AtomicBool,
    /// The bits of the file `presence`; the lock is held while files are written.
    durable: Mutex<Durable>,
}

#[derive(Debug)]
struct Durable {
    bits: PresenceBits,
    /// The directory was removed: nothing may be written under its name any longer.
    is_removed: bool,
}

impl FrameStore {
    /// Opens the files beside an index that was verified against `index_digest`.
    pub(crate) fn open(directory: LayerDirectory, index: LayerIndex, index_digest: Digest) -> io::Result<Self> {
        let (data, bits) = directory.open_data(index.space_len(), Counts::of(&index), &index_digest)?;
        let presence = Presence::new(&index, bits);
        let proof = Proof::open(&directory, &index, index_digest, presence.is_complete())?;
        Ok(Self {
            proof,
            directory,
            index_digest,
            data,
            has_unwritten_bits: AtomicBool::new(false),
            unkept: Mutex::default(),
            has_unkept: AtomicBool::new(false),
            is_disk_refusing: AtomicBool::new(false),
            durable: Mutex::new(Durable { bits: presence.snapshot(), is_removed: false }),
            presence,
            index,
        })
    }

    /// The index.
    pub(crate) fn index(&self) -> &LayerIndex {
        &self.index
    }

    /// What is known of its truth.
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

    /// The file that holds the content.
    pub(crate) fn data_path(&self) -> PathBuf {
        self.directory.data_path()
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
        read_sparse(&self.data, plain_offset, buffer)
    }

    /// Where the file holds something from an offset on: in between it reads as zeros.
    pub(crate) fn next_stored(&self, plain_offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.data, rustix::fs::SeekFrom::Data(plain_offset)) {
            Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
            found => Ok(found?),
        }
    }

    /// Cuts a plain range where the space ends.
    pub(crate) fn clip(&self, offset: u64, len: usize) -> Range<u64> {
        let end = offset.saturating_add(len as u64).min(self.index.space_len());
        offset.min(end)..end
    }

    /// Reads from `offset`, if all content needed is there, in `extra` or among the frames the disk did not take.
    ///
    /// `Ok(None)` when some is missing. Otherwise the bytes read: all of `buffer`, or less where the space ends.
    pub(crate) fn read_present(
        &self,
        offset: u64,
        buffer: &mut [u8],
        extra: &UnkeptFrames,
    ) -> io::Result<Option<usize>> {
        let plain = self.clip(offset, buffer.len());
        let mut from_memory = UnkeptFrames::new();
        if !self.presence.has_pages(&plain) {
            for frame in self.missing_frames(&plain) {
                match extra.iter().find(|(number, _)| *number == frame).cloned().or_else(|| self.find_unkept(frame)) {
                    Some(unkept) => from_memory.push(unkept),
                    None => return Ok(None),
                }
            }
        }
        let len = usize::try_from(plain.end - plain.start).map_err(io::Error::other)?;
        let buffer = &mut buffer[..len];
        read_sparse(&self.data, plain.start, buffer)?;
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
        self.for_each_piece(frame, content, |piece_offset, piece| {
            let is_there = self.presence.has_pages(&(piece_offset..piece_offset + piece.len() as u64));
            // Files follow each other in both orders, so nothing but zeros lies between two pieces. Gaps shorter
            // than a block take no more disk when written, and save a system call a file.
            let run_end: u64 = run_offset + run.len() as u64;
            let is_near = piece_offset >= run_end && piece_offset - run_end < PLAIN_ALIGN;
            if !run.is_empty() && (is_there || !is_near || run.len() + piece.len() > WRITE_LEN_MAX) {
                self.data.write_all_at(&run, run_offset)?;
                run.clear();
            }
            if is_there {
                return Ok(());
            }
            if run.is_empty() {
                run_offset = piece_offset;
            }
            let gap_len = usize::try_from(piece_offset - run_offset).map_err(io::Error::other)?;
            run.resize(gap_len, 0);
            run.extend_from_slice(piece);
            Ok(())
        })?;
        self.data.write_all_at(&run, run_offset)?;
        self.presence.note_frame(&self.index, frame);
        self.note_disk_took_it();
        Ok(())
    }

    /// Writes a part of a hot piece that starts at `plain_offset`; afterwards its pages are there.
    ///
    /// It must start with a page, and end with one or with its file.
    pub(crate) fn write_pages(&self, plain_offset: u64, content: &[u8]) -> io::Result<()> {
        let plain = plain_offset..plain_offset.saturating_add(content.len() as u64);
        if !self.presence.has_pages(&plain) {
            self.data.write_all_at(content, plain_offset)?;
            self.presence.note_pages(&plain);
            self.note_disk_took_it();
        }
        Ok(())
    }

    /// Writes verified bytes that may start and end inside pages; [`Self::note_written`] makes them readable.
    pub(crate) fn write_bytes(&self, plain_offset: u64, content: &[u8]) -> io::Result<()> {
        self.data.write_all_at(content, plain_offset)
    }

    /// [`Self::write_bytes`] has written a plain range: what it completes is there afterwards.
    ///
    /// `written_until` says where the bytes end that were written at an offset, these included.
    pub(crate) fn note_written(&self, plain: &Range<u64>, written_until: impl Fn(u64) -> Option<u64>) {
        self.presence.note_written(&self.index, plain, written_until);
        self.note_disk_took_it();
    }

    fn note_disk_took_it(&self) {
        self.is_disk_refusing.store(false, Ordering::Release);
        self.has_unwritten_bits.store(true, Ordering::Release);
    }

    /// Whether the directory has the file `dedup`.
    pub(crate) fn is_dedup_kept(&self) -> bool {
        matches!(self.directory.open_dedup(), Ok(Some(_)))
    }

    /// What other layers may copy from this one.
    pub(crate) fn copy_source(&self) -> io::Result<CopySource> {
        Ok(CopySource { data: self.data.try_clone()?, pages: self.presence.snapshot().pages })
    }

    /// Keeps a frame in memory for a while because the disk did not take it.
    pub(crate) fn keep_in_memory(&self, frame: u32, content: Bytes) {
        let mut unkept = lock(&self.unkept);
        unkept.retain(|(number, _)| *number != frame);
        unkept.push_back((frame, content));
        if unkept.len() > UNKEPT_FRAMES_MAX {
            unkept.pop_front();
        }
        self.has_unkept.store(true, Ordering::Release);
        self.is_disk_refusing.store(true, Ordering::Release);
    }

    /// Whether the disk did not take the last frame: then there is no place for frames that nobody waits for.
    pub(crate) fn is_disk_refusing(&self) -> bool {
        self.is_disk_refusing.load(Ordering::Acquire)
    }

    fn find_unkept(&self, frame: u32) -> Option<(u32, Bytes)> {
        if !self.has_unkept.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.unkept).iter().find(|(number, _)| *number == frame).cloned()
    }

    /// Makes durable what arrived: first data, then its bits.
    ///
    /// When the data cannot be made durable, what arrived since counts as missing again.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut durable = lock(&self.durable);
        if durable.is_removed || !self.has_unwritten_bits.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let bits = self.presence.snapshot();
        if let Err(error) = self.data.sync_data() {
            self.presence.forget(&bits, &durable.bits);
            return Err(error);
        }
        if let Err(error) = self.directory.write_presence(&bits, Counts::of(&self.index), &self.index_digest) {
            self.has_unwritten_bits.store(true, Ordering::Release);
            return Err(error);
        }
        durable.bits = bits;
        Ok(())
    }

    /// Runs `remove` on the directory; nothing is written there afterwards. Open readers go on.
    pub(crate) fn remove<T>(&self, remove: impl FnOnce(&LayerDirectory) -> io::Result<T>) -> io::Result<T> {
        let mut durable = lock(&self.durable);
        durable.is_removed = true;
        remove(&self.directory)
    }

    /// Runs `write` on the directory unless it was removed.
    pub(crate) fn write(&self, write: impl FnOnce(&LayerDirectory) -> io::Result<()>) -> io::Result<()> {
        let durable = lock(&self.durable);
        if durable.is_removed { Ok(()) } else { write(&self.directory) }
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

/// Fills `buffer` from `offset`; zeros past the end of the file.
fn read_sparse(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[filled..].fill(0);
    Ok(())
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

/// Locks; a panic elsewhere leaves these values whole, as each is changed in one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
