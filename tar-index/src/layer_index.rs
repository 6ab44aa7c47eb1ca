//! A layer's tree as an index: inodes numbered, files placed in the plain address space.

use std::collections::VecDeque;

use format_spec::{
    Extent, IndexBuilder,
    builder::BuildError,
    records::{PLAIN_ALIGN, WHITEOUT},
};

use crate::tree::{Content, LayerTree, ROOT};

/// What the index of a layer is made of, apart from its frames.
#[derive(Debug)]
pub struct LayerIndex {
    /// Inodes and directories.
    pub builder: IndexBuilder,
    /// Extents in tar order.
    pub extents: Vec<Extent>,
    /// Length of the plain address space, in bytes.
    pub space_len: u64,
    /// Number of inodes.
    pub inode_count: u64,
    /// Total length of regular files, in bytes.
    pub content_len: u64,
}

/// Numbers the inodes that have a name in the order in which the tar stream creates them, and gives
/// regular files their places in that order.
///
/// # Errors
///
/// When a limit of the format is exceeded.
pub fn build_index(tree: LayerTree) -> Result<LayerIndex, BuildError> {
    let is_named = named_nodes(&tree);
    let mut builder = IndexBuilder::default();
    let mut extents = Vec::new();
    let (mut plain_offset, mut next_offset, mut content_len) = (0u64, 0u64, 0u64);
    let mut numbers = vec![WHITEOUT; is_named.len()];
    let mut directories = Vec::new();
    for (node_number, (node, is_named)) in tree.into_nodes().into_iter().zip(is_named).enumerate() {
        if !is_named {
            continue;
        }
        let mut inode = node.inode;
        match node.content {
            Content::File { tar_offset, segments } => {
                let size = inode.size.get();
                plain_offset = next_offset;
                next_offset = size
                    .checked_add(plain_offset)
                    .and_then(|end| end.checked_next_multiple_of(PLAIN_ALIGN))
                    .filter(|end| *end <= u64::MAX / 2)
                    .ok_or(BuildError("files of more than 8 EiB"))?;
                content_len += size;
                match segments {
                    None => push_extent(&mut extents, tar_offset, plain_offset, size),
                    Some(segments) => {
                        let mut tar_offset = tar_offset;
                        for segment in segments {
                            push_extent(&mut extents, tar_offset, plain_offset + segment.offset, segment.len);
                            tar_offset += segment.len;
                        }
                    }
                }
            }
            Content::Symlink(target) => {
                inode.payload = builder.add_string(&target)?.into();
                inode.size = (target.len() as u64).into();
            }
            Content::Directory(children) => directories.push((node_number, children)),
            Content::None => {}
        }
        // The last file's offset once more where there is no file: it compresses to nothing.
        inode.plain_offset = plain_offset.into();
        inode.xattrs = builder.add_xattrs(node.xattrs.into_iter().collect())?.into();
        numbers[node_number] = builder.add_inode(inode)?;
    }
    let inode_count = numbers.iter().filter(|number| **number != WHITEOUT).count() as u64;
    add_directories(&mut builder, &numbers, directories)?;
    Ok(LayerIndex { builder, extents, space_len: next_offset, inode_count, content_len })
}

fn push_extent(extents: &mut Vec<Extent>, tar_offset: u64, plain_offset: u64, len: u64) {
    if len > 0 {
        extents.push(Extent { tar_offset: tar_offset.into(), plain_offset: plain_offset.into(), len: len.into() });
    }
}

/// Which nodes can be reached from the root: replaced entries cannot.
fn named_nodes(tree: &LayerTree) -> Vec<bool> {
    let mut is_named = vec![false; tree.node_count()];
    is_named[ROOT as usize] = true;
    let mut directories = vec![ROOT];
    while let Some(directory) = directories.pop() {
        for child in tree.directory(directory).into_iter().flat_map(|children| children.values()) {
            if *child != WHITEOUT && !std::mem::replace(&mut is_named[*child as usize], true) {
                directories.push(*child);
            }
        }
    }
    is_named
}

type Children = std::collections::BTreeMap<Box<[u8]>, u32>;

/// Adds all directories breadth first, as the builder wants them.
fn add_directories(
    builder: &mut IndexBuilder,
    numbers: &[u32],
    directories: Vec<(usize, Children)>,
) -> Result<(), BuildError> {
    let mut by_node: Vec<Option<Children>> = (0..numbers.len()).map(|_| None).collect();
    for (node_number, children) in directories {
        by_node[node_number] = Some(children);
    }
    let mut pending = VecDeque::from([ROOT]);
    while let Some(directory) = pending.pop_front() {
        let Some(children) = by_node[directory as usize].take() else { continue };
        pending.extend(children.values().filter(|child| **child != WHITEOUT));
        let number_of = |child: u32| numbers.get(child as usize).copied().unwrap_or(WHITEOUT);
        let children = children.into_iter().map(|(name, child)| (name, number_of(child)));
        builder.add_directory(numbers[directory as usize], children)?;
    }
    Ok(())
}
