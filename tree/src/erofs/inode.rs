//! Inodes as they are stored, and what they take from those of the tree.

use std::ops::Range;

use format_spec::{Index, Inode};
use zerocopy::little_endian::{U16, U32};

use super::layout::{BLOCK_LEN, InodeCompact, InodeExtended, NULL_BLOCK, format};

/// Seconds and nanoseconds since 1970.
pub(super) type Time = (u64, u32);

/// What an inode has besides the fields that the tree says.
pub(super) struct StoredInode {
    pub(super) number: u32,
    pub(super) format: u16,
    pub(super) xattr_count: u16,
    pub(super) payload: u32,
    pub(super) size: u64,
}

impl StoredInode {
    pub(super) fn to_compact(&self, inode: &Inode) -> InodeCompact {
        let to_u16 = |field: u32| u16::try_from(field).expect("checked by fits_compact").into();
        InodeCompact {
            format: self.format.into(),
            xattr_count: self.xattr_count.into(),
            mode: low_mode(inode),
            nlink: to_u16(inode.nlink.get()),
            size: u32::try_from(self.size).expect("checked by fits_compact").into(),
            mtime_delta: 0.into(),
            payload: self.payload.into(),
            short_number: self.short_number(),
            uid: to_u16(inode.uid.get()),
            gid: to_u16(inode.gid.get()),
            reserved: 0.into(),
        }
    }

    pub(super) fn to_extended(&self, inode: &Inode) -> InodeExtended {
        InodeExtended {
            format: (self.format | format::EXTENDED).into(),
            xattr_count: self.xattr_count.into(),
            mode: low_mode(inode),
            reserved: 0.into(),
            size: self.size.into(),
            payload: self.payload.into(),
            short_number: self.short_number(),
            uid: inode.uid,
            gid: inode.gid,
            mtime_seconds: inode.mtime_seconds,
            mtime_nanoseconds: inode.mtime_nanoseconds,
            nlink: inode.nlink,
            reserved2: [0; 16],
        }
    }

    /// The number in the tree, from 1: a 0 would mean "no file" to some programs.
    fn short_number(&self) -> U32 {
        self.number.wrapping_add(1).into()
    }
}

fn low_mode(inode: &Inode) -> U16 {
    u16::try_from(inode.mode.get() & 0xffff).expect("masked").into()
}

pub(super) fn fits_compact(inode: &Inode, size: u64) -> bool {
    let is_short = |field: u32| field <= u16::MAX.into();
    is_short(inode.uid.get()) && is_short(inode.gid.get()) && is_short(inode.nlink.get()) && size <= u32::MAX.into()
}

pub(super) fn time_of(inode: &Inode) -> Time {
    (inode.mtime_seconds.get(), inode.mtime_nanoseconds.get())
}

/// The time that more than half of the inodes have, if there is one; else some time of an inode.
///
/// Boyer and Moore's majority vote: needs no memory, and where times are many nothing is to be gained.
pub(super) fn majority_time<B: AsRef<[u8]>>(tree: &Index<B>) -> Time {
    let (mut candidate, mut lead) = ((0, 0), 0u32);
    for time in tree.inodes().iter().map(time_of) {
        if lead == 0 {
            candidate = time;
        }
        lead = if time == candidate { lead + 1 } else { lead - 1 };
    }
    candidate
}

/// The blocks of its device that hold a file's content.
pub(super) fn content_blocks(inode: &Inode) -> Result<Range<u64>, &'static str> {
    let range = inode.plain_range();
    if !range.start.is_multiple_of(BLOCK_LEN) {
        return Err("its content is not aligned");
    }
    let blocks = range.start / BLOCK_LEN..range.end.div_ceil(BLOCK_LEN);
    if blocks.end >= NULL_BLOCK.into() {
        return Err("its content reaches past 16 TiB of its layer");
    }
    Ok(blocks)
}
