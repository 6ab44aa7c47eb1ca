//! Mounting an image over files, without loop devices, through the mount API of Linux 5.2.
//!
//! A mount is first *detached*: nobody sees it, and it goes when it is dropped. [`DetachedMount::attach`] puts
//! it on a directory. So a mount can be tried, read and tuned before anything depends on it.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs, io,
    io::Read as _,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use format_spec::{
    Digest, Index, IndexBuilder, Inode,
    builder::blank_inode,
    records::mode::{DIRECTORY, REGULAR},
};
use rustix::{
    fs::{CWD, Mode, OFlags, fstat, open, openat, statfs},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    },
};
use tracing::debug;
use tree::erofs::{layout::BLOCK, write_image};

use crate::read_ahead::{BDI_DIRECTORY, set_of};

/// Longest value that `fsconfig` takes (Linux fs/fsopen.c: 256 with the closing zero).
const OPTION_LEN_MAX: usize = 255;
/// Most messages of the kernel that are reported; its own queue has 8 (Linux fs/fs_context.c).
const MESSAGES_MAX: usize = 8;
/// Names that [`BDI_DIRECTORY`] has for EROFS start so (Linux `super_setup_bdi`).
const BDI_PREFIX: &str = "erofs-";

/// `f_type` of file systems over whose files no EROFS is mounted (Linux include/uapi/linux/magic.h).
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;
const FUSE_MAGIC: u64 = 0x6573_5546;

/// An image cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This kernel has no EROFS, none over files (Linux 6.12 has), or this user may not mount.
    #[error("kernel mode is not to be had: {0}")]
    Unsupported(&'static str),
    /// The kernel refused image or devices.
    #[error("cannot mount the image {}: {error}{messages}", image.display())]
    Image {
        /// The image.
        image: PathBuf,
        /// What it said.
        error: io::Error,
        /// What it said in words, each message after a colon; may be empty.
        messages: String,
    },
    /// A file cannot be used.
    #[error("{}: {error}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// The mount point cannot be used.
    #[error("cannot mount on {}: {error}", path.display())]
    MountPoint {
        /// The directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}

impl MountError {
    /// Whether there was no room for a file: this says nothing of the kernel.
    pub(crate) fn is_disk_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::File { error, .. } if matches!(error.kind(), StorageFull | QuotaExceeded))
    }
}

/// Mounts an image read-only on a directory.
///
/// `devices` are the plain address spaces of the layers, lowest first, one for each: regular files on any file
/// system that has a page cache, those of FUSE too, but not on a stacked one such as overlayfs. The kernel
/// keeps all files open as long as the mount lives; content is read from them when it is first needed. A device
/// must reach to the end of the last block in use (`ImageSummary::device_block_counts`), filled up with zeros:
/// Linux 6.18 answers EIO where it ends within a block.
/// `read_ahead_kb` replaces the kernel's 128; `None` keeps it.
///
/// # Errors
///
/// When the kernel cannot do it, or refuses; then nothing is mounted.
pub fn mount_erofs(
    image: &Path,
    devices: &[PathBuf],
    mount_point: &Path,
    read_ahead_kb: Option<u32>,
) -> Result<(), MountError> {
    let mount = DetachedMount::open(image, devices, DeviceAccess::Cached)?;
    if let Some(kb) = read_ahead_kb {
        mount.set_read_ahead(kb)?;
    }
    mount.attach(mount_point)
}

/// Whether this kernel mounts images with device tables over files of `directory`: tries it with a small one.
///
/// `directory` must be writable; what is made there is removed.
///
/// # Errors
///
/// Why not.
pub fn probe(directory: &Path) -> Result<(), MountError> {
    const CONTENT: &[u8] = b"lazuli";
    let file_error = |error| MountError::File { path: directory.to_owned(), error };
    let scratch = tempfile::Builder::new().prefix("erofs-probe-").tempdir_in(directory).map_err(file_error)?;
    let (image, device) = (scratch.path().join("image"), scratch.path().join("device"));
    let mut block = [0; BLOCK];
    block[..CONTENT.len()].copy_from_slice(CONTENT);
    fs::write(&device, block).map_err(file_error)?;
    let output = fs::File::create(&image).map_err(file_error)?;
    write_image(&probe_tree(CONTENT.len() as u64), output).map_err(|error| file_error(io::Error::other(error)))?;

    let mount = DetachedMount::open(&image, &[device], DeviceAccess::Cached)?;
    let file = openat(&mount, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut content = Vec::new();
    file.map_err(io::Error::from)
        .and_then(|file| fs::File::from(file).read_to_end(&mut content))
        .map_err(|error| MountError::File { path: image, error })?;
    if content == CONTENT { Ok(()) } else { Err(MountError::Unsupported("the kernel reads wrong bytes")) }
}

/// The tree of one file with `len` bytes.
fn probe_tree(len: u64) -> Index<Vec<u8>> {
    const VALID: &str = "one file makes a valid tree";
    let mut builder = IndexBuilder::default();
    builder.add_inode(blank_inode(DIRECTORY | 0o755)).expect(VALID);
    let file = Inode { size: len.into(), ..blank_inode(REGULAR | 0o644) };
    let file = builder.add_inode(file).expect(VALID);
    builder.add_directory(0, [("file", file)]).expect(VALID);
    Index::open(builder.finish_tree(&[Digest::of(b"")]).expect(VALID)).expect(VALID)
}

/// How the kernel reads content from the devices into the page cache of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceAccess {
    /// Through the page cache of the device's own file system.
    Cached,
    /// Past it, and without waiting for more than a reader needs. For devices that a daemon serves: cached, the pages
    /// would be kept twice, read-ahead would go on behind the end of a file, and a reader would wait for all that is
    /// read ahead. Linux before 6.14 cannot, and takes the other way.
    Direct,
}

/// A mount that is on no directory yet. Dropping it unmounts.
#[derive(Debug)]
pub struct DetachedMount {
    mount: OwnedFd,
    /// The devices that read ahead for it; more than one if others mounted at the same moment, who have waited for
    /// nobody.
    bdi_names: Vec<OsString>,
}

impl DetachedMount {
    /// Mounts an image, see [`mount_erofs`].
    ///
    /// # Errors
    ///
    /// When the kernel cannot do it, or refuses.
    pub fn open(image: &Path, devices: &[PathBuf], access: DeviceAccess) -> Result<Self, MountError> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
            Errno::NODEV => MountError::Unsupported("this kernel has no EROFS"),
            Errno::PERM => MountError::Unsupported("mounting needs CAP_SYS_ADMIN"),
            _ => MountError::Unsupported("this kernel has no fsopen"),
        })?;
        let refuse = |error| match error {
            // The kernel's word for all that follows.
            Errno::NOTBLK => MountError::Unsupported(why_not_over(image)),
            error => {
                MountError::Image { image: image.to_owned(), error: error.into(), messages: messages(context.as_fd()) }
            }
        };
        let source = OptionPath::new(image)?;
        fsconfig_set_string(&context, "source", source.value.as_os_str()).map_err(refuse)?;
        // Those with a long path must be open until the kernel has opened them itself.
        let mut long_paths = Vec::new();
        for device in devices {
            let device = OptionPath::new(device)?;
            fsconfig_set_string(&context, "device", device.value.as_os_str()).map_err(refuse)?;
            long_paths.extend(device.file);
        }
        if access == DeviceAccess::Direct
            && let Err(error) = fsconfig_set_flag(&context, "directio")
        {
            debug!(%error, messages = messages(context.as_fd()), "devices are read through the page cache");
        }
        let bdi_names_before = bdi_names();
        fsconfig_create(&context).map_err(refuse)?;
        let bdi_names = bdi_names().difference(&bdi_names_before).cloned().collect();
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(refuse)?;
        Ok(Self { mount, bdi_names })
    }

    /// Sets how far the kernel reads ahead of a sequential reader, for files opened from now on.
    ///
    /// # Errors
    ///
    /// When `/sys` does not list the mount or cannot be written.
    pub fn set_read_ahead(&self, kb: u32) -> Result<(), MountError> {
        let directory = Path::new(BDI_DIRECTORY);
        if self.bdi_names.is_empty() {
            let error = io::Error::new(io::ErrorKind::NotFound, "no entry for the mount");
            return Err(MountError::File { path: directory.to_owned(), error });
        }
        for name in &self.bdi_names {
            let name = name.to_string_lossy();
            set_of(&name, kb).map_err(|error| MountError::File { path: directory.join(&*name), error })?;
        }
        Ok(())
    }

    /// The names in `/sys/class/bdi` of the devices that read ahead for it.
    pub(crate) fn read_ahead_devices(&self) -> Vec<String> {
        self.bdi_names.iter().map(|name| name.to_string_lossy().into_owned()).collect()
    }

    /// What `stat` shows as the device of all its files; no other mount that still exists has the same.
    ///
    /// # Errors
    ///
    /// When the mount cannot be looked at.
    pub fn device(&self) -> io::Result<u64> {
        Ok(fstat(&self.mount)?.st_dev)
    }

    /// Puts the mount on a directory, where it stays until somebody unmounts it.
    ///
    /// # Errors
    ///
    /// When the directory cannot be a mount point.
    pub fn attach(self, mount_point: &Path) -> Result<(), MountError> {
        self.move_to(mount_point, MoveMountFlags::empty())
    }

    /// Takes the place of the mount on a directory: at no moment is there none.
    ///
    /// Who uses the other one keeps it.
    ///
    /// # Errors
    ///
    /// When nothing is mounted there, or the kernel refuses.
    pub fn replace(self, mount_point: &Path) -> Result<(), MountError> {
        // Beneath the other one, which is then taken off.
        self.move_to(mount_point, MoveMountFlags::MOVE_MOUNT_BENEATH)?;
        unmount(mount_point, UnmountFlags::DETACH)
            .map_err(|error| MountError::MountPoint { path: mount_point.to_owned(), error: error.into() })
    }

    fn move_to(&self, mount_point: &Path, flags: MoveMountFlags) -> Result<(), MountError> {
        move_mount(&self.mount, "", CWD, mount_point, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | flags)
            .map_err(|error| MountError::MountPoint { path: mount_point.to_owned(), error: error.into() })
    }
}

impl AsFd for DetachedMount {
    /// The root directory of the mount.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// A path as `fsconfig` takes it: as it is, or through a descriptor if it is too long.
struct OptionPath {
    value: OsString,
    file: Option<OwnedFd>,
}

impl OptionPath {
    fn new(path: &Path) -> Result<Self, MountError> {
        if path.as_os_str().len() <= OPTION_LEN_MAX {
            return Ok(Self { value: path.as_os_str().to_owned(), file: None });
        }
        let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| MountError::File { path: path.to_owned(), error: error.into() })?;
        Ok(Self { value: format!("/proc/self/fd/{}", file.as_raw_fd()).into(), file: Some(file) })
    }
}

/// Why the kernel mounts no EROFS over an image, as far as that follows from where it lies.
fn why_not_over(image: &Path) -> &'static str {
    let file_system = statfs(image).ok().and_then(|statistics| u64::try_from(statistics.f_type).ok());
    match file_system {
        Some(OVERLAYFS_MAGIC) => {
            "the root directory lies on overlayfs, and the kernel mounts EROFS over no stacked file system"
        }
        Some(TMPFS_MAGIC | RAMFS_MAGIC) => {
            "the root directory lies in memory (tmpfs), and the kernel mounts EROFS over files of a disk only"
        }
        Some(EROFS_MAGIC) => {
            "the root directory lies on an EROFS over a file, and the kernel mounts no second one above it"
        }
        Some(FUSE_MAGIC) => {
            "the root directory lies on a FUSE file system with passthrough, which is a stacked one to the kernel"
        }
        _ => "this kernel mounts EROFS over no files (Linux 6.12 does), or over none of this file system",
    }
}

/// What a file system context has to say, each message after a colon.
fn messages(context: BorrowedFd<'_>) -> String {
    let mut text = String::new();
    let mut message = [0; 1024];
    for _ in 0..MESSAGES_MAX {
        let Ok(len) = rustix::io::read(context, &mut message) else { break };
        // A letter for the level and a blank come first.
        let line = OsStr::from_bytes(message.get(2..len).unwrap_or_default()).to_string_lossy().into_owned();
        text.push_str(": ");
        text.push_str(line.trim_end());
    }
    text
}

/// EROFS's entries of [`BDI_DIRECTORY`]; empty where that cannot be read.
fn bdi_names() -> BTreeSet<OsString> {
    let entries = fs::read_dir(BDI_DIRECTORY).into_iter().flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    names.filter(|name| name.as_bytes().starts_with(BDI_PREFIX.as_bytes())).collect()
}
