//! A mounted tree against the merged tree it was made of, field by field.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
};

use format_spec::{Index, Inode, records::mode};

use super::tree::{content, content_parts};

/// Asserts that the directory `root` shows exactly the tree.
pub(crate) fn assert_shows(root: &Path, tree: &Index<Vec<u8>>) {
    let mut shown_numbers = HashMap::new();
    assert_node(root, tree, 0, &mut shown_numbers);
}

/// Everything `stat` says, apart from what the file system chooses itself.
#[derive(Debug, PartialEq)]
struct Stat {
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u64,
    size: Option<u64>,
    mtime: (i64, i64),
    rdev: (u32, u32),
}

impl Stat {
    fn expected(inode: &Inode) -> Self {
        let device = if inode.is_device() { inode.payload.get() } else { 0 };
        Self {
            mode: inode.mode.get(),
            uid: inode.uid.get(),
            gid: inode.gid.get(),
            nlink: inode.nlink.get().into(),
            size: (!inode.is_directory()).then_some(inode.size.get()),
            mtime: (inode.mtime_seconds(), inode.mtime_nanoseconds.get().into()),
            rdev: (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00),
        }
    }

    fn shown(metadata: &fs::Metadata) -> Self {
        Self {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            nlink: metadata.nlink(),
            size: (!metadata.is_dir()).then_some(metadata.size()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            rdev: (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
        }
    }
}

fn assert_node(path: &Path, tree: &Index<Vec<u8>>, number: u32, shown_numbers: &mut HashMap<u64, u32>) {
    let inode = tree.inode(number).unwrap();
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(Stat::shown(&metadata), Stat::expected(inode), "{}", path.display());
    let first = *shown_numbers.entry(metadata.ino()).or_insert(number);
    assert_eq!(first, number, "{}: st_ino stands for two inodes", path.display());
    let xattrs: BTreeMap<_, _> = xattr::list(path)
        .unwrap()
        .map(|name| (name.as_bytes().to_vec(), xattr::get(path, &name).unwrap().unwrap()))
        .collect();
    let expected = tree.xattrs(inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(xattrs, expected, "{}", path.display());
    match inode.file_type() {
        mode::SYMLINK => {
            assert_eq!(fs::read_link(path).unwrap().into_os_string().into_vec(), tree.symlink_target(inode));
        }
        mode::REGULAR => assert_content(path, inode),
        mode::DIRECTORY => assert_directory(path, tree, inode, shown_numbers),
        _ => {}
    }
}

fn assert_content(path: &Path, inode: &Inode) {
    let file = File::open(path).unwrap();
    for (offset, len) in content_parts(inode) {
        let mut shown = vec![0; len as usize];
        file.read_exact_at(&mut shown, offset).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let expected = content(inode.layer.get(), inode.plain_offset.get() + offset, len);
        assert!(shown == expected, "{}: content differs after {offset}", path.display());
    }
    assert_eq!(file.read_at(&mut [0], inode.size.get()).unwrap(), 0, "{}: does not end", path.display());
}

fn assert_directory(path: &Path, tree: &Index<Vec<u8>>, inode: &Inode, shown_numbers: &mut HashMap<u64, u32>) {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        names.push((entry.file_name().into_vec(), type_bits(entry.file_type().unwrap())));
    }
    // In the order in which the kernel lists them: ascending, like those of the tree.
    let expected: Vec<_> =
        tree.children(inode).map(|(name, child)| (name.to_vec(), tree.inode(child).unwrap().file_type())).collect();
    assert_eq!(names, expected, "{}", path.display());
    for (name, child) in tree.children(inode) {
        assert_node(&path.join(OsStr::from_bytes(name)), tree, child, shown_numbers);
    }
    let absent = path.join("no such name");
    assert_eq!(fs::symlink_metadata(absent).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

fn type_bits(file_type: fs::FileType) -> u32 {
    let types = [
        (file_type.is_file(), mode::REGULAR),
        (file_type.is_dir(), mode::DIRECTORY),
        (file_type.is_symlink(), mode::SYMLINK),
        (file_type.is_block_device(), mode::BLOCK),
        (file_type.is_char_device(), mode::CHARACTER),
        (file_type.is_fifo(), mode::FIFO),
        (file_type.is_socket(), mode::SOCKET),
    ];
    types.into_iter().find(|(is, _)| *is).unwrap().1
}
