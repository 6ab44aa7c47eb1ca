//! Places for new images: blobs in, manifests after them, the tag last.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use format_spec::Digest;
use registry::{BlobContent, Client, GrowingFile, Growth, Reference, UncommittedBlob};
use tokio::task::JoinHandle;

use crate::image::{
    ImageError, ImageSource,
    layout::Layout,
    location::{LayoutName, Location, Selector},
    manifest::Descriptor,
    oci_archive::OciArchiveWriter,
    oci_directory::OciDirectoryWriter,
};

/// Blobs that turn out shorter are sent when they are complete, if the destination does not have them yet: there is
/// little to win, and before that nobody can ask.
const EARLY_LEN_MIN: u64 = 16 << 20;

/// Told how many bytes of a blob have arrived at the destination.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// A blob that is sent while it is being written. When its writer gives up, so does this.
#[derive(Debug)]
pub struct EarlyUpload(JoinHandle<Result<Option<UncommittedBlob>, registry::Error>>);

impl EarlyUpload {
    /// Waits until all of it is sent and stores it as the blob `digest`; false where that did not work.
    pub async fn commit(self, digest: &Digest) -> bool {
        let sent = match self.0.await {
            Ok(Ok(Some(blob))) => blob.commit(digest).await.map_err(|error| error.to_string()),
            Ok(Ok(None)) => return false,
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &sent {
            tracing::debug!(%digest, error, "early upload failed: the blob is sent again");
        }
        sent.is_ok()
    }
}

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
    /// In an OCI layout in a directory.
    OciDirectory(OciDirectoryWriter),
    /// In an OCI layout in an archive.
    OciArchive(OciArchiveWriter),
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
            Location::OciDirectory(name) => {
                let (path, tag) = new_image(location, name)?;
                Ok(Self::OciDirectory(OciDirectoryWriter::open(&path, tag.as_deref())?))
            }
            Location::OciArchive(name) => {
                let (path, tag) = new_image(location, name)?;
                Ok(Self::OciArchive(OciArchiveWriter::open(&path, tag.as_deref())?))
            }
            Location::DockerArchive { .. } => Err(ImageError::DockerDestination(location.clone())),
        }
    }

    /// The image as users name it.
    pub fn name(&self) -> String {
        match self {
            Self::Registry { reference, .. } => reference.to_string(),
            Self::OciDirectory(writer) => writer.name(),
            Self::OciArchive(writer) => writer.name(),
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
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => writer.spool(),
        }
    }

    /// Whether a blob is there already.
    ///
    /// # Errors
    ///
    /// When the destination does not answer.
    pub async fn has_blob(&self, digest: &Digest, len: u64) -> Result<bool, ImageError> {
        match self {
            Self::Registry { client, reference, .. } => Ok(client.has_stored_blob(reference, digest, len).await?),
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                Ok(writer.has_blob(digest, len))
            }
        }
    }

    /// Begins to send a file that is being written, once it is long; `None` where it only needs to be moved in the end.
    pub fn upload_early(&self, mut file: GrowingFile, progress: Progress) -> Option<EarlyUpload> {
        let Self::Registry { client, reference, .. } = self else { return None };
        let (client, reference) = (client.clone(), reference.clone());
        let send = async move {
            let is_known = |growth: &Growth| growth.is_complete || growth.len >= EARLY_LEN_MIN;
            match file.growth.wait_for(is_known).await {
                Ok(growth) if growth.len >= EARLY_LEN_MIN => {}
                // It is short, or its writer has given up.
                _ => return Ok(None),
            }
            client.send_growing_blob(&reference, file, progress).await
        };
        Some(EarlyUpload(tokio::spawn(send)))
    }

    /// Stores a complete spool file of `len` bytes as a blob.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_file(&self, digest: &Digest, len: u64, file: &File, progress: Progress) -> Result<(), ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                // The file has no other name; opening this one gives a position of its own.
                let content = BlobContent::File(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
                Ok(client.push_blob(reference, digest, len, content, progress).await?)
            }
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                writer.put_file(digest, file)
            }
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
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                writer.put_bytes(digest, bytes)
            }
        }
    }

    /// Makes a blob of `source` available without moving its bytes, where that is possible.
    ///
    /// # Errors
    ///
    /// When the registry does not answer.
    pub async fn mount_blob(&self, source: &ImageSource, digest: &Digest) -> Result<bool, ImageError> {
        match source {
            ImageSource::Registry { reference, .. } => self.mount_blob_of(reference, digest).await,
            _ => Ok(false),
        }
    }

    /// The same for a blob of the repository of `from`.
    ///
    /// # Errors
    ///
    /// When the registry does not answer.
    pub async fn mount_blob_of(&self, from: &Reference, digest: &Digest) -> Result<bool, ImageError> {
        match self {
            Self::Registry { client, reference, .. }
                if from.host() == reference.host() && from.repository() != reference.repository() =>
            {
                Ok(client.mount_blob(from, reference, digest).await?)
            }
            _ => Ok(false),
        }
    }

    /// Stores a manifest under its digest alone, for an index that will point to it.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_manifest(&self, media_type: &str, bytes: &Bytes) -> Result<(), ImageError> {
        let digest = Digest::of(bytes);
        match self {
            Self::Registry { client, reference, .. } => {
                let reference = reference.with_digest(digest).without_tag();
                client.push_manifest(&reference, media_type, bytes.clone()).await?;
                Ok(())
            }
            Self::OciDirectory(_) | Self::OciArchive(_) => self.put_bytes(&digest, bytes).await,
        }
    }

    /// Stores a manifest with a subject so that who looks for referrers of the subject finds it.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_referrer(&self, descriptor: &Descriptor, bytes: &Bytes) -> Result<(), ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                client.push_referrer(reference, &descriptor.media_type, bytes.clone()).await?;
                Ok(())
            }
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                writer.add_manifest(descriptor.clone(), None, bytes)
            }
        }
    }

    /// Stores a manifest under a tag besides that of the image.
    ///
    /// # Errors
    ///
    /// When the destination does not take it.
    pub async fn put_tagged(&self, tag: &str, media_type: &str, bytes: &Bytes) -> Result<(), ImageError> {
        match self {
            Self::Registry { client, reference, .. } => {
                let reference = reference
                    .with_tag(tag)
                    .map_err(|error| ImageError::Malformed { what: format!("tag {tag}"), reason: error.to_string() })?;
                client.push_manifest(&reference, media_type, bytes.clone()).await?;
                Ok(())
            }
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                writer.add_manifest(Descriptor::of(media_type, bytes), Some(tag), bytes)
            }
        }
    }

    /// The blobs that are here already, to read.
    pub fn to_source(&self) -> ImageSource {
        match self {
            Self::Registry { client, reference, .. } => {
                ImageSource::Registry { client: client.clone(), reference: reference.clone() }
            }
            Self::OciDirectory(writer) | Self::OciArchive(OciArchiveWriter { layout: writer, .. }) => {
                ImageSource::Layout(Layout::in_directory(
                    writer.directory().to_owned(),
                    Selector::Tag(writer.tag().to_owned()),
                ))
            }
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
            Self::OciArchive(writer) => writer.publish(media_type, &bytes).await,
        }
    }
}

/// The path of a layout, and the tag that a new image in it gets.
fn new_image(location: &Location, name: &LayoutName) -> Result<(PathBuf, Option<String>), ImageError> {
    match name.split(Path::exists) {
        (path, Selector::Only) => Ok((path, None)),
        (path, Selector::Tag(tag)) => Ok((path, Some(tag))),
        (_, Selector::Number(_) | Selector::Digest(_)) => Err(ImageError::LayoutDestination(location.clone())),
    }
}
