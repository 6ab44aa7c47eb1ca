//! Where the bytes of a layer blob come from.
//!
//! `registry` implements [`Source`] over HTTP ranges; tests implement it over memory.

use std::{fmt, ops::Range, pin::Pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use format_spec::LazyLayer;
use futures_util::{Stream, StreamExt};
use serde_json::Value;

use crate::scheduler::Link;

/// The bytes of a range, in pieces of any size, as they arrive.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;
/// What [`Source::fetch`] returns.
pub type FetchFuture<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, SourceError>> + Send + 'a>>;

/// What [`Source::fetch_wide`] returns.
pub type FetchWideFuture<'a> = Pin<Box<dyn Future<Output = Result<WideStream, SourceError>> + Send + 'a>>;

/// Bytes of a blob that hold a range and may begin before it and end behind it.
pub struct WideStream {
    /// Where the bytes lie in the blob.
    pub range: Range<u64>,
    /// The bytes.
    pub stream: ByteStream,
}

/// One layer blob, readable by range. Mirrors are the source's own business.
pub trait Source: Send + Sync + 'static {
    /// What answers, as a host's name: sources with the same one share what one source may have.
    ///
    /// By default it is like no other.
    fn origin(&self) -> Option<String> {
        None
    }

    /// Starts to fetch `range` (compressed bytes of the blob).
    ///
    /// The stream yields exactly the bytes of `range` in order, or ends with an error; nothing about
    /// their content is verified. Dropping the stream ends the request.
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_>;

    /// The same, from a source that may have the blob as a whole only: then the stream is all of it, so that whoever
    /// can use what passes by need not have it sent again. Otherwise it is exactly the range.
    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        Box::pin(async move { Ok(WideStream { range: range.clone(), stream: self.fetch(range).await? }) })
    }
}

/// What a failure of a source means for whoever may ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// No answer, or one that says "later": the same request may succeed in a while.
    Passing,
    /// The source answers and says no: no permission, no such blob, a wrong name.
    Refused,
    /// The answer is none that can be used: other bytes, another range, a page of a portal.
    Unusable,
}

/// The source gave up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// What it means for another try.
    pub kind: SourceErrorKind,
    /// One line: what, where, and what to do.
    pub message: String,
    /// How long the source asks to wait before the next try.
    pub retry_after: Option<Duration>,
}

impl SourceError {
    /// A failure that may have passed when somebody asks again.
    pub fn passing(message: impl Into<String>) -> Self {
        Self::new(SourceErrorKind::Passing, message)
    }

    /// A refusal.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(SourceErrorKind::Refused, message)
    }

    /// An answer that cannot be used.
    pub fn unusable(message: impl Into<String>) -> Self {
        Self::new(SourceErrorKind::Unusable, message)
    }

    fn new(kind: SourceErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None }
    }
}

/// Makes sources from the descriptions that a cache has kept of a layer's places. Any closure of that form is one.
#[derive(Clone)]
pub struct Sources(Arc<MakeSource>);

type MakeSource = dyn Fn(&LazyLayer, &Value) -> Option<Arc<dyn Source>> + Send + Sync;

impl Sources {
    /// `source` answers `None` for what it does not understand. It does no I/O.
    pub fn new(source: impl Fn(&LazyLayer, &Value) -> Option<Arc<dyn Source>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    pub(crate) fn get(&self, layer: &LazyLayer, description: &Value) -> Option<Arc<dyn Source>> {
        (self.0)(layer, description)
    }
}

impl Default for Sources {
    /// Understands nothing: each process is told all places anew.
    fn default() -> Self {
        Self::new(|_, _| None)
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// A range that is being received: bytes are taken from its front in the lengths that they have a meaning in.
///
/// The scheduler sees its progress through a [`Link`], and may end it.
pub(crate) struct Incoming {
    stream: ByteStream,
    link: Arc<Link>,
    received: BytesMut,
    /// Bytes that pass by before the next ones are taken.
    skip: u64,
    /// Bytes that the range has still to bring.
    left: u64,
    /// Where the range begins, if it is more than was asked for.
    whole_start: Option<u64>,
}

impl Incoming {
    /// Asks for a range.
    pub(crate) async fn open(source: &dyn Source, range: Range<u64>, link: Arc<Link>) -> Result<Self, SourceError> {
        let WideStream { range: found, stream } = source_turn(&link, source.fetch_wide(range.clone())).await??;
        let skip = range.start.checked_sub(found.start).filter(|_| found.end >= range.end);
        let skip = skip.ok_or_else(|| SourceError::unusable(format!("bytes {found:?} in place of {range:?}")))?;
        let whole_start = (found != range).then_some(found.start);
        let left = found.end.saturating_sub(found.start);
        Ok(Self { stream, link, received: BytesMut::new(), skip, left, whole_start })
    }

    /// Where the source begins, if it sends all of the blob. From then on that is what is taken first; without this
    /// call it is what was asked for.
    pub(crate) fn take_whole(&mut self) -> Option<u64> {
        self.whole_start.inspect(|_| self.skip = 0)
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
            on_arrival(piece.len());
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
