//! What an upload sends: the content, and the body of one request made of it.

use std::{
    fmt,
    io::{self, SeekFrom},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream, stream::BoxStream};
use reqwest::{Body, RequestBuilder, Response};
use storage::Source;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::{client::Client, error::Error, growing::GrowingFile, transport::stalled};

/// How long a registry may take from the last byte of an upload to its answer: it may move the blob to its
/// final place first, which object stores do at some 50 MB/s.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);
/// Size of the pieces a file is read in: large enough to keep the thread pool out of the way.
pub(crate) const FILE_PIECE_LEN: usize = 256 << 10;

/// Told during an upload how many bytes have gone out so far; starts again when an upload is repeated.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// Bytes to upload, readable more than once.
#[derive(Clone)]
pub enum BlobContent {
    /// In memory.
    Bytes(Bytes),
    /// A file that does not change meanwhile.
    File(PathBuf),
    /// A file that is being written.
    Growing(GrowingFile),
    /// Another blob, for instance a [`crate::BlobSource`] in another registry.
    Source(Arc<dyn Source>),
}

impl fmt::Debug for BlobContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Growing(file) => fmt::Debug::fmt(file, f),
            Self::Source(_) => f.write_str("Source"),
        }
    }
}

impl BlobContent {
    /// Its bytes in `range`; where that is `is_whole`, also those behind it, so that too many show.
    fn into_stream(
        self,
        range: Range<u64>,
        is_whole: bool,
    ) -> impl Stream<Item = Result<Bytes, String>> + Send + 'static {
        stream::once(async move {
            let pieces: BoxStream<'static, Result<Bytes, String>> = match self {
                Self::Bytes(bytes) if is_whole => stream::once(async { Ok(bytes) }).boxed(),
                Self::Bytes(bytes) => {
                    let end = |position: u64| usize::try_from(position).map_or(bytes.len(), |end| end.min(bytes.len()));
                    let bytes = bytes.slice(end(range.start)..end(range.end));
                    stream::once(async { Ok(bytes) }).boxed()
                }
                Self::File(path) => {
                    let mut file = tokio::fs::File::open(&path).await.map_err(|error| describe(&path, &error))?;
                    file.seek(SeekFrom::Start(range.start)).await.map_err(|error| describe(&path, &error))?;
                    let limit = if is_whole { u64::MAX } else { range.end - range.start };
                    let pieces = ReaderStream::with_capacity(file.take(limit), FILE_PIECE_LEN);
                    pieces.map_err(move |error| describe(&path, &error)).boxed()
                }
                Self::Growing(file) => file.into_stream().boxed(),
                Self::Source(source) => {
                    let pieces = source.fetch(range).await.map_err(|error| error.to_string())?;
                    pieces.map_err(|error| error.to_string()).boxed()
                }
            };
            Ok::<_, String>(pieces)
        })
        .try_flatten()
    }
}

fn describe(path: &std::path::Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// The body of an upload, to be sent once or more.
pub(crate) struct Upload<'a> {
    pub(crate) content: &'a BlobContent,
    /// Length of the whole content; more than it where that is being written.
    pub(crate) len: u64,
    /// What of it to send.
    pub(crate) range: Range<u64>,
    pub(crate) progress: &'a Progress,
}

/// What an upload's body tells the one who waits for the answer.
#[derive(Default)]
struct Sent {
    len: AtomicU64,
    /// Why the content could not be read.
    failure: Mutex<Option<String>>,
}

impl Upload<'_> {
    /// Sends `request` with the content. Waits as long as bytes go out.
    pub(crate) async fn send(
        &self,
        client: &Client,
        what: &str,
        host: &str,
        request: RequestBuilder,
    ) -> Result<Response, Error> {
        let sent = Arc::new(Sent::default());
        let answer = request.body(self.body(&sent)).send();
        tokio::pin!(answer);
        let stall = client.options().stall_timeout;
        let mut sent_before = 0;
        loop {
            let limit = if sent_before == self.range.end - self.range.start { COMMIT_TIMEOUT } else { stall };
            let Ok(answer) = tokio::time::timeout(limit, &mut answer).await else {
                let sent_now = sent.len.load(Ordering::Relaxed);
                let is_waiting = matches!(self.content, BlobContent::Growing(file) if file.is_waited_for(sent_now));
                if sent_now == sent_before && !is_waiting {
                    return Err(stalled(what, host, limit));
                }
                sent_before = sent_now;
                continue;
            };
            let failure = sent.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
            return match (answer, failure) {
                (_, Some(reason)) => Err(Error::Content { what: what.to_owned(), reason }),
                (Ok(response), None) => Ok(response),
                (Err(error), None) => Err(Error::from_transport(what, host, &error)),
            };
        }
    }

    /// Exactly the bytes of `range`, or an error that is also noted in `sent`.
    fn body(&self, sent: &Arc<Sent>) -> Body {
        let (Range { start, end }, len, progress) = (self.range.clone(), self.len, Arc::clone(self.progress));
        let counted = Arc::clone(sent);
        let pieces = self.content.clone().into_stream(start..end, start == 0 && end == len).and_then(move |piece| {
            let added = piece.len() as u64;
            let position = start + counted.len.fetch_add(added, Ordering::Relaxed) + added;
            let fits = if position > end { Err(format!("more than {len} bytes")) } else { Ok(piece) };
            if fits.is_ok() {
                progress(position);
            }
            async { fits }
        });
        let counted = Arc::clone(sent);
        let has_end = !matches!(self.content, BlobContent::Growing(_));
        let check = stream::once(async move {
            match start + counted.len.load(Ordering::Relaxed) {
                position if has_end && position < end => Err(format!("{position} bytes instead of {len}")),
                _ => Ok(Bytes::new()),
            }
        });
        let noted = Arc::clone(sent);
        Body::wrap_stream(pieces.chain(check).map_err(move |reason| {
            *noted.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
            io::Error::other(reason)
        }))
    }
}
