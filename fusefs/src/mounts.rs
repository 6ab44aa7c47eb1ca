//! Trees as directories: shown by the session or mounted by the kernel, and taken away again.
//!
//! The requests of the control socket. Changes of one tree wait for each other (`trees.rs`), those of two trees do not.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use control::{Mode, ModeStatus, RemoteLayer, TreeId, TreeMode, TreeStatus, id_mapped, root::ID_MAPPED};
use storage::Layer;
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{
    error::Error,
    kernel_mounts::KernelMounts,
    namespace::TREES,
    pool::Pool,
    read_ahead::{self, window},
    service::{Service, check_not_refused},
    tree::Tree,
    trees::{Change, Released},
};

/// Times that a tree is made again because somebody released it before it was mounted.
const MOUNT_ATTEMPTS_MAX: u32 = 3;
/// How often is looked whether trees have become complete.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the session may take for a request that needs nothing but its threads.
const SESSION_ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Where trees are shown, and how new ones are mounted. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Mounts(Arc<Inner>);

struct Inner {
    service: Service,
    root: PathBuf,
    session: PathBuf,
    kernel: KernelMounts,
    mode: ModeStatus,
    /// Portable mode is no way out.
    is_kernel_required: bool,
    /// KiB that the kernel reads ahead of what is there.
    read_ahead_kib: u32,
    /// A thread of its own for asking the session: it may never come back.
    asking: Pool,
    is_asking: Arc<Mutex<()>>,
}

impl Mounts {
    /// Mounts trees of `service` below `root`: over the session on `session`, which must answer, in the mode that was
    /// chosen.
    ///
    /// # Errors
    ///
    /// When the session or the directory of mounts cannot be used.
    pub(crate) fn open(
        service: Service,
        root: &Path,
        session: &Path,
        read_ahead_kib: u32,
        asked: Mode,
        mode: ModeStatus,
    ) -> Result<Self, Error> {
        let kernel = KernelMounts::open(root, session, read_ahead_kib).map_err(Error::disk(root))?;
        let asking = Pool::new("lazuli-asking", 1).map_err(Error::disk(root))?;
        let (root, session, is_kernel_required) = (root.to_owned(), session.to_owned(), asked == Mode::Erofs);
        let is_asking = Arc::default();
        let inner =
            Inner { service, root, session, kernel, mode, is_kernel_required, read_ahead_kib, asking, is_asking };
        Ok(Self(Arc::new(inner)))
    }

    /// Has the kernel read ahead far in trees that are complete, as long as this is there.
    pub(crate) fn keep_read_ahead(&self) {
        let mounts = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            let mut raised = HashSet::new();
            loop {
                sleep(LOOK_INTERVAL).await;
                let Some(inner) = mounts.upgrade() else { return };
                let service = inner.service.clone();
                let look = move || {
                    inner.adjust_read_ahead(&mut raised);
                    raised
                };
                raised = service.pools().looking.run(look).await;
            }
        });
    }

    /// The layers and trees.
    pub(crate) fn service(&self) -> &Service {
        &self.0.service
    }

    /// How new trees are mounted, and why.
    pub(crate) fn mode(&self) -> ModeStatus {
        self.0.mode.clone()
    }

    /// Makes the tree of `layers` available as a directory: a mount of the kernel, or a part of the session.
    ///
    /// # Errors
    ///
    /// Those of [`Service::tree`]; the kernel's where nothing but kernel mode is wanted.
    pub(crate) async fn mount_tree(&self, layers: &[RemoteLayer]) -> Result<PathBuf, Error> {
        let service = &self.0.service;
        let mut attempts_left = MOUNT_ATTEMPTS_MAX;
        loop {
            let tree = service.tree(layers).await?;
            check_not_refused(&tree.layers, layers)?;
            let in_session = self.0.session.join(TREES).join(tree.id.hex());
            if self.0.mode.in_use == TreeMode::Fuse {
                self.0.read_ahead_in_session(is_complete(&tree));
                return Ok(in_session);
            }
            let change = service.trees().change(tree.id).await;
            let id = tree.id;
            if !service.trees().is_there(&tree) {
                attempts_left -= 1;
                if attempts_left == 0 {
                    return Err(Error::GivenUp(id));
                }
                continue;
            }
            return match self.mount_in_kernel(tree, change).await {
                Err(error) if !self.0.is_kernel_required => {
                    self.0.read_ahead_in_session(false);
                    warn!(tree = %id, %error, "tree is mounted in portable mode");
                    Ok(in_session)
                }
                mounted => mounted,
            };
        }
    }

    /// The right to change the tree stays with the work, whatever becomes of who waits for it.
    async fn mount_in_kernel(&self, tree: Arc<Tree>, change: Change) -> Result<PathBuf, Error> {
        let pools = self.0.service.pools();
        let (service, wanted) = (self.0.service.clone(), tree.clone());
        // A tree that is there waits for no image that is being written.
        let (known, change) = pools.looking.run(move || (service.known_image(&wanted), change)).await;
        let (image, change) = match known {
            Some(image) => (image, change),
            None => {
                let (service, wanted) = (self.0.service.clone(), tree.clone());
                let write = move || {
                    let image = service.image(&wanted);
                    wanted.release_memory();
                    (image, change)
                };
                let (image, change) = pools.merging.run(write).await;
                (image?, change)
            }
        };
        let mounts = self.clone();
        let mount = move || {
            let _change = change;
            let Inner { kernel, service, .. } = &*mounts.0;
            let mounted = kernel.mount(&tree, &image).map_err(|error| Error::KernelMount(tree.id, error));
            if let Some(starts) = service.starts() {
                starts.mounted(tree.id, &kernel.find(tree.id).unwrap_or_default());
            }
            mounted
        };
        pools.mounting.run(mount).await
    }

    /// Forgets a tree, on disk too; unknown ones are forgotten already.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) async fn release_tree(&self, id: TreeId) -> Result<(), Error> {
        let service = &self.0.service;
        // It may be the one that makes the trees of the last process available again.
        service.trees().wait_for_attempt(id).await;
        let change = service.trees().change(id).await;
        let places = match service.trees().release(id) {
            Released::Wanted => return Ok(()),
            Released::Free(places) => places,
        };
        let mounts = self.clone();
        let release = move || {
            let _change = change;
            let Inner { kernel, service, .. } = &*mounts.0;
            service.forget_places(&places);
            kernel.unmount(id).map_err(|error| Error::Unmount { path: kernel.directory().to_owned(), error })?;
            service.delete_tree(id)
        };
        service.pools().mounting.run(release).await
    }

    /// Every tree that is available, sorted.
    pub(crate) async fn available_trees(&self) -> Vec<TreeStatus> {
        let available = self.0.service.trees().made();
        let mounts = self.clone();
        let status = move |tree: &Arc<Tree>| {
            let direct_layers = mounts.0.kernel.find(tree.id);
            let mode = if direct_layers.is_some() { TreeMode::Erofs } else { TreeMode::Fuse };
            let layers = tree.layers.iter().map(|layer| layer.lazy_layer().id()).collect();
            TreeStatus { tree: tree.id, layers, mode, direct_layers: direct_layers.unwrap_or_default() }
        };
        self.0.service.pools().looking.run(move || available.iter().map(status).collect()).await
    }

    /// Whether the session answers: asks it for something that the kernel never answers itself.
    ///
    /// # Errors
    ///
    /// The kernel's error, or that the kernel says nothing.
    pub(crate) async fn ask_session(&self) -> Result<(), Error> {
        let failed = |error| Error::Session { path: self.0.session.clone(), error };
        let ask = async {
            // One question at a time: a session that hangs is not asked a second one.
            let asking = self.0.is_asking.clone().lock_owned().await;
            let session = self.0.session.clone();
            let ask = move || {
                let _asking = asking;
                rustix::fs::statfs(&session).map(drop)
            };
            self.0.asking.run(ask).await
        };
        match timeout(SESSION_ANSWERS_WITHIN, ask).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(error.into())),
            Err(_) => Err(failed(std::io::ErrorKind::TimedOut.into())),
        }
    }

    /// Takes all mounts of the kernel away, and what others mounted of trees, as before the end of the session; blocks.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn unmount_trees(&self) -> Result<(), Error> {
        let Inner { kernel, root, .. } = &*self.0;
        let failed = |path: &Path| {
            let path = path.to_owned();
            |error| Error::Unmount { path, error }
        };
        let removed = id_mapped::remove_all(root).map_err(failed(&root.join(ID_MAPPED)));
        removed.and(kernel.unmount_all().map_err(failed(kernel.directory())))
    }
}

impl Inner {
    /// Trees that have become complete are read ahead in; `raised` are those that are.
    fn adjust_read_ahead(&self, raised: &mut HashSet<TreeId>) {
        let trees = self.service.trees().made();
        let complete: HashSet<_> = trees.iter().filter(|tree| is_complete(tree)).map(|tree| tree.id).collect();
        complete.difference(raised).for_each(|id| self.kernel.raise_read_ahead(*id));
        self.read_ahead_in_session(complete.len() == trees.len());
        *raised = complete;
    }

    /// All trees of portable mode share the session, so one that is incomplete decides for all.
    fn read_ahead_in_session(&self, are_all_complete: bool) {
        let device = read_ahead::name_of(self.kernel.session_device());
        if let Err(error) = read_ahead::set_of(&device, window(self.read_ahead_kib, are_all_complete)) {
            debug!(%error, "read-ahead stays as it is");
        }
    }
}

fn is_complete(tree: &Tree) -> bool {
    tree.layers.iter().all(Layer::is_complete)
}

impl std::fmt::Debug for Mounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounts").field("session", &self.0.session).finish_non_exhaustive()
    }
}
