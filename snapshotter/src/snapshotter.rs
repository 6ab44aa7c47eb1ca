//! The snapshots themselves: records, directories, mounts and lazy layers brought together.
//!
//! No call waits for what others may hold up: containerd removes snapshots inside its own lock, and one call that is
//! not answered stops a node. So records are what a call reads and changes; deleting is work of its own (`freeing.rs`);
//! only a container on lazy layers waits for their tree, with a limit (`trees.rs`), and only the first lazy layer of an
//! image for a look at its registry, with another (`probes.rs`). Nothing here asks containerd for anything.
//!
//! Order that makes a crash harmless: a directory exists before its record and goes after it, so what a
//! crash leaves is a directory without a record, an *orphan*, or a record of what is to be deleted. Uses are always
//! read off the records, never counted. Removals, labels and extractions are durable a moment after they are answered:
//! a crash that undoes one leaves a snapshot that containerd collects, or a pull that begins anew.

mod freeing;

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_client::types::Mount;
use control::{RemoteLayer, repository_of, root::DATABASE};
use tokio::{sync::Notify, time::timeout};
use tracing::{debug, error, info, warn};

use self::freeing::Work;
use crate::{
    chains::Chains,
    fused::{Fused, FusedError, FusedProgram},
    host::{self, Root, RootError},
    id_map::{IdMap, IdMapError},
    id_mapped::{IdMappedError, IdMappedMounts, Part},
    metadata::Metadata,
    mounts::{Directories, Lower, mounts},
    names::{Labels, SnapshotId, SnapshotKey, Time},
    not_lazy::NotLazyImages,
    probes::Probes,
    records::{Kind, LabelChange, LazyInsert, Listed, MetadataError, NewCommit, NewSnapshot, Snapshot, Unused, Usage},
    remote::{LabelError, REMOTE_MARK, RemoteRequest, remote_request},
    signers::{Signers, signers},
    trees::{Tree, TreeError, Trees},
    trust::{Asker, Trust, Unverified},
    usage::disk_usage,
};

/// Why a lazy layer on an ordinary one is pulled completely, for who reads `lazuli status`.
const ON_ORDINARY: &str = "its base is here as an ordinary image and was pulled completely before: it becomes lazy when all \
                           images on that base are removed and it is pulled again";
/// Things that were told of and are remembered: images may cause any number of them.
const TOLD_MAX: usize = 1000;
/// User and group of the host's root.
const HOST_ROOT: (u32, u32) = (0, 0);

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A container waits for the tree of its lazy layers.
    pub start: Duration,
    /// The first lazy layer of an image waits for a look at its registry.
    pub probe: Duration,
    /// `lazuli-fused` may be silent before it is ended and started again; `None` for ever.
    pub hang: Option<Duration>,
}

/// All snapshots under one root. Cheap to clone; safe from many tasks.
#[derive(Debug, Clone)]
pub struct Snapshotter {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) metadata: Metadata,
    pub(crate) directories: Directories,
    pub(crate) id_mapped: IdMappedMounts,
    overlay_options: Vec<String>,
    /// For mounts of lazy layers, beside those.
    lazy_overlay_options: Vec<String>,
    pub(crate) fused: Arc<Fused>,
    pub(crate) trees: Arc<Trees>,
    probes: Arc<Probes>,
    not_lazy: NotLazyImages,
    pub(crate) chains: Chains,
    pub(crate) limits: Limits,
    /// Ids whose directories are made, and which have no record yet.
    being_made: Mutex<HashSet<SnapshotId>>,
    pub(crate) work: Work,
    pub(crate) lazy_added: Notify,
    /// There is a lazy layer to verify, or something else to say about chains.
    pub(crate) truth_changed: Notify,
    pub(crate) trust: Trust,
    /// Things that were told of already and are not told again.
    told: Mutex<HashSet<String>>,
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
    Fused(SnapshotKey, #[source] Arc<FusedError>),
    /// Its base cannot be had, or not yet.
    #[error("snapshot {0}: {1}")]
    Tree(SnapshotKey, #[source] TreeError),
    /// Its base is not what the chain ID names.
    #[error("snapshot {snapshot}: its base {chain}, pulled as {image}, is refused: {reason}; remove that image")]
    Untrue {
        /// Its name.
        snapshot: SnapshotKey,
        /// The lazy snapshot.
        chain: SnapshotKey,
        /// The image that it was pulled for.
        image: String,
        /// The fault.
        reason: String,
    },
    /// Its base was pulled for another image, and is not verified yet.
    #[error("snapshot {snapshot}: its base {chain} comes from elsewhere and is not verified after {wait:?}: ask again")]
    Unverified {
        /// Its name.
        snapshot: SnapshotKey,
        /// The lazy snapshot.
        chain: SnapshotKey,
        /// How long was waited.
        wait: Duration,
    },
    /// The directory of a new snapshot could not be made.
    #[error("directory of snapshot {0}: {1}")]
    Directory(SnapshotKey, #[source] io::Error),
    /// The disk failed.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// The root directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Snapshotter {
    /// Opens the snapshots under `root`. `fused` is what the other daemon is started from.
    ///
    /// Nothing lazy is touched yet, and nothing is deleted; [`Self::start_tasks`] has that done. Blocks.
    ///
    /// # Errors
    ///
    /// When the root directory or the records cannot be used.
    pub fn open(root: &Path, fused: FusedProgram, limits: Limits, trust: Trust) -> Result<Self> {
        let root = Root::open(root)?;
        let fused = Arc::new(Fused::new(root.path(), fused));
        let inner = Inner {
            metadata: Metadata::open(&root.path().join(DATABASE))?,
            directories: Directories::new(root.path()),
            id_mapped: IdMappedMounts::new(root.path()),
            overlay_options: host::overlay_options(),
            lazy_overlay_options: host::lazy_overlay_options(),
            trees: Arc::new(Trees::new(Arc::clone(&fused))),
            probes: Arc::new(Probes::new(Arc::clone(&fused))),
            not_lazy: NotLazyImages::new(root.path()),
            chains: Chains::new(root.path()),
            fused,
            limits,
            being_made: Mutex::default(),
            work: Work::default(),
            lazy_added: Notify::new(),
            truth_changed: Notify::new(),
            trust,
            told: Mutex::default(),
            _root: root,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes an active snapshot, or commits a lazy layer when the labels ask for one.
    ///
    /// # Errors
    ///
    /// As [`Metadata::create`]; [`Error::Labels`] and [`Error::IdMap`]; [`Error::Tree`] when the parents' tree cannot be
    /// had, [`Error::IdMapped`] when it cannot be shown to a user namespace. Then there is no snapshot.
    pub async fn prepare(&self, new: NewSnapshot, now: Time) -> Result<Prepared> {
        if let Some(request) = remote_request(&new.key, &new.labels)?
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
    /// [`Error::Committed`], [`MetadataError::NotFound`], [`Error::Tree`], [`Error::IdMapped`].
    pub async fn mounts(&self, key: SnapshotKey) -> Result<Mount> {
        let chain = self.blocking(move |inner| Ok(inner.metadata.chain(&key)?)).await?;
        let top = chain.top;
        if top.kind == Kind::Committed {
            return Err(Error::Committed(top.key));
        }
        self.check_truth(&top.key, Asker::from_labels(&top.key, &top.labels), &chain.parents).await?;
        let tree = self.tree(&top.key, &chain.parents).await?;
        let id_map = id_map(&top.key, &top.labels)?;
        let lower = self.lower(&top.key, top.id, id_map, &chain.parents, tree.as_ref()).await?;
        Ok(self.inner.mount(top.kind, top.id, &lower, tree.is_some()))
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
                // That of an extraction was not when it was made; and now the names in it are durable too.
                let upper = inner.directories.upper(active.id);
                sync_directory(&upper).map_err(|error| Error::Io(upper, error))?;
            }
            inner.metadata.commit(&new, now)?;
            inner.work.begin();
            Ok(())
        })
        .await
    }

    /// Removes a snapshot. Things that it alone used are deleted later.
    ///
    /// # Errors
    ///
    /// As [`Metadata::remove`].
    pub async fn remove(&self, key: SnapshotKey) -> Result<()> {
        self.blocking(move |inner| {
            inner.metadata.remove(&key)?;
            inner.work.begin();
            inner.truth_changed.notify_one();
            Ok(())
        })
        .await
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
        self.blocking(move |inner| {
            let updated = inner.metadata.update_labels(&key, &labels, now)?;
            inner.work.begin();
            Ok(updated)
        })
        .await
    }

    /// Every snapshot whose record can be read, sorted by key. The others are logged.
    ///
    /// # Errors
    ///
    /// When the records cannot be read.
    pub async fn list(&self) -> Result<Vec<Snapshot>> {
        self.blocking(|inner| Ok(inner.list()?.snapshots)).await
    }

    /// The usage of the disk by a snapshot now; of a lazy layer what has arrived, and for the first snapshot that has
    /// the layer only, so that the sum is what the disk holds.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub async fn usage(&self, key: SnapshotKey) -> Result<Usage> {
        self.blocking(move |inner| {
            let snapshot = inner.metadata.snapshot(&key)?;
            match (&snapshot.lazy, snapshot.kind) {
                (Some(lazy), _) => {
                    let layer = lazy.layer.layer.id();
                    let first = inner.metadata.first_user(Unused::Layer(layer))?;
                    let counts = first.is_none_or(|first| first == snapshot.id);
                    if counts { inner.usage_below(inner.directories.layer_cache(layer)) } else { Ok(Usage::default()) }
                }
                (None, Kind::Active) => inner.usage_of(snapshot.id),
                (None, _) => Ok(snapshot.usage),
            }
        })
        .await
    }

    /// Has everything deleted that belongs to no snapshot; it does not wait for that.
    pub fn cleanup(&self) {
        self.inner.work.search();
    }

    /// Returns when records can be read.
    ///
    /// # Errors
    ///
    /// When they cannot.
    pub async fn check(&self) -> Result<()> {
        self.blocking(|inner| Ok(inner.metadata.unused().map(drop)?)).await
    }

    /// Returns when no crash undoes any longer what calls have changed.
    ///
    /// # Errors
    ///
    /// When it cannot be written down.
    pub async fn make_durable(&self) -> Result<()> {
        self.blocking(|inner| Ok(inner.metadata.make_durable()?)).await
    }

    /// `Ok(false)` when the layer must be treated as an ordinary one.
    async fn prepare_remote(&self, request: &RemoteRequest, new: &NewSnapshot, now: Time) -> Result<bool> {
        let (target, image, blob) = (&request.target, &request.layer.image, request.layer.layer.blob);
        let (key, parent) = (request.target.clone(), new.parent.clone());
        let (existing, parents) = self
            .blocking(move |inner| {
                let chain = parent.map(|parent| inner.metadata.chain(&parent)).transpose()?;
                let parents = chain.map_or(Vec::new(), |chain| [vec![chain.top], chain.parents].concat());
                let existing = match inner.metadata.snapshot(&key) {
                    Err(MetadataError::NotFound(_)) => None,
                    found => Some(found?),
                };
                Ok((existing, parents))
            })
            .await?;
        let parent = parents.first();
        if parent.is_some_and(|parent| parent.lazy.is_none()) {
            warn!(%target, %blob, image, "layer lies on one that is not lazy, it is pulled completely");
            let image = image.clone();
            self.blocking(move |inner| {
                inner.not_lazy.add_unless_known(&image, ON_ORDINARY, now);
                Ok(())
            })
            .await?;
            return Ok(false);
        }
        // The layers below are part of this image too: its registry is a place of them, perhaps the only one left.
        // It may have them in blobs of its own.
        for lazy in parents.iter().filter_map(|parent| parent.lazy.as_ref()).filter(|lazy| lazy.layer.image != *image) {
            let named = lazy.named_by(image).unwrap_or(&lazy.layer);
            self.inner.probes.announce(RemoteLayer { image: image.clone(), layer: named.layer });
        }
        self.check_truth(target, Asker::Image(image), &parents).await?;
        if let Some(existing) = existing {
            // This image is a place of the layer too, and its registry may be the one that still answers.
            if existing.lazy.is_some_and(|lazy| lazy.layer.layer.id() == request.layer.layer.id()) {
                self.inner.probes.announce(request.layer.clone());
            }
        } else {
            match self.inner.probes.can_read(&request.layer, self.inner.limits.probe).await {
                Ok(()) => {}
                // On lazy layers nothing can be made without the other daemon.
                Err(error) if parent.is_some() && !matches!(*error, FusedError::Refused { .. }) => {
                    return Err(Error::Fused(request.target.clone(), error));
                }
                Err(error) => {
                    warn!(%target, %blob, image, %error, "layer cannot be lazy, it is pulled completely");
                    let (image, reason, layer) = (image.clone(), error.to_string(), request.layer.layer.id());
                    let noted = self.blocking(move |inner| {
                        inner.not_lazy.add(&image, &reason, now);
                        // It may be on its way still.
                        inner.metadata.add_unused(&[Unused::Layer(layer)])?;
                        inner.work.begin();
                        Ok(())
                    });
                    noted.await?;
                    return Ok(false);
                }
            }
        }
        let mut labels = new.labels.clone();
        labels.insert(REMOTE_MARK.0.to_owned(), REMOTE_MARK.1.to_owned());
        let signers = self.signers(request, new);
        let mut inserted = self.insert_lazy(request, new, &labels, &signers, now).await?;
        if let LazyInsert::Claimed(claimed) = &inserted {
            let claimed = (**claimed).clone();
            let other = claimed.lazy.as_ref().map_or("", |lazy| lazy.layer.image.as_str()).to_owned();
            if claimed.lazy.as_ref().is_some_and(|lazy| self.inner.trust.may_see(Asker::UnknownImage, lazy)) {
                inserted = LazyInsert::There;
            } else {
                warn!(%target, %blob, image, other, "another layer was pulled for this chain: it is verified first");
                self.verify(vec![claimed], self.inner.trust.wait).await?;
                inserted = self.insert_lazy(request, new, &labels, &signers, now).await?;
            }
        }
        let committed = inserted == LazyInsert::There;
        if committed {
            info!(%target, %blob, image, ?signers, "layer is lazy");
            self.inner.lazy_added.notify_one();
            self.inner.truth_changed.notify_one();
            let trust = &self.inner.trust;
            let is_believed = !signers.is_empty() || trust.includes(repository_of(image));
            if trust.unverified == Unverified::Wait && !is_believed {
                self.begin_to_verify(vec![request.layer.clone()]);
            }
        } else if matches!(inserted, LazyInsert::Claimed(_)) {
            warn!(%target, %blob, image, "which layer the chain names is not known yet, this one is pulled completely");
        } else {
            // The next cleanup finds what was announced.
            info!(%target, %blob, image, "snapshot is there and means something else, the layer is pulled completely");
        }
        Ok(committed)
    }

    /// The keys of the configuration that have signed the layer; why none, where it has signatures, is told once.
    fn signers(&self, request: &RemoteRequest, new: &NewSnapshot) -> Signers {
        signers(&self.inner.trust.keys, &new.labels, request, new.parent.as_ref()).unwrap_or_else(|reason| {
            let (target, layer, image) = (&request.target, request.layer.layer.id(), &request.layer.image);
            if self.inner.is_news(format!("signature {target} {layer} {reason}")) {
                warn!(%target, %layer, image, reason, "a signature of this layer is not believed");
            }
            Signers::new()
        })
    }

    async fn insert_lazy(
        &self,
        request: &RemoteRequest,
        new: &NewSnapshot,
        labels: &Labels,
        signers: &Signers,
        now: Time,
    ) -> Result<LazyInsert> {
        let RemoteRequest { target: key, layer } = request.clone();
        let (parent, labels, signers) = (new.parent.clone(), labels.clone(), signers.clone());
        self.blocking(move |inner| {
            let inserted = inner.metadata.insert_lazy(&key, parent.as_ref(), &labels, &layer, &signers, now)?;
            if inserted == LazyInsert::There {
                inner.not_lazy.remove(&layer.image);
            }
            Ok(inserted)
        })
        .await
    }

    async fn create(&self, new: NewSnapshot, now: Time) -> Result<Mount> {
        let id_map = id_map(&new.key, &new.labels)?;
        let (parents, new) = self.blocking(move |inner| Ok((inner.metadata.parents_of(&new)?, new))).await?;
        self.check_truth(&new.key, Asker::of(&new), &parents).await?;
        let tree = self.tree(&new.key, &parents).await?;
        let owner = match (&id_map, parents.first(), &tree) {
            (Some(id_map), ..) => Some(Owner::Ids(id_map.root())),
            (None, Some(Snapshot { lazy: Some(_), .. }), Some(tree)) => Some(Owner::Ids(tree.owner)),
            (None, Some(parent), _) => Some(Owner::Of(self.inner.directories.upper(parent.id))),
            (None, None, _) => None,
        };
        let making = Making::new(&self.inner);
        let id = making.id;
        let lower = match self.lower(&new.key, id, id_map, &parents, tree.as_ref()).await {
            Ok(lower) => lower,
            Err(error) => {
                let give_up = move |inner: &Inner| {
                    inner.give_up(id);
                    Ok(())
                };
                self.blocking(give_up).await?;
                return Err(error);
            }
        };
        self.blocking(move |inner| {
            // Also when nobody waits for it any longer.
            let _making = making;
            let made = inner.make_directory(id, new.kind, owner.as_ref());
            // The record must not be on disk before the directory is, unless nobody asks for it after a crash, or for
            // nothing in it.
            let is_needed = !new.is_extraction() && (new.kind == Kind::Active || parents.is_empty());
            let made = made.and_then(|()| if is_needed { sync_directory(&inner.directories.of(id)) } else { Ok(()) });
            let made = made.map_err(|error| Error::Directory(new.key.clone(), error));
            let created = made.and_then(|()| Ok(inner.metadata.create(&new, id, now)?));
            if let Err(error) = created {
                inner.give_up(id);
                return Err(error);
            }
            if new.is_extraction() {
                inner.work.begin();
            }
            debug!(key = %new.key, %id, kind = ?new.kind, "snapshot made");
            Ok(inner.mount(new.kind, id, &lower, tree.is_some()))
        })
        .await
    }

    /// The lazy layers among `parents`, `None` without any.
    async fn tree(&self, key: &SnapshotKey, parents: &[Snapshot]) -> Result<Option<Tree>> {
        let lazy = Lower::new(parents).lazy;
        if lazy.is_empty() {
            return Ok(None);
        }
        let tree = self.inner.trees.get(lazy, Lower::named_by_others(parents), self.inner.limits.start).await;
        tree.map(Some).map_err(|error| Error::Tree(key.clone(), error))
    }

    /// The lower directories of a snapshot, topmost first.
    async fn lower(
        &self,
        key: &SnapshotKey,
        id: SnapshotId,
        id_map: Option<IdMap>,
        parents: &[Snapshot],
        tree: Option<&Tree>,
    ) -> Result<Vec<PathBuf>> {
        let lower = Lower::new(parents);
        let tree = tree.map(|tree| tree.path.clone());
        let Some(id_map) = id_map else { return Ok(lower.paths(&self.inner.directories, tree)) };
        let (inner, is_lazy) = (Arc::clone(&self.inner), tree.is_some());
        let show = move || inner.show_with_owners(id, &id_map, &lower, tree.as_deref());
        let shown = if is_lazy {
            // The tree is looked at, and the session may not answer.
            let shown = timeout(self.inner.limits.start, self.inner.trees.looking(show)).await;
            shown.map_err(|_| Error::Tree(key.clone(), TreeError::Pending(self.inner.limits.start)))?
        } else {
            self.blocking(move |_| Ok(show())).await?
        };
        shown.map_err(|error| Error::IdMapped(key.clone(), error))
    }

    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(done) => done,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// A snapshot without a record yet: its directory is nobody's orphan.
struct Making {
    inner: Arc<Inner>,
    id: SnapshotId,
}

impl Making {
    fn new(inner: &Arc<Inner>) -> Self {
        let id = inner.metadata.take_id();
        inner.being_made().insert(id);
        Self { inner: Arc::clone(inner), id }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.inner.being_made().remove(&self.id);
    }
}

impl Inner {
    fn mount(&self, kind: Kind, id: SnapshotId, lower: &[PathBuf], is_lazy: bool) -> Mount {
        let lazy_options = self.lazy_overlay_options.iter().filter(|_| is_lazy);
        let options: Vec<_> = self.overlay_options.iter().chain(lazy_options).cloned().collect();
        mounts(kind, id, lower, &self.directories, &options)
    }

    /// All records; damaged ones are logged, each once.
    pub(crate) fn list(&self) -> Result<Listed> {
        let listed = self.metadata.list()?;
        for damaged in listed.damaged.iter().map(ToString::to_string) {
            if self.is_news(damaged.clone()) {
                error!(error = damaged, "this snapshot is left out, others go on: remove it");
            }
        }
        Ok(listed)
    }

    /// Whether this was not told before.
    fn is_news(&self, told: String) -> bool {
        let mut known = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= TOLD_MAX {
            known.clear();
        }
        known.insert(told)
    }

    pub(crate) fn being_made(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.being_made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn failed(&self, error: io::Error) -> Error {
        Error::Io(self.directories.all().to_owned(), error)
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
        let shown = self.directories.clone().shown_at(self.id_mapped.path(id, Part::Layers));
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

    /// Deletes the directory of a snapshot and its mounts with other owners.
    pub(crate) fn remove_snapshot(&self, id: SnapshotId) -> io::Result<()> {
        self.id_mapped.remove(id)?;
        remove_all(&self.directories.of(id))
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
        Ok(())
    }

    /// Deletes what was made for a snapshot that cannot be.
    fn give_up(&self, id: SnapshotId) {
        let removed = self.remove_snapshot(id);
        removed.unwrap_or_else(|error| warn!(%id, %error, "directory stays until the next cleanup"));
    }

    fn usage_of(&self, id: SnapshotId) -> Result<Usage> {
        self.usage_below(self.directories.upper(id))
    }

    fn usage_below(&self, directory: PathBuf) -> Result<Usage> {
        disk_usage(&directory).map_err(|error| Error::Io(directory, error))
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

/// Its name gets to the disk with it on ext4, XFS and btrfs.
fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

pub(crate) fn remove_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
