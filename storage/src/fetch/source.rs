//! Where the bytes of a layer blob come from.
//!
//! `registry` implements [`Source`] over HTTP ranges; tests implement it over memory.

use std::{fmt, ops::Range, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use format_spec::LazyLayer;
use futures_util::Stream;
use serde_json::Value;

/// The bytes of a range, in pieces of any size, as they arrive.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;
/// What [`Source::fetch`] returns.
pub type FetchFuture<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, SourceError>> + Send + 'a>>;

/// The future that [`Source::fetch_wide`] returns.
pub type FetchWideFuture<'a> = Pin<Box<dyn Future<Output = Result<WideStream, SourceError>> + Send + 'a>>;

/// Bytes of a blob that hold a range and may begin before it and end behind it.
pub struct WideStream {
    /// Where the bytes lie in the blob.
    pub range: Range<u64>,
    /// The bytes.
    pub stream: ByteStream,
}

/// One layer blob, readable by range. Mirrors are the source's own business.
///
/// Nothing has a default: a source that wraps another one cannot forget to pass something on.
pub trait Source: Send + Sync + 'static {
    /// The name of the host that answers: sources with the same one share what one source may have. `None` is like no
    /// other.
    fn origin(&self) -> Option<String>;

    /// Starts to fetch `range` (compressed bytes of the blob).
    ///
    /// The stream yields exactly the bytes of `range` in order, or ends with an error; nothing about
    /// their content is verified. Dropping the stream ends the request.
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_>;

    /// The same, from a source that may have the blob as a whole only: then the stream is all of it, so that whoever
    /// can use what passes by need not have it sent again. Otherwise it is exactly the range: see
    /// [`WideStream::exact`].
    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_>;
}

impl WideStream {
    /// The result of [`Source::fetch_wide`] of a source that always has ranges; `fetched` is what it has for `range`.
    pub fn exact(range: Range<u64>, fetched: FetchFuture<'_>) -> FetchWideFuture<'_> {
        Box::pin(async move { Ok(Self { range, stream: fetched.await? }) })
    }
}

/// The meaning of a failure of a source for whoever may ask again.
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
    /// Its meaning for another try.
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
