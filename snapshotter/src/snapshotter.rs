//! The snapshots themselves: records, directories, mounts and lazy layers brought together.
//!
//! Order that makes a crash harmless: a directory exists before its record and goes after it, so what a
//! crash leaves is a directory without a record, an *orphan*, which the next start or `cleanup` removes.
//! In the same way a lazy layer is announced before its record, and its cache goes after it. Who uses
//! what is always read off the records, never counted.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_client::types::Mount;
use format_spec::LayerId;
use fusefs::control::TreeId;
use tokio::sync::{Notify, RwLock};
use tracing::{debug, info, warn};

use crate::{
    fused::{Fused, FusedError, FusedProgram},
    host::{self, Root, RootError},
    id_map::{IdMap, IdMapError},
    id_mapped::{IdMappedError, IdMappedMounts, Part},
    metadata::{
        Chain, Kind, LabelChange, Labels, Metadata, MetadataError, NewCommit, NewSnapshot, Snapshot, SnapshotId,
        SnapshotKey, Time, Usage,
    },
    mounts::{Directories, Lower, mounts},
    remote::{LabelError, REMOTE_MARK, RemoteRequest, remote_request},
    usage::disk_usage,
};

/// After a failed attempt to bring `lazuli-fused` back; each further pause is twice as long,
const RECOVERY_PAUSE: Duration = Duration::from_millis(10);
/// up to this.
const RECOVERY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A `lazuli-fused` that ends earlier after its start than this is brought back after this time, a later one at once.
const SHORT_LIFE: Duration = Duration::from_millis(100);

/// User and group of the host's root.
const HOST_ROOT: (u32, u32) = (0, 0);

/// All snapshots under one root. Cheap to clone; safe from many tasks.
#[derive(Debug, Clone)]
pub struct Snapshotter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    metadata: Metadata,
    directories: Directories,
    id_mapped: IdMappedMounts,
    overlay_options: Vec<String>,
    fused: Fused,
    /// Shared from announcing a layer to its record, exclusive from removing a record to removing its
    /// cache: else a layer's cache could go after another snapshot was promised it.
    lazy_change: RwLock<()>,
    lazy_added: Notify,
    _root: Root,
}

/// What a prepare led to.
#[derive(Debug, Clone, PartialEq)]
pub enum Prepared {
    /// A snapshot to write to.
    Active(Mount),
    /// A lazy layer: it is committed already, nothing needs to be downloaded.
    Remote {
        /// Its name.
        target: SnapshotKey,
    },
}

/// A request was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The record says no.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The labels of a layer are wrong.
    #[error(transparent)]
    Labels(#[from] LabelError),
    /// The labels map no users.
    #[error("snapshot {0}: {1}")]
    IdMap(SnapshotKey, #[source] IdMapError),
    /// What it is built on cannot be shown with other owners.
    #[error("snapshot {0}: {1}")]
    IdMapped(SnapshotKey, #[source] IdMappedError),
    /// A committed snapshot cannot be mounted.
    #[error("snapshot {0} is committed, it has no mounts")]
    Committed(SnapshotKey),
    /// `lazuli-fused` failed.
    #[error("snapshot {0}: {1}")]
    Fused(SnapshotKey, #[source] FusedError),
    /// The disk failed.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// The root directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
}

type Result<T> = std::result::Result<T, Error>;

impl Snapshotter {
    /// Opens the snapshots under `root` and removes orphans. `fused` is what the other daemon is started from.
    ///
    /// Nothing lazy is touched yet; [`Self::watch_lazy_layers`] does that. Blocks.
    ///
    /// # Errors
    ///
    /// When the root directory or the records cannot be used.
    pub fn open(root: &Path, fused: FusedProgram) -> Result<Self> {
        let root = Root::open(root)?;
        let inner = Inner {
            metadata: Metadata::open(&root.path().join("snapshotter.redb"))?,
            directories: Directories::new(root.path()),
            id_mapped: IdMappedMounts::new(root.path()),
            overlay_options: host::overlay_options(),
            fused: Fused::new(root.path(), fused),
            lazy_change: RwLock::default(),
            lazy_added: Notify::new(),
            _root: root,
        };
        inner.remove_orphans()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes an active snapshot, or commits a lazy layer when the labels ask for one.
    ///
    /// # Errors
    ///
    /// As [`Metadata::create`]; [`Error::Labels`] and [`Error::IdMap`]; [`Error::Fused`] when the parents' tree cannot be
    /// had, [`Error::IdMapped`] when it cannot be shown to a user namespace. Then there is no snapshot.
    pub async fn prepare(&self, new: NewSnapshot, now: Time) -> Result<Prepared> {
        if let Some(request) = remote_request(&new.labels)?
            && self.prepare_remote(&request, &new, now).await?
        {
            return Ok(Prepared::Remote { target: request.target });
        }
        self.create(new, now).await.map(Prepared::Active)
    }

    /// Makes a view.
    ///
    /// # Errors
    ///
    /// As [`Self::prepare`].
    pub async fn view(&self, new: NewSnapshot, now: Time) -> Result<Mount> {
        self.create(new, now).await
    }

    /// The mounts of a view or an active snapshot.
    ///
    /// # Errors
    ///
    /// [`Error::Committed`], [`MetadataError::NotFound`], [`Error::Fused`], [`Error::IdMapped`].
    pub async fn mounts(&self, key: SnapshotKey) -> Result<Mount> {
        let chain = self.blocking(move |inner| Ok(inner.metadata.chain(&key)?)).await?;
        if chain.top.kind == Kind::Committed {
            return Err(Error::Committed(chain.top.key));
        }
        let tree = self.tree(&chain.top.key, &chain.parents).await?;
        self.blocking(move |inner| inner.mounts_of(&chain, tree)).await
    }

    /// Commits an active snapshot.
    ///
    /// # Errors
    ///
    /// As [`Metadata::commit`].
    pub async fn commit(&self, mut new: NewCommit, now: Time) -> Result<()> {
        self.blocking(move |inner| {
            let active = inner.metadata.snapshot(&new.key)?;
            if active.kind == Kind::Active {
                new.usage = inner.usage_of(active.id)?;
            }
            inner.metadata.commit(new, now)?;
            inner.id_mapped.remove(active.id);
            Ok(())
        })
        .await
    }

    /// Removes a snapshot, its directory, and what it alone used of a lazy layer.
    ///
    /// # Errors
    ///
    /// As [`Metadata::remove`]. What cannot be deleted later is logged: the snapshot is gone.
    pub async fn remove(&self, key: SnapshotKey) -> Result<()> {
        if self.stat(key.clone()).await?.lazy.is_some() {
            return self.remove_lazy(key).await;
        }
        self.blocking(move |inner| inner.remove(&key)).await
    }

    /// One snapshot.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub async fn stat(&self, key: SnapshotKey) -> Result<Snapshot> {
        self.blocking(move |inner| Ok(inner.metadata.snapshot(&key)?)).await
    }

    /// Changes labels and returns the snapshot as it is now.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub async fn update(&self, key: SnapshotKey, labels: LabelChange, now: Time) -> Result<Snapshot> {
        self.blocking(move |inner| Ok(inner.metadata.update_labels(&key, labels, now)?)).await
    }

    /// Every snapshot, sorted by key.
    ///
    /// # Errors
    ///
    /// When the records cannot be read.
    pub async fn list(&self) -> Result<Vec<Snapshot>> {
        self.blocking(|inner| Ok(inner.metadata.list()?)).await
    }

    /// What a snapshot takes on disk now; of a lazy layer what has arrived.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`], [`Error::Fused`].
    pub async fn usage(&self, key: SnapshotKey) -> Result<Usage> {
        let (snapshot, usage) = self
            .blocking(move |inner| {
                let snapshot = inner.metadata.snapshot(&key)?;
                let usage = if snapshot.kind == Kind::Active { inner.usage_of(snapshot.id)? } else { snapshot.usage };
                Ok((snapshot, usage))
            })
            .await?;
        let Some(lazy) = &snapshot.lazy else { return Ok(usage) };
        match self.inner.fused.layer_usage(lazy.layer.layer.id()).await {
            Ok(bytes) => Ok(Usage { bytes, inodes: 0 }),
            Err(error) => Err(Error::Fused(snapshot.key, error)),
        }
    }

    /// Removes everything that belongs to no snapshot.
    ///
    /// # Errors
    ///
    /// When the records or the directory cannot be read. What cannot be deleted is logged.
    pub async fn cleanup(&self) -> Result<()> {
        self.blocking(|inner| inner.remove_orphans()).await?;
        if self.list().await?.iter().any(|snapshot| snapshot.lazy.is_some()) {
            self.free_unused().await;
        }
        Ok(())
    }

    /// Keeps the lazy layers available as long as a snapshot needs them: holds the session of `lazuli-fused`, brings
    /// it back at once when it ends, and has the trees in use mounted again. Never returns.
    pub async fn watch_lazy_layers(&self) {
        let mut pause = RECOVERY_PAUSE;
        loop {
            self.wait_for_lazy_layer().await;
            match self.inner.fused.watch().await {
                Ok(watch) => {
                    pause = RECOVERY_PAUSE;
                    let since = Instant::now();
                    // Not waited for: the daemon may end meanwhile.
                    let recovering = tokio::spawn(self.clone().recover());
                    watch.ended().await;
                    recovering.abort();
                    warn!("lazuli-fused has ended, it is started again");
                    if since.elapsed() < SHORT_LIFE {
                        tokio::time::sleep(SHORT_LIFE).await;
                    }
                }
                Err(error) => {
                    warn!(%error, "lazuli-fused cannot be started");
                    tokio::time::sleep(pause).await;
                    pause = RECOVERY_PAUSE_MAX.min(pause * 2);
                }
            }
        }
    }

    async fn wait_for_lazy_layer(&self) {
        loop {
            match self.list().await {
                Ok(snapshots) if snapshots.iter().all(|snapshot| snapshot.lazy.is_none()) => {}
                Ok(_) => return,
                Err(error) => warn!(%error, "snapshots cannot be read"),
            }
            self.inner.lazy_added.notified().await;
        }
    }

    async fn recover(self) {
        let snapshots = match self.list().await {
            Ok(snapshots) => snapshots,
            Err(error) => return warn!(%error, "snapshots cannot be read"),
        };
        for snapshot in snapshots.into_iter().filter(|snapshot| snapshot.kind != Kind::Committed) {
            // One that cannot be recovered keeps nobody else from it.
            if let Err(error) = self.mounts(snapshot.key.clone()).await {
                warn!(snapshot = %snapshot.key, %error, "snapshot cannot be recovered");
            }
        }
        self.free_unused().await;
    }

    /// `Ok(false)` when the layer must be treated as an ordinary one.
    async fn prepare_remote(&self, request: &RemoteRequest, new: &NewSnapshot, now: Time) -> Result<bool> {
        let _guard = self.inner.lazy_change.read().await;
        match self.inner.fused.announce_layer(request.layer.clone()).await {
            Ok(()) => {}
            // Nothing below needs the other daemon: the image can still be pulled completely.
            Err(error) if new.parent.is_none() => {
                warn!(target = %request.target, %error, "layer cannot be lazy, it is pulled completely");
                return Ok(false);
            }
            Err(error) => return Err(Error::Fused(request.target.clone(), error)),
        }
        let mut labels = new.labels.clone();
        labels.insert(REMOTE_MARK.0.to_owned(), REMOTE_MARK.1.to_owned());
        let (target, parent, layer) = (request.target.clone(), new.parent.clone(), request.layer.clone());
        let committed = self
            .blocking(move |inner| Ok(inner.metadata.insert_lazy(&target, parent.as_ref(), labels, layer, now)?))
            .await?;
        let (target, blob) = (&request.target, request.layer.layer.blob);
        if committed {
            info!(%target, %blob, image = request.layer.image, "layer is lazy");
            self.inner.lazy_added.notify_one();
        } else {
            // What was announced is freed by the next cleanup.
            info!(%target, %blob, "layer lies on one that is not lazy, it is pulled completely");
        }
        Ok(committed)
    }

    async fn remove_lazy(&self, key: SnapshotKey) -> Result<()> {
        let _guard = self.inner.lazy_change.write().await;
        let (removed, left) =
            self.blocking(move |inner| Ok((inner.metadata.remove(&key)?, inner.metadata.list()?))).await?;
        let left = InUse::new(&left);
        let tree = removed.lazy.as_ref().map(|lazy| lazy.tree).filter(|tree| !left.trees.contains(tree));
        let layer = removed.lazy.map(|lazy| lazy.layer.layer.id()).filter(|layer| !left.layers.contains(layer));
        self.free(tree, layer).await;
        Ok(())
    }

    async fn create(&self, new: NewSnapshot, now: Time) -> Result<Mount> {
        let parents = match new.parent.clone() {
            None => Vec::new(),
            Some(parent) => {
                let chain = self.blocking(move |inner| Ok(inner.metadata.chain(&parent)?)).await?;
                [vec![chain.top], chain.parents].concat()
            }
        };
        let tree = self.tree(&new.key, &parents).await?;
        let owner_of = parents.first().map(|parent| match (&parent.lazy, &tree) {
            (Some(_), Some(tree)) => tree.clone(),
            _ => self.inner.directories.upper(parent.id),
        });
        let owner = match (id_map(&new.key, &new.labels)?, owner_of) {
            (Some(id_map), _) => Some(Owner::Ids(id_map.root())),
            (None, owner_of) => owner_of.map(Owner::Of),
        };
        let kind = new.kind;
        self.blocking(move |inner| {
            let mut made = None;
            let created = inner.metadata.create(new, now, |id| {
                made = Some(id);
                inner.make_directory(id, kind, owner.as_ref())
            });
            if let (Err(_), Some(id)) = (&created, made) {
                inner.remove_directory(id);
            }
            let chain = created?;
            debug!(key = %chain.top.key, id = %chain.top.id, ?kind, "snapshot made");
            let mounts = inner.mounts_of(&chain, tree);
            if mounts.is_err() {
                inner.remove(&chain.top.key)?;
            }
            mounts
        })
        .await
    }

    /// The directory that shows the lazy layers among `parents`, `None` without any.
    async fn tree(&self, key: &SnapshotKey, parents: &[Snapshot]) -> Result<Option<PathBuf>> {
        let lazy = Lower::new(parents).lazy;
        if lazy.is_empty() {
            return Ok(None);
        }
        let tree = self.inner.fused.mount_tree(lazy).await;
        tree.map(Some).map_err(|error| Error::Fused(key.clone(), error))
    }

    /// Has `lazuli-fused` delete what it holds for no snapshot.
    async fn free_unused(&self) {
        let _guard = self.inner.lazy_change.write().await;
        let held = match self.inner.fused.status().await {
            Ok(held) => held,
            Err(error) => return warn!(%error, "what is unused cannot be found out"),
        };
        let snapshots = match self.list().await {
            Ok(snapshots) => snapshots,
            Err(error) => return warn!(%error, "snapshots cannot be read"),
        };
        let in_use = InUse::new(&snapshots);
        let (layers, trees) = held;
        let trees: Vec<_> = trees.into_iter().filter(|tree| !in_use.trees.contains(tree)).collect();
        let layers = layers.into_iter().map(|held| held.layer.layer.id());
        let layers: Vec<_> = layers.filter(|layer| !in_use.layers.contains(layer)).collect();
        self.free(trees, layers).await;
    }

    async fn free(&self, trees: impl IntoIterator<Item = TreeId>, layers: impl IntoIterator<Item = LayerId>) {
        for tree in trees {
            match self.inner.fused.release_tree(tree).await {
                Ok(()) => debug!(%tree, "tree released"),
                Err(error) => warn!(%tree, %error, "unused tree stays"),
            }
        }
        for layer in layers {
            match self.inner.fused.remove_layer(layer).await {
                Ok(()) => debug!(%layer, "layer cache removed"),
                Err(error) => warn!(%layer, %error, "unused layer cache stays"),
            }
        }
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

impl Inner {
    /// `tree` shows the lazy layers of the chain, if there are any.
    fn mounts_of(&self, chain: &Chain, tree: Option<PathBuf>) -> Result<Mount> {
        let Self { directories, overlay_options, .. } = self;
        let Chain { top, parents } = chain;
        let lower = Lower::new(parents);
        let paths = match id_map(&top.key, &top.labels)? {
            None => lower.paths(directories, tree),
            Some(id_map) => {
                let shown = self.show_with_owners(top.id, &id_map, &lower, tree.as_deref());
                shown.map_err(|error| Error::IdMapped(top.key.clone(), error))?
            }
        };
        Ok(mounts(top.kind, top.id, &paths, directories, overlay_options))
    }

    /// The lower directories with other owners.
    ///
    /// A layer that belongs to the mapped root has mapped owners on disk and stays as it is: a container of such a user
    /// namespace wrote it, or containerd changed owners in it, as it does where it does not know that we need not, and
    /// passes the labels all the same. Where that root is the host's, none is taken for one.
    fn show_with_owners(
        &self,
        id: SnapshotId,
        id_map: &IdMap,
        lower: &Lower,
        tree: Option<&Path>,
    ) -> std::result::Result<Vec<PathBuf>, IdMappedError> {
        let shown = Directories::shown_at(self.id_mapped.path(id, Part::Layers));
        let is_mapped_on_disk = |upper: &Path| {
            let owner = fs::symlink_metadata(upper).map(|found| (found.uid(), found.gid()));
            id_map.root() != HOST_ROOT && owner.is_ok_and(|owner| owner == id_map.root())
        };
        let layer = |layer: &SnapshotId| {
            let upper = self.directories.upper(*layer);
            if is_mapped_on_disk(&upper) { upper } else { shown.upper(*layer) }
        };
        let layers: Vec<_> = lower.ordinary.iter().map(layer).collect();
        let needs_layers = layers.iter().any(|layer| layer.starts_with(shown.all()));
        let parts = needs_layers.then(|| (Part::Layers, self.directories.all()));
        let parts: Vec<_> = parts.into_iter().chain(tree.map(|tree| (Part::Tree, tree))).collect();
        self.id_mapped.show(id, id_map, &parts)?;
        Ok(layers.into_iter().chain(tree.map(|_| self.id_mapped.path(id, Part::Tree))).collect())
    }

    fn remove(&self, key: &SnapshotKey) -> Result<()> {
        let removed = self.metadata.remove(key)?;
        self.id_mapped.remove(removed.id);
        self.remove_directory(removed.id);
        Ok(())
    }

    /// As containerd's overlayfs snapshotter makes it.
    fn make_directory(&self, id: SnapshotId, kind: Kind, owner: Option<&Owner>) -> io::Result<()> {
        let make = |path: &Path, mode| fs::DirBuilder::new().mode(mode).create(path);
        let directory = self.directories.of(id);
        // No record has this id: what lies there is left from a record that failed.
        remove_all(&directory)?;
        make(&directory, 0o700)?;
        let upper = self.directories.upper(id);
        make(&upper, 0o755)?;
        fs::set_permissions(&upper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        if kind == Kind::Active {
            make(&self.directories.work(id), 0o711)?;
        }
        let owner = match owner {
            None => None,
            Some(Owner::Ids(ids)) => Some(*ids),
            Some(Owner::Of(path)) => fs::metadata(path).map(|found| Some((found.uid(), found.gid())))?,
        };
        if let Some((user, group)) = owner {
            std::os::unix::fs::lchown(&upper, Some(user), Some(group))?;
        }
        // The record must not be on disk before the directory is. Its name gets there with it on ext4, XFS and btrfs.
        fs::File::open(&directory)?.sync_all()
    }

    fn usage_of(&self, id: SnapshotId) -> Result<Usage> {
        let upper = self.directories.upper(id);
        disk_usage(&upper).map_err(|error| Error::Io(upper, error))
    }

    fn remove_directory(&self, id: SnapshotId) {
        let directory = self.directories.of(id);
        if let Err(error) = remove_all(&directory) {
            warn!(path = %directory.display(), %error, "removed snapshot's directory stays until the next cleanup");
        }
    }

    fn remove_orphans(&self) -> Result<()> {
        let orphans = self.metadata.while_unchanged(|snapshots| {
            let known: HashSet<_> = snapshots.iter().map(|snapshot| snapshot.id.to_string()).collect();
            self.id_mapped.keep_only(&known)?;
            let entries = fs::read_dir(self.directories.all())?.collect::<io::Result<Vec<_>>>()?;
            let is_orphan = |entry: &fs::DirEntry| entry.file_name().to_str().is_none_or(|name| !known.contains(name));
            Ok(entries.into_iter().filter(is_orphan).map(|entry| entry.path()).collect::<Vec<_>>())
        })?;
        for path in orphans.map_err(|error| Error::Io(self.directories.all().to_owned(), error))? {
            match remove_all(&path) {
                Ok(()) => info!(path = %path.display(), "orphan removed"),
                Err(error) => warn!(path = %path.display(), %error, "orphan stays"),
            }
        }
        Ok(())
    }
}

/// Whose a new root directory is; without any, this process's.
enum Owner {
    /// Of who owns the root directory of the parent.
    Of(PathBuf),
    /// User and group of the host: root of a user namespace.
    Ids((u32, u32)),
}

fn id_map(key: &SnapshotKey, labels: &Labels) -> Result<Option<IdMap>> {
    IdMap::from_labels(labels).map_err(|error| Error::IdMap(key.clone(), error))
}

/// Which trees and blobs some snapshots need.
struct InUse {
    trees: HashSet<TreeId>,
    layers: HashSet<LayerId>,
}

impl InUse {
    fn new(snapshots: &[Snapshot]) -> Self {
        let lazy = || snapshots.iter().filter_map(|snapshot| snapshot.lazy.as_ref());
        Self {
            trees: lazy().map(|lazy| lazy.tree).collect(),
            layers: lazy().map(|lazy| lazy.layer.layer.id()).collect(),
        }
    }
}

fn remove_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
