//! The FUSE operations: a thin shell around `namespace.rs`.
//!
//! Nothing ever changes below a node number, so the kernel may keep whatever it was told: attributes,
//! names, names that do not exist, directory listings, link targets and pages. Opening a file or directory
//! needs no request at all (`ENOSYS` to the first one tells the kernel so); there are no file handles, and
//! forgetting is nothing to us.
//!
//! No request waits on a session thread: a read whose bytes are missing takes its reply along to `storage`, and a
//! request for what an earlier process has shown and this one does not yet waits in a task of its own.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use format_spec::records::mode;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use tokio::runtime::Handle;
use tracing::{debug, warn};

use crate::{
    namespace::{Entry, Found, Namespace},
    tree::{BLOCK_LEN, Content, Sought},
};

/// How long the kernel may keep what never changes: a year, well inside what it can count.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Longest name of a directory entry (`NAME_MAX`).
const NAME_LEN_MAX: u32 = 255;
/// Requests that nobody waits for, read-ahead and EROFS's reads above all, which the kernel may have open: as many as
/// the protocol can say. All images share the session, each of these may wait for a registry, and with the last of them
/// taken even what lies on the disk would be read no longer. One that waits takes some hundred bytes here; its pages the
/// kernel keeps all the same, in its own queue.
const BACKGROUND_REQUESTS_MAX: u16 = u16::MAX;
/// Node numbers are never used again, so generations do not differ.
const GENERATION: Generation = Generation(0);
/// What the kernel is asked for where it can: listings with attributes, parallel lookups in a directory, cached link
/// targets, reads past the page cache that nobody waits for (EROFS mounts over the session), ACLs that count in
/// permission checks as on any other file system, requests that are sent again to the next process, and mounts for user
/// namespaces that show other owners.
///
/// Not passthrough (`FUSE_PASSTHROUGH`): a session that asks for it is a stacked file system to the kernel, which mounts
/// no EROFS over files of such a one. It would be the end of kernel mode.
const WANTED: [InitFlags; 8] = [
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_HAS_RESEND,
    InitFlags::FUSE_ALLOW_IDMAP,
];

thread_local! {
    /// Where reads of this session thread are assembled: a request has at most 1 MiB (Linux fs/fuse/fuse_i.h).
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The file system of one session.
#[derive(Debug)]
pub(crate) struct LazuliFs {
    namespace: Arc<Namespace>,
    runtime: Handle,
    /// The kernel understands `ENOSYS` to `open` as "do not ask again".
    is_open_needless: bool,
    /// The same for `opendir`.
    is_opendir_needless: bool,
}

impl LazuliFs {
    /// Requests that cannot be answered at once wait on `runtime`.
    pub(crate) fn new(namespace: Arc<Namespace>, runtime: Handle) -> Self {
        Self { namespace, runtime, is_open_needless: false, is_opendir_needless: false }
    }

    /// Answers at once, or in the background when `is_there` says so; in any case when nothing more comes.
    fn answer(
        &self,
        is_there: impl Fn(&Namespace) -> bool + Send + Sync + 'static,
        answer: impl FnOnce(&Namespace) + Send + 'static,
    ) {
        if !self.namespace.is_incomplete() || is_there(&self.namespace) {
            return answer(&self.namespace);
        }
        let namespace = self.namespace.clone();
        self.runtime.spawn(async move {
            namespace.wait_for(is_there).await;
            // Here, although it may read a file: threads that may block could all be waiting for this very answer.
            answer(&namespace);
        });
    }

    /// [`Self::answer`] for a request that concerns one file.
    fn answer_about(&self, number: INodeNo, answer: impl FnOnce(&Namespace) + Send + 'static) {
        self.answer(move |namespace| namespace.has(number.0), answer);
    }
}

impl Filesystem for LazuliFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        for wanted in WANTED {
            if config.add_capabilities(wanted).is_err() {
                debug!(?wanted, "kernel cannot");
            }
        }
        self.is_open_needless = offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.is_opendir_needless = offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        // The threshold is the number from which on the kernel reads ahead no longer.
        for set in [KernelConfig::set_max_background, KernelConfig::set_congestion_threshold] {
            set(config, BACKGROUND_REQUESTS_MAX).map_err(|least| {
                io::Error::other(format!("kernel allows no {BACKGROUND_REQUESTS_MAX} background requests but {least}"))
            })?;
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name: Arc<[u8]> = name.as_bytes().into();
        let awaited = name.clone();
        self.answer(
            move |namespace| namespace.has_name(parent.0, &awaited),
            move |namespace| match namespace.lookup(parent.0, &name) {
                Ok(Found::Entry(entry)) => reply.entry(&FOR_EVER, &file_attr(&entry), GENERATION),
                Ok(Found::Nothing) => reply.entry(&FOR_EVER, &no_file(), GENERATION),
                Ok(Found::NotYet) => reply.error(Errno::ENOENT),
                Err(error) => reply.error(errno(error)),
            },
        );
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {}

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer_about(number, move |namespace| match namespace.entry(number.0) {
            Ok(entry) => reply.attr(&FOR_EVER, &file_attr(&entry)),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        self.answer_about(number, move |namespace| {
            let mut reply = Some(reply);
            let answered = namespace.read_link(number.0, |target| reply.take().map(|reply| reply.data(target)));
            if let (Err(error), Some(reply)) = (answered, reply) {
                reply.error(errno(error));
            }
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.is_open_needless {
            return reply.error(Errno::ENOSYS);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer_about(number, move |namespace| match namespace.content(number.0, offset, size as usize) {
            Ok(Some(content)) => read_content(&content, reply),
            Ok(None) => reply.data(&[]),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.is_opendir_needless {
            return reply.error(Errno::ENOSYS);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.answer(
            move |namespace| namespace.has_entries(number.0),
            move |namespace| {
                let filled = namespace.read_directory(number.0, offset, |next, name, entry| {
                    !reply.add(INodeNo(entry.number), next, file_type(entry.attributes.mode), OsStr::from_bytes(name))
                });
                match filled {
                    Ok(()) => reply.ok(),
                    Err(error) => reply.error(errno(error)),
                }
            },
        );
    }

    fn readdirplus(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.answer(
            move |namespace| namespace.has_entries(number.0),
            move |namespace| {
                let filled = namespace.read_directory(number.0, offset, |next, name, entry| {
                    let name = OsStr::from_bytes(name);
                    !reply.add(INodeNo(entry.number), next, name, &FOR_EVER, &file_attr(entry), GENERATION)
                });
                match filled {
                    Ok(()) => reply.ok(),
                    Err(error) => reply.error(errno(error)),
                }
            },
        );
    }

    fn statfs(&self, _: &Request, number: INodeNo, reply: ReplyStatfs) {
        self.answer_about(number, move |namespace| {
            let statistics = namespace.statistics(number.0);
            let block_len = block_len();
            reply.statfs(statistics.block_count, 0, 0, statistics.inode_count, 0, block_len, NAME_LEN_MAX, block_len);
        });
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.to_owned();
        self.answer_about(number, move |namespace| {
            let mut reply = Some(reply);
            let answered = namespace
                .xattr(number.0, name.as_bytes(), |value| reply.take().map(|reply| answer_xattr(value, size, reply)));
            if let (Err(error), Some(reply)) = (answered, reply) {
                reply.error(errno(error));
            }
        });
    }

    fn listxattr(&self, _: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer_about(number, move |namespace| match namespace.xattr_names(number.0) {
            Ok(names) => answer_xattr(&names, size, reply),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn lseek(&self, _: &Request, number: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        // Copies leave out what is a hole, overlayfs's own too.
        let (Ok(offset), Some(sought)) = (u64::try_from(offset), sought(whence)) else {
            return reply.error(Errno::EINVAL);
        };
        self.answer_about(number, move |namespace| match namespace.seek(number.0, offset, sought) {
            Ok(found) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Err(error) => reply.error(errno(error)),
        });
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}

/// Answers at once if the bytes are there, else when they have arrived.
fn read_content(content: &Content, reply: ReplyData) {
    READ_BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < content.len {
            buffer.resize(content.len, 0);
        }
        let buffer = &mut buffer[..content.len];
        match content.layer.read_at_if_present(content.plain_offset, buffer) {
            Ok(Some(len)) => reply.data(&buffer[..len]),
            Ok(None) => content.layer.read_then(content.plain_offset, content.len, |bytes| match bytes {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => {
                    debug!(%error, "read failed");
                    reply.error(Errno::EIO);
                }
            }),
            Err(error) => {
                warn!(blob = %content.layer.lazy_layer().blob, %error, "cache file cannot be read");
                reply.error(Errno::EIO);
            }
        }
    });
}

/// The protocol of `getxattr(2)` and `listxattr(2)`: size 0 asks for the length.
fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

/// The target of an `lseek(2)` (include/uapi/linux/fs.h); the kernel does the other kinds itself.
fn sought(whence: i32) -> Option<Sought> {
    const SEEK_DATA: i32 = 3;
    const SEEK_HOLE: i32 = 4;
    match whence {
        SEEK_DATA => Some(Sought::Content),
        SEEK_HOLE => Some(Sought::Hole),
        _ => None,
    }
}

/// An entry without a file: the kernel then remembers that there is none.
fn no_file() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: block_len(),
        flags: 0,
    }
}

fn file_attr(entry: &Entry) -> FileAttr {
    let attributes = &entry.attributes;
    let time = system_time(attributes.mtime_seconds, attributes.mtime_nanoseconds);
    FileAttr {
        ino: INodeNo(entry.number),
        size: attributes.size,
        blocks: attributes.stat_blocks,
        // A tar stream has one time only.
        atime: time,
        mtime: time,
        ctime: time,
        kind: file_type(attributes.mode),
        perm: u16::try_from(attributes.mode & 0o7777).expect("twelve bits"),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        ..no_file()
    }
}

fn file_type(mode: u32) -> FileType {
    match mode & mode::TYPE {
        mode::DIRECTORY => FileType::Directory,
        mode::SYMLINK => FileType::Symlink,
        mode::CHARACTER => FileType::CharDevice,
        mode::BLOCK => FileType::BlockDevice,
        mode::FIFO => FileType::NamedPipe,
        mode::SOCKET => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// Seconds before 1970 count backwards, nanoseconds always forwards, as in `struct timespec`.
fn system_time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = match seconds {
        0.. => SystemTime::UNIX_EPOCH.checked_add(whole),
        _ => SystemTime::UNIX_EPOCH.checked_sub(whole),
    };
    let time = second.and_then(|second| second.checked_add(Duration::from_nanos(nanoseconds.into())));
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

fn block_len() -> u32 {
    u32::try_from(BLOCK_LEN).expect("4096")
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_i32(error.raw_os_error())
}
