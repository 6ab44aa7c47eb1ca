//! The structures of an EROFS image, as they lie on disk.
//!
//! Names are ours, those of Linux stand behind them. Only what this writer uses is here: no compression, no
//! fragments, no long attribute prefixes, no 48-bit addresses.
//!
//! Source: Linux fs/erofs/erofs_fs.h (5.16 to 6.18 agree on all of it).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Length of a block, in bytes, of memory.
pub const BLOCK: usize = 4096;
/// The same, of files.
pub const BLOCK_LEN: u64 = BLOCK as u64;
/// `log2` of [`BLOCK_LEN`].
pub const BLOCK_BITS: u8 = 12;
/// Offset of the [`SuperBlock`] in the image.
pub const SUPER_OFFSET: usize = 1024;
/// [`SuperBlock::magic`].
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// Inodes start at multiples of this many bytes; their number is the offset divided by it.
pub const INODE_SLOT_LEN: u64 = 32;
/// Chunk index that means "zeros"; no data can start at this block.
pub const NULL_BLOCK: u32 = u32::MAX;
/// Most bits a chunk may have above [`BLOCK_BITS`] (`EROFS_CHUNK_FORMAT_BLKBITS_MASK`).
pub const CHUNK_BLOCK_BITS_MAX: u8 = 31;
/// Most shared attributes an inode may have (`EROFS_MAX_SHARED_XATTRS` of older kernels).
pub const SHARED_XATTRS_MAX: usize = 128;

/// Bits of [`SuperBlock::features_compatible`] and [`SuperBlock::features_incompatible`].
pub mod feature {
    /// The checksum of the superblock is there (`COMPAT_SB_CHKSUM`).
    pub const CHECKSUM: u32 = 0x1;
    /// Times are modification times (`COMPAT_MTIME`).
    pub const MTIME: u32 = 0x2;
    /// There are chunk-based files (`INCOMPAT_CHUNKED_FILE`).
    pub const CHUNKED_FILE: u32 = 0x4;
    /// There is a device table (`INCOMPAT_DEVICE_TABLE`).
    pub const DEVICE_TABLE: u32 = 0x8;
}

/// Parts of [`InodeExtended::format`].
pub mod format {
    /// The inode is an [`super::InodeExtended`], else an [`super::InodeCompact`].
    pub const EXTENDED: u16 = 1;
    /// Content lies in blocks one after the other (`FLAT_PLAIN`).
    pub const FLAT_PLAIN: u16 = 0;
    /// The same, except for the last part, which follows the inode (`FLAT_INLINE`).
    pub const FLAT_INLINE: u16 = 2 << 1;
    /// Chunk indexes follow the inode (`CHUNK_BASED`).
    pub const CHUNK_BASED: u16 = 4 << 1;
    /// Bit of a chunk format: the entries are [`super::ChunkIndex`]es (`CHUNK_FORMAT_INDEXES`).
    pub const CHUNK_INDEXES: u32 = 0x20;
}

/// The superblock (`erofs_super_block`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// CRC-32C, not inverted, of the rest of the first block from here on, this field being 0.
    pub checksum: U32,
    /// Bits of [`feature`] that a kernel may ignore.
    pub features_compatible: U32,
    /// [`BLOCK_BITS`].
    pub block_bits: u8,
    /// How many times 16 bytes the superblock is longer.
    pub extension_count: u8,
    /// Inode number of the root directory.
    pub root_nid: U16,
    /// Number of inodes.
    pub inode_count: U64,
    /// Modification time of compact inodes, seconds.
    pub epoch_seconds: U64,
    /// Modification time of compact inodes, nanoseconds.
    pub epoch_nanoseconds: U32,
    /// Length of the image, in blocks.
    pub block_count: U32,
    /// Block that inode numbers count from.
    pub inodes_block: U32,
    /// Block that shared attributes count from.
    pub xattrs_block: U32,
    /// Identity of the file system.
    pub uuid: [u8; 16],
    /// Name, closed by a zero.
    pub volume_name: [u8; 16],
    /// Bits of [`feature`] that a kernel must know.
    pub features_incompatible: U32,
    /// 0: no compression.
    pub compression: U16,
    /// Number of device slots.
    pub device_count: U16,
    /// Offset of the device slots, divided by their length.
    pub device_slot: U16,
    /// 0: directory blocks are blocks.
    pub directory_block_bits: u8,
    /// 0: no long attribute prefixes.
    pub xattr_prefix_count: u8,
    /// See `xattr_prefix_count`.
    pub xattr_prefix_start: U32,
    /// 0: no fragments.
    pub packed_nid: U64,
    /// 0.
    pub reserved: [u8; 24],
}
const _: () = assert!(size_of::<SuperBlock>() == 128);

/// A device of file content (`erofs_deviceslot`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceSlot {
    /// What the device holds: here the hex digits of a layer's id.
    pub tag: [u8; 64],
    /// Length, in blocks.
    pub block_count: U32,
    /// 0: not part of the address space of the image.
    pub mapped_block: U32,
    /// 0.
    pub reserved: [u8; 56],
}
const _: () = assert!(size_of::<DeviceSlot>() == 128);

/// An inode without a time of its own (`erofs_inode_compact`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeCompact {
    /// Parts of [`mod@format`].
    pub format: U16,
    /// Length of the attributes without their header, in 4 bytes, and 1; 0 for none.
    pub xattr_count: U16,
    /// File type and permissions.
    pub mode: U16,
    /// Number of names.
    pub nlink: U16,
    /// Length of the content, in bytes.
    pub size: U32,
    /// Seconds after the epoch: 0.
    pub mtime_delta: U32,
    /// Flat: its first block. Device: its number. Chunk-based: the chunk format.
    pub payload: U32,
    /// A number for systems that have no 64-bit ones.
    pub short_number: U32,
    /// Owner.
    pub uid: U16,
    /// Group.
    pub gid: U16,
    /// 0.
    pub reserved: U32,
}
const _: () = assert!(size_of::<InodeCompact>() == 32);

/// An inode with everything (`erofs_inode_extended`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeExtended {
    /// Parts of [`mod@format`].
    pub format: U16,
    /// Length of the attributes without their header, in 4 bytes, and 1; 0 for none.
    pub xattr_count: U16,
    /// File type and permissions.
    pub mode: U16,
    /// 0.
    pub reserved: U16,
    /// Length of the content, in bytes.
    pub size: U64,
    /// Flat: its first block. Device: its number. Chunk-based: the chunk format.
    pub payload: U32,
    /// A number for systems that have no 64-bit ones.
    pub short_number: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Modification time: seconds since 1970, two's complement.
    pub mtime_seconds: U64,
    /// Modification time: nanoseconds.
    pub mtime_nanoseconds: U32,
    /// Number of names.
    pub nlink: U32,
    /// 0.
    pub reserved2: [u8; 16],
}
const _: () = assert!(size_of::<InodeExtended>() == 64);

/// What stands before the attributes of an inode (`erofs_xattr_ibody_header`): numbers of shared ones
/// (4 bytes each, their offset divided by 4) and inline ones follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    /// 0: no filter.
    pub name_filter: U32,
    /// Number of shared attributes.
    pub shared_count: u8,
    /// 0.
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<XattrHeader>() == 12);

/// An attribute (`erofs_xattr_entry`): its name without the prefix and its value follow, then zeros up to a
/// multiple of 4.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Length of the name without the prefix.
    pub name_len: u8,
    /// Number of the prefix.
    pub name_index: u8,
    /// Length of the value.
    pub value_len: U16,
}
const _: () = assert!(size_of::<XattrEntry>() == 4);

/// Where a chunk lies (`erofs_inode_chunk_index`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkIndex {
    /// 0.
    pub reserved: U16,
    /// Number of the device, from 1; 0 is the image.
    pub device: U16,
    /// First block on that device.
    pub block: U32,
}
const _: () = assert!(size_of::<ChunkIndex>() == 8);

/// An entry of a directory block (`erofs_dirent`).
///
/// All entries of a block stand before all their names; a name ends where the next one starts, the last one at
/// a zero byte or with the block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// Inode number.
    pub nid: U64,
    /// Offset of the name in the block.
    pub name_offset: U16,
    /// File type: 1 regular, 2 directory, 3 and 4 devices, 5 FIFO, 6 socket, 7 symbolic link.
    pub file_type: u8,
    /// 0.
    pub reserved: u8,
}
const _: () = assert!(size_of::<Dirent>() == 12);
