//! Mounts of trees with other owners, for user namespaces: where they are, and how they go.
//!
//! ```text
//! <root>/id-mapped/<snapshot>/<name>   made by the snapshotter, of a tree or of its ordinary layers
//! ```
//!
//! They read from the session and from the EROFS mounts, so who takes those away takes these away first.

use std::{fs, io, path::Path};

use rustix::{io::Errno, mount::UnmountFlags};

use crate::root::ID_MAPPED;

/// Detaches what is mounted on the directories in `directory`, and removes them and it; who uses a mount keeps it.
/// Nothing happens where there is no such directory.
///
/// # Errors
///
/// The first one's that stays.
pub fn remove_mounts(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let mount_point = entry?.path();
        detach_all(&mount_point)?;
        remove_empty(&mount_point)?;
    }
    remove_empty(directory)
}

/// Removes the mounts of all snapshots.
///
/// # Errors
///
/// As [`remove_mounts`].
pub fn remove_all(root: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(root.join(ID_MAPPED)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    entries.into_iter().try_for_each(|entry| remove_mounts(&entry?.path()))
}

/// Never with what is in it: that may be a layer. Another daemon may have been faster.
fn remove_empty(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Detaches everything that is mounted on a directory, which need not exist.
///
/// # Errors
///
/// What the kernel says.
pub fn detach_all(mount_point: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_go_and_what_they_show_stays() {
        let root = tempfile::tempdir().unwrap();
        let (shown, snapshot) = (root.path().join("layer"), root.path().join(ID_MAPPED).join("7"));
        fs::create_dir(&shown).unwrap();
        fs::write(shown.join("file"), "x").unwrap();
        for name in ["layers", "tree"] {
            fs::create_dir_all(snapshot.join(name)).unwrap();
            // The one above the other.
            rustix::mount::mount_bind(&shown, snapshot.join(name)).unwrap();
            rustix::mount::mount_bind(&shown, snapshot.join(name)).unwrap();
        }
        remove_all(root.path()).unwrap();
        remove_all(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path().join(ID_MAPPED)).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(shown.join("file")).unwrap(), "x");
        remove_mounts(&snapshot).unwrap();
    }

    #[test]
    fn nothing_but_mount_points_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(ID_MAPPED).join("7/layers/file");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "x").unwrap();
        assert_eq!(remove_all(root.path()).unwrap_err().kind(), io::ErrorKind::DirectoryNotEmpty);
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    }
}
