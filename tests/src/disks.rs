//! Disks that are small, and disks that are slow or have blocks that cannot be read.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};

use crate::{
    HarnessError, Result, Scratch,
    error::Context as _,
    process::{command, run},
};

/// A file system of its own, on a loop device.
#[derive(Debug)]
pub struct SmallDisk {
    directory: PathBuf,
}

impl SmallDisk {
    /// Mounts an empty ext4 of `len` bytes at `<scratch>/<name>`.
    ///
    /// # Errors
    ///
    /// Without loop devices.
    pub fn mount(scratch: &Scratch, name: &str, len: u64) -> Result<Self> {
        let image = scratch.join(format!("{name}.img"));
        let file = File::create(&image).at("creating", &image)?;
        file.set_len(len).at("extending", &image)?;
        Self::mount_image(scratch, name, &image)
    }

    fn mount_image(scratch: &Scratch, name: &str, image: &Path) -> Result<Self> {
        let directory = scratch.directory(name)?;
        // Nothing is kept for root, everything is made now: what happens later is of the test.
        let words = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        run(command("mkfs.ext4", words).arg(image))?;
        run(command("mount", ["-o", "loop"]).arg(image).arg(&directory))?;
        Ok(Self { directory })
    }

    /// Takes all the room that is left.
    ///
    /// # Errors
    ///
    /// When no file can be made.
    pub fn fill(&self) -> Result<()> {
        let path = self.directory.join("filling");
        let mut file = File::create(&path).at("creating", &path)?;
        for piece_len in [1 << 20, 64 << 10, 4 << 10] {
            // Ends with "no space left".
            while file.write_all(&vec![1; piece_len]).and_then(|()| file.sync_data()).is_ok() {}
        }
        Ok(())
    }

    /// Gives it back.
    ///
    /// # Errors
    ///
    /// When it was not taken.
    pub fn free(&self) -> Result<()> {
        let path = self.directory.join("filling");
        fs::remove_file(&path).at("removing", &path)?;
        run(command("sync", ["-f"]).arg(&self.directory)).map(drop)
    }
}

/// A disk that can become slow, and of which blocks can become unreadable: an ext4 on a loop device over a file that this
/// process serves.
#[derive(Debug)]
pub struct BadDisk {
    bad: Arc<Mutex<Vec<Range<u64>>>>,
    sync_takes_ms: Arc<AtomicU64>,
    directory: PathBuf,
    _session: BackgroundSession,
}

impl BadDisk {
    /// Mounts an empty one of `len` bytes at `<scratch>/<name>`.
    ///
    /// # Errors
    ///
    /// Without loop devices, or FUSE.
    pub fn mount(scratch: &Scratch, name: &str, len: u64) -> Result<Self> {
        let backing = scratch.join(format!("{name}.backing"));
        let file = File::options().read(true).write(true).create_new(true).open(&backing).at("creating", &backing)?;
        file.set_len(len).at("extending", &backing)?;
        let served = scratch.directory(format!("{name}.served"))?;
        let bad = Arc::<Mutex<Vec<Range<u64>>>>::default();
        let sync_takes_ms = Arc::<AtomicU64>::default();
        let filesystem = OneFile { file, len, bad: Arc::clone(&bad), sync_takes_ms: Arc::clone(&sync_takes_ms) };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("bad-disk".to_owned())];
        let session = fuser::spawn_mount(filesystem, &served, &config).context("mounting a disk")?;
        let directory = SmallDisk::mount_image(scratch, name, &served.join(FILE_NAME))?.directory;
        Ok(Self { bad, sync_takes_ms, directory, _session: session })
    }

    /// Has each flush of its cache take so long from now on, and do nothing else meanwhile.
    ///
    /// # Errors
    ///
    /// When what is dirty by now, and not of what comes, cannot be written.
    pub fn slow_down(&self, sync_takes: Duration) -> Result<()> {
        run(command("sync", ["-f"]).arg(&self.directory))?;
        self.sync_takes_ms.store(u64::try_from(sync_takes.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    /// Makes the first block of a file that lies on it unreadable.
    ///
    /// # Errors
    ///
    /// When its blocks cannot be found.
    pub fn spoil(&self, file: &Path) -> Result<()> {
        self.spoil_blocks(file, |runs| runs.truncate(1), |run| run.start..run.start + 1)
    }

    /// Makes all of a file that lies on it unreadable, as far as it is not in memory.
    ///
    /// # Errors
    ///
    /// When its blocks cannot be found.
    pub fn spoil_all(&self, file: &Path) -> Result<()> {
        self.spoil_blocks(file, |_| {}, |run| run)
    }

    fn spoil_blocks(
        &self,
        file: &Path,
        choose: impl Fn(&mut Vec<Range<u64>>),
        part: impl Fn(Range<u64>) -> Range<u64>,
    ) -> Result<()> {
        let printed = run(command("filefrag", ["-v", "-b4096"]).arg(file))?;
        // `   0:        0..       0:      34816..     34816:      1:             last,eof`
        let physical = |line: &str| {
            let mut fields = line.trim().split(':');
            let _number = fields.next()?.parse::<u64>().ok()?;
            let (first, last) = fields.nth(1)?.split_once("..")?;
            Some(first.trim().parse::<u64>().ok()?..last.trim().parse::<u64>().ok()? + 1)
        };
        let mut runs: Vec<_> = printed.lines().filter_map(physical).collect();
        if runs.is_empty() {
            return Err(HarnessError::Unexpected(format!("filefrag: {printed}")));
        }
        choose(&mut runs);
        let bytes = runs.into_iter().map(part).map(|run| run.start * 4096..run.end * 4096);
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(())
    }
}

const FILE_NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const KEPT: Duration = Duration::from_secs(3600);

/// A file system with one file.
struct OneFile {
    file: File,
    len: u64,
    bad: Arc<Mutex<Vec<Range<u64>>>>,
    sync_takes_ms: Arc<AtomicU64>,
}

impl OneFile {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) =
            if ino == FILE { (FileType::RegularFile, 0o600, self.len) } else { (FileType::Directory, 0o700, 0) };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == FILE_NAME {
            true => reply.entry(&KEPT, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&KEPT, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Every read comes here: the page cache would know the bytes still.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = offset + u64::from(size);
        let is_bad = |bad: &Range<u64>| bad.start < end && offset < bad.end;
        if self.bad.lock().unwrap_or_else(PoisonError::into_inner).iter().any(is_bad) {
            return reply.error(Errno::EIO);
        }
        let mut bytes = vec![0; usize::try_from(end.min(self.len).saturating_sub(offset)).unwrap_or(0)];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // As disks do, which have spare blocks.
        let end = offset + data.len() as u64;
        let is_left = |bad: &Range<u64>| bad.start < offset || bad.end > end;
        self.bad.lock().unwrap_or_else(PoisonError::into_inner).retain(is_left);
        match self.file.write_all_at(data, offset) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(0)),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // The machine does not crash in these tests: a sync that is none makes them faster.
        thread::sleep(Duration::from_millis(self.sync_takes_ms.load(Ordering::Relaxed)));
        reply.ok();
    }
}
