//! Operations of programs on the files of an image beyond reading, below overlayfs as in a container.

use std::{
    ffi::CString,
    fs::{self, File, Permissions},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use control::Mode;

use crate::support::{daemon::Running, *};
use rustix::{
    fs::{OFlags, SeekFrom},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

const MIB: u64 = 1 << 20;

/// A container's root above a tree; detached when dropped.
struct Container {
    merged: PathBuf,
    upper: PathBuf,
}

impl Container {
    fn new(directory: &Path, lower: &Path) -> Self {
        let at = |name: &str| directory.join(name);
        for name in ["upper", "work", "merged"] {
            fs::create_dir(at(name)).unwrap();
        }
        let (upper, work) = (at("upper").display().to_string(), at("work").display().to_string());
        let options = format!("lowerdir={},upperdir={upper},workdir={work}", lower.display());
        let options = CString::new(options).unwrap();
        let flags = MountFlags::empty();
        rustix::mount::mount("overlay", at("merged"), "overlay", flags, Some(options.as_c_str())).unwrap();
        Self { merged: at("merged"), upper: at("upper") }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.merged, UnmountFlags::DETACH).unwrap();
    }
}

fn a_copy_up_of_a_sparse_file_writes_what_is_in_it(mode: Mode) {
    const LEN: u64 = 1024 * MIB;
    const CONTENT_AT: u64 = 700 * MIB + 8192;
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let sparse = Entry::new(Kind::Sparse(LEN, vec![(CONTENT_AT, b"x".to_vec())]));
    let layers = [registry.push(&layer([("before", file("1")), ("lastlog", sparse), ("later", file("2"))]))];
    let daemon = Running::start_in(mode, root.path(), &registry);
    let lower = daemon.mount(&layers);
    let container = Container::new(root.path(), &lower);

    let file = File::open(lower.join("lastlog")).unwrap();
    let content_at = rustix::fs::seek(&file, SeekFrom::Data(0)).unwrap();
    assert!((CONTENT_AT - MIB..=CONTENT_AT).contains(&content_at), "{content_at}");
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Hole(0)).unwrap(), 0);
    let hole_at = rustix::fs::seek(&file, SeekFrom::Hole(CONTENT_AT)).unwrap();
    assert!((CONTENT_AT + 1..=CONTENT_AT + MIB).contains(&hole_at), "{hole_at}");
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(CONTENT_AT + MIB)), Err(Errno::NXIO));
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Hole(LEN)), Err(Errno::NXIO));

    fs::set_permissions(container.merged.join("lastlog"), Permissions::from_mode(0o600)).unwrap();
    let copied = fs::metadata(container.upper.join("lastlog")).unwrap();
    assert_eq!((copied.len(), copied.mode() & 0o777), (LEN, 0o600));
    assert!(copied.blocks() * 512 <= 4 * MIB, "{} bytes were written", copied.blocks() * 512);
    let merged = File::open(container.merged.join("lastlog")).unwrap();
    for (offset, expected) in [(0, 0), (CONTENT_AT - 1, 0), (CONTENT_AT, b'x'), (CONTENT_AT + 1, 0), (LEN - 1, 0)] {
        let mut byte = [0xff];
        merged.read_exact_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [expected], "at {offset}");
        File::open(lower.join("lastlog")).unwrap().read_exact_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [expected], "at {offset} of the image");
    }
    assert_eq!(fs::read(lower.join("before")).unwrap(), b"1");
    assert_eq!(fs::read(lower.join("later")).unwrap(), b"2");
}

#[test]
fn a_copy_up_of_a_sparse_file_writes_what_is_in_it_in_portable_mode() {
    a_copy_up_of_a_sparse_file_writes_what_is_in_it(Mode::Fuse);
}

#[test]
fn a_copy_up_of_a_sparse_file_writes_what_is_in_it_in_kernel_mode() {
    a_copy_up_of_a_sparse_file_writes_what_is_in_it(Mode::Erofs);
}

fn read_past_the_page_cache(path: &Path) -> io::Result<Vec<u8>> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    let mut content = Vec::new();
    File::options().read(true).custom_flags(flags).open(path)?.read_to_end(&mut content)?;
    Ok(content)
}

/// The one file operation that programs meet in which the modes differ (docs/SEMANTICS.md). Where a kernel's EROFS can
/// do it over files, this test says so.
#[test]
fn direct_io_works_in_portable_mode_and_is_refused_in_kernel_mode() {
    let content = noise(1, 100_000);
    for mode in [Mode::Fuse, Mode::Erofs] {
        let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
        let layers = [registry.push(&layer([("file", file(&content))]))];
        let daemon = Running::start_in(mode, root.path(), &registry);
        let lower = daemon.mount(&layers);
        let container = Container::new(root.path(), &lower);
        for path in [lower.join("file"), container.merged.join("file")] {
            match (mode, read_past_the_page_cache(&path)) {
                (Mode::Erofs, read) => {
                    let error = read.expect_err("refused").raw_os_error();
                    assert_eq!(error, Some(Errno::INVAL.raw_os_error()), "{}", path.display());
                }
                (_, read) => assert!(read.unwrap() == content, "{}", path.display()),
            }
            assert!(fs::read(path).unwrap() == content, "{mode}: through the page cache it is read anyway");
        }
    }
}
