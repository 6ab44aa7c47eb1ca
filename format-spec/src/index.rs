//! The index: everything `stat`, `readlink`, `listxattr` and `readdir` show of a layer, and where its
//! data lies (SPEC.md 5, 6).
//!
//! [`Index`] is a view over bytes in open form, made for memory maps: opening takes constant time,
//! lookups allocate nothing, and no content makes it panic. A *merged tree* (what an image of several
//! layers shows) is stored in the same form, with a layer number in every inode and without frames.
//!
//! `builder.rs` makes these bytes.

mod check;

use std::{cmp::Ordering, ops::Range};

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

pub use self::check::check_name;
use crate::{
    digest::Digest,
    records::*,
    table::{self, FormatError, Unread},
};

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
}
