//! Where the bytes of a layer blob come from.
//!
//! `registry` implements [`Source`] over HTTP ranges; tests implement it over memory.

use std::{ops::Range, pin::Pin};

use bytes::Bytes;
use futures_util::Stream;

/// The bytes of a range, in pieces of any size, as they arrive.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;
/// What [`Source::fetch`] returns.
pub type FetchFuture<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, SourceError>> + Send + 'a>>;

/// One layer blob, readable by range. Retries and mirrors are the source's own business.
pub trait Source: Send + Sync + 'static {
    /// Starts to fetch `range` (compressed bytes of the blob).
    ///
    /// The stream yields exactly the bytes of `range` in order, or ends with an error; nothing about
    /// their content is verified. Dropping the stream ends the request.
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_>;
}

/// The source gave up; a later call may succeed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);
