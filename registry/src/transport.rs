//! One HTTP request and its answer: authentication, redirects, time limits, and what a refusal means.
//!
//! No retries here, except the one after a refusal of permission.

use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    auth::{Authorization, Challenge, Scopes},
    client::Client,
    endpoint::{Endpoint, authority},
    error::{Error, clean},
    upload::Upload,
};

/// Longest part of an error answer that is read.
const REFUSAL_LEN_MAX: usize = 16 << 10;
/// Bytes of a document that have to come within a second, in the long run: a slow mobile link.
const DOCUMENT_PACE: usize = 32 << 10;
/// Redirects followed for one request, as browsers and Go do.
const REDIRECTS_MAX: usize = 10;

/// A request to a registry, repeatable because of authentication.
pub(crate) struct Request<'a> {
    /// The operation, as errors name it.
    pub(crate) what: &'a str,
    /// The host that is asked.
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(header::HeaderName, String)>,
    pub(crate) scopes: Scopes,
    /// Whether the address is the host's own, so that credentials and configured headers may go there.
    pub(crate) is_trusted: bool,
    pub(crate) payload: Payload<'a>,
}

/// The body of a request; it can be sent again.
pub(crate) enum Payload<'a> {
    Empty,
    Bytes(Bytes),
    Upload(&'a Upload<'a>),
}

impl<'a> Request<'a> {
    /// A request without a body to the host itself.
    pub(crate) fn new(what: &'a str, endpoint: &'a Endpoint, method: Method, url: Url, scopes: Scopes) -> Self {
        Self { what, endpoint, method, url, headers: Vec::new(), scopes, is_trusted: true, payload: Payload::Empty }
    }

    pub(crate) fn header(mut self, name: header::HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn payload(mut self, payload: Payload<'a>) -> Self {
        self.payload = payload;
        self
    }

    /// Trusted only where the address has the origin of `own`, an address of the host itself.
    pub(crate) fn trusted_like(mut self, own: &Url) -> Self {
        self.is_trusted = self.url.origin() == own.origin();
        self
    }
}

impl Client {
    /// Sends `request`; where there are several client certificates, until one is accepted. Any status is an answer.
    pub(crate) async fn send(&self, request: &Request<'_>) -> Result<Response, Error> {
        let mut others = request.endpoint.identity_count().saturating_sub(1);
        loop {
            let identity = request.endpoint.identity();
            match self.send_authorized(request).await {
                Err(error) if others > 0 && error.may_want_certificate() => {
                    others -= 1;
                    request.endpoint.next_identity(identity);
                }
                Err(error @ Error::Tls { .. }) => {
                    request.endpoint.forget_certificates();
                    return Err(error);
                }
                result => return result,
            }
        }
    }

    /// Sends `request`, and once more with a new authorization after a 401, or after a 403 to one that was kept.
    async fn send_authorized(&self, request: &Request<'_>) -> Result<Response, Error> {
        let (what, endpoint) = (request.what, request.endpoint);
        let authorization = match request.is_trusted {
            true => self.auth_cache().current(endpoint, &request.scopes).await,
            false => None,
        };
        let response = self.send_with(request, authorization.as_ref()).await?;
        // Another server behind a redirect must not learn the credentials of this one.
        let is_ours = request.is_trusted && response.url().origin() == request.url.origin();
        let is_refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        let challenge = Challenge::find(response.headers());
        if !is_ours || !is_refused || (challenge.is_none() && authorization.is_none()) {
            return Ok(response);
        }
        let refused = refusal(self, what, endpoint, response).await;
        match self.authorize(what, endpoint, &request.scopes, challenge, authorization.as_ref()).await? {
            Some(renewed) => self.send_with(request, Some(&renewed)).await,
            None => Err(refused),
        }
    }

    /// Sends `request` and follows redirects; what is secret stays with the host itself.
    async fn send_with(&self, request: &Request<'_>, authorization: Option<&Authorization>) -> Result<Response, Error> {
        let mut url = request.url.clone();
        let mut is_trusted = request.is_trusted;
        for _ in 0..=REDIRECTS_MAX {
            let response = self.send_once(request, &url, authorization.filter(|_| is_trusted), is_trusted).await?;
            match redirect_target(&request.method, &response) {
                None => return Ok(response),
                Some(target) => url = target,
            }
            let is_read = matches!(request.method, Method::GET | Method::HEAD);
            if !is_read && !request.endpoint.takes_uploads_at(&url, self.options()) {
                let (what, host) = (request.what.to_owned(), request.endpoint.name().to_owned());
                let other = authority(&url);
                let reason =
                    format!("a {} to {other}, which is another host; --upload-host={other} allows it", request.method);
                return Err(Error::Redirects { what, host, reason });
            }
            is_trusted &= url.origin() == request.url.origin();
        }
        let (what, host) = (request.what.to_owned(), request.endpoint.name().to_owned());
        Err(Error::Redirects { what, host, reason: "without end".to_owned() })
    }

    async fn send_once(
        &self,
        request: &Request<'_>,
        url: &Url,
        authorization: Option<&Authorization>,
        is_trusted: bool,
    ) -> Result<Response, Error> {
        let endpoint = request.endpoint;
        let mut built = endpoint.http(request.what, url, self)?.request(request.method.clone(), url.clone());
        for (name, value) in &request.headers {
            built = built.header(name, value);
        }
        if is_trusted {
            for (name, value) in &endpoint.settings().config.headers {
                built = built.header(name, value);
            }
        }
        if let Some(authorization) = authorization {
            built = authorization.apply(built);
        }
        let (what, host) = (request.what, &*host_shown(endpoint, url));
        let response = match &request.payload {
            Payload::Empty => self.answer(what, host, built).await,
            Payload::Bytes(bytes) => self.answer(what, host, built.body(bytes.clone())).await,
            Payload::Upload(upload) => upload.send(self, what, host, built).await,
        }?;
        self.note_reached(endpoint.registry());
        Ok(response)
    }

    /// Sends `request` and waits for the head of the answer.
    pub(crate) async fn answer(&self, what: &str, host: &str, request: RequestBuilder) -> Result<Response, Error> {
        let stall = self.options().stall_timeout;
        match tokio::time::timeout(stall, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Error::from_transport(what, host, &error)),
            Err(_) => Err(stalled(what, host, stall)),
        }
    }
}

/// Where `response` sends on to, if it does. 301 to 303 make a GET of other methods, which nobody here means.
fn redirect_target(method: &Method, response: &Response) -> Option<Url> {
    let is_followed = match response.status().as_u16() {
        307 | 308 => true,
        301..=303 => matches!(*method, Method::GET | Method::HEAD),
        _ => false,
    };
    let location = header_text(response.headers(), header::LOCATION).filter(|_| is_followed)?;
    response.url().join(location).ok().filter(|url| matches!(url.scheme(), "http" | "https"))
}

/// How errors name the host at `url`: the endpoint, or one that it has sent us to.
pub(crate) fn host_shown(endpoint: &Endpoint, url: &Url) -> String {
    match Url::parse(endpoint.root()) {
        Ok(own) if own.origin() != url.origin() => {
            format!("{} (for {})", authority(url), endpoint.name())
        }
        _ => endpoint.name().to_owned(),
    }
}

pub(crate) fn stalled(what: &str, host: &str, limit: Duration) -> Error {
    Error::Stalled { what: what.to_owned(), host: host.to_owned(), seconds: limit.as_secs() }
}

/// The next piece of an answer's body; `None` at its end. It is waited for as long as `patience`, which is what is left
/// of `limit`.
pub(crate) async fn next_piece_within(
    what: &str,
    host: &str,
    response: &mut Response,
    patience: Duration,
    limit: Duration,
) -> Result<Option<Bytes>, Error> {
    match tokio::time::timeout(patience, response.chunk()).await {
        Ok(Ok(piece)) => Ok(piece),
        Ok(Err(error)) => Err(Error::from_transport(what, host, &error)),
        Err(_) => Err(stalled(what, host, limit)),
    }
}

/// The whole body of an answer.
///
/// # Errors
///
/// [`Error::TooLong`] when it has more than `limit_bytes`; never holds more than that and one piece.
/// [`Error::Stalled`] when it takes longer than [`crate::ClientOptions::document_timeout`] allows.
pub(crate) async fn read_bounded(
    client: &Client,
    what: &str,
    host: &str,
    mut response: Response,
    limit_bytes: u64,
) -> Result<Bytes, Error> {
    let too_long = || Error::TooLong { what: what.to_owned(), host: host.to_owned(), limit_bytes };
    if response.content_length().is_some_and(|len| len > limit_bytes) {
        return Err(too_long());
    }
    let mut body = BytesMut::new();
    let started = Instant::now();
    loop {
        let options = client.options();
        let allowed = options.document_timeout + Duration::from_secs((body.len() / DOCUMENT_PACE) as u64);
        let left = allowed.saturating_sub(started.elapsed());
        let (patience, limit) =
            if left < options.stall_timeout { (left, allowed) } else { (options.stall_timeout, options.stall_timeout) };
        let Some(piece) = next_piece_within(what, host, &mut response, patience, limit).await? else { break };
        if (body.len() + piece.len()) as u64 > limit_bytes {
            return Err(too_long());
        }
        body.extend_from_slice(&piece);
    }
    Ok(body.freeze())
}

/// The error that an answer without success means, with the registry's own words.
pub(crate) async fn refusal(client: &Client, what: &str, endpoint: &Endpoint, mut response: Response) -> Error {
    let host = &*host_shown(endpoint, response.url());
    let status = response.status();
    let retry_after = parse_retry_after(response.headers(), SystemTime::now());
    let mut body = Vec::new();
    // Whatever of the body arrives soon is good enough for a message.
    let read = async {
        while body.len() < REFUSAL_LEN_MAX
            && let Ok(Some(piece)) = response.chunk().await
        {
            body.extend_from_slice(&piece);
        }
    };
    let is_whole = tokio::time::timeout(client.options().stall_timeout, read).await.is_ok();
    tracing::trace!(host, is_whole, "refusal read");
    let hint = client.credentials().hint(endpoint.name());
    Error::from_status(what, host, &hint, status, retry_after, &describe_refusal(&body))
}

/// A header as text, where it is there and is text.
pub(crate) fn header_text(headers: &header::HeaderMap, name: impl header::AsHeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// `Retry-After` as a length of time. Source: RFC 9110 10.2.3.
pub(crate) fn parse_retry_after(headers: &header::HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = header_text(headers, header::RETRY_AFTER)?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// A registry's error answer. Source: OCI distribution specification, "Error Codes".
#[derive(Deserialize)]
struct ErrorAnswer {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    code: Option<String>,
    message: Option<String>,
}

/// What an error answer says, in one clean line; may be empty.
pub(crate) fn describe_refusal(body: &[u8]) -> String {
    if let Ok(answer) = serde_json::from_slice::<ErrorAnswer>(body) {
        let entries = answer.errors.iter().map(|entry| match (&entry.code, &entry.message) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(text), None) | (None, Some(text)) => text.clone(),
            (None, None) => String::new(),
        });
        return clean(&entries.collect::<Vec<_>>().join("; "));
    }
    let text = String::from_utf8_lossy(body);
    if is_html(&text) { "an HTML page, so perhaps no registry".to_owned() } else { clean(&text) }
}

/// Whether a text is a web page.
pub(crate) fn is_html(text: &str) -> bool {
    let start: String = text.trim_start().chars().take(15).collect::<String>().to_ascii_lowercase();
    start.starts_with("<!doctype html") || start.starts_with("<html")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let check = |text: &'static str, expected: Option<u64>| {
            let mut headers = header::HeaderMap::new();
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static(text));
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
            assert_eq!(parse_retry_after(&headers, now), expected.map(Duration::from_secs), "{text}");
        };
        check("7", Some(7));
        check("Sun, 06 Nov 1994 08:49:47 GMT", Some(10));
        check("Sun, 06 Nov 1994 08:49:27 GMT", Some(0));
        check("soon", None);
        check("-1", None);
    }

    #[test]
    fn says_what_the_registry_says() {
        let check = |body: &[u8], expected: &str| assert_eq!(describe_refusal(body), expected);
        check(
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"Tag":"t"}}]}"#,
            "MANIFEST_UNKNOWN: manifest unknown",
        );
        check(br#"{"errors":[{"code":"A","message":"\u001b[1m"},{"message":"b"}]}"#, "A: [1m; b");
        check(b"\n<!DOCTYPE html><html>", "an HTML page, so perhaps no registry");
        check(b"try later\n", "try later");
        check(b"", "");
    }
}
