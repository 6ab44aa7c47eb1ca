//! An OCI image layout in a directory: `oci-layout`, `index.json`, `blobs/sha256/`.
//!
//! Writing leaves nothing behind unless it is published: blobs appear complete under their final name,
//! `index.json` is replaced last, and what was made for a conversion that fails is removed again.
//! Source: OCI image specification, image-layout.md.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use format_spec::Digest;
use rustix::fs::{AtFlags, CWD, FlockOperation, flock, linkat};

use crate::{
    image::ImageError,
    manifest::{Descriptor, ImageIndex},
};

/// Holds the tag of an entry of `index.json`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Content of the file `oci-layout`.
const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
/// Longest `index.json` accepted: some ten thousand images.
const INDEX_LEN_MAX: u64 = 16 << 20;
/// The tag that an image gets when none is given.
const TAG_DEFAULT: &str = "latest";

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |error| ImageError::File { path, error }
}

/// Where the layout keeps a blob.
pub(crate) fn blob_path(directory: &Path, digest: &Digest) -> PathBuf {
    directory.join("blobs/sha256").join(digest.hex())
}

/// The descriptor that `tag` names; without a tag that of the only image, or of `latest`.
pub(crate) fn find_manifest(directory: &Path, tag: Option<&str>) -> Result<Descriptor, ImageError> {
    let path = directory.join("index.json");
    let index = read_index(&path)?.ok_or_else(|| ImageError::NoLayout(directory.to_owned()))?;
    let name_of = |descriptor: &Descriptor| descriptor.annotation(REF_NAME).unwrap_or_default().to_owned();
    let found = match (tag, index.manifests.as_slice()) {
        (None, [only]) => Some(only),
        (tag, manifests) => {
            let tag = tag.unwrap_or(TAG_DEFAULT);
            manifests.iter().find(|descriptor| name_of(descriptor) == tag)
        }
    };
    found.cloned().ok_or_else(|| ImageError::NoTag {
        directory: directory.to_owned(),
        tag: tag.unwrap_or(TAG_DEFAULT).to_owned(),
        present: describe_tags(&index),
    })
}

/// The tags of a layout, for a message.
fn describe_tags(index: &ImageIndex) -> String {
    let tags = index.manifests.iter().map(|manifest| manifest.annotation(REF_NAME).unwrap_or("one without a tag"));
    let tags = tags.collect::<Vec<_>>().join(", ");
    if tags.is_empty() { "nothing".to_owned() } else { tags }
}

fn read_index(path: &Path) -> Result<Option<ImageIndex>, ImageError> {
    let len = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(failed(path))?.len(),
    };
    if len > INDEX_LEN_MAX {
        let reason = format!("it has {len} bytes, allowed are {INDEX_LEN_MAX}");
        return Err(ImageError::Malformed { what: path.display().to_string(), reason });
    }
    let bytes = fs::read(path).map_err(failed(path))?;
    let parsed = serde_json::from_slice(&bytes);
    parsed
        .map(Some)
        .map_err(|error| ImageError::Malformed { what: path.display().to_string(), reason: error.to_string() })
}

/// A layout that an image is written to. Dropped unpublished, it removes what it has made.
#[derive(Debug)]
pub struct OciDirectoryWriter {
    directory: PathBuf,
    tag: String,
    made: Mutex<Made>,
}

#[derive(Debug, Default)]
struct Made {
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl OciDirectoryWriter {
    /// Makes the directories that are missing.
    ///
    /// # Errors
    ///
    /// When the directory holds something else, or cannot be written.
    pub(crate) fn open(directory: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let is_layout = directory.join("oci-layout").exists();
        let is_empty = fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none());
        if !is_layout && !is_empty {
            return Err(ImageError::NoLayout(directory.to_owned()));
        }
        let writer = Self {
            directory: directory.to_owned(),
            tag: tag.unwrap_or(TAG_DEFAULT).to_owned(),
            made: Mutex::default(),
        };
        writer.make_directories(&directory.join("blobs/sha256"))?;
        Ok(writer)
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_directories(&self, path: &Path) -> Result<(), ImageError> {
        let missing: Vec<_> = path.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        for path in missing.into_iter().rev().filter(|path| !path.as_os_str().is_empty()) {
            fs::create_dir(&path).map_err(failed(&path))?;
            self.made().directories.push(path);
        }
        Ok(())
    }

    /// The image as users name it.
    pub(crate) fn name(&self) -> String {
        format!("oci:{}:{}", self.directory.display(), self.tag)
    }

    /// A file without a name on the file system of the layout.
    pub(crate) fn spool(&self) -> Result<File, ImageError> {
        tempfile::tempfile_in(self.directory.join("blobs/sha256")).map_err(failed(&self.directory))
    }

    /// Whether the layout has a blob of this length.
    pub(crate) fn has_blob(&self, digest: &Digest, len: u64) -> bool {
        fs::metadata(blob_path(&self.directory, digest)).is_ok_and(|metadata| metadata.len() == len)
    }

    /// Gives a complete file its name.
    pub(crate) fn put_file(&self, digest: &Digest, file: &mut File) -> Result<(), ImageError> {
        let path = blob_path(&self.directory, digest);
        file.set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed(&path))?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(CWD, &unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {
                self.made().files.push(path);
                Ok(())
            }
            // Not every file system can name a file later.
            Err(_) => {
                let mut copy = File::open(&unnamed).map_err(failed(&path))?;
                self.write_file(&path, |named| io::copy(&mut copy, named).map(drop))
            }
        }
    }

    /// Writes a blob.
    pub(crate) fn put_bytes(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        self.write_file(&blob_path(&self.directory, digest), |file| file.write_all(bytes))
    }

    fn write_file(&self, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ImageError> {
        let existed = path.exists();
        replace_file(path, write)?;
        if !existed {
            self.made().files.push(path.to_owned());
        }
        Ok(())
    }

    /// Writes the manifest and makes the tag point to it.
    pub(crate) fn publish(&self, media_type: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let mut descriptor = Descriptor::of(media_type, bytes);
        if !self.has_blob(&descriptor.digest, descriptor.size) {
            self.put_bytes(&descriptor.digest, bytes)?;
        }
        descriptor.annotations = Some([(REF_NAME.to_owned(), self.tag.clone())].into());
        let layout = self.directory.join("oci-layout");
        if !layout.exists() {
            self.write_file(&layout, |file| file.write_all(LAYOUT.as_bytes()))?;
        }
        // Two commands that write one layout must not lose each other's tag.
        let lock = File::open(&self.directory).map_err(failed(&self.directory))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(&self.directory)(error.into()))?;
        let path = self.directory.join("index.json");
        let mut index = read_index(&path)?.unwrap_or(ImageIndex {
            schema_version: 2,
            media_type: Some(registry::media_type::OCI_INDEX.to_owned()),
            manifests: Vec::new(),
            annotations: None,
            rest: Default::default(),
        });
        index.manifests.retain(|manifest| manifest.annotation(REF_NAME) != Some(&self.tag));
        index.manifests.push(descriptor);
        let text = serde_json::to_vec(&index).expect("maps with text keys");
        replace_file(&path, |file| file.write_all(&text))?;
        *self.made() = Made::default();
        Ok(())
    }
}

impl Drop for OciDirectoryWriter {
    fn drop(&mut self) {
        let made = std::mem::take(&mut *self.made());
        // Best effort: the command has failed already and says why.
        for file in made.files {
            let _ = fs::remove_file(file);
        }
        for directory in made.directories.into_iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Writes a file beside `path` and renames it.
fn replace_file(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ImageError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed(path))?;
    write(file.as_file_mut()).map_err(failed(path))?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed(path))?;
    file.persist(path).map_err(|error| failed(path)(error.error))?;
    Ok(())
}
