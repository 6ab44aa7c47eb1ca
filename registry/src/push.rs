//! Uploading blobs: streamed in one PUT, or mounted from a sister repository.

use std::{
    fmt, io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::{Stream, StreamExt, TryStreamExt, stream, stream::BoxStream};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode, Url, header};
use storage::Source;
use tokio_util::io::ReaderStream;

use crate::{
    auth::Scopes,
    client::Client,
    error::Error,
    manifest::announced_digest,
    reference::Reference,
    retry::Retry,
    transport::{Payload, Request, header_text, refusal, stalled},
};

/// How long a registry may take from the last byte of an upload to its answer: it may move the blob to its
/// final place first, which object stores do at some 50 MB/s.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(600);
/// Size of the pieces a file is read in: large enough to keep the thread pool out of the way.
const FILE_PIECE_LEN: usize = 256 << 10;

/// Told during an upload how many bytes have gone out so far; starts again when an upload is repeated.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// Bytes to upload, readable more than once.
#[derive(Clone)]
pub enum BlobContent {
    /// In memory.
    Bytes(Bytes),
    /// A file that does not change meanwhile.
    File(PathBuf),
    /// Another blob, for instance a [`crate::BlobSource`] in another registry.
    Source(Arc<dyn Source>),
}

impl fmt::Debug for BlobContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Source(_) => f.write_str("Source"),
        }
    }
}

impl BlobContent {
    fn into_stream(self, len: u64) -> impl Stream<Item = Result<Bytes, String>> + Send + 'static {
        stream::once(async move {
            let pieces: BoxStream<'static, Result<Bytes, String>> = match self {
                Self::Bytes(bytes) => stream::once(async { Ok(bytes) }).boxed(),
                Self::File(path) => {
                    let file = tokio::fs::File::open(&path).await.map_err(|error| describe(&path, &error))?;
                    let pieces = ReaderStream::with_capacity(file, FILE_PIECE_LEN);
                    pieces.map_err(move |error| describe(&path, &error)).boxed()
                }
                Self::Source(source) => {
                    let pieces = source.fetch(0..len).await.map_err(|error| error.to_string())?;
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

impl Client {
    /// Uploads `content`, `len` bytes that hash to `digest`, into the repository of `reference`.
    ///
    /// Nothing is sent where the repository has the blob after a failed attempt; the caller asks
    /// [`Self::blob_len`] beforehand if that is likely. The registry verifies the digest.
    ///
    /// # Errors
    ///
    /// [`Error::Content`] when `content` cannot be read or is not `len` bytes long.
    pub async fn push_blob(
        &self,
        reference: &Reference,
        digest: &Digest,
        len: u64,
        content: BlobContent,
        progress: Progress,
    ) -> Result<(), Error> {
        let mut retry = Retry::new(self, reference.host());
        loop {
            let upload = Upload { content: &content, len, progress: &progress };
            match self.push_blob_once(reference, digest, &upload).await {
                Ok(()) => return Ok(()),
                Err(error) => retry.wait_after(error).await?,
            }
            // The answer to an upload may have got lost after it was stored.
            if let Ok(Some(stored)) = self.blob_len_once(reference, digest).await
                && stored == len
            {
                return Ok(());
            }
        }
    }

    async fn push_blob_once(&self, reference: &Reference, digest: &Digest, upload: &Upload<'_>) -> Result<(), Error> {
        let (what, host) = (format!("push of blob {digest} to {}", reference.name()), reference.host());
        let scopes = Scopes::push(reference.repository());
        let url = self.address(reference, "blobs/uploads/")?;
        let request = Request::new(&what, host, Method::POST, url, scopes.clone()).header(header::CONTENT_LENGTH, "0");
        let response = self.send(&request).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(refusal(self, &what, host, response).await);
        }
        let mut location = upload_location(&what, host, &response)?;
        location.query_pairs_mut().append_pair("digest", &digest.to_string());
        let is_trusted = location.origin() == request.url.origin();
        let request = Request { is_trusted, ..Request::new(&what, host, Method::PUT, location, scopes) }
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, upload.len.to_string())
            .payload(Payload::Upload(upload));
        let response = self.send(&request).await?;
        if !response.status().is_success() {
            return Err(refusal(self, &what, host, response).await);
        }
        match announced_digest(response.headers()) {
            Some(found) if found != *digest => {
                Err(Error::DigestMismatch { what, host: host.to_owned(), expected: *digest, found })
            }
            _ => Ok(()),
        }
    }

    /// Makes the blob `digest` of one repository appear in another of the same registry, without moving bytes.
    ///
    /// False when the registry would not, or the hosts differ: then the blob has to be pushed.
    pub async fn mount_blob(&self, from: &Reference, to: &Reference, digest: &Digest) -> Result<bool, Error> {
        if from.host() != to.host() {
            return Ok(false);
        }
        self.with_retries(to.host(), || self.mount_blob_once(from, to, digest)).await
    }

    async fn mount_blob_once(&self, from: &Reference, to: &Reference, digest: &Digest) -> Result<bool, Error> {
        let (what, host) = (format!("mount of blob {digest} in {}", to.name()), to.host());
        let scopes = Scopes::push(to.repository()).and(Scopes::pull(from.repository()));
        let mut url = self.address(to, "blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from.repository());
        let request = Request::new(&what, host, Method::POST, url, scopes.clone()).header(header::CONTENT_LENGTH, "0");
        let response = self.send(&request).await?;
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // It has begun an upload instead. Left alone it would expire, so a failure to end it is no loss.
                if let Ok(location) = upload_location(&what, host, &response) {
                    let is_trusted = location.origin() == request.url.origin();
                    let end = Request { is_trusted, ..Request::new(&what, host, Method::DELETE, location, scopes) };
                    let ended = self.send(&end).await;
                    tracing::debug!(host, %digest, ended = ended.is_ok(), "blob not mounted");
                }
                Ok(false)
            }
            _ => Err(refusal(self, &what, host, response).await),
        }
    }
}

/// Where an upload goes on; the registry may give it relative to the address asked.
fn upload_location(what: &str, host: &str, response: &Response) -> Result<Url, Error> {
    header_text(response.headers(), header::LOCATION)
        .and_then(|text| response.url().join(text).ok())
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| Error::malformed(what, host, "an upload without a usable Location"))
}

/// The body of an upload, to be sent once or more.
pub(crate) struct Upload<'a> {
    content: &'a BlobContent,
    len: u64,
    progress: &'a Progress,
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
            let limit = if sent_before == self.len { COMMIT_TIMEOUT } else { stall };
            let Ok(answer) = tokio::time::timeout(limit, &mut answer).await else {
                let sent_now = sent.len.load(Ordering::Relaxed);
                if sent_now == sent_before {
                    return Err(stalled(what, host, limit));
                }
                sent_before = sent_now;
                continue;
            };
            let failure = sent.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
            return match (answer, failure) {
                (_, Some(reason)) => Err(Error::Content { what: what.to_owned(), reason }),
                (Ok(response), None) => {
                    client.note_reached(host);
                    Ok(response)
                }
                (Err(error), None) => Err(Error::from_transport(what, host, &error)),
            };
        }
    }

    /// Exactly `len` bytes of content, or an error that is also noted in `sent`.
    fn body(&self, sent: &Arc<Sent>) -> Body {
        let (len, progress) = (self.len, Arc::clone(self.progress));
        let counted = Arc::clone(sent);
        let pieces = self.content.clone().into_stream(len).and_then(move |piece| {
            let sent_len = counted.len.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
            let fits = if sent_len > len { Err(format!("more than {len} bytes")) } else { Ok(piece) };
            if fits.is_ok() {
                progress(sent_len);
            }
            async { fits }
        });
        let counted = Arc::clone(sent);
        let end = stream::once(async move {
            match counted.len.load(Ordering::Relaxed) {
                sent_len if sent_len < len => Err(format!("{sent_len} bytes instead of {len}")),
                _ => Ok(Bytes::new()),
            }
        });
        let noted = Arc::clone(sent);
        Body::wrap_stream(pieces.chain(end).map_err(move |reason| {
            *noted.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
            io::Error::other(reason)
        }))
    }
}
