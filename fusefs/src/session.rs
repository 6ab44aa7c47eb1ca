//! A FUSE session: served by threads of its own, unmounted.
//!
//! The session of `lazuli mount` begins and ends with the process; that of `lazuli-fused` goes from one process to the
//! next ([`crate::connection`]).

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use fuser::{Config, INodeNo, MountOption, Notifier, SessionACL, SessionUnmounter};
use rustix::{io::Errno, mount::UnmountFlags};
use tokio::{runtime::Handle, sync::watch, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    connection::{Connection, NAME},
    error::Error,
    fs::LazuliFs,
    namespace::Namespace,
    read_ahead::{set_window, window},
    sync::blocking,
    users::mounts_over,
};

/// Session threads: more than the cores only help while cache files are read from a slow disk.
const THREADS_MAX: usize = 4;
/// How long an unmounted session may take to end: at once, unless an overlayfs mount keeps it as a layer.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// How a session behaves.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// KiB that the kernel reads ahead of a sequential reader, and around a page fault, where everything is there; less
    /// where it is not. The kernel's own is 128.
    pub read_ahead_kib: u32,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { read_ahead_kib: 512 }
    }
}

/// A mounted session. Dropping it leaves the mount.
#[derive(Debug)]
pub(crate) struct Session {
    mount_point: PathBuf,
    unmounter: Option<Unmounter>,
    notifier: Notifier,
    /// `Some` when the threads have ended.
    ended: watch::Receiver<Option<Result<(), Arc<io::Error>>>>,
}

/// Who mounted it.
#[derive(Debug)]
enum Unmounter {
    /// `fuser` did, maybe with the help of `fusermount3`.
    Fuser(SessionUnmounter),
    /// [`Connection`] did, in this process or an earlier one.
    Own,
    /// It is mounted no longer.
    Detached,
}

impl Session {
    /// Mounts `namespace` on the directory `mount_point` and serves it; blocks until it can be used.
    ///
    /// Needs the runtime it is called on.
    ///
    /// # Errors
    ///
    /// When the mount point or FUSE cannot be used; then nothing is mounted.
    pub(crate) fn mount(
        namespace: Arc<Namespace>,
        mount_point: &Path,
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let mount_point = Self::check_mount_point(mount_point)?;
        File::options().read(true).write(true).open("/dev/fuse").map_err(Error::Device)?;
        let failed = |error| Error::Mount { path: mount_point.clone(), error };
        let filesystem = LazuliFs::new(namespace, Handle::current());
        let mut session = fuser::Session::new(filesystem, &mount_point, &config()).map_err(failed)?;
        let unmounter = Unmounter::Fuser(session.unmount_callable());
        let session = Self::run(session, unmounter, &mount_point)?;
        set_window(&session.mount_point, window(options.read_ahead_kib, false));
        info!(mount_point = %session.mount_point.display(), "mounted");
        Ok(session)
    }

    /// Serves `namespace` through a connection that is mounted on `mount_point`.
    ///
    /// Needs the runtime it is called on.
    ///
    /// # Errors
    ///
    /// When FUSE cannot be used.
    pub(crate) fn serve(
        namespace: Arc<Namespace>,
        connection: &Connection,
        mount_point: &Path,
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let filesystem = LazuliFs::new(namespace, Handle::current());
        let failed = |error| Error::Mount { path: mount_point.to_owned(), error };
        let session = connection.begin(filesystem, &config()).map_err(failed)?;
        let session = Self::run(session, Unmounter::Own, mount_point)?;
        if connection.is_new() {
            set_window(mount_point, window(options.read_ahead_kib, false));
        }
        Ok(session)
    }

    fn run(session: fuser::Session<LazuliFs>, unmounter: Unmounter, mount_point: &Path) -> Result<Self, Error> {
        let (sender, ended) = watch::channel(None);
        let notifier = session.notifier();
        let run = move || {
            let result = session.run().map_err(Arc::new);
            sender.send_replace(Some(result));
        };
        let started = thread::Builder::new().name("lazuli-session".to_owned()).spawn(run);
        started.map_err(|error| Error::Mount { path: mount_point.to_owned(), error })?;
        Ok(Self { unmounter: Some(unmounter), notifier, ended, mount_point: mount_point.to_owned() })
    }

    /// The absolute path of a directory that can be mounted on.
    ///
    /// # Errors
    ///
    /// When it is not there or no directory.
    pub(crate) fn check_mount_point(path: &Path) -> Result<PathBuf, Error> {
        let refuse = |error| Error::MountPoint { path: path.to_owned(), error };
        let path = path.canonicalize().map_err(refuse)?;
        if fs::metadata(&path).map_err(refuse)?.is_dir() {
            return Ok(path);
        }
        Err(refuse(io::ErrorKind::NotADirectory.into()))
    }

    /// Where it is mounted.
    pub(crate) fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// To tell the kernel of changes.
    pub(crate) fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Waits until the session has ended: unmounted and no longer used by anybody. May be dropped and called again.
    ///
    /// # Errors
    ///
    /// When it ended by itself.
    pub(crate) async fn wait(&mut self) -> Result<(), Error> {
        let ended = self.ended.wait_for(Option::is_some).await;
        let error = match ended.as_deref() {
            Ok(Some(Ok(()))) => return Ok(()),
            Ok(Some(Err(error))) => io::Error::new(error.kind(), error.to_string()),
            Ok(None) | Err(_) => io::Error::other("a session thread panicked"),
        };
        Err(Error::Session { path: self.mount_point.clone(), error })
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Takes it from the directory tree: it ends with its last user. [`Self::unmount`] only waits for that then.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn detach(&mut self) -> Result<(), Error> {
        rustix::mount::unmount(&self.mount_point, UnmountFlags::DETACH)
            .map_err(|error| Error::Unmount { path: self.mount_point.clone(), error: error.into() })?;
        self.unmounter = Some(Unmounter::Detached);
        Ok(())
    }

    /// Unmounts; if somebody uses it still, takes it from the directory tree only: it ends with its last user or
    /// with the process.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) async fn unmount(&mut self) -> Result<(), Error> {
        let Some(unmounter) = self.unmounter.take() else { return Ok(()) };
        let failed = |error| Error::Unmount { path: self.mount_point.clone(), error };
        let mount_point = self.mount_point.clone();
        let unmounted = tokio::task::spawn_blocking(move || unmounter.unmount(&mount_point)).await;
        match unmounted.map_err(io::Error::other).and_then(|result| result) {
            Ok(()) => {
                info!(mount_point = %self.mount_point.display(), "unmounted");
                match timeout(END_PATIENCE, self.wait()).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        self.tell_users().await;
                        Ok(())
                    }
                }
            }
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                warn!(mount_point = %self.mount_point.display(), "still in use, detached");
                rustix::mount::unmount(&self.mount_point, UnmountFlags::DETACH).map_err(|error| failed(error.into()))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

impl Session {
    /// Says why an unmounted session does not end: containers lose it with this process, a copy of the mount in another
    /// namespace is nobody's loss.
    async fn tell_users(&self) {
        let mount_point = self.mount_point.clone();
        let users = blocking(move || mounts_over(&mount_point)).await;
        match users.first() {
            Some(first) => {
                let (mount_point, first) = (self.mount_point.display(), first.display());
                warn!(%mount_point, mounts = users.len(), %first, "still in use below other mounts");
            }
            None => info!(
                mount_point = %self.mount_point.display(),
                "another mount namespace has a copy of the mount: the session ends with this process"
            ),
        }
    }
}

impl Unmounter {
    fn unmount(self, mount_point: &Path) -> io::Result<()> {
        match self {
            Self::Fuser(mut unmounter) => unmounter.unmount(),
            Self::Detached => Ok(()),
            Self::Own => match rustix::mount::unmount(mount_point, UnmountFlags::empty()) {
                // Somebody else did already.
                Err(Errno::INVAL) => Ok(()),
                unmounted => Ok(unmounted?),
            },
        }
    }
}

/// The mount options: everything an image can hold works as on a local file system, but for writing.
fn config() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(NAME.to_owned()),
        MountOption::RO,
        MountOption::Suid,
        MountOption::Dev,
        MountOption::DefaultPermissions,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX));
    config.clone_fd = true;
    config
}

/// Has the kernel look again at a directory of which it keeps the listing, and at one name in it.
pub(crate) fn notify_change(notifier: &Notifier, directory: u64, name: &str) {
    // Fails with ENOENT when the kernel keeps nothing, which is as good; the same below.
    if let Err(error) = notifier.inval_entry(INodeNo(directory), name.as_ref()) {
        debug!(directory, name, %error, "name not invalidated");
    }
    notify_listing(notifier, directory);
}

/// Has the kernel look again at a directory of which it keeps the listing.
pub(crate) fn notify_listing(notifier: &Notifier, directory: u64) {
    if let Err(error) = notifier.inval_inode(INodeNo(directory), 0, 0) {
        debug!(directory, %error, "listing not invalidated");
    }
}
