//! Parsers of what registries and their configuration files say, for the fuzz targets; nobody else uses them.
//!
//! They are private where they stand because their results are. Here each shows as much as a target asserts.

use std::{ops::Range, path::Path, time::SystemTime};

use reqwest::header::{HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};

use crate::{auth, chunks, docker_config, hosts, manifest, part, referrers, transport};

/// Values of `WWW-Authenticate`: whether there is a challenge that we can answer.
pub fn challenge(values: &[&[u8]]) -> bool {
    auth::Challenge::find(&headers(&WWW_AUTHENTICATE, values)).is_some()
}

/// The answer of a token service: whether there is a token in it.
pub fn token(bytes: &[u8]) -> bool {
    auth::parse_token(bytes).is_some()
}

/// `Content-Range`: the range, and the length of the whole.
pub fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    part::parse_content_range(text)
}

/// `Range` of an upload: its end.
pub fn upload_range_end(text: &str) -> Option<u64> {
    chunks::parse_range_end(text)
}

/// `hosts.toml`: the number of hosts.
///
/// # Errors
///
/// What is wrong with it.
pub fn hosts_toml(text: &str, directory: &Path) -> Result<usize, String> {
    hosts::parse_hosts(text, directory).map(|hosts| hosts.len())
}

/// docker's `config.json`: whether it can be read for `host`. Runs nothing.
///
/// # Errors
///
/// The fault of the file.
pub fn docker_config(bytes: &[u8], host: &str) -> Result<(), String> {
    docker_config::find_configured(bytes, host).map(|_| ())
}

/// The answer of a credential helper: whether there is a credential in it.
pub fn helper_answer(bytes: &[u8]) -> bool {
    docker_config::parse_helper_answer(bytes).is_some()
}

/// A list of referrers: their number.
///
/// # Errors
///
/// What is wrong with it.
pub fn referrers(bytes: &[u8]) -> Result<usize, String> {
    let parsed = referrers::parse_index("referrers", "registry.example", bytes);
    parsed.map(|referrers| referrers.len()).map_err(|error| error.to_string())
}

/// `Link`: the address of the next page.
pub fn next_link(text: &str) -> Option<&str> {
    referrers::next_link(text)
}

/// `Retry-After`: whether it says a time.
pub fn retry_after(value: &[u8]) -> bool {
    transport::parse_retry_after(&headers(&RETRY_AFTER, &[value]), SystemTime::UNIX_EPOCH).is_some()
}

/// The body of a refusal: what a message says of it.
pub fn refusal(body: &[u8]) -> String {
    transport::describe_refusal(body)
}

/// What kind of manifest the bytes are.
///
/// # Errors
///
/// Why they are none.
pub fn manifest_media_type(bytes: &[u8], content_type: &str) -> Result<&'static str, String> {
    manifest::find_media_type(bytes, content_type)
}

fn headers(name: &reqwest::header::HeaderName, values: &[&[u8]]) -> HeaderMap {
    let values = values.iter().filter_map(|value| HeaderValue::from_bytes(value).ok());
    values.map(|value| (name.clone(), value)).fold(HeaderMap::new(), |mut headers, (name, value)| {
        headers.append(name, value);
        headers
    })
}
