//! Uploading blobs: streamed in one PUT, in chunks where that does not work, or mounted from a sister repository.

use std::sync::Arc;

use format_spec::Digest;
use reqwest::{Method, Response, StatusCode, Url, header};

use crate::{
    auth::Scopes,
    begun::BegunUpload,
    chunks::{ChunkedUpload, smaller_chunk_len},
    client::Client,
    endpoint::{Endpoint, authority},
    error::Error,
    manifest::announced_digest,
    options::ClientOptions,
    reference::Reference,
    retry::Retry,
    transport::{Payload, Request, header_text, refusal},
    upload::{BlobContent, Progress, Upload},
};

/// Attempts to send a blob as a whole before it goes in chunks, which lose less when the connection breaks.
const WHOLE_ATTEMPTS_MAX: u32 = 2;
/// How often a registry may say that it expects another chunk than the next.
const RESYNCS_MAX: u32 = 3;

/// A blob on its way to a repository.
pub(crate) struct Push<'a> {
    pub(crate) client: &'a Client,
    pub(crate) reference: &'a Reference,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) digest: &'a Digest,
    pub(crate) len: u64,
    pub(crate) content: &'a BlobContent,
    pub(crate) progress: &'a Progress,
    /// The operation, as errors name it.
    pub(crate) what: String,
    /// The upload that was begun last.
    pub(crate) begun: BegunUpload,
}

/// A repository that takes uploads.
pub(crate) struct UploadPlace<'a> {
    pub(crate) client: &'a Client,
    pub(crate) reference: &'a Reference,
    pub(crate) endpoint: &'a Endpoint,
    /// The operation, as errors name it.
    pub(crate) what: &'a str,
}

impl Client {
    /// Uploads `content`, `len` bytes that hash to `digest`, into the repository of `reference`.
    ///
    /// Nothing is sent where the repository has the blob after a failed attempt; the caller asks
    /// [`Self::has_stored_blob`] beforehand if that is likely. The registry verifies the digest.
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
        let endpoint = self.push_endpoint(reference.host()).await?;
        let what = format!("push of blob {digest} to {}", reference.name());
        let (content, progress) = (&content, &progress);
        let begun = BegunUpload::new(self, reference);
        let push = Push { client: self, reference, endpoint, digest, len, content, progress, what, begun };
        let result = self.push_with_retries(&push).await;
        push.begun.settle();
        result
    }

    async fn push_with_retries(&self, push: &Push<'_>) -> Result<(), Error> {
        let Push { reference, digest, len, .. } = *push;
        let mut retry = Retry::new(self, reference.host());
        let mut chunk_len = self.upload_chunk_len(push.endpoint.name());
        let mut chunked = None;
        let (mut whole_failures, mut resyncs) = (0, 0);
        loop {
            let result = match chunk_len {
                Some(chunk_len) => push.send_chunks(&mut chunked, chunk_len, &mut retry).await,
                None => push.send_whole().await,
            };
            let Err(error) = result else { break };
            let refused_len = chunk_len.unwrap_or(len).min(len);
            let smaller = smaller_chunk_len(refused_len).filter(|_| error.status() == Some(413) || error.is_broken());
            match error.status() {
                Some(413) if smaller.is_some() => {
                    tracing::debug!(host = push.endpoint.name(), refused_len, ?smaller, "upload in smaller chunks");
                    chunk_len = smaller;
                    continue;
                }
                Some(416) if resyncs < RESYNCS_MAX => {
                    resyncs += 1;
                    match chunk_len {
                        None => chunk_len = smaller_chunk_len(u64::MAX),
                        // Where it has what we thought it has, the chunk was too long.
                        Some(len) if push.is_in_step(&mut chunked).await => {
                            match smaller_chunk_len(len.min(push.len)) {
                                Some(smaller) => (chunk_len, resyncs) = (Some(smaller), 0),
                                None => return Err(error),
                            }
                        }
                        Some(_) => {}
                    }
                    continue;
                }
                _ => retry.wait_after(error).await?,
            }
            // The answer to an upload may have got lost after it was stored.
            if matches!(self.has_blob_once(reference, digest, len, Arc::clone(&push.endpoint)).await, Ok(true)) {
                return Ok(());
            }
            whole_failures += 1;
            if chunk_len.is_some() || whole_failures >= WHOLE_ATTEMPTS_MAX {
                chunk_len = smaller.or(chunk_len);
            }
        }
        if let Some(chunk_len) = chunk_len.filter(|chunk_len| *chunk_len < len) {
            self.note_upload_chunk_len(push.endpoint.name(), chunk_len);
        }
        Ok(())
    }

    /// Makes the blob `digest` of one repository appear in another of the same registry, without moving bytes.
    ///
    /// False when the registry would not, or the hosts differ: then the blob has to be pushed.
    pub async fn mount_blob(&self, from: &Reference, to: &Reference, digest: &Digest) -> Result<bool, Error> {
        if from.host() != to.host() {
            return Ok(false);
        }
        let endpoint = self.push_endpoint(to.host()).await?;
        self.with_retries(to.host(), || self.mount_blob_once(from, to, digest, &endpoint)).await
    }

    async fn mount_blob_once(
        &self,
        from: &Reference,
        to: &Reference,
        digest: &Digest,
        endpoint: &Endpoint,
    ) -> Result<bool, Error> {
        let what = format!("mount of blob {digest} in {}", to.name());
        let scopes = Scopes::push(to.repository()).and(Scopes::pull(from.repository()));
        let mut url = endpoint.url(to.repository(), "blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from.repository());
        let request = Request::new(&what, endpoint, Method::POST, url, scopes).header(header::CONTENT_LENGTH, "0");
        let response = self.send(&request).await?;
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // It has begun an upload instead.
                tracing::debug!(host = endpoint.name(), %digest, "blob not mounted");
                if let Ok(location) = upload_location(&what, endpoint, &response, self.options()) {
                    UploadPlace { client: self, reference: to, endpoint, what: &what }.end(location).await;
                }
                Ok(false)
            }
            _ => Err(refusal(self, &what, endpoint, response).await),
        }
    }
}

impl Push<'_> {
    pub(crate) fn place(&self) -> UploadPlace<'_> {
        let Self { client, reference, endpoint, what, .. } = self;
        UploadPlace { client, reference, endpoint, what }
    }

    /// One attempt to send everything in one request.
    async fn send_whole(&self) -> Result<(), Error> {
        let (_, location) = self.place().begin().await?;
        self.begun.goes_on_at(&location);
        let upload = Upload { content: self.content, len: self.len, range: 0..self.len, progress: self.progress };
        self.place().finish(location, self.digest, self.len, Payload::Upload(&upload)).await
    }

    /// Asks how far an upload has got; whether that is where we were. One that the registry has forgotten begins again.
    async fn is_in_step(&self, chunked: &mut Option<ChunkedUpload>) -> bool {
        let Some(upload) = chunked.take() else { return false };
        let before = upload.offset();
        *chunked = upload.resume(self).await.ok();
        chunked.as_ref().is_some_and(|upload| upload.offset() == before)
    }

    /// Sends what is missing in chunks, as part of the upload that `chunked` holds, or of a new one.
    async fn send_chunks(
        &self,
        chunked: &mut Option<ChunkedUpload>,
        chunk_len: u64,
        retry: &mut Retry,
    ) -> Result<(), Error> {
        let mut upload = match chunked.take() {
            Some(upload) => upload.resume(self).await?,
            None => ChunkedUpload::begin(self).await?,
        };
        let result = upload.send(self, chunk_len, retry).await;
        *chunked = Some(upload);
        result
    }
}

impl UploadPlace<'_> {
    pub(crate) fn scopes(&self) -> Scopes {
        Scopes::push(self.reference.repository())
    }

    /// The address to begin uploads at.
    pub(crate) fn uploads_url(&self) -> Result<Url, Error> {
        self.endpoint.url(self.reference.repository(), "blobs/uploads/")
    }

    /// Begins an upload; returns the answer, which says where it goes on.
    pub(crate) async fn begin(&self) -> Result<(Response, Url), Error> {
        let request = Request::new(self.what, self.endpoint, Method::POST, self.uploads_url()?, self.scopes())
            .header(header::CONTENT_LENGTH, "0");
        let response = self.client.send(&request).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(refusal(self.client, self.what, self.endpoint, response).await);
        }
        let location = upload_location(self.what, self.endpoint, &response, self.client.options())?;
        Ok((response, location))
    }

    /// Ends the upload at `location` with the last `len` bytes: the blob is complete and has this digest.
    pub(crate) async fn finish(
        &self,
        mut location: Url,
        digest: &Digest,
        len: u64,
        payload: Payload<'_>,
    ) -> Result<(), Error> {
        location.query_pairs_mut().append_pair("digest", &digest.to_string());
        let request = Request::new(self.what, self.endpoint, Method::PUT, location, self.scopes())
            .trusted_like(&self.uploads_url()?)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, len.to_string())
            .payload(payload);
        let response = self.client.send(&request).await?;
        if !response.status().is_success() {
            return Err(refusal(self.client, self.what, self.endpoint, response).await);
        }
        match announced_digest(response.headers()) {
            Some(found) if found != *digest => {
                let host = self.endpoint.name().to_owned();
                Err(Error::DigestMismatch { what: self.what.to_owned(), host, expected: *digest, found })
            }
            _ => Ok(()),
        }
    }

    /// Has the registry forget an upload. Left alone it would expire, so a failure is no loss. Only the registry itself
    /// is ever asked to delete something.
    pub(crate) async fn end(&self, location: Url) {
        let Ok(own) = self.uploads_url() else { return };
        if !self.endpoint.is_own(&location) {
            return;
        }
        let request = Request::new(self.what, self.endpoint, Method::DELETE, location, self.scopes());
        let ended = self.client.send(&request.trusted_like(&own)).await;
        tracing::debug!(host = self.endpoint.name(), ended = ended.is_ok(), "upload ended");
    }
}

/// Where an upload goes on; the registry may give it relative to the address asked.
///
/// # Errors
///
/// Where there is none, or another host is to take it: a registry could make a client send requests to any address
/// that it can reach.
pub(crate) fn upload_location(
    what: &str,
    endpoint: &Endpoint,
    response: &Response,
    options: &ClientOptions,
) -> Result<Url, Error> {
    let url = header_text(response.headers(), header::LOCATION)
        .and_then(|text| response.url().join(text).ok())
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| Error::malformed(what, endpoint.name(), "an upload without a usable Location"))?;
    if !endpoint.takes_uploads_at(&url, options) {
        let host = authority(&url);
        let reason = format!("it wants the upload at {host}, which is another host; --upload-host={host} allows it");
        return Err(Error::malformed(what, endpoint.name(), reason));
    }
    Ok(url)
}
