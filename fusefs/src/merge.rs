//! Layers in, one tree out: the overlay rules.
//!
//! [`merge`] reads the indexes of an image's layers, lowest first, and writes the tree that a container
//! would see, in the form of an index (SPEC.md 7) whose inodes say which layer holds their data.
//!
//! The rules are those of containerd's overlayfs snapshotter:
//! - an entry replaces what lower layers have under its path; two directories merge;
//! - a whiteout hides it; an opaque directory hides what lies below it in lower layers;
//! - a directory shows the metadata of the uppermost layer that names it itself. A layer whose tar stream
//!   names only its content (flag IMPLICIT) leaves the metadata of lower layers, as containerd copies it.
//!
//! Three things are those of an unpack into one directory instead, because programs rely on them and
//! overlayfs is no model: the link count of a file is the number of names the tree shows (overlayfs counts
//! names that upper layers hide), that of a directory is 2 and its subdirectories (overlayfs says 1 where it
//! merged), and the root directory has the metadata that the image gives it. The private attributes of
//! overlayfs (`trusted.overlay.*`) are left out: it would hide them, or obey them.
//!
//! Breadth first over the mapped indexes: besides the result only one queue of directories is in memory.

use std::collections::{HashMap, VecDeque};

use format_spec::{
    Digest, FormatError, Index, IndexBuilder, Inode,
    builder::BuildError,
    index::{LAYER_COUNT_MAX, NO_XATTRS, WHITEOUT, flag, mode},
};

/// Attributes under this prefix are overlayfs's own (Linux fs/overlayfs/overlayfs.h).
const OVERLAY_XATTR_PREFIX: &[u8] = b"trusted.overlay.";

/// The layers do not make a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// There are no layers, or more than a tree may have.
    #[error("image has {0} layers, expected 1 to {LAYER_COUNT_MAX}")]
    LayerCount(usize),
    /// The tree would break a limit of the format.
    #[error("merged tree: {0}")]
    Limit(#[from] BuildError),
    /// A layer's index is damaged.
    #[error("merged tree: {0}")]
    Format(#[from] FormatError),
}

/// Merges layers (id and index, lowest first) into a tree in open form.
///
/// Equal layers give equal bytes. The indexes must have passed [`Index::check`]; others give some tree or
/// an error, never a panic.
///
/// # Errors
///
/// When there are no layers, too many of them, or the result breaks a limit of the format.
pub fn merge<B: AsRef<[u8]>>(layers: &[(Digest, &Index<B>)]) -> Result<Vec<u8>, MergeError> {
    if layers.is_empty() || layers.len() > LAYER_COUNT_MAX {
        return Err(MergeError::LayerCount(layers.len()));
    }
    let mut merger = Merger {
        layers,
        builder: IndexBuilder::default(),
        hard_links: HashMap::new(),
        xattr_sets: HashMap::new(),
        queue: VecDeque::new(),
    };
    merger.add_root()?;
    while let Some(directory) = merger.queue.pop_front() {
        merger.add_directory(&directory)?;
    }
    let digests: Vec<Digest> = layers.iter().map(|(digest, _)| *digest).collect();
    Ok(merger.builder.finish_tree(&digests)?)
}

/// An inode of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LayerInode {
    layer: u32,
    inode: u32,
}

/// A directory of the tree whose entries are still to be added.
#[derive(Debug)]
struct Directory {
    /// Its number in the tree.
    number: u32,
    /// The directories it shows, uppermost first.
    shown: Vec<LayerInode>,
}

struct Merger<'a, B> {
    layers: &'a [(Digest, &'a Index<B>)],
    builder: IndexBuilder,
    /// Tree numbers of files with several names.
    hard_links: HashMap<LayerInode, u32>,
    /// Tree numbers of xattr sets, by layer and number there.
    xattr_sets: HashMap<(u32, u32), u32>,
    queue: VecDeque<Directory>,
}

impl<'a, B: AsRef<[u8]>> Merger<'a, B> {
    fn inode(&self, at: LayerInode) -> Result<(&'a Index<B>, &'a Inode), MergeError> {
        let index = self.layers[at.layer as usize].1;
        let missing = FormatError::Rule { what: "inode", number: at.inode.into(), rule: "there is no such inode" };
        Ok((index, index.inode(at.inode).ok_or(missing)?))
    }

    fn add_root(&mut self) -> Result<(), MergeError> {
        let roots = (0..self.layers.len()).rev().map(|layer| LayerInode { layer: layer_number(layer), inode: 0 });
        let shown = self.visible_directories(roots)?;
        self.add_directory_inode(shown)?;
        Ok(())
    }

    /// Of the entries under one path, uppermost first, those directories that show through.
    fn visible_directories(
        &self,
        candidates: impl IntoIterator<Item = LayerInode>,
    ) -> Result<Vec<LayerInode>, MergeError> {
        let mut shown = Vec::new();
        for candidate in candidates {
            if candidate.inode == WHITEOUT {
                break;
            }
            let (_, inode) = self.inode(candidate)?;
            if !inode.is_directory() {
                break;
            }
            shown.push(candidate);
            if inode.flags.get() & flag::OPAQUE != 0 {
                break;
            }
        }
        Ok(shown)
    }

    /// Adds a directory with the metadata of the uppermost layer that names it, and queues its entries.
    fn add_directory_inode(&mut self, shown: Vec<LayerInode>) -> Result<u32, MergeError> {
        let mut metadata =
            *shown.first().ok_or(FormatError::Rule { what: "inode", number: 0, rule: "the root is no directory" })?;
        for candidate in &shown {
            if self.inode(*candidate)?.1.flags.get() & flag::IMPLICIT == 0 {
                metadata = *candidate;
                break;
            }
        }
        let (_, inode) = self.inode(metadata)?;
        let inode = Inode {
            xattrs: self.add_xattrs(metadata, inode)?.into(),
            flags: 0.into(),
            layer: metadata.layer.into(),
            ..*inode
        };
        let number = self.builder.add_inode(inode)?;
        self.queue.push_back(Directory { number, shown });
        Ok(number)
    }

    /// Adds anything but a directory, once for all its names.
    fn add_file_inode(&mut self, at: LayerInode, inode: &Inode) -> Result<u32, MergeError> {
        let is_shared = inode.nlink > 1;
        if let Some(number) = self.hard_links.get(&at).filter(|_| is_shared) {
            return Ok(*number);
        }
        let payload = if inode.is_symlink() {
            let (index, _) = self.inode(at)?;
            self.builder.add_string(index.symlink_target(inode))?.into()
        } else {
            inode.payload
        };
        // Linux knows no permissions of symbolic links, whatever a tar stream says.
        let mode = if inode.is_symlink() { (mode::SYMLINK | 0o777).into() } else { inode.mode };
        let inode = Inode {
            mode,
            payload,
            xattrs: self.add_xattrs(at, inode)?.into(),
            flags: 0.into(),
            layer: at.layer.into(),
            ..*inode
        };
        let number = self.builder.add_inode(inode)?;
        if is_shared {
            self.hard_links.insert(at, number);
        }
        Ok(number)
    }

    fn add_xattrs(&mut self, at: LayerInode, inode: &Inode) -> Result<u32, MergeError> {
        let set = inode.xattrs.get();
        if set == NO_XATTRS {
            return Ok(NO_XATTRS);
        }
        if let Some(number) = self.xattr_sets.get(&(at.layer, set)) {
            return Ok(*number);
        }
        let index = self.layers[at.layer as usize].1;
        let xattrs = index.xattrs(inode).filter(|(name, _)| !name.starts_with(OVERLAY_XATTR_PREFIX));
        let xattrs = xattrs.map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        let number = self.builder.add_xattrs(xattrs)?;
        self.xattr_sets.insert((at.layer, set), number);
        Ok(number)
    }

    /// Adds the entries of a directory: names ascending, of each the uppermost entry.
    fn add_directory(&mut self, directory: &Directory) -> Result<(), MergeError> {
        let mut entries = Vec::with_capacity(directory.shown.len());
        for shown in &directory.shown {
            let (index, inode) = self.inode(*shown)?;
            entries.push((shown.layer, index.children(inode).peekable()));
        }
        let mut children = Vec::new();
        let mut candidates = Vec::with_capacity(entries.len());
        while let Some(name) = entries.iter_mut().filter_map(|(_, rest)| rest.peek().map(|(name, _)| *name)).min() {
            candidates.clear();
            for (layer, rest) in &mut entries {
                if let Some((_, inode)) = rest.next_if(|(other, _)| *other == name) {
                    candidates.push(LayerInode { layer: *layer, inode });
                }
            }
            if let Some(number) = self.add_child(&candidates)? {
                children.push((name, number));
            }
        }
        Ok(self.builder.add_directory(directory.number, children)?)
    }

    /// Adds what is seen of the entries under one path, uppermost first; `None` behind a whiteout.
    fn add_child(&mut self, candidates: &[LayerInode]) -> Result<Option<u32>, MergeError> {
        let Some(uppermost) = candidates.first().filter(|candidate| candidate.inode != WHITEOUT) else {
            return Ok(None);
        };
        let (_, inode) = self.inode(*uppermost)?;
        if inode.is_directory() {
            let shown = self.visible_directories(candidates.iter().copied())?;
            return self.add_directory_inode(shown).map(Some);
        }
        self.add_file_inode(*uppermost, inode).map(Some)
    }
}

fn layer_number(layer: usize) -> u32 {
    u32::try_from(layer).expect("checked against LAYER_COUNT_MAX")
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
