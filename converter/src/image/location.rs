//! Where images are: in a registry, in an OCI layout, or in an archive.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use format_spec::Digest;
use registry::{ParseReferenceError, Reference};

/// An image as users name it on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `host/repository:tag` or `host/repository@sha256:...`.
    Registry(Reference),
    /// `oci:DIR` and what follows: an OCI layout in a directory.
    OciDirectory(LayoutName),
    /// `oci-archive:FILE` and what follows: an OCI layout in a tar file.
    OciArchive(LayoutName),
    /// `docker-archive:FILE[:repository:tag]`: what `docker save` writes.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// The name of the image in it; `None` for the only one.
        name: Option<String>,
    },
}

/// A layout and an image in it as they are written: `PATH`, `PATH:tag`, `PATH:@number` or `PATH@sha256:...`.
///
/// Paths and tags may both have colons, so only the disk tells where one ends and the other begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutName(String);

/// Which image of a layout is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// The only one, or the one with the tag `latest`.
    Only,
    /// The one with this tag, which may be a whole name: `registry.example/team/app:1.4`.
    Tag(String),
    /// So many entries of `index.json` stand before it: skopeo's `@0`.
    Number(usize),
    /// The one with this digest.
    Digest(Digest),
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => f.write_str("tagged latest"),
            Self::Tag(tag) => write!(f, "tagged {tag}"),
            Self::Number(number) => write!(f, "@{number}"),
            Self::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl LayoutName {
    /// `None` where the path or what follows it is empty.
    fn new(text: &str) -> Option<Self> {
        let is_complete = !text.is_empty() && !text.starts_with(':') && !text.ends_with(':');
        is_complete.then(|| Self(text.to_owned()))
    }

    /// The path and the image, where `exists` tells what is there.
    ///
    /// Of all ways to read it, the one with the longest path that exists; so a directory with a colon in its name can
    /// be named. Where none exists, the path is to be made: then it ends with a name without a colon in a directory
    /// that exists, and else at the first colon, as skopeo has it.
    pub fn split(&self, exists: impl Fn(&Path) -> bool) -> (PathBuf, Selector) {
        let text = self.0.as_str();
        if let Some((path, digest)) = text.rsplit_once('@')
            && let Ok(digest) = digest.parse()
            && !path.is_empty()
        {
            return (path.into(), Selector::Digest(digest));
        }
        let colons = text.rmatch_indices(':').map(|(place, _)| (&text[..place], Some(&text[place + 1..])));
        let readings = || [(text, None)].into_iter().chain(colons.clone()).filter(|(path, _)| !path.is_empty());
        let is_there = |path: &str| exists(Path::new(path));
        let can_be_made = |path: &str| {
            let (parent, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path));
            let is_root = parent.is_empty();
            !name.contains(':') && (is_root || is_there(parent))
        };
        let found = readings().find(|(path, _)| is_there(path));
        let found = found.or_else(|| readings().find(|(path, _)| can_be_made(path)));
        let (path, image) = found.or_else(|| readings().next_back()).unwrap_or((text, None));
        (path.into(), image.map_or(Selector::Only, Selector::of))
    }
}

impl Selector {
    /// The text behind the colon.
    fn of(text: &str) -> Self {
        match text.strip_prefix('@').map(str::parse) {
            Some(Ok(number)) => Self::Number(number),
            _ => Self::Tag(text.to_owned()),
        }
    }
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
            let name = LayoutName::new(rest).ok_or_else(|| refuse("directory", "oci:DIR or oci:DIR:tag"));
            return name.map(Self::OciDirectory);
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let name = LayoutName::new(rest).ok_or_else(|| refuse("file", "oci-archive:FILE or oci-archive:FILE:tag"));
            return name.map(Self::OciArchive);
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

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::OciDirectory(name) => write!(f, "oci:{}", name.0),
            Self::OciArchive(name) => write!(f, "oci-archive:{}", name.0),
            Self::DockerArchive { path, name } => {
                write!(f, "docker-archive:{}", path.display())?;
                name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_directories_and_archives_from_registries() {
        let docker = |path: &str, name: Option<&str>| Location::DockerArchive {
            path: path.into(),
            name: name.map(str::to_owned),
        };
        let check = |text: &str, expected: Location| {
            assert_eq!(text.parse::<Location>().as_ref(), Ok(&expected), "{text}");
            assert_eq!(expected.to_string(), text);
        };
        check("oci:a/b:v1", Location::OciDirectory(LayoutName("a/b:v1".to_owned())));
        check("oci-archive:/a:b/c.tar:v1", Location::OciArchive(LayoutName("/a:b/c.tar:v1".to_owned())));
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

    /// Whole names are allowed as tags, and tools write them; colons are allowed in paths.
    #[test]
    fn the_disk_tells_where_a_path_ends() {
        let digest = Digest::of(b"image");
        let tag = |tag: &str| Selector::Tag(tag.to_owned());
        let check = |text: &str, there: &[&str], path: &str, image: Selector| {
            let exists = |path: &Path| there.iter().any(|there| Path::new(there) == path);
            assert_eq!(LayoutName(text.to_owned()).split(exists), (path.into(), image), "{text} {there:?}");
        };
        for there in [&[][..], &["a/b"], &["a"]] {
            check("a/b", there, "a/b", Selector::Only);
            check("a/b:v1", there, "a/b", tag("v1"));
            check("a/b:registry.example/team/app:1.4", there, "a/b", tag("registry.example/team/app:1.4"));
            check("a/b:localhost:5000/app", there, "a/b", tag("localhost:5000/app"));
            check("a/b:@2", there, "a/b", Selector::Number(2));
            check(&format!("a/b@{digest}"), there, "a/b", Selector::Digest(digest));
        }
        check("a:b", &[], "a", tag("b"));
        check("a:b", &["a:b"], "a:b", Selector::Only);
        check("a:b", &["a", "a:b"], "a:b", Selector::Only);
        check("a:b:v1", &["a:b"], "a:b", tag("v1"));
        // A new layout in a directory with a colon.
        check("/a:b/c", &["/a:b"], "/a:b/c", Selector::Only);
        check("/a:b/c:v1", &["/a:b"], "/a:b/c", tag("v1"));
        check("/a:b/c", &[], "/a", tag("b/c"));
        check("a:@b", &[], "a", tag("@b"));
        check("a@sha256:b", &[], "a@sha256", tag("b"));
    }
}
