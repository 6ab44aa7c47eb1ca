//! Local files served through FUSE, read only.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request,
};

const TTL: Duration = Duration::from_secs(60);

/// A session that serves files under their numbers, until it is dropped.
pub(crate) struct Served {
    mount_point: PathBuf,
    file_count: usize,
    read_count: Arc<AtomicUsize>,
    _session: BackgroundSession,
}

impl Served {
    pub(crate) fn new(paths: Vec<PathBuf>, directory: &Path) -> Self {
        let mount_point = directory.join("fuse");
        fs::create_dir(&mount_point).unwrap();
        let read_count = Arc::new(AtomicUsize::new(0));
        let file_count = paths.len();
        let files = paths.iter().map(|path| File::open(path).unwrap()).collect();
        let files = Files { files, read_count: read_count.clone() };
        let session = fuser::spawn_mount(files, &mount_point, &Config::default()).unwrap();
        Self { mount_point, file_count, read_count, _session: session }
    }

    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        (0..self.file_count).map(|number| self.mount_point.join(number.to_string())).collect()
    }

    pub(crate) fn read_count(&self) -> usize {
        self.read_count.load(Ordering::SeqCst)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A mount over these files that was closed just now may hold them for a moment longer: an ordinary unmount, which
        // the session tries, would find them busy and leave the mount.
        let detached = rustix::mount::unmount(&self.mount_point, rustix::mount::UnmountFlags::DETACH);
        if !std::thread::panicking() {
            detached.unwrap();
        }
    }
}

/// Node 1 is the root directory; node n is file n - 2.
struct Files {
    files: Vec<File>,
    read_count: Arc<AtomicUsize>,
}

impl Files {
    fn file(&self, number: INodeNo) -> Option<&File> {
        self.files.get((number.0 as usize).checked_sub(2)?)
    }

    fn attr(&self, number: INodeNo) -> Option<FileAttr> {
        let size = match number {
            INodeNo(1) => 0,
            _ => self.file(number)?.metadata().unwrap().len(),
        };
        let kind = if number.0 == 1 { FileType::Directory } else { FileType::RegularFile };
        let time = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: number,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match number.and_then(|number| self.attr(INodeNo(number + 2))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(number) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
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
        self.read_count.fetch_add(1, Ordering::SeqCst);
        let mut bytes = vec![0; size as usize];
        let len = self.file(number).unwrap().read_at(&mut bytes, offset).unwrap();
        reply.data(&bytes[..len]);
    }
}
