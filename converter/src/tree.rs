//! The tree that one layer's tar entries describe, as an unpack of this layer alone makes it.
//!
//! The rules are those of containerd's unpack (its `archive` package, applied to overlayfs) wherever an
//! image can tell the difference: paths are cleaned and cannot leave the root, symbolic links of the same
//! layer are followed on the way to a parent directory, later entries replace earlier ones except that
//! directories merge, a hard link's metadata goes to the inode it links to, the root's owner and mode are
//! fixed, times outside 1970 to 2262 become 1970. Where containerd's result depends on the order of
//! whiteouts and entries, the OCI image specification holds: a whiteout hides lower layers only.
//!
//! What comes of the tree is `layer_index.rs`.

use std::collections::{BTreeMap, VecDeque};

use format_spec::{
    Inode,
    builder::{blank_inode, implicit_directory},
    index::{WHITEOUT, check_name, flag, mode},
};

use crate::{
    pax::Time,
    walker::{Entry, EntryKind, Segment},
};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Prefix of what AUFS keeps for itself.
const META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Longest target of a symbolic link (Linux `PATH_MAX`, less its final zero).
const TARGET_LEN_MAX: usize = 4095;
/// Most symbolic links on the way to one path, as in containerd's path resolution.
const LINKS_FOLLOWED_MAX: usize = 255;
/// Most inodes of a layer: bounds the memory of a conversion. The largest images known have under a million.
const INODE_COUNT_MAX: usize = 4_000_000;
/// What 64 bits of nanoseconds can say; containerd gives later times up.
const MTIME_SECONDS_MAX: i64 = 9_223_372_036;

/// The root of a tree.
pub(crate) const ROOT: u32 = 0;

/// A layer's tree under construction.
#[derive(Debug)]
pub struct LayerTree {
    nodes: Vec<Node>,
}

/// An inode; nodes stand in the order in which the tar stream creates them.
#[derive(Debug)]
pub(crate) struct Node {
    /// Everything but what depends on other inodes.
    pub(crate) inode: Inode,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
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
        Self { nodes: vec![root] }
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

    fn try_apply(&mut self, entry: Entry, tar_offset: u64) -> Result<(), String> {
        let mut parents = clean(&entry.path);
        if parents.iter().any(|name| name.starts_with(META_PREFIX) && name != OPAQUE_NAME) {
            return Ok(());
        }
        let Some(name) = parents.pop() else {
            self.apply_to_root(&entry);
            return Ok(());
        };
        let parent = self.make_directories(self.resolve(parents)?)?;
        if name == OPAQUE_NAME {
            let inode = &mut self.nodes[parent as usize].inode;
            inode.flags = (inode.flags.get() | flag::OPAQUE).into();
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.add_whiteout(parent, hidden);
        }
        check_name(&name)?;
        self.add_entry(parent, name, entry, tar_offset)
    }

    /// containerd does not apply the root's entry; its time does no harm and is better than none.
    fn apply_to_root(&mut self, entry: &Entry) {
        let inode = &mut self.nodes[ROOT as usize].inode;
        inode.flags = (inode.flags.get() & !flag::IMPLICIT).into();
        set_mtime(inode, entry.mtime);
    }

    fn add_whiteout(&mut self, parent: u32, name: &[u8]) -> Result<(), String> {
        check_name(name).map_err(|_| "it is a whiteout of no possible name".to_owned())?;
        match self.child(parent, name) {
            Some(WHITEOUT) => {}
            // The layer's own entry stays; only what lower layers have under the name is hidden.
            Some(existing) => {
                let inode = &mut self.nodes[existing as usize].inode;
                if inode.is_directory() {
                    inode.flags = (inode.flags.get() | flag::OPAQUE).into();
                }
            }
            None => self.link(parent, name, WHITEOUT),
        }
        Ok(())
    }

    fn add_entry(&mut self, parent: u32, name: Vec<u8>, entry: Entry, tar_offset: u64) -> Result<(), String> {
        let existing = self.child(parent, &name);
        let existing_directory = existing.filter(|number| self.directory(*number).is_some());
        if entry.kind == EntryKind::Directory
            && let Some(number) = existing_directory
        {
            return self.set_metadata(number, entry);
        }
        self.unlink(parent, &name);
        let number = match entry.kind {
            EntryKind::HardLink => self.find_link_target(&entry.link_target)?,
            // This is how overlayfs, onto which containerd unpacks, stores a whiteout.
            EntryKind::Character if entry.device == (0, 0) => {
                self.link(parent, &name, WHITEOUT);
                return Ok(());
            }
            _ => self.add_node(new_node(&entry, tar_offset)?)?,
        };
        self.link(parent, &name, number);
        if existing == Some(WHITEOUT) && entry.kind == EntryKind::Directory {
            let inode = &mut self.nodes[number as usize].inode;
            inode.flags = (inode.flags.get() | flag::OPAQUE).into();
        }
        self.set_metadata(number, entry)
    }

    fn find_link_target(&self, target: &[u8]) -> Result<u32, String> {
        let shown = || String::from_utf8_lossy(target).into_owned();
        let mut parents = clean(target);
        let name = parents.pop().ok_or("it is a hard link to the root directory")?;
        let mut number = Some(ROOT);
        for parent in self.resolve(parents)? {
            number = number.and_then(|number| self.child(number, &parent));
        }
        let number = number.and_then(|number| self.child(number, &name)).filter(|number| *number != WHITEOUT);
        let number = number.ok_or_else(|| format!("it is a hard link to {:?}, which this layer lacks", shown()))?;
        match self.nodes[number as usize].content {
            Content::Directory(_) => Err(format!("it is a hard link to {:?}, a directory", shown())),
            _ => Ok(number),
        }
    }

    /// Follows the symbolic links on the way to a directory, which need not exist.
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
                Some(existing) if existing != WHITEOUT => {
                    if self.directory(existing).is_none() {
                        return Err(format!("{:?} on the way to it is no directory", String::from_utf8_lossy(&name)));
                    }
                    existing
                }
                hidden => {
                    check_name(&name)?;
                    let mut inode = implicit_directory();
                    if hidden.is_some() {
                        inode.flags = flag::OPAQUE.into();
                    }
                    let made = self.add_node(Node { inode, xattrs: BTreeMap::new(), content: directory() })?;
                    self.link(number, &name, made);
                    made
                }
            };
        }
        Ok(number)
    }

    fn set_metadata(&mut self, number: u32, entry: Entry) -> Result<(), String> {
        let node = &mut self.nodes[number as usize];
        let owner = |id: i64| u32::try_from(id).map_err(|_| format!("its owner or group {id} is not allowed"));
        let inode = &mut node.inode;
        inode.uid = owner(entry.uid)?.into();
        inode.gid = owner(entry.gid)?.into();
        let permissions = if inode.is_symlink() { 0o777 } else { entry.mode };
        inode.mode = (inode.file_type() | permissions).into();
        inode.flags = (inode.flags.get() & !flag::IMPLICIT).into();
        set_mtime(inode, entry.mtime);
        node.xattrs.extend(entry.xattrs.into_iter().filter(|(name, _)| is_xattr_name(name)));
        Ok(())
    }

    fn add_node(&mut self, node: Node) -> Result<u32, String> {
        if self.nodes.len() >= INODE_COUNT_MAX {
            return Err(format!("the layer has more than {INODE_COUNT_MAX} files"));
        }
        let number = u32::try_from(self.nodes.len()).expect("below the limit");
        self.nodes.push(node);
        Ok(number)
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

    fn link(&mut self, directory: u32, name: &[u8], number: u32) {
        if let Content::Directory(children) = &mut self.nodes[directory as usize].content {
            children.insert(name.into(), number);
        }
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
            if entry.link_target.is_empty() || entry.link_target.len() > TARGET_LEN_MAX {
                return Err(format!("it is a symbolic link with a target of {} bytes", entry.link_target.len()));
            }
            (mode::SYMLINK, Content::Symlink(entry.link_target.clone()))
        }
        EntryKind::Character => (mode::CHARACTER, Content::None),
        EntryKind::Block => (mode::BLOCK, Content::None),
        EntryKind::Fifo => (mode::FIFO, Content::None),
        EntryKind::HardLink => unreachable!("a hard link has no node of its own"),
        EntryKind::Other(b'S') => return Err("it is an old GNU sparse file, which containerd refuses".to_owned()),
        EntryKind::Other(flag) => {
            return Err(format!("its type {:?} is unknown, containerd refuses it", char::from(flag)));
        }
    };
    let mut inode = blank_inode(file_type);
    inode.size = entry.size.into();
    if inode.is_device() {
        inode.payload = encode_device(entry.device).ok_or("its device number is too large")?.into();
    }
    Ok(Node { inode, xattrs: BTreeMap::new(), content })
}

/// Source: Linux include/linux/kdev_t.h, `new_encode_dev`.
fn encode_device((major, minor): (i64, i64)) -> Option<u32> {
    let major = u32::try_from(major).ok().filter(|major| *major < 1 << 12)?;
    let minor = u32::try_from(minor).ok().filter(|minor| *minor < 1 << 20)?;
    Some(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

fn set_mtime(inode: &mut Inode, time: Time) {
    let time = if (0..MTIME_SECONDS_MAX).contains(&time.seconds) { time } else { Time::default() };
    inode.mtime_seconds = time.seconds.cast_unsigned().into();
    inode.mtime_nanoseconds = time.nanoseconds.into();
}

/// Whether Linux file systems store extended attributes of this name; containerd drops all others.
fn is_xattr_name(name: &[u8]) -> bool {
    let has_prefix = [b"user.".as_slice(), b"trusted.", b"security."]
        .iter()
        .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
    (has_prefix || matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default")) && !name.contains(&0)
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
