//! What of a FUSE session outlives a process: its connection to the kernel.
//!
//! The kernel keeps a session as long as somebody has its `/dev/fuse` descriptor open, and requests wait while nobody
//! reads from it. So the descriptor always has two holders, `lazuli-fused` and whoever would start the next one; and
//! the first message of the kernel, `FUSE_INIT`, which it sends only once, lies on disk before anything depends on
//! it. A new process plays it to `fuser` as if the kernel had just sent it, and has the kernel send again what the last
//! process had read and not answered (`FUSE_NOTIFY_RESEND`, Linux 6.9).
//!
//! Only one process uses a session at a time: the one that holds the lock of the root directory. At most one session
//! of a root is alive: a new one is mounted after what stands at the mount point was aborted.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use control::{descriptor, root::SESSION_START};
use fuser::{Config, Filesystem, SessionACL};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use tracing::{info, warn};

use crate::error::Error;

/// Name of the file system in the mount table.
pub(crate) const NAME: &str = "lazuli";
/// Longest message that is read: what the kernel asks for at least (`FUSE_MIN_READ_BUFFER`, include/uapi/linux/fuse.h).
const MESSAGE_LEN_MAX: usize = 8192;
/// `FUSE_NOTIFY_RESEND`, as a message of 16 bytes: its length, the code, no request that it answers.
const RESEND: [u32; 4] = [16, 7, 0, 0];

/// A mounted session and everything that is needed to go on with it.
#[derive(Debug)]
pub(crate) struct Connection {
    device: OwnedFd,
    init: InitMessage,
    is_new: bool,
}

impl Connection {
    /// Mounts a new session on the directory `mount_point`; what an earlier one left there is aborted and goes.
    ///
    /// # Errors
    ///
    /// When the mount point, FUSE or `root` cannot be used; then nothing is mounted.
    pub(crate) fn mount(root: &Path, mount_point: &Path) -> Result<Self, Error> {
        remove_old_sessions(mount_point)?;
        fs::create_dir_all(mount_point).map_err(Error::disk(mount_point))?;
        let device = descriptor::open_fuse_device().map_err(Error::Device)?;
        let failed = |error| Error::Mount { path: mount_point.to_owned(), error };
        mount(mount_point, &device).map_err(failed)?;
        let begun = read_init(&device).map_err(failed).and_then(|init| {
            init.save(root)?;
            Ok(init)
        });
        match begun {
            Ok(init) => Ok(Self { device, init, is_new: true }),
            Err(error) => {
                _ = rustix::mount::unmount(mount_point, UnmountFlags::DETACH);
                Err(error)
            }
        }
    }

    /// Goes on with the session of `device`; `None` if it has ended, is not on `mount_point` or has left no message.
    ///
    /// # Errors
    ///
    /// When the mount table cannot be read, or the kernel gives no second descriptor.
    pub(crate) fn take_over(root: &Path, mount_point: &Path, device: OwnedFd) -> Result<Option<Self>, Error> {
        let decline = |why: &str| {
            warn!(mount_point = %mount_point.display(), why, "session cannot be taken over, a new one is mounted");
            Ok(None)
        };
        if !descriptor::has_session(&device) {
            return decline("it has ended");
        }
        if !has_session(mount_point)? {
            return decline("it was unmounted");
        }
        let Some(init) = InitMessage::load(root) else {
            return decline("the kernel's first message is not there");
        };
        let device = if init.can_resend() {
            device
        } else {
            // What the last process has read would never be answered. On this descriptor nothing has been read, and
            // with the last duplicate of the old one the readers get an error instead.
            warn!("reads under way are lost: this kernel cannot send requests again, Linux 6.9 can");
            descriptor::clone_fuse_device(&device).map_err(Error::Device)?
        };
        Ok(Some(Self { device, init, is_new: false }))
    }

    /// Whether it was mounted by this process.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    /// For the other holder.
    pub(crate) fn device(&self) -> &OwnedFd {
        &self.device
    }

    /// Has `filesystem` serve the session, once it is run.
    ///
    /// The session's threads share one descriptor: a clone for each, which `fuser` can make, would be known to no
    /// other holder, and what was read from it would be lost with the process.
    ///
    /// # Errors
    ///
    /// What the kernel or `fuser` says.
    pub(crate) fn begin<F: Filesystem>(&self, filesystem: F, config: &Config) -> io::Result<fuser::Session<F>> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::io::write(&ours, &self.init.0)?;
        let mut config = config.clone();
        config.clone_fd = false;
        let session = fuser::Session::from_fd(filesystem, theirs, SessionACL::All, config)?;
        let mut reply = [0; MESSAGE_LEN_MAX];
        let reply_len = rustix::io::read(&ours, &mut reply)?;
        if self.is_new {
            rustix::io::write(&self.device, &reply[..reply_len])?;
        } else if self.init.can_resend() {
            rustix::io::write(&self.device, RESEND.map(u32::to_ne_bytes).as_flattened())?;
        }
        descriptor::replace(session.as_fd(), &self.device)?;
        Ok(session)
    }
}

/// The kernel's first message, `struct fuse_in_header` and `struct fuse_init_in` (include/uapi/linux/fuse.h), in the
/// byte order of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct InitMessage(Vec<u8>);

impl InitMessage {
    const OPCODE: u32 = 26;
    const MAJOR: u32 = 7;
    const OPCODE_AT: usize = 4;
    const MAJOR_AT: usize = 40;
    const FLAGS_AT: usize = 52;
    const FLAGS2_AT: usize = 56;
    /// Without it there is no `flags2`.
    const INIT_EXT: u32 = 1 << 30;
    /// `FUSE_HAS_RESEND`, bit 39 of both flags together.
    const HAS_RESEND: u32 = 1 << (39 - 32);

    /// `None` if this is something else, or of another version of the protocol.
    fn new(bytes: &[u8]) -> Option<Self> {
        let message = Self(bytes.to_owned());
        let is_whole = message.word(0).and_then(|len| usize::try_from(len).ok()) == Some(bytes.len());
        let is_init = message.word(Self::OPCODE_AT) == Some(Self::OPCODE);
        let is_known = message.word(Self::MAJOR_AT) == Some(Self::MAJOR);
        (is_whole && is_init && is_known).then_some(message)
    }

    fn load(root: &Path) -> Option<Self> {
        let path = root.join(SESSION_START);
        match fs::read(&path) {
            Ok(bytes) => Self::new(&bytes),
            Err(error) => {
                warn!(path = %path.display(), %error, "cannot be read");
                None
            }
        }
    }

    /// Not synced: a session does not outlive the kernel.
    fn save(&self, root: &Path) -> Result<(), Error> {
        let save = || -> io::Result<()> {
            let file = tempfile::NamedTempFile::new_in(root)?;
            fs::write(file.path(), &self.0)?;
            file.persist(root.join(SESSION_START))?;
            Ok(())
        };
        save().map_err(Error::disk(root.join(SESSION_START)))
    }

    /// Whether this kernel sends again what was not answered.
    fn can_resend(&self) -> bool {
        let has = |at, flag| self.word(at).is_some_and(|flags| flags & flag != 0);
        has(Self::FLAGS_AT, Self::INIT_EXT) && has(Self::FLAGS2_AT, Self::HAS_RESEND)
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.0.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }
}

fn read_init(device: &OwnedFd) -> io::Result<InitMessage> {
    let mut buffer = [0; MESSAGE_LEN_MAX];
    let len = rustix::io::retry_on_intr(|| rustix::io::read(device, &mut buffer))?;
    InitMessage::new(&buffer[..len]).ok_or_else(|| io::Error::other("the kernel speaks another version of FUSE"))
}

/// Everything an image can hold works as on a local file system, but for writing.
fn mount(mount_point: &Path, device: &OwnedFd) -> io::Result<()> {
    let mode = fs::metadata(mount_point)?.mode();
    let (device, user, group) = (device.as_raw_fd(), rustix::process::geteuid(), rustix::process::getegid());
    let options = format!(
        "fd={device},rootmode={mode:o},user_id={},group_id={},default_permissions,allow_other",
        user.as_raw(),
        group.as_raw()
    );
    let options = std::ffi::CString::new(options)?;
    Ok(rustix::mount::mount(NAME, mount_point, "fuse", MountFlags::RDONLY, Some(options.as_c_str()))?)
}

/// Takes every session from a mount point that nobody serves any longer, and ends it for those who use it still: they
/// get an error instead of waiting for ever.
fn remove_old_sessions(mount_point: &Path) -> Result<(), Error> {
    while has_session(mount_point)? {
        info!(mount_point = %mount_point.display(), "removing the session of a process that has ended");
        rustix::mount::unmount(mount_point, UnmountFlags::FORCE | UnmountFlags::DETACH)
            .map_err(|error| Error::MountPoint { path: mount_point.to_owned(), error: error.into() })?;
    }
    Ok(())
}

/// Whether a session of ours is on top at a mount point; asks the mount table, as a dead or unserved mount may say
/// anything or nothing.
pub(crate) fn has_session(mount_point: &Path) -> Result<bool, Error> {
    const MOUNT_TABLE: &str = "/proc/self/mountinfo";
    let table = fs::read_to_string(MOUNT_TABLE).map_err(Error::disk(MOUNT_TABLE))?;
    let is_here = |line: &&str| line.split(' ').nth(4).is_some_and(|path| unescape(path) == mount_point);
    let on_top = table.lines().rfind(is_here).and_then(|line| line.split_once(" - "));
    Ok(on_top.is_some_and(|(_, rest)| rest.starts_with(&format!("fuse {NAME} "))))
}

/// A path of the mount table: some bytes stand there as a backslash and three octal digits (proc(5)).
fn unescape(path: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.first_chunk::<3>().and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(flags: u32, flags2: u32) -> Vec<u8> {
        let mut words = [0_u32; 26];
        (words[0], words[1]) = (104, InitMessage::OPCODE);
        (words[10], words[11], words[13], words[14]) = (7, 45, flags, flags2);
        words.map(u32::to_ne_bytes).as_flattened().to_owned()
    }

    #[test]
    fn a_message_says_whether_the_kernel_can_send_again() {
        let can = |flags, flags2| InitMessage::new(&init(flags, flags2)).unwrap().can_resend();
        assert!(can(InitMessage::INIT_EXT, InitMessage::HAS_RESEND));
        assert!(!can(InitMessage::INIT_EXT, !InitMessage::HAS_RESEND));
        assert!(!can(!InitMessage::INIT_EXT, InitMessage::HAS_RESEND), "there is no second word");
    }

    #[test]
    fn anything_but_a_whole_first_message_is_refused() {
        let whole = init(0, 0);
        for len in 0..whole.len() {
            assert_eq!(InitMessage::new(&whole[..len]), None, "{len} bytes");
        }
        for (at, value) in [(InitMessage::OPCODE_AT, 27_u32), (InitMessage::MAJOR_AT, 8)] {
            let mut other = whole.clone();
            other[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            assert_eq!(InitMessage::new(&other), None);
        }
        let root = tempfile::tempdir().unwrap();
        assert_eq!(InitMessage::load(root.path()), None);
        let message = InitMessage::new(&whole).unwrap();
        message.save(root.path()).unwrap();
        assert_eq!(InitMessage::load(root.path()), Some(message));
    }

    #[test]
    fn paths_of_the_mount_table_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c\\011"), Path::new("/a b\\c\t"));
        assert_eq!(unescape("/plain\\0"), Path::new("/plain\\0"));
    }
}
