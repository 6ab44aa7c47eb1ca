//! A merged tree with its layers: what `stat`, `readdir`, `readlink`, xattrs and `read` say, without FUSE.

use std::ops::Range;

use control::TreeId;
use format_spec::{
    Extent, Index, Inode,
    records::{WHITEOUT, mode},
};
use rustix::io::Errno;
use storage::{Layer, disk::mapping::Map};

use crate::number::Slot;

/// What `stat` shows as block size; content is aligned to it.
pub(crate) const BLOCK_LEN: u64 = 4096;
/// Unit of `st_blocks` (POSIX `sys/stat.h`).
const STAT_BLOCK_LEN: u64 = 512;
/// What `stat` shows as the size of a directory: one block, as an ext4 directory with few entries.
const DIRECTORY_SIZE: u64 = BLOCK_LEN;

/// An image as a container sees it.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) id: TreeId,
    pub(crate) slot: Slot,
    /// The merged tree; its inodes name layers by their place in `layers`.
    pub(crate) index: Index<Map>,
    /// Lowest first.
    pub(crate) layers: Vec<Layer>,
    /// Blocks of all regular files.
    pub(crate) block_count: u64,
}

/// What `stat` shows, but for the inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// File type and permissions.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Names; of a directory 2 and its subdirectories.
    pub(crate) nlink: u32,
    /// Bytes.
    pub(crate) size: u64,
    /// Units of 512 bytes.
    pub(crate) stat_blocks: u64,
    /// Device number as Linux encodes it for user space.
    pub(crate) rdev: u32,
    /// Seconds since 1970.
    pub(crate) mtime_seconds: i64,
    /// Nanoseconds of the second.
    pub(crate) mtime_nanoseconds: u32,
}

impl Attributes {
    /// A directory that belongs to no image.
    pub(crate) fn of_directory(permissions: u32, nlink: u32) -> Self {
        Self {
            mode: mode::DIRECTORY | permissions,
            uid: 0,
            gid: 0,
            nlink,
            size: DIRECTORY_SIZE,
            stat_blocks: DIRECTORY_SIZE / STAT_BLOCK_LEN,
            rdev: 0,
            mtime_seconds: 0,
            mtime_nanoseconds: 0,
        }
    }

    /// A read-only file of `size` bytes that belongs to no image.
    pub(crate) fn of_file(size: u64) -> Self {
        Self { mode: mode::REGULAR | 0o400, nlink: 1, size, stat_blocks: stat_blocks(size), ..Self::of_directory(0, 1) }
    }
}

/// Bytes of a layer's plain address space.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    /// The layer.
    pub(crate) layer: Layer,
    /// Where they start.
    pub(crate) plain_offset: u64,
    /// How many.
    pub(crate) len: usize,
}

impl Tree {
    /// Lets go of the memory that looking at the tree and its layers' indexes took; it comes again when needed.
    pub(crate) fn release_memory(&self) {
        self.index.backing().release();
        self.layers.iter().for_each(|layer| layer.index().backing().release());
    }

    /// The inode with this number.
    ///
    /// # Errors
    ///
    /// `ESTALE` for numbers that the tree never gave out.
    pub(crate) fn inode(&self, number: u32) -> Result<&Inode, Errno> {
        self.index.inode(number).ok_or(Errno::STALE)
    }

    /// The number of the inode under a name of a directory, if there is one.
    ///
    /// # Errors
    ///
    /// `ENOTDIR`.
    pub(crate) fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<u32>, Errno> {
        let directory = self.directory(directory)?;
        Ok(self.index.lookup(directory, name).filter(|inode| *inode != WHITEOUT))
    }

    fn directory(&self, number: u32) -> Result<&Inode, Errno> {
        let inode = self.inode(number)?;
        if inode.is_directory() { Ok(inode) } else { Err(Errno::NOTDIR) }
    }

    /// What `stat` shows.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(crate) fn attributes(&self, number: u32) -> Result<Attributes, Errno> {
        let inode = self.inode(number)?;
        Ok(Attributes {
            mode: inode.mode.get(),
            uid: inode.uid.get(),
            gid: inode.gid.get(),
            nlink: inode.nlink.get(),
            size: match inode.file_type() {
                mode::REGULAR | mode::SYMLINK => inode.size.get(),
                mode::DIRECTORY => DIRECTORY_SIZE,
                _ => 0,
            },
            stat_blocks: match inode.file_type() {
                mode::REGULAR => stat_blocks(inode.size.get()),
                mode::DIRECTORY => DIRECTORY_SIZE / STAT_BLOCK_LEN,
                _ => 0,
            },
            rdev: if inode.is_device() { inode.payload.get() } else { 0 },
            mtime_seconds: inode.mtime_seconds(),
            mtime_nanoseconds: inode.mtime_nanoseconds.get(),
        })
    }

    /// Names and inode numbers in a directory, from entry `skip` on.
    ///
    /// # Errors
    ///
    /// `ENOTDIR`.
    pub(crate) fn entries(&self, directory: u32, skip: usize) -> Result<impl Iterator<Item = (&[u8], u32)>, Errno> {
        let directory = self.directory(directory)?;
        Ok(self.index.children(directory).skip(skip).filter(|(_, inode)| *inode != WHITEOUT))
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    ///
    /// `EINVAL` for anything else.
    pub(crate) fn symlink_target(&self, number: u32) -> Result<&[u8], Errno> {
        let inode = self.inode(number)?;
        if inode.is_symlink() { Ok(self.index.symlink_target(inode)) } else { Err(Errno::INVAL) }
    }

    /// The value of an extended attribute.
    ///
    /// # Errors
    ///
    /// `ENODATA` without one of that name.
    pub(crate) fn xattr(&self, number: u32, name: &[u8]) -> Result<&[u8], Errno> {
        let inode = self.inode(number)?;
        let mut xattrs = self.index.xattrs(inode);
        xattrs.find(|(other, _)| *other == name).map(|(_, value)| value).ok_or(Errno::NODATA)
    }

    /// Names of the extended attributes, each ended by a zero byte: the form of `listxattr(2)`.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(crate) fn xattr_names(&self, number: u32) -> Result<Vec<u8>, Errno> {
        let mut names = Vec::new();
        for (name, _) in self.index.xattrs(self.inode(number)?) {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }

    /// Where `len` bytes at `offset` of a regular file lie, cut at its end; `None` if that leaves nothing.
    ///
    /// # Errors
    ///
    /// `EISDIR`, `EINVAL` for what has no content.
    pub(crate) fn content(&self, number: u32, offset: u64, len: usize) -> Result<Option<Content>, Errno> {
        let (inode, layer) = self.regular_file(number)?;
        let len = clip(inode.size.get(), offset, len);
        let plain_offset = inode.plain_offset.get().checked_add(offset).ok_or(Errno::IO)?;
        Ok((len > 0).then(|| Content { layer: layer.clone(), plain_offset, len }))
    }

    /// Where content or a hole begins in a regular file, from `offset` on.
    ///
    /// # Errors
    ///
    /// `ENXIO` if there is none before its end; `EISDIR`, `EINVAL` for what has no content.
    pub(crate) fn seek(&self, number: u32, offset: u64, sought: Sought) -> Result<u64, Errno> {
        let (inode, layer) = self.regular_file(number)?;
        seek(layer, inode.plain_range(), offset, sought)
    }

    /// The extents of each layer, lowest first.
    pub(crate) fn extents(&self) -> Vec<&[Extent]> {
        self.layers.iter().map(|layer| layer.index().extents()).collect()
    }

    fn regular_file(&self, number: u32) -> Result<(&Inode, &Layer), Errno> {
        let inode = self.inode(number)?;
        match inode.file_type() {
            mode::REGULAR => {}
            mode::DIRECTORY => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        Ok((inode, self.layers.get(inode.layer.get() as usize).ok_or(Errno::IO)?))
    }
}

/// The thing that somebody looks for in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sought {
    /// Bytes that the layer has.
    Content,
    /// Zeros that it does not have; the end of the file counts as one.
    Hole,
}

/// Where content or a hole begins in the file that lies in `plain` of a layer, from `offset` on.
///
/// # Errors
///
/// `ENXIO` if there is none before its end.
pub(crate) fn seek(layer: &Layer, plain: Range<u64>, offset: u64, sought: Sought) -> Result<u64, Errno> {
    let from = plain.start.checked_add(offset).filter(|from| *from < plain.end).ok_or(Errno::NXIO)?;
    let index = layer.index();
    let extents = index.extents_in_plain(&(from..plain.end));
    let found = find(index.extents().get(extents).unwrap_or_default(), from..plain.end, sought);
    found.map(|found| found - plain.start).ok_or(Errno::NXIO)
}

/// The same among extents, ascending, that all have bytes in `range`.
fn find(extents: &[Extent], range: Range<u64>, sought: Sought) -> Option<u64> {
    match sought {
        Sought::Content => extents.first().map(|extent| extent.plain_range().start.max(range.start)),
        Sought::Hole => {
            let mut at = range.start;
            for extent in extents.iter().map(Extent::plain_range) {
                if extent.start > at {
                    break;
                }
                at = at.max(extent.end);
            }
            Some(at.min(range.end))
        }
    }
}

/// How many of `len` bytes at `offset` there are in a file of `size` bytes.
pub(crate) fn clip(size: u64, offset: u64, len: usize) -> usize {
    let rest = size.saturating_sub(offset);
    usize::try_from(rest).map_or(len, |rest| rest.min(len))
}

/// Blocks of all regular files of a tree, each counted once.
pub(crate) fn block_count<B: AsRef<[u8]>>(index: &Index<B>) -> u64 {
    let files = index.inodes().iter().filter(|inode| inode.is_regular());
    files.map(|inode| inode.size.get().div_ceil(BLOCK_LEN)).fold(0, u64::saturating_add)
}

fn stat_blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK_LEN).saturating_mul(BLOCK_LEN / STAT_BLOCK_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_and_holes_are_found_from_anywhere() {
        let extent = |start: u64, end: u64| Extent {
            tar_offset: 0.into(),
            plain_offset: start.into(),
            len: (end - start).into(),
        };
        // Two that touch, a gap, and one more.
        let extents = [extent(10, 20), extent(20, 30), extent(50, 60)];
        let find_from = |from: u64, sought| {
            let within: Vec<_> = extents.iter().copied().filter(|extent| extent.plain_range().end > from).collect();
            find(&within, from..100, sought)
        };
        let found: Vec<_> = [0, 10, 15, 29, 30, 49, 55, 60]
            .iter()
            .map(|from| (find_from(*from, Sought::Content), find_from(*from, Sought::Hole)))
            .collect();
        let expected = [
            (Some(10), Some(0)),
            (Some(10), Some(30)),
            (Some(15), Some(30)),
            (Some(29), Some(30)),
            (Some(50), Some(30)),
            (Some(50), Some(49)),
            (Some(55), Some(60)),
            (None, Some(60)),
        ];
        assert_eq!(found, expected);
        assert_eq!(find(&[extent(0, 100)], 0..100, Sought::Hole), Some(100), "the end is one");
    }
}
