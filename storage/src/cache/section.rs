//! The dedup section of a layer on its way: in the answer that brings the index, in one beside it, or later by itself.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use format_spec::{
    FormatError, LazyLayer,
    dedup::{self as section, DedupPiece},
    footer::SKIPPABLE_HEADER_LEN,
    records::DedupLocation,
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
    task::JoinHandle,
};

use super::start_up::Answer;
use crate::{
    fetch::{
        scheduler::{Scheduler, StreamKind},
        source::SourceError,
    },
    layer::LayerInner,
    layer_core::LayerCore,
    sync::atomic::{AtomicU64, Ordering},
};

/// Longest dedup section, compressed, that reads wait for: what a container misses of it in a second on a slow link is
/// less than what it saves.
pub(super) const SECTION_WAIT_LEN_MAX: u64 = 2 << 20;
/// Longest dedup section, plain, that is made use of: 48 bytes a piece, some 700,000 pieces.
pub(super) const SECTION_PLAIN_LEN_MAX: u64 = 32 << 20;
/// How long a hot pack that is on its way waits for the section beside it, and then for the search: when it takes longer
/// its connection, which others may need, is given up.
pub(super) const HELD_MAX: Duration = Duration::from_millis(500);
/// Bytes of all dedup sections that are in memory, in KiB: a layer for whose section there is no room is fetched.
static SECTION_MEMORY: Semaphore = Semaphore::const_new(256 << 10);

/// How a section that was asked for beside the index has come; `None` where it was not worth a request, or has ended.
type Outcome = Option<Result<EarlyBytes, SourceError>>;

/// Bytes of a section, and the memory that they count for.
#[derive(Debug)]
struct EarlyBytes(Bytes, #[allow(dead_code, reason = "held")] SemaphorePermit<'static>);

/// A dedup section that is asked for beside the index, before that says that there is one. Dropped, it is given up.
#[derive(Debug)]
pub(super) struct EarlySection {
    task: JoinHandle<Outcome>,
    outcome: Option<Outcome>,
    received_len: Arc<AtomicU64>,
}

impl EarlySection {
    /// Asks for the section that a layer seems to have, if reads would wait for it.
    ///
    /// To be called when the answer with the index has begun: so no section keeps a slot from an index, or the only
    /// connection from a source that sends whole blobs.
    pub(super) fn begin(scheduler: &Arc<Scheduler>, runtime: &Handle, number: u64, layer: &LazyLayer) -> Option<Self> {
        let is_awaited = |range: &Range<u64>| range.end - range.start <= SECTION_WAIT_LEN_MAX;
        layer.dedup_range().filter(is_awaited)?;
        let (scheduler, received_len) = (scheduler.clone(), Arc::new(AtomicU64::new(0)));
        let counter = received_len.clone();
        let task = runtime.spawn(async move {
            let slot = scheduler.slot(number, StreamKind::Opening).await?;
            // Each place has it where its own blob does.
            let range = slot.place().layer.dedup_range().filter(is_awaited)?;
            let len = usize::try_from(range.end - range.start).ok()?;
            let memory = SECTION_MEMORY.try_acquire_many(u32::try_from(len >> 10).ok()?.saturating_add(1)).ok()?;
            tracing::debug!(layer = number, ?range, "dedup section requested beside the index");
            let count = |len: usize| _ = counter.fetch_add(len as u64, Ordering::Relaxed);
            let take = async { slot.open(range).await?.take(len, count).await };
            match take.await {
                Ok(bytes) => {
                    slot.works();
                    Some(Ok(EarlyBytes(bytes, memory)))
                }
                Err(error) => {
                    slot.fail(&error);
                    Some(Err(error))
                }
            }
        });
        Some(Self { task, outcome: None, received_len })
    }

    /// Waits for it as long as something else may wait for it; whether it has come.
    pub(super) async fn has_come_soon(&mut self) -> bool {
        if let Ok(joined) = tokio::time::timeout(HELD_MAX, &mut self.task).await {
            self.outcome = Some(joined.ok().flatten());
        }
        matches!(self.outcome, Some(Some(Ok(_))))
    }

    /// Waits for it.
    async fn outcome(&mut self) -> Outcome {
        match self.outcome.take() {
            Some(outcome) => outcome,
            None => (&mut self.task).await.ok().flatten(),
        }
    }
}

impl Drop for EarlySection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where a dedup section comes from.
pub(super) enum SectionWay {
    /// It was asked for beside the index.
    Beside(EarlySection),
    /// It follows in this answer, behind the hot pack.
    Follows(Answer),
    /// It has to be asked for.
    Asked,
}

/// Why there is no dedup section.
#[derive(Debug, thiserror::Error)]
pub(super) enum SectionError {
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

/// A dedup section, verified.
pub(super) async fn receive_section(
    layer: &Arc<LayerInner>,
    location: &DedupLocation,
    way: SectionWay,
) -> Result<Arc<[DedupPiece]>, SectionError> {
    let (compressed_len, plain_len) = (location.compressed_len.get(), location.plain_len.get());
    if compressed_len.max(plain_len) > SECTION_PLAIN_LEN_MAX {
        return Err(SectionError::Length(compressed_len.max(plain_len)));
    }
    // Compressed, plain and as pieces.
    let memory = compressed_len.saturating_add(plain_len.saturating_mul(2));
    let memory = u32::try_from(memory >> 10).unwrap_or(u32::MAX).saturating_add(1);
    let _memory = SECTION_MEMORY.try_acquire_many(memory).map_err(|_| SectionError::Memory)?;
    let compressed = section_bytes(layer, compressed_len, way).await?;
    let location = *location;
    let decompress =
        move |core: &Arc<LayerCore>| section::decompress(&compressed, &location, core.store.index().space_len());
    let pieces = layer.core.blocking(decompress).await.ok_or(SectionError::Stopped)??;
    Ok(pieces.into())
}

/// The bytes of a section; asked for by themselves where they do not come in another way.
async fn section_bytes(layer: &Arc<LayerInner>, len: u64, way: SectionWay) -> Result<Bytes, SectionError> {
    let usable_len = usize::try_from(len).map_err(|_| SectionError::Length(len))?;
    let core = &layer.core;
    let failure = match way {
        SectionWay::Beside(mut early) => {
            let outcome = early.outcome().await;
            core.count_fetched(usize::try_from(early.received_len.load(Ordering::Relaxed)).unwrap_or(usize::MAX));
            match outcome {
                // The place may say a length that the index does not; a digest holds what is taken.
                Some(Ok(EarlyBytes(bytes, _))) if bytes.len() >= usable_len => return Ok(bytes.slice(..usable_len)),
                Some(Err(error)) => Some(error),
                _ => None,
            }
        }
        SectionWay::Follows(Answer { mut incoming, slot, .. }) => {
            let header_len = usize::try_from(SKIPPABLE_HEADER_LEN).expect("a few bytes");
            let take = async {
                incoming.take(header_len, |len| core.count_fetched(len)).await?;
                incoming.take(usable_len, |len| core.count_fetched(len)).await
            };
            match take.await {
                Ok(bytes) => return Ok(bytes),
                // It was a long answer: a short one may get through.
                Err(error) => {
                    slot.fail(&error);
                    None
                }
            }
        }
        SectionWay::Asked => None,
    };
    ask_for_bytes(layer, len, usable_len, failure).await
}

/// The bytes of a section from the places of a layer in their turn, of which one may have failed.
async fn ask_for_bytes(
    layer: &Arc<LayerInner>,
    compressed_len: u64,
    len: usize,
    mut failure: Option<SourceError>,
) -> Result<Bytes, SectionError> {
    let core = &layer.core;
    let mut tries_left = core.places.tries();
    loop {
        if let Some(error) = failure {
            tries_left -= 1;
            if tries_left == 0 {
                return Err(error.into());
            }
        }
        let slot = layer.scheduler.slot(core.number, StreamKind::Opening).await.ok_or(SectionError::Stopped)?;
        let range = core.dedup_range(slot.place(), compressed_len);
        tracing::debug!(blob = %core.blob(), ?range, "dedup section requested");
        let take = async { slot.open(range).await?.take(len, |len| core.count_fetched(len)).await };
        match take.await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => {
                slot.fail(&error);
                failure = Some(error);
            }
        }
    }
}
