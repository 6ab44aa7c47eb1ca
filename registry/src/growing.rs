//! Uploading a blob while it is being written, before anybody knows its digest.
//!
//! Source: OCI distribution specification, "Pushing a blob in chunks": one request takes all bytes, and the digest
//! comes with the request that ends the upload. There are no retries here: whoever wrote the blob still has it, and
//! pushes it as any other where this does not work.

use std::{fmt, fs::File, os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::{Stream, stream};
use reqwest::{Method, StatusCode, Url, header};
use tokio::sync::watch;

use crate::{
    begun::BegunUpload,
    client::Client,
    error::Error,
    push::{UploadPlace, upload_location},
    reference::Reference,
    transport::{Payload, Request, refusal},
    upload::{BlobContent, FILE_PIECE_LEN, Progress, Upload},
};

/// How far a file has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Growth {
    /// Bytes that will not change any more, from the start of the file on.
    pub len: u64,
    /// Whether there is nothing to come.
    pub is_complete: bool,
}

/// A file that is being written. When its writer is gone before it is complete, reading it fails.
#[derive(Clone)]
pub struct GrowingFile {
    /// The file.
    pub file: Arc<File>,
    /// What its writer says.
    pub growth: watch::Receiver<Growth>,
}

impl fmt::Debug for GrowingFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrowingFile({:?})", *self.growth.borrow())
    }
}

impl GrowingFile {
    /// Everything, as it is written.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<Bytes, String>> + Send + 'static {
        stream::try_unfold((self, 0), |(mut growing, position)| async move {
            let len = loop {
                let growth = *growing.growth.borrow_and_update();
                match growth.len.saturating_sub(position) {
                    0 if growth.is_complete => return Ok(None),
                    0 => growing.growth.changed().await.map_err(|_| "its writer has given up".to_owned())?,
                    len => break usize::try_from(len).map_or(FILE_PIECE_LEN, |len| len.min(FILE_PIECE_LEN)),
                }
            };
            let file = Arc::clone(&growing.file);
            let read = move || {
                let mut piece = vec![0; len];
                file.read_exact_at(&mut piece, position).map(|()| piece)
            };
            let piece = tokio::task::spawn_blocking(read).await.map_err(|error| error.to_string())?;
            let piece = piece.map_err(|error| error.to_string())?;
            Ok(Some((Bytes::from(piece), (growing, position + len as u64))))
        })
    }

    /// Whether `sent_len` bytes are all that can be had of it now.
    pub(crate) fn is_waited_for(&self, sent_len: u64) -> bool {
        let growth = *self.growth.borrow();
        !growth.is_complete && sent_len >= growth.len
    }
}

/// A blob that a registry has taken and will forget unless it is committed.
#[derive(Debug)]
pub struct UncommittedBlob {
    client: Client,
    reference: Reference,
    location: Url,
    begun: BegunUpload,
}

impl Client {
    /// Uploads a file into the repository of `reference` while it is being written; returns when all of it is sent.
    ///
    /// `None` where blobs go up in chunks only, by option or because the registry has refused longer requests.
    ///
    /// # Errors
    ///
    /// [`Error::Content`] when the file's writer gives up. After any error the registry keeps nothing.
    pub async fn send_growing_blob(
        &self,
        reference: &Reference,
        file: GrowingFile,
        progress: Progress,
    ) -> Result<Option<UncommittedBlob>, Error> {
        let endpoint = self.push_endpoint(reference.host()).await?;
        if self.upload_chunk_len(endpoint.name()).is_some() {
            return Ok(None);
        }
        let what = format!("push of a new blob to {}", reference.name());
        let place = UploadPlace { client: self, reference, endpoint: &endpoint, what: &what };
        let begun = BegunUpload::new(self, reference);
        let (_, location) = place.begin().await?;
        begun.goes_on_at(&location);
        let content = BlobContent::Growing(file);
        let upload = Upload { content: &content, len: u64::MAX, range: 0..u64::MAX, progress: &progress };
        let request = Request::new(&what, &endpoint, Method::PATCH, location.clone(), place.scopes())
            .trusted_like(&place.uploads_url()?)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .payload(Payload::Upload(&upload));
        let sent = match self.send(&request).await {
            Ok(response) if matches!(response.status(), StatusCode::ACCEPTED | StatusCode::NO_CONTENT) => {
                upload_location(&what, &endpoint, &response, self.options())
            }
            Ok(response) => Err(refusal(self, &what, &endpoint, response).await),
            Err(error) => Err(error),
        };
        match sent {
            Ok(location) => {
                begun.goes_on_at(&location);
                let (client, reference) = (self.clone(), reference.clone());
                Ok(Some(UncommittedBlob { client, reference, location, begun }))
            }
            Err(error) => {
                place.end(location).await;
                begun.settle();
                Err(error)
            }
        }
    }
}

impl UncommittedBlob {
    /// Ends the upload: the registry compares what it has with `digest`, and keeps it.
    ///
    /// # Errors
    ///
    /// When the registry does not; then it has nothing.
    pub async fn commit(self, digest: &Digest) -> Result<(), Error> {
        let Self { client, reference, location, begun } = self;
        let endpoint = client.push_endpoint(reference.host()).await?;
        let what = format!("push of blob {digest} to {}", reference.name());
        let place = UploadPlace { client: &client, reference: &reference, endpoint: &endpoint, what: &what };
        let committed = place.finish(location.clone(), digest, 0, Payload::Empty).await;
        if committed.is_err() {
            place.end(location).await;
        }
        begun.settle();
        committed
    }
}
