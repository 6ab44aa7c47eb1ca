//! Which files of a tree were read, and which of their bytes: the recording of a start, in the order of first touch.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    time::Instant,
};

use format_spec::{Index, Inode};
use storage::Layer;

use crate::tree::Tree;

/// Longest path that a system call takes: `PATH_MAX` less its final zero. Indexes may have longer ones, without bound.
const PATH_LEN_MAX: usize = 4095;
/// A name and the slash before it have as many bytes at least.
const PART_LEN_MIN: usize = 2;
/// Bytes that a file counts besides those of its path, and those of a range: no line of a record is shorter.
const FILE_LEN: usize = 32;
const RANGE_LEN: usize = size_of::<Range<u64>>();
/// Bytes of paths and ranges that somebody gets who records one start: he looks at it once, and then keeps it.
const TOUCHED_LEN_MAX: usize = 64 << 20;

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
    touched_in(tree, TOUCHED_LEN_MAX, |_, _| true)
}

/// The same of reads that count: `counts` is asked about the number of the layer and the time. It ends in the order of
/// first touch where paths and ranges have more than `len_max` bytes, and takes a few times as many while it works.
pub(crate) fn touched_in(tree: &Tree, len_max: usize, counts: impl Fn(u32, Instant) -> bool) -> Vec<TouchedFile> {
    let count_max = len_max / FILE_LEN;
    let mut touches: Vec<(Instant, u32, Range<u64>)> = Vec::new();
    let keep_first = |touches: &mut Vec<(Instant, u32, Range<u64>)>| {
        // Stable: what one read touched stays in order.
        touches.sort_by_key(|(at, ..)| *at);
        touches.truncate(count_max);
    };
    for (number, layer) in (0_u32..).zip(&tree.layers) {
        let counted = touches_of(layer).filter(|(at, _)| counts(number, *at));
        touches.extend(counted.map(|(at, plain)| (at, number, plain)));
        if touches.len() > 2 * count_max {
            keep_first(&mut touches);
        }
    }
    keep_first(&mut touches);
    let touches: Vec<_> = touches.into_iter().map(|(_, layer, plain)| (layer, plain)).collect();
    files_of(&tree.index, &touches, len_max)
}

fn touches_of(layer: &Layer) -> impl Iterator<Item = (Instant, Range<u64>)> {
    layer.touches().into_iter().map(|touch| (touch.at, touch.plain))
}

/// Ranges of layers' plain address spaces as files; those of one layer do not overlap.
///
/// Whatever the tree says: nothing that is made here grows with it, but with `len_max`.
fn files_of<B: AsRef<[u8]>>(tree: &Index<B>, touches: &[(u32, Range<u64>)], len_max: usize) -> Vec<TouchedFile> {
    let found = first_touched(tree, touches, len_max / FILE_LEN);
    let names = Names::of(tree, &found, len_max);
    let place = |number: &u32| tree.inode(*number).map(|inode| (inode.layer.get(), inode.plain_range(), *number));
    let mut owners: Vec<_> = names.files.iter().filter_map(place).collect();
    owners.sort_unstable_by_key(|(layer, plain, _)| (*layer, plain.start));

    let mut places = HashMap::new();
    let mut files: Vec<TouchedFile> = Vec::new();
    let mut left = len_max;
    for (layer, plain) in touches {
        let first = owners.partition_point(|(of, file, _)| (*of, file.end) <= (*layer, plain.start));
        let touched = owners.iter().skip(first).take_while(|(of, file, _)| of == layer && file.start < plain.end);
        for (_, file, inode) in touched {
            let place = match places.entry(*inode) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let path = names.path(*inode);
                    let Some(rest) = left.checked_sub(path.as_ref().map_or(0, |path| FILE_LEN + path.len())) else {
                        return files;
                    };
                    left = rest;
                    *new.insert(path.map(|path| {
                        files.push(TouchedFile { path, ranges: Vec::new() });
                        files.len() - 1
                    }))
                }
            };
            let Some(touched) = place.and_then(|place| files.get_mut(place)) else { continue };
            let Some(rest) = left.checked_sub(RANGE_LEN) else {
                files.retain(|file| !file.ranges.is_empty());
                return files;
            };
            left = rest;
            touched.ranges.push(plain.start.max(file.start) - file.start..plain.end.min(file.end) - file.start);
        }
    }
    files
}

/// The regular files that have content in these ranges, in the order of first touch; the first ones of too many.
fn first_touched<B: AsRef<[u8]>>(tree: &Index<B>, touches: &[(u32, Range<u64>)], count_max: usize) -> Vec<u32> {
    let mut sorted: Vec<_> = (0_u32..).zip(touches).map(|(number, (layer, plain))| (*layer, plain, number)).collect();
    sorted.sort_unstable_by_key(|(layer, plain, _)| (*layer, plain.start));
    let mut found: Vec<(u32, u64, u32)> = Vec::new();
    for (number, inode) in (0_u32..).zip(tree.inodes()).filter(|(_, inode)| inode.is_regular()) {
        let (layer, file) = (inode.layer.get(), inode.plain_range());
        let first = sorted.partition_point(|(of, plain, _)| (*of, plain.end) <= (layer, file.start));
        let touches = sorted.iter().skip(first).take_while(|(of, plain, _)| *of == layer && plain.start < file.end);
        found.extend(touches.map(|(.., touch)| *touch).min().map(|touch| (touch, file.start, number)));
        if found.len() > 2 * count_max {
            found.sort_unstable();
            found.truncate(count_max);
        }
    }
    found.sort_unstable();
    found.truncate(count_max);
    found.into_iter().map(|(.., number)| number).collect()
}

/// The first names of files and of the directories above them.
struct Names<'t, B> {
    tree: &'t Index<B>,
    /// The files, in the order that they were given.
    files: Vec<u32>,
    /// Directory and inode of each name, ascending, and the numbers of their dirents.
    inodes: Vec<(u32, u32)>,
    dirents: Vec<Option<u32>>,
}

impl<'t, B: AsRef<[u8]>> Names<'t, B> {
    /// Of the first files whose paths have not more than `len_max` bytes together, without those that are too deep.
    fn of(tree: &'t Index<B>, found: &[u32], len_max: usize) -> Self {
        let (mut files, mut inodes) = (Vec::new(), Vec::new());
        let mut left = len_max / PART_LEN_MIN;
        for file in found {
            let count = up_from(tree, *file).take(PATH_LEN_MAX / PART_LEN_MIN + 1).count();
            if count > PATH_LEN_MAX / PART_LEN_MIN {
                continue;
            }
            let Some(rest) = left.checked_sub(count) else { break };
            left = rest;
            files.push(*file);
            inodes.extend(up_from(tree, *file));
        }
        inodes.sort_unstable();
        inodes.dedup();
        let mut dirents = vec![None; inodes.len()];
        let mut first = 0;
        for wanted in inodes.chunk_by(|(directory, _), (other, _)| directory == other) {
            let found = dirents.get_mut(first..first + wanted.len()).unwrap_or_default();
            first += wanted.len();
            let directory = wanted.first().and_then(|(directory, _)| tree.inode(*directory));
            for number in directory.filter(|inode| inode.is_directory()).map(Inode::dirent_range).into_iter().flatten()
            {
                let Some(child) = tree.dirents().get(number).map(|dirent| dirent.inode.get()) else { break };
                if let Ok(at) = wanted.binary_search_by_key(&child, |(_, inode)| *inode)
                    && let Some(name @ None) = found.get_mut(at)
                {
                    *name = u32::try_from(number).ok();
                }
            }
        }
        Self { tree, files, inodes, dirents }
    }

    /// The path of a file; `None` if it is longer than any that somebody could open.
    fn path(&self, file: u32) -> Option<Vec<u8>> {
        let (mut names, mut len) = (Vec::new(), 0);
        for part in up_from(self.tree, file) {
            let dirent = *self.dirents.get(self.inodes.binary_search(&part).ok()?)?;
            let name = self.tree.name(usize::try_from(dirent?).ok()?);
            len += 1 + name.len();
            if len > PATH_LEN_MAX {
                return None;
            }
            names.push(name);
        }
        let mut path = Vec::with_capacity(len);
        for name in names.into_iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        Some(path)
    }
}

/// Directory and inode for each part of an inode's first path, from its end on.
fn up_from<B: AsRef<[u8]>>(tree: &Index<B>, inode: u32) -> impl Iterator<Item = (u32, u32)> {
    let part = |inode: u32| Some((tree.inode(inode).filter(|_| inode != 0)?.parent.get(), inode));
    std::iter::successors(part(inode), move |(directory, _)| part(*directory))
}

#[cfg(test)]
pub(crate) mod tests {
    use format_spec::{Digest, IndexBuilder, builder::implicit_directory};

    use super::*;

    /// `/a` (5000 bytes) of layer 0 at 4096, `/d/b` (10 bytes) of layer 1 at 0, `/d/c` the same inode as `/a`, or a file of
    /// layer 1 with this offset and length.
    pub(crate) fn tree(own: Option<(u64, u64)>) -> Index<Vec<u8>> {
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
        own.map(|(offset, len)| builder.add_inode(file(2, 1, offset, len)).unwrap());
        let c = if own.is_some() { 4 } else { 1 };
        builder.add_directory(0, [(&b"a"[..], 1), (b"d", 2)]).unwrap();
        builder.add_directory(2, [(&b"b"[..], 3), (b"c", c)]).unwrap();
        Index::open(builder.finish_tree(&[Digest::of(b"low"), Digest::of(b"high")]).unwrap()).unwrap()
    }

    #[test]
    fn touched_ranges_become_files_in_the_order_of_first_touch() {
        let touches = [(1, 0..4), (1, 4..4096), (0, 8192..16_384), (0, 0..8192), (1, 4096..8192), (7, 0..10)];
        let file = |path: &str, ranges: &[Range<u64>]| TouchedFile { path: path.into(), ranges: ranges.to_vec() };
        assert_eq!(
            files_of(&tree(None), &touches, 1000),
            [file("/d/b", &[0..4, 4..10]), file("/a", &[4096..5000, 0..4096])]
        );
        assert_eq!(files_of(&tree(None), &[], 1000), []);
    }

    #[test]
    fn a_record_takes_little_memory_however_deep_and_many_the_files_of_an_index_are() {
        const DEPTH: u32 = 10_000;
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        let mut touches = Vec::new();
        for number in 0..DEPTH {
            let mut file = implicit_directory();
            file.mode = (0o100_644).into();
            file.plain_offset = (u64::from(number) * 4096).into();
            file.size = 4096.into();
            builder.add_inode(file).unwrap();
            builder.add_inode(implicit_directory()).unwrap();
            touches.push((0, u64::from(number) * 4096..u64::from(number + 1) * 4096));
        }
        // Each directory has a file and the next directory: the last path has two and a half megabytes.
        let long = [b'd'; 254];
        for number in 0..DEPTH {
            let directory = 2 * number;
            builder.add_directory(directory, [(&long[..], directory + 2), (b"file", directory + 1)]).unwrap();
        }
        builder.add_directory(2 * DEPTH, [] as [(&[u8], u32); 0]).unwrap();
        let tree = Index::open(builder.finish_tree(&[Digest::of(b"layer")]).unwrap()).unwrap();
        let files = files_of(&tree, &touches, 1 << 20);
        let lens: Vec<_> = files.iter().map(|file| file.path.len()).collect();
        let expected: Vec<_> = (0..=16).map(|depth| depth * 255 + 5).collect();
        assert_eq!(lens, expected);
        assert!(files.iter().all(|file| file.path.ends_with(b"/file") && file.ranges.first() == Some(&(0..4096))));
        // Deepest first: what cannot be opened costs this tree its record, and nobody more memory.
        touches.reverse();
        let names = Names::of(&tree, &first_touched(&tree, &touches, 1 << 15), 1 << 20);
        assert!((1..=1 << 19).contains(&names.inodes.len()), "{}", names.inodes.len());
        assert!(files_of(&tree, &touches, 1 << 20).len() <= 17);

        // It ends where it would be too long, in the order of first touch.
        touches.reverse();
        let three: usize = expected.iter().take(3).map(|len| len + FILE_LEN + RANGE_LEN).sum();
        let shallow = touches.get(..16).unwrap();
        assert_eq!([three, three - 1, 0].map(|len_max| files_of(&tree, shallow, len_max).len()), [3, 2, 0]);
    }
}
