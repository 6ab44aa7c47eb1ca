//! What of a layer is being fetched now, in the words of who looks at it: which files do readers wait for?

use std::collections::BTreeSet;

use control::Reading;
use format_spec::Index;
use storage::Layer;

/// Awaited frames that are looked at: bounds the work for a reader of everything.
const FRAMES_MAX: usize = 64;
/// Files that are named.
const FILES_MAX: usize = 8;
/// Longest path that is named, in directories.
const DEPTH_MAX: usize = 256;

/// Looks at one layer.
pub(crate) fn reading(layer: &Layer) -> Reading {
    let activity = layer.activity();
    let frames = activity.frames_awaited.iter().take(FRAMES_MAX);
    // The first file of a frame: the others lie in it because they are small.
    let offsets = frames.filter_map(|frame| layer.frame_runs(*frame).next()).map(|run| run.start);
    let files = files_at(layer.index(), offsets);
    Reading {
        frames_wanted: activity.frames_wanted,
        frames_under_way: activity.frames_under_way,
        frames_awaited: activity.frames_awaited.len() as u64,
        files: files.into_iter().filter_map(|file| path_of(layer.index(), file)).collect(),
    }
}

/// The inodes whose content lies at these offsets of the plain address space, a few of them.
fn files_at<B: AsRef<[u8]>>(index: &Index<B>, offsets: impl Iterator<Item = u64>) -> BTreeSet<u32> {
    let inodes = index.inodes();
    let owner = |offset: u64| {
        // Inodes stand in the order of their content; those without any carry the offset of the one before.
        let after = inodes.partition_point(|inode| inode.plain_offset.get() <= offset);
        let candidates = inodes.get(..after)?.iter().enumerate().rev();
        let mut owners = candidates.filter(|(_, inode)| inode.is_regular() && inode.plain_range().contains(&offset));
        owners.next().and_then(|(number, _)| u32::try_from(number).ok())
    };
    let mut found = BTreeSet::new();
    for number in offsets.filter_map(owner) {
        found.insert(number);
        if found.len() == FILES_MAX {
            break;
        }
    }
    found
}

/// The path of an inode, by its parents; `None` in an index that was never checked.
fn path_of<B: AsRef<[u8]>>(index: &Index<B>, mut number: u32) -> Option<String> {
    let mut names = Vec::new();
    while number != 0 {
        let parent = index.inode(number)?.parent.get();
        let mut children = index.children(index.inode(parent)?);
        let (name, _) = children.find(|(_, child)| *child == number)?;
        names.push(String::from_utf8_lossy(name).into_owned());
        if names.len() > DEPTH_MAX {
            return None;
        }
        number = parent;
    }
    names.push(String::new());
    names.reverse();
    Some(names.join("/"))
}

#[cfg(test)]
mod tests {
    use format_spec::{IndexBuilder, builder::implicit_directory};

    use super::*;

    /// `/a` and `/sub/b`, 4 KiB and 10 bytes long.
    fn index() -> Index<Vec<u8>> {
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
        let paths = |offsets: &[u64]| -> Vec<_> {
            let files = files_at(&index, offsets.iter().copied());
            files.into_iter().map(|file| path_of(&index, file).unwrap()).collect()
        };
        assert_eq!(paths(&[0]), ["/a"]);
        assert_eq!(paths(&[4096]), ["/sub/b"]);
        assert_eq!(paths(&[4100, 4095, 100]), ["/a", "/sub/b"]);
        assert_eq!(paths(&[4106, 1 << 40]), [""; 0]);
    }
}
