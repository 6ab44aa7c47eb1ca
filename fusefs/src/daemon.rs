//! `lazuli-fused` without its command line: one root directory, one session, one control socket.
//!
//! ```text
//! <root>/fused.lock   held while the daemon lives
//! <root>/fused.init   how the session began, for the next daemon
//! <root>/mnt          the session
//! <root>/cache        storage's
//! <root>/trees        merged trees
//! <root>/erofs        where they are mounted in kernel mode
//! <root>/id-mapped    where the snapshotter shows them with other owners
//! ```
//!
//! The session goes from one daemon to the next when somebody holds its descriptor meanwhile: a daemon that is killed
//! or told to end leaves it, and the next one, which gets the descriptor, goes on where it was.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::FlockOperation;
use storage::{CacheOptions, create_private_directory};
use tokio::runtime::Handle;
use tracing::{info, warn};

use crate::{
    connection::{Connection, has_session},
    erofs,
    error::Error,
    factory::SourceFactory,
    mode::{Mode, choose},
    server::{ControlServer, HeldDevice},
    service::{Service, blocking},
    session::{Session, SessionOptions},
};

/// How long a predecessor may take to go that has left its session: it may have to write down what arrived.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(15);
/// How long a process that was killed may hold a lock or a socket: its descriptors are closed one after the other.
const CLOSING_PATIENCE: Duration = Duration::from_millis(200);
/// How long a session that stands at the mount point is left to a process that was started to go on with it and has
/// not come to lock the root: who would have held it meanwhile may have ended, and been started again, in between.
const HEIR_PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked whether they are free.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// What a daemon is told at its start.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// Directory of its own for everything it keeps; made if needed.
    pub root: PathBuf,
    /// Path of the control socket.
    pub address: PathBuf,
    /// How the session behaves.
    pub session: SessionOptions,
    /// The `/dev/fuse` descriptor of the last daemon, to go on with its session.
    pub take_over: Option<Arc<OwnedFd>>,
    /// How trees are mounted.
    pub mode: Mode,
    /// How content comes and is kept.
    pub cache: CacheOptions,
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nothing is left behind.
    Unmounted,
    /// The session is left to the next process. This one must end at once, without ending what it has under way: a
    /// reply that is dropped is an error to a reader, one that is never given is asked for again.
    SessionLeft,
}

/// A daemon that is mounted and listens.
#[derive(Debug)]
pub struct Daemon {
    server: ControlServer,
    session: Session,
    device: Arc<HeldDevice>,
    service: Service,
    root: PathBuf,
    _lock: File,
}

impl Daemon {
    /// Locks the root, binds the socket, begins to restore the trees of the last process, and mounts a session or goes
    /// on with the last one.
    ///
    /// Requests of the kernel that concern what is not restored yet wait. Needs the runtime it is called on until it is
    /// stopped.
    ///
    /// # Errors
    ///
    /// When another daemon has the root or the socket, or FUSE or the disk refuses; then nothing is mounted that was
    /// not before.
    pub async fn start(options: DaemonOptions, sources: Arc<dyn SourceFactory>) -> Result<Self, Error> {
        let runtime = Handle::current();
        let DaemonOptions { root, address, session: session_options, mode: asked, take_over, cache } = options;
        let prepare = move || -> Result<Self, Error> {
            create_private_directory(&root).map_err(Error::disk(&root))?;
            let root = root.canonicalize().map_err(Error::disk(&root))?;
            let patience = if take_over.is_some() { PREDECESSOR_PATIENCE } else { CLOSING_PATIENCE };
            let mount_point = root.join("mnt");
            if take_over.is_none() && has_session(&mount_point)? {
                thread::sleep(HEIR_PATIENCE);
            }
            let lock = retry(patience, || lock(&root), |error| matches!(error, Error::Locked(_)))?;
            let service = Service::open(&root, runtime, sources, cache)?;
            let mode = choose(asked, || erofs::probe(&root)).map_err(Error::KernelMode)?;
            info!(mode = %mode.in_use, reason = mode.reason, "how trees are mounted");
            let bind = || ControlServer::bind(&address);
            let server = retry(CLOSING_PATIENCE, bind, |error| matches!(error, Error::SocketInUse(_)))?;
            let connection = connect(&root, &mount_point, take_over.as_deref())?;
            let device = connection.device().try_clone().map_err(Error::Device)?;
            // Before the first request is answered.
            if let Err(error) = service.restore() {
                warn!(%error, "trees of the last process are not available until they are asked for");
            }
            let session = Session::serve(service.namespace(), &connection, &mount_point, &session_options)?;
            service.set_mounts(&root, &mount_point, session_options.read_ahead_kib, asked, mode)?;
            info!(mount_point = %mount_point.display(), taken_over = !connection.is_new(), "serving");
            service.set_notifier(session.notifier());
            service.release_memory_now_and_then();
            Ok(Self { server, session, device: Arc::new(HeldDevice::new(device)), service, root, _lock: lock })
        };
        blocking(prepare).await
    }

    /// The `/dev/fuse` descriptor of the session.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.device().as_fd()
    }

    /// Says that somebody holds [`Self::device`] who does not ask over the control socket, until this process ends.
    pub fn add_holder(&self) {
        self.device.add_holder();
    }

    /// Answers requests until `shutdown` is there or somebody unmounts the session.
    ///
    /// Told to shut down while somebody holds the session, it leaves the session as it is, and the next process goes
    /// on. Otherwise it leaves nothing behind.
    ///
    /// # Errors
    ///
    /// When the socket or the session failed, or what arrived cannot be made durable.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<Ended, Error> {
        let ended = tokio::select! {
            () = shutdown => Ok(()),
            served = self.server.serve(&self.service, &self.device) => served,
            ended = self.session.wait() => ended,
        };
        let is_left = self.device.is_held() && !self.session.has_ended();
        drop(self.server);
        if is_left {
            info!(mount_point = %self.session.mount_point().display(), "the session is left to the next process");
            let service = self.service.clone();
            let flushed = blocking(move || service.flush()).await;
            // They hold replies.
            std::mem::forget((self.session, self.service));
            return ended.and(flushed).map(|()| Ended::SessionLeft);
        }
        let (service, root) = (self.service.clone(), self.root);
        let trees_unmounted = blocking(move || service.unmount_trees(&root)).await;
        let unmounted = trees_unmounted.and(self.session.unmount().await);
        let service = self.service;
        let flushed = blocking(move || service.flush()).await;
        ended.and(unmounted).and(flushed).map(|()| Ended::Unmounted)
    }
}

/// Goes on with the session of `take_over` if that can be, else mounts a new one.
fn connect(root: &Path, mount_point: &Path, take_over: Option<&OwnedFd>) -> Result<Connection, Error> {
    let connection = match take_over {
        Some(device) => {
            let device = device.try_clone().map_err(Error::Device)?;
            Connection::take_over(root, mount_point, device)?
        }
        None => None,
    };
    connection.map_or_else(|| Connection::mount(root, mount_point), Ok)
}

/// Tries until it works, fails in another way, or `patience` is over.
fn retry<T>(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T, Error>,
    may_pass: impl Fn(&Error) -> bool,
) -> Result<T, Error> {
    let give_up_at = Instant::now() + patience;
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && Instant::now() < give_up_at => thread::sleep(POLL_INTERVAL),
            result => return result,
        }
    }
}

fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join("fused.lock");
    let file = File::options().create(true).append(true).open(&path).map_err(Error::disk(&path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked(root.to_owned())),
        Err(error) => Err(Error::Disk { path, error: io::Error::from(error) }),
    }
}
