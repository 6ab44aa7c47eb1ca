//! Where the bytes of a layer blob come from.
//!
//! `registry` implements [`Source`] over HTTP ranges; tests implement it over memory.

use std::{fmt, ops::Range, pin::Pin};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};

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

/// A range that is being received: bytes are taken from its front in the lengths that they have a meaning in.
pub(crate) struct Incoming {
    stream: ByteStream,
    received: BytesMut,
    /// Bytes that the range has still to bring.
    left: u64,
}

impl Incoming {
    /// Asks for a range.
    pub(crate) async fn open(source: &dyn Source, range: Range<u64>) -> Result<Self, SourceError> {
        let left = range.end.saturating_sub(range.start);
        Ok(Self { stream: source.fetch(range).await?, received: BytesMut::new(), left })
    }

    /// The next `len` bytes; `on_arrival` hears of every piece that comes from the source.
    ///
    /// # Errors
    ///
    /// When the source breaks off, or answers with more than the range.
    pub(crate) async fn take(&mut self, len: usize, mut on_arrival: impl FnMut(usize)) -> Result<Bytes, SourceError> {
        while self.received.len() < len {
            let Some(piece) = self.stream.next().await.transpose()? else {
                return Err(SourceError(format!("the source's answer ended {} bytes too early", self.left)));
            };
            let left = self.left.checked_sub(piece.len() as u64);
            self.left =
                left.ok_or_else(|| SourceError("the source's answer is longer than the range asked for".to_owned()))?;
            on_arrival(piece.len());
            self.received.extend_from_slice(&piece);
        }
        Ok(self.received.split_to(len).freeze())
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("left", &self.left).finish_non_exhaustive()
    }
}
