//! Maps indexes and merged trees into memory: the one place of this crate that needs `unsafe`.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use format_spec::Index;
use memmap2::{Mmap, UncheckedAdvice};
use serde::{Deserialize, Serialize};

/// Bytes of a file that are read at once.
const READ_LEN: usize = 256 << 10;

/// The index of a layer, mapped into memory.
pub type LayerIndex = Index<Map>;

/// A file that is read through memory.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// Maps a whole file for reading.
    ///
    /// The file must be one that this process, or an earlier one, wrote under a temporary name and then
    /// renamed: such files are never written or shortened again, only unlinked.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the map is sound as long as nobody changes or shortens the file. Index files are written under
        // another name, synced, renamed and from then on only replaced by rename or unlinked, which leave the mapped
        // inode alone; the cache directory has mode 0700, so only root and its owner could do otherwise. Safe code
        // will not do because a copy in memory of every open index would count against the daemon: they are up to
        // hundreds of megabytes of which a container looks at a few pages.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(file) };
        map.map(Self)
    }

    /// Lets go of the pages that were read: they stay in the page cache, and the next look at one maps it again.
    pub fn release(&self) {
        // SAFETY: the advice drops changes to private pages; these are pages of a file that is mapped for reading, and
        // come again with the same content.
        #[allow(unsafe_code)]
        let released = unsafe { self.0.unchecked_advise(UncheckedAdvice::DontNeed) };
        if let Err(error) = released {
            tracing::debug!(%error, "memory of a map is kept");
        }
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A checksum that tells whether a file is as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChecksum {
    len: u64,
    crc32: u32,
}

impl FileChecksum {
    /// Of a file that has these bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self { len: bytes.len() as u64, crc32: crc32fast::hash(bytes) }
    }

    /// Reads a file to its end.
    ///
    /// To be done before a file is mapped that has been on a disk: a block that cannot be read is an error here, and
    /// ends the process when it is touched through a map.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let (mut len, mut hasher, mut buffer) = (0, crc32fast::Hasher::new(), vec![0; READ_LEN]);
        loop {
            match file.read_at(&mut buffer, len) {
                Ok(0) => return Ok(Self { len, crc32: hasher.finalize() }),
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    len += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
