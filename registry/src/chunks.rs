//! Uploading a blob in chunks: goes on after a broken connection, and passes proxies that limit request bodies.
//!
//! Source: OCI distribution specification, "Pushing a blob in chunks".

use std::ops::Range;

use reqwest::{Method, Response, StatusCode, Url, header};

use crate::{
    error::Error,
    push::{Push, upload_location},
    retry::Retry,
    transport::{Payload, Request, header_text, refusal},
    upload::Upload,
};

/// Chunk lengths to try, longest first. Proxies limit bodies to 100 MB (Cloudflare) or 1 MiB (nginx unless told).
const CHUNK_LENS: [u64; 4] = [16 << 20, 4 << 20, 1 << 20, 256 << 10];
/// Shortest chunk that the registry takes. Source: OCI distribution specification 1.1.
const MIN_LEN: &str = "oci-chunk-min-length";

/// The longest chunk to try after `refused_len` bytes were too many; `None` where it makes no sense to go on.
pub(crate) fn smaller_chunk_len(refused_len: u64) -> Option<u64> {
    CHUNK_LENS.into_iter().find(|len| *len < refused_len)
}

/// An upload that the registry keeps open.
pub(crate) struct ChunkedUpload {
    /// Where it goes on.
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
    chunk_len_min: u64,
}

impl ChunkedUpload {
    pub(crate) async fn begin(push: &Push<'_>) -> Result<Self, Error> {
        let (response, location) = push.place().begin().await?;
        push.begun.goes_on_at(&location);
        let chunk_len_min = header_text(response.headers(), MIN_LEN).and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(Self { location, offset: 0, chunk_len_min })
    }

    /// How many bytes the registry has, as far as we know.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The same upload after a failure: asks how far it got.
    ///
    /// # Errors
    ///
    /// Transient when the registry does not know the upload any more: it has to begin again.
    pub(crate) async fn resume(mut self, push: &Push<'_>) -> Result<Self, Error> {
        let response = self.request(push, Method::GET, self.location.clone(), None).await?;
        if !response.status().is_success() {
            let refused = refusal(push.client, &push.what, &push.endpoint, response).await;
            return Err(match refused.is_transient() {
                true => refused,
                false => Error::Broken {
                    what: push.what.clone(),
                    host: push.endpoint.name().to_owned(),
                    reason: "the registry does not know the upload any more".to_owned(),
                },
            });
        }
        self.follow(push, &response)?;
        Ok(self)
    }

    /// Sends all that is missing, and ends the upload.
    pub(crate) async fn send(&mut self, push: &Push<'_>, chunk_len: u64, retry: &mut Retry) -> Result<(), Error> {
        let chunk_len = chunk_len.max(self.chunk_len_min).max(1);
        while self.offset < push.len {
            let before = self.offset;
            let end = before.saturating_add(chunk_len).min(push.len);
            self.send_chunk(push, before..end).await?;
            if self.offset <= before {
                let reason = format!("it has taken nothing of bytes {before}..{end}");
                return Err(Error::malformed(&push.what, push.endpoint.name(), reason));
            }
            retry.progressed();
        }
        push.place().finish(self.location.clone(), push.digest, 0, Payload::Empty).await
    }

    async fn send_chunk(&mut self, push: &Push<'_>, range: Range<u64>) -> Result<(), Error> {
        let response = self.request(push, Method::PATCH, self.location.clone(), Some(range.clone())).await?;
        if !matches!(response.status(), StatusCode::ACCEPTED | StatusCode::NO_CONTENT | StatusCode::CREATED) {
            return Err(refusal(push.client, &push.what, &push.endpoint, response).await);
        }
        self.offset = range.end;
        self.follow(push, &response)
    }

    /// Takes over where the registry is, and where it wants to be asked next.
    fn follow(&mut self, push: &Push<'_>, response: &Response) -> Result<(), Error> {
        if response.headers().contains_key(header::LOCATION) {
            self.location = upload_location(&push.what, &push.endpoint, response, push.client.options())?;
            push.begun.goes_on_at(&self.location);
        }
        let Some(text) = header_text(response.headers(), header::RANGE) else { return Ok(()) };
        match parse_range_end(text) {
            // Nothing yet and one byte look the same.
            Some(1) => {
                self.offset = u64::from(self.offset == 1);
                Ok(())
            }
            Some(end) if end <= push.len => {
                self.offset = end;
                Ok(())
            }
            _ => Err(Error::malformed(&push.what, push.endpoint.name(), "an upload with an unusable Range")),
        }
    }

    /// Sends a request about the upload, with the bytes of `range` if any.
    async fn request(
        &self,
        push: &Push<'_>,
        method: Method,
        url: Url,
        range: Option<Range<u64>>,
    ) -> Result<Response, Error> {
        let mut request = Request::new(&push.what, &push.endpoint, method, url, push.place().scopes())
            .trusted_like(&push.place().uploads_url()?);
        let Some(range) = range else { return push.client.send(&request).await };
        request = request
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::CONTENT_LENGTH, (range.end - range.start).to_string())
            .header(header::CONTENT_RANGE, format!("{}-{}", range.start, range.end - 1));
        let upload = Upload { content: push.content, len: push.len, range, progress: push.progress };
        push.client.send(&request.payload(Payload::Upload(&upload))).await
    }
}

/// The end of `0-LAST` (with or without a unit in front) as a half-open range has it.
pub(crate) fn parse_range_end(text: &str) -> Option<u64> {
    let text = text.strip_prefix("bytes=").or(text.strip_prefix("bytes ")).unwrap_or(text);
    let (first, last) = text.trim().split_once('-')?;
    (first == "0").then_some(())?;
    last.parse::<u64>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_how_far_an_upload_is() {
        assert_eq!(parse_range_end("0-0"), Some(1));
        assert_eq!(parse_range_end("bytes=0-99"), Some(100));
        for text in ["", "5-9", "0-", "0-x", "0-18446744073709551615"] {
            assert_eq!(parse_range_end(text), None, "{text}");
        }
    }

    #[test]
    fn chunks_get_smaller_but_not_tiny() {
        assert_eq!(smaller_chunk_len(100 << 20), Some(16 << 20));
        assert_eq!(smaller_chunk_len(16 << 20), Some(4 << 20));
        assert_eq!(smaller_chunk_len(1_100_000), Some(1 << 20));
        assert_eq!(smaller_chunk_len(256 << 10), None);
    }
}
