//! The dedup section of a layer on its way: in the answer that brings the index, in one beside it, or later by itself.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use format_spec::{
    FormatError, LazyLayer,
    dedup::{self as section, DedupPiece},
    footer::SKIPPABLE_HEADER_LEN,
    records::DedupLocation,
};
use tokio::{runtime::Handle, sync::Semaphore, task::JoinHandle};

use super::start_up::Answer;
use crate::{
    fetch::{
        scheduler::{Scheduler, StreamKind},
        source::SourceError,
    },
    layer::LayerInner,
    layer_core::LayerCore,
};

/// Longest dedup section, compressed, that reads wait for: what a container misses of it in a second on a slow link is
/// less than what it saves.
pub(super) const SECTION_WAIT_LEN_MAX: u64 = 2 << 20;
/// Longest dedup section, plain, that is made use of: 48 bytes a piece, some 700,000 pieces.
pub(super) const SECTION_PLAIN_LEN_MAX: u64 = 32 << 20;
/// How long a hot pack that is on its way waits for the section beside it: for one that is late it is given up.
const EARLY_PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of all dedup sections that are in memory, in KiB: a layer for whose section there is no room is fetched.
static SECTION_MEMORY: Semaphore = Semaphore::const_new(256 << 10);

/// The bytes of a dedup section that are asked for beside the index, before that says that there is one. Dropped, they
/// are no longer asked for.
#[derive(Debug)]
pub(super) struct EarlySection(JoinHandle<Option<Result<Bytes, SourceError>>>);

impl EarlySection {
    /// Asks for the section that a layer seems to have, if reads would wait for it.
    pub(super) fn begin(scheduler: &Arc<Scheduler>, runtime: &Handle, number: u64, layer: &LazyLayer) -> Option<Self> {
        layer.dedup_range().filter(|range| range.end - range.start <= SECTION_WAIT_LEN_MAX)?;
        let scheduler = scheduler.clone();
        Some(Self(runtime.spawn(async move {
            let slot = scheduler.slot(number, StreamKind::Opening).await?;
            // Each place has it where its own blob does.
            let range = slot.place().layer.dedup_range()?;
            let len = range.end.checked_sub(range.start).filter(|len| *len <= SECTION_WAIT_LEN_MAX)?;
            let len = usize::try_from(len).ok()?;
            tracing::debug!(layer = number, ?range, "dedup section requested beside the index");
            let take = async { slot.open(range).await?.take(len, |_| {}).await };
            match take.await {
                Ok(bytes) => Some(Ok(bytes)),
                Err(error) => {
                    slot.fail(&error);
                    Some(Err(error))
                }
            }
        })))
    }

    /// How it goes on, as soon as that is known: something else waits for it meanwhile.
    pub(super) async fn way(mut self) -> SectionWay {
        match tokio::time::timeout(EARLY_PATIENCE, &mut self.0).await {
            Ok(Ok(Some(Ok(bytes)))) => SectionWay::Here(bytes),
            Ok(Ok(Some(Err(error)))) => SectionWay::Failed(error),
            _ => SectionWay::Asked,
        }
    }
}

impl Drop for EarlySection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where a dedup section comes from.
pub(super) enum SectionWay {
    /// It has come beside the index, unless these are other bytes.
    Here(Bytes),
    /// It follows in this answer, behind the hot pack.
    Follows(Answer),
    /// It has to be asked for; a place has failed.
    Failed(SourceError),
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
        SectionWay::Here(bytes) => {
            core.count_fetched(bytes.len());
            if bytes.len() == usable_len {
                return Ok(bytes);
            }
            None
        }
        SectionWay::Follows(Answer { mut incoming, slot, .. }) => {
            let header_len = usize::try_from(SKIPPABLE_HEADER_LEN).expect("a few bytes");
            let take = async {
                incoming.take(header_len, |len| core.count_fetched(len)).await?;
                incoming.take(usable_len, |len| core.count_fetched(len)).await
            };
            match take.await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    slot.fail(&error);
                    Some(error)
                }
            }
        }
        SectionWay::Failed(error) => Some(error),
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
