//! How a layer gets its verdict: what the proof needs and nobody has wanted is fetched, then the proof is made.
//!
//! In the background that happens to complete layers, one of each source at a time and at the rate of everything else
//! that nobody waits for (`cache/verifying.rs`). Where somebody waits it happens at once and as fast as the source is,
//! content that is missing included: the blob is read in long ranges, one after the other, past the queues of readers.
//! The scheduler has slots for that, a few for the node: a step has one, not a layer, and sources take turns.

use std::{
    collections::VecDeque,
    num::NonZeroU64,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use format_spec::Frame;
use tokio::sync::Semaphore;

use crate::{
    disk::{proof::ProofError, verdict::Verdict},
    error::ReadError,
    fetch::{
        decode::{DecodeError, Workspaces},
        scheduler::{Scheduler, Slot, StreamKind},
        source::SourceError,
    },
    layer_core::LayerCore,
    sync::{Mutex, atomic::Ordering, lock},
};

/// Compressed bytes of one request. A step that fails is asked for again as a whole.
const STEP_LEN_MAX: u64 = 8 << 20;
/// The time that a step may take beside that of its bytes at [`STEP_RATE_MIN`]: a place that stands still is given up.
const STEP_TIME_MAX: Duration = Duration::from_secs(20);
/// Bytes a second below which a place is as good as one that stands still.
const STEP_RATE_MIN: u64 = 64 << 10;
/// How often a verification without haste looks whether somebody waits by now.
const HASTE_LOOK: Duration = Duration::from_millis(50);
/// Proofs at a time in this process: each may hold the tree of a layer, a few hundred bytes a file.
static PROOFS: Semaphore = Semaphore::const_new(1);
/// Times that a step gives its slot to another source without having brought anything.
const DISPLACED_MAX: usize = 4;

/// Frames to fetch in one request, with their records.
type Step = Vec<(u32, Frame)>;

/// A verification that is under way, as long as this lives.
pub(crate) struct UnderWay {
    layer: Arc<LayerCore>,
    scheduler: Arc<Scheduler>,
}

impl UnderWay {
    /// Begins one, unless there is a verdict or one is under way.
    pub(crate) fn begin(layer: &Arc<LayerCore>, scheduler: &Arc<Scheduler>) -> Option<Self> {
        let proof = layer.store.proof();
        let is_free = proof.verdict().is_none() && !proof.is_under_way.swap(true, Ordering::AcqRel);
        is_free.then(|| Self { layer: layer.clone(), scheduler: scheduler.clone() })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.layer.store.proof().is_under_way.store(false, Ordering::Release);
    }
}

/// Verifies a layer at full speed, in a task of its own.
pub(crate) fn verify_in_haste(layer: &Arc<LayerCore>, scheduler: &Arc<Scheduler>) {
    layer.store.proof().is_urgent.store(true, Ordering::Release);
    let Some(under_way) = UnderWay::begin(layer, scheduler) else { return };
    let layer = layer.clone();
    layer.runtime().clone().spawn(async move {
        if let Err(error) = verify(under_way, None).await {
            tracing::warn!(blob = %layer.blob(), %error, "layer cannot be verified yet");
        }
    });
}

impl LayerCore {
    fn is_urgent(&self) -> bool {
        self.store.proof().is_urgent.load(Ordering::Acquire)
    }

    /// Whether a frame must be fetched before there can be a proof.
    fn is_needed(&self, frame: u32) -> bool {
        self.store.proof().wants(self.store.index(), frame) || !self.store.has_content_of(frame)
    }

    /// Neighbouring frames that are missing, from `from` on.
    fn next_step(&self, from: u32) -> Option<Step> {
        let frames = || (0u32..).zip(self.store.index().frames());
        let first = frames().skip(from as usize).map(|(number, _)| number).find(|number| self.is_needed(*number))?;
        let mut len = 0;
        let step = frames().skip(first as usize).take_while(|(number, frame)| {
            len += u64::from(frame.compressed_len.get());
            *number == first || (len <= STEP_LEN_MAX && self.is_needed(*number))
        });
        Some(step.map(|(number, frame)| (number, *frame)).collect())
    }

    /// Verifies, decompresses and keeps a frame that came for the proof.
    fn keep_for_proof(
        &self,
        number: u32,
        frame: &Frame,
        compressed: &[u8],
        workspaces: &Arc<Workspaces>,
    ) -> Result<(), ReadError> {
        let blob = self.blob();
        let plain_len = frame.plain_len.get();
        let content = workspaces.decode(compressed, frame.digest(), plain_len).map_err(|error| match error {
            DecodeError::Digest { expected, found } => ReadError::Corrupt { blob, frame: number, expected, found },
            DecodeError::Content(reason) => ReadError::Undecodable { blob, frame: number, plain_len, reason },
        })?;
        let kept = self.store.compare_frame(number, &content).and_then(|()| {
            if !self.store.has_content_of(number) {
                self.store.write_frame(number, &content)?;
            }
            self.store.keep_gaps(number, &content)
        });
        kept.map_err(|error| ReadError::Disk { blob, error: Arc::new(error) })
    }
}

/// The rate of everything that is fetched for verifications for which nobody waits.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: NonZeroU64,
    /// No step begins before.
    not_before: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, not_before: Mutex::new(Instant::now()) }
    }

    /// So much was fetched since `started`; when the next step may begin.
    fn note(&self, started: Instant, fetched: u64) -> Instant {
        let mut not_before = lock(&self.not_before);
        let took = Duration::from_millis(fetched.saturating_mul(1000) / self.bytes_per_second);
        *not_before = (*not_before).max(started) + took;
        *not_before
    }
}

/// Verifies a layer; the pace is kept until somebody waits.
///
/// # Errors
///
/// When something cannot be fetched or kept: there is no verdict then, and another try may bring one.
pub(crate) async fn verify(under_way: UnderWay, pace: Option<&Pace>) -> Result<Verdict, ReadError> {
    let UnderWay { layer, scheduler } = &under_way;
    let stopped = || ReadError::Stopped(layer.blob());
    let mut from = 0;
    loop {
        if layer.is_removed() {
            return Err(stopped());
        }
        let step = layer.blocking(move |layer| layer.next_step(from)).await.ok_or_else(stopped)?;
        let Some(step) = step else { break };
        from = step.last().map_or(from, |(number, _)| number.saturating_add(1));
        let (started, before) = (Instant::now(), layer.fetched_bytes());
        fetch_step(layer, scheduler, step).await?;
        if layer.store.proof().verdict().is_some() {
            break;
        }
        let fetched = layer.fetched_bytes().saturating_sub(before);
        let not_before = pace.map_or(started, |pace| pace.note(started, fetched));
        while Instant::now() < not_before && !layer.is_urgent() {
            tokio::time::sleep(HASTE_LOOK.min(not_before.saturating_duration_since(Instant::now()))).await;
        }
    }
    let _permit = PROOFS.acquire().await;
    let proven = layer.blocking(|layer| layer.store.prove()).await.ok_or_else(stopped)?;
    let blob = layer.blob();
    match proven {
        Ok(verdict @ Verdict::Verified { .. }) => {
            tracing::info!(%blob, %verdict, "layer is what its tar stream says");
            Ok(verdict)
        }
        Ok(verdict @ Verdict::Refused { .. }) => {
            let description = layer.description();
            tracing::error!(%blob, %description, %verdict, "layer is not what its tar stream says: it is shown no longer");
            Ok(verdict)
        }
        Err(ProofError::Disk(error)) => Err(ReadError::Disk { blob, error: Arc::new(error) }),
        Err(error @ ProofError::Missing) => {
            Err(ReadError::Disk { blob, error: Arc::new(std::io::Error::other(error.to_string())) })
        }
    }
}

/// Fetches a step from the places of a layer in their turn.
async fn fetch_step(layer: &Arc<LayerCore>, scheduler: &Arc<Scheduler>, step: Step) -> Result<(), ReadError> {
    let blob = layer.blob();
    let (mut left, workspaces): (VecDeque<_>, _) = (step.into(), scheduler.workspaces());
    let (mut tries_left, mut displaced_left) = (layer.places.tries(), DISPLACED_MAX);
    loop {
        let slot = scheduler.slot(layer.number, StreamKind::Proof).await.ok_or(ReadError::Stopped(blob))?;
        let bytes: u64 = left.iter().map(|(_, frame)| u64::from(frame.compressed_len.get())).sum();
        let time_max = STEP_TIME_MAX + Duration::from_secs(bytes / STEP_RATE_MIN);
        let before = left.len();
        let fetched = tokio::time::timeout(time_max, fetch_frames(layer, &slot, &mut left, &workspaces)).await;
        let fetched = fetched.unwrap_or_else(|_| {
            let error = SourceError::passing(format!("it did not bring a step within {time_max:?}"));
            Err(ReadError::Source { blob, error })
        });
        match fetched {
            Err(ReadError::Source { .. }) if slot.is_displaced() && (left.len() < before || displaced_left > 0) => {
                displaced_left -= usize::from(left.len() == before);
            }
            Err(ReadError::Source { error, .. }) => {
                slot.fail(&error);
                tries_left -= 1;
                if tries_left == 0 {
                    return Err(ReadError::Source { blob, error });
                }
            }
            fetched => return fetched,
        }
    }
}

/// Fetches frames with one request; `left` is left with those that did not come.
async fn fetch_frames(
    layer: &Arc<LayerCore>,
    slot: &Slot,
    left: &mut VecDeque<(u32, Frame)>,
    workspaces: &Arc<Workspaces>,
) -> Result<(), ReadError> {
    let blob = layer.blob();
    let source_error = |error| ReadError::Source { blob, error };
    let range = left.front().map_or(0, |(_, frame)| frame.blob_range().start)
        ..left.back().map_or(0, |(_, frame)| frame.blob_range().end);
    tracing::debug!(%blob, ?range, "frames requested for the proof");
    let mut incoming = slot.open(range).await.map_err(source_error)?;
    while let Some((number, frame)) = left.front().copied() {
        let len = frame.compressed_len.get() as usize;
        let compressed: Bytes = incoming.take(len, |len| layer.count_fetched(len)).await.map_err(source_error)?;
        let workspaces = workspaces.clone();
        let kept = layer.blocking(move |layer| layer.keep_for_proof(number, &frame, &compressed, &workspaces)).await;
        kept.ok_or(ReadError::Stopped(blob))??;
        slot.works();
        left.pop_front();
        if layer.is_removed() {
            return Err(ReadError::Stopped(blob));
        }
    }
    Ok(())
}
