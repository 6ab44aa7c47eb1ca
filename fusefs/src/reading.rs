//! The reads of a layer that wait now, in the words of who looks at it: which files do readers wait for,
//! since when and why?

use std::{collections::BTreeSet, time::Instant};

use control::{Reading, WaitingRead};
use format_spec::Index;
use storage::Layer;

/// Reads that are looked at: bounds the work for a container of many threads.
const READS_MAX: usize = 64;
/// Files that are named.
const FILES_MAX: usize = 8;
/// Longest path that is named, in directories.
const DEPTH_MAX: usize = 256;
/// Longest path that is named, in bytes, as the kernel takes them; those that JSON needs for a character count.
const PATH_LEN_MAX: usize = 4095;
/// Stands for the directories that a path is too long to name.
const CUT: &str = "…";

/// Looks at one layer at the time `now`.
pub(crate) fn reading(layer: &Layer, now: Instant) -> Reading {
    let activity = layer.activity();
    let reads = waiting_reads(layer.index(), &activity.reads, now);
    if !activity.reads.is_empty() {
        layer.index().backing().release();
    }
    Reading {
        frames_wanted: activity.frames_wanted,
        frames_under_way: activity.frames_under_way,
        frames_awaited: activity.frames_awaited.len() as u64,
        files: reads.iter().map(|read| read.path.clone()).collect(),
        reads,
        failure: activity.failure,
        is_paused: activity.is_paused,
    }
}

/// The first read of each file, longest first, a few of them; `reads` are in that order.
fn waiting_reads<B: AsRef<[u8]>>(index: &Index<B>, reads: &[storage::WaitingRead], now: Instant) -> Vec<WaitingRead> {
    let mut files = BTreeSet::new();
    let mut told = Vec::new();
    for read in reads.iter().take(READS_MAX) {
        let Some(file) = file_at(index, read.offset).filter(|file| files.insert(*file)) else { continue };
        let waiting = now.saturating_duration_since(read.since);
        let waiting_ms = u64::try_from(waiting.as_millis()).unwrap_or(u64::MAX);
        told.extend(path_of(index, file).map(|path| WaitingRead { path, waiting_ms }));
        if files.len() == FILES_MAX {
            break;
        }
    }
    told
}

/// The inode whose content lies at an offset of the plain address space.
pub(crate) fn file_at<B: AsRef<[u8]>>(index: &Index<B>, offset: u64) -> Option<u32> {
    let inodes = index.inodes();
    // Inodes stand in the order of their content; those without any carry the offset of the one before.
    let after = inodes.partition_point(|inode| inode.plain_offset.get() <= offset);
    let candidates = inodes.get(..after)?.iter().enumerate().rev();
    let mut owners = candidates.filter(|(_, inode)| inode.is_regular() && inode.plain_range().contains(&offset));
    owners.next().and_then(|(number, _)| u32::try_from(number).ok())
}

/// The path of an inode, by its parents, or the end of a long one; `None` in an index that was never checked.
pub(crate) fn path_of<B: AsRef<[u8]>>(index: &Index<B>, mut number: u32) -> Option<String> {
    let (mut names, mut budget) = (Vec::new(), PATH_LEN_MAX - CUT.len());
    while number != 0 {
        let parent = index.inode(number)?.parent.get();
        let mut children = index.children(index.inode(parent)?);
        let (name, _) = children.find(|(_, child)| *child == number)?;
        let left = (names.len() < DEPTH_MAX).then(|| after_name(budget, name)).flatten();
        let Some(left) = left else { return Some(joined(names, CUT)) };
        budget = left;
        names.push(String::from_utf8_lossy(name).into_owned());
        number = parent;
    }
    Some(joined(names, ""))
}

/// The part of a budget that a name and the slash before it leave; `None` when it is too small.
fn after_name(budget: usize, name: &[u8]) -> Option<usize> {
    let left = budget.checked_sub(1)?;
    // Names of an index that was never checked may be longer than any.
    if name.len() > left {
        return None;
    }
    left.checked_sub(String::from_utf8_lossy(name).chars().map(json_len).sum())
}

/// Bytes of a character in a text of JSON.
fn json_len(letter: char) -> usize {
    match letter {
        '"' | '\\' => 2,
        '\0'..'\u{20}' => 6,
        _ => letter.len_utf8(),
    }
}

/// The path of these names, the last one first, behind what stands for those above them.
fn joined(mut names: Vec<String>, above: &str) -> String {
    names.push(above.to_owned());
    names.reverse();
    names.join("/")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use format_spec::{IndexBuilder, builder::implicit_directory};

    use super::*;

    /// `/a` and `/sub/b`, 4 KiB and 10 bytes long.
    pub(crate) fn index() -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::default();
        let file = |parent: u32, offset: u64, len: u64| {
            let mut inode = implicit_directory();
            inode.parent = parent.into();
            inode.mode = (0o100_644).into();
            inode.plain_offset = offset.into();
            inode.size = len.into();
            inode
        };
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_inode(file(0, 0, 4096)).unwrap();
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_inode(file(2, 4096, 10)).unwrap();
        builder.add_directory(0, [(&b"a"[..], 1), (b"sub", 2)]).unwrap();
        builder.add_directory(2, [(&b"b"[..], 3)]).unwrap();
        Index::open(builder.finish_tree(&[format_spec::Digest::of(b"layer")]).unwrap()).unwrap()
    }

    #[test]
    fn an_offset_leads_to_the_path_of_its_file() {
        let index = index();
        let path = |offset| file_at(&index, offset).and_then(|file| path_of(&index, file));
        assert_eq!(path(0).as_deref(), Some("/a"));
        assert_eq!(path(4095).as_deref(), Some("/a"));
        assert_eq!(path(4096).as_deref(), Some("/sub/b"));
        assert_eq!([4106, 1 << 40].map(path), [None, None]);
    }

    /// A file below directories, all of one name.
    fn nested(name: &[u8], depth: u32) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        for number in 1..=depth {
            let mut inode = implicit_directory();
            inode.parent = (number - 1).into();
            if number == depth {
                (inode.mode, inode.size) = ((0o100_644).into(), 10.into());
            }
            builder.add_inode(inode).unwrap();
        }
        (0..depth).for_each(|number| builder.add_directory(number, [(name, number + 1)]).unwrap());
        Index::open(builder.finish_tree(&[format_spec::Digest::of(b"layer")]).unwrap()).unwrap()
    }

    #[test]
    fn a_path_takes_no_more_than_4095_bytes_of_an_answer() {
        for (name, count) in [(&[1; 255][..], 2), (&[b'n'; 255], 15), (b"n", 256)] {
            let path = path_of(&nested(name, 300), 300).unwrap();
            let told = serde_json::to_string(&path).unwrap();
            assert!(told.len() <= 4095 + 2, "{} bytes", told.len());
            let name = format!("/{}", str::from_utf8(name).unwrap());
            assert_eq!(path, format!("…{}", name.repeat(count)));
        }
        let whole = path_of(&nested(&[b'n'; 255], 15), 15).unwrap();
        assert!(whole.starts_with("/nnn") && whole.len() == 15 * 256, "{whole}");
    }

    #[test]
    fn a_file_is_named_once_with_the_age_of_its_oldest_read() {
        let start = Instant::now();
        let read = |seconds, offset| storage::WaitingRead { since: start + Duration::from_secs(seconds), offset };
        let reads = [read(1, 4100), read(2, 0), read(3, 4096), read(9, 100)];
        let told = waiting_reads(&index(), &reads, start + Duration::from_secs(5));
        let told: Vec<_> = told.iter().map(|read| (read.path.as_str(), read.waiting_ms)).collect();
        assert_eq!(told, [("/sub/b", 4000), ("/a", 3000)]);
    }
}
