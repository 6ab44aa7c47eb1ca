//! Where files of a cache and of trees are changed, and read where they may be damaged.
//!
//! Everything goes to the kernel at once. An [`Observer`] hears of each operation first: tests record the order, lose
//! what was not synced, delay and refuse.

pub(crate) mod bitmap;
pub(crate) mod directory;
pub(crate) mod frame_store;
pub(crate) mod gaps;
pub(crate) mod health;
pub mod mapping;
pub(crate) mod page_map;
pub(crate) mod presence;
pub(crate) mod proof;
pub(crate) mod unchecked;
pub(crate) mod unkept;
pub(crate) mod unpack;
pub(crate) mod verdict;

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Only the daemon's user reads the cache.
const DIRECTORY_MODE: u32 = 0o700;

/// An operation that is about to be done. A `file` is a number that [`Operation::Open`] gave.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "they are what the system calls have")]
pub enum Operation<'a> {
    MakeDirectory {
        path: &'a Path,
    },
    /// Opens a file for writing: one that is made now, or one that is there.
    Open {
        path: &'a Path,
        file: u64,
        is_new: bool,
    },
    Read {
        path: &'a Path,
    },
    ReadAt {
        file: u64,
        offset: u64,
        len: usize,
    },
    WriteAt {
        file: u64,
        offset: u64,
        bytes: &'a [u8],
    },
    SetLen {
        file: u64,
        len: u64,
    },
    Sync {
        file: u64,
    },
    /// Replaces `to`, or moves a directory.
    Rename {
        from: &'a Path,
        to: &'a Path,
    },
    Remove {
        path: &'a Path,
    },
    /// Makes names durable that were made, moved or removed in a directory.
    SyncDirectory {
        path: &'a Path,
    },
}

/// Hears of operations before they are done, on the thread that does them.
pub trait Observer: fmt::Debug + Send + Sync {
    /// An error takes the operation's place.
    ///
    /// # Errors
    ///
    /// Those that the disk is to answer with.
    fn before(&self, operation: Operation<'_>) -> io::Result<()>;
}

/// The disk. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    observer: Option<Arc<dyn Observer>>,
}

/// A file that is written and read in place.
#[derive(Debug)]
pub struct DiskFile {
    disk: Disk,
    file: File,
    number: u64,
}

impl Disk {
    /// The disk, and somebody who watches.
    pub fn observed(observer: Arc<dyn Observer>) -> Self {
        Self { observer: Some(observer) }
    }

    fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        self.observer.as_ref().map_or(Ok(()), |observer| observer.before(operation))
    }

    /// Makes a directory and its parents unless it is there.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.before(Operation::MakeDirectory { path })?;
        create_private_directory(path)
    }

    /// Makes a file that is not there.
    ///
    /// # Errors
    ///
    /// When it is there, or the disk refuses.
    pub fn create(&self, path: &Path) -> io::Result<DiskFile> {
        self.open(path, true)
    }

    /// Opens a file that is there.
    pub(crate) fn open_writable(&self, path: &Path) -> io::Result<DiskFile> {
        self.open(path, false)
    }

    fn open(&self, path: &Path, is_new: bool) -> io::Result<DiskFile> {
        static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        self.before(Operation::Open { path, file: number, is_new })?;
        let file = OpenOptions::new().read(true).write(true).create_new(is_new).open(path)?;
        Ok(DiskFile { disk: self.clone(), file, number })
    }

    /// Opens a file for reading; `None` if there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open_if_there(&self, path: &Path) -> io::Result<Option<File>> {
        self.before(Operation::Read { path })?;
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        }
    }

    /// All bytes of a file; `None` if there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn read_if_there(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let Some(mut file) = self.open_if_there(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Moves a file or directory, replacing a file.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(Operation::Rename { from, to })?;
        fs::rename(from, to)
    }

    /// Takes a file's name away; its content stays for who has it open or mounted.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn remove_if_there(&self, path: &Path) -> io::Result<()> {
        self.before(Operation::Remove { path })?;
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.before(Operation::SyncDirectory { path })?;
        File::open(path)?.sync_all()
    }
}

impl DiskFile {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.before(Operation::WriteAt { file: self.number, offset, bytes })?;
        self.file.write_all_at(bytes, offset)
    }

    /// Fills `buffer` from `offset`; with zeros past the end of the file.
    pub(crate) fn read_sparse(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.before(Operation::ReadAt { file: self.number, offset, len: buffer.len() })?;
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        buffer[filled..].fill(0);
        Ok(())
    }

    /// Where the file holds something from an offset on, `u64::MAX` for nowhere: in between it reads as zeros.
    pub(crate) fn next_stored(&self, offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
            found => Ok(found?),
        }
    }

    /// Makes the file this long; what it gets is a hole.
    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.before(Operation::SetLen { file: self.number, len })?;
        self.file.set_len(len)
    }

    /// Makes content and length durable, not the name.
    ///
    /// # Errors
    ///
    /// When the disk refuses: then nothing is known of what was written since the last time.
    pub fn sync_data(&self) -> io::Result<()> {
        self.disk.before(Operation::Sync { file: self.number })?;
        self.file.sync_data()
    }

    /// Its length.
    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Its inode number.
    pub(crate) fn number(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// The file, to read from.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

/// Makes a directory and its parents, for the daemon's user only. One that is there stays as it is.
///
/// # Errors
///
/// When the disk refuses.
pub fn create_private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)
}

/// Whether a file cannot be read because the disk has lost it, and another one has to take its place: an I/O error, or
/// a file system that finds itself damaged.
pub(crate) fn is_lost(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::IO | Errno::UCLEAN | Errno::BADMSG | Errno::NODATA))
}
