//! One image mounted by this process itself: what `lazuli mount` does.
//!
//! In portable mode the session is the mount. In kernel mode the mount is an EROFS mount, and the session behind it
//! stands on no directory: the kernel has it open as long as the mount needs it.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use control::{Mode, RemoteLayer, TreeMode};
use rustix::{io::Errno, mount::UnmountFlags};
use storage::CacheOptions;
use tokio::runtime::Handle;
use tracing::warn;

use crate::{
    choice::choose,
    erofs_mount::{self, DetachedMount, MountError},
    error::Error,
    factory::SourceFactory,
    kernel_mounts::Devices,
    namespace::{LAYERS, Namespace},
    recording::{TouchedFile, touched_files},
    service::{Service, Stores},
    session::{Session, SessionOptions},
    sync::blocking,
    tree::Tree,
};

/// How an image is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountOptions {
    /// How the kernel reads it.
    pub mode: Mode,
    /// Whether [`Mount::touched_files`] is wanted: then every layer is read through the session, also one that is complete.
    pub records: bool,
}

impl MountOptions {
    /// A mount that records nothing.
    pub fn plain(mode: Mode) -> Self {
        Self { mode, records: false }
    }
}

/// Reads of a layer that touch something new and are recorded; a start that touches more is not recorded further.
const TOUCHES_MAX: usize = 1 << 16;
/// How often is looked whether somebody has unmounted an EROFS mount.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// A mounted image. Dropping it leaves the mount; call [`Self::unmount`].
#[derive(Debug)]
pub struct Mount {
    session: Session,
    service: Service,
    tree: Arc<Tree>,
    /// In kernel mode the mount itself.
    kernel: Option<KernelMount>,
}

/// A mounted tree and what `stat` shows as its device.
#[derive(Debug)]
struct KernelMount {
    mount_point: PathBuf,
    device: u64,
}

impl Mount {
    /// Where it is mounted, as an absolute path.
    pub fn mount_point(&self) -> &Path {
        self.kernel.as_ref().map_or(self.session.mount_point(), |kernel| &kernel.mount_point)
    }

    /// How the kernel reads it.
    pub fn mode(&self) -> TreeMode {
        if self.kernel.is_some() { TreeMode::Erofs } else { TreeMode::Fuse }
    }

    /// The files of which something was read so far, in the order of first touch, but for what the kernel had in memory.
    /// None unless it was mounted to record them.
    pub fn touched_files(&self) -> Vec<TouchedFile> {
        touched_files(&self.tree)
    }

    /// Waits until somebody unmounts it. May be dropped and called again; call [`Self::unmount`] after it.
    ///
    /// # Errors
    ///
    /// When the session ended by itself.
    pub async fn wait(&mut self) -> Result<(), Error> {
        match &self.kernel {
            None => self.session.wait().await,
            Some(kernel) => {
                kernel.wait().await;
                Ok(())
            }
        }
    }

    /// Unmounts it if nobody did, waits until the session has ended, and makes what arrived durable.
    ///
    /// If somebody uses the files still, the mount is detached only and works until he is done or the process ends.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or what arrived cannot be made durable.
    pub async fn unmount(mut self) -> Result<(), Error> {
        let kernel_unmounted = match self.kernel {
            Some(kernel) => blocking(move || kernel.unmount()).await,
            None => Ok(()),
        };
        let unmounted = self.session.unmount().await;
        let service = self.service;
        blocking(move || service.flush()).await?;
        kernel_unmounted.and(unmounted)
    }
}

/// Mounts the merged tree of `layers` (lowest first) on the directory `mount_point`; returns when it can be used.
///
/// Indexes are fetched before that, data when it is read. Everything fetched is kept below `cache_root`.
/// Needs the runtime it is called on until the mount is gone.
///
/// # Errors
///
/// When the mount point, the mode that is asked for, the cache or an index cannot be used; then nothing is mounted.
pub async fn mount_image(
    layers: Vec<RemoteLayer>,
    sources: Arc<dyn SourceFactory>,
    cache_root: &Path,
    mount_point: &Path,
    options: MountOptions,
) -> Result<Mount, Error> {
    let MountOptions { mode, records } = options;
    let mount_point = Session::check_mount_point(mount_point)?;
    let root = cache_root.to_owned();
    let runtime = Handle::current();
    // A person waits for the command: the client's patience is enough.
    let cache = CacheOptions { patience: None, ..CacheOptions::default() };
    let stores = blocking(move || Stores::open(&root, runtime, sources, cache)).await?;
    let service = Service::new(stores, Arc::new(Namespace::of_node()), None);
    let root = cache_root.to_owned();
    let chosen = blocking(move || choose(mode, || erofs_mount::probe(&root))).await.map_err(Error::KernelMode)?;
    let tree = service.tree(&layers).await?;
    if records {
        tree.layers.iter().for_each(|layer| layer.begin_recording(TOUCHES_MAX));
    }
    let mut refusal = None;
    if chosen.in_use == TreeMode::Erofs {
        match mount_in_kernel(&service, tree.clone(), cache_root, &mount_point, records).await {
            Err(error) if mode == Mode::Auto => refusal = Some(error),
            mounted => return mounted,
        }
    }
    let namespace = Arc::new(Namespace::of_tree(tree.clone()));
    let mount = move || Session::mount(namespace, &mount_point, &SessionOptions::default());
    let session = blocking(mount).await?;
    // Only now: what keeps both modes from working is told once.
    if let Some(error) = refusal {
        warn!(%error, "image is mounted in portable mode");
    }
    Ok(Mount { session, service, tree, kernel: None })
}

async fn mount_in_kernel(
    service: &Service,
    tree: Arc<Tree>,
    cache_root: &Path,
    mount_point: &Path,
    records: bool,
) -> Result<Mount, Error> {
    let image = {
        let (service, tree) = (service.clone(), tree.clone());
        blocking(move || service.image(&tree)).await?
    };
    let hidden = tempfile::Builder::new().prefix("mnt-").tempdir_in(cache_root).map_err(Error::disk(cache_root))?;
    let (namespace, options) = (service.namespace(), SessionOptions::default());
    let (session_point, read_ahead_kib) = (hidden.path().to_owned(), options.read_ahead_kib);
    let mut session = blocking(move || Session::mount(namespace, &session_point, &options)).await?;
    let layers = session.mount_point().join(LAYERS);
    let (id, mount_point) = (tree.id, mount_point.to_owned());
    let open = {
        let tree = tree.clone();
        move || {
            let devices =
                if records { Devices::seen(&tree.layers, &layers) } else { Devices::of(&tree.layers, &layers) };
            devices.mount(&image, read_ahead_kib)
        }
    };
    let opened = blocking(open).await;
    // Before the mount is there: it may stand on a directory above this one.
    session.detach()?;
    drop(hidden);
    let attach = move || opened.and_then(|mount| KernelMount::attach(mount, mount_point));
    match blocking(attach).await {
        Ok(kernel) => Ok(Mount { session, service: service.clone(), tree, kernel: Some(kernel) }),
        Err(error) => {
            session.unmount().await?;
            Err(Error::KernelMount(id, error))
        }
    }
}

impl KernelMount {
    fn attach(mount: DetachedMount, mount_point: PathBuf) -> Result<Self, MountError> {
        let device = mount.device().map_err(|error| MountError::File { path: mount_point.clone(), error })?;
        mount.attach(&mount_point)?;
        Ok(Self { mount_point, device })
    }

    /// Looks now and then: no session ends with a mount that needs none.
    async fn wait(&self) {
        while self.is_there() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn is_there(&self) -> bool {
        fs::metadata(&self.mount_point).is_ok_and(|metadata| metadata.dev() == self.device)
    }

    fn unmount(&self) -> Result<(), Error> {
        let failed = |error: Errno| Error::Unmount { path: self.mount_point.clone(), error: io::Error::from(error) };
        if !self.is_there() {
            return Ok(());
        }
        match rustix::mount::unmount(&self.mount_point, UnmountFlags::empty()) {
            Err(Errno::BUSY) => {
                warn!(mount_point = %self.mount_point.display(), "still in use, detached");
                rustix::mount::unmount(&self.mount_point, UnmountFlags::DETACH).map_err(failed)
            }
            unmounted => unmounted.map_err(failed),
        }
    }
}
