//! The index: everything `stat`, `readlink`, `listxattr` and `readdir` show of a layer, and where its
//! data lies (SPEC.md 5, 6).
//!
//! [`Index`] is a view over bytes in open form, made for memory maps: opening takes constant time,
//! lookups allocate nothing, and no content makes it panic. A *merged tree* (what an image of several
//! layers shows) is stored in the same form, with a layer number in every inode and without frames.
//!
//! `builder.rs` makes these bytes.

use std::{cmp::Ordering, collections::VecDeque, ops::Range};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::{
    annotation::{INDEX_LEN_MAX, IndexLocation},
    digest::Digest,
    table::{self, FormatError, Unread},
};

/// Alignment of files in the plain address space, in bytes.
pub const PLAIN_ALIGN: u64 = 4096;
/// Most bytes a frame may decompress to (SPEC.md 9): bounds what a reader allocates for one.
pub const FRAME_PLAIN_LEN_MAX: u32 = 4 << 20;
/// Most bytes a frame may have compressed: zstd's worst case over [`FRAME_PLAIN_LEN_MAX`], rounded up.
pub const FRAME_COMPRESSED_LEN_MAX: u32 = FRAME_PLAIN_LEN_MAX + (1 << 16);
/// Most bytes of plain address space (SPEC.md 9) beside those of [`SPACE_PER_FRAME_BYTE`].
pub const SPACE_LEN_FREE: u64 = 16 << 30;
/// Further bytes of plain address space that each compressed byte of the frames allows: a node keeps some bytes for
/// each page of the space, so few bytes of blob must not claim many pages.
pub const SPACE_PER_FRAME_BYTE: u64 = 64;
/// Most bytes of plain address space whatever the frames claim to have.
pub const SPACE_LEN_MAX: u64 = 256 << 30;
/// Longest name of a directory entry: what Linux file systems allow (`NAME_MAX`).
pub const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link: what Linux follows (`PATH_MAX`, less its final zero).
pub const TARGET_LEN_MAX: u64 = 4095;
/// Longest value of an extended attribute (Linux `XATTR_SIZE_MAX`); names are at most [`NAME_LEN_MAX`] long.
pub const XATTR_VALUE_LEN_MAX: u32 = 64 << 10;
/// Most bytes that all targets, xattr names and values have together, shared ones counted each time: an index of few
/// bytes must not become gigabytes where it is merged.
pub const TEXTS_LEN_MAX: u64 = 256 << 20;
/// Most layers a merged tree may have: what overlayfs and containerd can stack.
pub const LAYER_COUNT_MAX: usize = 500;
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

/// An index or merged tree over bytes in open form.
#[derive(Debug, Clone)]
pub struct Index<B> {
    bytes: B,
    tar_len: u64,
    space_len: u64,
    inodes: Range<usize>,
    dirents: Range<usize>,
    names: Range<usize>,
    strings: Range<usize>,
    xattr_sets: Range<usize>,
    xattrs: Range<usize>,
    extents: Range<usize>,
    frames: Range<usize>,
    layers: Range<usize>,
    hot_frames: Range<usize>,
    hot_pieces: Range<usize>,
    dedup: Range<usize>,
}

impl Index<Vec<u8>> {
    /// Decompresses and checks an index as it stands in a blob, and proves every rule of SPEC.md 6.
    ///
    /// `compressed` are the bytes at `location`, from anywhere; the result is what the digest names.
    ///
    /// # Errors
    ///
    /// When the bytes are not those of the digest, or break a rule.
    pub fn from_compressed(compressed: &[u8], location: &IndexLocation) -> Result<Self, FormatError> {
        let expected = location.compressed_len;
        let length = |what, expected, found| FormatError::Length { what, expected, found };
        if compressed.len() as u64 != expected {
            return Err(length("compressed index", expected, compressed.len() as u64));
        }
        let found = Digest::of(compressed);
        if found != location.digest {
            return Err(FormatError::Digest { what: "compressed index", expected: location.digest, found });
        }
        let bytes = table::decompress(compressed, location.plain_len)?;
        let index = Self::open(bytes)?;
        index.check()?;
        Ok(index)
    }
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Looks at header and section table, in constant time.
    ///
    /// The content is not checked: call [`Self::check`] on bytes that were not checked before.
    ///
    /// # Errors
    ///
    /// When header or section table are damaged, or a section has records of another length.
    pub fn open(bytes: B) -> Result<Self, FormatError> {
        let (header, entries) = table::parse(bytes.as_ref())?;
        let find = |kind: u32, record_len: usize| {
            let Some((number, entry)) = (0..).zip(entries).find(|(_, entry)| entry.kind == kind) else {
                return Ok(0..0);
            };
            if entry.record_len.get() as usize != record_len {
                return Err(FormatError::Rule { what: "section", number, rule: "record length of another version" });
            }
            Ok(table::section_range(entry).expect("checked by parse"))
        };
        Ok(Self {
            tar_len: header.tar_len.get(),
            space_len: header.space_len.get(),
            inodes: find(section::INODES, size_of::<Inode>())?,
            dirents: find(section::DIRENTS, size_of::<Dirent>())?,
            names: find(section::NAMES, 1)?,
            strings: find(section::STRINGS, 1)?,
            xattr_sets: find(section::XATTR_SETS, size_of::<XattrSet>())?,
            xattrs: find(section::XATTRS, size_of::<Xattr>())?,
            extents: find(section::EXTENTS, size_of::<Extent>())?,
            frames: find(section::FRAMES, size_of::<Frame>())?,
            layers: find(section::LAYERS, size_of::<[u8; 32]>())?,
            hot_frames: find(section::HOT_FRAMES, size_of::<HotFrame>())?,
            hot_pieces: find(section::HOT_PIECES, size_of::<HotPiece>())?,
            dedup: find(section::DEDUP, size_of::<DedupLocation>())?,
            bytes,
        })
    }

    fn records<T: FromBytes + Immutable + KnownLayout + Unaligned>(&self, range: &Range<usize>) -> &[T] {
        let section = self.bytes.as_ref().get(range.clone()).unwrap_or_default();
        <[T]>::ref_from_bytes(section).unwrap_or_default()
    }

    /// The bytes in open form.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// What holds these bytes.
    pub fn backing(&self) -> &B {
        &self.bytes
    }

    /// The parts of it that no reader looks at.
    ///
    /// # Errors
    ///
    /// When header or section table are damaged, which [`Self::open`] finds too.
    pub fn unread(&self) -> Result<Unread, FormatError> {
        Unread::of(self.bytes.as_ref(), &section::ALL)
    }

    /// Length of the layer's tar stream, in bytes; 0 for a merged tree.
    pub fn tar_len(&self) -> u64 {
        self.tar_len
    }

    /// Length of the plain address space, in bytes; 0 for a merged tree.
    pub fn space_len(&self) -> u64 {
        self.space_len
    }

    /// All inodes; number 0 is the root.
    pub fn inodes(&self) -> &[Inode] {
        self.records(&self.inodes)
    }

    /// All dirents.
    pub fn dirents(&self) -> &[Dirent] {
        self.records(&self.dirents)
    }

    /// All extents, in tar order, which is also the order of the plain address space.
    pub fn extents(&self) -> &[Extent] {
        self.records(&self.extents)
    }

    /// All frames, in tar order, which is also blob order.
    pub fn frames(&self) -> &[Frame] {
        self.records(&self.frames)
    }

    /// Frames of the hot pack, in its order; empty without one.
    pub fn hot_frames(&self) -> &[HotFrame] {
        self.records(&self.hot_frames)
    }

    /// What the hot pack holds, in its order: decompressed, its frames are these pieces one after the other.
    pub fn hot_pieces(&self) -> &[HotPiece] {
        self.records(&self.hot_pieces)
    }

    /// Where the dedup section lies, if there is one.
    pub fn dedup(&self) -> Option<&DedupLocation> {
        self.records(&self.dedup).first()
    }

    /// Length of the hot pack in the blob, in bytes.
    pub fn hot_len(&self) -> u64 {
        self.hot_frames().iter().map(|frame| u64::from(frame.compressed_len.get())).sum()
    }

    /// Index digests of a merged tree's layers, lowest first.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = Digest> {
        self.records::<[u8; 32]>(&self.layers).iter().map(|bytes| Digest::from_bytes(*bytes))
    }

    /// The inode with this number.
    pub fn inode(&self, number: u32) -> Option<&Inode> {
        self.inodes().get(number as usize)
    }

    /// The name of a dirent; empty if there is no such dirent.
    pub fn name(&self, dirent_number: usize) -> &[u8] {
        let names: &[u8] = self.bytes.as_ref().get(self.names.clone()).unwrap_or_default();
        let dirents = self.dirents();
        let Some(dirent) = dirents.get(dirent_number) else { return &[] };
        let end = dirents.get(dirent_number + 1).map_or(names.len(), |next| next.name_offset.get() as usize);
        names.get(dirent.name_offset.get() as usize..end).unwrap_or_default()
    }

    /// Names and inode numbers of a directory, sorted by name; whiteouts have inode number [`WHITEOUT`].
    pub fn children(&self, directory: &Inode) -> impl ExactSizeIterator<Item = (&[u8], u32)> + DoubleEndedIterator {
        let range = directory.dirent_range();
        let dirents = self.dirents().get(range.clone()).unwrap_or_default();
        range.zip(dirents).map(|(number, dirent)| (self.name(number), dirent.inode.get()))
    }

    /// The inode number under a name; [`WHITEOUT`] for a whiteout, `None` if the directory has no such name.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Option<u32> {
        let Range { start: mut low, end: mut high } = directory.dirent_range();
        while low < high {
            let middle = low + (high - low) / 2;
            match self.name(middle).cmp(name) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return self.dirents().get(middle).map(|dirent| dirent.inode.get()),
            }
        }
        None
    }

    fn string(&self, offset: u32, len: u64) -> &[u8] {
        let strings = self.bytes.as_ref().get(self.strings.clone()).unwrap_or_default();
        let start = offset as usize;
        usize::try_from(len)
            .ok()
            .and_then(|len| start.checked_add(len))
            .and_then(|end| strings.get(start..end))
            .unwrap_or_default()
    }

    /// The target of a symbolic link; empty for everything else.
    pub fn symlink_target(&self, inode: &Inode) -> &[u8] {
        if inode.is_symlink() { self.string(inode.payload.get(), inode.size.get()) } else { &[] }
    }

    /// Names and values of an inode's extended attributes, sorted by name.
    pub fn xattrs(&self, inode: &Inode) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> {
        let set = self.records::<XattrSet>(&self.xattr_sets).get(inode.xattrs.get() as usize);
        let range = set.map_or(0..0, |set| {
            let start = set.first.get() as usize;
            start..start.saturating_add(set.count.get() as usize)
        });
        self.records::<Xattr>(&self.xattrs).get(range).unwrap_or_default().iter().map(|xattr| {
            (
                self.string(xattr.name_offset.get(), xattr.name_len.get().into()),
                self.string(xattr.value_offset.get(), xattr.value_len.get().into()),
            )
        })
    }

    /// The extents that have bytes in `plain`, as numbers; what lies between them is zeros.
    pub fn extents_in_plain(&self, plain: &Range<u64>) -> Range<usize> {
        let extents = self.extents();
        let start = extents.partition_point(|extent| extent.plain_range().end <= plain.start);
        start..extents.partition_point(|extent| extent.plain_offset.get() < plain.end).max(start)
    }

    /// The extents that have bytes in `tar`, as numbers.
    pub fn extents_in_tar(&self, tar: &Range<u64>) -> Range<usize> {
        let extents = self.extents();
        let start = extents.partition_point(|extent| extent.tar_range().end <= tar.start);
        start..extents.partition_point(|extent| extent.tar_offset.get() < tar.end).max(start)
    }

    /// The frames that have bytes in `tar`, as numbers.
    pub fn frames_in_tar(&self, tar: &Range<u64>) -> Range<usize> {
        let frames = self.frames();
        let start = frames.partition_point(|frame| frame.tar_range().end <= tar.start);
        start..frames.partition_point(|frame| frame.tar_offset.get() < tar.end).max(start)
    }

    /// Proves every rule of SPEC.md 6, checksums of the sections included; linear in the length.
    ///
    /// # Errors
    ///
    /// The first rule broken, with the number of the record.
    pub fn check(&self) -> Result<(), FormatError> {
        let (_, entries) = table::parse(self.bytes.as_ref())?;
        table::check_sections(self.bytes.as_ref(), entries)?;
        self.check_rules()
    }

    /// Proves that the plain address space is within its limit (SPEC.md 9); constant time.
    ///
    /// # Errors
    ///
    /// [`FormatError::Space`] when it is not.
    pub fn check_space(&self) -> Result<(), FormatError> {
        let frames_len = self.frames().last().map_or(0, |frame| frame.blob_range().end);
        let per_frames = frames_len.saturating_mul(SPACE_PER_FRAME_BYTE);
        let space_max = SPACE_LEN_FREE.saturating_add(per_frames).min(SPACE_LEN_MAX);
        let space_len = self.space_len;
        if space_len > space_max { Err(FormatError::Space { space_len, space_max, frames_len }) } else { Ok(()) }
    }

    /// The same as [`Self::check`] of an index whose sections were compared with their checksums
    /// ([`crate::table::WireIndex::to_open`]).
    ///
    /// # Errors
    ///
    /// Those of [`Self::check`].
    pub fn check_rules(&self) -> Result<(), FormatError> {
        self.check_strings()?;
        self.check_directories()?;
        self.check_inodes()?;
        self.check_data()?;
        self.check_hot_pack()
    }

    /// Sets are runs of xattrs that follow each other, so that an attribute counts once in what follows.
    fn check_strings(&self) -> Result<(), FormatError> {
        let strings_len = self.strings.len() as u64;
        let xattrs: &[Xattr] = self.records(&self.xattrs);
        let mut texts_len = 0u64;
        for (number, xattr) in (0..).zip(xattrs) {
            let ensure = |holds, rule| ensure(holds, "xattr", number, rule);
            let (name_len, value_len) = (xattr.name_len.get(), xattr.value_len.get());
            let ends = [(xattr.name_offset, name_len), (xattr.value_offset, value_len)]
                .map(|(offset, len)| u64::from(offset.get()) + u64::from(len));
            ensure(ends.iter().all(|end| *end <= strings_len), "lies outside the strings")?;
            let name = self.string(xattr.name_offset.get(), name_len.into());
            ensure((1..=NAME_LEN_MAX).contains(&name.len()) && !name.contains(&0), "its name is not allowed")?;
            ensure(value_len <= XATTR_VALUE_LEN_MAX, "its value is longer than 64 KiB")?;
            texts_len += u64::from(name_len) + u64::from(value_len);
        }
        let mut xattr_end = 0;
        for (number, set) in (0..).zip(self.records::<XattrSet>(&self.xattr_sets)) {
            let ensure = |holds, rule| ensure(holds, "xattr set", number, rule);
            let run = xattr_end..set.first.get() as usize + set.count.get() as usize;
            ensure(set.first.get() as usize == xattr_end, "does not start where the one before it ends")?;
            let in_set = xattrs.get(run.clone());
            ensure(in_set.is_some(), "lies outside the xattrs")?;
            let names = in_set.unwrap_or_default().iter();
            let names = names.map(|xattr| self.string(xattr.name_offset.get(), xattr.name_len.get().into()));
            ensure(names.is_sorted_by(|name, next| name < next), "its names do not ascend")?;
            xattr_end = run.end;
        }
        ensure(xattr_end == xattrs.len(), "xattr", xattr_end as u64, "belongs to no set")?;
        for (number, inode) in (0..).zip(self.inodes()).filter(|(_, inode)| inode.is_symlink()) {
            let target_len = inode.size.get();
            ensure(target_len <= TARGET_LEN_MAX, "inode", number, "its target is longer than 4095 bytes")?;
            texts_len += target_len;
        }
        ensure(texts_len <= TEXTS_LEN_MAX, "strings", 0, "targets and xattrs have more than 256 MiB together")
    }

    /// Breadth-first order makes the directories a tree: each range starts where the one before it ended,
    /// so a directory has one parent and no directory is its own ancestor.
    fn check_directories(&self) -> Result<(), FormatError> {
        let (inodes, dirents) = (self.inodes(), self.dirents());
        let dirent_rule = |number: usize, rule| FormatError::Rule { what: "dirent", number: number as u64, rule };
        let root = inodes.first().ok_or(FormatError::Rule { what: "inode", number: 0, rule: "there is no root" })?;
        ensure(
            root.is_directory() && root.payload == 0 && root.parent == 0,
            "inode",
            0,
            "the root is no directory that starts at dirent 0",
        )?;
        let mut end = directory_end(root, 0, dirents.len())?;
        // Directories whose entries are still to come, and where these end.
        let mut directories = VecDeque::from([(0, end)]);
        let mut links = vec![0u32; inodes.len()];
        count_links(&mut links, 0, 2);
        let mut previous_name: Option<&[u8]> = None;
        let mut name_end = 0;
        for (number, dirent) in dirents.iter().enumerate() {
            while directories.front().is_some_and(|(_, end)| *end <= number) {
                directories.pop_front();
                previous_name = None;
            }
            let ensure = |holds, rule| if holds { Ok(()) } else { Err(dirent_rule(number, rule)) };
            let directory = directories.front().map(|(directory, _)| *directory);
            let directory = directory.ok_or(dirent_rule(number, "belongs to no directory"))?;
            ensure(dirent.name_offset.get() as usize == name_end, "its name is not the next one")?;
            let name = self.name(number);
            name_end += name.len();
            check_name(name).map_err(|rule| dirent_rule(number, rule))?;
            ensure(previous_name < Some(name), "names do not ascend")?;
            previous_name = Some(name);
            if dirent.inode == WHITEOUT {
                continue;
            }
            let inode_number = dirent.inode.get();
            let inode = self.inode(inode_number).ok_or(dirent_rule(number, "there is no such inode"))?;
            let has_names = links.get(inode_number as usize).is_some_and(|links| *links > 0);
            ensure(inode_number != 0, "names the root")?;
            ensure(has_names || inode.parent == directory, "is the first of an inode with another parent")?;
            if !inode.is_directory() {
                count_links(&mut links, inode_number, 1);
                continue;
            }
            ensure(!has_names, "names a directory that has a name already")?;
            ensure(inode.payload.get() as usize == end, "names a directory whose dirents are not the next ones")?;
            count_links(&mut links, inode_number, 2);
            count_links(&mut links, directory, 1);
            end = directory_end(inode, inode_number.into(), dirents.len())?;
            directories.push_back((inode_number, end));
        }
        ensure(end == dirents.len(), "dirent", end as u64, "belongs to no directory")?;
        ensure(name_end == self.names.len(), "dirent", dirents.len() as u64, "names are left over")?;
        for (number, (inode, links)) in (0..).zip(inodes.iter().zip(links)) {
            ensure(links > 0, "inode", number, "it has no name")?;
            ensure(inode.nlink == links, "inode", number, "its link count is not the number of its names")?;
        }
        Ok(())
    }

    fn check_inodes(&self) -> Result<(), FormatError> {
        let (mut plain_end, mut previous_offset) = (0u64, 0u64);
        ensure(
            self.space_len.is_multiple_of(PLAIN_ALIGN),
            "header",
            0,
            "the plain address space does not end at a multiple of 4096",
        )?;
        let xattr_set_count = self.xattr_sets.len() / size_of::<XattrSet>();
        let (inode_count, layer_count) = (self.inodes().len(), self.layers().len().max(1));
        let is_layer = self.layers().len() == 0;
        for (number, inode) in (0..).zip(self.inodes()) {
            let ensure = |holds, rule| ensure(holds, "inode", number, rule);
            ensure(inode.mtime_nanoseconds < 1_000_000_000, "its time has more than a second of nanoseconds")?;
            ensure(inode.mode.get() & !(mode::TYPE | 0o7777) == 0, "its mode has unknown bits")?;
            ensure(inode.flags.get() & !flag::ALL == 0, "it has unknown flags")?;
            ensure((inode.parent.get() as usize) < inode_count, "its parent does not exist")?;
            ensure((inode.layer.get() as usize) < layer_count, "its layer does not exist")?;
            if is_layer && !inode.is_regular() {
                ensure(inode.plain_offset == previous_offset, "its offset is not that of the inode before it")?;
            }
            let xattrs = inode.xattrs.get();
            ensure(xattrs == NO_XATTRS || (xattrs as usize) < xattr_set_count, "its xattr set does not exist")?;
            match inode.file_type() {
                mode::REGULAR if is_layer => {
                    let range = inode.plain_range();
                    ensure(range.start % PLAIN_ALIGN == 0, "its content is not aligned")?;
                    ensure(range.start == plain_end, "its content does not follow that of the file before it")?;
                    plain_end = range.end.checked_next_multiple_of(PLAIN_ALIGN).unwrap_or(u64::MAX);
                    previous_offset = range.start;
                    ensure(range.end <= self.space_len, "its content lies outside the plain address space")?;
                }
                mode::SYMLINK => {
                    let target = self.symlink_target(inode);
                    ensure(!target.is_empty() && !target.contains(&0), "its target is empty or no path")?;
                }
                mode::REGULAR | mode::DIRECTORY | mode::CHARACTER | mode::BLOCK | mode::FIFO | mode::SOCKET => {}
                _ => ensure(false, "its file type is unknown")?,
            }
        }
        Ok(())
    }

    fn check_data(&self) -> Result<(), FormatError> {
        let (mut tar_end, mut plain_end) = (0, 0);
        for (number, extent) in (0..).zip(self.extents()) {
            let ensure = |holds, rule| ensure(holds, "extent", number, rule);
            let (tar, plain) = (extent.tar_range(), extent.plain_range());
            ensure(extent.len != 0, "it is empty")?;
            ensure(tar.start >= tar_end && tar.end <= self.tar_len, "it is out of order or outside the tar stream")?;
            ensure(plain.start >= plain_end && plain.end <= self.space_len, "it is out of order or outside the space")?;
            (tar_end, plain_end) = (tar.end, plain.end);
        }
        let (mut tar_end, mut blob_end) = (0, 0);
        for (number, frame) in (0..).zip(self.frames()) {
            let ensure = |holds, rule| ensure(holds, "frame", number, rule);
            ensure(
                frame.tar_offset == tar_end && frame.blob_offset == blob_end,
                "it does not follow the one before it",
            )?;
            ensure((1..=FRAME_PLAIN_LEN_MAX).contains(&frame.plain_len.get()), "its plain length is not allowed")?;
            let compressed_len = frame.compressed_len.get();
            ensure((1..=FRAME_COMPRESSED_LEN_MAX).contains(&compressed_len), "its compressed length is not allowed")?;
            (tar_end, blob_end) = (frame.tar_range().end, frame.blob_range().end);
        }
        ensure(tar_end == self.tar_len, "frame", self.frames().len() as u64, "the frames do not cover the tar stream")?;
        self.check_space()
    }

    fn check_hot_pack(&self) -> Result<(), FormatError> {
        let is_content = |inode: &&Inode| inode.is_regular() && inode.size != 0;
        let piece_count = self.hot_pieces().len();
        let files: Vec<_> = if piece_count == 0 {
            Vec::new()
        } else {
            self.inodes().iter().filter(is_content).map(Inode::plain_range).collect()
        };
        let mut plain_len = 0u64;
        for (number, piece) in (0..).zip(self.hot_pieces()) {
            let ensure = |holds, rule| ensure(holds, "hot piece", number, rule);
            let range = piece.plain_range();
            ensure(piece.len != 0 && range.start % PLAIN_ALIGN == 0, "it is empty or not aligned")?;
            let file = files.get(files.partition_point(|file| file.end <= range.start)).cloned().unwrap_or_default();
            ensure(file.start <= range.start && range.end <= file.end, "it lies outside its file")?;
            ensure(range.end == file.end || range.end % PLAIN_ALIGN == 0, "it ends within a page of its file")?;
            plain_len += u64::from(piece.len.get());
        }
        for (number, frame) in (0..).zip(self.hot_frames()) {
            let (plain, compressed) = (frame.plain_len.get(), frame.compressed_len.get());
            let is_allowed =
                (1..=FRAME_PLAIN_LEN_MAX).contains(&plain) && (1..=FRAME_COMPRESSED_LEN_MAX).contains(&compressed);
            ensure(is_allowed, "hot frame", number, "its length is not allowed")?;
            plain_len = plain_len.checked_sub(plain.into()).unwrap_or(u64::MAX);
        }
        let frame_count = self.hot_frames().len() as u64;
        ensure(plain_len == 0, "hot frame", frame_count, "frames and pieces of the hot pack differ in length")?;
        let dedup_count = self.dedup.len() / size_of::<DedupLocation>();
        ensure(dedup_count <= 1, "dedup section", dedup_count as u64, "there are several")?;
        let is_allowed = |dedup: &DedupLocation| dedup.plain_len.max(dedup.compressed_len) <= INDEX_LEN_MAX;
        let is_allowed = self.dedup().is_none_or(is_allowed);
        ensure(is_allowed, "dedup section", 0, "it is longer than 1 GiB")
    }
}

/// Checks the name of a directory entry.
///
/// # Errors
///
/// The rule that it breaks.
pub fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" | b"." | b".." => Err("its name is empty, . or .."),
        _ if name.len() > NAME_LEN_MAX => Err("its name is longer than 255 bytes"),
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => Err("its name has a slash or a zero byte"),
        _ => Ok(()),
    }
}

/// Counts names of an inode, which exists.
fn count_links(links: &mut [u32], number: u32, count: u32) {
    if let Some(links) = links.get_mut(number as usize) {
        *links += count;
    }
}

fn directory_end(directory: &Inode, number: u64, dirent_count: usize) -> Result<usize, FormatError> {
    let end = directory.dirent_range().end;
    ensure(end <= dirent_count, "inode", number, "its dirents do not exist")?;
    Ok(end)
}

fn ensure(holds: bool, what: &'static str, number: u64, rule: &'static str) -> Result<(), FormatError> {
    if holds { Ok(()) } else { Err(FormatError::Rule { what, number, rule }) }
}
