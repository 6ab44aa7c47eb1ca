//! Layers and trees of a root directory: opened, merged, kept, forgotten.
//!
//! What the control socket asks for and what `lazuli mount` needs, without either. Below the root lie
//! `cache/` (storage's) and `trees/` (`store.rs`).

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use format_spec::{Digest, LayerId, LazyLayer, index::LAYER_COUNT_MAX};
use fuser::Notifier;
use futures_util::StreamExt;
use serde_json::json;
use storage::{Cache, CacheOptions, KnownLayer, Layer, Sources, Verdict};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, RwLock},
    task::JoinSet,
};
use tracing::{debug, info, warn};

use crate::{
    control::{LayerStatus, ModeStatus, RemoteLayer, TreeId, TreeMode, TreeStatus, tree_id},
    error::Error,
    factory::SourceFactory,
    id_mapped,
    kernel_mounts::KernelMounts,
    merge::{MergeError, merge},
    mode::Mode,
    namespace::{Namespace, TREES},
    number::Node,
    reading::reading,
    session,
    store::TreeStore,
    tree::Tree,
};

/// Key of the image reference in storage's description of a layer.
pub(crate) const IMAGE: &str = "image";
/// How long what nobody looks at stays in the daemon's memory.
const RELEASE_INTERVAL: Duration = Duration::from_secs(60);

/// The layers and trees of one root directory. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service(Arc<Inner>);

struct Inner {
    cache: Cache,
    store: TreeStore,
    sources: Arc<dyn SourceFactory>,
    namespace: Arc<Namespace>,
    /// Trees that are available, or being made by somebody.
    trees: Mutex<HashMap<TreeId, Arc<PendingTree>>>,
    /// Held while a tree is made or deleted on disk, so that the one never undoes half of the other.
    changing: Mutex<()>,
    /// Held for writing while a layer is removed: no tree may begin to use it meanwhile.
    removing: RwLock<()>,
    notifier: OnceLock<Notifier>,
    mounts: OnceLock<Mounts>,
}

/// Where trees are shown, and how new ones are mounted.
struct Mounts {
    /// The directory of trees of the session.
    trees: PathBuf,
    kernel: KernelMounts,
    mode: ModeStatus,
    /// Portable mode is no way out.
    is_kernel_required: bool,
}

struct PendingTree {
    /// The images that it was asked for by, each a place of all its layers.
    images: Mutex<BTreeSet<String>>,
    layers: Vec<LazyLayer>,
    tree: OnceCell<Arc<Tree>>,
}

impl Service {
    /// Opens `root`, making it if needed; transfers run on `runtime`. Nothing is shown before it is asked for.
    ///
    /// # Errors
    ///
    /// When the cache or the trees cannot be opened.
    pub(crate) fn open(
        root: &Path,
        runtime: Handle,
        sources: Arc<dyn SourceFactory>,
        cache: CacheOptions,
    ) -> Result<Self, Error> {
        let cache = CacheOptions { sources: places(&sources), ..cache };
        Ok(Self(Arc::new(Inner {
            cache: Cache::open(&root.join("cache"), runtime, cache)?,
            store: TreeStore::open(root.join("trees"))?,
            sources,
            namespace: Arc::new(Namespace::of_node()),
            trees: Mutex::default(),
            changing: Mutex::default(),
            removing: RwLock::default(),
            notifier: OnceLock::new(),
            mounts: OnceLock::new(),
        })))
    }

    /// What a session for the node shows.
    pub(crate) fn namespace(&self) -> Arc<Namespace> {
        self.0.namespace.clone()
    }

    /// Lets changes be told to the kernel from now on.
    pub(crate) fn set_notifier(&self, notifier: Notifier) {
        // There is one session; a second call would have nothing new to say.
        let _ = self.0.notifier.set(notifier);
    }

    /// Mounts trees from now on: over the session on `session`, which must answer, in the mode that was chosen.
    ///
    /// # Errors
    ///
    /// When the session or the directory of mounts cannot be used.
    pub(crate) fn set_mounts(
        &self,
        root: &Path,
        session: &Path,
        read_ahead_kib: u32,
        asked: Mode,
        mode: ModeStatus,
    ) -> Result<(), Error> {
        let kernel = KernelMounts::open(root, session, read_ahead_kib).map_err(Error::disk(root))?;
        let is_kernel_required = asked == Mode::Erofs;
        // There is one session, and one call.
        let _ = self.0.mounts.set(Mounts { trees: session.join(TREES), kernel, mode, is_kernel_required });
        Ok(())
    }

    /// Makes every tree available again that was when the last process ended, in the background; until then the
    /// namespace is incomplete. Those that cannot be had are skipped.
    ///
    /// # Errors
    ///
    /// When the trees cannot be listed.
    pub(crate) fn restore(&self) -> Result<(), Error> {
        let records = self.0.store.records()?;
        self.0.namespace.set_incomplete();
        let mut restoring = JoinSet::new();
        for (id, record) in records {
            let service = self.clone();
            restoring.spawn(async move {
                if let Err(error) = service.tree(&record.layers).await {
                    warn!(tree = %id, %error, "tree is not available");
                }
            });
        }
        let service = self.clone();
        tokio::spawn(async move {
            while restoring.join_next().await.is_some() {}
            service.0.namespace.set_complete();
            for directory in [Node::Layers, Node::Trees] {
                service.notify(move |notifier| session::notify_listing(notifier, directory.number()));
            }
        });
        Ok(())
    }

    /// Lets go of the memory of trees now and then, as long as the service is there: in portable mode a container that
    /// looks at each of its files once would keep all of it.
    pub(crate) fn release_memory_now_and_then(&self) {
        let service = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RELEASE_INTERVAL).await;
                let Some(inner) = service.upgrade() else { return };
                let trees: Vec<_> =
                    lock(&inner.trees).values().filter_map(|pending| pending.tree.get().cloned()).collect();
                blocking(move || trees.iter().for_each(|tree| tree.release_memory())).await;
            }
        });
    }

    /// Opens a layer, fetching its index if need be.
    ///
    /// # Errors
    ///
    /// When there is no source for it or its index cannot be had.
    pub(crate) async fn layer(&self, remote: &RemoteLayer) -> Result<Layer, Error> {
        let (blob, image) = (remote.layer.blob, &remote.image);
        let refuse = |error| Error::Source { blob, image: image.clone(), error };
        let source = self.0.sources.source(remote).map_err(refuse)?;
        let layer = self.0.cache.layer(&remote.layer, source, json!({ IMAGE: image })).await?;
        self.0.namespace.add_layer(&layer);
        Ok(layer)
    }

    /// Opens a layer in the background; failures show when a tree needs it.
    pub(crate) fn announce(&self, remote: RemoteLayer) {
        let service = self.clone();
        tokio::spawn(async move {
            if let Err(error) = service.layer(&remote).await {
                debug!(image = remote.image, blob = %remote.layer.blob, %error, "announced layer cannot be opened yet");
            }
        });
    }

    /// Finds out whether a layer can be read from where it says; what is fetched for that is kept.
    ///
    /// # Errors
    ///
    /// Why not; [`Error::Unread`] when it is not known within that time.
    pub(crate) async fn probe(&self, remote: RemoteLayer, within: Duration) -> Result<(), Error> {
        let (blob, image) = (remote.layer.blob, remote.image.clone());
        let failed = |error| Error::Source { blob, image: image.clone(), error };
        let look = async {
            let is_here = self.0.cache.open_layers().iter().any(|open| open.lazy_layer().id() == remote.layer.id());
            if !is_here && self.layer(&remote).await?.progress().fetched_bytes > 0 {
                return Ok(());
            }
            // It is here because of another image: that says nothing about this one's registry.
            let source = self.0.sources.source(&remote).map_err(failed)?;
            let start = remote.layer.index.offset;
            let mut answer = source.fetch(start..start + 1).await.map_err(failed)?;
            answer.next().await.transpose().map_err(failed)?;
            self.layer(&remote).await.map(drop)
        };
        let looked = tokio::time::timeout(within, look).await;
        looked.unwrap_or(Err(Error::Unread { blob, image: image.clone(), within }))
    }

    /// Has the verdicts on layers found out now, in the background.
    pub(crate) fn verify(&self, layers: Vec<RemoteLayer>) {
        for remote in layers {
            let service = self.clone();
            tokio::spawn(async move {
                match service.layer(&remote).await {
                    Ok(layer) => layer.verify(),
                    Err(error) => {
                        warn!(image = remote.image, blob = %remote.layer.blob, %error, "layer is not verified")
                    }
                }
            });
        }
    }

    /// The verdicts on layers, as far as there are any.
    pub(crate) fn verdicts(&self, layers: &[LayerId]) -> Vec<Option<Verdict>> {
        let open = self.0.cache.open_layers();
        let known: HashMap<LayerId, &Layer> = open.iter().map(|layer| (layer.lazy_layer().id(), layer)).collect();
        layers.iter().map(|id| known.get(id).and_then(|layer| layer.verdict())).collect()
    }

    /// The merged tree of `layers`, lowest first: known already, from disk, or made now. Concurrent calls share the
    /// work.
    ///
    /// # Errors
    ///
    /// When a layer cannot be opened, the layers do not make a tree, or the disk refuses.
    pub(crate) async fn tree(&self, layers: &[RemoteLayer]) -> Result<Arc<Tree>, Error> {
        let id = tree_id(layers.iter().map(|layer| layer.layer.id())).filter(|_| layers.len() <= LAYER_COUNT_MAX);
        let id = id.ok_or(MergeError::LayerCount(layers.len()))?;
        let lazy_layers: Vec<LazyLayer> = layers.iter().map(|layer| layer.layer).collect();
        let pending = {
            let _not_removing = self.0.removing.read().await;
            let new = || {
                let (layers, images) = (lazy_layers.clone(), Mutex::default());
                Arc::new(PendingTree { images, layers, tree: OnceCell::new() })
            };
            self.trees().entry(id).or_insert_with(new).clone()
        };
        let is_made = pending.tree.get().is_some();
        let named_before = lock(&pending.images).clone();
        lock(&pending.images).extend(layers.iter().map(|remote| remote.image.clone()));
        if is_made {
            // Another image of the same layers is another place of them.
            let new = layers.iter().filter(|remote| !named_before.contains(&remote.image));
            new.for_each(|remote| self.announce(remote.clone()));
        }
        let made = pending.tree.get_or_try_init(|| self.make_tree(id, layers)).await.cloned();
        if made.is_err() {
            self.forget_failed(id, pending);
        }
        made
    }

    async fn make_tree(&self, id: TreeId, layers: &[RemoteLayer]) -> Result<Arc<Tree>, Error> {
        let opened = self.open_layers(layers).await?;
        let (service, remote) = (self.clone(), layers.to_vec());
        let make = move || service.load_or_merge(id, &remote, opened);
        let tree = blocking(make).await?;
        self.0.namespace.add_tree(&tree);
        self.notify_change(Node::Trees, id);
        tree.release_memory();
        let image = layers.last().map_or("", |top| top.image.as_str());
        info!(image, tree = %id, layers = layers.len(), inodes = tree.index.inodes().len(), "tree available");
        Ok(tree)
    }

    async fn open_layers(&self, layers: &[RemoteLayer]) -> Result<Vec<Layer>, Error> {
        let mut tasks = JoinSet::new();
        for (number, remote) in layers.iter().cloned().enumerate() {
            let service = self.clone();
            tasks.spawn(async move { (number, service.layer(&remote).await) });
        }
        let mut opened: Vec<Option<Layer>> = vec![None; layers.len()];
        while let Some(finished) = tasks.join_next().await {
            let (number, layer) = finished.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            opened[number] = Some(layer?);
        }
        Ok(opened.into_iter().flatten().collect())
    }

    fn load_or_merge(&self, id: TreeId, remote: &[RemoteLayer], layers: Vec<Layer>) -> Result<Arc<Tree>, Error> {
        let _changing = lock(&self.0.changing);
        let stored = match self.0.store.load(id, remote)? {
            Some(stored) => stored,
            None => {
                let indexes: Vec<_> = layers.iter().map(|layer| (layer.lazy_layer().id(), layer.index())).collect();
                self.0.store.create(id, remote, &merge(&indexes)?)?
            }
        };
        let (slot, index, block_count) = (stored.slot, stored.index, stored.block_count);
        Ok(Arc::new(Tree { id, slot, index, layers, block_count }))
    }

    /// Unless somebody else is trying it just now.
    fn forget_failed(&self, id: TreeId, pending: Arc<PendingTree>) {
        let mut trees = self.trees();
        drop(pending);
        if let Some(pending) = trees.get(&id)
            && pending.tree.get().is_none()
            && Arc::strong_count(pending) == 1
        {
            trees.remove(&id);
        }
    }

    /// Makes the tree of `layers` available as a directory: a mount of the kernel, or a part of the session.
    ///
    /// # Errors
    ///
    /// Those of [`Self::tree`]; the kernel's where nothing but kernel mode is wanted.
    pub(crate) async fn mount_tree(&self, layers: &[RemoteLayer]) -> Result<PathBuf, Error> {
        let tree = self.tree(layers).await?;
        check_not_refused(&tree.layers, layers)?;
        let mounts = self.mounts();
        let in_session = mounts.trees.join(tree.id.hex());
        if mounts.mode.in_use == TreeMode::Fuse {
            return Ok(in_session);
        }
        let (service, id) = (self.clone(), tree.id);
        match blocking(move || service.mount_in_kernel(&tree)).await {
            Err(error) if !mounts.is_kernel_required => {
                warn!(tree = %id, %error, "tree is mounted in portable mode");
                Ok(in_session)
            }
            mounted => mounted,
        }
    }

    /// The EROFS image of a tree; blocks.
    ///
    /// # Errors
    ///
    /// When the tree cannot be an image, or the disk refuses.
    pub(crate) fn image(&self, tree: &Tree) -> Result<PathBuf, Error> {
        let _changing = lock(&self.0.changing);
        self.0.store.image(tree.id, &tree.index, &tree.extents())
    }

    fn mount_in_kernel(&self, tree: &Tree) -> Result<PathBuf, Error> {
        let _changing = lock(&self.0.changing);
        let image = self.0.store.image(tree.id, &tree.index, &tree.extents())?;
        tree.release_memory();
        let mounted = self.mounts().kernel.mount(tree, &image);
        mounted.map_err(|error| Error::KernelMount(tree.id, error))
    }

    fn mounts(&self) -> &Mounts {
        self.0.mounts.get().expect("set before anybody can ask")
    }

    /// Takes all mounts of the kernel away, and what others mounted of trees, as before the end of the session; blocks.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn unmount_trees(&self, root: &Path) -> Result<(), Error> {
        let kernel = &self.mounts().kernel;
        let failed = |path: &Path| {
            let path = path.to_owned();
            |error| Error::Unmount { path, error }
        };
        let removed = id_mapped::remove_all(root).map_err(failed(&root.join(id_mapped::DIRECTORY)));
        removed.and(kernel.unmount_all().map_err(failed(kernel.directory())))
    }

    /// Forgets a tree, on disk too; unknown ones are forgotten already.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) async fn release_tree(&self, id: TreeId) -> Result<(), Error> {
        let pending = self.trees().get(&id).cloned();
        if let Some(pending) = &pending {
            // Waits for whoever is making it, and makes nothing itself.
            let _ = pending.tree.get_or_try_init(|| async { Err(()) }).await;
        }
        let service = self.clone();
        blocking(move || {
            let _changing = lock(&service.0.changing);
            {
                let mut trees = service.trees();
                let is_wanted = pending.is_some_and(|pending| {
                    let holders = 1 + usize::from(trees.get(&id).is_some_and(|entry| Arc::ptr_eq(entry, &pending)));
                    pending.tree.get().is_none() && Arc::strong_count(&pending) > holders
                });
                if is_wanted {
                    return Ok(());
                }
                let released = trees.remove(&id);
                released.inspect(|released| service.forget_places(released, &trees));
            }
            let removed = service.0.namespace.remove_tree(id);
            let kernel = &service.mounts().kernel;
            kernel.unmount(id).map_err(|error| Error::Unmount { path: kernel.directory().to_owned(), error })?;
            service.0.store.remove(id)?;
            if removed.is_some() {
                service.notify_change(Node::Trees, id);
            }
            Ok(())
        })
        .await
    }

    /// Takes the images of a released tree away as places of its layers, where no other tree is of them.
    ///
    /// An image that was pulled and never started loses its place with another tree of its name; it says it again when
    /// it is started, and nothing loses its only place.
    fn forget_places(&self, released: &PendingTree, others: &HashMap<TreeId, Arc<PendingTree>>) {
        for image in &*lock(&released.images) {
            let is_of_image = |other: &&Arc<PendingTree>| lock(&other.images).contains(image);
            let kept: HashSet<LayerId> =
                others.values().filter(is_of_image).flat_map(|other| &other.layers).map(LazyLayer::id).collect();
            for id in released.layers.iter().map(LazyLayer::id).filter(|id| !kept.contains(id)) {
                self.0.cache.forget_place(id, &json!({ IMAGE: image }));
            }
        }
    }

    /// Deletes the cache of a layer; unknown ones are deleted already.
    ///
    /// # Errors
    ///
    /// When a tree uses it, or the disk refuses.
    pub(crate) async fn remove_layer(&self, id: LayerId) -> Result<(), Error> {
        let _removing = self.0.removing.write().await;
        let user = self
            .trees()
            .iter()
            .find(|(_, pending)| pending.layers.iter().any(|layer| layer.id() == id))
            .map(|(id, _)| *id);
        if let Some(tree) = user {
            return Err(Error::LayerInUse { layer: id, tree });
        }
        self.0.namespace.remove_layer(id);
        self.notify_change(Node::Layers, id);
        Ok(self.0.cache.remove(id).await?)
    }

    /// Bytes that a layer takes on disk; 0 for unknown ones.
    ///
    /// # Errors
    ///
    /// When its files cannot be looked at.
    pub(crate) async fn layer_usage(&self, id: LayerId) -> Result<u64, Error> {
        let service = self.clone();
        blocking(move || service.0.cache.usage(id).map_err(Error::disk(id.hex()))).await
    }

    /// Every layer that the cache holds, sorted by digest.
    ///
    /// # Errors
    ///
    /// When the cache cannot be listed.
    pub(crate) async fn layers(&self) -> Result<Vec<LayerStatus>, Error> {
        let service = self.clone();
        blocking(move || {
            let cache = &service.0.cache;
            let open: HashMap<Digest, Layer> =
                cache.open_layers().into_iter().map(|layer| (layer.lazy_layer().id(), layer)).collect();
            let status = |known: KnownLayer| {
                let id = known.layer.id();
                let disk_bytes = cache.usage(id).map_err(Error::disk(id.hex()))?;
                Ok(layer_status(&known, open.get(&id), disk_bytes))
            };
            cache.known_layers()?.into_iter().map(status).collect()
        })
        .await
    }

    /// How new trees are mounted, and why.
    pub(crate) fn mode(&self) -> ModeStatus {
        self.mounts().mode.clone()
    }

    /// Every tree that is available, sorted.
    pub(crate) async fn available_trees(&self) -> Vec<TreeStatus> {
        let layers_of = |pending: &PendingTree| pending.layers.iter().map(LazyLayer::id).collect();
        let mut available: Vec<(TreeId, Vec<LayerId>)> = {
            let trees = self.trees();
            let available = trees.iter().filter(|(_, pending)| pending.tree.get().is_some());
            available.map(|(id, pending)| (*id, layers_of(pending))).collect()
        };
        available.sort_unstable_by_key(|(id, _)| *id);
        let service = self.clone();
        let status = move |(tree, layers)| {
            let direct_layers = service.mounts().kernel.find(tree);
            let mode = if direct_layers.is_some() { TreeMode::Erofs } else { TreeMode::Fuse };
            TreeStatus { tree, layers, mode, direct_layers: direct_layers.unwrap_or_default() }
        };
        blocking(move || available.into_iter().map(status).collect()).await
    }

    /// Makes everything that arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        Ok(self.0.cache.flush()?)
    }

    fn trees(&self) -> MutexGuard<'_, HashMap<TreeId, Arc<PendingTree>>> {
        lock(&self.0.trees)
    }

    /// Not while lookups wait for what the last process has shown: the kernel would keep this one waiting for them. All
    /// changes of that time are told at its end.
    fn notify_change(&self, directory: Node, name: Digest) {
        if !self.0.namespace.is_incomplete() {
            self.notify(move |notifier| session::notify_change(notifier, directory.number(), &name.hex()));
        }
    }

    /// The kernel answers only when it holds no lock that a lookup under way needs, so nobody waits for it here.
    fn notify(&self, notify: impl FnOnce(&Notifier) + Send + 'static) {
        let Some(notifier) = self.0.notifier.get().cloned() else { return };
        tokio::task::spawn_blocking(move || notify(&notifier));
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("namespace", &self.0.namespace).finish_non_exhaustive()
    }
}

/// Makes sources from the descriptions of layers that the cache keeps.
fn places(sources: &Arc<dyn SourceFactory>) -> Sources {
    let sources = sources.clone();
    Sources::new(move |layer, description| {
        let image = description.get(IMAGE)?.as_str()?.to_owned();
        sources.source(&RemoteLayer { layer: *layer, image }).ok()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is changed by single inserts and removes: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A layer that was refused is in no new mount.
fn check_not_refused(layers: &[Layer], remote: &[RemoteLayer]) -> Result<(), Error> {
    for (layer, remote) in layers.iter().zip(remote) {
        if let Some(Verdict::Refused { reason }) = layer.verdict() {
            return Err(Error::Untrue { blob: remote.layer.blob, image: remote.image.clone(), reason });
        }
    }
    Ok(())
}

fn layer_status(known: &KnownLayer, open: Option<&Layer>, disk_bytes: u64) -> LayerStatus {
    let image = known.description.get(IMAGE).and_then(|image| image.as_str()).unwrap_or_default();
    let progress = open.map(Layer::progress).unwrap_or_default();
    LayerStatus {
        layer: RemoteLayer { layer: known.layer, image: image.to_owned() },
        frames_present: progress.frames_present,
        frames_total: progress.frames_total,
        fetched_bytes: progress.fetched_bytes,
        is_complete: open.is_some_and(Layer::is_settled),
        verdict: open.and_then(Layer::verdict),
        disk_bytes,
        healed_pages: progress.healed_pages,
        reading: open.map(reading).unwrap_or_default(),
    }
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}
