//! Where images are: in a registry, in an OCI layout, or in an archive.

use std::{fmt, path::PathBuf, str::FromStr};

use registry::{ParseReferenceError, Reference};

/// An image as users name it on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `host/repository:tag` or `host/repository@sha256:...`.
    Registry(Reference),
    /// `oci:DIR[:tag]`: an OCI layout in a directory.
    OciDirectory {
        /// The directory.
        path: PathBuf,
        /// The tag; `None` for the only image in it, or where one is made `latest`.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:tag]`: an OCI layout in a tar file.
    OciArchive {
        /// The file.
        path: PathBuf,
        /// The tag, as for [`Self::OciDirectory`].
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:repository:tag]`: what `docker save` writes.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// The name of the image in it; `None` for the only one.
        name: Option<String>,
    },
}

/// A text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLocationError {
    /// No reference.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// A kind of location without a path, or with an empty tag.
    #[error("{text:?} names no {what}: expected {expected}")]
    Path {
        /// The text.
        text: String,
        /// What is missing.
        what: &'static str,
        /// What it should look like.
        expected: &'static str,
    },
}

impl FromStr for Location {
    type Err = ParseLocationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |what, expected| ParseLocationError::Path { text: text.to_owned(), what, expected };
        if let Some(rest) = text.strip_prefix("oci:") {
            let found = split_tag(rest).ok_or_else(|| refuse("directory", "oci:DIR or oci:DIR:tag"));
            return found.map(|(path, tag)| Self::OciDirectory { path, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let found = split_tag(rest).ok_or_else(|| refuse("file", "oci-archive:FILE or oci-archive:FILE:tag"));
            return found.map(|(path, tag)| Self::OciArchive { path, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let expected = "docker-archive:FILE or docker-archive:FILE:repository:tag";
            // The name may have a host with a port, so the path ends at the first colon, as skopeo has it.
            let (path, name) = match rest.split_once(':') {
                Some((path, name)) => (path, Some(name.to_owned())),
                None => (rest, None),
            };
            if path.is_empty() || name.as_ref().is_some_and(String::is_empty) {
                return Err(refuse("file", expected));
            }
            return Ok(Self::DockerArchive { path: path.into(), name });
        }
        Ok(Self::Registry(text.parse()?))
    }
}

/// `PATH[:tag]`; `None` where one of the two is empty.
fn split_tag(text: &str) -> Option<(PathBuf, Option<String>)> {
    let (path, tag) = match text.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag.to_owned())),
        _ => (text, None),
    };
    let is_complete = !path.is_empty() && tag.as_ref().is_none_or(|tag| !tag.is_empty());
    is_complete.then(|| (path.into(), tag))
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::OciDirectory { path, tag } => ("oci", path, tag),
            Self::OciArchive { path, tag } => ("oci-archive", path, tag),
            Self::DockerArchive { path, name } => ("docker-archive", path, name),
        };
        write!(f, "{kind}:{}", path.display())?;
        tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_directories_and_archives_from_registries() {
        let text = |text: Option<&str>| text.map(str::to_owned);
        let directory = |path: &str, tag| Location::OciDirectory { path: path.into(), tag: text(tag) };
        let archive = |path: &str, tag| Location::OciArchive { path: path.into(), tag: text(tag) };
        let docker = |path: &str, name| Location::DockerArchive { path: path.into(), name: text(name) };
        let check = |text: &str, expected: Location| {
            assert_eq!(text.parse::<Location>().as_ref(), Ok(&expected), "{text}");
            assert_eq!(expected.to_string(), text);
        };
        check("oci:a/b", directory("a/b", None));
        check("oci:a/b:v1", directory("a/b", Some("v1")));
        check("oci:/a:b/c", directory("/a:b/c", None));
        check("oci-archive:a.tar", archive("a.tar", None));
        check("oci-archive:/a:b/c.tar:v1", archive("/a:b/c.tar", Some("v1")));
        check("docker-archive:a.tar", docker("a.tar", None));
        check("docker-archive:a.tar:localhost:5000/a:v1", docker("a.tar", Some("localhost:5000/a:v1")));
        check("localhost:5000/a:v1", Location::Registry("localhost:5000/a:v1".parse().unwrap()));
        for text in [
            "oci:",
            "oci::tag",
            "oci:a:",
            "oci-archive:",
            "oci-archive:a:",
            "docker-archive::a",
            "docker-archive:a:",
            "debian",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
