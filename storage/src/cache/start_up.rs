//! What happens to a layer right after it was opened: its hot pack arrives, what other layers have is copied.
//!
//! The hot pack comes in the same answer as the index. In a cache whose layers have told nothing of their content, the
//! dedup section follows in that answer too, for the layers to come: one request a layer. Where layers have, the layer
//! that is opened is likely to share most of its content with one of them. Then the dedup section is asked for beside
//! the index, as soon as the answer with that begins, and the hot pack is not received further until it has come: if others
//! have more than a quarter of it, or the section is late, the answer is given up for what they lack. A section that is too
//! long to be waited for comes before the pack is asked for.

use std::{
    fs,
    ops::Range,
    sync::{Arc, Weak},
};

use format_spec::{HotPiece, LayerId, dedup::DedupPiece, records::DedupLocation};
use serde_json::Value;

use super::{
    CacheInner, Entry,
    section::{EarlySection, HELD_MAX, SECTION_WAIT_LEN_MAX, SectionWay, receive_section},
};
use crate::{
    disk::{
        directory::{LayerDirectory, LayerRecord},
        mapping::LayerIndex,
    },
    fetch::{
        incoming::Incoming,
        scheduler::{Priority, Slot},
    },
    layer::{Layer, LayerInner},
    sync::lock,
    warm::{
        Event,
        dedup::{self, CopyPlan, Peer},
        hot_pack::{self, HotStream},
    },
};

/// Bytes copied before the thread is given back.
const COPY_STEP_LEN: u64 = 4 << 20;

/// An answer that has brought an index, and goes on with the hot pack if there is one, or with the dedup section.
#[derive(Debug)]
pub(super) struct Answer {
    /// Stands at the first byte behind the index.
    pub(super) incoming: Incoming,
    pub(super) slot: Slot,
    /// It goes on to the end of the dedup section.
    pub(super) has_section: bool,
}

impl Answer {
    /// Whether the pack in it is the one that the index describes.
    fn has_pack_of(&self, index: &LayerIndex) -> bool {
        let (found, expected) = (self.slot.place().layer.hot_len, index.hot_len());
        if found != expected {
            let blob = self.slot.place().layer.blob;
            tracing::warn!(%blob, found, expected, "hot pack ignored: it has another length");
        }
        found == expected
    }
}

/// The things that are on their way when a layer has been opened; nothing for one that the directory had.
#[derive(Debug, Default)]
pub(super) struct OnItsWay {
    pub(super) answer: Option<Answer>,
    pub(super) section: Option<EarlySection>,
}

/// How a hot pack comes.
enum HotWay {
    /// It was received as far as that could be.
    Had,
    /// It waits until it is known what other layers have, in this answer or still to be asked for.
    Waits(Option<Answer>),
}

impl CacheInner {
    /// Begins what is to be done for a layer that was opened.
    pub(super) fn start_up(self: &Arc<Self>, layer: &Layer, on_its_way: OnItsWay, has_peers: bool) {
        let (inner, core) = (layer.inner().clone(), layer.core());
        inner.scheduler.note_urgent();
        if self.verifies {
            core.store.proof().expect();
        }
        let (store, index) = (&core.store, layer.index());
        let section = index.dedup().copied().filter(|_| !store.is_dedup_kept());
        let is_awaited = section.is_some_and(|section| section.compressed_len <= SECTION_WAIT_LEN_MAX);
        let OnItsWay { answer, section: early } = on_its_way;
        // A source that sends all of the blob brings the pack before the section.
        let follows = answer.as_ref().is_some_and(|answer| answer.has_section);
        let seeks_first = has_peers && section.is_some() && !store.is_complete() && !follows;
        let is_fetched = answer.is_some();
        let answer = answer.filter(|answer| answer.has_pack_of(index));
        let hot = match &answer {
            _ if seeks_first => None,
            Some(_) => HotStream::of_all(index),
            None if is_fetched => None,
            None => HotStream::of_missing(index, |plain| !store.has(plain)),
        };
        if hot.is_none() && section.is_none() {
            return;
        }
        // Before anybody can read.
        if let Some(hot) = &hot {
            inner.note_warm(Event::HotBegins(hot.clone()));
        } else if seeks_first && is_awaited {
            inner.note_warm(Event::SearchBegins);
        }
        let cache = Arc::downgrade(self);
        self.runtime.spawn(async move {
            let warming_up = WarmingUp(&inner);
            if seeks_first && let Some(section) = section {
                let (way, has_come) = match early {
                    Some(mut early) => {
                        let has_come = early.has_come_soon().await;
                        (SectionWay::Beside(early), has_come)
                    }
                    None => (SectionWay::Asked, false),
                };
                let answer = answer.filter(|_| has_come);
                copy_from_peers(cache, &inner, &section, way, HotWay::Waits(answer)).await;
            } else {
                let rest = match hot {
                    Some(hot) => receive_hot_pack(&inner, &hot, answer).await,
                    None => answer,
                };
                if let Some(section) = section {
                    let rest = rest.filter(|answer| answer.has_section);
                    let way = rest.map_or(SectionWay::Asked, SectionWay::Follows);
                    copy_from_peers(cache, &inner, &section, way, HotWay::Had).await;
                }
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

/// Receives a hot pack, or what is missing of one; returns the answer that it came in, if that goes on.
async fn receive_hot_pack(layer: &Arc<LayerInner>, stream: &Arc<HotStream>, answer: Option<Answer>) -> Option<Answer> {
    let has_section = answer.as_ref().is_some_and(|answer| answer.has_section);
    let first = answer.map(|answer| (answer.incoming, answer.slot));
    let rest = hot_pack::receive(&layer.core, &layer.scheduler, stream, first).await;
    layer.note_warm(Event::HotEnds);
    rest.map(|(incoming, slot)| Answer { incoming, slot, has_section })
}

/// Receives the dedup section, copies what other layers have, and keeps the section for layers to come.
///
/// Unless the layer had its hot pack already, what is then still missing of that is received meanwhile.
async fn copy_from_peers(
    cache: Weak<CacheInner>,
    layer: &Arc<LayerInner>,
    location: &DedupLocation,
    way: SectionWay,
    hot: HotWay,
) {
    let pieces = receive_section(layer, location, way).await;
    let pieces = pieces.inspect_err(
        |error| tracing::warn!(blob = %layer.core.blob(), %error, "dedup section ignored: all content is fetched"),
    );
    let pieces: Option<Arc<[DedupPiece]>> = pieces.ok();
    let wanted = pieces.clone();
    let (had_hot_pack, mut answer) = match hot {
        HotWay::Had => (true, None),
        HotWay::Waits(answer) => (false, answer),
    };
    let is_coming = answer.is_some();
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
        let rest = if had_hot_pack { HotRest::Nothing } else { HotRest::of(store.index(), is_coming, missing_of) };
        let hot = if let HotRest::Whole(hot) | HotRest::Parts(hot) = &rest { Some(hot.clone()) } else { None };
        let waits = layer.note_warm(Event::Found(plan.clone(), hot));
        waits.iter().for_each(|wait| wait.part_ended());
        (plan, rest)
    };
    let search = blocking(layer, prepare);
    tokio::pin!(search);
    let mut found = tokio::time::timeout(HELD_MAX, &mut search).await.ok();
    if found.is_none() {
        answer = None;
        found = Some(search.await);
    }
    let Some((plan, rest)) = found.flatten() else { return };
    let receive = receive_rest(layer, rest, answer);
    let copy = async {
        if let Some(plan) = plan {
            copy_all(layer, plan).await;
        }
    };
    futures_util::future::join(receive, copy).await;
    blocking(layer, move |layer: &LayerInner| keep_section(layer, pieces.as_deref())).await;
}

/// Receives what is missing of a hot pack; `answer` is one that it may be on its way in.
async fn receive_rest(layer: &Arc<LayerInner>, rest: HotRest, answer: Option<Answer>) {
    let answer = answer.filter(|_| matches!(rest, HotRest::Whole(_)));
    match rest {
        HotRest::Nothing => {}
        HotRest::Whole(hot) | HotRest::Parts(hot) => drop(receive_hot_pack(layer, &hot, answer).await),
        HotRest::Runs(runs) => {
            let frames: Vec<u32> = runs.iter().flat_map(|run| layer.core.store.missing_frames(run)).collect();
            layer.scheduler.want(&layer.core, frames, Priority::HotPack, None);
        }
    }
}

/// Copies have ended; keeps the section that told of them, if it came. Blocks.
fn keep_section(layer: &LayerInner, pieces: Option<&[DedupPiece]>) {
    layer.note_warm(Event::CopyingEnds);
    let Some(pieces) = pieces else { return };
    let (core, store) = (&layer.core, &layer.core.store);
    let copied_bytes = core.progress().copied_bytes;
    tracing::debug!(blob = %core.blob(), pieces = pieces.len(), copied_bytes, "dedup section kept");
    // The copies first: who finds the file after a crash need not look again.
    let kept = store.flush().and_then(|()| store.directory().write_dedup(&dedup::encode(pieces)));
    if let Err(error) = kept {
        tracing::warn!(blob = %core.blob(), %error, "dedup section cannot be kept");
    }
}

/// How what is missing of a hot pack comes when copies have been found.
enum HotRest {
    Nothing,
    /// All of the pack, in the answer that it is on its way in.
    Whole(Arc<HotStream>),
    /// As parts of the pack.
    Parts(Arc<HotStream>),
    /// As frames: these runs, in the order of the pack.
    Runs(Vec<Range<u64>>),
}

impl HotRest {
    /// `missing_of` says what of a range neither is there nor is copied; the pack may be `is_coming` already.
    ///
    /// A pack that is there for the larger part is one of a new version: what it lacks is scattered among what changed,
    /// whose frames are fetched sooner or later, and would cost its bytes twice.
    fn of(index: &LayerIndex, is_coming: bool, missing_of: impl Fn(&Range<u64>) -> Vec<Range<u64>>) -> Self {
        let pieces = index.hot_pieces();
        let runs: Vec<_> = pieces.iter().flat_map(|piece| missing_of(&piece.plain_range())).collect();
        let missing_len: u64 = runs.iter().map(|run| run.end - run.start).sum();
        let len: u64 = pieces.iter().map(|piece| u64::from(piece.len.get())).sum();
        if missing_len * 2 < len {
            return Self::Runs(runs);
        }
        if is_coming && missing_len * 4 >= len * 3 {
            return HotStream::of_all(index).map_or(Self::Nothing, Self::Whole);
        }
        HotStream::of_missing(index, |plain| !missing_of(plain).is_empty()).map_or(Self::Nothing, Self::Parts)
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

/// Runs `work` where it may block; `None` when the runtime ends.
async fn blocking<T: Send + 'static>(
    layer: &Arc<LayerInner>,
    work: impl FnOnce(&LayerInner) -> T + Send + 'static,
) -> Option<T> {
    let layer = layer.clone();
    layer.core.runtime().clone().spawn_blocking(move || work(&layer)).await.ok()
}
