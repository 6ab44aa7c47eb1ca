//! A real mount: what the kernel shows of small layers equals what went into them.
//!
//! Each test mounts an image of its own over a source in memory, in both modes, and looks at it with ordinary system
//! calls.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use control::Mode;

use crate::support::*;
use fusefs::{Error, Mount, MountOptions, mount_image};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};
use tokio::runtime::Runtime;

/// Makes a test of each function in each mode.
macro_rules! in_both_modes {
    ($($name:ident,)*) => {
        mod portable_mode {
            $(#[test] fn $name() { super::$name(super::Mode::Fuse); })*
        }
        mod kernel_mode {
            $(#[test] fn $name() { super::$name(super::Mode::Erofs); })*
        }
    };
}

in_both_modes! {
    stat_shows_every_field_of_the_layer,
    extended_attributes_are_those_of_the_layer,
    an_acl_counts_when_permissions_are_checked,
    content_reads_whole_in_pieces_and_through_a_map,
    what_is_not_there_is_hardly_read_ahead,
    reads_are_recorded_by_file_in_the_order_of_first_touch,
    a_program_runs_and_honours_set_user_id,
    layers_merge_as_overlayfs_shows_them,
    names_may_hold_any_byte,
    what_is_of_the_mount_depends_on_the_mode,
    a_directory_of_many_entries_lists_each_once,
    overlayfs_writes_copies_up_and_renames_on_top,
    many_threads_read_many_files,
    readers_that_wait_for_the_registry_keep_nobody_else_waiting,
    a_wrong_byte_of_the_registry_is_an_error_and_never_read,
    what_was_read_once_needs_no_registry,
    a_second_mount_needs_no_registry_for_what_arrived,
    waiting_ends_when_somebody_unmounts,
    a_recorded_mount_sees_reads_of_complete_layers,
    a_mount_in_use_is_detached_and_reads_on,
    bad_mount_points_and_images_are_said_in_one_line_and_leave_no_mount,
}

/// An image that is mounted as long as this lives.
struct Mounted {
    runtime: Runtime,
    mount: Option<Mount>,
    registry: Registry,
    directory: tempfile::TempDir,
}

impl Mounted {
    fn new(mode: Mode, layers: &[Layer]) -> Self {
        Self::of(MountOptions::plain(mode), layers)
    }

    fn of(options: MountOptions, layers: &[Layer]) -> Self {
        let registry = Registry::default();
        let layers = layers.iter().map(|layer| registry.push(layer)).collect();
        Self::mount(options, registry, layers)
    }

    fn with_registry(mode: Mode, registry: Registry, layers: Vec<control::RemoteLayer>) -> Self {
        Self::mount(MountOptions::plain(mode), registry, layers)
    }

    fn mount(options: MountOptions, registry: Registry, layers: Vec<control::RemoteLayer>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (cache, mount_point) = (directory.path().join("cache"), directory.path().join("mount"));
        fs::create_dir(&mount_point).unwrap();
        let runtime = Runtime::new().unwrap();
        let mounting = mount_image(layers, registry.sources(), &cache, &mount_point, options);
        let mount = runtime.block_on(mounting).unwrap();
        Self { runtime, mount: Some(mount), registry, directory }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("mount").join(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mount = self.mount.take().unwrap();
        self.runtime.block_on(mount.unmount()).unwrap();
        assert!(!is_mounted(&self.path("")));
    }
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn stat_shows_every_field_of_the_layer(mode: Mode) {
    let image = Mounted::new(
        mode,
        &[layer([
            ("", directory().mode(0o751).owner(7, 8)),
            ("directory", directory().mode(0o1777).owner(1, 2).mtime(-1, 999_999_999)),
            ("directory/below", directory()),
            ("setuid", file("x").mode(0o6755).owner(1000, 4_000_000_000)),
            ("old", file("").mtime(-5_000_000_000, 1)),
            ("late", file("").mtime(i64::from(u32::MAX) * 3, 5)),
            ("device", Entry::new(Kind::Character(200, 70_000)).mode(0o600)),
            ("fifo", Entry::new(Kind::Fifo)),
            ("link", Entry::new(Kind::Symlink("some/where"))),
            ("one", file(noise(1, 5000))),
            ("two", Entry::new(Kind::HardLink("one"))),
        ])],
    );
    let stat = |path: &str| fs::symlink_metadata(image.path(path)).unwrap();

    let root = stat("");
    assert_eq!((root.mode(), root.uid(), root.gid(), root.nlink()), (0o40751, 7, 8, 3));
    let directory = stat("directory");
    assert_eq!((directory.mode(), directory.uid(), directory.gid(), directory.nlink()), (0o41777, 1, 2, 3));
    assert_eq!((directory.mtime(), directory.mtime_nsec()), (-1, 999_999_999));
    let setuid = stat("setuid");
    assert_eq!((setuid.mode(), setuid.uid(), setuid.gid()), (0o106755, 1000, 4_000_000_000));
    assert_eq!((setuid.mtime(), setuid.mtime_nsec()), (1_600_000_000, 123_456_789));
    assert_eq!((stat("old").mtime(), stat("old").mtime_nsec()), (-5_000_000_000, 1));
    assert_eq!((stat("late").mtime(), stat("late").mtime_nsec()), (i64::from(u32::MAX) * 3, 5));
    let device = stat("device");
    assert!(device.file_type().is_char_device());
    assert_eq!(device.rdev(), rustix::fs::makedev(200, 70_000));
    assert!(stat("fifo").file_type().is_fifo());
    assert_eq!(fs::read_link(image.path("link")).unwrap(), Path::new("some/where"));
    assert_eq!(stat("link").len(), 10);
    let one = stat("one");
    assert_eq!((one.len(), one.blocks(), one.nlink(), one.blksize()), (5000, 16, 2, 4096));
    assert_eq!(one.ino(), stat("two").ino());
    assert_eq!(names(&image.path("")), ["device", "directory", "fifo", "late", "link", "old", "one", "setuid", "two"]);
    for entry in fs::read_dir(image.path("")).unwrap() {
        let entry = entry.unwrap();
        let metadata = fs::symlink_metadata(entry.path()).unwrap();
        assert_eq!(entry.file_type().unwrap(), metadata.file_type(), "{:?}", entry.path());
        assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry), metadata.ino(), "{:?}", entry.path());
    }
    assert_eq!(fs::symlink_metadata(image.path("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(fs::write(image.path("new"), "").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
}

/// An ACL: version 2; the owner, one more user, the group, the mask and the others.
fn acl_with_user_1234() -> Vec<u8> {
    let entry = |tag: u16, permissions: u16, id: u32| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [
        2u32.to_le_bytes().to_vec(),
        entry(1, 6, u32::MAX),
        entry(2, 4, 1234),
        entry(4, 0, u32::MAX),
        entry(16, 4, u32::MAX),
        entry(32, 0, u32::MAX),
    ]
    .concat()
}

fn extended_attributes_are_those_of_the_layer(mode: Mode) {
    let acl = acl_with_user_1234();
    // CAP_NET_BIND_SERVICE, permitted and effective (VFS_CAP_REVISION_2).
    let capability = [1u32 | 0x0200_0000, 1 << 10, 0, 0, 0].map(u32::to_le_bytes).concat();
    let image = Mounted::new(
        mode,
        &[layer([
            ("plain", file("")),
            (
                "file",
                file("secret")
                    .mode(0o640)
                    .xattr("user.binary", &[0, 255, 10])
                    .xattr("user.empty", b"")
                    .xattr("security.capability", &capability)
                    .xattr("system.posix_acl_access", &acl),
            ),
            ("link", Entry::new(Kind::Symlink("file")).xattr("trusted.name", b"value")),
        ])],
    );
    let xattr = |path: &str, name: &str| xattr::get(image.path(path), name).unwrap();
    assert_eq!(xattr("file", "user.binary"), Some(vec![0, 255, 10]));
    assert_eq!(xattr("file", "user.empty"), Some(Vec::new()));
    assert_eq!(xattr("file", "security.capability"), Some(capability));
    assert_eq!(xattr("file", "system.posix_acl_access"), Some(acl));
    assert_eq!(xattr("file", "user.missing"), None);
    assert_eq!(xattr("link", "trusted.name"), Some(b"value".to_vec()));
    let mut listed: Vec<_> = xattr::list(image.path("file")).unwrap().collect();
    listed.sort_unstable();
    let expected = ["security.capability", "system.posix_acl_access", "user.binary", "user.empty"];
    assert_eq!(listed, expected);
    assert_eq!(xattr::list(image.path("plain")).unwrap().count(), 0);
    let mut short = [0; 2];
    assert_eq!(rustix::fs::getxattr(image.path("file"), "user.binary", &mut short), Err(Errno::RANGE));
    assert_eq!(rustix::fs::listxattr(image.path("file"), &mut short), Err(Errno::RANGE));
}

fn an_acl_counts_when_permissions_are_checked(mode: Mode) {
    let acl = acl_with_user_1234();
    let image =
        Mounted::new(mode, &[layer([("file", file("for 1234").mode(0o640).xattr("system.posix_acl_access", &acl))])]);
    fs::set_permissions(image.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let read_as = |user: u32| {
        use std::os::unix::process::CommandExt;
        let output = Command::new("cat").arg(image.path("file")).uid(user).gid(user).output().unwrap();
        output.status.success().then_some(output.stdout)
    };
    assert_eq!(read_as(1234), Some(b"for 1234".to_vec()));
    assert_eq!(read_as(1235), None);
}

fn content_reads_whole_in_pieces_and_through_a_map(mode: Mode) {
    let large = noise(7, 3_000_001);
    let mut sparse = vec![0; 300_000];
    sparse[200_000..200_100].copy_from_slice(&noise(8, 100));
    let image = Mounted::new(
        mode,
        &[layer([
            ("empty", file("")),
            ("large", file(&large)),
            ("sparse", file(&sparse)),
            ("zeros", file(vec![0; 70_000])),
        ])],
    );
    assert_eq!(fs::read(image.path("empty")).unwrap(), b"");
    assert_eq!(fs::read(image.path("sparse")).unwrap(), sparse);
    assert_eq!(fs::read(image.path("zeros")).unwrap(), vec![0; 70_000]);
    let file = File::open(image.path("large")).unwrap();
    let mut piece = vec![0; 1000];
    for offset in [2_999_500, 0, 1_234_567, 16_000, 2_999_001] {
        let len = file.read_at(&mut piece, offset as u64).unwrap();
        assert_eq!(piece[..len], large[offset..large.len().min(offset + 1000)], "{offset}");
    }
    assert_eq!(file.read_at(&mut piece, 3_000_001).unwrap(), 0);
    #[allow(unsafe_code)]
    // SAFETY: the file system is read-only.
    let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
    assert!(map[..] == large[..]);
    assert_eq!(fs::read(image.path("large")).unwrap(), large);
}

/// A window of the usual length brought thirty times as much as a reader of single pages wanted.
fn what_is_not_there_is_hardly_read_ahead(mode: Mode) {
    let options = MountOptions { mode, records: true };
    let image = Mounted::of(options, &[layer([("large", file(noise(9, 4 << 20)))])]);
    let file = File::open(image.path("large")).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the file system is read-only.
    let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
    let mut sum = 0_u64;
    for at in [1 << 20, 3 << 20] {
        sum += u64::from(map[at]);
    }
    assert!(sum > 0);
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 2 << 20).unwrap();
    let touched = image.mount.as_ref().unwrap().touched_files();
    let len: u64 = touched.iter().flat_map(|file| &file.ranges).map(|range| range.end - range.start).sum();
    assert!((3 * 4096..=3 * (32 << 10)).contains(&len), "{len}: {touched:?}");
}

fn reads_are_recorded_by_file_in_the_order_of_first_touch(mode: Mode) {
    let below = layer([("a", file(noise(1, 100_000))), ("hidden", file("below"))]);
    let above = layer([("b", file(noise(2, 10))), ("hidden", file("above")), ("unread", file("x"))]);
    let image = Mounted::of(MountOptions { mode, records: true }, &[below, above]);
    for name in ["b", "a", "hidden", "b"] {
        fs::read(image.path(name)).unwrap();
    }
    let touched = image.mount.as_ref().unwrap().touched_files();
    let read: Vec<_> = touched
        .iter()
        .map(|file| {
            let len: u64 = file.ranges.iter().map(|range| range.end - range.start).sum();
            (String::from_utf8_lossy(&file.path).into_owned(), len)
        })
        .collect();
    let expected = [("/b", 10), ("/a", 100_000), ("/hidden", 5)].map(|(path, len)| (path.to_owned(), len));
    assert_eq!(read, expected);
}

fn a_program_runs_and_honours_set_user_id(mode: Mode) {
    let shell = fs::read(fs::canonicalize("/bin/sh").unwrap()).unwrap();
    let id = fs::read(fs::canonicalize("/usr/bin/id").unwrap()).unwrap();
    let image = Mounted::new(
        mode,
        &[layer([
            ("bin/sh", file(shell).mode(0o755)),
            ("bin/id", file(id).mode(0o4755).owner(4321, 0)),
            ("script", file("#!/bin/sh\necho ran\n").mode(0o755)),
            ("device", Entry::new(Kind::Character(1, 3)).mode(0o666)),
        ])],
    );
    let run =
        |program: &str, arguments: &[&str]| Command::new(image.path(program)).args(arguments).output().unwrap().stdout;
    assert_eq!(run("bin/sh", &["-c", "echo from the image"]), b"from the image\n");
    assert_eq!(run("script", &[]), b"ran\n");
    assert_eq!(run("bin/id", &["-u"]), b"4321\n");
    fs::write(image.path("device"), "to /dev/null").unwrap();
}

fn layers_merge_as_overlayfs_shows_them(mode: Mode) {
    let image = Mounted::new(
        mode,
        &[
            layer([
                ("etc", directory().mode(0o711)),
                ("etc/lower", file("lower")),
                ("etc/both", file("below")),
                ("gone/file", file("")),
                ("opaque/below", file("")),
                ("one", file("linked")),
                ("two", Entry::new(Kind::HardLink("one"))),
            ]),
            layer([
                ("etc/both", file("above")),
                ("etc/upper", file("upper")),
                ("gone", Entry::new(Kind::Whiteout)),
                ("opaque", Entry::new(Kind::Opaque)),
                ("opaque/above", file("")),
                ("two", Entry::new(Kind::Whiteout)),
            ]),
        ],
    );
    assert_eq!(names(&image.path("")), ["etc", "one", "opaque"]);
    assert_eq!(names(&image.path("etc")), ["both", "lower", "upper"]);
    assert_eq!(names(&image.path("opaque")), ["above"]);
    assert_eq!(fs::metadata(image.path("etc")).unwrap().mode(), 0o40711);
    assert_eq!(fs::read(image.path("etc/both")).unwrap(), b"above");
    assert_eq!(fs::read(image.path("etc/lower")).unwrap(), b"lower");
    assert_eq!(fs::metadata(image.path("one")).unwrap().nlink(), 1);
}

fn what_is_of_the_mount_depends_on_the_mode(mode: Mode) {
    let image = Mounted::new(mode, &[layer([("directory/one", file("1")), ("directory/two", file("2"))])]);
    let directory = fs::metadata(image.path("directory")).unwrap();
    let statistics = rustix::fs::statvfs(image.path("")).unwrap();
    let used = statistics.f_files - statistics.f_ffree;
    // A directory of EROFS has 12 bytes and a name for each entry, "." and ".." among them.
    let expected = match mode {
        Mode::Fuse => (4096, 4),
        _ => (4 * 12 + 1 + 2 + 3 + 3, u64::MAX),
    };
    assert_eq!((directory.len(), statistics.f_files), expected);
    assert_eq!(used, 4);
}

fn names_may_hold_any_byte(mode: Mode) {
    let directory = tempfile::tempdir().unwrap();
    drop(directory);
    let long = "n".repeat(255);
    let odd = "new\nline \u{1F980} \\ ";
    let image = Mounted::new(mode, &[layer([(&long, file("long")), (odd, file("odd"))])]);
    assert_eq!(fs::read(image.path(&long)).unwrap(), b"long");
    assert_eq!(fs::read(image.path(odd)).unwrap(), b"odd");
    let not_utf8 = image.directory.path().join("mount").join(OsStr::from_bytes(&[0xff, 0xfe]));
    assert_eq!(fs::metadata(not_utf8).unwrap_err().kind(), io::ErrorKind::NotFound);
}

fn a_directory_of_many_entries_lists_each_once(mode: Mode) {
    let entries: Layer = (0..20_000).map(|number| (format!("many/{number:05}"), file(""))).collect();
    let image = Mounted::new(mode, &[entries]);
    let expected: Vec<String> = (0..20_000).map(|number| format!("{number:05}")).collect();
    assert_eq!(names(&image.path("many")), expected);
    assert_eq!(names(&image.path("many")), expected, "from the kernel's cache");
    let statistics = rustix::fs::statvfs(image.path("")).unwrap();
    // EROFS gives the largest number there is as that of all inodes.
    let used = statistics.f_files - statistics.f_ffree;
    assert_eq!((used, statistics.f_bfree, statistics.f_namemax), (20_002, 0, 255));
}

fn overlayfs_writes_copies_up_and_renames_on_top(mode: Mode) {
    let image = Mounted::new(
        mode,
        &[layer([
            ("directory/file", file("from the image").xattr("user.kept", b"yes")),
            ("directory/other", file("other")),
            ("remove", file("")),
        ])],
    );
    for name in ["upper", "work", "merged"] {
        fs::create_dir(image.directory.path().join(name)).unwrap();
    }
    let at = |name: &str| image.directory.path().join(name);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.path("").display(),
        at("upper").display(),
        at("work").display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("overlay", at("merged"), "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    let merged = |path: &str| at("merged").join(path);

    fs::write(merged("new"), "new").unwrap();
    fs::write(merged("directory/file"), "changed").unwrap();
    fs::rename(merged("directory/other"), merged("renamed")).unwrap();
    fs::remove_file(merged("remove")).unwrap();
    let read = |path: &str| fs::read_to_string(merged(path)).unwrap();
    assert_eq!(
        (read("new"), read("directory/file"), read("renamed")),
        ("new".into(), "changed".into(), "other".into())
    );
    assert_eq!(xattr::get(merged("directory/file"), "user.kept").unwrap(), Some(b"yes".to_vec()));
    assert_eq!(names(&merged("")), ["directory", "new", "renamed"]);
    assert_eq!(names(&merged("directory")), ["file"]);
    assert_eq!(fs::read_to_string(image.path("directory/file")).unwrap(), "from the image");
    rustix::mount::unmount(at("merged"), UnmountFlags::empty()).unwrap();
}

fn many_threads_read_many_files(mode: Mode) {
    let content = |number: u64| noise(number, 2_000 + usize::try_from(number).unwrap() * 37);
    let entries: Layer =
        (0..400).map(|number| (format!("d{}/f{number}", number % 20), file(content(number)))).collect();
    let image = Mounted::new(mode, &[entries]);
    let image = Arc::new(image);
    let threads: Vec<_> = (0..8u64)
        .map(|thread| {
            let image = image.clone();
            std::thread::spawn(move || {
                for step in 0..400 {
                    let number = (step * 7 + thread * 50) % 400;
                    let read = fs::read(image.path(&format!("d{}/f{number}", number % 20))).unwrap();
                    assert!(read == content(number), "{number}");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// More readers than the session has threads, all of which wait for bytes that do not come.
fn readers_that_wait_for_the_registry_keep_nobody_else_waiting(mode: Mode) {
    const READERS: u64 = 40;
    let mut entries: Layer =
        (0..READERS).map(|number| (format!("absent/{number}"), file(noise(number, 40_000)))).collect();
    entries.insert("present".to_owned(), file(noise(99, 40_000)));
    let image = Mounted::new(mode, &[entries]);
    fs::read(image.path("present")).unwrap();
    let before = image.registry.requests();
    image.registry.set_held(true);
    std::thread::scope(|scope| {
        let read = |number: u64| fs::read(image.path(&format!("absent/{number}"))).unwrap() == noise(number, 40_000);
        let readers: Vec<_> = (0..READERS).map(|number| scope.spawn(move || read(number))).collect();
        while image.registry.requests() == before {
            std::thread::yield_now();
        }
        let present = File::open(image.path("present")).unwrap();
        rustix::fs::fadvise(&present, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(fs::read(image.path("present")).unwrap() == noise(99, 40_000));
        assert_eq!(names(&image.path("absent")).len(), 40);
        assert!(readers.iter().all(|reader| !reader.is_finished()));
        image.registry.set_held(false);
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
}

fn a_wrong_byte_of_the_registry_is_an_error_and_never_read(mode: Mode) {
    let registry = Registry::default();
    let layers = vec![registry.push(&layer([("file", file(noise(1, 100_000))), ("zeros", file(vec![0; 9000]))]))];
    registry.damage(&layers[0]);
    let image = Mounted::with_registry(mode, registry, layers);
    let mut file = File::open(image.path("file")).unwrap();
    let error = file.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
    assert_eq!(fs::metadata(image.path("file")).unwrap().len(), 100_000);
    assert_eq!(fs::read(image.path("zeros")).unwrap(), vec![0; 9000], "holes need no frame");
}

fn what_was_read_once_needs_no_registry(mode: Mode) {
    let content = noise(3, 50_000);
    let image = Mounted::new(mode, &[layer([("file", file(&content))])]);
    assert_eq!(fs::read(image.path("file")).unwrap(), content);
    let requests = image.registry.requests();
    image.registry.set_down(true);
    let file = File::open(image.path("file")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert_eq!(fs::read(image.path("file")).unwrap(), content);
    assert_eq!(image.registry.requests(), requests);
}

fn a_second_mount_needs_no_registry_for_what_arrived(mode: Mode) {
    let content = noise(4, 50_000);
    let registry = Registry::default();
    let layers = vec![registry.push(&layer([("file", file(&content))]))];
    let directory = tempfile::tempdir().unwrap();
    let (cache, mount_point) = (directory.path().join("cache"), directory.path().join("mount"));
    fs::create_dir(&mount_point).unwrap();
    let runtime = Runtime::new().unwrap();
    for is_down in [false, true] {
        registry.set_down(is_down);
        let mount = runtime
            .block_on(mount_image(layers.clone(), registry.sources(), &cache, &mount_point, MountOptions::plain(mode)))
            .unwrap();
        assert_eq!(fs::read(mount_point.join("file")).unwrap(), content);
        runtime.block_on(mount.unmount()).unwrap();
    }
}

/// A small layer was complete before its image was run, and the profile lacked its files: the kernel had read them.
fn a_recorded_mount_sees_reads_of_complete_layers(mode: Mode) {
    let registry = Registry::default();
    let layers = vec![registry.push(&layer([("file", file("read"))]))];
    let directory = tempfile::tempdir().unwrap();
    let (cache, mount_point) = (directory.path().join("cache"), directory.path().join("mount"));
    fs::create_dir(&mount_point).unwrap();
    let runtime = Runtime::new().unwrap();
    for records in [false, true] {
        let options = MountOptions { mode, records };
        let mounting = mount_image(layers.clone(), registry.sources(), &cache, &mount_point, options);
        let mount = runtime.block_on(mounting).unwrap();
        assert_eq!(fs::read(mount_point.join("file")).unwrap(), b"read");
        let touched: Vec<_> = mount.touched_files().into_iter().map(|file| file.path).collect();
        let expected: &[&[u8]] = if records { &[b"/file"] } else { &[] };
        assert_eq!(touched, expected);
        runtime.block_on(mount.unmount()).unwrap();
    }
}

fn waiting_ends_when_somebody_unmounts(mode: Mode) {
    let registry = Registry::default();
    let layers = vec![registry.push(&layer([("file", file("x"))]))];
    let directory = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let mut mount = mount_image(
            layers,
            registry.sources(),
            &directory.path().join("cache"),
            directory.path(),
            MountOptions::plain(mode),
        )
        .await
        .unwrap();
        rustix::mount::unmount(directory.path(), UnmountFlags::empty()).unwrap();
        mount.wait().await.unwrap();
        mount.unmount().await.unwrap();
    });
    assert!(!is_mounted(directory.path()));
}

fn a_mount_in_use_is_detached_and_reads_on(mode: Mode) {
    let registry = Registry::default();
    let layers = vec![registry.push(&layer([("file", file("still there"))]))];
    let directory = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let mount_point = directory.path().join("mount");
    fs::create_dir(&mount_point).unwrap();
    let cache = directory.path().join("cache");
    let mount = runtime
        .block_on(mount_image(layers, registry.sources(), &cache, &mount_point, MountOptions::plain(mode)))
        .unwrap();
    let mut file = File::open(mount_point.join("file")).unwrap();
    runtime.block_on(mount.unmount()).unwrap();
    assert!(!is_mounted(&mount_point));
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "still there");
}

fn bad_mount_points_and_images_are_said_in_one_line_and_leave_no_mount(mode: Mode) {
    let registry = Registry::default();
    let good = registry.push(&layer([("file", file("x"))]));
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "").unwrap();
    fs::create_dir(path("directory")).unwrap();
    let runtime = Runtime::new().unwrap();
    let fail = |layers: Vec<_>, mount_point: &str| {
        let (cache, mount_point) = (path("cache"), path(mount_point));
        let error = runtime
            .block_on(mount_image(layers, registry.sources(), &cache, &mount_point, MountOptions::plain(mode)))
            .unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        error
    };
    assert!(
        matches!(fail(vec![good.clone()], "missing"), Error::MountPoint { error, .. } if error.kind() == io::ErrorKind::NotFound)
    );
    assert!(
        matches!(fail(vec![good.clone()], "file"), Error::MountPoint { error, .. } if error.kind() == io::ErrorKind::NotADirectory)
    );
    assert!(matches!(fail(vec![], "directory"), Error::Merge(_)));
    let unknown = build(&layer([("other", file("y"))]));
    let unknown = control::RemoteLayer { layer: unknown.layer, image: IMAGE.to_owned() };
    let error = fail(vec![good, unknown.clone()], "directory").to_string();
    assert!(error.contains(&unknown.layer.blob.to_string()) && error.contains("registry is down"), "{error}");
    assert!(!is_mounted(&path("directory")));
}
