//! Names of images in registries: `host[:port]/repository[:tag][@sha256:...]`.
//!
//! The host is always written out: a reference means the same on every node, whatever its defaults.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use format_spec::Digest;

/// Longest repository name, as in the OCI distribution specification ("Pulling manifests").
const REPOSITORY_LEN_MAX: usize = 255;
/// Longest tag, same place.
const TAG_LEN_MAX: usize = 128;
/// Longest host name that DNS can carry, with room for a port.
const HOST_LEN_MAX: usize = 253 + 6;

/// A checked reference to an image, or to a repository where only that matters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no image reference: {reason}")]
pub struct ParseReferenceError {
    /// The text, shortened.
    text: String,
    /// What is wrong with it.
    reason: &'static str,
}

impl Reference {
    /// The registry, with its port where one was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` only where a digest stands instead.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, where the reference names one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository and tag, pinned to the manifest `digest`.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The same repository, under `tag` and without a digest.
    ///
    /// # Errors
    ///
    /// When `tag` is no tag.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ParseReferenceError> {
        check_tag(tag).map_err(|reason| refuse(tag, reason))?;
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// The same without a tag, where it has a digest to stand instead.
    #[must_use]
    pub fn without_tag(&self) -> Self {
        Self { tag: self.tag.clone().filter(|_| self.digest.is_none()), ..self.clone() }
    }

    /// `host/repository`, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// What a manifest request asks for: the digest where there is one, else the tag.
    pub(crate) fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    /// Without tag and digest the tag is `latest`; on `docker.io` a repository of one component is in `library/`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|reason| refuse(text, reason))
    }
}

fn refuse(text: &str, reason: &'static str) -> ParseReferenceError {
    ParseReferenceError { text: text.chars().take(200).collect(), reason }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => {
            (name, Some(digest.parse().map_err(|_| "after @ a digest is expected: sha256: and 64 hex digits")?))
        }
        None => (text, None),
    };
    let (host, path) = name.split_once('/').ok_or("a registry host is needed in front: host/repository:tag")?;
    check_host(host)?;
    let (repository, tag) = match path.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (path, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let repository = match host {
        "docker.io" if !repository.contains('/') => format!("library/{repository}"),
        _ => repository.to_owned(),
    };
    check_repository(&repository)?;
    let tag = match (tag, &digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { host: host.to_owned(), repository, tag, digest })
}

fn check_host(host: &str) -> Result<(), &'static str> {
    const EXPECTED: &str = "the first component is no registry host: expected name.tld, name:port or localhost";
    if host.len() > HOST_LEN_MAX {
        return Err(EXPECTED);
    }
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(EXPECTED)?;
            address.parse::<Ipv6Addr>().map_err(|_| EXPECTED)?;
            (None, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(EXPECTED)?) })
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    if let Some(name) = name {
        let is_label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        let is_explicit = name.contains('.') || port.is_some() || name == "localhost";
        if !is_explicit || !name.split('.').all(is_label) {
            return Err(EXPECTED);
        }
    }
    match port {
        Some(port) if !port.bytes().all(|byte| byte.is_ascii_digit()) || !matches!(port.parse::<u16>(), Ok(1..)) => {
            Err("the port is no number from 1 to 65535")
        }
        _ => Ok(()),
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.len() > REPOSITORY_LEN_MAX {
        return Err("the repository name is longer than 255 characters");
    }
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("repository names are lower case");
    }
    if repository.split('/').all(is_repository_component) {
        Ok(())
    } else {
        Err("the repository is no path of letters and digits separated by one of . _ __ - and /")
    }
}

/// Runs of letters and digits, separated by `.`, `_`, `__` or any number of `-`.
fn is_repository_component(component: &str) -> bool {
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    is_alphanumeric(first)
        && is_alphanumeric(last)
        && bytes.split(|&byte| is_alphanumeric(byte)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-')
        })
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let first_is_word = tag.bytes().next().is_some_and(is_word);
    if first_is_word
        && tag.len() <= TAG_LEN_MAX
        && tag.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
    {
        Ok(())
    } else {
        Err("the tag is not made of up to 128 letters, digits and . _ -")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn reads_every_form_and_prints_it_again() {
        let check = |text: &str, host: &str, repository: &str, tag: Option<&str>, shown: &str| {
            let reference: Reference = text.parse().unwrap();
            let found = (reference.host(), reference.repository(), reference.tag(), reference.to_string());
            assert_eq!(found, (host, repository, tag, shown.to_owned()));
            assert_eq!(shown.parse(), Ok(reference), "{text}");
        };
        check("localhost/a", "localhost", "a", Some("latest"), "localhost/a:latest");
        check(
            "127.0.0.1:5000/a/b-c__d.e:v1.0",
            "127.0.0.1:5000",
            "a/b-c__d.e",
            Some("v1.0"),
            "127.0.0.1:5000/a/b-c__d.e:v1.0",
        );
        check("[::1]:5000/a:t", "[::1]:5000", "a", Some("t"), "[::1]:5000/a:t");
        check("host:1/a", "host:1", "a", Some("latest"), "host:1/a:latest");
        check("docker.io/debian", "docker.io", "library/debian", Some("latest"), "docker.io/library/debian:latest");
        let digested = format!("quay.io/a/b@{DIGEST}");
        check(&digested, "quay.io", "a/b", None, &digested);
        let both = format!("quay.io/a/b:tag@{DIGEST}");
        check(&both, "quay.io", "a/b", Some("tag"), &both);
    }

    #[test]
    fn refuses_what_is_no_reference_in_one_line() {
        for text in [
            "",
            "/",
            "debian",
            "debian:12",
            "library/debian",
            "host/",
            "localhost/A",
            "localhost/a//b",
            "localhost/a_-b",
            "localhost/a:",
            "localhost/a:-t",
            "localhost/a@sha256:00",
            "localhost:0/a",
            "localhost:99999/a",
            "localhost:/a",
            "localhost:+1/a",
            "user@localhost/a",
            "http://localhost/a",
            "a..b/c",
            "-a.b/c",
            "[::g]/a",
            "[::1/a",
            "[::1]5/a",
            "localhost/a/",
            "localhost/.a",
            "localhost/a b",
            "localhost/a\n",
            "loc\u{7f}.alhost/a",
            "localhost/\u{e4}",
            "localhost/a?x=y",
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains("is no image reference: ") && !error.contains('\n'), "{text:?}: {error}");
        }
        assert!(format!("localhost/{}", "a".repeat(256)).parse::<Reference>().is_err());
        assert!(format!("localhost/a:{}", "a".repeat(129)).parse::<Reference>().is_err());
    }

    #[test]
    fn tag_and_digest_are_exchanged() {
        let reference: Reference = "localhost/a:v1".parse().unwrap();
        let pinned = reference.with_digest(Digest::of(b""));
        assert_eq!(pinned.to_string(), format!("localhost/a:v1@{DIGEST}"));
        assert_eq!(pinned.with_tag("v2").unwrap().to_string(), "localhost/a:v2");
        assert!(reference.with_tag("no/tag").is_err());
    }
}
