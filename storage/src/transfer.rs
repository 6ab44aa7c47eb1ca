//! One request: a range of neighbouring frames, each checked, decompressed and kept as it arrives.
//!
//! Bytes are received on the runtime's reactor; hashing, decompressing and writing happen on its
//! blocking threads, so that a burst of frames delays no other stream.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use format_spec::Frame;

use crate::{
    decode::{DecodeError, decode},
    error::ReadError,
    layer::{LayerInner, Priority},
    scheduler::{InFlight, Scheduler},
    source::{Incoming, SourceError},
};

/// Frames on their way.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) layer: Arc<LayerInner>,
    pub(crate) priority: Priority,
    pub(crate) number: u64,
    /// Neighbours in the blob, first to last.
    pub(crate) frames: VecDeque<(InFlight, Frame)>,
    /// Offset in the blob up to which bytes have arrived.
    pub(crate) received_until: Arc<AtomicU64>,
}

impl Request {
    fn blob_range(&self) -> Range<u64> {
        let first = self.frames.front().map_or(0..0, |(_, frame)| frame.blob_range());
        let last = self.frames.back().map_or(0..0, |(_, frame)| frame.blob_range());
        first.start..last.end
    }

    fn take_frames(&mut self) -> impl DoubleEndedIterator<Item = InFlight> + use<> {
        std::mem::take(&mut self.frames).into_iter().map(|(in_flight, _)| in_flight)
    }

    fn source_error(&self, error: SourceError) -> ReadError {
        ReadError::Source { blob: self.layer.blob(), error }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.scheduler.end_request(self.number);
    }
}

/// Fetches the frames of a request.
pub(crate) async fn run(mut request: Request) {
    let range = request.blob_range();
    tracing::debug!(blob = %request.layer.blob(), ?range, priority = ?request.priority, "frames requested");
    let source = request.layer.source();
    let mut incoming = match Incoming::open(&*source, range).await {
        Ok(incoming) => incoming,
        Err(error) => {
            let error = request.source_error(error);
            let frames = request.take_frames();
            return request.scheduler.fail(frames, error);
        }
    };
    let (layer, received_until) = (request.layer.clone(), request.received_until.clone());
    let count = |len| {
        received_until.fetch_add(len as u64, Ordering::AcqRel);
        layer.count_fetched(len);
    };
    while let Some((in_flight, record)) = request.frames.pop_front() {
        if request.layer.is_removed() {
            return;
        }
        if !in_flight.is_wanted() {
            // A read has taken it over: what comes after it is cheaper asked for again than received twice.
            let after = request.take_frames();
            request.scheduler.requeue(after, None);
            return;
        }
        let len = record.compressed_len.get() as usize;
        let compressed = match incoming.take(len, count).await {
            Ok(compressed) => compressed,
            Err(error) => {
                let error = request.source_error(error);
                tracing::debug!(%error, "request broke off");
                request.frames.push_front((in_flight, record));
                let missing = request.take_frames();
                request.scheduler.requeue(missing, Some(&error));
                return;
            }
        };
        let Ok(permit) = request.scheduler.decoders(request.priority).acquire_owned().await else { return };
        let scheduler = request.scheduler.clone();
        request.scheduler.runtime().spawn_blocking(move || {
            keep(&scheduler, in_flight, &record, &compressed);
            drop(permit);
        });
    }
}

/// Verifies, decompresses and writes a frame, and wakes who waits for it.
fn keep(scheduler: &Arc<Scheduler>, in_flight: InFlight, record: &Frame, compressed: &[u8]) {
    let (blob, frame) = (in_flight.layer.blob(), in_flight.frame);
    let plain_len = record.plain_len.get();
    let content = match decode(compressed, record.digest(), plain_len) {
        Ok(content) => content,
        Err(DecodeError::Digest { expected, found }) => {
            let error = ReadError::Corrupt { blob, frame, expected, found };
            return scheduler.requeue(std::iter::once(in_flight), Some(&error));
        }
        Err(DecodeError::Content(reason)) => {
            return scheduler.fail([in_flight], ReadError::Undecodable { blob, frame, plain_len, reason });
        }
    };
    let layer = in_flight.layer.clone();
    if let Err(error) = layer.store.compare_frame(frame, &content) {
        tracing::debug!(%blob, frame, %error, "frame cannot be compared with what is here");
    }
    match layer.store.write_frame(frame, &content) {
        Ok(()) => {
            in_flight.arrived(None);
            // Nobody waits for it. Without it the frame is fetched again for the proof.
            if let Err(error) = layer.store.keep_gaps(frame, &content) {
                tracing::debug!(%blob, frame, %error, "what the proof needs of a frame is not kept");
            }
        }
        Err(error) => {
            tracing::warn!(%blob, frame, %error, "cache cannot be written: frame is served from memory");
            let content = Bytes::from(content);
            layer.store.keep_in_memory(frame, content.clone());
            in_flight.arrived(Some(&content));
        }
    }
}
