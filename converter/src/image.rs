//! Images to read, wherever they are: manifests, and blobs as streams or by range.

pub mod archive;
pub(crate) mod copy;
pub mod destination;
pub mod docker_archive;
mod document;
pub mod layout;
pub mod location;
pub mod manifest;
pub mod oci_archive;
pub mod oci_directory;
pub mod platform;
pub mod resolve;
pub(crate) mod stale;

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::{StreamExt, TryStreamExt};
use registry::{BlobSource, Client, MANIFEST_LEN_MAX, Reference};
use storage::{ByteStream, Source, SourceError};

pub use crate::image::destination::{ImageDestination, Progress};
use crate::{
    blob::file_source::FileSource,
    image::{
        archive::Archive,
        docker_archive::DockerArchive,
        layout::Layout,
        location::{Location, Selector},
        manifest::Descriptor,
    },
};

/// Longest config accepted: real ones have kilobytes.
pub(crate) const CONFIG_LEN_MAX: u64 = 16 << 20;

/// How long a document may take, beside a second for each [`DOCUMENT_PACE`] bytes: one that comes a byte at a time
/// never stalls.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a document that have to come within a second, in the long run.
const DOCUMENT_PACE: u64 = 32 << 10;

/// An image cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry, or the way to it.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// A directory holds something else, or is not there.
    #[error("{}: no OCI image layout in this directory", .0.display())]
    NoLayout(PathBuf),
    /// A layout does not have the image.
    #[error("{}: no image {image}; there is: {}", place.display(), one_line(present))]
    NoTag {
        /// The layout.
        place: PathBuf,
        /// Which one is meant.
        image: Selector,
        /// The kind of thing that is there, in words that can be written behind the path.
        present: String,
    },
    /// A file is no archive, or not the one that is expected.
    #[error("{}: {}", path.display(), one_line(reason))]
    Archive {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A document cannot be understood.
    #[error("{what}: {}", one_line(reason))]
    Malformed {
        /// Which one.
        what: String,
        /// Why not.
        reason: String,
    },
    /// Content is not what its name says.
    #[error("blob {expected} has digest {found}: the source is damaged")]
    Digest {
        /// The name.
        expected: Digest,
        /// The digest of the content.
        found: Digest,
    },
    /// A stream ended early.
    #[error("blob {digest}: {reason}")]
    Stream {
        /// The blob.
        digest: Digest,
        /// What the source said.
        reason: String,
    },
    /// A conversion would have to be stored under the digest of something else.
    #[error("{0}: a destination needs a tag, not a digest")]
    DigestDestination(Reference),
    /// The same in a layout.
    #[error("{0}: a destination needs a tag, or nothing for the tag latest")]
    LayoutDestination(Location),
    /// A kind of archive that cannot hold what conversion makes.
    #[error(
        "{0}: its layers would have to be plain tars, so nothing of a conversion would be left; \
         write oci-archive:FILE, which docker, podman and skopeo load too"
    )]
    DockerDestination(Location),
    /// A thread that reads an archive ended early.
    #[error("{0}: reading it ended abnormally")]
    Aborted(Location),
}

/// Text of which an image may be the author, for a message: names of members and tags may hold anything, also what a
/// terminal takes for a command.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// A manifest or index as it is stored.
#[derive(Debug, Clone)]
pub struct StoredManifest {
    /// The bytes.
    pub bytes: Bytes,
    /// Their media type.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
}

/// An image to read. Cheap to clone.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// In a registry.
    Registry {
        /// Speaks to it.
        client: Client,
        /// The image.
        reference: Reference,
    },
    /// In an OCI layout, a directory or an archive.
    Layout(Layout),
    /// In an archive of docker.
    DockerArchive(DockerArchive),
}

impl ImageSource {
    /// The image at `location`. Of archives it finds the members; otherwise it does not look whether the image is
    /// there. A compressed archive is decompressed into a file in `spool_directory`.
    ///
    /// # Errors
    ///
    /// When an archive cannot be read.
    pub async fn open(location: Location, client: &Client, spool_directory: &Path) -> Result<Self, ImageError> {
        let spool_directory = spool_directory.to_owned();
        let named = location.clone();
        let opened = match location {
            Location::Registry(reference) => return Ok(Self::Registry { client: client.clone(), reference }),
            Location::OciDirectory(name) => {
                let (path, image) = name.split(Path::exists);
                return Ok(Self::Layout(Layout::in_directory(path, image)));
            }
            Location::OciArchive(name) => tokio::task::spawn_blocking(move || {
                let (path, image) = name.split(Path::exists);
                let archive = Arc::new(Archive::open(&path, &spool_directory)?);
                Ok(Self::Layout(Layout::in_archive(archive, image)))
            }),
            Location::DockerArchive { path, name } => tokio::task::spawn_blocking(move || {
                let archive = Arc::new(Archive::open(&path, &spool_directory)?);
                Ok(Self::DockerArchive(DockerArchive::open(archive, name.as_deref())?))
            }),
        };
        opened.await.map_err(|_| ImageError::Aborted(named))?
    }

    /// Where the image is, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Registry { reference, .. } => reference.to_string(),
            Self::Layout(layout) => layout.name(),
            Self::DockerArchive(archive) => archive.name(),
        }
    }

    /// The manifest or index that the location names.
    ///
    /// # Errors
    ///
    /// When it is not there or is not what its digest says.
    pub async fn manifest(&self) -> Result<StoredManifest, ImageError> {
        match self {
            Self::Registry { client, reference } => Ok(client.manifest(reference).await?.into()),
            Self::Layout(layout) => self.manifest_of(&layout.image()?).await,
            Self::DockerArchive(archive) => Ok(archive.manifest().clone()),
        }
    }

    /// The manifest or index that `descriptor` points to.
    ///
    /// # Errors
    ///
    /// When it is not there or is not what its digest says.
    pub async fn manifest_of(&self, descriptor: &Descriptor) -> Result<StoredManifest, ImageError> {
        match self {
            Self::Registry { client, reference } => {
                Ok(client.manifest(&reference.with_digest(descriptor.digest)).await?.into())
            }
            Self::Layout(_) | Self::DockerArchive(_) => {
                let bytes = self.read_blob(descriptor, MANIFEST_LEN_MAX).await?;
                // As for a manifest from a registry: its own word comes first, since its digest covers that.
                let media_type = own_media_type(&bytes).unwrap_or_else(|| descriptor.media_type.clone());
                Ok(StoredManifest { bytes, media_type, digest: descriptor.digest })
            }
        }
    }

    /// A config, verified.
    ///
    /// # Errors
    ///
    /// When it is not there, too long, or is not what its digest says.
    pub async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        if let Some(content) = descriptor.embedded() {
            return Ok(content);
        }
        self.read_blob(descriptor, CONFIG_LEN_MAX).await
    }

    async fn read_blob(&self, descriptor: &Descriptor, len_max: u64) -> Result<Bytes, ImageError> {
        let digest = descriptor.digest;
        if descriptor.size > len_max {
            let reason = format!("it has {} bytes, allowed are {len_max}", descriptor.size);
            return Err(ImageError::Malformed { what: format!("blob {digest}"), reason });
        }
        let read = async {
            let mut stream = self.blob_stream(&digest).await?;
            let mut bytes = Vec::new();
            while let Some(piece) = stream.next().await {
                bytes.extend_from_slice(&piece.map_err(|error| ImageError::Stream { digest, reason: error.message })?);
                if bytes.len() as u64 > descriptor.size {
                    break;
                }
            }
            Ok::<_, ImageError>(bytes)
        };
        let limit = DOCUMENT_TIMEOUT + Duration::from_secs(descriptor.size / DOCUMENT_PACE);
        let bytes = tokio::time::timeout(limit, read).await.unwrap_or_else(|_| {
            let reason = format!("it has not arrived within {} s", limit.as_secs());
            Err(ImageError::Stream { digest, reason })
        })?;
        let found = Digest::of(&bytes);
        if found == digest { Ok(bytes.into()) } else { Err(ImageError::Digest { expected: digest, found }) }
    }

    /// The bytes of a blob, not verified.
    ///
    /// # Errors
    ///
    /// When it cannot be opened; later failures come through the stream.
    pub async fn blob_stream(&self, digest: &Digest) -> Result<ByteStream, ImageError> {
        match self {
            Self::Registry { client, reference } => Ok(client.blob_stream(reference, digest, None).await?),
            Self::Layout(layout) => stream(&layout.blob(digest)?).await,
            Self::DockerArchive(archive) => stream(&archive.blob(digest)?).await,
        }
    }

    /// A blob of `len` bytes to read by range, not verified.
    ///
    /// # Errors
    ///
    /// When an archive does not have it; others say so when it is read.
    pub fn blob_source(&self, digest: &Digest, len: u64) -> Result<Arc<dyn Source>, ImageError> {
        Ok(match self {
            Self::Registry { client, reference } => {
                Arc::new(BlobSource::new(client.clone(), reference.clone(), *digest, len))
            }
            Self::Layout(layout) => Arc::new(layout.blob(digest)?),
            Self::DockerArchive(archive) => Arc::new(archive.blob(digest)?),
        })
    }

    /// The bytes of `range` of a blob, not verified.
    ///
    /// For parts whose length is bounded by a limit of the format: they are held in memory as they arrive.
    ///
    /// # Errors
    ///
    /// When the blob cannot be read, or ends before the range does.
    pub async fn blob_range(&self, blob: &Descriptor, range: Range<u64>) -> Result<Bytes, ImageError> {
        let digest = blob.digest;
        let failed = |error: SourceError| ImageError::Stream { digest, reason: error.message };
        let source = self.blob_source(&digest, blob.size)?;
        let pieces: Vec<Bytes> = source.fetch(range).await.map_err(failed)?.map_err(failed).try_collect().await?;
        Ok(pieces.concat().into())
    }
}

async fn stream(file: &FileSource) -> Result<ByteStream, ImageError> {
    file.stream().await.map_err(|error| ImageError::File { path: file.path().to_owned(), error })
}

/// The media type that a manifest says it has, if it is one that registries know.
fn own_media_type(bytes: &[u8]) -> Option<String> {
    use registry::media_type::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outline {
        media_type: Option<String>,
    }
    let own = serde_json::from_slice::<Outline>(bytes).ok()?.media_type?;
    [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST].contains(&own.as_str()).then_some(own)
}

impl StoredManifest {
    /// Whether it lists manifests instead of describing one image.
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), registry::media_type::OCI_INDEX | registry::media_type::DOCKER_LIST)
    }
}

impl From<registry::Manifest> for StoredManifest {
    fn from(manifest: registry::Manifest) -> Self {
        Self { bytes: manifest.bytes, media_type: manifest.media_type, digest: manifest.digest }
    }
}
