//! Blobs: whether they are there, and their bytes, whole or by range.

use std::{ops::Range, sync::Arc};

use format_spec::Digest;
use reqwest::{Method, StatusCode, header};
use storage::ByteStream;

use crate::{
    auth::Scopes,
    client::Client,
    download::Download,
    endpoint::Endpoint,
    error::Error,
    hosts::Capability,
    reference::Reference,
    transport::{Request, header_text, refusal},
};

impl Client {
    /// Whether the blob `digest` of `len` bytes is in the repository of `reference`.
    ///
    /// A mirror may answer: whoever wants to know what a push can leave out asks [`Self::has_stored_blob`].
    pub async fn has_blob(&self, reference: &Reference, digest: &Digest, len: u64) -> Result<bool, Error> {
        let attempt = |endpoint| self.has_blob_once(reference, digest, len, endpoint);
        self.with_mirrors(reference, Capability::Pull, attempt).await.or_else(false_if_missing)
    }

    /// The same where [`Self::push_blob`] would store it.
    pub async fn has_stored_blob(&self, reference: &Reference, digest: &Digest, len: u64) -> Result<bool, Error> {
        let endpoint = self.push_endpoint(reference.host()).await?;
        let attempt = || self.has_blob_once(reference, digest, len, Arc::clone(&endpoint));
        self.with_retries(reference.host(), attempt).await.or_else(false_if_missing)
    }

    /// One attempt at [`Self::has_blob`]; an error where it is missing.
    pub(crate) async fn has_blob_once(
        &self,
        reference: &Reference,
        digest: &Digest,
        len: u64,
        endpoint: Arc<Endpoint>,
    ) -> Result<bool, Error> {
        let what = format!("blob {digest} of {}", reference.name());
        let url = endpoint.url(reference.repository(), &format!("blobs/{digest}"))?;
        let request = Request::new(&what, &endpoint, Method::HEAD, url, Scopes::pull(reference.repository()));
        let response = self.send(&request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(self, &what, &endpoint, response).await);
        }
        // Not Response::content_length: that is the length of the body, and HEAD has none. The header may be missing
        // (RFC 9110 8.6): then the digest says it all.
        let found = header_text(response.headers(), header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        Ok(found.is_none_or(|found| found == len))
    }

    /// Streams the blob `digest` from the repository of `reference`: `range` of it, or all.
    ///
    /// With a range the stream yields exactly its bytes or ends with an error. Without one it yields what the
    /// registry sends, as long as that is as long as announced. The content is not verified: the caller hashes it.
    ///
    /// # Errors
    ///
    /// When the first answer is a refusal or does not come; later failures come through the stream.
    pub async fn blob_stream(
        &self,
        reference: &Reference,
        digest: &Digest,
        range: Option<Range<u64>>,
    ) -> Result<ByteStream, Error> {
        Download::new(self, reference, *digest, range, None).into_stream().await
    }
}

fn false_if_missing(error: Error) -> Result<bool, Error> {
    if error.is_not_found() { Ok(false) } else { Err(error) }
}
