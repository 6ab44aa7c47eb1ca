//! One layer: its index, and its plain address space as far as it has arrived.

use std::{
    fmt, io,
    ops::Range,
    path::PathBuf,
    sync::{Arc, mpsc},
    time::Duration,
};

use format_spec::{Digest, LazyLayer, footer::SKIPPABLE_HEADER_LEN};
use serde_json::Value;
use tokio::runtime::Handle;

use crate::{
    dedup::Copies,
    directory::{LayerDirectory, LayerRecord},
    disk::is_lost,
    error::ReadError,
    frame_store::{FrameStore, UnkeptFrames},
    hot_pack::HotStream,
    mapping::LayerIndex,
    places::Places,
    presence::{frame_runs, needed_frames},
    read_ahead::ReadAhead,
    scheduler::{Activity, Priority, Scheduler},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock,
    },
    verdict::Verdict,
};

/// Times a read fetches what it needs: more than once only if content vanishes between arrival and read.
const READ_ATTEMPTS_MAX: u32 = 4;

/// How much of a layer has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Frames whose file content is in the cache, however it came.
    pub frames_present: u64,
    /// Frames that hold file content; others are never fetched.
    pub frames_total: u64,
    /// Compressed bytes that this process fetched: index, hot pack, dedup section and frames.
    pub fetched_bytes: u64,
    /// Those of them that were frames of the hot pack and are in the cache.
    pub hot_bytes: u64,
    /// Bytes of content that this process copied from other layers.
    pub copied_bytes: u64,
    /// Pages of 4 KiB that this process found damaged in the cache, and gave up to be fetched again.
    pub healed_pages: u64,
}

/// A layer of the cache. Cheap to clone; safe from many threads.
#[derive(Debug, Clone)]
pub struct Layer {
    inner: Arc<LayerInner>,
}

/// What the parts of this crate share about a layer.
pub(crate) struct LayerInner {
    /// Unique in the process; unlike the digest never used again after the layer was removed.
    pub(crate) number: u64,
    pub(crate) store: FrameStore,
    pub(crate) layer: LazyLayer,
    pub(crate) places: Arc<Places>,
    /// Held while the places are written down, so that the last ones are the last written. Never on the reactor.
    places_writer: Mutex<()>,
    pub(crate) scheduler: Arc<Scheduler>,
    read_ahead: Mutex<ReadAhead>,
    /// The hot pack, while it is received.
    pub(crate) hot: Mutex<Option<Arc<HotStream>>>,
    pub(crate) copies: Mutex<Copies>,
    fetched_bytes: AtomicU64,
    hot_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    is_removed: AtomicBool,
}

impl Layer {
    pub(crate) fn new(
        number: u64,
        layer: LazyLayer,
        store: FrameStore,
        places: Arc<Places>,
        scheduler: Arc<Scheduler>,
        fetched_bytes: u64,
    ) -> Self {
        let inner = Arc::new(LayerInner {
            number,
            store,
            layer,
            places,
            places_writer: Mutex::default(),
            scheduler,
            read_ahead: Mutex::default(),
            hot: Mutex::default(),
            copies: Mutex::default(),
            fetched_bytes: AtomicU64::new(fetched_bytes),
            hot_bytes: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            is_removed: AtomicBool::new(false),
        });
        inner.scheduler.set_layer(&inner);
        Self { inner }
    }

    pub(crate) fn inner(&self) -> &Arc<LayerInner> {
        &self.inner
    }

    /// What names this layer.
    pub fn lazy_layer(&self) -> &LazyLayer {
        &self.inner.layer
    }

    /// What a caller of [`crate::Cache::layer`] gave for the newest place of this layer.
    pub fn description(&self) -> Value {
        self.inner.description()
    }

    /// What callers gave for all its places, newest first.
    pub fn descriptions(&self) -> Vec<Value> {
        self.inner.places.descriptions()
    }

    /// The index.
    pub fn index(&self) -> &LayerIndex {
        self.inner.store.index()
    }

    /// Reads from the plain address space what is there already; never waits for the source.
    ///
    /// `Ok(None)` when some is missing: see [`Self::read_then`]. Otherwise the number of bytes read: all of
    /// `buffer`, or less where the space ends. What lies between files and in their holes reads as zeros and
    /// needs nothing.
    ///
    /// # Errors
    ///
    /// When the cache file cannot be read, or the layer is refused.
    pub fn read_at_if_present(&self, offset: u64, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.inner.check_not_refused().map_err(io::Error::other)?;
        let read = match self.inner.store.read_present(offset, buffer, &UnkeptFrames::new()) {
            // Whoever waits for it has it fetched again.
            Err(error) if is_lost(&error) => return Ok(None),
            read => read?,
        };
        if let Some(len) = read {
            self.read_ahead(offset..offset.saturating_add(len as u64));
        }
        Ok(read)
    }

    /// Reads `len` bytes at `offset` of the plain address space, fetching what is missing; does not block.
    ///
    /// `done` gets exactly the bytes asked for, cut where the space ends. It runs at once on the calling
    /// thread when everything is there, else later on a worker thread where it may block shortly. It always
    /// runs. When the disk is full the bytes come from memory.
    pub fn read_then(&self, offset: u64, len: usize, done: impl FnOnce(Result<Vec<u8>, ReadError>) + Send + 'static) {
        self.read_attempt(offset, len, UnkeptFrames::new(), READ_ATTEMPTS_MAX, Box::new(done));
    }

    fn read_attempt(
        &self,
        offset: u64,
        len: usize,
        unkept: UnkeptFrames,
        attempts_left: u32,
        done: Box<dyn FnOnce(Result<Vec<u8>, ReadError>) + Send>,
    ) {
        if let Err(error) = self.inner.check_not_refused() {
            return done(Err(error));
        }
        let plain = self.inner.store.clip(offset, len);
        let mut bytes = vec![0; usize::try_from(plain.end - plain.start).unwrap_or(len)];
        let disk_error = |error| ReadError::Disk { blob: self.inner.blob(), error: Arc::new(error) };
        match self.inner.store.read_present(plain.start, &mut bytes, &unkept) {
            Err(error) if is_lost(&error) && attempts_left > 0 => {
                let layer = self.clone();
                self.inner.runtime().spawn_blocking(move || {
                    if let Err(error) = layer.inner.heal(plain) {
                        let blob = layer.inner.blob();
                        return done(Err(ReadError::Disk { blob, error: Arc::new(error) }));
                    }
                    layer.read_attempt(offset, len, unkept, attempts_left - 1, done);
                });
                return;
            }
            Err(error) => return done(Err(disk_error(error))),
            Ok(Some(_)) => {
                if attempts_left == READ_ATTEMPTS_MAX {
                    self.read_ahead(plain);
                }
                return done(Ok(bytes));
            }
            Ok(None) if attempts_left == 0 => {
                return done(Err(disk_error(io::Error::other("content vanishes as soon as it arrives"))));
            }
            Ok(None) => {}
        }
        drop(bytes);
        let layer = self.clone();
        let arrived = move |arrived| match arrived {
            Err(error) => done(Err(error)),
            Ok(unkept) => layer.read_attempt(offset, len, unkept, attempts_left - 1, done),
        };
        self.inner.bring(plain.clone(), Priority::Read, Box::new(arrived));
        if attempts_left == READ_ATTEMPTS_MAX {
            self.read_ahead(plain);
        }
    }

    /// Like [`Self::read_then`], blocking; not for threads of a runtime.
    ///
    /// # Errors
    ///
    /// [`ReadError::Corrupt`] when a frame does not match its digest: never returns unverified bytes.
    /// [`ReadError::Source`] when no place of the layer answered as long as readers wait; a later call may succeed.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.read_then(offset, len, move |result| drop(sender.send(result)));
        receiver.recv().unwrap_or(Err(ReadError::Stopped(self.inner.blob())))
    }

    /// Like [`Self::read_then`], as a future.
    ///
    /// # Errors
    ///
    /// Those of [`Self::read`].
    pub async fn read_async(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.read_then(offset, len, move |result| drop(sender.send(result)));
        receiver.await.unwrap_or(Err(ReadError::Stopped(self.inner.blob())))
    }

    /// Brings a plain range into the cache; does not block.
    ///
    /// `done` runs when all are there or one failed: at once on the calling thread, or on a worker thread. It
    /// always runs. With a full disk, "there" means in memory for a while: a reader that must not miss its bytes
    /// uses [`Self::read_then`].
    pub fn fetch(
        &self,
        plain: Range<u64>,
        priority: Priority,
        done: impl FnOnce(Result<(), ReadError>) + Send + 'static,
    ) {
        let end = plain.end.min(self.index().space_len());
        let plain = plain.start.min(end)..end;
        self.inner.bring(plain.clone(), priority, Box::new(|arrived| done(arrived.map(drop))));
        if priority == Priority::Read {
            self.read_ahead(plain);
        }
    }

    /// Whether all file content is in the cache.
    pub fn is_complete(&self) -> bool {
        self.inner.store.is_complete()
    }

    /// Whether nothing is fetched of it any longer: all content is there, and the verdict where one comes by itself.
    pub fn is_settled(&self) -> bool {
        let proof = self.inner.store.proof();
        self.is_complete() && (proof.verdict().is_some() || proof.may_leave())
    }

    /// Whether the layer is what its tar stream says, once that is known.
    pub fn verdict(&self) -> Option<Verdict> {
        self.inner.store.proof().verdict()
    }

    /// Has the verdict found out now and at full speed; [`Self::verdict`] tells when it is there. Does not wait.
    pub fn verify(&self) {
        self.inner.verify_in_haste();
    }

    /// The file that is the plain address space, once everything is in it and durable; `None` before that, and where a
    /// verdict is to come as long as there is none.
    ///
    /// It becomes durable soon after [`Self::is_complete`], or with [`Self::flush`]. Nothing is written to the file any
    /// longer, by no later process either. It is gone with the layer, but not for who has it open or mounted.
    pub fn complete_file(&self) -> Option<PathBuf> {
        self.inner.store.sealed_data_path().filter(|_| self.inner.store.proof().may_leave())
    }

    /// [`Self::complete_file`], after a short wait for a complete layer to become durable; blocks.
    pub fn complete_file_within(&self, timeout: Duration) -> Option<PathBuf> {
        self.inner.store.wait_for_seal(timeout);
        self.complete_file()
    }

    /// How much has arrived.
    pub fn progress(&self) -> Progress {
        self.inner.progress()
    }

    /// What is being fetched now.
    pub fn activity(&self) -> Activity {
        self.inner.scheduler.activity(&self.inner)
    }

    /// The runs of the plain address space whose content a frame holds, ascending; none for unknown frames.
    pub fn frame_runs(&self, frame: u32) -> impl Iterator<Item = Range<u64>> {
        frame_runs(self.index(), frame)
    }

    /// Makes what arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// [`ReadError::Disk`] when the disk refuses.
    pub fn flush(&self) -> Result<(), ReadError> {
        let blob = self.inner.blob();
        self.inner.store.flush().map_err(|error| ReadError::Disk { blob, error: Arc::new(error) })
    }

    /// Keeps the places for the next process; blocks.
    pub(crate) fn write_places(&self) -> io::Result<()> {
        let _writing = lock(&self.inner.places_writer);
        let record = LayerRecord::new(self.inner.layer, self.descriptions());
        self.inner.store.directory().write_record(&record)
    }

    /// Stops fetching, and ends every wait for what is not under way.
    pub(crate) fn stop(&self) {
        self.inner.is_removed.store(true, Ordering::Release);
        self.inner.scheduler.forget(self.inner.number);
    }

    /// The layer's directory.
    pub(crate) fn directory(&self) -> &LayerDirectory {
        self.inner.store.directory()
    }

    /// Notes a read and fetches what its file's reader wants next.
    fn read_ahead(&self, plain: Range<u64>) {
        let index = self.index();
        if self.is_complete() || self.inner.store.is_disk_refusing() || self.inner.are_copies_sought() {
            return;
        }
        let mut frames = needed_frames(index, plain.clone());
        let Some(first) = frames.next() else { return };
        let last = frames.last().unwrap_or(first);
        // Inodes without content carry the offset of the file before them, so one search finds both its ends.
        let after = index.inodes().partition_point(|inode| inode.plain_offset.get() < plain.end);
        let offset_of = |number: usize| index.inodes().get(number).map(|inode| inode.plain_offset.get());
        let file_start = after.checked_sub(1).and_then(offset_of).unwrap_or(0);
        let file_end = offset_of(after).unwrap_or(index.space_len());
        let count = lock(&self.inner.read_ahead).note_read(file_start, first..last.saturating_add(1));
        if count == 0 {
            return;
        }
        let ahead = needed_frames(index, plain.end..file_end.max(plain.end)).skip_while(|frame| *frame <= last);
        let ahead: Vec<u32> = ahead.take(count as usize).filter(|frame| !self.inner.is_frame_coming(*frame)).collect();
        self.inner.scheduler.want(&self.inner, ahead, Priority::HotPack, None);
    }
}

impl LayerInner {
    /// Compares the content of a plain range with its checksums; what is damaged counts as missing afterwards. Blocks.
    pub(crate) fn heal(&self, plain: Range<u64>) -> io::Result<()> {
        // Copies that are under way say what they have written.
        if self.is_removed() || self.is_starting_up() {
            return Ok(());
        }
        let plain = plain.start..plain.end.min(self.store.index().space_len());
        let damaged = self.store.find_damaged(&plain)?;
        self.store.heal(&damaged)
    }

    /// Digest of the blob.
    pub(crate) fn blob(&self) -> Digest {
        self.layer.blob
    }

    /// What a caller of [`crate::Cache::layer`] gave for the newest place.
    pub(crate) fn description(&self) -> Value {
        self.places.newest().map(|place| place.description.clone()).unwrap_or_default()
    }

    /// A refused layer shows nothing.
    pub(crate) fn check_not_refused(&self) -> Result<(), ReadError> {
        let refused = |reason| ReadError::Refused { blob: self.blob(), reason };
        self.store.proof().refusal().map_or(Ok(()), |reason| Err(refused(reason)))
    }

    /// The first content from a plain offset on that is not in the cache.
    pub(crate) fn first_missing(&self, from: u64) -> Option<Range<u64>> {
        let frame = self.store.missing_frames(&(from..self.store.index().space_len())).next()?;
        frame_runs(self.store.index(), frame).find(|run| run.end > from && !self.store.has(run))
    }

    /// Compressed bytes that this process fetched.
    pub(crate) fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    /// Whether the layer was removed from the cache.
    pub(crate) fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::Acquire)
    }

    /// Bytes came from the source.
    pub(crate) fn count_fetched(&self, len: usize) {
        self.fetched_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// Offset of the hot pack in the blob.
    pub(crate) fn hot_start(&self) -> u64 {
        self.layer.index.range().end.saturating_add(SKIPPABLE_HEADER_LEN)
    }

    /// The bytes of the blob that hold the dedup section, which has this length (SPEC.md 5.9).
    pub(crate) fn dedup_range(&self, compressed_len: u64) -> Range<u64> {
        let hot_len = self.store.index().hot_len();
        let before = if hot_len == 0 { 0 } else { hot_len.saturating_add(SKIPPABLE_HEADER_LEN) };
        let start = self.hot_start().saturating_add(before);
        start..start.saturating_add(compressed_len)
    }

    /// Bytes of the hot pack are in the cache.
    pub(crate) fn count_hot(&self, len: usize) {
        self.hot_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// Bytes were copied from another layer.
    pub(crate) fn count_copied(&self, len: u64) {
        self.copied_bytes.fetch_add(len, Ordering::Relaxed);
    }

    /// How much has arrived.
    pub(crate) fn progress(&self) -> Progress {
        Progress {
            frames_present: self.store.present_frame_count(),
            frames_total: self.store.needed_frame_count(),
            fetched_bytes: self.fetched_bytes(),
            hot_bytes: self.hot_bytes.load(Ordering::Relaxed),
            copied_bytes: self.copied_bytes.load(Ordering::Relaxed),
            healed_pages: self.store.healed_pages.load(Ordering::Relaxed),
        }
    }

    /// The runtime that this layer's transfers run on.
    pub(crate) fn runtime(&self) -> &Handle {
        self.scheduler.runtime()
    }
}

impl fmt::Debug for LayerInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerInner").field("layer", &self.layer).finish_non_exhaustive()
    }
}
