//! One layer: its index, and its plain address space as far as it has arrived.

use std::{
    fmt, io,
    ops::Range,
    path::PathBuf,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use format_spec::LazyLayer;
use serde_json::Value;

use crate::{
    disk::{
        directory::LayerDirectory,
        frame_store::UnkeptFrames,
        is_lost,
        mapping::LayerIndex,
        presence::{frame_runs, needed_frames},
        verdict::Verdict,
    },
    error::ReadError,
    fetch::{
        read_ahead::ReadAhead,
        scheduler::{Activity, Priority, Scheduler},
        wait::Wait,
    },
    layer_core::{LayerCore, Progress},
    sync::{Mutex, MutexGuard, lock},
    touched::{Recorder, Touch},
    verify::verify_in_haste,
    waits::Waits,
    warm::{Event, Warm, dedup::CopyPlan, hot_pack::HotStream},
};

/// Times a read fetches what it needs: more than once only if content vanishes between arrival and read.
const READ_ATTEMPTS_MAX: u32 = 4;

/// Plain bytes that are compared between two looks at the clock.
const CHECK_LEN: u64 = 1 << 20;

/// A layer of the cache. Cheap to clone; safe from many threads.
#[derive(Debug, Clone)]
pub struct Layer {
    inner: Arc<LayerInner>,
}

/// Content that comes for a layer without being asked for.
pub(crate) type LayerWarm = Warm<Arc<HotStream>, Arc<CopyPlan>, Arc<Wait>>;

/// A layer and what brings its content.
pub(crate) struct LayerInner {
    pub(crate) core: Arc<LayerCore>,
    pub(crate) scheduler: Arc<Scheduler>,
    read_ahead: Mutex<ReadAhead>,
    recorder: Recorder,
    warm: Mutex<LayerWarm>,
}

impl Layer {
    /// A layer that is open: from now on `scheduler` makes requests for it.
    pub(crate) fn new(core: Arc<LayerCore>, scheduler: Arc<Scheduler>) -> Self {
        scheduler.set_layer(&core);
        let (read_ahead, recorder, warm) = (Mutex::default(), Recorder::new(core.store.is_empty()), Mutex::default());
        Self { inner: Arc::new(LayerInner { core, scheduler, read_ahead, recorder, warm }) }
    }

    pub(crate) fn inner(&self) -> &Arc<LayerInner> {
        &self.inner
    }

    pub(crate) fn core(&self) -> &Arc<LayerCore> {
        &self.inner.core
    }

    /// What names this layer.
    pub fn lazy_layer(&self) -> &LazyLayer {
        &self.core().layer
    }

    /// The description that a caller of [`crate::Cache::layer`] gave for the newest place of this layer.
    pub fn description(&self) -> Value {
        self.core().description()
    }

    /// The descriptions that callers gave for all its places, newest first.
    pub fn descriptions(&self) -> Vec<Value> {
        self.core().places.descriptions()
    }

    /// The index.
    pub fn index(&self) -> &LayerIndex {
        self.core().store.index()
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
        self.core().check_not_refused().map_err(io::Error::other)?;
        let read = match self.core().store.read_present(offset, buffer, &UnkeptFrames::new()) {
            // Whoever waits for it has it fetched again.
            Err(error) if is_lost(&error) => return Ok(None),
            read => read?,
        };
        if let Some(len) = read {
            self.note_read(offset..offset.saturating_add(len as u64));
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
        if let Err(error) = self.core().check_not_refused() {
            return done(Err(error));
        }
        let plain = self.core().store.clip(offset, len);
        let mut bytes = vec![0; usize::try_from(plain.end - plain.start).unwrap_or(len)];
        let disk_error = |error| ReadError::Disk { blob: self.core().blob(), error: Arc::new(error) };
        match self.core().store.read_present(plain.start, &mut bytes, &unkept) {
            Err(error) if is_lost(&error) && attempts_left > 0 => {
                let layer = self.clone();
                self.core().runtime().spawn_blocking(move || {
                    if let Err(error) = layer.inner.heal(plain) {
                        let blob = layer.core().blob();
                        return done(Err(ReadError::Disk { blob, error: Arc::new(error) }));
                    }
                    layer.read_attempt(offset, len, unkept, attempts_left - 1, done);
                });
                return;
            }
            Err(error) => return done(Err(disk_error(error))),
            Ok(Some(_)) => {
                if attempts_left == READ_ATTEMPTS_MAX {
                    self.note_read(plain);
                }
                return done(Ok(bytes));
            }
            Ok(None) if attempts_left == 0 => {
                return done(Err(disk_error(io::Error::other("content vanishes as soon as it arrives"))));
            }
            Ok(None) => {}
        }
        drop(bytes);
        let is_first = attempts_left == READ_ATTEMPTS_MAX;
        if is_first {
            // Before the answer: who reads on, or ends the recording, when it is there finds it noted.
            self.inner.recorder.note(&plain);
        }
        let layer = self.clone();
        let arrived = move |arrived| match arrived {
            Err(error) => done(Err(error)),
            Ok(unkept) => layer.read_attempt(offset, len, unkept, attempts_left - 1, done),
        };
        self.inner.bring(plain.clone(), Priority::Read, Box::new(arrived));
        if is_first {
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
        receiver.recv().unwrap_or(Err(ReadError::Stopped(self.core().blob())))
    }

    /// Like [`Self::read_then`], as a future.
    ///
    /// # Errors
    ///
    /// Those of [`Self::read`].
    pub async fn read_async(&self, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.read_then(offset, len, move |result| drop(sender.send(result)));
        receiver.await.unwrap_or(Err(ReadError::Stopped(self.core().blob())))
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
        self.core().store.is_complete()
    }

    /// Whether nothing is fetched of it any longer: all content is there, and the verdict where one comes by itself.
    pub fn is_settled(&self) -> bool {
        let proof = self.core().store.proof();
        self.is_complete() && (proof.verdict().is_some() || proof.may_leave())
    }

    /// Whether the layer is what its tar stream says, once that is known.
    pub fn verdict(&self) -> Option<Verdict> {
        self.core().store.proof().verdict()
    }

    /// Has the verdict found out now and at full speed; [`Self::verdict`] tells when it is there. Does not wait.
    pub fn verify(&self) {
        verify_in_haste(self.core(), &self.inner.scheduler);
    }

    /// The file that is the plain address space, once everything is in it and durable; `None` before that, where a verdict
    /// is to come as long as there is none, and as long as content of an earlier process was not compared with its
    /// checksums.
    ///
    /// It becomes durable soon after [`Self::is_complete`], or with [`Self::flush`]. Nothing is written to the file any
    /// longer, by no later process either; where the disk has changed it, another file takes its place
    /// ([`Self::file_number`]). It is gone with the layer, but not for who has it open or mounted.
    pub fn complete_file(&self) -> Option<PathBuf> {
        self.core().store.sealed_data_path().filter(|_| self.core().store.proof().may_leave())
    }

    /// [`Self::complete_file`], after a short wait for a complete layer to become durable, and for its content to be
    /// compared where that is possible in this time; otherwise it is compared in the background, soon. Blocks.
    pub fn complete_file_within(&self, timeout: Duration) -> Option<PathBuf> {
        let deadline = Instant::now() + timeout;
        self.core().store.wait_for_seal(timeout);
        if self.core().store.is_sealed() {
            self.inner.check_until(deadline);
        }
        self.complete_file()
    }

    /// The inode number of the file that has the content: another one from the moment on when the disk was found to have
    /// changed what may be mounted.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn file_number(&self) -> io::Result<u64> {
        self.core().store.data().number()
    }

    /// How much has arrived.
    pub fn progress(&self) -> Progress {
        self.core().progress()
    }

    /// What is being fetched now.
    pub fn activity(&self) -> Activity {
        self.inner.scheduler.activity(self.core().number)
    }

    /// The waits of its readers until now.
    pub fn waits(&self) -> Waits {
        self.core().waits.waits(Instant::now())
    }

    /// The best rate at which one request brought bytes of it, in bytes a second; `None` where none was long enough to
    /// tell.
    pub fn best_rate(&self) -> Option<u64> {
        self.core().places.best_rate()
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
        self.core().flush()
    }

    /// Stops fetching, and ends every wait for what is not under way.
    pub(crate) fn stop(&self) {
        self.core().note_removed();
        self.inner.scheduler.forget(self.core().number);
    }

    /// The layer's directory.
    pub(crate) fn directory(&self) -> &LayerDirectory {
        self.core().store.directory()
    }

    /// Records what is read of it from now on, up to `touches_max` reads that touch something new: some 60 bytes of memory
    /// each. Forgets what was recorded before.
    pub fn begin_recording(&self, touches_max: usize) {
        self.inner.recorder.begin(touches_max);
    }

    /// Records no longer, and forgets what was.
    pub fn end_recording(&self) {
        self.inner.recorder.end();
    }

    /// The ranges that were recorded, in the order of first touch.
    pub fn touches(&self) -> Vec<Touch> {
        self.inner.recorder.touches()
    }

    /// How many those are.
    pub fn touch_count(&self) -> usize {
        self.inner.recorder.touch_count()
    }

    /// Whether nothing of it was in the cache when it was opened, and nothing of it was read since: whoever reads it now
    /// is seen to.
    pub fn is_fresh(&self) -> bool {
        self.inner.recorder.is_fresh()
    }

    fn note_read(&self, plain: Range<u64>) {
        self.inner.recorder.note(&plain);
        self.read_ahead(plain);
    }

    /// Notes a read and fetches what its file's reader wants next.
    fn read_ahead(&self, plain: Range<u64>) {
        let index = self.index();
        self.core().note_read_end(plain.end);
        if self.is_complete() || self.core().store.is_disk_refusing() || self.inner.warm().is_sought() {
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
        let scheduler = &self.inner.scheduler;
        let new = scheduler.unwanted(self.core(), &ahead);
        scheduler.want(self.core(), ahead, Priority::HotPack, None);
        // Where every place is left alone at this moment, nothing comes of it.
        let new = scheduler.wanted(self.core(), &new);
        let len_of = |frame: u32| index.frames().get(frame as usize).map(|record| record.compressed_len.get());
        self.core().count_demanded(new.into_iter().filter_map(len_of).map(u64::from).sum());
    }
}

impl LayerInner {
    /// Compares what an earlier process left in a plain range, unless that was done; what is damaged counts as missing
    /// afterwards. Blocks.
    pub(crate) fn check(&self, plain: Range<u64>) -> io::Result<()> {
        match self.core.store.check(&self.core.store.data(), &plain, None) {
            Err(error) if is_lost(&error) => self.heal(plain),
            checked => checked,
        }
    }

    /// The same for all of it, unless that would take longer. Blocks.
    fn check_until(&self, deadline: Instant) {
        let (started, count) = (Instant::now(), self.core.store.unchecked.count());
        let mut next = 0;
        while let Some(part) = self.core.store.next_unchecked(next, CHECK_LEN) {
            next = part.end;
            if let Err(error) = self.check(part) {
                tracing::warn!(blob = %self.core.blob(), %error, "cached content cannot be compared or healed now");
                break;
            }
            let left = self.core.store.unchecked.count();
            let done = count.saturating_sub(left).max(1);
            let time_left = started.elapsed().as_secs_f64() * left as f64 / done as f64;
            if left > 0 && Instant::now() + Duration::from_secs_f64(time_left) > deadline {
                break;
            }
        }
        if !self.core.store.unchecked.is_empty() {
            self.core.store.unchecked.want();
        }
    }

    /// Compares the content of a plain range with its checksums; what is damaged counts as missing afterwards. Blocks.
    pub(crate) fn heal(&self, plain: Range<u64>) -> io::Result<()> {
        let (core, store) = (&self.core, &self.core.store);
        if core.is_removed() {
            return Ok(());
        }
        let plain = plain.start..plain.end.min(store.index().space_len());
        let damaged = store.find_damaged(&plain)?;
        store.heal(&damaged)
    }

    /// The content that comes without being asked for, to be looked at.
    pub(crate) fn warm(&self) -> MutexGuard<'_, LayerWarm> {
        lock(&self.warm)
    }

    /// Whether something comes without being asked for, or is being looked for.
    pub(crate) fn is_warming_up(&self) -> bool {
        !self.warm().is_nothing()
    }

    /// Something has happened to what comes without being asked for; returns who has waited for that, and is to hear of
    /// it where blocking is allowed.
    pub(crate) fn note_warm(&self, event: Event<Arc<HotStream>, Arc<CopyPlan>>) -> Vec<Arc<Wait>> {
        let mut warm = self.warm();
        let (after, ended) = warm.after(event);
        let before = std::mem::replace(&mut *warm, after);
        drop(warm);
        // Not under the lock: it may close files.
        drop(before);
        ended
    }
}

impl fmt::Debug for LayerInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerInner").field("core", &self.core).finish_non_exhaustive()
    }
}
