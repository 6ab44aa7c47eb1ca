//! One request: a range of neighbouring frames, each checked, decompressed and kept as it arrives.
//!
//! Bytes are received on the runtime's reactor; hashing, decompressing and writing happen on its
//! blocking threads, so that a burst of frames delays no other stream.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use bytes::Bytes;
use format_spec::Frame;

use crate::{
    error::ReadError,
    fetch::{
        decode::{DecodeError, Workspaces},
        incoming::Incoming,
        link::Link,
        places::Place,
        scheduler::{Fetch, InFlight, Outcome, Priority, Scheduler},
        source::SourceError,
    },
    layer_core::LayerCore,
};

/// Frames on their way. Dropped before it has ended, they fail.
#[derive(Debug)]
struct Request {
    scheduler: Arc<Scheduler>,
    layer: Arc<LayerCore>,
    place: Arc<Place>,
    priority: Priority,
    number: u64,
    /// Neighbours in the blob, first to last.
    frames: VecDeque<(u32, Frame)>,
    link: Arc<Link>,
    workspaces: Arc<Workspaces>,
}

/// Begins to fetch frames, in a task of its own.
pub(crate) fn start(scheduler: &Arc<Scheduler>, layer: Arc<LayerCore>, place: Arc<Place>, fetch: Fetch) {
    let request = Request::new(scheduler, layer, place, fetch);
    scheduler.runtime().spawn(run(request));
}

impl Request {
    fn new(scheduler: &Arc<Scheduler>, layer: Arc<LayerCore>, place: Arc<Place>, fetch: Fetch) -> Self {
        let records = layer.store.index().frames();
        let frames = fetch.frames.filter_map(|frame| Some((frame, *records.get(frame as usize)?))).collect();
        let workspaces = scheduler.workspaces();
        let (scheduler, priority, number) = (scheduler.clone(), fetch.priority, fetch.request);
        Self { scheduler, place, priority, number, frames, link: fetch.link, layer, workspaces }
    }

    fn blob_range(&self) -> Range<u64> {
        let first = self.frames.front().map_or(0..0, |(_, frame)| frame.blob_range());
        let last = self.frames.back().map_or(0..0, |(_, frame)| frame.blob_range());
        first.start..last.end
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // No more than a look at a map if it has ended.
        self.scheduler.end(self.number, Outcome::Lost);
    }
}

/// Fetches the frames of a request.
async fn run(mut request: Request) {
    let range = request.blob_range();
    tracing::debug!(blob = %request.layer.blob(), ?range, priority = ?request.priority, "frames requested");
    let outcome = match receive(&mut request, range).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            tracing::debug!(blob = %request.layer.blob(), place = %request.place.description, %error, "request failed");
            Outcome::Failed(error)
        }
    };
    request.scheduler.end(request.number, outcome);
}

async fn receive(request: &mut Request, range: Range<u64>) -> Result<(), SourceError> {
    let mut incoming = Incoming::open(&request.place, range, request.link.clone()).await?;
    if let Some(start) = incoming.take_whole() {
        return receive_whole(request, incoming, start).await;
    }
    while let Some((frame, record)) = request.frames.pop_front() {
        let (scheduler, layer) = (&request.scheduler, &request.layer);
        if layer.is_removed() || !scheduler.is_wanted(request.number, layer, frame) {
            // A read has taken it over: what comes after it is cheaper asked for again than received twice.
            return Ok(());
        }
        if request.priority == Priority::Background {
            scheduler.let_readers_go_first(request.number).await;
        }
        if !receive_frame(request, &mut incoming, frame, record).await? {
            return Ok(());
        }
    }
    Ok(())
}

/// The same from a source that sends all of the blob whatever is asked for: each frame that is missing is kept as it
/// passes by, so that the blob is sent once.
async fn receive_whole(request: &mut Request, mut incoming: Incoming, start: u64) -> Result<(), SourceError> {
    let layer = request.layer.clone();
    let mut position = start;
    request.scheduler.take_all(request.number, &layer);
    request.frames.clear();
    for (frame, record) in (0..).zip(layer.store.index().frames()) {
        if layer.is_removed() {
            return Ok(());
        }
        let Some(gap) = record.blob_offset.get().checked_sub(position) else { continue };
        if !request.scheduler.is_wanted(request.number, &layer, frame) {
            continue;
        }
        incoming.skip(gap);
        position = record.blob_range().end;
        // Where somebody else has brought it meanwhile, it has passed by.
        receive_frame(request, &mut incoming, frame, *record).await?;
    }
    Ok(())
}

/// Receives a frame and has it decoded; false where nobody wants it, or the process ends.
async fn receive_frame(
    request: &Request,
    incoming: &mut Incoming,
    frame: u32,
    record: Frame,
) -> Result<bool, SourceError> {
    let (scheduler, layer) = (&request.scheduler, &request.layer);
    let len = record.compressed_len.get() as usize;
    let compressed = incoming.take(len, |len| layer.count_fetched(len)).await?;
    let Some(in_flight) = scheduler.receive(request.number, layer, frame) else { return Ok(false) };
    if request.priority == Priority::Read {
        layer.count_demanded(len as u64);
    }
    let Ok(permit) = scheduler.decoders(request.priority).acquire_owned().await else { return Ok(false) };
    let workspaces = request.workspaces.clone();
    scheduler.runtime().spawn_blocking(move || {
        keep(in_flight, &record, &compressed, &workspaces);
        drop(permit);
    });
    Ok(true)
}

/// Verifies, decompresses and writes a frame, and wakes who waits for it.
fn keep(in_flight: InFlight, record: &Frame, compressed: &[u8], workspaces: &Arc<Workspaces>) {
    let (blob, frame) = (in_flight.layer.blob(), in_flight.frame);
    let plain_len = record.plain_len.get();
    let content = match workspaces.decode(compressed, record.digest(), plain_len) {
        Ok(content) => content,
        Err(DecodeError::Digest { expected, found }) => {
            return in_flight.refuse(ReadError::Corrupt { blob, frame, expected, found });
        }
        Err(DecodeError::Content(reason)) => {
            return in_flight.fail(ReadError::Undecodable { blob, frame, plain_len, reason });
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
            let content = Bytes::copy_from_slice(&content);
            layer.store.keep_in_memory(frame, content.clone());
            in_flight.arrived(Some(&content));
        }
    }
}
