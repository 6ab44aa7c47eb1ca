//! A hot pack on its way: copies of what a start-up reads, streamed into the cache right behind the index.
//!
//! Its frames are received, verified and decompressed while those before them are cut into pieces and written. A read of
//! what the stream will bring soon waits for it. A hot pack that is wrong or breaks off is given up: whoever waited looks
//! again, and what is missing then is fetched as frames of the layer.

use std::{fmt, io, ops::Range, sync::Arc};

use format_spec::{
    Digest,
    footer::SKIPPABLE_HEADER_LEN,
    records::{PLAIN_ALIGN, hot_reason},
};
use tokio::sync::mpsc;

use crate::{
    disk::{frame_store::FrameStore, mapping::LayerIndex},
    fetch::{
        decode::{DecodeError, Workspaces},
        incoming::Incoming,
        scheduler::{Scheduler, Slot, StreamKind},
        source::SourceError,
        wait::Wait,
    },
    layer_core::LayerCore,
    ranges::without,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
        lock,
    },
};

/// Frames that are not needed, in compressed bytes, are received rather than left out of a request when they are no
/// longer than this: about what a round trip costs.
const GAP_LEN_MAX: u64 = 128 << 10;

/// A read waits for what comes within this many bytes of a pack; for what is farther away it asks.
const WAIT_LEN_MAX: u64 = 512 << 10;
/// The same of a pack that was recorded: all of it is going to be read, and a request beside it would share the link with
/// it, and bring whole frames of the layer where the pack has parts of them.
const RECORDED_WAIT_LEN_MAX: u64 = 8 << 20;

/// Frames of a pack that are decompressed or wait to be kept, beside one that is kept and one that is received.
const DECODING_MAX: usize = 1;

/// A hot pack, or parts of one, that is being received.
#[derive(Debug)]
pub(crate) struct HotStream {
    /// The frames that are received, ascending; each range is one request.
    requests: Vec<Range<usize>>,
    layout: Layout,
    /// What is received, by plain offset.
    pieces: Vec<ComingPiece>,
    /// How far ahead of what has arrived a read waits, in compressed bytes.
    wait_len: u64,
    /// Offset in the pack up to which bytes have arrived.
    received_until: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct ComingPiece {
    plain: Range<u64>,
    frames: Range<usize>,
}

#[derive(Debug, Default)]
struct State {
    /// Frames before this one are in the cache.
    kept_until: usize,
    /// Nothing more comes.
    is_over: bool,
    /// Who waits, and until which frame has been kept.
    waits: Vec<(usize, Arc<Wait>)>,
}

/// Why a hot pack is given up.
#[derive(Debug, thiserror::Error)]
enum HotError {
    #[error("frame {0}: {1}")]
    Frame(usize, DecodeError),
    #[error("{0}")]
    Source(#[from] SourceError),
    #[error("cache cannot be written: {0}")]
    Disk(#[from] io::Error),
    #[error("layer is no longer fetched")]
    Stopped,
}

impl HotStream {
    /// The whole hot pack of a layer; `None` if it has none.
    pub(crate) fn of_all(index: &LayerIndex) -> Option<Arc<Self>> {
        let count = index.hot_frames().len();
        (count > 0).then(|| Self::new(index, Layout::of(index), std::iter::once(0..count).collect()))
    }

    /// The frames of a hot pack with bytes for which `is_missing` holds; `None` if there are none.
    pub(crate) fn of_missing(index: &LayerIndex, is_missing: impl Fn(&Range<u64>) -> bool) -> Option<Arc<Self>> {
        let layout = Layout::of(index);
        let mut is_needed = vec![false; index.hot_frames().len()];
        for (number, piece) in index.hot_pieces().iter().enumerate() {
            if is_missing(&piece.plain_range()) {
                is_needed[layout.frames_of(number)].fill(true);
            }
        }
        let mut requests: Vec<Range<usize>> = Vec::new();
        for frame in (0..is_needed.len()).filter(|frame| is_needed[*frame]) {
            match requests.last_mut() {
                Some(last) if start_of(&layout.frame_ends, frame) - layout.range_of(last).end <= GAP_LEN_MAX => {
                    last.end = frame + 1;
                }
                _ => requests.push(frame..frame + 1),
            }
        }
        (!requests.is_empty()).then(|| Self::new(index, layout, requests))
    }

    fn new(index: &LayerIndex, layout: Layout, requests: Vec<Range<usize>>) -> Arc<Self> {
        let is_received = |frames: &Range<usize>| {
            let request = requests.partition_point(|request| request.end <= frames.start);
            requests.get(request).is_some_and(|request| request.start <= frames.start && frames.end <= request.end)
        };
        let pieces = index.hot_pieces().iter().enumerate();
        let mut pieces: Vec<_> = pieces
            .map(|(number, piece)| ComingPiece { plain: piece.plain_range(), frames: layout.frames_of(number) })
            .filter(|piece| is_received(&piece.frames))
            .collect();
        pieces.sort_by_key(|piece| piece.plain.start);
        let received_until = requests.first().map_or(0, |first| layout.range_of(first).start).into();
        let is_recorded = index.hot_pieces().iter().all(|piece| piece.reason.get() == hot_reason::PROFILE);
        let wait_len = if is_recorded { RECORDED_WAIT_LEN_MAX } else { WAIT_LEN_MAX };
        Arc::new(Self { requests, layout, pieces, wait_len, received_until, state: Mutex::default() })
    }

    /// What this stream brings of `runs`: the frames to wait for, and the runs that it does not bring.
    ///
    /// Somebody who `is_blocked` does not wait for what is far away.
    pub(crate) fn take(&self, runs: &[Range<u64>], is_blocked: bool) -> (Vec<usize>, Vec<Range<u64>>) {
        let kept_until = match &*lock(&self.state) {
            State { is_over: true, .. } => return (Vec::new(), runs.to_vec()),
            state => state.kept_until,
        };
        let far = self.received_until.load(Ordering::Acquire).saturating_add(self.wait_len);
        let (mut frames, mut coming) = (Vec::new(), Vec::new());
        for run in runs {
            let first = self.pieces.partition_point(|piece| piece.plain.end <= run.start);
            for piece in self.pieces[first..].iter().take_while(|piece| piece.plain.start < run.end) {
                let is_far = is_blocked && self.layout.range_of(&piece.frames).start > far;
                if piece.frames.end > kept_until && !is_far {
                    frames.push(piece.frames.end - 1);
                    coming.push(piece.plain.clone());
                }
            }
        }
        frames.sort_unstable();
        frames.dedup();
        (frames, without(runs, &coming))
    }

    /// Makes `wait` wait until a frame is kept, unless it is or nothing more comes.
    pub(crate) fn join(&self, frame: usize, wait: &Arc<Wait>) {
        let mut state = lock(&self.state);
        if !state.is_over && state.kept_until <= frame {
            wait.add_part();
            state.waits.push((frame, wait.clone()));
        }
    }

    /// Frames before `frame` are in the cache. Call it on a thread that may block.
    pub(crate) fn note_kept(&self, frame: usize) {
        let mut state = lock(&self.state);
        state.kept_until = frame;
        let ended: Vec<_> = state.waits.extract_if(.., |(until, _)| *until < frame).collect();
        drop(state);
        ended.iter().for_each(|(_, wait)| wait.part_ended());
    }

    /// Nothing more comes; returns who waits still.
    pub(crate) fn end(&self) -> Vec<(usize, Arc<Wait>)> {
        let mut state = lock(&self.state);
        state.is_over = true;
        std::mem::take(&mut state.waits)
    }
}

/// Ends a stream however its task ends.
struct Ending<'a> {
    layer: &'a Arc<LayerCore>,
    stream: &'a Arc<HotStream>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let waits = self.stream.end();
        self.layer.runtime().spawn_blocking(move || waits.iter().for_each(|(_, wait)| wait.part_ended()));
    }
}

/// Receives a hot pack into the cache; `first` is the answer that brought the index, if the pack comes in it.
///
/// Returns that answer if all of it that is the pack's has come: it stands behind the pack.
pub(crate) async fn receive(
    layer: &Arc<LayerCore>,
    scheduler: &Arc<Scheduler>,
    stream: &Arc<HotStream>,
    first: Option<(Incoming, Slot)>,
) -> Option<(Incoming, Slot)> {
    let ending = Ending { layer, stream };
    let received = receive_all(layer, scheduler, stream, first).await;
    drop(ending);
    let (blob, hot_bytes) = (layer.blob(), layer.progress().hot_bytes);
    match &received {
        Ok(_) => tracing::debug!(%blob, hot_bytes, "hot pack arrived"),
        Err(HotError::Stopped) => {}
        Err(error) => tracing::warn!(%blob, hot_bytes, %error, "hot pack ignored: reads fetch what they need"),
    }
    received.ok().flatten()
}

async fn receive_all(
    layer: &Arc<LayerCore>,
    scheduler: &Arc<Scheduler>,
    stream: &Arc<HotStream>,
    mut first: Option<(Incoming, Slot)>,
) -> Result<Option<(Incoming, Slot)>, HotError> {
    let (mut writer, workspaces) = (Writer::default(), scheduler.workspaces());
    let mut rest = None;
    for request in &stream.requests {
        let mut frames = request.clone();
        let mut tries_left = layer.places.tries();
        while !frames.is_empty() {
            let (slot, incoming, is_first) = match first.take() {
                // Between the index and the pack.
                Some((incoming, slot)) => (slot, skip_header(layer, incoming).await, true),
                None => {
                    let (slot, incoming) = ask(layer, scheduler, stream, frames.clone()).await?;
                    (slot, incoming, false)
                }
            };
            let received = match incoming {
                Ok(incoming) => {
                    receive_frames(layer, stream, &slot, incoming, &mut frames, &mut writer, &workspaces).await
                }
                Err(error) => Err(error.into()),
            };
            match received {
                Err(HotError::Source(error)) => {
                    slot.fail(&error);
                    tries_left -= 1;
                    if tries_left == 0 {
                        return Err(error.into());
                    }
                }
                received => rest = Some((received?, slot)).filter(|_| is_first),
            }
        }
    }
    Ok(rest)
}

async fn skip_header(layer: &LayerCore, mut incoming: Incoming) -> Result<Incoming, SourceError> {
    let header_len = usize::try_from(SKIPPABLE_HEADER_LEN).expect("a few bytes");
    incoming.take(header_len, |len| layer.count_fetched(len)).await?;
    Ok(incoming)
}

/// Asks for frames of a pack at the place whose turn it is.
async fn ask(
    layer: &LayerCore,
    scheduler: &Arc<Scheduler>,
    stream: &HotStream,
    frames: Range<usize>,
) -> Result<(Slot, Result<Incoming, SourceError>), HotError> {
    let slot = scheduler.slot(layer.number, StreamKind::Opening).await.ok_or(HotError::Stopped)?;
    let (start, range) = (layer.hot_start(slot.place()), stream.layout.range_of(&frames));
    tracing::debug!(blob = %layer.blob(), ?range, place = %slot.place().description, "hot pack requested");
    let opened = slot.open(start.saturating_add(range.start)..start.saturating_add(range.end)).await;
    Ok((slot, opened))
}

/// Receives frames and returns the answer, which may go on behind them; `frames` is left with what did not come. While a
/// frame is kept, the next ones are decompressed and received.
async fn receive_frames(
    layer: &Arc<LayerCore>,
    stream: &Arc<HotStream>,
    slot: &Slot,
    mut incoming: Incoming,
    frames: &mut Range<usize>,
    writer: &mut Writer,
    workspaces: &Arc<Workspaces>,
) -> Result<Incoming, HotError> {
    let (decoding, mut decoded) = mpsc::channel(DECODING_MAX);
    let wanted = frames.clone();
    let receive = async move {
        for frame in wanted {
            let record = layer.store.index().hot_frames()[frame];
            let len = record.compressed_len.get() as usize;
            let compressed = match incoming.take(len, |len| layer.count_fetched(len)).await {
                Ok(compressed) => compressed,
                // Frames that came before are kept first.
                Err(error) => return Ok(Err(error)),
            };
            stream.received_until.store(stream.layout.frame_ends[frame], Ordering::Release);
            let workspaces = workspaces.clone();
            let content = layer.runtime().spawn_blocking(move || {
                workspaces
                    .decode(&compressed, Digest::from_bytes(record.digest), record.plain_len.get())
                    .map_err(|error| HotError::Frame(frame, error))
            });
            if decoding.send((len, content)).await.is_err() {
                return Err(HotError::Stopped);
            }
        }
        Ok(Ok(incoming))
    };
    let keep = async {
        while let Some((len, content)) = decoded.recv().await {
            let content = content.await.unwrap_or(Err(HotError::Stopped))?;
            if layer.is_removed() {
                return Err(HotError::Stopped);
            }
            // One at a time: pieces may go on in the next frame, and the disk is no faster for two.
            let frame = frames.start;
            let (layer, stream, mut taken) = (layer.clone(), stream.clone(), std::mem::take(writer));
            let kept = layer.runtime().clone().spawn_blocking(move || {
                taken.keep(&layer.store, &stream.layout, frame, &content)?;
                layer.count_hot(len);
                stream.note_kept(frame + 1);
                Ok::<_, HotError>(taken)
            });
            *writer = kept.await.unwrap_or(Err(HotError::Stopped))?;
            slot.works();
            frames.start += 1;
        }
        Ok(())
    };
    let (received, ()) = tokio::try_join!(receive, keep)?;
    Ok(received?)
}

/// Cuts frames into pieces.
#[derive(Debug, Default)]
struct Writer {
    /// What the last frame ended with: a part of a page, and where that page starts.
    rest: (u64, Vec<u8>),
}

impl Writer {
    fn keep(&mut self, store: &FrameStore, layout: &Layout, frame: usize, content: &[u8]) -> io::Result<()> {
        let position = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
        for (plain, bytes, is_end) in layout.cut(store.index(), frame) {
            let bytes = content.get(position(bytes.start)?..position(bytes.end)?).unwrap_or_default();
            let (rest_start, rest) = std::mem::take(&mut self.rest);
            let goes_on = !rest.is_empty() && rest_start + rest.len() as u64 == plain;
            let joined = goes_on.then(|| [&rest, bytes].concat());
            let (start, bytes) = joined.as_deref().map_or((plain, bytes), |joined| (rest_start, joined));
            // Without the frame before, the page that both share stays missing.
            let skipped = position(start.next_multiple_of(PLAIN_ALIGN) - start)?.min(bytes.len());
            let (start, bytes) = (start + skipped as u64, &bytes[skipped..]);
            let whole_len = if is_end { bytes.len() } else { bytes.len() - bytes.len() % position(PLAIN_ALIGN)? };
            store.write_pages(start, &bytes[..whole_len])?;
            self.rest = (start + whole_len as u64, bytes[whole_len..].to_vec());
        }
        Ok(())
    }
}

/// Where the frames of a hot pack and its pieces end: computed once, so that no index makes it expensive.
#[derive(Debug)]
struct Layout {
    /// End of each frame in the pack, in compressed bytes.
    frame_ends: Vec<u64>,
    /// End of each frame's content in that of the pack.
    content_ends: Vec<u64>,
    /// End of each piece in the content of the pack.
    piece_ends: Vec<u64>,
}

impl Layout {
    fn of(index: &LayerIndex) -> Self {
        let frames = index.hot_frames();
        Self {
            frame_ends: ends(frames.iter().map(|frame| frame.compressed_len.get())),
            content_ends: ends(frames.iter().map(|frame| frame.plain_len.get())),
            piece_ends: ends(index.hot_pieces().iter().map(|piece| piece.len.get())),
        }
    }

    /// Where frames lie in the pack.
    fn range_of(&self, frames: &Range<usize>) -> Range<u64> {
        start_of(&self.frame_ends, frames.start)..start_of(&self.frame_ends, frames.end)
    }

    /// The frames that hold a piece.
    fn frames_of(&self, piece: usize) -> Range<usize> {
        let (start, end) = (start_of(&self.piece_ends, piece), self.piece_ends[piece]);
        let first = self.content_ends.partition_point(|frame_end| *frame_end <= start);
        first..self.content_ends.partition_point(|frame_end| *frame_end < end) + 1
    }

    /// What a frame holds: plain offset, range of the frame's content, and whether a piece ends there.
    fn cut<'a>(
        &'a self,
        index: &'a LayerIndex,
        frame: usize,
    ) -> impl Iterator<Item = (u64, Range<u64>, bool)> + use<'a> {
        let (start, end) = (start_of(&self.content_ends, frame), self.content_ends[frame]);
        let first = self.piece_ends.partition_point(|piece_end| *piece_end <= start);
        let pieces = (first..).zip(&index.hot_pieces()[first..]);
        pieces.map_while(move |(number, piece)| {
            let (piece_start, piece_end) = (start_of(&self.piece_ends, number), self.piece_ends[number]);
            let part = piece_start.max(start)..piece_end.min(end);
            let plain = piece.plain_offset.get() + part.start.saturating_sub(piece_start);
            (!part.is_empty()).then(|| (plain, part.start - start..part.end - start, part.end == piece_end))
        })
    }
}

fn ends(lens: impl Iterator<Item = u32>) -> Vec<u64> {
    let mut end = 0;
    lens.map(|len| {
        end += u64::from(len);
        end
    })
    .collect()
}

fn start_of(ends: &[u64], number: usize) -> u64 {
    number.checked_sub(1).and_then(|before| ends.get(before)).copied().unwrap_or(0)
}

impl fmt::Debug for Ending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ending").finish_non_exhaustive()
    }
}
