//! What a tree must be after its index passed the check: SPEC.md 6, asked from outside through lookups.

use std::collections::VecDeque;

use format_spec::{
    Index, Inode,
    limits::NAME_LEN_MAX,
    records::{WHITEOUT, mode},
};

/// Looks at everything that an index says, whatever its bytes are: nothing may panic.
///
/// Returns the number of things seen, so that nothing is optimised away.
pub(crate) fn look_at_everything<B: AsRef<[u8]>>(index: &Index<B>) -> usize {
    let mut seen = 0;
    for inode in index.inodes() {
        seen += index.symlink_target(inode).len();
        // A damaged index may let every inode name all attributes and all entries.
        seen += index.xattrs(inode).take(64).map(|(name, value)| name.len() + value.len()).sum::<usize>();
        for (name, number) in index.children(inode).take(64) {
            seen += name.len() + usize::from(index.inode(number).is_some());
            seen += usize::from(index.lookup(inode, name).is_some());
        }
        seen += usize::from(index.lookup(inode, b"name").is_some());
        for extent in index.extents_in_plain(&inode.plain_range()).take(64) {
            seen += index.frames_in_tar(&index.extents()[extent].tar_range()).len();
        }
    }
    for frame in index.frames() {
        seen += index.extents_in_tar(&frame.tar_range()).len();
    }
    seen + index.dedup().map_or(0, |_| 1) + index.layers().len() + index.hot_pieces().len()
}

/// Asserts the rules for an index that passed its check.
///
/// # Panics
///
/// When a rule does not hold.
pub(crate) fn assert_tree<B: AsRef<[u8]>>(index: &Index<B>) {
    let mut name_counts = vec![0u32; index.inodes().len()];
    let mut dirent_count = 0;
    let mut directories = VecDeque::from([0u32]);
    while let Some(number) = directories.pop_front() {
        let directory = index.inode(number).expect("a number that a dirent had");
        assert!(directory.is_directory());
        let mut previous: Option<&[u8]> = None;
        let mut subdirectory_count = 0;
        for (name, child_number) in index.children(directory) {
            dirent_count += 1;
            assert!(is_name(name), "{name:?}");
            assert!(previous < Some(name), "names ascend");
            previous = Some(name);
            assert_eq!(index.lookup(directory, name), Some(child_number));
            if child_number == WHITEOUT {
                continue;
            }
            let child = index.inode(child_number).expect("dirents name inodes");
            let count = &mut name_counts[child_number as usize];
            *count += 1;
            if *count == 1 {
                assert_eq!(child.parent.get(), number, "the parent has the first name of inode {child_number}");
            }
            if child.is_directory() {
                assert_eq!(*count, 1, "directory {child_number} has one name");
                subdirectory_count += 1;
                directories.push_back(child_number);
            }
        }
        assert_eq!(directory.nlink.get(), 2 + subdirectory_count, "links of directory {number}");
    }
    assert_eq!(dirent_count, index.dirents().len(), "every dirent is in the tree");
    for (inode, name_count) in index.inodes().iter().zip(name_counts) {
        assert!(inode.is_directory() || inode.nlink.get() == name_count, "{inode:?} has {name_count} names");
        assert_inode(index, inode);
    }
}

fn assert_inode<B: AsRef<[u8]>>(index: &Index<B>, inode: &Inode) {
    let target = index.symlink_target(inode);
    assert_eq!(inode.is_symlink(), !target.is_empty());
    assert!(target.len() <= 4095 && !target.contains(&0), "a target that no system call takes");
    let mut previous: Option<&[u8]> = None;
    for (name, value) in index.xattrs(inode) {
        assert!(!name.is_empty() && name.len() <= 255 && !name.contains(&0), "attribute {name:?}");
        assert!(value.len() <= 65536, "an attribute longer than XATTR_SIZE_MAX");
        assert!(previous < Some(name), "attributes ascend");
        previous = Some(name);
    }
    if inode.is_regular() && index.layers().len() == 0 {
        assert!(inode.plain_range().end <= index.space_len());
        let extents = &index.extents()[index.extents_in_plain(&inode.plain_range())];
        for extent in extents {
            assert!(!index.frames_in_tar(&extent.tar_range()).is_empty(), "frames hold every extent");
        }
    }
    assert_eq!(inode.mode.get() & !(mode::TYPE | 0o7777), 0);
}

fn is_name(name: &[u8]) -> bool {
    (1..=NAME_LEN_MAX).contains(&name.len())
        && !matches!(name, b"." | b"..")
        && !name.contains(&0)
        && !name.contains(&b'/')
}
