//! Maps indexes and merged trees into memory: the one place of this crate that needs `unsafe`.

use std::{fs::File, io};

use memmap2::Mmap;

/// Maps a whole file for reading.
///
/// The file must be one that this process, or an earlier one, wrote under a temporary name and then
/// renamed: such files are never written or shortened again, only unlinked.
///
/// # Errors
///
/// When the kernel refuses.
pub fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is sound as long as nobody changes or shortens the file. Index files are written under
    // another name, synced, renamed and from then on only replaced by rename or unlinked, which leave the mapped
    // inode alone; the cache directory has mode 0700, so only root and its owner could do otherwise. Safe code will
    // not do because a copy in memory of every open index would count against the daemon: they are up to
    // hundreds of megabytes of which a container looks at a few pages.
    #[allow(unsafe_code)]
    unsafe {
        Mmap::map(file)
    }
}
