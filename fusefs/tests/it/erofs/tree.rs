//! Merged trees made by hand, the layers' plain address spaces to them, and images of both.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use ::tree::erofs::{ImageSummary, write_image};
use format_spec::{
    Digest, Index, IndexBuilder, Inode,
    builder::blank_inode,
    records::{
        PLAIN_ALIGN,
        mode::{DIRECTORY, REGULAR, SYMLINK},
    },
};

/// Files up to this length have content everywhere, longer ones at both ends and zeros between.
pub(crate) const FULL_CONTENT_LEN_MAX: u64 = 1 << 20;
/// `fsck.erofs` reads the files of a tree that has at most so many bytes: it reads holes too.
const READ_LEN_MAX: u64 = 256 << 20;
/// Length of the content at each end of a longer file.
pub(crate) const END_LEN: u64 = 5000;

/// A tree under construction. Node 0 is the root directory.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    layer_count: usize,
}

#[derive(Debug, Clone)]
struct Node {
    inode: Inode,
    target: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    children: BTreeMap<Vec<u8>, usize>,
}

/// An inode with a time and owner that are its own.
pub(crate) fn inode(mode: u32) -> Inode {
    Inode {
        uid: 1000.into(),
        gid: 100.into(),
        mtime_seconds: 1_700_000_000.into(),
        mtime_nanoseconds: 123_456_789.into(),
        ..blank_inode(mode)
    }
}

/// A regular file of `len` bytes in `layer`.
pub(crate) fn file(layer: u32, len: u64) -> Inode {
    Inode { layer: layer.into(), size: len.into(), ..inode(REGULAR | 0o644) }
}

/// A directory.
pub(crate) fn directory() -> Inode {
    inode(DIRECTORY | 0o755)
}

impl Tree {
    /// A root directory over so many layers.
    pub(crate) fn new(layer_count: usize) -> Self {
        let mut tree = Self { nodes: Vec::new(), layer_count };
        tree.push(directory());
        tree
    }

    fn push(&mut self, inode: Inode) -> usize {
        self.nodes.push(Node { inode, target: Vec::new(), xattrs: BTreeMap::new(), children: BTreeMap::new() });
        self.nodes.len() - 1
    }

    /// Adds a node; one that had the name loses it.
    pub(crate) fn add(&mut self, directory: usize, name: impl AsRef<[u8]>, inode: Inode) -> usize {
        let node = self.push(inode);
        self.link(directory, name, node);
        node
    }

    /// Adds a symbolic link.
    pub(crate) fn add_symlink(&mut self, directory: usize, name: impl AsRef<[u8]>, target: &[u8]) -> usize {
        let node = self.add(directory, name, inode(SYMLINK | 0o777));
        self.nodes[node].target = target.to_vec();
        node
    }

    /// Gives a node another name.
    pub(crate) fn link(&mut self, directory: usize, name: impl AsRef<[u8]>, node: usize) {
        self.nodes[directory].children.insert(name.as_ref().to_vec(), node);
    }

    /// Gives a node an attribute.
    pub(crate) fn set_xattr(&mut self, node: usize, name: impl AsRef<[u8]>, value: &[u8]) {
        self.nodes[node].xattrs.insert(name.as_ref().to_vec(), value.to_vec());
    }

    /// Replaces what a node says of itself.
    pub(crate) fn set_inode(&mut self, node: usize, inode: Inode) {
        self.nodes[node].inode = inode;
    }

    /// The merged tree: content of each layer lies in the order in which the tree is walked, without gaps.
    pub(crate) fn build(&self) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::default();
        let mut numbers = BTreeMap::new();
        let mut plain_ends = vec![0; self.layer_count];
        let mut queue = std::collections::VecDeque::from([0]);
        numbers.insert(0, self.add_to(&mut builder, 0, &mut plain_ends));
        while let Some(directory) = queue.pop_front() {
            let mut children = Vec::new();
            for (name, node) in &self.nodes[directory].children {
                let number = match numbers.get(node) {
                    Some(number) => *number,
                    None => self.add_to(&mut builder, *node, &mut plain_ends),
                };
                numbers.insert(*node, number);
                if self.nodes[*node].inode.is_directory() {
                    queue.push_back(*node);
                }
                children.push((name, number));
            }
            builder.add_directory(numbers[&directory], children).unwrap();
        }
        let digests: Vec<_> = (0..self.layer_count).map(|layer| Digest::of(&layer.to_le_bytes())).collect();
        Index::open(builder.finish_tree(&digests).unwrap()).unwrap()
    }

    fn add_to(&self, builder: &mut IndexBuilder, node: usize, plain_ends: &mut [u64]) -> u32 {
        let Node { inode, target, xattrs, .. } = &self.nodes[node];
        let mut inode = *inode;
        if inode.is_regular() {
            let end = &mut plain_ends[inode.layer.get() as usize];
            inode.plain_offset = (*end).into();
            *end = (*end + inode.size.get()).next_multiple_of(PLAIN_ALIGN);
        }
        if inode.is_symlink() {
            inode.payload = builder.add_string(target).unwrap().into();
            inode.size = (target.len() as u64).into();
        }
        let xattrs = xattrs.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        inode.xattrs = builder.add_xattrs(xattrs).unwrap().into();
        builder.add_inode(inode).unwrap()
    }
}

/// The bytes at `offset` of a layer's plain address space, within a file.
pub(crate) fn content(layer: u32, offset: u64, len: u64) -> Vec<u8> {
    let byte = |offset: u64| {
        let word = (offset / 8 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(layer + 7);
        word.to_le_bytes()[(offset % 8) as usize]
    };
    (offset..offset + len).map(byte).collect()
}

/// The parts of a file that have content, as offsets in it and lengths.
pub(crate) fn content_parts(inode: &Inode) -> Vec<(u64, u64)> {
    match inode.size.get() {
        0 => vec![],
        len if len <= FULL_CONTENT_LEN_MAX => vec![(0, len)],
        len => vec![(0, END_LEN), (len - END_LEN, END_LEN)],
    }
}

/// Image and devices of a tree, in a directory of their own.
pub(crate) struct Files {
    pub(crate) image: PathBuf,
    pub(crate) devices: Vec<PathBuf>,
    pub(crate) summary: ImageSummary,
    pub(crate) directory: tempfile::TempDir,
}

impl Files {
    /// Writes all of them.
    pub(crate) fn of(tree: &Index<Vec<u8>>) -> Self {
        let directory = scratch();
        let image = directory.path().join("image");
        let summary = write_image(tree, File::create(&image).unwrap()).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), summary.image_len);
        let devices: Vec<_> = (0..tree.layers().len()).map(|layer| directory.path().join(layer.to_string())).collect();
        let files: Vec<_> = devices.iter().map(|path| File::create(path).unwrap()).collect();
        for inode in tree.inodes().iter().filter(|inode| inode.is_regular()) {
            let (layer, start) = (inode.layer.get(), inode.plain_offset.get());
            let end = (start + inode.size.get()).next_multiple_of(PLAIN_ALIGN);
            let device = &files[layer as usize];
            device.set_len(end.max(device.metadata().unwrap().len())).unwrap();
            for (offset, len) in content_parts(inode) {
                let bytes = content(layer, start + offset, len);
                device.write_all_at(&bytes, start + offset).unwrap();
            }
        }
        Self { image, devices, summary, directory }
    }

    /// Asserts that `fsck.erofs` accepts them and, unless that would take too long, can read every file.
    pub(crate) fn fsck(&self) {
        let mut command = Command::new("fsck.erofs");
        command.args(self.devices.iter().map(|path| format!("--device={}", path.display())));
        let len: u64 = self.devices.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        command.args((len <= READ_LEN_MAX).then_some("--extract"));
        let output = command.arg("-d3").arg(&self.image).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        assert!(!text.contains("<E>") && text.contains("No errors found"), "{text}");
    }
}

/// A directory on the file system of the build, which is not a stacked one.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}
