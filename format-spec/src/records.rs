//! The records of an index as they lie in its bytes (SPEC.md 5), and what their numbers mean.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::digest::Digest;

/// The format version that this crate reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Alignment of files in the plain address space, in bytes.
pub const PLAIN_ALIGN: u64 = 4096;
/// The inode number that marks a whiteout in [`Dirent::inode`].
pub const WHITEOUT: u32 = u32::MAX;
/// [`Inode::xattrs`] of an inode without extended attributes.
pub const NO_XATTRS: u32 = u32::MAX;

/// Mask of the file type in [`Inode::mode`], and the types (`inode(7)`).
pub mod mode {
    /// Mask of the file type.
    pub const TYPE: u32 = 0o170_000;
    /// Socket.
    pub const SOCKET: u32 = 0o140_000;
    /// Symbolic link.
    pub const SYMLINK: u32 = 0o120_000;
    /// Regular file.
    pub const REGULAR: u32 = 0o100_000;
    /// Block device.
    pub const BLOCK: u32 = 0o060_000;
    /// Directory.
    pub const DIRECTORY: u32 = 0o040_000;
    /// Character device.
    pub const CHARACTER: u32 = 0o020_000;
    /// Named pipe.
    pub const FIFO: u32 = 0o010_000;
}

/// Bits of [`Inode::flags`].
pub mod flag {
    /// The directory has no entry of its own in the tar stream: a lower layer's metadata shows, if there is one.
    pub const IMPLICIT: u32 = 1;
    /// The directory hides what lower layers have under its path.
    pub const OPAQUE: u32 = 2;
    /// All flags of this version.
    pub const ALL: u32 = IMPLICIT | OPAQUE;
}

/// Section kinds (SPEC.md 5).
pub mod section {
    /// [`super::Inode`]s; number 0 is the root directory.
    pub const INODES: u32 = 1;
    /// [`super::Dirent`]s, breadth first, sorted by name in each directory.
    pub const DIRENTS: u32 = 2;
    /// Names of the dirents, one after the other in their order.
    pub const NAMES: u32 = 3;
    /// Symlink targets, names and values of extended attributes.
    pub const STRINGS: u32 = 4;
    /// [`super::XattrSet`]s.
    pub const XATTR_SETS: u32 = 5;
    /// [`super::Xattr`]s.
    pub const XATTRS: u32 = 6;
    /// [`super::Extent`]s in tar order.
    pub const EXTENTS: u32 = 7;
    /// [`super::Frame`]s in blob order.
    pub const FRAMES: u32 = 8;
    /// Index digests of a merged tree's layers, lowest first.
    pub const LAYERS: u32 = 9;
    /// [`super::HotFrame`]s in the order of the hot pack.
    pub const HOT_FRAMES: u32 = 10;
    /// [`super::HotPiece`]s in the order of the hot pack.
    pub const HOT_PIECES: u32 = 11;
    /// One [`super::DedupLocation`], or none.
    pub const DEDUP: u32 = 12;

    /// All kinds that this version knows.
    pub const ALL: [u32; 12] =
        [INODES, DIRENTS, NAMES, STRINGS, XATTR_SETS, XATTRS, EXTENTS, FRAMES, LAYERS, HOT_FRAMES, HOT_PIECES, DEDUP];
}

/// One file, directory, link, device or pipe (SPEC.md 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Inode {
    /// File type and permissions.
    pub mode: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Number of names; of a directory 2 and the number of its subdirectories.
    pub nlink: U32,
    /// Modification time: seconds since 1970, two's complement.
    pub mtime_seconds: U64,
    /// Modification time: nanoseconds, below 1,000,000,000.
    pub mtime_nanoseconds: U32,
    /// Directory: number of its first dirent. Symlink: offset of its target in the strings.
    /// Device: its number as Linux encodes it for user space (`new_encode_dev`). Otherwise 0.
    pub payload: U32,
    /// Regular file: length in bytes. Directory: number of dirents. Symlink: length of its target. Otherwise 0.
    pub size: U64,
    /// Regular file: its offset in the plain address space. Otherwise that of the inode before it, or 0.
    pub plain_offset: U64,
    /// Number of its xattr set, or [`NO_XATTRS`].
    pub xattrs: U32,
    /// Bits of [`flag`].
    pub flags: U32,
    /// Number of the layer that holds the data; 0 in the index of a layer.
    pub layer: U32,
    /// Inode number of the directory that holds it (the first one, for hard links); 0 for the root.
    pub parent: U32,
}

const _: () = assert!(size_of::<Inode>() == 64);

impl Inode {
    /// The file type bits of the mode.
    pub fn file_type(&self) -> u32 {
        self.mode.get() & mode::TYPE
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        self.file_type() == mode::DIRECTORY
    }

    /// Whether this is a regular file.
    pub fn is_regular(&self) -> bool {
        self.file_type() == mode::REGULAR
    }

    /// Whether this is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.file_type() == mode::SYMLINK
    }

    /// Whether this is a character or block device.
    pub fn is_device(&self) -> bool {
        matches!(self.file_type(), mode::CHARACTER | mode::BLOCK)
    }

    /// Modification time in seconds since 1970, negative before.
    pub fn mtime_seconds(&self) -> i64 {
        self.mtime_seconds.get().cast_signed()
    }

    /// The range of the plain address space that holds a regular file's content.
    pub fn plain_range(&self) -> Range<u64> {
        let start = self.plain_offset.get();
        start..start.saturating_add(self.size.get())
    }

    /// Numbers of a directory's dirents; empty for everything else.
    pub fn dirent_range(&self) -> Range<usize> {
        if !self.is_directory() {
            return 0..0;
        }
        let start = self.payload.get() as usize;
        start..start.saturating_add(usize::try_from(self.size.get()).unwrap_or(usize::MAX))
    }
}

/// One name in a directory (SPEC.md 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// Offset of the name in the names; it ends where that of the next dirent starts.
    pub name_offset: U32,
    /// Inode number, or [`WHITEOUT`].
    pub inode: U32,
}

const _: () = assert!(size_of::<Dirent>() == 8);

/// Extended attributes that inodes have in common (SPEC.md 5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrSet {
    /// Number of the first xattr.
    pub first: U32,
    /// Number of xattrs.
    pub count: U32,
}

const _: () = assert!(size_of::<XattrSet>() == 8);

/// One extended attribute; sorted by name in its set (SPEC.md 5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Xattr {
    /// Offset of the name, prefix included, in the strings.
    pub name_offset: U32,
    /// Length of the name, in bytes.
    pub name_len: U32,
    /// Offset of the value in the strings.
    pub value_offset: U32,
    /// Length of the value, in bytes.
    pub value_len: U32,
}

const _: () = assert!(size_of::<Xattr>() == 16);

/// A run of file content: the same bytes in the tar stream and in the plain address space (SPEC.md 5.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Offset in the tar stream.
    pub tar_offset: U64,
    /// Offset in the plain address space.
    pub plain_offset: U64,
    /// Length in bytes, at least 1.
    pub len: U64,
}

const _: () = assert!(size_of::<Extent>() == 24);

impl Extent {
    /// The bytes of the plain address space.
    pub fn plain_range(&self) -> Range<u64> {
        let start = self.plain_offset.get();
        start..start.saturating_add(self.len.get())
    }

    /// The bytes of the tar stream.
    pub fn tar_range(&self) -> Range<u64> {
        let start = self.tar_offset.get();
        start..start.saturating_add(self.len.get())
    }
}

/// One zstd frame of the tar stream (SPEC.md 5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Frame {
    /// Offset in the blob.
    pub blob_offset: U64,
    /// Offset of its content in the tar stream.
    pub tar_offset: U64,
    /// Compressed length, in bytes.
    pub compressed_len: U32,
    /// Decompressed length, in bytes.
    pub plain_len: U32,
    /// SHA-256 of the compressed bytes.
    pub digest: [u8; 32],
}

const _: () = assert!(size_of::<Frame>() == 56);

impl Frame {
    /// The bytes of the blob.
    pub fn blob_range(&self) -> Range<u64> {
        let start = self.blob_offset.get();
        start..start.saturating_add(self.compressed_len.get().into())
    }

    /// The bytes of the tar stream.
    pub fn tar_range(&self) -> Range<u64> {
        let start = self.tar_offset.get();
        start..start.saturating_add(self.plain_len.get().into())
    }

    /// The digest of the compressed bytes.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.digest)
    }
}

/// One zstd frame of the hot pack (SPEC.md 5.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HotFrame {
    /// Compressed length, in bytes.
    pub compressed_len: U32,
    /// Decompressed length, in bytes.
    pub plain_len: U32,
    /// SHA-256 of the compressed bytes.
    pub digest: [u8; 32],
}

const _: () = assert!(size_of::<HotFrame>() == 40);

impl HotFrame {
    /// The digest of the compressed bytes.
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.digest)
    }
}

/// A run of file content that stands in the hot pack too (SPEC.md 5.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HotPiece {
    /// Offset in the plain address space, a multiple of [`PLAIN_ALIGN`].
    pub plain_offset: U64,
    /// Length in bytes: a multiple of [`PLAIN_ALIGN`], or up to the end of a file.
    pub len: U32,
    /// Why it is there: a number of [`hot_reason`].
    pub reason: U32,
}

const _: () = assert!(size_of::<HotPiece>() == 16);

impl HotPiece {
    /// The bytes of the plain address space.
    pub fn plain_range(&self) -> Range<u64> {
        let start = self.plain_offset.get();
        start..start.saturating_add(self.len.get().into())
    }
}

/// Values of [`HotPiece::reason`], for people: a reader treats them alike.
pub mod hot_reason {
    /// A recorded profile names it.
    pub const PROFILE: u32 = 1;
    /// Entrypoint or command of the image.
    pub const COMMAND: u32 = 2;
    /// Interpreter of a script that is in the pack.
    pub const INTERPRETER: u32 = 3;
    /// Dynamic loader or library of a program that is in the pack.
    pub const LIBRARY: u32 = 4;
    /// Files that the C library reads at each start: loader cache, name services, time zone.
    pub const SYSTEM: u32 = 5;
    /// Files that a language's runtime reads at each start.
    pub const RUNTIME: u32 = 6;
}

/// Where the dedup section lies: behind the hot pack or, without one, behind the index (SPEC.md 5.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DedupLocation {
    /// Length in the blob, in bytes.
    pub compressed_len: U64,
    /// Length after decompression, in bytes.
    pub plain_len: U64,
    /// SHA-256 of the compressed bytes.
    pub digest: [u8; 32],
}

const _: () = assert!(size_of::<DedupLocation>() == 48);

/// Where the index of a layer blob lies and what it must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IndexLocation {
    /// Offset of the compressed index in the blob, in bytes.
    pub offset: u64,
    /// Length of the compressed index, in bytes.
    pub compressed_len: u64,
    /// Length of the decompressed index, in bytes.
    pub plain_len: u64,
    /// SHA-256 of the compressed index.
    pub digest: Digest,
}

impl IndexLocation {
    /// The bytes of the blob that hold the compressed index.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.compressed_len)
    }
}
