//! An OCI image layout to write, in a directory.
//!
//! Writing leaves nothing behind unless it is published: blobs appear complete under their final name,
//! `index.json` is replaced last, and what was made for a conversion that fails is removed again, unless another
//! conversion into the same layout may rely on it.
//! Source: OCI image specification, image-layout.md.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use format_spec::{Digest, DigestHasher};
use rustix::fs::{AtFlags, CWD, FlockOperation, flock, linkat};

use crate::image::{
    ImageError,
    layout::{REF_NAME, TAG_DEFAULT, blob_path, index_path, read_index},
    manifest::{Descriptor, ImageIndex, IndexEntry},
};

/// The file that says that a directory is a layout.
const LAYOUT_NAME: &str = "oci-layout";
/// Times that the directories are made again because somebody who gives up has removed them.
const ENTER_COUNT_MAX: usize = 100;
/// Bytes read at once of a blob that is hashed.
const READ_LEN: usize = 256 << 10;
/// Content of the file `oci-layout`.
const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |error| ImageError::File { path, error }
}

/// A layout that an image is written to. Dropped unpublished, it removes what it has made.
#[derive(Debug)]
pub struct OciDirectoryWriter {
    directory: PathBuf,
    tag: String,
    /// Entries of `index.json` besides that of the tag.
    entries: Mutex<Vec<Descriptor>>,
    made: Mutex<Made>,
    /// Blobs that were hashed or written here.
    verified: Mutex<HashSet<Digest>>,
    /// `index.json` as it was; `None` where there was none.
    index_before: Option<Vec<u8>>,
    /// Holds a shared lock as long as this writer is there: others may rely on what it makes, and it on theirs.
    presence: Mutex<Option<File>>,
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
        // Without the file that says so, what another conversion has begun, or one that was killed.
        let is_ours = |name: &OsStr| name == "blobs" || name.as_encoded_bytes().starts_with(b".");
        let is_begun = fs::read_dir(directory)
            .map_or(true, |mut entries| entries.all(|entry| entry.is_ok_and(|entry| is_ours(&entry.file_name()))));
        if !is_begun && !directory.join(LAYOUT_NAME).exists() {
            return Err(ImageError::NoLayout(directory.to_owned()));
        }
        let writer = Self {
            directory: directory.to_owned(),
            tag: tag.unwrap_or(TAG_DEFAULT).to_owned(),
            entries: Mutex::default(),
            made: Mutex::default(),
            verified: Mutex::default(),
            index_before: fs::read(index_path(directory)).ok(),
            presence: Mutex::default(),
        };
        let presence = writer.enter()?;
        *writer.presence.lock().unwrap_or_else(PoisonError::into_inner) = Some(presence);
        Ok(writer)
    }

    /// Makes the directories that are missing, and shows others that somebody writes here.
    fn enter(&self) -> Result<File, ImageError> {
        let blobs = self.directory.join("blobs");
        for _ in 0..ENTER_COUNT_MAX {
            self.make_directories(&blobs.join("sha256"))?;
            let Ok(presence) = File::open(&blobs) else { continue };
            flock(&presence, FlockOperation::LockShared).map_err(|error| failed(&blobs)(error.into()))?;
            // A caller that gave up meanwhile may have removed what was opened.
            let is_same = |found: fs::Metadata| presence.metadata().is_ok_and(|own| own.ino() == found.ino());
            if fs::metadata(&blobs).is_ok_and(is_same) && blobs.join("sha256").is_dir() {
                return Ok(presence);
            }
        }
        Err(failed(&blobs)(io::Error::other("others remove this directory again and again")))
    }

    /// Whether nobody else relies on what was made here: no other conversion is under way, and none has ended since
    /// this one began.
    fn is_alone(&self) -> bool {
        let presence = self.presence.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(presence) = presence.as_ref() else { return true };
        let is_only_one = flock(presence, FlockOperation::NonBlockingLockExclusive).is_ok();
        is_only_one && fs::read(index_path(&self.directory)).ok() == self.index_before
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_directories(&self, path: &Path) -> Result<(), ImageError> {
        let missing: Vec<_> = path.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        for path in missing.into_iter().rev().filter(|path| !path.as_os_str().is_empty()) {
            match fs::create_dir(&path) {
                Ok(()) => self.made().directories.push(path),
                // Another conversion was first.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&path)(error)),
            }
        }
        Ok(())
    }

    /// The image as users name it.
    pub(crate) fn name(&self) -> String {
        format!("oci:{}:{}", self.directory.display(), self.tag)
    }

    /// The tag that the image gets.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file without a name on the file system of the layout.
    pub(crate) fn spool(&self) -> Result<File, ImageError> {
        tempfile::tempfile_in(self.directory.join("blobs/sha256")).map_err(failed(&self.directory))
    }

    fn verified(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the layout has a blob, as its digest says: a power cut may have left something else by its name.
    ///
    /// Blocks while it is hashed, once.
    pub(crate) fn has_blob(&self, digest: &Digest, len: u64) -> bool {
        if self.verified().contains(digest) {
            return true;
        }
        let path = blob_path(&self.directory, digest);
        let is_there = fs::metadata(&path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == len);
        let is_right = is_there && hash_file(&path).is_ok_and(|found| found == *digest);
        if is_right {
            self.verified().insert(*digest);
        } else if is_there {
            tracing::warn!(path = %path.display(), "this blob is not what its name says: it is written again");
        }
        is_right
    }

    /// Gives a complete file its name.
    pub(crate) fn put_file(&self, digest: &Digest, file: &File) -> Result<(), ImageError> {
        let path = blob_path(&self.directory, digest);
        file.set_permissions(fs::Permissions::from_mode(file_mode())).map_err(failed(&path))?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(CWD, &unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {
                self.made().files.push(path);
                self.verified().insert(*digest);
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

    /// Writes a manifest and keeps an entry for it until the image is published; without a tag it is one that only
    /// others point to.
    pub(crate) fn add_manifest(
        &self,
        mut descriptor: Descriptor,
        tag: Option<&str>,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        if !self.has_blob(&descriptor.digest, descriptor.size) {
            self.put_bytes(&descriptor.digest, bytes)?;
        }
        if let Some(tag) = tag {
            descriptor.annotations.get_or_insert_default().insert(REF_NAME.to_owned(), tag.to_owned());
        }
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(descriptor);
        Ok(())
    }

    /// Writes the manifest and makes the tag point to it.
    pub(crate) fn publish(&self, media_type: &str, bytes: &[u8]) -> Result<(), ImageError> {
        self.add_manifest(Descriptor::of(media_type, bytes), Some(&self.tag), bytes)?;
        // Before a name says that they are there.
        for path in &self.made().files {
            File::open(path).and_then(|file| file.sync_data()).map_err(failed(path))?;
        }
        let layout = self.directory.join(LAYOUT_NAME);
        if !layout.exists() {
            self.write_file(&layout, |file| file.write_all(LAYOUT.as_bytes()))?;
        }
        // Two commands that write one layout must not lose each other's tag.
        let lock = File::open(&self.directory).map_err(failed(&self.directory))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(&self.directory)(error.into()))?;
        let mut index = read_index(&self.directory)?.unwrap_or(ImageIndex {
            schema_version: 2,
            media_type: Some(registry::media_type::OCI_INDEX.to_owned()),
            manifests: Vec::new(),
            annotations: None,
            rest: Default::default(),
        });
        let entries = std::mem::take(&mut *self.entries.lock().unwrap_or_else(PoisonError::into_inner));
        for entry in entries {
            enter(&mut index, entry);
        }
        let text = serde_json::to_vec(&index).expect("maps with text keys");
        replace_file(&index_path(&self.directory), |file| file.write_all(&text))?;
        *self.made() = Made::default();
        Ok(())
    }
}

/// Adds an entry: in place of what has its tag, or unless its manifest is listed already.
fn enter(index: &mut ImageIndex, entry: Descriptor) {
    match entry.annotation(REF_NAME) {
        Some(tag) => index.manifests.retain(|other| other.annotation(REF_NAME) != Some(tag)),
        None if index.known().any(|other| other.digest == entry.digest) => return,
        None => {}
    }
    index.manifests.push(IndexEntry::Known(entry));
}

impl Drop for OciDirectoryWriter {
    fn drop(&mut self) {
        let made = std::mem::take(&mut *self.made());
        if made.files.is_empty() && made.directories.is_empty() || !self.is_alone() {
            return;
        }
        // Best effort: the command has failed already and says why.
        for file in made.files {
            let _ = fs::remove_file(file);
        }
        for directory in made.directories.into_iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn hash_file(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = DigestHasher::default();
    let mut buffer = vec![0; READ_LEN];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

/// Writes a file beside `path` and renames it.
fn replace_file(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ImageError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed(path))?;
    write(file.as_file_mut()).map_err(failed(path))?;
    file.as_file().set_permissions(fs::Permissions::from_mode(file_mode())).map_err(failed(path))?;
    file.persist(path).map_err(|error| failed(path)(error.error))?;
    Ok(())
}
/// The mode of new files, as the user's mask has it: a private image is nobody else's. Files made under a temporary
/// name have 0600. Source: proc_pid_status(5).
fn file_mode() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok());
    0o666 & !mask.unwrap_or(0o022)
}
