//! The merged tree beside overlayfs itself: random stacks of layers, once mounted by us in each mode and once unpacked into a
//! directory a layer and stacked by the kernel, as containerd's overlayfs snapshotter does it.
//!
//! Every name, type, owner, mode, time, size, link target, attribute and content must be equal. Two things are not
//! compared, because the tree shows there what an unpack into one directory shows (`merge.rs`): the link count of
//! a directory, which overlayfs gives as 1 where it merged, and of a file some of whose names an upper layer
//! hides. Instead the number of names that lead to one inode is counted on both sides.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::support::*;
use fusefs::{MountOptions, mount_image};
use proptest::{collection::btree_map, prelude::*, sample::select};
use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid},
    mount::{MountFlags, UnmountFlags},
};
use tokio::runtime::Runtime;

/// Real mounts are slow; the rules themselves are tried in their thousands without one (`merge_tests.rs`).
const CASES: u32 = 48;

/// Everything that is compared of one path.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    rdev: u64,
    xattrs: BTreeMap<String, Vec<u8>>,
    content: Vec<u8>,
    /// All paths that lead to the same inode.
    names: Vec<PathBuf>,
}

fn walk(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut names: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let mut queue = vec![PathBuf::new()];
    while let Some(path) = queue.pop() {
        let full = root.join(&path);
        let metadata = match fs::symlink_metadata(&full) {
            // overlayfs lists the whiteouts of a directory that no other layer has, and finds nothing there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata.unwrap(),
        };
        let content = if metadata.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                queue.push(path.join(entry.unwrap().file_name()));
            }
            Vec::new()
        } else if metadata.is_symlink() {
            fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes()
        } else if metadata.is_file() {
            fs::read(&full).unwrap()
        } else {
            Vec::new()
        };
        let xattrs = xattr::list(&full).unwrap().map(|name| {
            let value = xattr::get(&full, &name).unwrap().unwrap();
            (name.into_string().unwrap(), value)
        });
        if !metadata.is_dir() {
            names.entry(metadata.ino()).or_default().push(path.clone());
        }
        let entry = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            rdev: metadata.rdev(),
            xattrs: xattrs.collect(),
            content,
            names: Vec::new(),
        };
        seen.insert(path, entry);
    }
    for mut paths in names.into_values() {
        paths.sort_unstable();
        for path in &paths {
            seen.get_mut(path).unwrap().names.clone_from(&paths);
        }
    }
    seen
}

/// Unpacks a layer into a directory as containerd does.
fn unpack(layer: &Layer, directory: &Path) {
    for (path, entry) in layer {
        let full = directory.join(path);
        match &entry.kind {
            Kind::Directory | Kind::Opaque => match fs::create_dir(&full) {
                Err(error) if path.is_empty() => assert_eq!(error.kind(), io::ErrorKind::AlreadyExists),
                created => created.unwrap(),
            },
            Kind::File(content) => fs::write(&full, content).unwrap(),
            Kind::Sparse(..) => unreachable!("none is made here"),
            Kind::Symlink(target) => std::os::unix::fs::symlink(target, &full).unwrap(),
            Kind::Fifo => rustix::fs::mknodat(CWD, &full, FileType::Fifo, Mode::empty(), 0).unwrap(),
            Kind::Character(major, minor) => {
                let device = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(CWD, &full, FileType::CharacterDevice, Mode::empty(), device).unwrap();
            }
            Kind::Whiteout => rustix::fs::mknodat(CWD, &full, FileType::CharacterDevice, Mode::empty(), 0).unwrap(),
            // Their targets sort before them, so they are there.
            Kind::HardLink(target) => fs::hard_link(directory.join(target), &full).unwrap(),
        }
    }
    // Children first: making them changes the times of a directory.
    for (path, entry) in layer.iter().rev() {
        if matches!(entry.kind, Kind::Whiteout | Kind::HardLink(_)) {
            continue;
        }
        let full = directory.join(path);
        let owner = (Some(Uid::from_raw(entry.owner.0)), Some(Gid::from_raw(entry.owner.1)));
        rustix::fs::chownat(CWD, &full, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if !matches!(entry.kind, Kind::Symlink(_)) {
            fs::set_permissions(&full, fs::Permissions::from_mode(entry.mode)).unwrap();
        }
        for (name, value) in &entry.xattrs {
            xattr::set(&full, name, value).unwrap();
        }
        if matches!(entry.kind, Kind::Opaque) {
            xattr::set(&full, "trusted.overlay.opaque", b"y").unwrap();
        }
        let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: entry.mtime.1.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &full, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// What overlayfs shows of the unpacked layers.
fn seen_by_overlayfs(layers: &[Layer], directory: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut lower = Vec::new();
    // Two layers at least: one alone is no overlay. The empty one hides nothing.
    for (number, layer) in std::iter::once(&Layer::new()).chain(layers).enumerate() {
        let unpacked = directory.join(number.to_string());
        fs::create_dir(&unpacked).unwrap();
        unpack(layer, &unpacked);
        lower.insert(0, unpacked.into_os_string().into_string().unwrap());
    }
    let merged = directory.join("merged");
    fs::create_dir(&merged).unwrap();
    let options = CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
    rustix::mount::mount("overlay", &merged, "overlay", MountFlags::RDONLY, Some(options.as_c_str())).unwrap();
    let _mounted = Unmount(&merged);
    walk(&merged)
}

/// Unmounts, also when the test fails.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
    }
}

fn seen_by_us(layers: &[Layer], directory: &Path, mode: control::Mode) -> BTreeMap<PathBuf, Seen> {
    let registry = Registry::default();
    let layers = layers.iter().map(|layer| registry.push(layer)).collect();
    let directory = directory.join(mode.to_string());
    let mount_point = directory.join("lazuli");
    fs::create_dir_all(&mount_point).unwrap();
    let runtime = Runtime::new().unwrap();
    let mount = runtime
        .block_on(mount_image(
            layers,
            registry.sources(),
            &directory.join("cache"),
            &mount_point,
            MountOptions::plain(mode),
        ))
        .unwrap();
    let _mounted = Unmount(&mount_point);
    let seen = walk(&mount_point);
    for (path, entry) in &seen {
        let metadata = fs::symlink_metadata(mount_point.join(path)).unwrap();
        if !metadata.is_dir() {
            assert_eq!(usize::try_from(metadata.nlink()).unwrap(), entry.names.len(), "{path:?}");
        }
    }
    runtime.block_on(mount.unmount()).unwrap();
    seen
}

fn check(layers: &[Layer]) {
    let directory = tempfile::tempdir().unwrap();
    let theirs = seen_by_overlayfs(layers, directory.path());
    for mode in [control::Mode::Fuse, control::Mode::Erofs] {
        assert_eq!(seen_by_us(layers, directory.path(), mode), theirs, "{mode}");
    }
}

fn entry() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![
        4 => Just(Kind::Directory),
        1 => Just(Kind::Opaque),
        2 => Just(Kind::Whiteout),
        1 => Just(Kind::Symlink("a/b")),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Character(1, 300)),
        4 => (0u64..1000, 0usize..9000).prop_map(|(seed, len)| Kind::File(noise(seed, len))),
    ];
    let mode = select(vec![0o755, 0o644, 0o1777, 0o4755, 0o2750, 0o000]);
    (kind, mode, 0u32..3, 0i64..4_000_000_000, 0u32..1_000_000_000, any::<bool>()).prop_map(
        |(kind, mode, owner, seconds, nanoseconds, has_xattr)| {
            let takes_xattrs = matches!(kind, Kind::File(_) | Kind::Directory | Kind::Opaque);
            let entry = Entry::new(kind).mode(mode).owner(owner, owner * 1000).mtime(seconds, nanoseconds);
            if has_xattr && takes_xattrs { entry.xattr("user.name", &seconds.to_le_bytes()) } else { entry }
        },
    )
}

/// A layer in which every directory is named, and files may have a second name.
fn random_layer() -> impl Strategy<Value = Layer> {
    let names = || select(vec!["a", "b", "c"]);
    let path = proptest::collection::vec(names(), 1..4).prop_map(|names| names.join("/"));
    (btree_map(path, entry(), 0..10), any::<bool>()).prop_map(|(entries, is_linked)| {
        let mut layer = Layer::from([(String::new(), directory().mode(0o755).mtime(5, 5))]);
        for (path, entry) in entries {
            let mut parents = path.match_indices('/').map(|(at, _)| &path[..at]);
            let is_directory = parents.all(|parent| {
                let parent = layer.entry(parent.to_owned()).or_insert_with(directory);
                matches!(parent.kind, Kind::Directory | Kind::Opaque)
            });
            if is_directory {
                layer.entry(path).or_insert(entry);
            }
        }
        if is_linked && matches!(layer.get("a"), Some(Entry { kind: Kind::File(_), .. })) {
            layer.insert("link".to_owned(), Entry::new(Kind::HardLink("a")));
        }
        layer
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_tree_shows_what_overlayfs_shows(layers in proptest::collection::vec(random_layer(), 1..4)) {
        check(&layers);
    }
}

#[test]
fn a_hidden_name_of_a_file_leaves_the_others_one_file() {
    check(&[
        layer([
            ("", directory()),
            ("a", file("linked")),
            ("b", Entry::new(Kind::HardLink("a"))),
            ("c", Entry::new(Kind::HardLink("a"))),
        ]),
        layer([("", directory()), ("b", Entry::new(Kind::Whiteout))]),
    ]);
}

#[test]
fn five_layers_of_one_directory_merge() {
    let layers: Vec<Layer> = (0..5u32)
        .map(|number| {
            let entries = [
                (String::new(), directory()),
                ("etc".to_owned(), directory().mode(0o700 + number)),
                (format!("etc/{number}"), file(number.to_string())),
                ("etc/shared".to_owned(), file(format!("of {number}")).owner(number, 0)),
            ];
            entries.into_iter().collect()
        })
        .collect();
    check(&layers);
}
