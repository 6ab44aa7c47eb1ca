//! How far the kernel reads ahead: as far as it helps where bytes are on the disk, hardly where they have to be fetched.
//!
//! A read waits for all of the window that the kernel makes of it, and a fault in a mapped program for a window around
//! it. Of bytes that are not there each window brings whole frames, of which nobody may want anything. `storage` reads
//! ahead of sequential readers by itself, so a small window costs those little.
//!
//! The kernel looks at the setting when a file is opened, so a change counts for files that are opened afterwards.

use std::{fs, io, path::Path};

use rustix::fs::{major, minor};
use tracing::debug;

/// Where the kernel has its settings, by device (Linux Documentation/ABI/testing/sysfs-class-bdi).
pub(crate) const BDI_DIRECTORY: &str = "/sys/class/bdi";
/// KiB that the kernel reads ahead where bytes may have to be fetched: what a fault that maps neighbours too wants.
///
/// A start of Python with pandas and scikit-learn, with a hot pack of exactly what it reads, moved 93 to 96 MB with 64 and
/// 512, and 34 MB with 16, and took half the time.
const INCOMPLETE_KIB: u32 = 16;

/// The window of a mount for which an administrator wants `kib`.
pub(crate) fn window(kib: u32, is_complete: bool) -> u32 {
    if is_complete { kib } else { kib.min(INCOMPLETE_KIB) }
}

/// Sets the window of the file system that is mounted on `mount_point`. Only makes reading faster, so a machine that does
/// not let us is no error.
pub(crate) fn set_window(mount_point: &Path, kib: u32) {
    let set = rustix::fs::stat(mount_point).map_err(io::Error::from);
    let set = set.and_then(|stat| set_of(&name_of(stat.st_dev), kib));
    if let Err(error) = set {
        debug!(mount_point = %mount_point.display(), %error, "read-ahead stays as it is");
    }
}

/// The name in [`BDI_DIRECTORY`] of what `stat` shows as the device of a FUSE session's files.
pub(crate) fn name_of(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

/// Sets the window of a device by its name in [`BDI_DIRECTORY`].
///
/// # Errors
///
/// When there is none, or it cannot be written.
pub(crate) fn set_of(name: &str, kib: u32) -> io::Result<()> {
    fs::write(Path::new(BDI_DIRECTORY).join(name).join("read_ahead_kb"), kib.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_to_be_fetched_is_hardly_read_ahead() {
        assert_eq!([window(512, true), window(512, false)], [512, INCOMPLETE_KIB]);
        assert_eq!([window(4, true), window(4, false)], [4, 4]);
    }
}
