//! The tree that one layer's tar entries describe, as an unpack of this layer alone makes it.
//!
//! The rules are those of containerd's unpack (its `archive` package, applied to overlayfs) and of the Linux
//! calls that it makes: paths are cleaned and cannot leave the root, symbolic links of the same layer are
//! followed on the way to a parent directory, later entries replace earlier ones except that directories
//! merge, a hard link's metadata goes to the inode it links to, directories get their times when all is
//! there. What containerd cannot unpack is refused. `docs/SEMANTICS.md` has them all, with their tests.
//!
//! Attributes are `attributes.rs`; what comes of the tree is `layer_index.rs`.

use std::collections::{BTreeMap, VecDeque};

use format_spec::{
    Inode,
    builder::{blank_inode, implicit_directory},
    index::check_name,
    records::{WHITEOUT, flag, mode},
};

use crate::{
    attributes::{self, Xattrs},
    pax::Time,
    walker::{Entry, EntryKind, Segment},
};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Longest path and longest target of a symbolic link (Linux `PATH_MAX`, less its final zero).
const PATH_LEN_MAX: usize = 4095;
/// Most symbolic links on the way to one path, as in containerd's path resolution.
const LINKS_FOLLOWED_MAX: usize = 255;
/// Most memory that a tree may take, in bytes as [`LayerTree::grow`] counts them: bounds the memory of a
/// conversion. Enough for a million files; the largest images known have fewer in all their layers.
const MEMORY_LEN_MAX: u64 = 256 << 20;
/// What an inode takes beside its names, target, attributes and segments.
const NODE_MEMORY_LEN: u64 = 160;
/// Bytes for a segment of a sparse file, as itself, as an extent and as a piece of the dedup section, while these are
/// made from each other.
const SEGMENT_MEMORY_LEN: u64 = 160;
/// What a name takes beside its bytes.
const NAME_MEMORY_LEN: u64 = 64;

/// A number that changes nothing as owner or group (chown(2): -1).
const NO_OWNER: u32 = u32::MAX;
const SET_GROUP_ID: u32 = 0o2000;

/// The root of a tree.
pub(crate) const ROOT: u32 = 0;

/// A layer's tree under construction.
#[derive(Debug)]
pub struct LayerTree {
    nodes: Vec<Node>,
    /// Names and times of directory entries, which are applied last.
    directory_times: Vec<(Box<[u8]>, Time)>,
    memory_len: u64,
}

/// An inode; nodes stand in the order in which the tar stream creates them.
#[derive(Debug)]
pub(crate) struct Node {
    /// Everything but what depends on other inodes.
    pub(crate) inode: Inode,
    pub(crate) xattrs: Xattrs,
    pub(crate) content: Content,
}

/// What an inode holds.
#[derive(Debug)]
pub(crate) enum Content {
    /// Names and node numbers, or [`WHITEOUT`].
    Directory(BTreeMap<Box<[u8]>, u32>),
    /// A file: where its stored bytes start in the tar stream, and its segments unless it has no holes.
    File { tar_offset: u64, segments: Option<Vec<Segment>> },
    /// A symbolic link's target.
    Symlink(Vec<u8>),
    /// Devices and pipes.
    None,
}

/// An entry that cannot be unpacked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tar entry {path:?}: {reason}")]
pub struct TreeError {
    /// Path of the entry, as text.
    path: String,
    /// Why not.
    reason: String,
}

impl Default for LayerTree {
    fn default() -> Self {
        let root = Node { inode: implicit_directory(), xattrs: BTreeMap::new(), content: directory() };
        Self { nodes: vec![root], directory_times: Vec::new(), memory_len: NODE_MEMORY_LEN }
    }
}

fn directory() -> Content {
    Content::Directory(BTreeMap::new())
}

impl LayerTree {
    /// Applies one entry whose stored bytes start at `tar_offset`.
    ///
    /// # Errors
    ///
    /// When containerd would not unpack the entry, or a limit of the format is exceeded.
    pub fn apply(&mut self, entry: Entry, tar_offset: u64) -> Result<(), TreeError> {
        let path = String::from_utf8_lossy(&entry.path).into_owned();
        self.try_apply(entry, tar_offset).map_err(|reason| TreeError { path, reason })
    }

    /// Ends the layer: gives directories their times, as containerd does when everything else is there.
    ///
    /// # Errors
    ///
    /// When a later entry took a directory away: containerd then finds nothing to give the time to.
    pub fn finish(&mut self) -> Result<(), TreeError> {
        for (path, time) in std::mem::take(&mut self.directory_times) {
            self.set_directory_time(&path, time)
                .map_err(|reason| TreeError { path: String::from_utf8_lossy(&path).into_owned(), reason })?;
        }
        Ok(())
    }

    fn set_directory_time(&mut self, path: &[u8], time: Time) -> Result<(), String> {
        let resolved = self.resolve(clean(path))?;
        let gone = "a later entry of the layer takes this directory away";
        let number = self.find(&resolved).ok_or(gone)?;
        if number != WHITEOUT {
            attributes::set_mtime(&mut self.nodes[number as usize].inode, time);
        }
        Ok(())
    }

    fn try_apply(&mut self, entry: Entry, tar_offset: u64) -> Result<(), String> {
        if entry.kind == EntryKind::Other(b'S') {
            return Err("it is an old GNU sparse file, which containerd refuses".to_owned());
        }
        let mut parents = clean(&entry.path);
        let Some(name) = parents.pop() else {
            if entry.kind != EntryKind::Global {
                self.apply_to_root(&entry);
            }
            return Ok(());
        };
        let parents = self.resolve(parents)?;
        if path_len(&parents) + 1 + name.len() > PATH_LEN_MAX {
            return Err(format!("its path is longer than {PATH_LEN_MAX} bytes"));
        }
        let parent = self.make_directories(parents)?;
        if name == OPAQUE_NAME {
            // The roots of all layers show, whatever they say: overlayfs stacks them without a look.
            if parent != ROOT {
                let inode = &mut self.nodes[parent as usize].inode;
                inode.flags = (inode.flags.get() | flag::OPAQUE).into();
            }
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.add_whiteout(parent, hidden);
        }
        if entry.kind == EntryKind::Global {
            // containerd makes way for it and then finds that there is nothing to make.
            self.unlink(parent, &name);
            return Ok(());
        }
        check_name(&name)?;
        self.add_entry(parent, name, entry, tar_offset)
    }

    /// containerd does not apply the root's entry; its time does no harm and is better than none.
    fn apply_to_root(&mut self, entry: &Entry) {
        let inode = &mut self.nodes[ROOT as usize].inode;
        inode.flags = (inode.flags.get() & !flag::IMPLICIT).into();
        attributes::set_mtime(inode, entry.mtime);
    }

    fn add_whiteout(&mut self, parent: u32, name: &[u8]) -> Result<(), String> {
        check_name(name).map_err(|_| "it is a whiteout of no possible name".to_owned())?;
        if self.child(parent, name).is_some() {
            return Err("it is a whiteout of what the same layer has already".to_owned());
        }
        self.link(parent, name, WHITEOUT)
    }

    fn add_entry(&mut self, parent: u32, name: Vec<u8>, entry: Entry, tar_offset: u64) -> Result<(), String> {
        if entry.kind == EntryKind::Directory {
            self.grow(NAME_MEMORY_LEN + entry.path.len() as u64)?;
            self.directory_times.push((entry.path.as_slice().into(), entry.mtime));
            let existing = self.child(parent, &name).filter(|number| self.directory(*number).is_some());
            if let Some(number) = existing {
                return self.set_metadata(number, entry);
            }
        }
        self.unlink(parent, &name);
        let number = match entry.kind {
            EntryKind::HardLink => self.find_link_target(&entry.link_target)?,
            _ => {
                let node = new_node(&entry, tar_offset)?;
                // This is how overlayfs, onto which containerd unpacks, stores a whiteout.
                let is_whiteout = node.inode.file_type() == mode::CHARACTER && node.inode.payload == 0;
                if is_whiteout { WHITEOUT } else { self.add_node(parent, node)? }
            }
        };
        self.link(parent, &name, number)?;
        if number == WHITEOUT {
            return Ok(());
        }
        if entry.kind == EntryKind::HardLink {
            attributes::forget_capability(&mut self.nodes[number as usize].xattrs);
        }
        self.set_metadata(number, entry)
    }

    /// The target of a hard link; may be a whiteout, which is a file to containerd.
    fn find_link_target(&self, target: &[u8]) -> Result<u32, String> {
        let shown = || String::from_utf8_lossy(target).into_owned();
        let mut path = clean(target);
        let name = path.pop().ok_or("it is a hard link to the root directory")?;
        let mut path = self.resolve(path)?;
        path.push(name);
        let number = self.find(&path);
        let number = number.ok_or_else(|| format!("it is a hard link to {:?}, which this layer lacks", shown()))?;
        match self.directory(number) {
            Some(_) => Err(format!("it is a hard link to {:?}, a directory", shown())),
            None => Ok(number),
        }
    }

    /// What stands at a resolved path.
    fn find(&self, path: &[Vec<u8>]) -> Option<u32> {
        path.iter().try_fold(ROOT, |number, name| self.child(number, name))
    }

    /// Follows the symbolic links on the way to a path, which need not exist.
    fn resolve(&self, path: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, String> {
        let mut pending: VecDeque<_> = path.into();
        let mut resolved: Vec<Vec<u8>> = Vec::with_capacity(pending.len());
        let mut at = Some(ROOT);
        let mut link_count = 0;
        while let Some(name) = pending.pop_front() {
            let next = at.and_then(|at| self.child(at, &name)).filter(|number| *number != WHITEOUT);
            let Some(Content::Symlink(target)) = next.map(|number| &self.nodes[number as usize].content) else {
                resolved.push(name);
                at = next;
                continue;
            };
            link_count += 1;
            if link_count > LINKS_FOLLOWED_MAX {
                return Err("too many symbolic links on the way to it".to_owned());
            }
            let mut whole = if target.starts_with(b"/") { Vec::new() } else { resolved.join(&b'/') };
            whole.push(b'/');
            whole.extend_from_slice(target);
            for name in clean(&whole).into_iter().rev() {
                pending.push_front(name);
            }
            if path_len(&pending) > PATH_LEN_MAX {
                return Err(format!("the path behind its symbolic links is longer than {PATH_LEN_MAX} bytes"));
            }
            resolved.clear();
            at = Some(ROOT);
        }
        Ok(resolved)
    }

    /// The directory at a resolved path; makes what is missing.
    fn make_directories(&mut self, path: Vec<Vec<u8>>) -> Result<u32, String> {
        let mut number = ROOT;
        for name in path {
            number = match self.child(number, &name) {
                Some(existing) if self.directory(existing).is_some() => existing,
                Some(existing) => {
                    let what = if existing == WHITEOUT { "a whiteout" } else { "no directory" };
                    return Err(format!("{:?} on the way to it is {what}", String::from_utf8_lossy(&name)));
                }
                None => {
                    check_name(&name)?;
                    let node = Node { inode: implicit_directory(), xattrs: Xattrs::new(), content: directory() };
                    let made = self.add_node(number, node)?;
                    self.link(number, &name, made)?;
                    made
                }
            };
        }
        Ok(number)
    }

    fn set_metadata(&mut self, number: u32, entry: Entry) -> Result<(), String> {
        let xattrs_len = entry.xattrs.iter().map(|(name, value)| (name.len() + value.len()) as u64 + NAME_MEMORY_LEN);
        self.grow(xattrs_len.sum())?;
        let Node { inode, xattrs, .. } = &mut self.nodes[number as usize];
        inode.uid = owner(inode.uid.get(), entry.uid).into();
        inode.gid = owner(inode.gid.get(), entry.gid).into();
        attributes::set(xattrs, entry.xattrs, inode.file_type())?;
        if !inode.is_symlink() {
            inode.mode = (inode.file_type() | entry.mode).into();
            attributes::set_permissions(xattrs, entry.mode);
        }
        inode.flags = (inode.flags.get() & !flag::IMPLICIT).into();
        attributes::set_mtime(inode, entry.mtime);
        Ok(())
    }

    /// Adds an inode that is created in the directory `parent`, with what it inherits there.
    fn add_node(&mut self, parent: u32, mut node: Node) -> Result<u32, String> {
        let segments_len = match &node.content {
            Content::File { segments: Some(segments), .. } => segments.len() as u64 * SEGMENT_MEMORY_LEN,
            Content::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        self.grow(NODE_MEMORY_LEN + segments_len)?;
        let parent = &self.nodes[parent as usize];
        if parent.inode.mode.get() & SET_GROUP_ID != 0 {
            node.inode.gid = parent.inode.gid;
        }
        attributes::inherit(&mut node.xattrs, &parent.xattrs, &node.inode);
        let number = u32::try_from(self.nodes.len()).expect("memory is limited");
        self.nodes.push(node);
        Ok(number)
    }

    /// Counts memory that the tree is about to take.
    fn grow(&mut self, len: u64) -> Result<(), String> {
        self.memory_len = self.memory_len.saturating_add(len);
        if self.memory_len > MEMORY_LEN_MAX {
            let limit = MEMORY_LEN_MAX >> 20;
            return Err(format!("the layer's metadata takes more than {limit} MiB: split it into several layers"));
        }
        Ok(())
    }

    /// The entries of a directory; `None` for everything else.
    pub(crate) fn directory(&self, number: u32) -> Option<&BTreeMap<Box<[u8]>, u32>> {
        match &self.nodes.get(number as usize)?.content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        self.directory(directory)?.get(name).copied()
    }

    fn link(&mut self, directory: u32, name: &[u8], number: u32) -> Result<(), String> {
        self.grow(NAME_MEMORY_LEN + name.len() as u64)?;
        if let Content::Directory(children) = &mut self.nodes[directory as usize].content {
            children.insert(name.into(), number);
        }
        Ok(())
    }

    fn unlink(&mut self, directory: u32, name: &[u8]) {
        if let Content::Directory(children) = &mut self.nodes[directory as usize].content {
            children.remove(name);
        }
    }

    /// Number of nodes, those without a name left included.
    pub(crate) fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// All nodes in the order of their creation, those without a name left included.
    pub(crate) fn into_nodes(self) -> Vec<Node> {
        self.nodes
    }
}

fn new_node(entry: &Entry, tar_offset: u64) -> Result<Node, String> {
    let (file_type, content) = match entry.kind {
        EntryKind::Regular => (mode::REGULAR, Content::File { tar_offset, segments: entry.segments.clone() }),
        EntryKind::Directory => (mode::DIRECTORY, directory()),
        EntryKind::Symlink => {
            if entry.link_target.is_empty() || entry.link_target.len() > PATH_LEN_MAX {
                return Err(format!("it is a symbolic link with a target of {} bytes", entry.link_target.len()));
            }
            (mode::SYMLINK, Content::Symlink(entry.link_target.clone()))
        }
        EntryKind::Character => (mode::CHARACTER, Content::None),
        EntryKind::Block => (mode::BLOCK, Content::None),
        EntryKind::Fifo => (mode::FIFO, Content::None),
        EntryKind::HardLink | EntryKind::Global => unreachable!("it has no node of its own"),
        EntryKind::Other(flag) => {
            return Err(format!("its type {:?} is unknown, containerd refuses it", char::from(flag)));
        }
    };
    // Linux knows no permissions of symbolic links.
    let permissions = if file_type == mode::SYMLINK { 0o777 } else { 0 };
    let mut inode = blank_inode(file_type | permissions);
    inode.size = entry.size.into();
    if inode.is_device() {
        inode.payload = encode_device(entry.device).into();
    }
    Ok(Node { inode, xattrs: Xattrs::new(), content })
}

/// The number that mknod(2) gets: 12 bits of the major number, 20 of the minor one, others are lost.
/// Source: Linux include/linux/kdev_t.h, `new_encode_dev`.
fn encode_device((major, minor): (i64, i64)) -> u32 {
    let bits = |number: i64, count: u32| u32::try_from(number & ((1 << count) - 1)).expect("fewer than 32 bits");
    let (major, minor) = (bits(major, 12), bits(minor, 20));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The owner or group after an lchown(2) to `id`: of its bits 32 count, and all of them set change nothing.
fn owner(current: u32, id: i64) -> u32 {
    let id = u32::try_from(id & i64::from(u32::MAX)).expect("32 bits");
    if id == NO_OWNER { current } else { id }
}

fn path_len<'a>(names: impl IntoIterator<Item = &'a Vec<u8>>) -> usize {
    names.into_iter().map(|name| name.len() + 1).sum()
}

/// The components of a path from the root, `.` and `..` resolved without looking at the tree.
fn clean(path: &[u8]) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            _ => names.push(name.to_vec()),
        }
    }
    names
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
