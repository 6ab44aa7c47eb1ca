//! An OCI image layout to read, in a directory or in an archive: `oci-layout`, `index.json`, `blobs/sha256/`.
//!
//! Source: OCI image specification, image-layout.md.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use format_spec::Digest;

use crate::{
    blob::file_source::FileSource,
    image::{
        ImageError,
        archive::Archive,
        document,
        location::Selector,
        manifest::{Descriptor, ImageIndex, IndexEntry},
    },
};

/// Holds the tag of an entry of `index.json`.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Longest `index.json` accepted: some ten thousand images.
const INDEX_LEN_MAX: u64 = 16 << 20;
/// The tag that an image gets when none is given.
pub(crate) const TAG_DEFAULT: &str = "latest";
const INDEX_NAME: &str = "index.json";

/// A layout, and which of its images is meant.
#[derive(Debug, Clone)]
pub struct Layout {
    place: Place,
    image: Selector,
}

#[derive(Debug, Clone)]
enum Place {
    Directory(PathBuf),
    Archive(Arc<Archive>),
}

impl Layout {
    /// An image of the layout in a directory.
    pub fn in_directory(path: PathBuf, image: Selector) -> Self {
        Self { place: Place::Directory(path), image }
    }

    /// The same in an archive.
    pub fn in_archive(archive: Arc<Archive>, image: Selector) -> Self {
        Self { place: Place::Archive(archive), image }
    }

    /// Where it is, as users name it, without the tag.
    pub fn name(&self) -> String {
        match &self.place {
            Place::Directory(path) => format!("oci:{}", path.display()),
            Place::Archive(archive) => format!("oci-archive:{}", archive.path().display()),
        }
    }

    fn path(&self) -> &Path {
        match &self.place {
            Place::Directory(path) => path,
            Place::Archive(archive) => archive.path(),
        }
    }

    /// What the layout holds.
    ///
    /// # Errors
    ///
    /// When it is no layout, or its `index.json` cannot be understood.
    pub fn index(&self) -> Result<ImageIndex, ImageError> {
        let index = match &self.place {
            Place::Directory(path) => read_index(path)?,
            Place::Archive(archive) => {
                let bytes = archive.read(INDEX_NAME, INDEX_LEN_MAX)?;
                bytes.map(|bytes| parse_index(archive.path(), &bytes)).transpose()?
            }
        };
        index.ok_or_else(|| match &self.place {
            Place::Directory(path) => ImageError::NoLayout(path.clone()),
            Place::Archive(archive) => ImageError::Archive {
                path: archive.path().to_owned(),
                reason: "no OCI image layout in this archive; name one of docker as docker-archive:FILE".to_owned(),
            },
        })
    }

    /// The descriptor of the image.
    ///
    /// # Errors
    ///
    /// When it is not there, or its entry cannot be understood.
    pub fn image(&self) -> Result<Descriptor, ImageError> {
        let index = self.index()?;
        let known: Vec<&Descriptor> = index.known().collect();
        let found = match (&self.image, known.as_slice()) {
            (Selector::Only, [only]) => Some(*only),
            (Selector::Only, _) => find_tag(&index, TAG_DEFAULT),
            (Selector::Tag(tag), _) => find_tag(&index, tag),
            (Selector::Digest(digest), _) => known.iter().find(|entry| entry.digest == *digest).copied(),
            (Selector::Number(number), _) => {
                let entry = index.manifests.get(*number).map(IndexEntry::descriptor).transpose();
                entry.map_err(|reason| ImageError::Malformed {
                    what: format!("{} ({INDEX_NAME}), entry @{number}", self.path().display()),
                    reason,
                })?
            }
        };
        found.cloned().ok_or_else(|| ImageError::NoTag {
            place: self.path().to_owned(),
            image: self.image.clone(),
            present: describe_images(&index),
        })
    }

    /// The blob `digest`.
    ///
    /// # Errors
    ///
    /// When an archive does not have it; a directory says so when it is read.
    pub fn blob(&self, digest: &Digest) -> Result<FileSource, ImageError> {
        match &self.place {
            Place::Directory(path) => Ok(FileSource::new(blob_path(path, digest))),
            Place::Archive(archive) => {
                let found = archive.find(&format!("blobs/sha256/{}", digest.hex()));
                let range = found.ok_or_else(|| ImageError::Archive {
                    path: archive.path().to_owned(),
                    reason: format!("blob {digest} is not in this archive"),
                })?;
                Ok(archive.part(range))
            }
        }
    }
}

/// The entry of `index` that is tagged `tag`.
pub(crate) fn find_tag<'a>(index: &'a ImageIndex, tag: &str) -> Option<&'a Descriptor> {
    index.known().find(|descriptor| descriptor.annotation(REF_NAME) == Some(tag))
}

/// The images of a layout as they can be named, for a message.
fn describe_images(index: &ImageIndex) -> String {
    let images = index.manifests.iter().enumerate().map(|(number, entry)| match (entry.annotation(REF_NAME), entry) {
        (Some(tag), _) => tag.to_owned(),
        (None, IndexEntry::Known(descriptor)) => format!("@{}", descriptor.digest),
        (None, IndexEntry::Odd(_)) => format!("@{number}"),
    });
    let images = images.collect::<Vec<_>>().join(", ");
    if images.is_empty() { "nothing".to_owned() } else { images }
}

/// Where the layout in `directory` keeps a blob.
pub(crate) fn blob_path(directory: &Path, digest: &Digest) -> PathBuf {
    directory.join("blobs/sha256").join(digest.hex())
}

/// Where the layout in `directory` says what it holds.
pub(crate) fn index_path(directory: &Path) -> PathBuf {
    directory.join(INDEX_NAME)
}

/// The `index.json` of a directory; `None` where there is none.
pub(crate) fn read_index(directory: &Path) -> Result<Option<ImageIndex>, ImageError> {
    let path = index_path(directory);
    let failed = |error| ImageError::File { path: path.clone(), error };
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => check_is_file(&metadata.map_err(failed)?).map_err(failed)?,
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(&path).map_err(failed)?;
    file.take(INDEX_LEN_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > INDEX_LEN_MAX {
        let reason = format!("it has more than {INDEX_LEN_MAX} bytes");
        return Err(ImageError::Malformed { what: path.display().to_string(), reason });
    }
    parse_index(&path, &bytes).map(Some)
}

/// A device or pipe in the place of a file has no end, or no beginning.
fn check_is_file(metadata: &fs::Metadata) -> io::Result<()> {
    if metadata.is_file() { Ok(()) } else { Err(io::Error::other("it is no regular file")) }
}

fn parse_index(path: &Path, bytes: &[u8]) -> Result<ImageIndex, ImageError> {
    document::parse(bytes, document::Kind::Manifest)
        .map_err(|reason| ImageError::Malformed { what: format!("{} ({INDEX_NAME})", path.display()), reason })
}
