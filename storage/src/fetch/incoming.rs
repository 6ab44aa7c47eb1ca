//! The bytes of one request, as they arrive.

use std::{fmt, ops::Range, sync::Arc, time::Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use crate::fetch::{
    link::Link,
    places::Place,
    source::{ByteStream, SourceError, WideStream},
};

/// A range that is being received: bytes are taken from its front in the lengths that they have a meaning in.
///
/// The scheduler sees its progress through a [`Link`], and may end it.
pub(crate) struct Incoming {
    stream: ByteStream,
    link: Arc<Link>,
    place: Arc<Place>,
    /// When the head of the answer was there.
    began: Instant,
    received: BytesMut,
    /// Bytes that have come so far.
    received_len: u64,
    /// Bytes that pass by before the next ones are taken.
    skip: u64,
    /// Bytes that the range has still to bring.
    left: u64,
    /// Where the range begins, if it is more than was asked for.
    whole_start: Option<u64>,
}

impl Incoming {
    /// Asks a place for a range.
    pub(crate) async fn open(place: &Arc<Place>, range: Range<u64>, link: Arc<Link>) -> Result<Self, SourceError> {
        let asked = place.source.fetch_wide(range.clone());
        let WideStream { range: found, stream } = source_turn(&link, asked).await??;
        let skip = range.start.checked_sub(found.start).filter(|_| found.end >= range.end);
        let skip = skip.ok_or_else(|| SourceError::unusable(format!("bytes {found:?} in place of {range:?}")))?;
        let whole_start = (found != range).then_some(found.start);
        let left = found.end.saturating_sub(found.start);
        let (place, began, received) = (place.clone(), Instant::now(), BytesMut::new());
        Ok(Self { stream, link, place, began, received, received_len: 0, skip, left, whole_start })
    }

    /// Where the source begins, if it sends all of the blob. From then on that is what is taken first; without this
    /// call it is what was asked for.
    pub(crate) fn take_whole(&mut self) -> Option<u64> {
        self.whole_start.inspect(|_| self.skip = 0)
    }

    /// Whether the source sends more than was asked for: all of the blob.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole_start.is_some()
    }

    /// Lets bytes pass by before the next ones are taken.
    pub(crate) fn skip(&mut self, len: u64) {
        self.skip = self.skip.saturating_add(len);
    }

    /// The next `len` bytes; `on_arrival` hears of every piece that comes from the source.
    ///
    /// # Errors
    ///
    /// When the source breaks off, answers with more than the range, or the scheduler ends the request.
    pub(crate) async fn take(&mut self, len: usize, mut on_arrival: impl FnMut(usize)) -> Result<Bytes, SourceError> {
        loop {
            let passed = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.received.len());
            self.skip -= passed as u64;
            drop(self.received.split_to(passed));
            if self.skip == 0 && self.received.len() >= len {
                return Ok(self.received.split_to(len).freeze());
            }
            let Some(piece) = source_turn(&self.link, self.stream.next()).await?.transpose()? else {
                return Err(SourceError::passing(format!("the source's answer ended {} bytes too early", self.left)));
            };
            let left = self.left.checked_sub(piece.len() as u64);
            self.left =
                left.ok_or_else(|| SourceError::unusable("the source's answer is longer than the range asked for"))?;
            self.link.count(piece.len());
            self.received_len += piece.len() as u64;
            self.place.best_rate.note(self.received_len, self.began.elapsed());
            on_arrival(piece.len());
            if self.skip == 0 {
                // Room for all of it at once: it is no longer than what is left of the answer.
                self.received.reserve(len.saturating_sub(self.received.len()).max(piece.len()));
            }
            self.received.extend_from_slice(&piece);
        }
    }
}

/// Waits for the source, unless the scheduler ends the request.
async fn source_turn<T>(link: &Link, turn: impl Future<Output = T>) -> Result<T, SourceError> {
    link.set_waiting(true);
    let result = tokio::select! {
        biased;
        result = turn => Ok(result),
        reason = link.cancelled() => Err(reason),
    };
    link.set_waiting(false);
    result
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("left", &self.left).finish_non_exhaustive()
    }
}
