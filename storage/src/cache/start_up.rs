//! What happens to a layer right after it was opened: its hot pack arrives, what other layers have is copied.
//!
//! In a cache whose layers have told nothing of their content, the hot pack comes in the same answer as the index, and
//! the dedup section is fetched behind it for the layers to come. Where layers have, the layer that is opened is
//! likely to share most of its content with one of them. Then the dedup section comes first, and of the hot pack only
//! what nobody has: one round trip more for a new image, most of the bytes less for a new version.

use std::{
    fs,
    ops::Range,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use format_spec::{
    FormatError, HotPiece, LayerId,
    dedup::{self as section, DedupPiece},
    records::DedupLocation,
};
use serde_json::Value;

use super::{CacheInner, Entry};
use tokio::sync::Semaphore;

use crate::{
    disk::{
        directory::{LayerDirectory, LayerRecord},
        mapping::LayerIndex,
    },
    fetch::{
        incoming::Incoming,
        scheduler::{Priority, Slot, StreamKind},
        source::SourceError,
    },
    layer::{Layer, LayerInner},
    layer_core::LayerCore,
    sync::lock,
    warm::{
        Event,
        dedup::{self, CopyPlan, Peer},
        hot_pack::{self, HotStream},
    },
};

/// Longest dedup section, compressed, that reads wait for: what a container misses of it in a second on a slow link is
/// less than what it saves.
const SECTION_WAIT_LEN_MAX: u64 = 2 << 20;
/// Longest dedup section, plain, that is made use of: 48 bytes a piece, some 700,000 pieces.
const SECTION_PLAIN_LEN_MAX: u64 = 32 << 20;
/// Bytes of all dedup sections that are in memory, in KiB: a layer for whose section there is no room is fetched.
static SECTION_MEMORY: Semaphore = Semaphore::const_new(256 << 10);
/// Bytes copied before the thread is given back.
const COPY_STEP_LEN: u64 = 4 << 20;

impl CacheInner {
    /// Begins what is to be done for a layer that was opened; `with_index` is the hot pack if it comes with the index.
    pub(super) fn start_up(self: &Arc<Self>, layer: &Layer, with_index: Option<(Incoming, Slot)>, has_peers: bool) {
        let (inner, core) = (layer.inner().clone(), layer.core());
        inner.scheduler.note_urgent();
        if self.verifies {
            core.store.proof().expect();
        }
        let (store, index) = (&core.store, layer.index());
        let section = index.dedup().copied().filter(|_| !store.is_dedup_kept());
        let seeks_first = has_peers && section.is_some() && !store.is_complete();
        let hot = match &with_index {
            Some((_, slot)) if index.hot_len() == slot.place().layer.hot_len => HotStream::of_all(index),
            Some((_, slot)) => {
                let (found, expected) = (slot.place().layer.hot_len, index.hot_len());
                tracing::warn!(blob = %core.blob(), found, expected, "hot pack ignored: it has another length");
                None
            }
            None if seeks_first => None,
            None => HotStream::of_missing(index, |plain| !store.has(plain)),
        };
        if hot.is_none() && section.is_none() {
            return;
        }
        // Before anybody can read.
        let is_awaited = section.is_some_and(|section| section.compressed_len <= SECTION_WAIT_LEN_MAX);
        if let Some(hot) = &hot {
            inner.note_warm(Event::HotBegins(hot.clone()));
        } else if seeks_first && is_awaited {
            inner.note_warm(Event::SearchBegins);
        }
        let cache = Arc::downgrade(self);
        self.runtime.spawn(async move {
            let warming_up = WarmingUp(&inner);
            let had_hot_pack = hot.is_some() || with_index.is_some();
            if let Some(hot) = hot {
                receive_hot_pack(&inner, &hot, with_index).await;
            }
            if let Some(section) = section {
                copy_from_peers(cache, &inner, &section, had_hot_pack).await;
            }
            inner.scheduler.note_urgent();
            drop(warming_up);
        });
    }

    /// Whether another layer of the same domain has told what it holds.
    pub(super) fn has_peers(&self, id: LayerId, domain: Option<&str>) -> bool {
        self.peer_directories(id, domain).next().is_some()
    }

    /// The other layers that content may be copied from: who may read this one may read them, and they have told what
    /// they hold. A copy from any other would show who knows a digest what it is the digest of.
    fn peer_directories(&self, id: LayerId, domain: Option<&str>) -> impl Iterator<Item = LayerDirectory> {
        let entries = fs::read_dir(self.root.join("layers")).into_iter().flatten().flatten();
        let directories = entries.filter(move |entry| *entry.file_name() != *id.hex());
        directories.map(|entry| LayerDirectory::new(entry.path(), self.disk.clone())).filter(move |directory| {
            let has_told = matches!(directory.open_dedup(), Ok(Some(_))) && !directory.is_refused();
            let is_readable = |record: &LayerRecord| self.domain_of(record.descriptions()).as_deref() == domain;
            has_told && domain.is_some() && matches!(directory.read_record(), Ok(Some(record)) if is_readable(&record))
        })
    }

    /// The domain of a layer with these places; `None` if they belong to several. Anybody can name a place, so one of
    /// another domain makes nothing readable for that.
    pub(super) fn domain_of<'a>(&self, descriptions: impl IntoIterator<Item = &'a Value>) -> Option<String> {
        let mut domains = descriptions.into_iter().map(|description| (self.domain)(description));
        let first = domains.next()?;
        domains.all(|other| other == first).then_some(first)
    }

    /// Every other layer that has told what it holds. Those that cannot be read are left out: they only might help.
    fn peers(&self, id: LayerId, domain: Option<&str>) -> impl Iterator<Item = Peer> {
        self.peer_directories(id, domain).filter_map(|directory| {
            let dedup = directory.open_dedup().ok().flatten()?;
            let name = directory.path().file_name()?.to_str()?;
            let id = format!("sha256:{name}").parse().ok()?;
            let open = match lock(&self.layers).get(&id) {
                Some(Entry::Open(layer)) => Some(layer.clone()),
                _ => None,
            };
            let source = match open {
                Some(layer) => layer.core().store.copy_source().ok()?,
                None => directory.copy_source().ok().flatten()?,
            };
            Some(Peer { dedup, source })
        })
    }
}

/// Says that nothing comes by itself any longer, however that ends.
struct WarmingUp<'a>(&'a Arc<LayerInner>);

impl Drop for WarmingUp<'_> {
    fn drop(&mut self) {
        let waits = self.0.note_warm(Event::AllEnds);
        if !waits.is_empty() {
            self.0.core.runtime().spawn_blocking(move || waits.iter().for_each(|wait| wait.part_ended()));
        }
    }
}

async fn receive_hot_pack(layer: &Arc<LayerInner>, stream: &Arc<HotStream>, first: Option<(Incoming, Slot)>) {
    hot_pack::receive(&layer.core, &layer.scheduler, stream, first).await;
    layer.note_warm(Event::HotEnds);
}

/// Fetches the dedup section, copies what other layers have, and keeps the section for layers to come.
///
/// Unless the layer had its hot pack already, what is then still missing of that is received meanwhile.
async fn copy_from_peers(
    cache: Weak<CacheInner>,
    layer: &Arc<LayerInner>,
    location: &DedupLocation,
    had_hot_pack: bool,
) {
    // Compressed, plain and as pieces.
    let len = location.compressed_len.get().saturating_add(location.plain_len.get().saturating_mul(2));
    let memory = SECTION_MEMORY.try_acquire_many(u32::try_from(len >> 10).unwrap_or(u32::MAX).saturating_add(1));
    let pieces = match &memory {
        Ok(_) => fetch_section(layer, location).await,
        Err(_) => Err(SectionError::Memory),
    };
    let pieces = pieces.inspect_err(
        |error| tracing::warn!(blob = %layer.core.blob(), %error, "dedup section ignored: all content is fetched"),
    );
    let pieces: Option<Arc<[DedupPiece]>> = pieces.ok();
    let wanted = pieces.clone();
    let prepare = move |layer: &LayerInner| {
        let (core, store, cache) = (&layer.core, &layer.core.store, cache.upgrade());
        let find = |(wanted, cache): (_, Arc<CacheInner>)| {
            let domain = cache.domain_of(&core.places.descriptions());
            CopyPlan::find(store, wanted, cache.peers(core.layer.id(), domain.as_deref()))
        };
        let plan = wanted.as_deref().zip(cache).and_then(find).map(Arc::new);
        let missing_of = |plain: &Range<u64>| {
            let missing: Vec<_> = store.missing_runs(plain).collect();
            plan.as_ref().map_or(missing.clone(), |plan| plan.take(&missing).1)
        };
        let rest = if had_hot_pack { HotRest::Nothing } else { HotRest::of(store.index(), missing_of) };
        let hot = if let HotRest::Pack(hot) = &rest { Some(hot.clone()) } else { None };
        let waits = layer.note_warm(Event::Found(plan.clone(), hot));
        waits.iter().for_each(|wait| wait.part_ended());
        (plan, rest)
    };
    let Some((plan, rest)) = blocking(layer, prepare).await else { return };
    let receive = async {
        match rest {
            HotRest::Nothing => {}
            HotRest::Pack(hot) => receive_hot_pack(layer, &hot, None).await,
            HotRest::Runs(runs) => {
                let frames: Vec<u32> = runs.iter().flat_map(|run| layer.core.store.missing_frames(run)).collect();
                layer.scheduler.want(&layer.core, frames, Priority::HotPack, None);
            }
        }
    };
    let copy = async {
        if let Some(plan) = plan {
            copy_all(layer, plan).await;
        }
    };
    futures_util::future::join(receive, copy).await;
    let keep = move |layer: &LayerInner| {
        layer.note_warm(Event::CopyingEnds);
        let Some(pieces) = pieces else { return };
        let (core, store) = (&layer.core, &layer.core.store);
        let copied_bytes = core.progress().copied_bytes;
        tracing::debug!(blob = %core.blob(), pieces = pieces.len(), copied_bytes, "dedup section kept");
        // The copies first: who finds the file after a crash need not look again.
        let kept = store.flush().and_then(|()| store.directory().write_dedup(&dedup::encode(&pieces)));
        if let Err(error) = kept {
            tracing::warn!(blob = %core.blob(), %error, "dedup section cannot be kept");
        }
    };
    blocking(layer, keep).await;
}

/// How what is missing of a hot pack comes when copies have been found.
enum HotRest {
    Nothing,
    /// As parts of the pack.
    Pack(Arc<HotStream>),
    /// As frames: these runs, in the order of the pack.
    Runs(Vec<Range<u64>>),
}

impl HotRest {
    /// `missing_of` says what of a range neither is there nor is copied.
    ///
    /// A pack that is there for the larger part is one of a new version: what it lacks is scattered among what changed,
    /// whose frames are fetched sooner or later, and would cost its bytes twice.
    fn of(index: &LayerIndex, missing_of: impl Fn(&Range<u64>) -> Vec<Range<u64>>) -> Self {
        let pieces = index.hot_pieces();
        let runs: Vec<_> = pieces.iter().flat_map(|piece| missing_of(&piece.plain_range())).collect();
        let missing_len: u64 = runs.iter().map(|run| run.end - run.start).sum();
        let len: u64 = pieces.iter().map(|piece| u64::from(piece.len.get())).sum();
        if missing_len * 2 < len {
            return Self::Runs(runs);
        }
        HotStream::of_missing(index, |plain| !missing_of(plain).is_empty()).map_or(Self::Nothing, Self::Pack)
    }
}

/// Copies all pieces of a plan: first those of the hot pack, in its order.
async fn copy_all(layer: &Arc<LayerInner>, plan: Arc<CopyPlan>) {
    let hot = layer.core.store.index().hot_pieces().iter().map(HotPiece::plain_range);
    let hot = hot.flat_map(|plain| plan.take(&[plain]).0);
    let mut order: Vec<usize> = hot.collect();
    order.extend(0..plan.len());
    let mut order = order.into_iter().peekable();
    while order.peek().is_some() {
        let mut len = 0;
        let step: Vec<usize> = std::iter::from_fn(|| {
            let next = order.next_if(|_| len < COPY_STEP_LEN)?;
            len += plan.piece_len(next);
            Some(next)
        })
        .collect();
        let plan = plan.clone();
        let copied = blocking(layer, move |layer| step.into_iter().all(|piece| layer.copy(&plan, piece))).await;
        if copied != Some(true) {
            return;
        }
    }
}

/// A dedup section, verified.
async fn fetch_section(layer: &Arc<LayerInner>, location: &DedupLocation) -> Result<Arc<[DedupPiece]>, SectionError> {
    let compressed_len = location.compressed_len.get();
    if compressed_len.max(location.plain_len.get()) > SECTION_PLAIN_LEN_MAX {
        return Err(SectionError::Length(compressed_len.max(location.plain_len.get())));
    }
    let core = &layer.core;
    let compressed = fetch_section_bytes(layer, compressed_len).await?;
    let location = *location;
    let decompress =
        move |core: &Arc<LayerCore>| section::decompress(&compressed, &location, core.store.index().space_len());
    let pieces = core.blocking(decompress).await.ok_or(SectionError::Stopped)??;
    Ok(pieces.into())
}

/// The bytes of the dedup section, which nobody waits for, from the places of a layer in their turn.
async fn fetch_section_bytes(layer: &Arc<LayerInner>, compressed_len: u64) -> Result<Bytes, SectionError> {
    let len = usize::try_from(compressed_len).map_err(|_| SectionError::Length(compressed_len))?;
    let core = &layer.core;
    let mut tries_left = core.places.tries();
    loop {
        let slot = layer.scheduler.slot(core.number, StreamKind::Opening).await.ok_or(SectionError::Stopped)?;
        let range = core.dedup_range(slot.place(), compressed_len);
        tracing::debug!(blob = %core.blob(), ?range, "dedup section requested");
        let take = async { slot.open(range).await?.take(len, |len| core.count_fetched(len)).await };
        match take.await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => {
                slot.fail(&error);
                tries_left -= 1;
                if tries_left == 0 {
                    return Err(error.into());
                }
            }
        }
    }
}

/// Why there is no dedup section.
#[derive(Debug, thiserror::Error)]
enum SectionError {
    #[error("it has {0} bytes, at most {SECTION_PLAIN_LEN_MAX} are made use of")]
    Length(u64),
    #[error("sections of other layers take all memory that there is for them")]
    Memory,
    #[error("{0}")]
    Source(#[from] SourceError),
    #[error("{0}")]
    Format(#[from] FormatError),
    #[error("the process is shutting down")]
    Stopped,
}

/// Runs `work` where it may block; `None` when the runtime ends.
async fn blocking<T: Send + 'static>(
    layer: &Arc<LayerInner>,
    work: impl FnOnce(&LayerInner) -> T + Send + 'static,
) -> Option<T> {
    let layer = layer.clone();
    layer.core.runtime().clone().spawn_blocking(move || work(&layer)).await.ok()
}
