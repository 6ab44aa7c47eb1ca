//! All that one FUSE session shows: a single tree, or every layer and tree of the node.
//!
//! Plain functions from node numbers to answers; `fs.rs` puts them on the wire. Nothing here waits for bytes:
//! it says where they lie.
//!
//! A process that goes on with the session of another one knows at first nothing of what the kernel knows. Until all of
//! it is shown again, the namespace is *incomplete*: what is missing may still come ([`Namespace::wait_for`]).
//!
//! ```text
//! /layers/<hex digest>     plain address space of a layer, read-only
//! /trees/<hex tree ID>/    merged tree
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use control::TreeId;
use format_spec::{Digest, LayerId};
use rustix::io::Errno;
use storage::Layer;
use tokio::sync::watch;

use crate::{
    number::{Node, Slot, layer_number},
    tree::{Attributes, Content, Sought, Tree, clip, seek},
};

/// Name of the directory of layers.
pub(crate) const LAYERS: &str = "layers";
/// Name of the directory of trees.
pub(crate) const TREES: &str = "trees";
/// Permissions of the root and its two directories: images of all users meet here.
const PRIVATE: u32 = 0o700;

/// What a session shows.
#[derive(Debug)]
pub(crate) struct Namespace {
    /// The tree that is the root itself; `None` for the two directories.
    root: Option<Arc<Tree>>,
    tables: RwLock<Tables>,
    /// Whether more comes that an earlier process has shown; sent again with all that does.
    incomplete: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Tables {
    trees: BTreeMap<TreeId, Arc<Tree>>,
    slots: HashMap<Slot, Arc<Tree>>,
    layers: BTreeMap<LayerId, Layer>,
    layer_numbers: HashMap<u64, Layer>,
}

/// A file and what `stat` shows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its node number, which is also its inode number.
    pub(crate) number: u64,
    /// The rest.
    pub(crate) attributes: Attributes,
}

/// What is under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// This file.
    Entry(Entry),
    /// Nothing, for ever.
    Nothing,
    /// Nothing yet.
    NotYet,
}

/// What `statfs` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Statistics {
    /// Blocks of [`BLOCK_LEN`](crate::tree::BLOCK_LEN) bytes.
    pub(crate) block_count: u64,
    /// Inodes.
    pub(crate) inode_count: u64,
}

impl Namespace {
    /// The layers and trees of a node; empty at first.
    pub(crate) fn of_node() -> Self {
        Self { root: None, tables: RwLock::default(), incomplete: watch::Sender::new(false) }
    }

    /// One tree.
    pub(crate) fn of_tree(tree: Arc<Tree>) -> Self {
        Self { root: Some(tree), tables: RwLock::default(), incomplete: watch::Sender::new(false) }
    }

    /// Shows a tree.
    pub(crate) fn add_tree(&self, tree: &Arc<Tree>) {
        {
            let mut tables = self.write();
            tables.trees.insert(tree.id, tree.clone());
            tables.slots.insert(tree.slot, tree.clone());
        }
        self.tell_waiting();
    }

    /// Shows a tree no longer.
    pub(crate) fn remove_tree(&self, id: TreeId) -> Option<Arc<Tree>> {
        let mut tables = self.write();
        let tree = tables.trees.remove(&id)?;
        tables.slots.remove(&tree.slot);
        Some(tree)
    }

    /// Shows a layer; one whose number is taken by another one stays hidden.
    pub(crate) fn add_layer(&self, layer: &Layer) {
        let id = layer.lazy_layer().id();
        {
            let mut tables = self.write();
            let holder = tables.layer_numbers.entry(layer_number(&id)).or_insert_with(|| layer.clone());
            if holder.lazy_layer().id() == id {
                *holder = layer.clone();
                tables.layers.insert(id, layer.clone());
            }
        }
        self.tell_waiting();
    }

    /// Shows a layer no longer.
    pub(crate) fn remove_layer(&self, id: LayerId) {
        let mut tables = self.write();
        if tables.layers.remove(&id).is_some() {
            tables.layer_numbers.remove(&layer_number(&id));
        }
    }

    /// From now on until [`Self::set_complete`], what is missing may still come.
    pub(crate) fn set_incomplete(&self) {
        self.incomplete.send_replace(true);
    }

    /// Everything is shown that an earlier process has shown, or never will be.
    pub(crate) fn set_complete(&self) {
        self.incomplete.send_replace(false);
    }

    /// Whether what is missing may still come.
    pub(crate) fn is_incomplete(&self) -> bool {
        *self.incomplete.borrow()
    }

    /// Returns when `is_there` says so, or when nothing more comes.
    pub(crate) async fn wait_for(&self, is_there: impl Fn(&Self) -> bool) {
        let mut incomplete = self.incomplete.subscribe();
        while *incomplete.borrow_and_update() && !is_there(self) {
            // The sender lives in this namespace.
            if incomplete.changed().await.is_err() {
                return;
            }
        }
    }

    fn tell_waiting(&self) {
        self.incomplete.send_if_modified(|incomplete| *incomplete);
    }

    /// Whether a number names something.
    pub(crate) fn has(&self, number: u64) -> bool {
        self.resolve(number).is_ok()
    }

    /// Whether it is settled what is under a name of a directory.
    pub(crate) fn has_name(&self, parent: u64, name: &[u8]) -> bool {
        !matches!(self.lookup(parent, name), Ok(Found::NotYet) | Err(Errno::STALE))
    }

    /// Whether it is settled what a directory lists.
    pub(crate) fn has_entries(&self, number: u64) -> bool {
        !matches!(self.resolve(number), Ok(Resolved::Layers | Resolved::Trees) | Err(_))
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        // A table is changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn resolve(&self, number: u64) -> Result<Resolved, Errno> {
        let node = Node::from_number(number).ok_or(Errno::STALE)?;
        match (node, &self.root) {
            (Node::Root, Some(tree)) => Ok(Resolved::Inode(tree.clone(), 0)),
            (Node::Inode { slot, inode }, Some(tree)) if slot == tree.slot => Ok(Resolved::Inode(tree.clone(), inode)),
            (_, Some(_)) => Err(Errno::STALE),
            (Node::Root, None) => Ok(Resolved::Root),
            (Node::Layers, None) => Ok(Resolved::Layers),
            (Node::Trees, None) => Ok(Resolved::Trees),
            (Node::Layer(number), None) => {
                self.read().layer_numbers.get(&number).cloned().map(Resolved::Layer).ok_or(Errno::STALE)
            }
            (Node::Inode { slot, inode }, None) => {
                let tree = self.read().slots.get(&slot).cloned().ok_or(Errno::STALE)?;
                Ok(Resolved::Inode(tree, inode))
            }
        }
    }

    fn inode_number(&self, tree: &Tree, inode: u32) -> u64 {
        if inode == 0 && self.root.is_some() {
            return Node::Root.number();
        }
        Node::Inode { slot: tree.slot, inode }.number()
    }

    fn inode_entry(&self, tree: &Tree, inode: u32) -> Result<Entry, Errno> {
        Ok(Entry { number: self.inode_number(tree, inode), attributes: tree.attributes(inode)? })
    }

    fn fixed_entry(&self, node: Node) -> Entry {
        let nlink = match node {
            Node::Root => 4,
            Node::Trees => u32::try_from(self.read().trees.len()).unwrap_or(u32::MAX).saturating_add(2),
            _ => 2,
        };
        Entry { number: node.number(), attributes: Attributes::of_directory(PRIVATE, nlink) }
    }

    /// What is under a name of a directory.
    ///
    /// # Errors
    ///
    /// `ENOTDIR`, `ESTALE`.
    pub(crate) fn lookup(&self, parent: u64, name: &[u8]) -> Result<Found, Errno> {
        match self.resolve(parent)? {
            Resolved::Root if name == LAYERS.as_bytes() => Ok(Found::Entry(self.fixed_entry(Node::Layers))),
            Resolved::Root if name == TREES.as_bytes() => Ok(Found::Entry(self.fixed_entry(Node::Trees))),
            Resolved::Root => Ok(Found::Nothing),
            Resolved::Layers => {
                let layer = digest_of_name(name).and_then(|id| self.read().layers.get(&id).cloned());
                Ok(layer.map_or(Found::NotYet, |layer| Found::Entry(layer_entry(&layer))))
            }
            Resolved::Trees => {
                let tree = digest_of_name(name).and_then(|id| self.read().trees.get(&id).cloned());
                tree.map_or(Ok(Found::NotYet), |tree| self.inode_entry(&tree, 0).map(Found::Entry))
            }
            Resolved::Layer(_) => Err(Errno::NOTDIR),
            Resolved::Inode(tree, directory) => match tree.lookup(directory, name)? {
                Some(inode) => self.inode_entry(&tree, inode).map(Found::Entry),
                None => Ok(Found::Nothing),
            },
        }
    }

    /// What `stat` shows.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(crate) fn entry(&self, number: u64) -> Result<Entry, Errno> {
        match self.resolve(number)? {
            Resolved::Root => Ok(self.fixed_entry(Node::Root)),
            Resolved::Layers => Ok(self.fixed_entry(Node::Layers)),
            Resolved::Trees => Ok(self.fixed_entry(Node::Trees)),
            Resolved::Layer(layer) => Ok(layer_entry(&layer)),
            Resolved::Inode(tree, inode) => self.inode_entry(&tree, inode),
        }
    }

    /// Shows `visit` the entries of a directory from `offset` on, `.` and `..` first, until it returns false.
    ///
    /// `visit` gets the offset that comes after the entry, the name and the file.
    ///
    /// # Errors
    ///
    /// `ENOTDIR`, `ESTALE`.
    pub(crate) fn read_directory(
        &self,
        number: u64,
        offset: u64,
        mut visit: impl FnMut(u64, &[u8], &Entry) -> bool,
    ) -> Result<(), Errno> {
        let own = self.resolve(number)?;
        let parent = match &own {
            Resolved::Root | Resolved::Layers | Resolved::Trees => Node::Root.number(),
            Resolved::Layer(_) => return Err(Errno::NOTDIR),
            Resolved::Inode(_, 0) if self.root.is_some() => Node::Root.number(),
            Resolved::Inode(_, 0) => Node::Trees.number(),
            Resolved::Inode(tree, inode) => self.inode_number(tree, tree.inode(*inode)?.parent.get()),
        };
        for (position, name, number) in [(0, ".", number), (1, "..", parent)] {
            if offset <= position && !visit(position + 1, name.as_bytes(), &self.entry(number)?) {
                return Ok(());
            }
        }
        let skip = usize::try_from(offset.saturating_sub(2)).map_err(|_| Errno::INVAL)?;
        let mut next_offset = offset.max(2);
        let mut show = |name: &[u8], entry: &Entry| {
            next_offset += 1;
            visit(next_offset, name, entry)
        };
        match own {
            Resolved::Root => {
                for (name, node) in [(LAYERS, Node::Layers), (TREES, Node::Trees)].into_iter().skip(skip) {
                    if !show(name.as_bytes(), &self.fixed_entry(node)) {
                        break;
                    }
                }
            }
            Resolved::Layers => {
                let layers: Vec<Layer> = self.read().layers.values().skip(skip).cloned().collect();
                for layer in layers {
                    if !show(layer.lazy_layer().id().hex().as_bytes(), &layer_entry(&layer)) {
                        break;
                    }
                }
            }
            Resolved::Trees => {
                let trees: Vec<Arc<Tree>> = self.read().trees.values().skip(skip).cloned().collect();
                for tree in trees {
                    if !show(tree.id.hex().as_bytes(), &self.inode_entry(&tree, 0)?) {
                        break;
                    }
                }
            }
            Resolved::Layer(_) => return Err(Errno::NOTDIR),
            Resolved::Inode(tree, directory) => {
                for (name, inode) in tree.entries(directory, skip)? {
                    if !show(name, &self.inode_entry(&tree, inode)?) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives `answer` the target of a symbolic link.
    ///
    /// # Errors
    ///
    /// `EINVAL` for anything else.
    pub(crate) fn read_link<T>(&self, number: u64, answer: impl FnOnce(&[u8]) -> T) -> Result<T, Errno> {
        match self.resolve(number)? {
            Resolved::Inode(tree, inode) => tree.symlink_target(inode).map(answer),
            _ => Err(Errno::INVAL),
        }
    }

    /// Gives `answer` the value of an extended attribute.
    ///
    /// # Errors
    ///
    /// `ENODATA` without one of that name.
    pub(crate) fn xattr<T>(&self, number: u64, name: &[u8], answer: impl FnOnce(&[u8]) -> T) -> Result<T, Errno> {
        match self.resolve(number)? {
            Resolved::Inode(tree, inode) => tree.xattr(inode, name).map(answer),
            _ => Err(Errno::NODATA),
        }
    }

    /// Names of the extended attributes, each ended by a zero byte.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(crate) fn xattr_names(&self, number: u64) -> Result<Vec<u8>, Errno> {
        match self.resolve(number)? {
            Resolved::Inode(tree, inode) => tree.xattr_names(inode),
            _ => Ok(Vec::new()),
        }
    }

    /// Where `len` bytes at `offset` of a file lie, cut at its end; `None` if that leaves nothing.
    ///
    /// # Errors
    ///
    /// `EISDIR`, `EINVAL` for what has no content.
    pub(crate) fn content(&self, number: u64, offset: u64, len: usize) -> Result<Option<Content>, Errno> {
        match self.resolve(number)? {
            Resolved::Inode(tree, inode) => tree.content(inode, offset, len),
            Resolved::Layer(layer) => {
                let len = clip(layer.index().space_len(), offset, len);
                Ok((len > 0).then_some(Content { layer, plain_offset: offset, len }))
            }
            _ => Err(Errno::ISDIR),
        }
    }

    /// Where content or a hole begins in a file, from `offset` on.
    ///
    /// # Errors
    ///
    /// `ENXIO` if there is none before its end; `EISDIR`, `EINVAL` for what has no content.
    pub(crate) fn seek(&self, number: u64, offset: u64, sought: Sought) -> Result<u64, Errno> {
        match self.resolve(number)? {
            Resolved::Inode(tree, inode) => tree.seek(inode, offset, sought),
            Resolved::Layer(layer) => seek(&layer, 0..layer.index().space_len(), offset, sought),
            _ => Err(Errno::ISDIR),
        }
    }

    /// What `statfs` shows: of the tree that the file is in, or of all of them.
    pub(crate) fn statistics(&self, number: u64) -> Statistics {
        match self.resolve(number) {
            Ok(Resolved::Inode(tree, _)) => tree_statistics(&tree),
            _ => {
                self.read().trees.values().map(|tree| tree_statistics(tree)).fold(Statistics::default(), |sum, one| {
                    Statistics {
                        block_count: sum.block_count.saturating_add(one.block_count),
                        inode_count: sum.inode_count.saturating_add(one.inode_count),
                    }
                })
            }
        }
    }
}

/// A node number with what it stands for.
enum Resolved {
    Root,
    Layers,
    Trees,
    Layer(Layer),
    Inode(Arc<Tree>, u32),
}

fn layer_entry(layer: &Layer) -> Entry {
    let number = layer_number(&layer.lazy_layer().id());
    Entry { number, attributes: Attributes::of_file(layer.index().space_len()) }
}

fn tree_statistics(tree: &Tree) -> Statistics {
    Statistics { block_count: tree.block_count, inode_count: tree.index.inodes().len() as u64 }
}

fn digest_of_name(name: &[u8]) -> Option<Digest> {
    format!("sha256:{}", std::str::from_utf8(name).ok()?).parse().ok()
}

#[cfg(test)]
#[path = "namespace_tests.rs"]
mod tests;
