//! Layers in, one tree out: the overlay rules.
//!
//! [`merge`] reads the indexes of an image's layers, lowest first, and writes the tree that a container
//! would see, in the form of an index (SPEC.md 7) whose inodes say which layer holds their data.
//!
//! The rules are those of containerd's overlayfs snapshotter:
//! - an entry replaces what lower layers have under its path; two directories merge;
//! - a whiteout hides it; an opaque directory hides what lies below it in lower layers;
//! - a directory shows the metadata of the uppermost layer that names it itself. A layer whose tar stream
//!   names only its content (flag IMPLICIT) leaves the metadata of lower layers, as containerd copies it,
//!   even from where an opaque directory hides the rest. Where no layer names it, the lowest one made it.
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
    limits::LAYER_COUNT_MAX,
    records::{NO_XATTRS, WHITEOUT, flag, mode},
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
    layers: DirectoryLayers,
}

/// The directories of all layers under one path, uppermost first, down to where it is something else.
#[derive(Debug)]
struct DirectoryLayers {
    directories: Vec<LayerInode>,
    /// How many of them show; the others lie below an opaque directory.
    shown_count: usize,
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
        let layers = self.directory_layers(roots, self.layers.len())?;
        self.add_directory_inode(layers)?;
        Ok(())
    }

    /// Of the entries under one path, uppermost first, the directories. The first `shown_count` are in
    /// directories that show.
    fn directory_layers(
        &self,
        candidates: impl IntoIterator<Item = LayerInode>,
        mut shown_count: usize,
    ) -> Result<DirectoryLayers, MergeError> {
        let mut directories = Vec::new();
        for candidate in candidates {
            if candidate.inode == WHITEOUT {
                break;
            }
            let (_, inode) = self.inode(candidate)?;
            if !inode.is_directory() {
                break;
            }
            directories.push(candidate);
            if inode.flags.get() & flag::OPAQUE != 0 {
                shown_count = shown_count.min(directories.len());
            }
        }
        shown_count = shown_count.min(directories.len());
        Ok(DirectoryLayers { directories, shown_count })
    }

    /// Adds a directory with the metadata of the uppermost layer that names it, else of the lowest; queues its entries.
    fn add_directory_inode(&mut self, layers: DirectoryLayers) -> Result<u32, MergeError> {
        let missing = FormatError::Rule { what: "inode", number: 0, rule: "the root is no directory" };
        let mut metadata = *layers.directories.last().ok_or(missing)?;
        for candidate in &layers.directories {
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
        self.queue.push_back(Directory { number, layers });
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
        let DirectoryLayers { directories, shown_count } = &directory.layers;
        let mut entries = Vec::with_capacity(directories.len());
        for directory in directories {
            let (index, inode) = self.inode(*directory)?;
            entries.push((directory.layer, index.children(inode).peekable()));
        }
        let mut children = Vec::new();
        let mut candidates = Vec::with_capacity(entries.len());
        while let Some(name) = entries.iter_mut().filter_map(|(_, rest)| rest.peek().map(|(name, _)| *name)).min() {
            candidates.clear();
            let mut candidates_shown = 0;
            for (position, (layer, rest)) in entries.iter_mut().enumerate() {
                if let Some((_, inode)) = rest.next_if(|(other, _)| *other == name) {
                    candidates.push(LayerInode { layer: *layer, inode });
                    candidates_shown += usize::from(position < *shown_count);
                }
            }
            if let Some(number) = self.add_child(&candidates, candidates_shown)? {
                children.push((name, number));
            }
        }
        Ok(self.builder.add_directory(directory.number, children)?)
    }

    /// Adds what is seen of the entries under one path, uppermost first, of which the first `shown_count`
    /// are in directories that show; `None` where nothing is.
    fn add_child(&mut self, candidates: &[LayerInode], shown_count: usize) -> Result<Option<u32>, MergeError> {
        let uppermost = candidates[..shown_count].first().filter(|candidate| candidate.inode != WHITEOUT);
        let Some(uppermost) = uppermost else { return Ok(None) };
        let (_, inode) = self.inode(*uppermost)?;
        if inode.is_directory() {
            let layers = self.directory_layers(candidates.iter().copied(), shown_count)?;
            return self.add_directory_inode(layers).map(Some);
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
