//! `lazuli-fused` without its command line: one root directory, one session, one control socket.
//!
//! ```text
//! <root>/fused.lock   held while the daemon lives
//! <root>/mnt          the session
//! <root>/cache        storage's
//! <root>/trees        merged trees
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::FlockOperation;
use tokio::runtime::Handle;
use tracing::warn;

use crate::{
    error::Error,
    factory::SourceFactory,
    server::ControlServer,
    service::{Service, blocking},
    session::{Session, SessionOptions, detach_dead_mount},
};

/// What a daemon is told at its start.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// Directory of its own for everything it keeps; made if needed.
    pub root: PathBuf,
    /// Path of the control socket.
    pub address: PathBuf,
    /// How the session behaves.
    pub session: SessionOptions,
}

/// A daemon that is mounted and listens.
#[derive(Debug)]
pub struct Daemon {
    server: ControlServer,
    session: Session,
    service: Service,
    _lock: File,
}

impl Daemon {
    /// Locks the root, mounts the session, binds the socket and begins to restore the trees of the last process.
    ///
    /// Needs the runtime it is called on until it is stopped.
    ///
    /// # Errors
    ///
    /// When another daemon has the root or the socket, or FUSE or the disk refuses; then nothing is mounted.
    pub async fn start(options: DaemonOptions, sources: Arc<dyn SourceFactory>) -> Result<Self, Error> {
        let runtime = Handle::current();
        let DaemonOptions { root, address, session } = options;
        let prepare = move || -> Result<Self, Error> {
            fs::create_dir_all(&root).map_err(Error::disk(&root))?;
            let root = root.canonicalize().map_err(Error::disk(&root))?;
            let lock = lock(&root)?;
            let service = Service::open(&root, runtime, sources)?;
            let server = ControlServer::bind(&address)?;
            let mount_point = root.join("mnt");
            detach_dead_mount(&mount_point)?;
            fs::create_dir_all(&mount_point).map_err(Error::disk(&mount_point))?;
            let session = Session::mount(service.namespace(), &mount_point, &session)?;
            service.set_notifier(session.notifier());
            Ok(Self { server, session, service, _lock: lock })
        };
        let daemon = blocking(prepare).await?;
        if let Err(error) = daemon.service.restore() {
            warn!(%error, "trees of the last process are not available until they are asked for");
        }
        Ok(daemon)
    }

    /// Answers requests until `shutdown` is there or somebody unmounts the session, then leaves nothing behind.
    ///
    /// # Errors
    ///
    /// When the socket or the session failed, or what arrived cannot be made durable.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let mount_point = self.session.mount_point().to_owned();
        let ended = tokio::select! {
            () = shutdown => Ok(()),
            served = self.server.serve(&self.service, &mount_point) => served,
            ended = self.session.wait() => ended,
        };
        drop(self.server);
        let unmounted = self.session.unmount().await;
        let service = self.service;
        let flushed = blocking(move || service.flush()).await;
        ended.and(unmounted).and(flushed)
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
