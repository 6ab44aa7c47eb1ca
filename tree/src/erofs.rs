//! A merged tree as an EROFS image of metadata.
//!
//! [`write_image`] turns a merged tree into an image without file content: regular files point into *devices*,
//! one for each layer, which hold the layers' plain address spaces (SPEC.md 6.3). Whoever hands image and devices,
//! all of them files, to the kernel has it serve everything but content that is in no page cache.
//!
//! An image is: superblock and device slots; inodes in the order of the tree, each with its attributes and, if it
//! fits into the same block, the last part of its directory or its symlink target; shared attributes; full
//! directory blocks. An inode's number is its offset. Content follows from the layers alone, so equal
//! trees give equal bytes: overlayfs may rely on inode numbers and UUID across mounts.
//!
//! Not here: content, compression, and who mounts the image.

mod check;
mod directory;
mod holes;
mod inode;
pub mod layout;
mod xattr;

use std::io;

use format_spec::{
    Digest, Extent, Index, Inode,
    index::check_name,
    limits::LAYER_COUNT_MAX,
    records::{WHITEOUT, mode},
};
use zerocopy::IntoBytes;

pub use self::check::is_image_of;
use self::{
    directory::{Blocks, Entry},
    holes::{Chunks, chunks_of},
    inode::{StoredInode, Time, content_blocks, fits_compact, majority_time, time_of},
    layout::{
        BLOCK, BLOCK_BITS, BLOCK_LEN, ChunkIndex, DeviceSlot, INODE_SLOT_LEN, InodeCompact, InodeExtended, MAGIC,
        NULL_BLOCK, SUPER_OFFSET, SuperBlock, feature, format,
    },
    xattr::XattrWriter,
};

/// Changes whenever equal trees give other bytes, so that no two images share a UUID.
const WRITER_VERSION: &[u8] = b"lazuli erofs 2";
/// Longest target of a symbolic link (Linux `PATH_MAX` without the closing zero).
const SYMLINK_LEN_MAX: usize = 4095;
/// What is written at once, in bytes.
const WRITE_LEN: usize = 256 << 10;

/// The tree cannot be an EROFS image; portable mode can still show it.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The image cannot be written.
    #[error("erofs image: {0}")]
    Io(#[from] io::Error),
    /// The tree has no root directory.
    #[error("erofs image: the tree has no root directory")]
    NoRoot,
    /// The tree is that of a layer, or damaged.
    #[error("erofs image: tree has {0} layers, expected 1 to {LAYER_COUNT_MAX}")]
    LayerCount(usize),
    /// An inode cannot be stored.
    #[error("erofs image: inode {number}: {rule}")]
    Inode {
        /// Its number in the tree.
        number: u32,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// The image would be longer than its block numbers reach.
    #[error("erofs image: would have {0} blocks, expected fewer than 4294967295")]
    TooLong(u64),
}

/// What [`write_image`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Length of the image, in bytes; a multiple of 4096.
    pub image_len: u64,
    /// Number of inodes.
    pub inode_count: u32,
    /// How many of them have no time of their own: they have the most frequent one.
    pub compact_inode_count: u32,
    /// Attributes that were left out because Linux shows them on no file system (macOS's, for example).
    pub dropped_xattr_count: u64,
    /// Blocks of 4096 bytes that the files of each layer reach into, lowest layer first; 0 where the tree
    /// shows no content of a layer.
    pub device_block_counts: Vec<u32>,
}

/// Writes the image of a merged tree: every byte once, in order.
///
/// `tree` must have passed [`Index::check`]; another one gives some image or an error, never a panic. Device
/// number n of the image (from 1) is layer n - 1, that is, the nth `device` of a mount. Needs four bytes of
/// memory for each inode and the shared attributes.
///
/// # Errors
///
/// [`WriteError::Io`] from `output`; the others before anything is written.
///
/// Source: Linux Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h.
pub fn write_image<B: AsRef<[u8]>>(tree: &Index<B>, output: impl io::Write) -> Result<ImageSummary, WriteError> {
    write_sparse_image(tree, &[], output)
}

/// Like [`write_image`]: where `extents` (those of each layer, lowest first) say that a large file has no content, the
/// image has a hole, which the kernel reads without its device and whose place it tells to who asks (`lseek(2)`).
///
/// # Errors
///
/// Those of [`write_image`].
pub fn write_sparse_image<B: AsRef<[u8]>>(
    tree: &Index<B>,
    extents: &[&[Extent]],
    output: impl io::Write,
) -> Result<ImageSummary, WriteError> {
    let mut writer = ImageWriter::new(tree, extents)?;
    let plan = writer.plan()?;
    writer.write(&plan, output)
}

/// Where everything lies.
#[derive(Debug)]
struct Plan {
    /// Inode numbers of the image by those of the tree.
    nids: Vec<u32>,
    /// Inodes of the tree with content in blocks, and how many.
    with_blocks: Vec<(u32, u32)>,
    inodes_end: u64,
    xattrs_block: u32,
    content_block: u32,
    image_block_count: u32,
}

/// What [`ImageWriter::encode`] finds besides the bytes of an inode.
#[derive(Debug, Clone, Copy)]
struct Encoded {
    is_compact: bool,
    /// Blocks of content that do not follow the inode.
    block_count: u32,
}

struct ImageWriter<'a, B> {
    tree: &'a Index<B>,
    /// Of each layer; none of those of which nothing is known.
    extents: &'a [&'a [Extent]],
    layers: Vec<Digest>,
    xattrs: XattrWriter<'a, B>,
    /// The time of compact inodes.
    epoch: Time,
    device_block_counts: Vec<u32>,
}

impl<'a, B: AsRef<[u8]>> ImageWriter<'a, B> {
    fn new(tree: &'a Index<B>, extents: &'a [&'a [Extent]]) -> Result<Self, WriteError> {
        let layers: Vec<Digest> = tree.layers().collect();
        if layers.is_empty() || layers.len() > LAYER_COUNT_MAX {
            return Err(WriteError::LayerCount(layers.len()));
        }
        if !tree.inode(0).is_some_and(Inode::is_directory) {
            return Err(WriteError::NoRoot);
        }
        let device_block_counts = vec![0; layers.len()];
        let (xattrs, epoch) = (XattrWriter::new(tree), majority_time(tree));
        Ok(Self { tree, extents, layers, xattrs, epoch, device_block_counts })
    }

    /// Finds the place of every inode, by encoding each of them once.
    fn plan(&mut self) -> Result<Plan, WriteError> {
        let inodes = self.tree.inodes();
        let mut nids = Vec::with_capacity(inodes.len());
        let mut with_blocks = Vec::new();
        let mut content_block_count = 0;
        let mut object = Vec::new();
        let mut end = self.inodes_start();
        for (number, inode) in (0..).zip(inodes) {
            let encoded = self.encode(number, inode, &[], 0, &mut object)?;
            let start = place(end, object.len());
            nids.push(u32::try_from(start / INODE_SLOT_LEN).map_err(|_| WriteError::TooLong(start / BLOCK_LEN))?);
            end = start + object.len() as u64;
            if encoded.block_count > 0 {
                with_blocks.push((number, encoded.block_count));
                content_block_count += u64::from(encoded.block_count);
            }
            self.note_device_use(number, inode)?;
        }
        // Not rounded up: fsck.erofs looks for attributes after the last inode, even if it has none.
        let xattrs_block = end / BLOCK_LEN + 1;
        let content_block = xattrs_block + (self.xattrs.shared().len() as u64).div_ceil(BLOCK_LEN);
        let image_block_count = content_block + content_block_count;
        let to_block = |block: u64| {
            u32::try_from(block).ok().filter(|block| *block < NULL_BLOCK).ok_or(WriteError::TooLong(image_block_count))
        };
        Ok(Plan {
            nids,
            with_blocks,
            inodes_end: end,
            xattrs_block: to_block(xattrs_block)?,
            content_block: to_block(content_block)?,
            image_block_count: to_block(image_block_count)?,
        })
    }

    fn write(mut self, plan: &Plan, output: impl io::Write) -> Result<ImageSummary, WriteError> {
        let dropped_xattr_count = self.xattrs.dropped_count();
        let mut output = Output { inner: io::BufWriter::with_capacity(WRITE_LEN, output), len: 0 };
        output.write(&self.head(plan))?;
        let mut object = Vec::new();
        let mut next_block = plan.content_block;
        let mut compact_inode_count = 0;
        for (number, inode) in (0..).zip(self.tree.inodes()) {
            let encoded = self.encode(number, inode, &plan.nids, next_block, &mut object)?;
            next_block += encoded.block_count;
            compact_inode_count += u32::from(encoded.is_compact);
            output.fill_to(u64::from(plan.nids[number as usize]) * INODE_SLOT_LEN)?;
            output.write(&object)?;
        }
        assert_eq!(output.len, plan.inodes_end, "both passes give the same inodes");
        output.fill_to(u64::from(plan.xattrs_block) * BLOCK_LEN)?;
        output.write(self.xattrs.shared())?;
        output.fill_to(u64::from(plan.content_block) * BLOCK_LEN)?;
        for (number, block_count) in &plan.with_blocks {
            self.write_blocks(*number, *block_count, plan, &mut output)?;
        }
        assert_eq!(output.len, u64::from(plan.image_block_count) * BLOCK_LEN, "both passes give the same blocks");
        io::Write::flush(&mut output.inner)?;
        Ok(ImageSummary {
            image_len: output.len,
            inode_count: self.inode_count(),
            compact_inode_count,
            dropped_xattr_count,
            device_block_counts: self.device_block_counts,
        })
    }

    fn inode_count(&self) -> u32 {
        u32::try_from(self.tree.inodes().len()).expect("inode numbers have 32 bits")
    }

    /// Offset of the first inode: the first block after the device slots, since the checksum covers block 0.
    fn inodes_start(&self) -> u64 {
        let slots_len = self.layers.len() * size_of::<DeviceSlot>();
        ((SUPER_OFFSET + size_of::<SuperBlock>() + slots_len) as u64).next_multiple_of(BLOCK_LEN)
    }

    /// Superblock and device slots.
    fn head(&self, plan: &Plan) -> Vec<u8> {
        let mut head = vec![0; SUPER_OFFSET];
        let super_block = SuperBlock {
            magic: MAGIC.into(),
            checksum: 0.into(),
            features_compatible: (feature::CHECKSUM | feature::MTIME).into(),
            block_bits: BLOCK_BITS,
            extension_count: 0,
            root_nid: u16::try_from(plan.nids[0]).expect("500 device slots end long before 2 MiB").into(),
            inode_count: u64::from(self.inode_count()).into(),
            epoch_seconds: self.epoch.0.into(),
            epoch_nanoseconds: self.epoch.1.into(),
            block_count: plan.image_block_count.into(),
            inodes_block: 0.into(),
            xattrs_block: plan.xattrs_block.into(),
            uuid: uuid_of(&self.layers),
            volume_name: *b"lazuli\0\0\0\0\0\0\0\0\0\0",
            features_incompatible: (feature::CHUNKED_FILE | feature::DEVICE_TABLE).into(),
            compression: 0.into(),
            device_count: u16::try_from(self.layers.len()).expect("bounded by LAYER_COUNT_MAX").into(),
            device_slot: DEVICE_SLOT.into(),
            directory_block_bits: 0,
            xattr_prefix_count: 0,
            xattr_prefix_start: 0.into(),
            packed_nid: 0.into(),
            reserved: [0; 24],
        };
        head.extend_from_slice(super_block.as_bytes());
        for (layer, block_count) in self.layers.iter().zip(&self.device_block_counts) {
            let mut tag = [0; 64];
            tag.copy_from_slice(layer.hex().as_bytes());
            let block_count = (*block_count).into();
            head.extend_from_slice(
                DeviceSlot { tag, block_count, mapped_block: 0.into(), reserved: [0; 56] }.as_bytes(),
            );
        }
        head.resize(head.len().next_multiple_of(BLOCK), 0);
        let checksum = crc32c(&head[SUPER_OFFSET..BLOCK]);
        head[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        head
    }

    /// Replaces `object` by an inode and what follows it.
    ///
    /// Its length does not depend on `nids` and `first_block`, which the first pass does not know.
    fn encode(
        &mut self,
        number: u32,
        inode: &'a Inode,
        nids: &[u32],
        first_block: u32,
        object: &mut Vec<u8>,
    ) -> Result<Encoded, WriteError> {
        let refuse = |rule| WriteError::Inode { number, rule };
        let mut chunks = Vec::new();
        let mut tail = Vec::new();
        let mut block_count = 0;
        let (mut format, mut payload, mut size) = (format::FLAT_PLAIN, 0, 0);
        match inode.file_type() {
            mode::REGULAR if inode.size.get() > 0 => {
                let bits = self.encode_chunks(inode, &mut chunks).map_err(refuse)?;
                (format, payload) = (format::CHUNK_BASED, format::CHUNK_INDEXES | u32::from(bits));
                size = inode.size.get();
            }
            mode::REGULAR | mode::FIFO | mode::SOCKET => {}
            mode::CHARACTER | mode::BLOCK => payload = inode.payload.get(),
            mode::DIRECTORY => {
                let mut blocks = self.directory_blocks(number, inode, nids)?;
                let mut block = Vec::new();
                loop {
                    blocks.next_block(&mut block);
                    if block.is_empty() {
                        break;
                    }
                    size += block.len() as u64;
                    std::mem::swap(&mut block, &mut tail);
                }
                block_count = u32::try_from(size.div_ceil(BLOCK_LEN)).map_err(|_| refuse("it has too many entries"))?;
            }
            mode::SYMLINK => {
                tail.extend_from_slice(self.tree.symlink_target(inode));
                if tail.is_empty() || tail.len() > SYMLINK_LEN_MAX || tail.contains(&0) {
                    return Err(refuse("its target is no path of 1 to 4095 bytes"));
                }
                (size, block_count) = (tail.len() as u64, 1);
            }
            _ => return Err(refuse("its file type is unknown")),
        }
        let mut xattrs = Vec::new();
        self.xattrs.encode(inode, &mut xattrs).map_err(refuse)?;
        let is_compact = time_of(inode) == self.epoch && fits_compact(inode, size);
        let inode_len = if is_compact { size_of::<InodeCompact>() } else { size_of::<InodeExtended>() };
        let is_inline = !tail.is_empty() && tail.len() < BLOCK && inode_len + xattrs.len() + tail.len() <= BLOCK;
        if is_inline {
            format = format::FLAT_INLINE;
            block_count -= 1;
        } else {
            tail.clear();
        }
        if block_count > 0 {
            payload = first_block;
        }
        let stored = StoredInode { number, format, xattr_count: xattr::count_of(&xattrs), payload, size };
        object.clear();
        if is_compact {
            object.extend_from_slice(stored.to_compact(inode).as_bytes());
        } else {
            object.extend_from_slice(stored.to_extended(inode).as_bytes());
        }
        object.extend_from_slice(&xattrs);
        if !chunks.is_empty() {
            object.resize(object.len().next_multiple_of(size_of::<ChunkIndex>()), 0);
        }
        object.extend_from_slice(&chunks);
        object.extend_from_slice(&tail);
        Ok(Encoded { is_compact, block_count })
    }

    /// Appends the chunk indexes of a file; returns `log2` of the blocks in a chunk.
    fn encode_chunks(&self, inode: &Inode, chunks: &mut Vec<u8>) -> Result<u8, &'static str> {
        let layer = inode.layer.get() as usize;
        if layer >= self.layers.len() {
            return Err("its layer does not exist");
        }
        let blocks = content_blocks(inode)?;
        let device = u16::try_from(layer + 1).expect("bounded by LAYER_COUNT_MAX");
        let Chunks { bits, has_content } = chunks_of(&blocks, self.extents.get(layer).copied());
        for (block, has_content) in blocks.step_by(1 << bits).zip(has_content) {
            let block = u32::try_from(block).expect("checked by content_blocks");
            let (device, block) = if has_content { (device, block) } else { (0, NULL_BLOCK) };
            chunks.extend_from_slice(
                ChunkIndex { reserved: 0.into(), device: device.into(), block: block.into() }.as_bytes(),
            );
        }
        Ok(bits)
    }

    /// The blocks of a directory. Inodes that `nids` does not have get number 0.
    fn directory_blocks(
        &self,
        number: u32,
        directory: &'a Inode,
        nids: &[u32],
    ) -> Result<Blocks<impl Iterator<Item = Entry<'a>>>, WriteError> {
        let tree = self.tree;
        if nids.is_empty() {
            check_entries(tree, directory).map_err(|rule| WriteError::Inode { number, rule })?;
        }
        Ok(Blocks::new(directory::entries(tree, number, directory).map(move |(name, child)| Entry {
            name,
            nid: nids.get(child as usize).copied().unwrap_or(0).into(),
            file_type: tree.inode(child).map_or(0, directory::file_type_of),
        })))
    }

    /// Writes the content of a directory or symbolic link as far as it does not follow the inode.
    fn write_blocks(
        &self,
        number: u32,
        block_count: u32,
        plan: &Plan,
        output: &mut Output<impl io::Write>,
    ) -> Result<(), WriteError> {
        let inode = &self.tree.inodes()[number as usize];
        let end = output.len + u64::from(block_count) * BLOCK_LEN;
        if inode.is_directory() {
            let mut blocks = self.directory_blocks(number, inode, &plan.nids)?;
            let mut block = Vec::new();
            for _ in 0..block_count {
                blocks.next_block(&mut block);
                output.write(&block)?;
            }
        } else {
            output.write(self.tree.symlink_target(inode))?;
        }
        output.fill_to(end)?;
        Ok(())
    }

    fn note_device_use(&mut self, number: u32, inode: &Inode) -> Result<(), WriteError> {
        if inode.is_regular() && inode.size.get() > 0 {
            let blocks = content_blocks(inode).map_err(|rule| WriteError::Inode { number, rule })?;
            let count = &mut self.device_block_counts[inode.layer.get() as usize];
            *count = (*count).max(u32::try_from(blocks.end).expect("checked by content_blocks"));
        }
        Ok(())
    }
}

fn check_entries<B: AsRef<[u8]>>(tree: &Index<B>, directory: &Inode) -> Result<(), &'static str> {
    for (name, child) in tree.children(directory) {
        check_name(name)?;
        if child == WHITEOUT {
            return Err("it has a whiteout: this is no merged tree");
        }
        if tree.inode(child).is_none() {
            return Err("it has an entry without an inode");
        }
    }
    Ok(())
}

/// Start of an object that follows another one: on a slot, and without crossing into the next block where
/// that can be avoided, because what follows an inode must not.
fn place(previous_end: u64, len: usize) -> u64 {
    let start = previous_end.next_multiple_of(INODE_SLOT_LEN);
    let room = BLOCK_LEN - start % BLOCK_LEN;
    if (len.min(BLOCK) as u64) <= room { start } else { start.next_multiple_of(BLOCK_LEN) }
}

/// The identity of a tree: a name-based UUID (RFC 9562, version 8) over its layers.
fn uuid_of(layers: &[Digest]) -> [u8; 16] {
    let mut hasher = format_spec::DigestHasher::default();
    hasher.update(WRITER_VERSION);
    layers.iter().for_each(|layer| hasher.update(layer.as_bytes()));
    let digest = hasher.finish();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// CRC-32C (RFC 3720 B.4) without the last inversion, as EROFS has it. Only ever sees 3 KiB.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    bytes
        .iter()
        .fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ (POLYNOMIAL * (crc & 1))))
}

const DEVICE_SLOT: u16 = {
    let offset = SUPER_OFFSET + size_of::<SuperBlock>();
    assert!(offset == 9 * size_of::<DeviceSlot>());
    9
};
const CHECKSUM_AT: usize = SUPER_OFFSET + std::mem::offset_of!(SuperBlock, checksum);

/// A stream that knows how far it is.
struct Output<W: io::Write> {
    inner: io::BufWriter<W>,
    len: u64,
}

impl<W: io::Write> Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut self.inner, bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Writes zeros up to `offset`.
    fn fill_to(&mut self, offset: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.len < offset {
            let len = (offset - self.len).min(BLOCK_LEN);
            self.write(&ZEROS[..usize::try_from(len).expect("at most a block")])?;
        }
        Ok(())
    }
}
