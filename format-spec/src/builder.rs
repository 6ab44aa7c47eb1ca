//! Makes the bytes of an index or merged tree.
//!
//! The caller adds inodes in the order they shall have and then every directory's entries, breadth
//! first; the builder shares strings and xattr sets, counts links and lays out the sections. Equal
//! calls give equal bytes.

use std::collections::HashMap;

use zerocopy::{IntoBytes, little_endian::U32};

use crate::{
    digest::Digest,
    index::Index,
    index::check_name,
    records::{
        DedupLocation, Dirent, Extent, Frame, HotFrame, HotPiece, IndexLocation, Inode, NO_XATTRS, WHITEOUT, Xattr,
        XattrSet, mode, section,
    },
    table::{self, FormatError, NewSection},
};

/// Level of the index's own compression: level 19 makes it a tenth smaller and takes as long as a tenth of the
/// whole conversion.
const INDEX_COMPRESSION_LEVEL: i32 = 9;

/// Names and values of extended attributes, sorted by name.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Collects inodes and directories.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    inodes: Vec<Inode>,
    dirents: Vec<Dirent>,
    names: Vec<u8>,
    strings: Vec<u8>,
    string_offsets: HashMap<Vec<u8>, u32>,
    xattr_sets: Vec<XattrSet>,
    xattr_set_numbers: HashMap<Xattrs, u32>,
    xattrs: Vec<Xattr>,
}

/// An index would break a limit of the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("index: {0}")]
pub struct BuildError(pub &'static str);

/// A finished index as it goes into a blob.
#[derive(Debug, Clone)]
pub struct CompressedIndex {
    /// Content of the index's skippable frame.
    pub bytes: Vec<u8>,
    /// Length after decompression, in bytes.
    pub plain_len: u64,
    /// SHA-256 of `bytes`.
    pub digest: Digest,
}

/// Where the content of a layer lies; the default says that there is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct LayerData<'a> {
    /// Length of the tar stream, in bytes.
    pub tar_len: u64,
    /// Length of the plain address space, in bytes.
    pub space_len: u64,
    /// Extents, in tar order.
    pub extents: &'a [Extent],
    /// Frames, in blob order.
    pub frames: &'a [Frame],
    /// What stands behind the index.
    pub tail: BlobTail<'a>,
}

/// What stands behind the index of a layer; the default says that there is nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlobTail<'a> {
    /// Frames of the hot pack, in its order.
    pub hot_frames: &'a [HotFrame],
    /// Pieces of the hot pack, in its order.
    pub hot_pieces: &'a [HotPiece],
    /// The dedup section: one, or none.
    pub dedup: &'a [DedupLocation],
}

impl<'a> BlobTail<'a> {
    fn sections(&self) -> [NewSection<'a>; 3] {
        [
            new_section(section::HOT_FRAMES, 0, self.hot_frames),
            new_section(section::HOT_PIECES, 0b11, self.hot_pieces),
            new_section(section::DEDUP, 0, self.dedup),
        ]
    }
}

impl CompressedIndex {
    /// Compresses bytes in open form, whose sections are not looked at.
    ///
    /// # Errors
    ///
    /// When header or section table are damaged, or zstd fails.
    pub fn of(mut bytes: Vec<u8>) -> Result<Self, FormatError> {
        table::to_wire(&mut bytes)?;
        let compressed = zstd::bulk::compress(&bytes, INDEX_COMPRESSION_LEVEL)
            .map_err(|error| FormatError::Compression(error.to_string()))?;
        Ok(Self { digest: Digest::of(&compressed), plain_len: bytes.len() as u64, bytes: compressed })
    }

    /// The index of a layer in open form with what is known last: its hot pack and its dedup section.
    ///
    /// # Errors
    ///
    /// When the bytes are no index, or the pieces break a rule of the format.
    pub fn with_tail(open: &[u8], tail: &BlobTail<'_>) -> Result<Self, FormatError> {
        let (header, entries) = table::parse(open)?;
        let is_kept = |entry: &&table::SectionEntry| entry.kind < section::HOT_FRAMES;
        let mut sections: Vec<NewSection<'_>> = entries
            .iter()
            .filter(is_kept)
            .map(|entry| NewSection {
                kind: entry.kind.get(),
                record_len: entry.record_len.get() as usize,
                delta_words: entry.delta_words.get(),
                bytes: table::section_range(entry).and_then(|range| open.get(range)).unwrap_or_default(),
            })
            .collect();
        sections.extend(tail.sections());
        let bytes = table::encode(header.tar_len.get(), header.space_len.get(), &sections);
        Index::open(&bytes)?.check()?;
        Self::of(bytes)
    }

    /// The location of this index when it is written at `offset` of a blob.
    pub fn location(&self, offset: u64) -> IndexLocation {
        IndexLocation {
            offset,
            compressed_len: self.bytes.len() as u64,
            plain_len: self.plain_len,
            digest: self.digest,
        }
    }
}

impl IndexBuilder {
    /// Adds an inode and returns its number; the first one is the root.
    ///
    /// `payload` and `size` of directories, `nlink` and `parent` are filled in by [`Self::add_directory`];
    /// `plain_offset` is filled in here for everything but regular files.
    ///
    /// # Errors
    ///
    /// When there are too many.
    pub fn add_inode(&mut self, inode: Inode) -> Result<u32, BuildError> {
        let number = u32::try_from(self.inodes.len()).ok().filter(|number| *number < WHITEOUT);
        let number = number.ok_or(BuildError("more than 4,294,967,294 inodes"))?;
        let nlink = if inode.is_directory() { 2 } else { 0 };
        let previous_offset = self.inodes.last().map_or(0.into(), |previous| previous.plain_offset);
        let plain_offset = if inode.is_regular() { inode.plain_offset } else { previous_offset };
        self.inodes.push(Inode { nlink: nlink.into(), parent: 0.into(), plain_offset, ..inode });
        Ok(number)
    }

    /// The inode under construction with this number, to look at.
    pub fn inode(&self, number: u32) -> Option<&Inode> {
        self.inodes.get(number as usize)
    }

    /// Adds the entries of a directory: name and inode number, or [`WHITEOUT`].
    ///
    /// Call it once for every directory, root first, then for the directories among the entries just
    /// added, in their order, and so on. `children` must be sorted by name.
    ///
    /// # Errors
    ///
    /// When a name is not allowed, names do not ascend, or there are too many entries.
    pub fn add_directory<N: AsRef<[u8]>>(
        &mut self,
        directory: u32,
        children: impl IntoIterator<Item = (N, u32)>,
    ) -> Result<(), BuildError> {
        let first = self.dirents.len();
        let mut previous_offset = None;
        let mut subdirectory_count = 0;
        for (name, child) in children {
            let name = name.as_ref();
            check_name(name).map_err(BuildError)?;
            let name_offset = u32::try_from(self.names.len()).map_err(|_| BuildError("names exceed 4 GiB"))?;
            let previous = previous_offset.and_then(|previous: u32| self.names.get(previous as usize..));
            if previous.is_some_and(|previous| previous >= name) {
                return Err(BuildError("names of a directory do not ascend"));
            }
            previous_offset = Some(name_offset);
            self.names.extend_from_slice(name);
            self.dirents.push(Dirent { name_offset: name_offset.into(), inode: child.into() });
            if child == WHITEOUT {
                continue;
            }
            let inode = self.inodes.get_mut(child as usize).ok_or(BuildError("a dirent names no inode"))?;
            if inode.is_directory() {
                subdirectory_count += 1;
                inode.parent = directory.into();
            } else {
                if inode.nlink == 0 {
                    inode.parent = directory.into();
                }
                inode.nlink += 1;
            }
        }
        let count = self.dirents.len() - first;
        let inode = self.inodes.get_mut(directory as usize).ok_or(BuildError("no such directory"))?;
        inode.payload = U32::new(u32::try_from(first).map_err(|_| BuildError("more than 4 G dirents"))?);
        inode.size = (count as u64).into();
        inode.nlink = U32::new(2 + subdirectory_count);
        Ok(())
    }

    /// Stores a symlink target once; returns its offset, for [`Inode::payload`].
    ///
    /// # Errors
    ///
    /// When the strings get too long.
    pub fn add_string(&mut self, text: &[u8]) -> Result<u32, BuildError> {
        if let Some(offset) = self.string_offsets.get(text) {
            return Ok(*offset);
        }
        let offset = u32::try_from(self.strings.len()).map_err(|_| BuildError("strings exceed 4 GiB"))?;
        self.strings.extend_from_slice(text);
        self.string_offsets.insert(text.to_vec(), offset);
        Ok(offset)
    }

    /// Stores a set of extended attributes once; returns its number, for [`Inode::xattrs`].
    ///
    /// `xattrs` must be sorted by name; the empty set is [`NO_XATTRS`].
    ///
    /// # Errors
    ///
    /// When there are too many.
    pub fn add_xattrs(&mut self, xattrs: Xattrs) -> Result<u32, BuildError> {
        if xattrs.is_empty() {
            return Ok(NO_XATTRS);
        }
        if let Some(number) = self.xattr_set_numbers.get(&xattrs) {
            return Ok(*number);
        }
        let too_many = |_| BuildError("more than 4 G xattrs");
        let number = u32::try_from(self.xattr_sets.len()).map_err(too_many)?;
        self.xattr_sets.push(XattrSet {
            first: u32::try_from(self.xattrs.len()).map_err(too_many)?.into(),
            count: u32::try_from(xattrs.len()).map_err(too_many)?.into(),
        });
        for (name, value) in &xattrs {
            let xattr = Xattr {
                name_offset: self.add_string(name)?.into(),
                name_len: u32::try_from(name.len()).map_err(too_many)?.into(),
                value_offset: self.add_string(value)?.into(),
                value_len: u32::try_from(value.len()).map_err(too_many)?.into(),
            };
            self.xattrs.push(xattr);
        }
        self.xattr_set_numbers.insert(xattrs, number);
        Ok(number)
    }

    /// The index of a layer, compressed as it goes into the blob.
    ///
    /// # Errors
    ///
    /// When what was added breaks a rule of the format.
    pub fn finish_layer(self, data: &LayerData<'_>) -> Result<CompressedIndex, FormatError> {
        CompressedIndex::of(self.layer_bytes(data)?)
    }

    /// The index of a layer in open form; [`CompressedIndex::with_tail`] completes it.
    ///
    /// # Errors
    ///
    /// When what was added breaks a rule of the format.
    pub fn layer_bytes(self, data: &LayerData<'_>) -> Result<Vec<u8>, FormatError> {
        self.finish(data, &[])
    }

    /// A merged tree over `layers` (lowest first), in open form.
    ///
    /// # Errors
    ///
    /// When what was added breaks a rule of the format.
    pub fn finish_tree(self, layers: &[Digest]) -> Result<Vec<u8>, FormatError> {
        self.finish(&LayerData::default(), layers)
    }

    fn finish(self, data: &LayerData<'_>, layers: &[Digest]) -> Result<Vec<u8>, FormatError> {
        let layers: Vec<[u8; 32]> = layers.iter().map(|digest| *digest.as_bytes()).collect();
        let [hot_frames, hot_pieces, dedup] = data.tail.sections();
        let bytes = table::encode(
            data.tar_len,
            data.space_len,
            &[
                new_section(section::INODES, 0b1100_0000_0000, &self.inodes),
                new_section(section::DIRENTS, 0b11, &self.dirents),
                new_section(section::NAMES, 0, &self.names),
                new_section(section::STRINGS, 0, &self.strings),
                new_section(section::XATTR_SETS, 0b1, &self.xattr_sets),
                new_section(section::XATTRS, 0, &self.xattrs),
                new_section(section::EXTENTS, 0b1111, data.extents),
                new_section(section::FRAMES, 0b1111, data.frames),
                new_section(section::LAYERS, 0, &layers),
                hot_frames,
                hot_pieces,
                dedup,
            ],
        );
        Index::open(&bytes)?.check()?;
        Ok(bytes)
    }
}

fn new_section<T: IntoBytes + zerocopy::Immutable>(kind: u32, delta_words: u32, records: &[T]) -> NewSection<'_> {
    NewSection { kind, record_len: size_of::<T>(), delta_words, bytes: records.as_bytes() }
}

/// An inode with everything zero but the mode: a start for struct update syntax.
pub fn blank_inode(mode: u32) -> Inode {
    Inode {
        mode: mode.into(),
        uid: 0.into(),
        gid: 0.into(),
        nlink: 0.into(),
        mtime_seconds: 0.into(),
        mtime_nanoseconds: 0.into(),
        payload: 0.into(),
        size: 0.into(),
        plain_offset: 0.into(),
        xattrs: NO_XATTRS.into(),
        flags: 0.into(),
        layer: 0.into(),
        parent: 0.into(),
    }
}

/// A directory that the tar stream does not name: `root:root`, 0755, time 0, flag IMPLICIT.
pub fn implicit_directory() -> Inode {
    Inode { flags: crate::records::flag::IMPLICIT.into(), ..blank_inode(mode::DIRECTORY | 0o755) }
}
