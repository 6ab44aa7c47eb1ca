//! EROFS images of merged trees, held against `fsck.erofs`, `dump.erofs` and the kernel.
//!
//! Needs root, erofs-utils and Linux 6.12. Nothing here is measured by time.

mod compare;
mod fuse;
mod random;
mod tree;

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use ::tree::erofs::{WriteError, write_image};
use format_spec::{
    Index, Inode,
    records::mode::{BLOCK, CHARACTER, FIFO, SOCKET, SYMLINK},
};
use fusefs::erofs_mount::{DetachedMount, DeviceAccess, MountError, mount_erofs, probe};
use proptest::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use self::{
    compare::assert_shows,
    random::{access_list, capability},
    tree::{Files, Tree, directory, file, inode, scratch},
};

/// Asserts that both oracles accept the tree, and that the kernel shows it as it is.
fn check(tree: &Tree) -> Files {
    let index = tree.build();
    let files = Files::of(&index);
    files.fsck();
    with_mount(&files, |root| assert_shows(root, &index));
    files
}

/// Calls `look` with the root directory of the image, mounted where nobody else sees it.
fn with_mount(files: &Files, look: impl FnOnce(&Path)) {
    let mount = DetachedMount::open(&files.image, &files.devices, DeviceAccess::Cached).unwrap();
    look(Path::new(&format!("/proc/self/fd/{}/.", mount.as_fd().as_raw_fd())));
}

/// Unmounts a directory when it goes out of scope.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn fsck_accepts_random_trees_and_bytes_repeat(tree in random::tree()) {
        let index = tree.build();
        let files = Files::of(&index);
        files.fsck();
        let mut again = Vec::new();
        prop_assert_eq!(&write_image(&index, &mut again).unwrap(), &files.summary);
        prop_assert!(again == fs::read(&files.image).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn kernel_shows_random_trees_as_they_are(tree in random::tree()) {
        let index = tree.build();
        with_mount(&Files::of(&index), |root| assert_shows(root, &index));
    }
}

#[test]
fn shows_an_empty_root() {
    check(&Tree::new(1));
}

#[test]
fn fsck_accepts_an_inode_at_the_very_end_of_the_image() {
    // The entries take a growing part of the one block, the pipes a slot each: for some count they fill it.
    for (count, name_len) in (60..100).flat_map(|count| (1..32).map(move |name_len| (count, name_len))) {
        let mut tree = Tree::new(1);
        for number in 0..count {
            tree.add(0, format!("{number}"), inode(FIFO));
        }
        tree.add(0, "x".repeat(name_len), inode(FIFO));
        Files::of(&tree.build()).fsck();
    }
}

#[test]
fn shows_a_directory_of_20000_entries() {
    let mut tree = Tree::new(1);
    let large = tree.add(0, "large", directory());
    for number in 0..20_000 {
        tree.add(large, format!("entry number {number:07}"), file(0, number % 3));
    }
    check(&tree);
}

#[test]
fn shows_names_of_any_bytes_and_lengths() {
    let mut tree = Tree::new(1);
    for first in (1..=255u8).filter(|byte| *byte != b'/') {
        tree.add(0, [first; 255], file(0, 1));
        tree.add(0, [first, first, first], file(0, 1));
        // Names that sort before, between and after the two dots.
        tree.add(0, [b'.', first, 0xff], directory());
    }
    check(&tree);
}

/// Directories of every length around a block: the last part follows the inode, or has a block of its own.
#[test]
fn shows_directories_of_every_length_around_a_block() {
    let mut tree = Tree::new(1);
    for len in 1..=255 {
        // 2 entries of their own, 19 of 201 bytes, and one that grows: 4007 to 4261 bytes.
        let parent = tree.add(0, format!("{len}"), directory());
        for number in 0..19 {
            tree.add(parent, format!("{number:0189}"), file(0, 0));
        }
        tree.add(parent, "x".repeat(len), file(0, 0));
        if len % 2 == 0 {
            tree.set_xattr(parent, "user.filler", &vec![1; len * 2]);
        }
    }
    check(&tree);
}

#[test]
fn shows_symlinks_of_every_length_class() {
    let mut tree = Tree::new(1);
    for len in (1..200).chain(3900..=4095) {
        let node = tree.add_symlink(0, format!("{len}"), &vec![b'a'; len]);
        if len % 3 == 0 {
            tree.set_xattr(node, "trusted.filler", &vec![7; len % 500]);
        }
    }
    check(&tree);
}

#[test]
fn shows_times_exactly() {
    let mut tree = Tree::new(1);
    let times = [(0i64, 0), (-1, 999_999_999), (-5_000_000_000, 1), (1 << 33, 5), (253_402_300_800, 0), (1, 1)];
    for (number, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        for (kind, node) in [("file", file(0, 5)), ("directory", directory()), ("symlink", inode(SYMLINK | 0o777))] {
            let node =
                Inode { mtime_seconds: seconds.cast_unsigned().into(), mtime_nanoseconds: nanoseconds.into(), ..node };
            let name = format!("{kind} {number}");
            if node.is_symlink() {
                let link = tree.add_symlink(0, name, b"target");
                tree.set_inode(link, node);
            } else {
                tree.add(0, name, node);
            }
        }
    }
    check(&tree);
}

#[test]
fn stores_the_most_frequent_time_once() {
    let mut tree = Tree::new(1);
    for number in 0..1000 {
        tree.add(0, format!("{number}"), Inode { uid: (number * 100).into(), ..file(0, 1) });
    }
    tree.add(0, "other", Inode { mtime_nanoseconds: 1.into(), ..file(0, 1) });
    let summary = check(&tree).summary;
    // The root, and the files whose owner fits into 16 bits.
    assert_eq!((summary.inode_count, summary.compact_inode_count), (1002, 1 + 656));
}

#[test]
fn shows_owners_and_link_counts_beyond_16_bits() {
    let mut tree = Tree::new(1);
    let ids = [0, 1, 65_535, 65_536, 4_294_967_294];
    for (number, id) in ids.into_iter().enumerate() {
        tree.add(0, format!("u{number}"), Inode { uid: id.into(), ..file(0, 1) });
        tree.add(0, format!("g{number}"), Inode { gid: id.into(), ..directory() });
    }
    let many = tree.add(0, "many", directory());
    let linked = tree.add(many, "0", file(0, 10));
    for number in 1..66_000 {
        tree.link(many, format!("{number}"), linked);
    }
    check(&tree);
}

#[test]
fn shows_devices_pipes_and_sockets() {
    let mut tree = Tree::new(1);
    for (number, file_type) in [CHARACTER, BLOCK, FIFO, SOCKET].into_iter().enumerate() {
        for device in [0x0103, 0xffff_ffff, 0x0010_0801, 0xfff0_ff00] {
            let payload = if number < 2 { device } else { 0 };
            tree.add(0, format!("{number} {device}"), Inode { payload: payload.into(), ..inode(file_type | 0o7777) });
        }
    }
    check(&tree);
}

#[test]
fn shows_attributes_shared_and_alone() {
    let mut tree = Tree::new(1);
    for number in 0..50u16 {
        let node = tree.add(0, format!("shared {number}"), file(0, 1));
        tree.set_xattr(node, "security.selinux", b"system_u:object_r:bin_t:s0\0");
        tree.set_xattr(node, "user.long", &vec![b'x'; 65_535]);
        let node = tree.add(0, format!("alone {number}"), directory());
        tree.set_xattr(node, "security.capability", &capability(number.into()));
        tree.set_xattr(node, "system.posix_acl_access", &access_list(number.into(), number));
        tree.set_xattr(node, "system.posix_acl_default", &access_list(number.into(), 7));
        tree.set_xattr(node, "trusted.long", &vec![number.to_le_bytes()[0]; usize::from(number) * 700]);
        tree.set_xattr(node, "user.empty", b"");
        tree.set_xattr(node, format!("user.{}", "n".repeat(250)), b"longest name");
    }
    let files = check(&tree);
    assert!(files.summary.image_len < 50 * 65_536, "the long value is stored once");
}

#[test]
fn shows_more_attributes_than_can_be_shared() {
    let mut tree = Tree::new(1);
    for name in ["a", "b"] {
        let node = tree.add(0, name, file(0, 1));
        for number in 0..300 {
            tree.set_xattr(node, format!("user.{number}"), format!("{number}").as_bytes());
        }
    }
    check(&tree);
}

#[test]
fn leaves_out_attributes_that_no_linux_file_system_shows() {
    let mut tree = Tree::new(1);
    let kept = tree.add(0, "file", file(0, 1));
    tree.set_xattr(kept, "user.kept", b"1");
    let plain = tree.build();
    let mut with_others = tree.clone();
    with_others.set_xattr(kept, "com.apple.provenance", b"1");
    with_others.set_xattr(kept, "system.nfs4_acl", b"1");
    with_others.set_xattr(kept, "system.posix_acl_default", &access_list(1, 7));
    let index = with_others.build();
    let files = Files::of(&index);
    assert_eq!(files.summary.dropped_xattr_count, 3);
    with_mount(&files, |root| assert_shows(root, &plain));
}

#[test]
fn shows_files_of_many_terabytes() {
    let mut tree = Tree::new(2);
    let sizes = [1u64 << 32, (1 << 32) + 1, 5 << 30, (1 << 40) - 4095, (1 << 40) + 4096];
    for (number, len) in sizes.into_iter().enumerate() {
        tree.add(0, format!("{number}"), file(0, len));
    }
    // Longer than the largest chunk, 8 TiB.
    tree.add(0, "largest", file(1, (9 << 40) + 777));
    let files = check(&tree);
    assert_eq!(files.summary.device_block_counts[1], (9 << 28) + 1);
}

#[test]
fn shows_the_content_of_100_layers() {
    let mut tree = Tree::new(100);
    for layer in 0..100 {
        for number in 0..10 {
            tree.add(0, format!("{layer} {number}"), file(layer, number * 1500));
        }
    }
    let files = check(&tree);
    assert_eq!(files.summary.device_block_counts, [21; 100]);
}

#[test]
fn dump_erofs_reads_the_superblock() {
    let mut tree = Tree::new(2);
    tree.add(0, "file", file(1, 100));
    let files = Files::of(&tree.build());
    let mut command = Command::new("dump.erofs");
    command.env("TZ", "UTC").arg("-s").args(files.devices.iter().map(|path| format!("--device={}", path.display())));
    let output = command.arg(&files.image).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |name| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{text}")).trim();
    assert_eq!(line("Filesystem magic number:"), "0xE0F5E1E2");
    assert_eq!(line("Filesystem root nid:"), "128");
    assert_eq!(line("Filesystem inode count:"), "2");
    assert_eq!(line("Filesystem features:"), "sb_csum mtime chunked_file device_table");
    assert_eq!(line("Filesystem created:"), "Tue Nov 14 22:13:20 2023");
}

#[test]
fn overlayfs_works_on_top() {
    let mut tree = Tree::new(1);
    let bin = tree.add(0, "bin", directory());
    let shared = tree.add(bin, "tool", file(0, 10_000));
    tree.link(bin, "also", shared);
    tree.set_xattr(shared, "security.capability", &capability(1 << 13));
    tree.set_xattr(shared, "user.mine", b"kept");
    let gone = tree.add(0, "gone", directory());
    tree.add(gone, "file", file(0, 1));
    let index = tree.build();
    let files = Files::of(&index);
    let scratch = scratch();
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| scratch.path().join(name));
    for path in [&lower, &upper, &work, &merged] {
        fs::create_dir(path).unwrap();
    }
    mount_erofs(&files.image, &files.devices, &lower, None).unwrap();
    let _lower = Mounted(lower.clone());
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let options = std::ffi::CString::new(options).unwrap();
    mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
    let _merged = Mounted(merged.clone());
    // The root directory is that of the upper layer, and overlayfs has link counts of its own for directories.
    let tool = merged.join("bin/tool");
    let shown = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.mode(), metadata.uid(), metadata.gid(), metadata.nlink(), metadata.mtime(), metadata.mtime_nsec())
    };
    assert_eq!(shown(&tool), shown(&lower.join("bin/tool")));
    assert_eq!(fs::metadata(&tool).unwrap().ino(), fs::metadata(merged.join("bin/also")).unwrap().ino());

    // Copied up: content, attributes and times come along.
    let before = fs::read(&tool).unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(fs::read(upper.join("bin/tool")).unwrap() == before);
    assert_eq!(xattr::get(&tool, "user.mine").unwrap().unwrap(), b"kept");
    assert_eq!(xattr::get(&tool, "security.capability").unwrap().unwrap(), capability(1 << 13));
    fs::remove_dir_all(merged.join("gone")).unwrap();
    assert!(!merged.join("gone").exists());
    assert_shows(&lower, &index);
}

#[test]
fn mounts_over_paths_longer_than_an_option() {
    let mut tree = Tree::new(1);
    tree.add(0, "file", file(0, 10_000));
    let index = tree.build();
    let mut files = Files::of(&index);
    let long = files.directory.path().join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&long).unwrap();
    for path in files.devices.iter_mut().chain([&mut files.image]) {
        let moved = long.join(path.file_name().unwrap());
        fs::rename(&*path, &moved).unwrap();
        *path = moved;
    }
    with_mount(&files, |root| assert_shows(root, &index));
}

/// Goal: a device may be a file that a daemon serves. Method: the same tree, its devices behind a FUSE session
/// that counts what is read; metadata must cost no read of them.
#[test]
fn devices_may_be_files_of_fuse() {
    let mut tree = Tree::new(3);
    for number in 0..300 {
        tree.add(0, format!("{number}"), file(number % 3, u64::from(number) * 997));
    }
    tree.add(0, "large", file(1, 50 << 20));
    let index = tree.build();
    let files = Files::of(&index);
    for access in [DeviceAccess::Cached, DeviceAccess::Direct] {
        let directory = scratch();
        let session = fuse::Served::new(files.devices.clone(), directory.path());
        let mount = DetachedMount::open(&files.image, &session.paths(), access).unwrap();
        let root = PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_fd().as_raw_fd()));
        for entry in fs::read_dir(&root).unwrap() {
            entry.unwrap().metadata().unwrap();
        }
        assert_eq!(session.read_count(), 0);
        assert_shows(&root, &index);
        assert!(session.read_count() > 0);
    }
}

#[test]
fn probe_succeeds_here_and_leaves_nothing() {
    let directory = scratch();
    probe(directory.path()).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    assert!(matches!(probe(&directory.path().join("missing")), Err(MountError::File { .. })));
}

#[test]
fn sets_read_ahead_of_its_own_mount() {
    let mut tree = Tree::new(1);
    tree.add(0, "file", file(0, 1));
    let files = Files::of(&tree.build());
    let mount = DetachedMount::open(&files.image, &files.devices, DeviceAccess::Cached).unwrap();
    mount.set_read_ahead(2048).unwrap();
    let values: Vec<String> = fs::read_dir("/sys/class/bdi")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("erofs-"))
        .filter_map(|entry| fs::read_to_string(entry.path().join("read_ahead_kb")).ok())
        .collect();
    assert!(values.iter().any(|value| value.trim() == "2048"), "{values:?}");
}

#[test]
fn refuses_mounts_with_one_line() {
    let files = Files::of(&Tree::new(2).build());
    let check = |devices: &[PathBuf], expected: &str| {
        let error = DetachedMount::open(&files.image, devices, DeviceAccess::Cached).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    };
    check(&files.devices[..1], "Invalid argument");
    check(&[files.devices[0].clone(), files.directory.path().join("missing")], "No such file");
    let mut bytes = fs::read(&files.image).unwrap();
    bytes[1024 + 40] ^= 1;
    fs::write(&files.image, bytes).unwrap();
    check(&files.devices, "cannot mount the image");
    let mount_point = files.directory.path().join("missing");
    assert!(mount_erofs(&files.image, &files.devices, &mount_point, None).is_err());
}

#[test]
fn refuses_trees_that_the_format_cannot_hold() {
    let check = |tree: &Tree, expected: &str| {
        let mut output = Vec::new();
        let error = write_image(&tree.build(), &mut output).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(output.is_empty(), "nothing is written before the tree is known to fit");
    };
    let with = |change: &dyn Fn(&mut Tree)| {
        let mut tree = Tree::new(1);
        change(&mut tree);
        tree
    };
    check(&with(&|tree| _ = tree.add(0, "file", file(0, 1 << 44))), "past 16 TiB");
    check(&with(&|tree| tree.set_xattr(0, "user.long", &[0; 65_536])), "longer than 65535");
    let many = |tree: &mut Tree| (0..5).for_each(|n| tree.set_xattr(0, format!("user.{n}"), &[0; 60_000]));
    check(&with(&many), "longer than 256 KiB");
}

#[test]
fn refuses_the_index_of_a_layer() {
    let mut builder = format_spec::IndexBuilder::default();
    builder.add_inode(directory()).unwrap();
    builder.add_directory::<&str>(0, []).unwrap();
    let index = Index::open(builder.finish_tree(&[]).unwrap()).unwrap();
    assert!(matches!(write_image(&index, Vec::new()), Err(WriteError::LayerCount(0))));

    let mut builder = format_spec::IndexBuilder::default();
    builder.add_inode(directory()).unwrap();
    builder.add_directory(0, [("gone", format_spec::records::WHITEOUT)]).unwrap();
    let index = Index::open(builder.finish_tree(&[format_spec::Digest::of(b"")]).unwrap()).unwrap();
    let error = write_image(&index, Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "erofs image: inode 0: it has a whiteout: this is no merged tree");
}

/// Prints what an image of 100,000 files costs; see the report of the run.
#[test]
fn prints_speed_and_length_for_100000_files() {
    for (label, has_common_time) in [("one time", true), ("own times", false)] {
        let mut tree = Tree::new(20);
        for top in 0..100u32 {
            let parent = tree.add(0, format!("directory-{top}"), directory());
            for middle in 0..20u32 {
                let parent = tree.add(parent, format!("module_{middle}"), directory());
                for number in 0..50u32 {
                    let serial = (top * 20 + middle) * 50 + number;
                    let nanoseconds = if has_common_time { 0 } else { serial };
                    let node = Inode { mtime_nanoseconds: nanoseconds.into(), ..file(serial % 20, 5000) };
                    tree.add(parent, format!("some_file_name_{number}.py"), node);
                }
            }
        }
        let index = tree.build();
        let directory = scratch();
        let image = directory.path().join("image");
        let start = Instant::now();
        let summary = write_image(&index, File::create(&image).unwrap()).unwrap();
        let elapsed = start.elapsed();
        println!(
            "{label}: {} inodes in {} ms, {} bytes, {} bytes an inode",
            summary.inode_count,
            elapsed.as_millis(),
            summary.image_len,
            summary.image_len / u64::from(summary.inode_count),
        );
        assert_eq!(summary.inode_count, 102_101);
    }
}
