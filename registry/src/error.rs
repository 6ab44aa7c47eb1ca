//! Everything that can go wrong between us and a registry, each in one line.
//!
//! An error names the operation (`what`), the host, and where it helps what to do. Texts that come from
//! outside are shortened and cleaned before they get in here.

use std::{error::Error as StdError, io, path::PathBuf, time::Duration};

use format_spec::Digest;
use reqwest::StatusCode;
use storage::SourceError;

/// Longest text of a registry's own that an error carries, in characters.
const DETAIL_CHARS_MAX: usize = 200;

/// Said of a connection that ended between its handshake and the first request.
const CLOSED_AT_ONCE: &str = "it ended right after the TLS handshake, as where a client certificate is refused: if the \
    registry wants one, name it in hosts.toml";

/// An operation on a registry failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host has no address.
    #[error("{what}: registry host {host} is not known: {reason}; check the reference")]
    UnknownHost {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// No connection.
    #[error("{what}: cannot connect to {host}: {reason}")]
    Connect {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What the system said.
        reason: String,
    },
    /// No TLS session: an unknown certificate, or no TLS at all on the other side.
    #[error(
        "{what}: TLS with {host} failed: {reason}; install its CA certificate or name it in hosts.toml, or use --plain-http if it has no TLS"
    )]
    Tls {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What is wrong with the session.
        reason: String,
    },
    /// The other side wants a client certificate, or another one.
    #[error("{what}: {host} refuses us without a client certificate that it knows: {reason}; name one in hosts.toml")]
    ClientCertificate {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What it said.
        reason: String,
    },
    /// Nothing, or next to nothing, moved for too long.
    #[error("{what}: {host} sent next to nothing for {seconds} s")]
    Stalled {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// How long.
        seconds: u64,
    },
    /// The connection ended in the middle.
    #[error("{what}: connection to {host} broke: {reason}")]
    Broken {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// How.
        reason: String,
    },
    /// 401 or 403.
    #[error("{what}: no permission: {host} answered {status}{detail}; {hint}")]
    Denied {
        /// What was attempted.
        what: String,
        /// Who refused: the registry, its token service or its storage.
        host: String,
        /// Advice: it depends on where the credentials come from.
        hint: String,
        /// 401 or 403.
        status: u16,
        /// The registry's own words, with a separator in front; may be empty.
        detail: String,
    },
    /// 404: no such manifest, tag, blob or repository.
    #[error("{what}: not found at {host}{detail}")]
    NotFound {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// The registry's own words, with a separator in front; may be empty.
        detail: String,
    },
    /// Any other status that is no success.
    #[error("{what}: {host} answered {status}{detail}")]
    Status {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// The status.
        status: u16,
        /// The registry's own words, with a separator in front; may be empty.
        detail: String,
        /// How long the registry asks to wait.
        retry_after: Option<Duration>,
    },
    /// Content is not what its name says.
    #[error("{what}: {host} delivered {found}, expected {expected}")]
    DigestMismatch {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What the content should hash to.
        expected: Digest,
        /// What it hashes to.
        found: Digest,
    },
    /// An answer is longer than any honest one.
    #[error("{what}: the answer of {host} is longer than {limit_bytes} bytes")]
    TooLong {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// Redirects that are not followed.
    #[error("{what}: {host} redirects {reason}")]
    Redirects {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// Without end, or where nobody follows.
        reason: String,
    },
    /// An answer that breaks the protocol.
    #[error("{what}: unusable answer of {host}: {reason}")]
    Malformed {
        /// What was attempted.
        what: String,
        /// The registry.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The content to upload cannot be read.
    #[error("{what}: content to upload: {reason}")]
    Content {
        /// What was attempted.
        what: String,
        /// Why.
        reason: String,
    },
    /// Credentials are configured but cannot be used.
    #[error("credentials for {host}: {reason}")]
    Credentials {
        /// The registry.
        host: String,
        /// Why.
        reason: String,
    },
    /// A `hosts.toml`, or a file that it names, cannot be used.
    #[error("{}: {reason}", path.display())]
    HostsFile {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No host of `hosts.toml` may be asked.
    #[error("no host that hosts.toml names for {host} has the capability {capability:?}")]
    NoHost {
        /// The registry.
        host: String,
        /// `pull`, `resolve` or `push`.
        capability: &'static str,
    },
    /// Mirrors could not help, and neither could the registry.
    #[error("{last} (before that: {mirrors})")]
    Mirrors {
        /// What counts: mostly what the registry itself said.
        last: Box<Error>,
        /// What the others said.
        mirrors: String,
    },
    /// The HTTP client cannot be set up.
    #[error("cannot set up HTTP: {0}")]
    Setup(String),
    /// Patience ran out.
    #[error("{last} (gave up after {attempts} attempts in {seconds} s)")]
    GaveUp {
        /// The failure of the last attempt.
        last: Box<Error>,
        /// Attempts since the last progress.
        attempts: u32,
        /// Seconds since the first of them failed.
        seconds: u64,
    },
}

impl Error {
    /// Whether the registry is fine and says that this does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self.root(), Self::NotFound { .. })
    }

    /// Whether credentials are missing or not good enough.
    pub fn is_denied(&self) -> bool {
        matches!(self.root(), Self::Denied { .. })
    }

    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        match self.root() {
            Self::UnknownHost { .. } | Self::Connect { .. } | Self::Stalled { .. } | Self::Broken { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            _ => false,
        }
    }

    /// Whether the next request for the same repository to the same host will most likely fail too. An answer that does
    /// not fit says nothing.
    pub(crate) fn is_about_host(&self) -> bool {
        self.is_transient() || matches!(self.root(), Self::Tls { .. } | Self::ClientCertificate { .. })
    }

    /// Whether there is no connection to this very host, whatever it would be asked: where it redirects to is another.
    pub(crate) fn is_about_connection_to(&self, name: &str) -> bool {
        match self.root() {
            Self::UnknownHost { host, .. }
            | Self::Connect { host, .. }
            | Self::Tls { host, .. }
            | Self::ClientCertificate { host, .. } => host == name,
            _ => false,
        }
    }

    /// Whether it may end when somebody changes what is configured for the host: certificates, headers.
    pub(crate) fn is_about_settings(&self) -> bool {
        matches!(self.root(), Self::Denied { .. } | Self::Tls { .. } | Self::ClientCertificate { .. })
    }

    /// The same in `storage`'s words: a kind that says what another try is good for.
    pub(crate) fn to_source_error(&self) -> SourceError {
        let message = self.to_string();
        let error = match self.root() {
            _ if self.is_transient() => SourceError::passing(message),
            Self::DigestMismatch { .. }
            | Self::TooLong { .. }
            | Self::Redirects { .. }
            | Self::Malformed { .. }
            | Self::Status { .. } => SourceError::unusable(message),
            // Certificates and logins are replaced, helpers come back.
            Self::Tls { .. } | Self::Credentials { .. } => SourceError::passing(message),
            _ => SourceError::refused(message),
        };
        SourceError { retry_after: self.retry_after(), ..error }
    }

    /// Whether the connection ended in the middle.
    pub(crate) fn is_broken(&self) -> bool {
        matches!(self.root(), Self::Broken { .. } | Self::Stalled { .. })
    }

    /// The status of an answer that is neither a refusal of permission nor "not found".
    pub(crate) fn status(&self) -> Option<u16> {
        match self.root() {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the registry says of a manifest that it does not have a blob that the manifest names. Source: OCI
    /// distribution specification, error codes.
    pub(crate) fn misses_blob(&self) -> bool {
        match self.root() {
            Self::Status { detail, .. } | Self::NotFound { detail, .. } => detail.contains("MANIFEST_BLOB_UNKNOWN"),
            _ => false,
        }
    }

    /// How long the registry asks to wait before the next attempt.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self.root() {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The failure itself, without how often it was met and where else.
    fn root(&self) -> &Self {
        match self {
            Self::GaveUp { last, .. } | Self::Mirrors { last, .. } => last.root(),
            other => other,
        }
    }

    /// What `status` (no success) means.
    pub(crate) fn from_status(
        what: &str,
        host: &str,
        hint: &str,
        status: StatusCode,
        retry_after: Option<Duration>,
        detail: &str,
    ) -> Self {
        let (what, host) = (what.to_owned(), host.to_owned());
        let mut detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
        if let Some(wait) = retry_after {
            detail.push_str(&format!(" (to be repeated after {} s)", wait.as_secs()));
        }
        match status.as_u16() {
            status @ (401 | 403) => Self::Denied { what, host, hint: hint.to_owned(), status, detail },
            404 => Self::NotFound { what, host, detail },
            status => Self::Status { what, host, status, detail, retry_after },
        }
    }

    /// What a failure of the HTTP library means.
    pub(crate) fn from_transport(what: &str, host: &str, error: &reqwest::Error) -> Self {
        let chain = Chain::of(error);
        if let Some(reason) = chain.certificate_wanted {
            return Self::ClientCertificate { what: what.to_owned(), host: host.to_owned(), reason };
        }
        let reason = chain.reason;
        let (what, host) = (what.to_owned(), host.to_owned());
        if error.is_builder() {
            Self::Malformed { what, host, reason }
        } else if chain.has_tls {
            Self::Tls { what, host, reason }
        } else if chain.has_dns {
            Self::UnknownHost { what, host, reason }
        } else if error.is_connect() {
            Self::Connect { what, host, reason }
        } else {
            // hyper's words for a new connection that ended before the request was sent.
            let is_closed_at_once =
                reason == "connection closed" && error.url().is_some_and(|url| url.scheme() == "https");
            let reason = if is_closed_at_once { CLOSED_AT_ONCE.to_owned() } else { reason };
            Self::Broken { what, host, reason }
        }
    }

    /// Whether another client certificate may help. In TLS 1.3 a server refuses ours after the handshake (RFC 8446 4.4.2.4,
    /// 6.2); whether its alert or the end of the connection is seen first is a matter of luck.
    pub(crate) fn may_want_certificate(&self) -> bool {
        match self {
            Self::ClientCertificate { .. } => true,
            Self::Broken { reason, .. } => reason == CLOSED_AT_ONCE,
            _ => false,
        }
    }

    pub(crate) fn malformed(what: &str, host: &str, reason: impl Into<String>) -> Self {
        Self::Malformed { what: what.to_owned(), host: host.to_owned(), reason: reason.into() }
    }
}

/// What stands in an error and the errors below it.
struct Chain {
    /// The innermost text: the outer ones only say where.
    reason: String,
    has_tls: bool,
    has_dns: bool,
    /// What the other side said about our certificate.
    certificate_wanted: Option<String>,
}

impl Chain {
    fn of(error: &reqwest::Error) -> Self {
        // The outermost text carries the whole address, so it is not taken.
        let mut chain =
            Self { reason: "the request failed".to_owned(), has_tls: false, has_dns: false, certificate_wanted: None };
        let mut current = error.source();
        while let Some(error) = current {
            chain.reason = clean(&error.to_string());
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                chain.has_tls = true;
                if matches!(tls, rustls::Error::InvalidMessage(_)) {
                    chain.reason = "it does not speak TLS".to_owned();
                }
            }
            // Over HTTP/2 only the text of a TLS failure is left.
            if let Some(alert) = error.to_string().strip_prefix("received fatal alert: ") {
                chain.has_tls = true;
                if is_about_our_certificate(alert) {
                    chain.certificate_wanted = Some(chain.reason.clone());
                }
            }
            // hyper-util marks a failed name resolution by this text only.
            chain.has_dns |= error.to_string() == "dns error";
            // An io::Error hides what it wraps from source(): look inside.
            let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            current = match wrapped {
                Some(wrapped) => Some(wrapped as &(dyn StdError + 'static)),
                None => error.source(),
            };
        }
        chain
    }
}

/// Whether an alert (by rustls's name for it) complains about the client's certificate: about its own a server has
/// nothing to say. Source: RFC 8446 6.2.
fn is_about_our_certificate(alert: &str) -> bool {
    alert == "UnknownCA" || alert.contains("Certificate")
}

/// Cleans a text from outside: one line, no control or direction characters, at most some 200 characters.
pub(crate) fn clean(text: &str) -> String {
    let is_harmful = |letter: char| {
        letter.is_control()
            || matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let spaced: String = text.chars().take(DETAIL_CHARS_MAX * 8).map(|c| if is_harmful(c) { ' ' } else { c }).collect();
    let line = spaced.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() > DETAIL_CHARS_MAX {
        line.chars().take(DETAIL_CHARS_MAX).chain(['…']).collect()
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_become_one_short_clean_line() {
        assert_eq!(clean("a\x1b[31mb\r\n  c\u{202e}d"), "a [31mb c d");
        assert_eq!(clean(&"x".repeat(10_000)).chars().count(), DETAIL_CHARS_MAX + 1);
    }

    #[test]
    fn only_what_may_pass_is_transient() {
        let status = |code| Error::from_status("x", "h", "h", StatusCode::from_u16(code).unwrap(), None, "");
        for (code, transient) in [
            (400, false),
            (401, false),
            (403, false),
            (404, false),
            (408, true),
            (416, false),
            (429, true),
            (500, true),
            (503, true),
        ] {
            assert_eq!(status(code).is_transient(), transient, "{code}");
        }
    }
}
