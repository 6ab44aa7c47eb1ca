//! Where images are: in a registry or in an OCI layout directory.

use std::{fmt, path::PathBuf, str::FromStr};

use registry::{ParseReferenceError, Reference};

/// An image as users name it on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `host/repository:tag` or `host/repository@sha256:...`.
    Registry(Reference),
    /// `oci:DIR[:tag]`.
    OciDirectory {
        /// The directory.
        path: PathBuf,
        /// The tag; `None` for the only image in it, or where one is made `latest`.
        tag: Option<String>,
    },
}

/// A text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLocationError {
    /// No reference.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// `oci:` without a directory.
    #[error("{0:?} names no directory: expected oci:DIR or oci:DIR:tag")]
    Directory(String),
}

impl FromStr for Location {
    type Err = ParseLocationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(rest) = text.strip_prefix("oci:") else { return Ok(Self::Registry(text.parse()?)) };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag.to_owned())),
            _ => (rest, None),
        };
        if path.is_empty() || tag.as_ref().is_some_and(String::is_empty) {
            return Err(ParseLocationError::Directory(text.to_owned()));
        }
        Ok(Self::OciDirectory { path: path.into(), tag })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::OciDirectory { path, tag } => {
                write!(f, "oci:{}", path.display())?;
                tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_directories_from_registries() {
        let directory =
            |path: &str, tag: Option<&str>| Location::OciDirectory { path: path.into(), tag: tag.map(str::to_owned) };
        let check = |text: &str, expected| assert_eq!(text.parse::<Location>(), Ok(expected), "{text}");
        check("oci:a/b", directory("a/b", None));
        check("oci:a/b:v1", directory("a/b", Some("v1")));
        check("oci:/a:b/c", directory("/a:b/c", None));
        check("localhost:5000/a:v1", Location::Registry("localhost:5000/a:v1".parse().unwrap()));
        for text in ["oci:", "oci::tag", "oci:a:", "debian"] {
            assert!(text.parse::<Location>().is_err(), "{text}");
        }
    }
}
