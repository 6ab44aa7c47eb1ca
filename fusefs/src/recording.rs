//! Which files of a tree were read, and which of their bytes: the recording of a start, in the order of first touch.

use std::{collections::HashMap, ops::Range, time::Instant};

use format_spec::{Index, paths::Paths};
use storage::Layer;

use crate::tree::Tree;

/// A file of which something was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TouchedFile {
    /// Absolute path in the image.
    pub path: Vec<u8>,
    /// Its bytes that were read, in the order of first touch; they do not overlap.
    pub ranges: Vec<Range<u64>>,
}

/// The files of a tree of which something was read since it was opened, in the order of first touch.
///
/// Seen is what reaches this process. The kernel answers the rest by itself: pages that it keeps, and in kernel mode
/// everything of layers that were complete when the tree was mounted.
pub(crate) fn touched_files(tree: &Tree) -> Vec<TouchedFile> {
    touched_in(tree, |_, _| true)
}

/// The same of reads that count: `counts` is asked about the number of the layer and the time.
pub(crate) fn touched_in(tree: &Tree, counts: impl Fn(u32, Instant) -> bool) -> Vec<TouchedFile> {
    let mut touches: Vec<(Instant, u32, Range<u64>)> = Vec::new();
    for (number, layer) in (0_u32..).zip(&tree.layers) {
        let counted = touches_of(layer).filter(|(at, _)| counts(number, *at));
        touches.extend(counted.map(|(at, plain)| (at, number, plain)));
    }
    // Stable: what one read touched stays in order.
    touches.sort_by_key(|(at, ..)| *at);
    files_of(&tree.index, touches.into_iter().map(|(_, layer, plain)| (layer, plain)))
}

fn touches_of(layer: &Layer) -> impl Iterator<Item = (Instant, Range<u64>)> {
    layer.touches().into_iter().map(|touch| (touch.at, touch.plain))
}

/// Ranges of layers' plain address spaces as files.
fn files_of<B: AsRef<[u8]>>(tree: &Index<B>, touches: impl IntoIterator<Item = (u32, Range<u64>)>) -> Vec<TouchedFile> {
    let owners = owners(tree);
    let mut places = HashMap::new();
    let mut files: Vec<(u32, Vec<Range<u64>>)> = Vec::new();
    for (layer, plain) in touches {
        let Some(owners) = owners.get(layer as usize) else { continue };
        let first = owners.partition_point(|(file, _)| file.end <= plain.start);
        for (file, inode) in owners.iter().skip(first).take_while(|(file, _)| file.start < plain.end) {
            let place = *places.entry(*inode).or_insert_with(|| {
                files.push((*inode, Vec::new()));
                files.len() - 1
            });
            let range = plain.start.max(file.start) - file.start..plain.end.min(file.end) - file.start;
            if let Some((_, ranges)) = files.get_mut(place) {
                ranges.push(range);
            }
        }
    }
    let paths = Paths::new(tree);
    files.into_iter().map(|(inode, ranges)| TouchedFile { path: paths.path_bytes(inode), ranges }).collect()
}

/// For each layer the regular files of the tree that have their content there, by where it lies, ascending.
fn owners<B: AsRef<[u8]>>(tree: &Index<B>) -> Vec<Vec<(Range<u64>, u32)>> {
    let mut owners = vec![Vec::new(); tree.layers().len()];
    for (number, inode) in (0_u32..).zip(tree.inodes()) {
        let plain = inode.plain_range();
        if let Some(files) = owners.get_mut(inode.layer.get() as usize)
            && inode.is_regular()
            && !plain.is_empty()
        {
            files.push((plain, number));
        }
    }
    owners.iter_mut().for_each(|files| files.sort_by_key(|(plain, _)| plain.start));
    owners
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, IndexBuilder, builder::implicit_directory};

    use super::*;

    /// `/a` (5000 bytes) of layer 0 at 4096, `/d/b` (10 bytes) of layer 1 at 0, `/d/c` the same inode as `/a`.
    fn tree() -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::default();
        let file = |parent: u32, layer: u32, offset: u64, len: u64| {
            let mut inode = implicit_directory();
            inode.parent = parent.into();
            inode.mode = (0o100_644).into();
            inode.layer = layer.into();
            inode.plain_offset = offset.into();
            inode.size = len.into();
            inode
        };
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_inode(file(0, 0, 4096, 5000)).unwrap();
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_inode(file(2, 1, 0, 10)).unwrap();
        builder.add_directory(0, [(&b"a"[..], 1), (b"d", 2)]).unwrap();
        builder.add_directory(2, [(&b"b"[..], 3), (b"c", 1)]).unwrap();
        Index::open(builder.finish_tree(&[Digest::of(b"low"), Digest::of(b"high")]).unwrap()).unwrap()
    }

    #[test]
    fn touched_ranges_become_files_in_the_order_of_first_touch() {
        let touches = [(1, 0..4), (1, 4..4096), (0, 8192..16_384), (0, 0..8192), (1, 4096..8192), (7, 0..10)];
        let file = |path: &str, ranges: &[Range<u64>]| TouchedFile { path: path.into(), ranges: ranges.to_vec() };
        assert_eq!(files_of(&tree(), touches), [file("/d/b", &[0..4, 4..10]), file("/a", &[4096..5000, 0..4096])]);
        assert_eq!(files_of(&tree(), []), []);
    }
}
