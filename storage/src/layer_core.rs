//! A layer as everything that works for it knows it: what names it, what is there, where the rest comes from.
//!
//! Nothing here asks for anything: the scheduler, the hot pack, copies and proofs are above it.

use std::{
    fmt, io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use format_spec::{Digest, LazyLayer, footer::SKIPPABLE_HEADER_LEN};
use serde_json::Value;
use tokio::runtime::Handle;

use crate::{
    disk::{directory::LayerRecord, frame_store::FrameStore, presence::frame_runs},
    error::ReadError,
    fetch::places::{Place, Places},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock,
    },
    waits::WaitLog,
};

/// As long as this, readers' demand counts together: the time of a start.
const DEMAND_TIME: Duration = Duration::from_secs(30);

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
    /// Those of them that readers waited for, or would have had they not been read ahead for them.
    pub demanded_bytes: u64,
    /// Bytes of content that this process copied from other layers.
    pub copied_bytes: u64,
    /// Pages of 4 KiB that this process found damaged in the cache, and gave up to be fetched again.
    pub healed_pages: u64,
}

/// Compressed bytes that readers made this process fetch.
#[derive(Debug, Default)]
struct Demand {
    bytes: u64,
    /// When it began that much was wanted, and what was since.
    lately: Option<(Instant, u64)>,
}

impl Demand {
    fn count(&mut self, len: u64, now: Instant) {
        self.bytes += len;
        let recent = self.lately(now);
        let since = self.lately.filter(|_| recent > 0).map_or(now, |(since, _)| since);
        self.lately = Some((since, recent + len));
    }

    fn lately(&self, now: Instant) -> u64 {
        let recent = self.lately.filter(|(since, _)| now.saturating_duration_since(*since) < DEMAND_TIME);
        recent.map_or(0, |(_, bytes)| bytes)
    }
}

/// A layer that is open, with what is known of it.
pub(crate) struct LayerCore {
    /// Unique in the process; unlike the digest never used again after the layer was removed.
    pub(crate) number: u64,
    /// The layer as whoever opened it named it; each place has its own.
    pub(crate) layer: LazyLayer,
    pub(crate) store: FrameStore,
    pub(crate) places: Arc<Places>,
    /// The waits of its readers.
    pub(crate) waits: Arc<WaitLog>,
    /// Held while the places are written down, so that the last ones are the last written. Never on the reactor.
    places_writer: Mutex<()>,
    runtime: Handle,
    fetched_bytes: AtomicU64,
    hot_bytes: AtomicU64,
    demand: Mutex<Demand>,
    /// The end of the last read in the plain address space.
    read_end: AtomicU64,
    copied_bytes: AtomicU64,
    is_removed: AtomicBool,
}

impl LayerCore {
    /// A layer of which `fetched_bytes` were fetched to open it; what works for it runs on `runtime`.
    pub(crate) fn new(
        number: u64,
        layer: LazyLayer,
        store: FrameStore,
        places: Arc<Places>,
        runtime: Handle,
        fetched_bytes: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            layer,
            store,
            places,
            waits: Arc::new(WaitLog::new(Instant::now())),
            places_writer: Mutex::default(),
            runtime,
            fetched_bytes: AtomicU64::new(fetched_bytes),
            hot_bytes: AtomicU64::new(0),
            demand: Mutex::default(),
            read_end: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            is_removed: AtomicBool::new(false),
        })
    }

    /// Digest of the blob.
    pub(crate) fn blob(&self) -> Digest {
        self.layer.blob
    }

    /// The description that a caller of [`crate::Cache::layer`] gave for the newest place.
    pub(crate) fn description(&self) -> Value {
        self.places.newest().map(|place| place.description.clone()).unwrap_or_default()
    }

    /// Keeps the places for the next process; blocks.
    pub(crate) fn write_places(&self) -> io::Result<()> {
        let _writing = lock(&self.places_writer);
        let record = LayerRecord::new(self.layer, self.places.to_records());
        self.store.directory().write_record(&record)
    }

    /// The runtime that everything for this layer runs on.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Runs `work` where it may block; `None` when the runtime ends.
    pub(crate) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Option<T> {
        let core = self.clone();
        self.runtime.spawn_blocking(move || work(&core)).await.ok()
    }

    /// Whether the layer was removed from the cache.
    pub(crate) fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::Acquire)
    }

    /// The layer is removed: nothing more is fetched.
    pub(crate) fn note_removed(&self) {
        self.is_removed.store(true, Ordering::Release);
    }

    /// A refused layer shows nothing.
    pub(crate) fn check_not_refused(&self) -> Result<(), ReadError> {
        let refused = |reason| ReadError::Refused { blob: self.blob(), reason };
        self.store.proof().refusal().map_or(Ok(()), |reason| Err(refused(reason)))
    }

    /// Makes what arrived durable; blocks.
    pub(crate) fn flush(&self) -> Result<(), ReadError> {
        let blob = self.blob();
        self.store.flush().map_err(|error| ReadError::Disk { blob, error: Arc::new(error) })
    }

    /// The first content from a plain offset on that is not in the cache.
    pub(crate) fn first_missing(&self, from: u64) -> Option<Range<u64>> {
        let frame = self.store.missing_frames(&(from..self.store.index().space_len())).next()?;
        frame_runs(self.store.index(), frame).find(|run| run.end > from && !self.store.has(run))
    }

    /// Offset of the hot pack in the blob of a place.
    pub(crate) fn hot_start(&self, place: &Place) -> u64 {
        place.layer.index.range().end.saturating_add(SKIPPABLE_HEADER_LEN)
    }

    /// The bytes of the blob of a place that hold the dedup section, which has this length (SPEC.md 5.9).
    pub(crate) fn dedup_range(&self, place: &Place, compressed_len: u64) -> Range<u64> {
        let hot_len = self.store.index().hot_len();
        let before = if hot_len == 0 { 0 } else { hot_len.saturating_add(SKIPPABLE_HEADER_LEN) };
        let start = self.hot_start(place).saturating_add(before);
        start..start.saturating_add(compressed_len)
    }

    /// Bytes came from the source.
    pub(crate) fn count_fetched(&self, len: usize) {
        self.fetched_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// Bytes of the hot pack are in the cache.
    pub(crate) fn count_hot(&self, len: usize) {
        self.hot_bytes.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// Bytes came that a reader waits for, or is going to want.
    pub(crate) fn count_demanded(&self, len: u64) {
        lock(&self.demand).count(len, Instant::now());
    }

    /// Compressed bytes that readers made this process fetch lately.
    pub(crate) fn demanded_lately(&self, now: Instant) -> u64 {
        lock(&self.demand).lately(now)
    }

    /// Somebody has read up to here.
    pub(crate) fn note_read_end(&self, end: u64) {
        self.read_end.store(end, Ordering::Relaxed);
    }

    /// Where the last read of the plain address space ended.
    pub(crate) fn read_end(&self) -> u64 {
        self.read_end.load(Ordering::Relaxed)
    }

    /// Bytes were copied from another layer.
    pub(crate) fn count_copied(&self, len: u64) {
        self.copied_bytes.fetch_add(len, Ordering::Relaxed);
    }

    /// Compressed bytes that this process fetched.
    pub(crate) fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    /// How much has arrived.
    pub(crate) fn progress(&self) -> Progress {
        Progress {
            frames_present: self.store.present_frame_count(),
            frames_total: self.store.needed_frame_count(),
            fetched_bytes: self.fetched_bytes(),
            hot_bytes: self.hot_bytes.load(Ordering::Relaxed),
            demanded_bytes: lock(&self.demand).bytes,
            copied_bytes: self.copied_bytes.load(Ordering::Relaxed),
            healed_pages: self.store.healed_pages.load(Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for LayerCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerCore").field("layer", &self.layer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_of_long_ago_makes_no_layer_come() {
        let (start, mut demand) = (Instant::now(), Demand::default());
        demand.count(5, start);
        demand.count(7, start + DEMAND_TIME / 2);
        assert_eq!((demand.bytes, demand.lately(start + DEMAND_TIME / 2)), (12, 12));
        assert_eq!(demand.lately(start + DEMAND_TIME), 0);
        demand.count(1, start + DEMAND_TIME * 2);
        assert_eq!((demand.bytes, demand.lately(start + DEMAND_TIME * 2)), (13, 1));
    }
}
