//! System calls that no library has as a safe function.
//!
//! The one file with unsafe code.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::thread::UnshareFlags;

/// Puts this process, which must have one thread only, into a user namespace of its own that maps nobody yet.
///
/// # Errors
///
/// What the kernel says: with several threads, or where user namespaces are switched off.
pub(crate) fn enter_new_user_namespace() -> io::Result<()> {
    // SAFETY: what makes the function unsafe is a table of descriptors that threads stop to share; this flag is
    // about credentials alone, and refused to a process with several threads.
    #[allow(unsafe_code)]
    let entered = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) };
    Ok(entered?)
}

/// Has a mount that is not attached yet show the owners that `user_namespace` maps those of its files to, makes it
/// read-only, and keeps what is mounted in it elsewhere from appearing in it.
///
/// # Errors
///
/// `EINVAL` where its file system does not let owners be mapped; other errors of mount_setattr(2).
pub(crate) fn map_owners(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the kernel reads an empty path with its end and as many bytes of `attributes` as it is told, which is
    // all of them (mount_setattr(2)); both outlive the call. No library has the call yet.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
