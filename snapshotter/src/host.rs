//! What the host allows under the root directory, found out once at start.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use control::root::{SNAPSHOTS, SNAPSHOTTER_LOCK};
use rustix::fs::FlockOperation;

/// `f_type` of overlayfs (Linux include/uapi/linux/magic.h).
const OVERLAYFS_MAGIC: u32 = 0x794c_7630;

/// The root directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The path does not fit into a mount option.
    #[error("root {0} has a colon, comma, backslash or quote in it, or is not absolute: choose another path")]
    Path(PathBuf),
    /// It cannot be made or opened.
    #[error("root {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// overlayfs cannot write to overlayfs.
    #[error(
        "root {0} is on overlayfs, which cannot hold the writable layer of an overlayfs mount: choose a directory on another file system"
    )]
    Overlay(PathBuf),
    /// Another daemon uses it.
    #[error("root {0} is in use by another lazuli-snapshotter")]
    Locked(PathBuf),
}

/// The root directory, held against a second daemon while this lives.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    _lock: File,
}

impl Root {
    /// Makes the root directory if need be, checks that snapshots can lie there, and locks it.
    ///
    /// # Errors
    ///
    /// As [`RootError`] says.
    pub fn open(path: &Path) -> Result<Self, RootError> {
        let fits = path.to_str().is_some_and(|text| !text.contains([':', ',', '\\', '"']));
        if !fits || !path.is_absolute() {
            return Err(RootError::Path(path.to_owned()));
        }
        let failed = |error: io::Error| RootError::Io(path.to_owned(), error);
        make_private(path).and_then(|()| make_private(&path.join(SNAPSHOTS))).map_err(failed)?;
        let file_system = rustix::fs::statfs(path).map_err(|error| failed(error.into()))?;
        if u32::try_from(file_system.f_type) == Ok(OVERLAYFS_MAGIC) {
            return Err(RootError::Overlay(path.to_owned()));
        }
        let lock = path.join(SNAPSHOTTER_LOCK);
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(lock).map_err(failed)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RootError::Locked(path.to_owned())),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The options that every overlay mount gets here: those that containerd's overlayfs snapshotter adds.
pub fn overlay_options() -> Vec<String> {
    let mut options = Vec::new();
    // Only in a user namespace does overlayfs need another place for its marks (Linux >= 5.11).
    if in_user_namespace() {
        options.push("userxattr".to_owned());
    }
    // A lower directory is used by many mounts at once, which an index would refuse.
    if Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".to_owned());
    }
    options
}

/// Further options of an overlay mount with a lazy lower directory.
pub fn lazy_overlay_options() -> Vec<String> {
    // A tree is a file system of its own: without it numbers of directories are made up anew whenever the kernel drops
    // what it remembers, and one root has two devices (Linux Documentation/filesystems/overlayfs.rst, "Inode
    // properties"; Linux 4.17). `auto` would leave out trees of the session.
    let is_known = Path::new("/sys/module/overlay/parameters/xino_auto").exists();
    is_known.then(|| "xino=on".to_owned()).into_iter().collect()
}

fn in_user_namespace() -> bool {
    // The first namespace maps all 2^32 - 1 users onto themselves; without the file there are no namespaces.
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"])
}

/// Makes a directory and its parents, for the daemon's user only.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_held_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let root = Root::open(&path).unwrap();
        assert!(matches!(Root::open(&path), Err(RootError::Locked(_))));
        drop(root);
        Root::open(&path).unwrap();
    }

    #[test]
    fn refuses_paths_that_overlay_options_cannot_hold() {
        for path in ["relative", "/tmp/with:colon", "/tmp/with,comma", "/tmp/with\\backslash"] {
            assert!(matches!(Root::open(Path::new(path)), Err(RootError::Path(_))), "{path}");
        }
    }

    #[test]
    fn refuses_a_root_on_overlayfs() {
        let base = tempfile::tempdir().unwrap();
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        let at = |name: &str| base.path().join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount(
            "overlay",
            at("merged"),
            "overlay",
            rustix::mount::MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        let refused = Root::open(&base.path().join("merged/root"));
        rustix::mount::unmount(at("merged"), rustix::mount::UnmountFlags::DETACH).unwrap();
        assert!(matches!(refused, Err(RootError::Overlay(_))), "{refused:?}");
    }
}
