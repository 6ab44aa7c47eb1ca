//! A lazy layer blob taken apart and put together again, honestly or not.

use std::ops::Range;

use format_spec::{
    BlobTail, Footer, HotPiece, Index, IndexBuilder, Inode, LayerData, LazyLayer,
    dedup::{self, DedupPiece},
    footer::{FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN},
    records::WHITEOUT,
};
use test_kit::{BlobParts, dedup_location, hot_frame};

use crate::error::{Context as _, HarnessError, Result};

/// The parts of a blob. Change any and call [`Self::assemble`].
#[derive(Debug, Clone)]
pub struct LazyBlob {
    /// Its frames, one after the other.
    pub frames: Vec<u8>,
    /// What it says of them and of its files.
    pub index: Index<Vec<u8>>,
    /// Pieces of the hot pack with what the pack shall hold of them; each becomes a frame.
    pub hot: Vec<(HotPiece, Vec<u8>)>,
    /// Pieces of the dedup section.
    pub dedup: Vec<DedupPiece>,
}

impl LazyBlob {
    /// Takes a blob apart. Its hot pack is left out.
    ///
    /// # Errors
    ///
    /// When it is none, or damaged.
    pub fn open(blob: &[u8]) -> Result<Self> {
        let damaged = |what: String| HarnessError::Unexpected(format!("lazy blob: {what}"));
        let footer = blob.len().checked_sub(position(FOOTER_FRAME_LEN)).map(|start| &blob[start..]);
        let found = footer.and_then(|footer| Footer::from_frame(footer, blob.len() as u64).ok().flatten());
        let (location, hot_len) = found.ok_or_else(|| damaged("it has no footer".to_owned()))?;
        let index = Index::from_compressed(&blob[at(&location.range())], &location)
            .map_err(|error| damaged(error.to_string()))?;
        let mut pieces = Vec::new();
        if let Some(section) = index.dedup() {
            let hot_frame_len = if hot_len > 0 { hot_len + SKIPPABLE_HEADER_LEN } else { 0 };
            let start = location.range().end + hot_frame_len + SKIPPABLE_HEADER_LEN;
            let compressed = &blob[at(&(start..start + section.compressed_len.get()))];
            pieces = dedup::decompress(compressed, section, index.space_len())
                .map_err(|error| damaged(error.to_string()))?;
        }
        let frames = blob[..position(location.offset - SKIPPABLE_HEADER_LEN)].to_vec();
        Ok(Self { frames, index, hot: Vec::new(), dedup: pieces })
    }

    /// The number of the inode at `path`, which starts with a slash.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn inode_at(&self, path: &str) -> Result<u32> {
        let names = path.split('/').filter(|name| !name.is_empty());
        let found = names.clone().try_fold(0, |directory, name| {
            self.index.lookup(self.index.inode(directory)?, name.as_bytes()).filter(|inode| *inode != WHITEOUT)
        });
        found.ok_or_else(|| HarnessError::Unexpected(format!("{path} is not in the layer")))
    }

    /// The bytes of a range of the plain address space.
    ///
    /// # Errors
    ///
    /// When a frame is damaged.
    pub fn content(&self, plain: Range<u64>) -> Result<Vec<u8>> {
        let mut tar = Vec::new();
        for frame in self.index.frames() {
            let compressed = &self.frames[at(&frame.blob_range())];
            tar.extend(
                zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).context("decompressing a frame")?,
            );
        }
        let mut content = vec![0; position(plain.end - plain.start)];
        for extent in &self.index.extents()[self.index.extents_in_plain(&plain)] {
            let (start, end) = (plain.start.max(extent.plain_range().start), plain.end.min(extent.plain_range().end));
            let tar_start = extent.tar_offset.get() + start - extent.plain_offset.get();
            content[at(&(start - plain.start..end - plain.start))]
                .copy_from_slice(&tar[at(&(tar_start..tar_start + end - start))]);
        }
        Ok(content)
    }

    /// Puts the first `len` bytes of the file at `path` into the hot pack.
    ///
    /// # Errors
    ///
    /// When there is no such file.
    pub fn add_hot(&mut self, path: &str, len: u64, reason: u32) -> Result<()> {
        let inode = self.index.inode(self.inode_at(path)?).copied();
        let range = inode.map(|inode| inode.plain_range()).unwrap_or_default();
        let range = range.start..range.end.min(range.start.saturating_add(len));
        let piece = HotPiece {
            plain_offset: range.start.into(),
            len: u32::try_from(range.end - range.start).expect("tests use small files").into(),
            reason: reason.into(),
        };
        self.hot.push((piece, self.content(range)?));
        Ok(())
    }

    /// Puts a blob together; `change` may make every inode say something else. All digests are right.
    ///
    /// # Errors
    ///
    /// When the index would break a rule.
    pub fn assemble(&self, change: impl FnMut(u32, &mut Inode)) -> Result<(Vec<u8>, LazyLayer)> {
        let index = &self.index;
        let refused = |error: &dyn std::error::Error| HarnessError::Unexpected(format!("assembling: {error}"));
        let mut hot_frames = Vec::new();
        let mut hot_pack = Vec::new();
        for (_, content) in &self.hot {
            let compressed = zstd::bulk::compress(content, 3).context("compressing a hot frame")?;
            hot_frames.push(hot_frame(&compressed, content.len()));
            hot_pack.extend(compressed);
        }
        let hot_pieces: Vec<_> = self.hot.iter().map(|(piece, _)| *piece).collect();
        let section = match self.dedup.is_empty() {
            true => None,
            false => Some(dedup::compress(&self.dedup).map_err(|error| refused(&error))?),
        };
        let location: Vec<_> = section.iter().map(dedup_location).collect();
        let tail = BlobTail { hot_frames: &hot_frames, hot_pieces: &hot_pieces, dedup: &location };
        let data = LayerData {
            tar_len: index.tar_len(),
            space_len: index.space_len(),
            extents: index.extents(),
            frames: index.frames(),
            tail,
        };
        let compressed = self.rebuild(change)?.finish_layer(&data).map_err(|error| refused(&error))?;
        let dedup = section.map(|section| section.bytes).unwrap_or_default();
        let parts = BlobParts { frames: &self.frames, index: &compressed, hot_pack: &hot_pack, dedup: &dedup };
        Ok(parts.assemble())
    }

    /// All inodes and directories once more.
    fn rebuild(&self, mut change: impl FnMut(u32, &mut Inode)) -> Result<IndexBuilder> {
        let index = &self.index;
        let refused = |error| HarnessError::Unexpected(format!("assembling: {error}"));
        let mut builder = IndexBuilder::default();
        for (number, inode) in (0..).zip(index.inodes()) {
            let mut inode = *inode;
            if inode.is_symlink() {
                inode.payload = builder.add_string(index.symlink_target(&inode)).map_err(refused)?.into();
            }
            let xattrs = index.xattrs(&inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
            inode.xattrs = builder.add_xattrs(xattrs).map_err(refused)?.into();
            change(number, &mut inode);
            builder.add_inode(inode).map_err(refused)?;
        }
        let mut pending = std::collections::VecDeque::from([0]);
        while let Some(number) = pending.pop_front() {
            let Some(directory) = index.inode(number).filter(|inode| inode.is_directory()) else { continue };
            let children: Vec<_> = index.children(directory).collect();
            pending.extend(children.iter().map(|(_, child)| *child).filter(|child| *child != WHITEOUT));
            builder.add_directory(number, children).map_err(refused)?;
        }
        Ok(builder)
    }
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).expect("tests make small blobs")
}

fn at(range: &Range<u64>) -> Range<usize> {
    position(range.start)..position(range.end)
}
