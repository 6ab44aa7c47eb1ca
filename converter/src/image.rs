//! Images in and out, wherever they are: manifests, blobs as streams, spool files.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use format_spec::Digest;
use futures_util::{StreamExt, TryStreamExt};
use registry::{BlobContent, Client, MANIFEST_LEN_MAX, Reference};
use storage::{ByteStream, SourceError};
use tokio_util::io::ReaderStream;

use crate::{
    location::Location,
    manifest::Descriptor,
    oci_directory::{OciDirectoryWriter, blob_path, find_manifest},
};

/// Size of the pieces that files are read in.
const FILE_PIECE_LEN: usize = 256 << 10;
/// Longest config accepted: real ones have kilobytes.
const CONFIG_LEN_MAX: u64 = 16 << 20;

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
    /// A layout does not have the tag.
    #[error("{}: no image tagged {tag}; there is: {present}", directory.display())]
    NoTag {
        /// The layout.
        directory: PathBuf,
        /// The tag.
        tag: String,
        /// The tags that are there.
        present: String,
    },
    /// A document cannot be understood.
    #[error("{what}: {reason}")]
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

/// An image to read.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// In a registry.
    Registry {
        /// Speaks to it.
        client: Client,
        /// The image.
        reference: Reference,
    },
    /// In an OCI layout.
    OciDirectory {
        /// The layout.
        path: PathBuf,
        /// The tag, where given.
        tag: Option<String>,
    },
}

impl ImageSource {
    /// The image at `location`. Does not look whether it is there.
    pub fn new(location: Location, client: &Client) -> Self {
        match location {
            Location::Registry(reference) => Self::Registry { client: client.clone(), reference },
            Location::OciDirectory { path, tag } => Self::OciDirectory { path, tag },
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
            Self::OciDirectory { path, tag } => self.manifest_of(&find_manifest(path, tag.as_deref())?).await,
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
            Self::OciDirectory { .. } => {
                let bytes = self.read_blob(descriptor, MANIFEST_LEN_MAX).await?;
                Ok(StoredManifest { bytes, media_type: descriptor.media_type.clone(), digest: descriptor.digest })
            }
        }
    }

    /// A config, verified.
    ///
    /// # Errors
    ///
    /// When it is not there, too long, or is not what its digest says.
    pub async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        self.read_blob(descriptor, CONFIG_LEN_MAX).await
    }

    async fn read_blob(&self, descriptor: &Descriptor, len_max: u64) -> Result<Bytes, ImageError> {
        let digest = descriptor.digest;
        if descriptor.size > len_max {
            let reason = format!("it has {} bytes, allowed are {len_max}", descriptor.size);
            return Err(ImageError::Malformed { what: format!("blob {digest}"), reason });
        }
        let mut stream = self.blob_stream(&digest).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece.map_err(|error| ImageError::Stream { digest, reason: error.0 })?);
            if bytes.len() as u64 > descriptor.size {
                break;
            }
        }
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
            Self::OciDirectory { path, .. } => {
                let path = blob_path(path, digest);
                let file = tokio::fs::File::open(&path).await;
                let file = file.map_err(|error| ImageError::File { path: path.clone(), error })?;
                let pieces = ReaderStream::with_capacity(file, FILE_PIECE_LEN);
                let describe = move |error: io::Error| SourceError(format!("{}: {error}", path.display()));
                Ok(Box::pin(pieces.map_err(describe)))
            }
        }
    }
}

impl From<registry::Manifest> for StoredManifest {
    fn from(manifest: registry::Manifest) -> Self {
        Self { bytes: manifest.bytes, media_type: manifest.media_type, digest: manifest.digest }
    }
}

/// Told how many bytes of a blob have arrived at the destination.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// A place for a new image.
#[derive(Debug)]
pub enum ImageDestination {
    /// In a registry.
    Registry {
        /// Speaks to it.
        client: Client,
        /// The repository and tag.
        reference: Reference,
        /// Where blobs wait until they are complete.
        spool_directory: PathBuf,
    },
    /// In an OCI layout.
    OciDirectory(OciDirectoryWriter),
}

impl ImageDestination {
    /// Prepares `location` for an image; what goes to a registry waits in `spool_directory` until it is complete.
    ///
    /// # Errors
    ///
    /// When it is no place for one.
    pub fn open(location: &Location, client: &Client, spool_directory: &Path) -> Result<Self, ImageError> {
        match location {
            Location::Registry(reference) if reference.digest().is_some() => {
                Err(ImageError::DigestDestination(reference.clone()))
            }
            Location::Registry(reference) => Ok(Self::Registry {
                client: client.clone(),
                reference: reference.clone(),
                spool_directory: spool_directory.to_owned(),
            }),
            Location::OciDirectory { path, tag } => {
                Ok(Self::OciDirectory(OciDirectoryWriter::open(path, tag.as_deref())?))
            }
        }
    }

    /// The image as users name it.
    pub fn name(&self) -> String {
        match self {
            Self::Registry { reference, .. } => reference.to_string(),
            Self::OciDirectory(writer) => writer.name(),
        }
    }

    /// A file without a name for a blob on its way here.
    ///
    /// # Errors
    ///
    /// When there is no place for temporary files.
    pub fn spool(&self) -> Result<File, ImageError> {
        match self {
            Self::Registry { spool_directory, .. } => tempfile::tempfile_in(spool_directory)
                .map_err(|error| ImageError::File { path: spool_directory.clone(), error }),
            Self::OciDirectory(writer) => writer.spool(),
        }
    }

    /// Whether a blob is there already.
    ///
    /// # Errors
    ///
    /// When the destination does not answer.
    pub async fn has_blob(&self, digest: &Digest, len: u64) -> Result<bool, ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                Ok(client.stored_blob_len(reference, digest).await? == Some(len))
            }
            Self::OciDirectory(writer) => Ok(writer.has_blob(digest, len)),
        }
    }

    /// Stores a complete spool file of `len` bytes as a blob.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_file(
        &self,
        digest: &Digest,
        len: u64,
        file: &mut File,
        progress: Progress,
    ) -> Result<(), ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                // The file has no other name; opening this one gives a position of its own.
                let content = BlobContent::File(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
                Ok(client.push_blob(reference, digest, len, content, progress).await?)
            }
            Self::OciDirectory(writer) => writer.put_file(digest, file),
        }
    }

    /// Stores a blob that is in memory, unless it is there.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_bytes(&self, digest: &Digest, bytes: &Bytes) -> Result<(), ImageError> {
        let len = bytes.len() as u64;
        if self.has_blob(digest, len).await? {
            return Ok(());
        }
        match self {
            Self::Registry { client, reference, .. } => {
                let content = BlobContent::Bytes(bytes.clone());
                Ok(client.push_blob(reference, digest, len, content, Arc::new(|_| {})).await?)
            }
            Self::OciDirectory(writer) => writer.put_bytes(digest, bytes),
        }
    }

    /// Makes a blob of `source` available without moving its bytes, where that is possible.
    ///
    /// # Errors
    ///
    /// When the registry does not answer.
    pub async fn mount_blob(&self, source: &ImageSource, digest: &Digest) -> Result<bool, ImageError> {
        match (self, source) {
            (Self::Registry { client, reference, .. }, ImageSource::Registry { reference: from, .. })
                if from.host() == reference.host() && from.repository() != reference.repository() =>
            {
                Ok(client.mount_blob(from, reference, digest).await?)
            }
            _ => Ok(false),
        }
    }

    /// Stores the manifest and makes the destination's tag point to it: the last step.
    ///
    /// # Errors
    ///
    /// When the destination does not take it; then the tag is as it was.
    pub async fn publish(&self, media_type: &str, bytes: Bytes) -> Result<(), ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                client.push_manifest(reference, media_type, bytes).await?;
                Ok(())
            }
            Self::OciDirectory(writer) => writer.publish(media_type, &bytes),
        }
    }
}
