//! How a layer is opened: from the directory, or with an index that is fetched and verified first.

use std::{
    collections::HashMap,
    io::{self, Write},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use format_spec::{Digest, FormatError, IndexLocation, LazyLayer, limits::INDEX_LEN_MAX};
use tokio::time::Instant;

use super::{
    CacheInner, OpeningPlace, disk_error,
    section::{EarlySection, SECTION_PLAIN_LEN_MAX, SECTION_WAIT_LEN_MAX},
    start_up::{Answer, OnItsWay},
};
use crate::{
    disk::{
        directory::{LayerDirectory, LayerRecord},
        frame_store::FrameStore,
        mapping::LayerIndex,
        unpack::{NewIndex, UnpackError},
    },
    error::CacheError,
    fetch::{
        incoming::Incoming,
        places::{PlaceRecord, Places},
        scheduler::{Slot, StreamKind},
        source::{SourceError, SourceErrorKind},
    },
    layer::Layer,
    layer_core::LayerCore,
    sync::{Mutex, lock},
};

/// Times an index is asked for when the bytes are wrong or break off.
const INDEX_ATTEMPTS: u32 = 3;

/// Bytes of an index that are in memory while it is received.
const RECEIVED_LEN_MAX: usize = 128 << 10;
/// How long it is remembered that an index breaks the format: whoever asks again gets the same answer without a fetch.
const REFUSAL_TIME: Duration = Duration::from_secs(600);
/// Most refusals that are remembered.
const REFUSALS_MAX: usize = 1024;

/// Indexes that are what their digest says, and break the format.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<RefusedIndex, (Instant, CacheError)>>);

/// Digest, compressed and plain length.
type RefusedIndex = (Digest, u64, u64);

impl Refusals {
    fn find(&self, layer: &LazyLayer) -> Option<CacheError> {
        let mut known = lock(&self.0);
        known.retain(|_, (since, _)| since.elapsed() < REFUSAL_TIME);
        known.get(&key_of(layer)).map(|(_, error)| error.clone())
    }

    fn note(&self, layer: &LazyLayer, error: &CacheError) {
        let mut known = lock(&self.0);
        if known.len() >= REFUSALS_MAX {
            known.clear();
        }
        known.insert(key_of(layer), (Instant::now(), error.clone()));
    }
}

/// The key of a refused index: another place or length for the same digest may be right.
fn key_of(layer: &LazyLayer) -> RefusedIndex {
    let IndexLocation { compressed_len, plain_len, digest, .. } = layer.index;
    (digest, compressed_len, plain_len)
}

/// An index that was verified, and the answer that it has come in.
struct FetchedIndex {
    index: NewIndex,
    on_its_way: OnItsWay,
    fetched_bytes: u64,
}

impl CacheInner {
    /// Opens a layer; the index is fetched if the directory does not have it.
    pub(super) async fn open_layer(
        self: &Arc<Self>,
        number: u64,
        layer: &LazyLayer,
        places: Arc<Places>,
        place: &OpeningPlace,
    ) -> Result<Layer, CacheError> {
        let (id, blob) = (layer.id(), layer.blob);
        let (inner, at) = (self.clone(), place.clone());
        let domain = self.domain_of(&places.descriptions());
        let look = move || Ok((inner.open_cached(&at)?, inner.has_peers(id, domain.as_deref())));
        let (cached, has_peers) = self.blocking(blob, look).await?;
        if let Some((record, store)) = cached {
            self.add_older_places(&places, &record);
            self.scheduler.places_changed(number, blob);
            let core = LayerCore::new(number, *layer, store, places, self.runtime.clone(), 0);
            let layer = Layer::new(core, self.scheduler.clone());
            if !layer.core().places.to_records().into_iter().eq(record.places()) {
                self.keep_places(&layer);
            }
            self.start_up(&layer, OnItsWay::default(), has_peers);
            return Ok(layer);
        }
        if let Some(error) = self.refusals.find(layer) {
            return Err(error);
        }
        let fetched = self.fetch_index(number, layer, has_peers, &places).await?;
        let FetchedIndex { index, on_its_way, fetched_bytes } = fetched;
        let (inner, at) = (self.clone(), place.clone());
        let record = LayerRecord::new(*layer, places.to_records());
        let store = self.blocking(blob, move || inner.store_layer(&at, &record, index)).await?;
        let core = LayerCore::new(number, *layer, store, places, self.runtime.clone(), fetched_bytes);
        let layer = Layer::new(core, self.scheduler.clone());
        self.start_up(&layer, on_its_way, has_peers);
        Ok(layer)
    }

    /// Adds the places that an earlier process knew.
    fn add_older_places(&self, places: &Places, record: &LayerRecord) {
        let to_place = |PlaceRecord { layer, description, is_held }| {
            let source = self.sources.get(&layer, &description)?;
            Some((self.new_place(&layer, source, description), is_held))
        };
        places.add_older(record.places().filter_map(to_place));
    }

    /// Opens what the directory holds; `None` without a whole record and index.
    fn open_cached(&self, place: &OpeningPlace) -> Result<Option<(LayerRecord, FrameStore)>, CacheError> {
        let directory = &place.directory;
        self.unless_cancelled(place, || {
            let record = directory.read_record()?.filter(|record| directory.is_of(record.layer.id()));
            let Some(record) = record else { return Ok(None) };
            let Some(index) = directory.open_index()? else { return Ok(None) };
            let store = self.open_store(directory, index, &record)?;
            Ok(Some((record, store)))
        })
    }

    /// Makes the directory of a layer whose index was verified, in place of a damaged one.
    ///
    /// `data` and `presence` of the damaged one stay if they belong to the same index.
    fn store_layer(
        &self,
        place: &OpeningPlace,
        record: &LayerRecord,
        index: NewIndex,
    ) -> Result<FrameStore, CacheError> {
        let directory = &place.directory;
        self.unless_cancelled(place, || {
            directory.create()?;
            let index = directory.place_index(record, index)?;
            self.open_store(directory, index, record)
        })
    }

    fn open_store(&self, at: &LayerDirectory, index: LayerIndex, record: &LayerRecord) -> io::Result<FrameStore> {
        // Before a vector is made for its pages: an earlier version may have kept it, which knew no limit.
        index.check_space().map_err(io::Error::other)?;
        FrameStore::open(at.clone(), index, record.layer.index.digest, self.flush_soon.clone(), self.unkept.clone())
    }

    /// Works on the directory of a layer that is being opened, unless it is removed already.
    fn unless_cancelled<T>(&self, place: &OpeningPlace, work: impl FnOnce() -> io::Result<T>) -> Result<T, CacheError> {
        let is_cancelled = lock(&place.is_cancelled);
        if *is_cancelled {
            return Err(disk_error(place.directory.path(), io::Error::other("layer was removed")));
        }
        work().map_err(|error| disk_error(place.directory.path(), error))
    }

    /// Fetches and verifies an index, in a request that goes on with what a start wants first ([`Opening`]).
    ///
    /// An index that is wrong or refused at one place is asked for at the next. A failure that may pass is waited for
    /// as long as a reader would wait.
    async fn fetch_index(
        &self,
        number: u64,
        layer: &LazyLayer,
        has_peers: bool,
        places: &Places,
    ) -> Result<FetchedIndex, CacheError> {
        let blob = layer.blob;
        let mut tries = IndexTries::default();
        let fetch = self.try_index(number, blob, has_peers, places, &mut tries);
        let fetched = match self.scheduler.patience() {
            None => fetch.await,
            Some(patience) => tokio::time::timeout(patience, fetch).await.unwrap_or_else(|_| {
                let error = tries.last_failure.take();
                let error = error.unwrap_or_else(|| SourceError::passing("nothing has come in time"));
                Err(CacheError::Source { blob, error })
            }),
        };
        fetched.inspect_err(|error| tracing::error!(%blob, %error, "index cannot be had"))
    }

    async fn try_index(
        &self,
        number: u64,
        blob: Digest,
        has_peers: bool,
        places: &Places,
        tries: &mut IndexTries,
    ) -> Result<FetchedIndex, CacheError> {
        let mut fetched_bytes = 0;
        loop {
            let slot = self.scheduler.slot(number, StreamKind::Opening).await.ok_or(CacheError::Stopped(blob))?;
            tries.asked.push(slot.place().number);
            // Each place has the index where its own blob does.
            let layer = slot.place().layer;
            let opening = Opening::of(&layer, has_peers);
            let before = fetched_bytes;
            let error = match self.open_at(number, &slot, &opening, has_peers, &mut fetched_bytes).await {
                Ok((incoming, section, index)) => {
                    slot.works();
                    let has_section = opening.has_section || incoming.is_whole();
                    // One that has brought all that was asked for would only keep its slot.
                    let goes_on = opening.has_pack || has_section;
                    let answer = goes_on.then_some(Answer { incoming, slot, has_section });
                    return Ok(FetchedIndex { index, on_its_way: OnItsWay { answer, section }, fetched_bytes });
                }
                Err(error @ CacheError::Index { error: FormatError::Digest { .. }, .. }) => {
                    slot.fail(&SourceError::unusable(error.to_string()));
                    error
                }
                Err(CacheError::Source { error, .. }) => {
                    tries.bad_answers += u32::from(fetched_bytes > before);
                    tries.last_failure = Some(error.clone());
                    slot.fail(&error);
                    CacheError::Source { blob, error }
                }
                Err(error @ CacheError::Index { .. }) => {
                    // The bytes are right, and will be as wrong again: unless another place says another length.
                    self.refusals.note(&layer, &error);
                    slot.fail(&SourceError::unusable(error.to_string()));
                    if places.to_records().iter().all(|place| self.refusals.find(&place.layer).is_some()) {
                        return Err(error);
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            let is_patient = self.scheduler.patience().is_some();
            let has_other = places.to_refs().iter().any(|place| !tries.asked.contains(&place.number));
            if !tries.is_asked_again(&error, is_patient, has_other) {
                return Err(error);
            }
            tracing::debug!(%blob, %error, "index asked for again");
        }
    }

    /// Asks a place for what opens a layer, and receives the index of it.
    async fn open_at(
        &self,
        number: u64,
        slot: &Slot,
        opening: &Opening,
        has_peers: bool,
        fetched_bytes: &mut u64,
    ) -> Result<(Incoming, Option<EarlySection>, NewIndex), CacheError> {
        let layer = slot.place().layer;
        let incoming = slot.open(opening.range.clone()).await;
        let mut incoming = incoming.map_err(|error| CacheError::Source { blob: layer.blob, error })?;
        let seeks_first = has_peers && !incoming.is_whole();
        let section =
            seeks_first.then(|| EarlySection::begin(&self.scheduler, &self.runtime, number, &layer)).flatten();
        let index = self.receive_index(&layer, &mut incoming, fetched_bytes).await?;
        Ok((incoming, section, index))
    }

    /// Receives, verifies and unpacks an index.
    async fn receive_index(
        &self,
        layer: &LazyLayer,
        incoming: &mut Incoming,
        fetched_bytes: &mut u64,
    ) -> Result<NewIndex, CacheError> {
        let LazyLayer { blob, index: location, .. } = *layer;
        if location.compressed_len > INDEX_LEN_MAX {
            let (expected, found) = (INDEX_LEN_MAX, location.compressed_len);
            let error = FormatError::Length { what: "compressed index", expected, found };
            return Err(CacheError::Index { blob, error });
        }
        let path = self.unpacker.directory().to_owned();
        let disk_error = move |error| disk_error(&path, error);
        let (unpacker, failed) = (self.unpacker.clone(), disk_error.clone());
        let mut file = self.blocking(blob, move || unpacker.nameless().map_err(failed)).await?;
        let mut left = usize::try_from(location.compressed_len).unwrap_or(usize::MAX);
        while left > 0 {
            let taken = incoming.take(left.min(RECEIVED_LEN_MAX), |len| *fetched_bytes += len as u64).await;
            let part = taken.map_err(|error| CacheError::Source { blob, error })?;
            left -= part.len();
            let failed = disk_error.clone();
            let write = move || file.write_all(&part).map(|()| file).map_err(failed);
            file = self.blocking(blob, write).await?;
        }
        // Not before everything is here: a source that is slow holds no memory that others wait for.
        let memory = self.unpacker.memory_for(&location).await.ok_or(CacheError::Stopped(layer.id()))?;
        let unpacker = self.unpacker.clone();
        let unpack = move || {
            let unpacked = unpacker.unpack(&mut file, &location);
            drop(memory);
            unpacked.map_err(|error| match error {
                UnpackError::Disk(error) => disk_error(error),
                UnpackError::Format(error) => CacheError::Index { blob, error },
            })
        };
        self.blocking(blob, unpack).await
    }
}

/// A request that opens a layer.
struct Opening {
    range: Range<u64>,
    /// The hot pack is in it.
    has_pack: bool,
    /// So is the dedup section.
    has_section: bool,
}

impl Opening {
    /// Where other layers may have what the hot pack has, the section is asked for beside it; where that is too long to be
    /// waited for, the pack is asked for behind it.
    fn of(layer: &LazyLayer, has_peers: bool) -> Self {
        let index = layer.index.range();
        let section = layer.dedup_range();
        let is_longer_than = |len: u64| section.as_ref().is_some_and(|section| section.end - section.start > len);
        let has_pack = layer.hot_len > 0 && !(has_peers && is_longer_than(SECTION_WAIT_LEN_MAX));
        let has_section = !has_peers && section.is_some() && !is_longer_than(SECTION_PLAIN_LEN_MAX);
        let end = match (section, layer.hot_range()) {
            (Some(section), _) if has_section => section.end,
            (_, Some(hot)) if has_pack => hot.end,
            _ => index.end,
        };
        Self { range: index.start..end, has_pack, has_section }
    }
}

/// The tries to get an index.
#[derive(Debug, Default)]
struct IndexTries {
    /// The places that were asked.
    asked: Vec<u64>,
    /// Answers that were wrong, or broke off.
    bad_answers: u32,
    last_failure: Option<SourceError>,
}

impl IndexTries {
    /// Whether there is a point in asking again after `error`; `has_other` says that some place was not asked yet.
    fn is_asked_again(&mut self, error: &CacheError, is_patient: bool, has_other: bool) -> bool {
        match error {
            CacheError::Index { .. } => {
                self.bad_answers += 1;
                self.bad_answers < INDEX_ATTEMPTS || has_other
            }
            CacheError::Source { error, .. } if error.kind == SourceErrorKind::Passing => {
                let has_begun = self.bad_answers > 0;
                is_patient || has_other || has_begun && self.bad_answers < INDEX_ATTEMPTS
            }
            _ => has_other,
        }
    }
}
