//! `lazuli-fused` without its command line: one root directory, one session, one control socket.
//!
//! ```text
//! <root>/fused.lock   held while the daemon lives
//! <root>/fused.init   how the session began, for the next daemon
//! <root>/mnt          the session
//! <root>/cache        storage's
//! <root>/trees        merged trees
//! <root>/starts       what starts of each repository's images were seen to read
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

use control::{
    Mode,
    root::{FUSED_LOCK, SESSION},
};
use rustix::fs::FlockOperation;
use storage::{CacheOptions, create_private_directory};
use tokio::{runtime::Handle, sync::mpsc};
use tracing::{error, info, warn};

use crate::{
    choice::choose,
    connection::{Connection, has_session},
    erofs_mount,
    error::Error,
    factory::SourceFactory,
    mounts::Mounts,
    namespace::Namespace,
    server::{ControlServer, HeldDevice},
    service::{Service, Stores},
    session::{Session, SessionOptions},
    sync::blocking,
    users::mounts_in_use,
};

/// How long a predecessor may take to go that has left its session: it may have to write down what arrived.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(15);
/// How long a process that was killed may hold a lock or a socket: its descriptors are closed one after the other.
const CLOSING_PATIENCE: Duration = Duration::from_millis(200);
/// How long a session that stands at the mount point is left to a process that was started to go on with it and has
/// not come to lock the root: who would have held it meanwhile may have ended, and been started again, in between.
const HEIR_PATIENCE: Duration = Duration::from_secs(1);
/// How soon a second signal must come to end a daemon that containers read through.
pub const INSIST_WITHIN: Duration = Duration::from_secs(10);
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
    /// Whether starts are recorded, and records used where the rest of layers is fetched too.
    pub records_starts: bool,
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
    mounts: Mounts,
    root: PathBuf,
    _lock: File,
}

/// Asks a daemon whether it serves. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(Mounts);

impl Health {
    /// Whether the session answers; within some seconds.
    ///
    /// # Errors
    ///
    /// Why not.
    pub async fn ask(&self) -> Result<(), Error> {
        self.0.ask_session().await
    }
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
        let DaemonOptions { root, address, session: session_options, mode: asked, take_over, records_starts, cache } =
            options;
        let prepare = move || -> Result<Self, Error> {
            create_private_directory(&root).map_err(Error::disk(&root))?;
            let root = root.canonicalize().map_err(Error::disk(&root))?;
            let patience = if take_over.is_some() { PREDECESSOR_PATIENCE } else { CLOSING_PATIENCE };
            let mount_point = root.join(SESSION);
            if take_over.is_none() && has_session(&mount_point)? {
                thread::sleep(HEIR_PATIENCE);
            }
            let lock = retry(patience, || lock(&root), |error| matches!(error, Error::Locked(_)))?;
            // Else only what is read is fetched.
            let fetches_ahead = cache.rest.is_some();
            let mut stores = Stores::open(&root, runtime, sources, cache)?;
            if records_starts {
                stores.record_starts(&root, fetches_ahead);
            }
            let mode = choose(asked, || erofs_mount::probe(&root)).map_err(Error::KernelMode)?;
            info!(mode = %mode.in_use, reason = mode.reason, "how trees are mounted");
            let bind = || ControlServer::bind(&address);
            let server = retry(CLOSING_PATIENCE, bind, |error| matches!(error, Error::SocketInUse(_)))?;
            let connection = connect(&root, &mount_point, take_over.as_deref())?;
            let device = connection.device().try_clone().map_err(Error::Device)?;
            let namespace = Arc::new(Namespace::of_node());
            // Before the first request is answered.
            namespace.set_incomplete();
            let session = Session::serve(namespace.clone(), &connection, &mount_point, &session_options)?;
            let service = Service::new(stores, namespace, Some(session.notifier()));
            if let Err(error) = service.restore() {
                warn!(%error, "trees of the last process are not available until they are asked for");
            }
            service.release_memory_now_and_then();
            let read_ahead_kib = session_options.read_ahead_kib;
            let mounts = Mounts::open(service, &root, &mount_point, read_ahead_kib, asked, mode)?;
            mounts.keep_read_ahead();
            info!(mount_point = %mount_point.display(), taken_over = !connection.is_new(), "serving");
            Ok(Self { server, session, device: Arc::new(HeldDevice::new(device)), mounts, root, _lock: lock })
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

    /// To ask whether it serves.
    pub fn health(&self) -> Health {
        Health(self.mounts.clone())
    }

    /// Answers requests until told to end or somebody unmounts the session.
    ///
    /// Told to end while somebody holds the session, it leaves the session as it is, and the next process goes on. Else
    /// it refuses as long as containers use its trees, and says so: they would read errors from then on. Told once more
    /// within [`INSIST_WITHIN`], or when nobody is left who could tell, it ends all the same, and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// When the socket or the session failed, or what arrived cannot be made durable.
    pub async fn run(mut self, mut stop: mpsc::Receiver<()>) -> Result<Ended, Error> {
        let ended = tokio::select! {
            () = told_to_end(&mut stop, &self.device, &self.mounts, &self.root) => Ok(()),
            served = self.server.serve(&self.mounts, &self.device) => served,
            ended = self.session.wait() => ended,
        };
        let is_left = self.device.is_held() && !self.session.has_ended();
        drop(self.server);
        let service = self.mounts.service().clone();
        let flush = move || {
            blocking(move || {
                service.write_starts();
                service.flush()
            })
        };
        if is_left {
            info!(mount_point = %self.session.mount_point().display(), "the session is left to the next process");
            let flushed = flush().await;
            // They hold replies.
            std::mem::forget((self.session, self.mounts));
            return ended.and(flushed).map(|()| Ended::SessionLeft);
        }
        let mounts = self.mounts.clone();
        let trees_unmounted = blocking(move || mounts.unmount_trees()).await;
        let unmounted = trees_unmounted.and(self.session.unmount().await);
        let flushed = flush().await;
        ended.and(unmounted).and(flushed).map(|()| Ended::Unmounted)
    }
}

/// Returns when the daemon is told to end and may, or must.
async fn told_to_end(stop: &mut mpsc::Receiver<()>, device: &HeldDevice, mounts: &Mounts, root: &Path) {
    let mut refused_at: Option<Instant> = None;
    loop {
        let is_told = stop.recv().await.is_some();
        let insists = refused_at.is_some_and(|at| at.elapsed() <= INSIST_WITHIN);
        if !is_told || insists || device.is_held() {
            return;
        }
        let trees: Vec<_> = mounts.service().trees().made().iter().map(|tree| tree.id).collect();
        let root = root.to_owned();
        let in_use = blocking(move || mounts_in_use(&root, &trees)).await;
        if in_use.is_empty() {
            return;
        }
        refused_at = Some(Instant::now());
        error!(
            mounts = in_use.len(),
            first = %in_use[0].display(),
            "not ending: containers read through this process and nobody would go on. Start lazuli-snapshotter first, \
             stop the containers, or say it once more within {INSIST_WITHIN:?}"
        );
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
    let path = root.join(FUSED_LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(Error::disk(&path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked(root.to_owned())),
        Err(error) => Err(Error::Disk { path, error: io::Error::from(error) }),
    }
}
