//! Blobs: their length, and their bytes, whole or by range.
//!
//! A download goes on where it was when the connection breaks. It asks the registry again each time, never
//! the place it was redirected to, whose address may have expired.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::stream;
use reqwest::{Method, Response, StatusCode, Url, header};
use storage::ByteStream;
use tracing::{debug, info};

use crate::{
    auth::Scopes,
    client::Client,
    endpoint::Endpoint,
    error::{Error, clean},
    hosts::Capability,
    reference::Reference,
    retry::Retry,
    transport::{Request, header_text, host_shown, next_piece, refusal},
};

impl Client {
    /// The length in bytes of the blob `digest` in the repository of `reference`; `None` when it is not there.
    ///
    /// A mirror may answer: whoever wants to know what a push can leave out asks [`Self::stored_blob_len`].
    pub async fn blob_len(&self, reference: &Reference, digest: &Digest) -> Result<Option<u64>, Error> {
        let attempt = |endpoint| self.blob_len_once(reference, digest, endpoint);
        let found = self.with_mirrors(reference.host(), Capability::Pull, attempt).await;
        none_if_missing(found)
    }

    /// The same where [`Self::push_blob`] would store it.
    pub async fn stored_blob_len(&self, reference: &Reference, digest: &Digest) -> Result<Option<u64>, Error> {
        let endpoint = self.push_endpoint(reference.host()).await?;
        let attempt = || self.blob_len_once(reference, digest, Arc::clone(&endpoint));
        let found = self.with_retries(reference.host(), attempt).await;
        none_if_missing(found)
    }

    /// One attempt at [`Self::blob_len`].
    pub(crate) async fn blob_len_once(
        &self,
        reference: &Reference,
        digest: &Digest,
        endpoint: Arc<Endpoint>,
    ) -> Result<u64, Error> {
        let what = what(reference, digest);
        let url = endpoint.url(reference.repository(), &format!("blobs/{digest}"))?;
        let request = Request::new(&what, &endpoint, Method::HEAD, url, Scopes::pull(reference.repository()));
        let response = self.send(&request).await?;
        match response.status() {
            // Not Response::content_length: that is the length of the body, and HEAD has none.
            StatusCode::OK => {
                header_text(response.headers(), header::CONTENT_LENGTH).and_then(|text| text.parse().ok()).ok_or_else(
                    || Error::malformed(&what, endpoint.name(), "it has the blob but does not say how long it is"),
                )
            }
            _ => Err(refusal(self, &what, &endpoint, response).await),
        }
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

fn none_if_missing<T>(found: Result<T, Error>) -> Result<Option<T>, Error> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn what(reference: &Reference, digest: &Digest) -> String {
    format!("blob {digest} of {}", reference.name())
}

/// A blob on its way.
pub(crate) struct Download {
    client: Client,
    reference: Reference,
    digest: Digest,
    what: String,
    /// Offset in the blob of the next byte to yield.
    next: u64,
    /// Where to stop; unknown until the registry says how long the blob is.
    end: Option<u64>,
    /// Length of the whole blob, where the caller or the registry has said it.
    blob_len: Option<u64>,
    answer: Option<Answer>,
    retry: Retry,
}

/// An answer being read.
struct Answer {
    response: Response,
    endpoint: Arc<Endpoint>,
    /// How many of its bytes lie in front of the next one to yield.
    skip: u64,
    has_yielded: bool,
}

impl Download {
    /// A download of `range`, or of all; a `blob_len` that is given is held against the registry's answers.
    pub(crate) fn new(
        client: &Client,
        reference: &Reference,
        digest: Digest,
        range: Option<Range<u64>>,
        blob_len: Option<u64>,
    ) -> Self {
        let (next, end) = range.map_or((0, None), |range| (range.start, Some(range.end.max(range.start))));
        Self {
            client: client.clone(),
            reference: reference.clone(),
            digest,
            what: what(reference, &digest),
            next,
            end,
            blob_len,
            answer: None,
            retry: Retry::new(client, reference.host()),
        }
    }

    /// Waits for the first answer and makes a stream of the rest.
    pub(crate) async fn into_stream(mut self) -> Result<ByteStream, Error> {
        while self.answer.is_none() && self.end != Some(self.next) {
            match self.open().await {
                Ok(answer) => self.answer = Some(answer),
                Err(error) if self.client.has_better_hosts(self.reference.host(), &error).await => {}
                Err(error) => self.retry.wait_after(error).await?,
            }
        }
        Ok(Box::pin(stream::unfold(Some(self), |download| async move {
            let mut download = download?;
            match download.next_bytes().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(download))),
                Ok(None) => None,
                Err(error) => Some((Err(error.to_source_error()), None)),
            }
        })))
    }

    /// The next bytes, never empty; `None` at the end.
    async fn next_bytes(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.end == Some(self.next) {
                return Ok(None);
            }
            match self.try_next_bytes().await {
                Ok(Some(bytes)) => {
                    self.next += bytes.len() as u64;
                    self.retry.progressed();
                    return Ok(Some(bytes));
                }
                Ok(None) => self.end = Some(self.next),
                Err(error) => {
                    // A mirror that promises and does not deliver would be asked again and again.
                    if let Some(answer) = self.answer.take().filter(|answer| !answer.has_yielded) {
                        answer.endpoint.rest();
                    }
                    self.client.redirects().forget(&self.reference.name(), self.digest);
                    self.retry.wait_after(error).await?;
                }
            }
        }
    }

    /// One attempt at [`Self::next_bytes`]; `None` where a blob of unknown length ends.
    async fn try_next_bytes(&mut self) -> Result<Option<Bytes>, Error> {
        if self.answer.is_none() {
            self.answer = Some(self.open().await?);
        }
        let Answer { response, endpoint, skip, has_yielded } = self.answer.as_mut().expect("opened above");
        let host = host_shown(endpoint, response.url());
        loop {
            let Some(mut bytes) = next_piece(&self.client, &self.what, &host, response).await? else {
                return match self.end {
                    None => Ok(None),
                    Some(end) => Err(Error::Broken {
                        what: self.what.clone(),
                        host,
                        reason: format!("it ended at byte {} of {end}", self.next),
                    }),
                };
            };
            let skipped = (bytes.len() as u64).min(*skip);
            *skip -= skipped;
            // Both casts are of lengths that are at most bytes.len().
            let _ = bytes.split_to(usize::try_from(skipped).expect("at most the length of the piece"));
            if let Some(end) = self.end {
                let wanted = (bytes.len() as u64).min(end - self.next);
                bytes.truncate(usize::try_from(wanted).expect("at most the length of the piece"));
            }
            if !bytes.is_empty() {
                *has_yielded = true;
                return Ok(Some(bytes));
            }
        }
    }

    /// Asks for what is left: where the last read was redirected to, else the hosts of the registry in their order.
    async fn open(&mut self) -> Result<Answer, Error> {
        if let Some(answer) = self.open_redirect().await {
            return Ok(answer);
        }
        let mut round = self.client.round(self.reference.host(), Capability::Pull).await?;
        while let Some(endpoint) = round.next() {
            let url = endpoint.url(self.reference.repository(), &format!("blobs/{}", self.digest))?;
            match self.open_at(&endpoint, url, true).await {
                Ok(answer) => {
                    self.learn_redirect(&answer);
                    return Ok(answer);
                }
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.into_error())
    }

    async fn open_at(&mut self, endpoint: &Arc<Endpoint>, url: Url, is_trusted: bool) -> Result<Answer, Error> {
        let what = self.what.clone();
        let scopes = Scopes::pull(self.reference.repository());
        let mut request = Request { is_trusted, ..Request::new(&what, endpoint, Method::GET, url, scopes) };
        let is_partial = self.is_partial();
        if is_partial {
            let last = self.end.map_or(String::new(), |end| (end - 1).to_string());
            request = request.header(header::RANGE, format!("bytes={}-{last}", self.next));
        }
        let response = self.client.send(&request).await?;
        let host = &*host_shown(endpoint, response.url());
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT if is_partial => {
                let text = header_text(response.headers(), header::CONTENT_RANGE).unwrap_or_default().to_owned();
                self.accept_range(host, &text, response.content_length())?;
                0
            }
            StatusCode::OK => {
                if is_partial && self.client.note_rangeless(host) {
                    info!(host, "the registry answers ranges with whole blobs: reads cost more than they should");
                }
                if let Some(len) = response.content_length() {
                    self.accept_blob_len(host, len)?;
                }
                self.next
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(self.malformed(host, format!("the blob ends before byte {}", self.next)));
            }
            _ => return Err(refusal(&self.client, &what, endpoint, response).await),
        };
        Ok(Answer { response, endpoint: Arc::clone(endpoint), skip, has_yielded: false })
    }

    fn is_partial(&self) -> bool {
        self.next > 0 || self.end.is_some()
    }

    /// [`Self::open`] at the address of the last redirect, if there is one and it still delivers.
    async fn open_redirect(&mut self) -> Option<Answer> {
        if !self.is_partial() {
            return None;
        }
        let redirect = self.client.redirects().find(&self.reference.name(), self.digest)?;
        match self.open_at(&redirect.endpoint, redirect.url.clone(), false).await {
            Ok(answer) => Some(answer),
            Err(error) => {
                debug!(%error, "asking the registry instead of the address it redirected to");
                self.client.redirects().refused(&self.reference.name(), self.digest, &redirect);
                None
            }
        }
    }

    fn learn_redirect(&self, answer: &Answer) {
        let is_elsewhere =
            Url::parse(answer.endpoint.root()).is_ok_and(|own| own.origin() != answer.response.url().origin());
        if is_elsewhere && self.is_partial() {
            let (name, url) = (self.reference.name(), answer.response.url());
            self.client.redirects().learn(&name, self.digest, &answer.endpoint, url);
        }
    }

    /// Checks the head of a 206.
    fn accept_range(&mut self, host: &str, text: &str, content_len: Option<u64>) -> Result<(), Error> {
        let Some((range, blob_len)) = parse_content_range(text) else {
            return Err(self.malformed(host, format!("Content-Range {:?}", clean(text))));
        };
        if let Some(blob_len) = blob_len {
            self.accept_blob_len(host, blob_len)?;
        }
        let expected = self.next..self.end.unwrap_or(range.end);
        if range != expected {
            return Err(self.malformed(host, format!("bytes {range:?} where {expected:?} was asked for")));
        }
        match content_len {
            Some(len) if len != range.end - range.start => {
                Err(self.malformed(host, format!("{len} bytes for {range:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Checks what an answer says about the length of the blob.
    fn accept_blob_len(&mut self, host: &str, found: u64) -> Result<(), Error> {
        if let Some(expected) = self.blob_len.filter(|expected| *expected != found) {
            return Err(self.malformed(host, format!("the blob has {found} bytes, expected {expected}")));
        }
        let end = *self.end.get_or_insert(found);
        if end > found || self.next > found {
            return Err(self.malformed(host, format!("the blob has {found} bytes, asked for bytes up to {end}")));
        }
        self.blob_len = Some(found);
        Ok(())
    }

    fn malformed(&self, host: &str, reason: String) -> Error {
        Error::malformed(&self.what, host, reason)
    }
}

/// `bytes FIRST-LAST/LENGTH` as a half-open range and the length, if known. Source: RFC 9110 14.4.
pub(crate) fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, len) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
    let len = if len == "*" { None } else { Some(len.parse::<u64>().ok()?) };
    (first <= last && len.is_none_or(|len| last < len)).then_some(())?;
    Some((first..last.checked_add(1)?, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/20"), Some((5..10, Some(20))));
        assert_eq!(parse_content_range("bytes 0-0/*"), Some((0..1, None)));
        for text in
            ["", "bytes */20", "bytes 9-5/20", "bytes 5-20/20", "items 5-9/20", "bytes 0-18446744073709551615/*"]
        {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }
}
