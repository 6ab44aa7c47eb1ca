//! Layers and trees of a root directory: opened, merged, kept.
//!
//! The common part of the daemon and `lazuli mount`. `mounts.rs` shows trees as directories and takes them away again;
//! `trees.rs` knows who waits for which. Below the root lie `cache/` (storage's) and `trees/` (`store.rs`).

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use control::{
    LayerStatus, LayerWaits, RemoteLayer, TreeId,
    root::{CACHE, TREES},
    tree_id,
};
use format_spec::{Digest, LayerId, limits::LAYER_COUNT_MAX};
use fuser::Notifier;
use futures_util::StreamExt;
use serde_json::{Value, json};
use storage::{Cache, CacheOptions, KnownLayer, Layer, Source, Sources, Verdict};
use tokio::{runtime::Handle, sync::oneshot, task::JoinSet};
use tracing::{debug, info, warn};
use tree::merge::{MergeError, merge};

use crate::{
    description::{IMAGE, owner_of},
    error::Error,
    factory::SourceFactory,
    namespace::Namespace,
    number::Node,
    pool::Pools,
    reading::reading,
    session,
    starts::Starts,
    store::{StoredTree, TreeRecord, TreeStore},
    sync::lock,
    tree::Tree,
    trees::{Attempt, Change, Trees, Wanted},
    waits::{asked_for, waits_of},
};

/// How long an answer waits for the kernel to know what it says: a path that is answered can be opened, and one that was
/// released is gone. A lookup that hangs holds up nobody for longer.
const TELLING_TIME: Duration = Duration::from_millis(200);
/// How long what nobody looks at stays in the daemon's memory.
const RELEASE_INTERVAL: Duration = Duration::from_secs(60);

/// The layers and trees of one root directory. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service(Arc<Inner>);

struct Inner {
    cache: Cache,
    store: TreeStore,
    pools: Pools,
    sources: Arc<dyn SourceFactory>,
    namespace: Arc<Namespace>,
    trees: Arc<Trees>,
    /// Layers that are opened because somebody announced them, with the image that he named.
    announced: Mutex<HashSet<(LayerId, String)>>,
    /// `None` where starts are not recorded.
    starts: Option<Arc<Starts>>,
    /// Tells the kernel what has changed; `None` where no session shows more than one tree.
    notifier: Option<Notifier>,
}

/// The files of a service, opened.
pub(crate) struct Stores {
    sources: Arc<dyn SourceFactory>,
    cache: Cache,
    trees: TreeStore,
    pools: Pools,
    starts: Option<Arc<Starts>>,
}

impl Stores {
    /// Opens `root`, making it if needed; transfers run on `runtime`, what is missing comes from `sources`.
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
        let cache = CacheOptions { sources: places(&sources), owner: owner_of, ..cache };
        let disk = cache.disk.clone();
        Ok(Self {
            sources,
            cache: Cache::open(&root.join(CACHE), runtime, cache)?,
            trees: TreeStore::open(root.join(TREES), disk)?,
            pools: Pools::new().map_err(Error::disk(root))?,
            starts: None,
        })
    }

    /// Has starts recorded below `root`, and records used if it `fetches_ahead`. Where that cannot be, all goes on without.
    pub(crate) fn record_starts(&mut self, root: &Path, fetches_ahead: bool) {
        match Starts::open(root, fetches_ahead) {
            Ok(starts) => self.starts = Some(starts),
            Err(error) => warn!(root = %root.display(), %error, "starts are not recorded"),
        }
    }
}

impl Service {
    /// A service that shows nothing before it is asked for; `namespace` is what a session shows.
    pub(crate) fn new(stores: Stores, namespace: Arc<Namespace>, notifier: Option<Notifier>) -> Self {
        let Stores { sources, cache, trees: store, pools, starts } = stores;
        let (trees, announced) = (Arc::default(), Mutex::default());
        starts.iter().for_each(Starts::keep_looking);
        Self(Arc::new(Inner { cache, store, pools, sources, namespace, trees, announced, starts, notifier }))
    }

    /// What a session for the node shows.
    pub(crate) fn namespace(&self) -> Arc<Namespace> {
        self.0.namespace.clone()
    }

    /// Which trees there are.
    pub(crate) fn trees(&self) -> &Arc<Trees> {
        &self.0.trees
    }

    /// The starts that are recorded, if any are.
    pub(crate) fn starts(&self) -> Option<&Arc<Starts>> {
        self.0.starts.as_ref()
    }

    /// Threads for what blocks.
    pub(crate) fn pools(&self) -> &Pools {
        &self.0.pools
    }

    /// Makes every tree available again that was when the last process ended, in the background; the namespace is
    /// incomplete until then. Those that cannot be had are skipped.
    ///
    /// # Errors
    ///
    /// When the trees cannot be listed; the namespace is complete then.
    pub(crate) fn restore(&self) -> Result<(), Error> {
        let records = self.0.store.records().inspect_err(|_| {
            self.starts().into_iter().for_each(|starts| starts.note_restored_unknown());
            self.0.namespace.set_complete();
        })?;
        if let Some(starts) = self.starts() {
            let ids = |record: &TreeRecord| record.layers.iter().map(|remote| remote.layer.id()).collect();
            starts.note_restored(records.iter().map(|(id, record)| (*id, image_of_tree(&record.layers), ids(record))));
        }
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
                let trees = inner.trees.made();
                inner.pools.looking.run(move || trees.iter().for_each(|tree| tree.release_memory())).await;
            }
        });
    }

    /// Opens a layer, fetching its index if need be.
    ///
    /// # Errors
    ///
    /// When there is no source for it or its index cannot be had.
    pub(crate) async fn layer(&self, remote: &RemoteLayer) -> Result<Layer, Error> {
        let (source, description) = self.place_of(remote)?;
        let layer = self.0.cache.layer(&remote.layer, source, description).await?;
        self.0.namespace.add_layer(&layer);
        Ok(layer)
    }

    /// The same for a tree: the image stays a place of the layer until the tree is released.
    async fn layer_of_tree(&self, remote: &RemoteLayer) -> Result<Layer, Error> {
        let (source, description) = self.place_of(remote)?;
        let layer = self.0.cache.held_layer(&remote.layer, source, description).await?;
        self.0.namespace.add_layer(&layer);
        Ok(layer)
    }

    /// Makes images places of the layers of a tree that is there, until it is released.
    fn hold_places(&self, id: TreeId, layers: &[RemoteLayer]) {
        if let Some(starts) = self.starts() {
            starts.named(id, image_of_tree(layers));
        }
        for remote in layers {
            match self.place_of(remote) {
                Ok((source, description)) => self.0.cache.hold_place(&remote.layer, source, description),
                Err(error) => debug!(%error, "image is no place of the layer"),
            }
        }
    }

    fn place_of(&self, remote: &RemoteLayer) -> Result<(Arc<dyn Source>, Value), Error> {
        let (blob, image) = (remote.layer.blob, &remote.image);
        let refuse = |error| Error::Source { blob, image: image.clone(), error };
        Ok((self.0.sources.source(remote).map_err(refuse)?, json!({ IMAGE: image })))
    }

    /// Opens a layer in the background; failures show when a tree needs it.
    pub(crate) fn announce(&self, remote: RemoteLayer) {
        let announced = (remote.layer.id(), remote.image.clone());
        if !lock(&self.0.announced).insert(announced.clone()) {
            return;
        }
        let service = self.clone();
        tokio::spawn(async move {
            if let Err(error) = service.layer(&remote).await {
                debug!(image = remote.image, blob = %remote.layer.blob, %error, "announced layer cannot be opened yet");
            }
            lock(&service.0.announced).remove(&announced);
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
    pub(crate) fn verdicts(&self, layers: &[LayerId]) -> Vec<Option<control::Verdict>> {
        let open = self.0.cache.open_layers();
        let known: HashMap<LayerId, &Layer> = open.iter().map(|layer| (layer.lazy_layer().id(), layer)).collect();
        layers.iter().map(|id| known.get(id).and_then(|layer| layer.verdict()).map(told)).collect()
    }

    /// The merged tree of `layers`, lowest first: known already, from disk, or made now. Concurrent calls share the
    /// work, which ends when all of them are dropped.
    ///
    /// # Errors
    ///
    /// When a layer cannot be opened, the layers do not make a tree, the disk refuses, or too many wait for the tree.
    pub(crate) async fn tree(&self, layers: &[RemoteLayer]) -> Result<Arc<Tree>, Error> {
        let id = tree_id(layers.iter().map(|layer| layer.layer.id())).filter(|_| layers.len() <= LAYER_COUNT_MAX);
        let id = id.ok_or(MergeError::LayerCount(layers.len()))?;
        let waiting = match self.0.trees.want(id, layers)? {
            Wanted::Made(tree) => {
                // Another image of the same layers is another place of them.
                self.hold_places(id, layers);
                return Ok(tree);
            }
            Wanted::Coming(waiting) => {
                let tree = waiting.outcome().await?;
                self.hold_places(id, layers);
                return Ok(tree);
            }
            Wanted::Absent(attempt, waiting) => {
                let (service, layers) = (self.clone(), layers.to_vec());
                attempt.run(|attempt| tokio::spawn(async move { service.make_tree(attempt, id, layers).await }));
                waiting
            }
        };
        waiting.outcome().await
    }

    async fn make_tree(&self, attempt: Attempt, id: TreeId, layers: Vec<RemoteLayer>) {
        self.0.trees.wait_for_removals(layers.iter().map(|layer| layer.layer.id())).await;
        let opened = match self.open_layers(&layers).await {
            Ok(opened) => opened,
            Err(error) => return attempt.end(Err(error)),
        };
        let change = self.0.trees.change(id).await;
        attempt.keep();
        let (made, change) = self.load_or_merge(id, &layers, opened, change).await;
        if let Ok(tree) = &made {
            self.0.namespace.add_tree(tree);
            self.tell(Node::Trees, id).await;
            let image = image_of_tree(&layers);
            if let Some(starts) = self.starts() {
                starts.made(tree, image);
            }
            info!(image, tree = %id, layers = layers.len(), inodes = tree.index.inodes().len(), "tree available");
        }
        attempt.end(made);
        drop(change);
    }

    async fn open_layers(&self, layers: &[RemoteLayer]) -> Result<Vec<Layer>, Error> {
        let mut tasks = JoinSet::new();
        for (number, remote) in layers.iter().cloned().enumerate() {
            let service = self.clone();
            tasks.spawn(async move { (number, service.layer_of_tree(&remote).await) });
        }
        let mut opened: Vec<Option<Layer>> = vec![None; layers.len()];
        while let Some(finished) = tasks.join_next().await {
            let (number, layer) = finished.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            opened[number] = Some(layer?);
        }
        Ok(opened.into_iter().flatten().collect())
    }

    /// A tree that is there already waits for no merge.
    async fn load_or_merge(
        &self,
        id: TreeId,
        remote: &[RemoteLayer],
        layers: Vec<Layer>,
        change: Change,
    ) -> (Result<Arc<Tree>, Error>, Change) {
        let (service, known) = (self.clone(), remote.to_vec());
        // The right to change the tree stays with the work, whatever becomes of who waits for it.
        let load = move || (service.0.store.load(id, &known), change);
        let (loaded, change) = self.0.pools.looking.run(load).await;
        let (stored, change) = match loaded {
            Ok(Some(stored)) => (Ok(stored), change),
            Err(error) => (Err(error), change),
            Ok(None) => {
                let (service, known, layers) = (self.clone(), remote.to_vec(), layers.clone());
                self.0.pools.merging.run(move || (service.merge(id, &known, &layers), change)).await
            }
        };
        let tree_of = |StoredTree { slot, index, block_count }| Arc::new(Tree { id, slot, index, layers, block_count });
        let made = stored.map(tree_of);
        if let Ok(tree) = &made {
            tree.release_memory();
        }
        (made, change)
    }

    fn merge(&self, id: TreeId, remote: &[RemoteLayer], layers: &[Layer]) -> Result<StoredTree, Error> {
        let indexes: Vec<_> = layers.iter().map(|layer| (layer.lazy_layer().id(), layer.index())).collect();
        self.0.store.create(id, remote, &merge(&indexes)?)
    }

    /// The EROFS image of a tree; blocks.
    ///
    /// # Errors
    ///
    /// When the tree cannot be an image, or the disk refuses.
    pub(crate) fn image(&self, tree: &Tree) -> Result<PathBuf, Error> {
        self.0.store.image(tree.id, &tree.index, &tree.extents())
    }

    /// The EROFS image of a tree if it was made before; blocks.
    pub(crate) fn known_image(&self, tree: &Tree) -> Option<PathBuf> {
        self.0.store.known_image(tree.id, &tree.index)
    }

    /// Shows a tree no longer and forgets it on disk; blocks. To be called by who may change it.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn delete_tree(&self, id: TreeId) -> Result<(), Error> {
        let removed = self.0.namespace.remove_tree(id);
        if let Some(starts) = self.starts() {
            starts.released(id);
        }
        self.0.store.remove(id)?;
        if removed.is_some() {
            let (sender, told) = mpsc::sync_channel(1);
            self.notify_change(Node::Trees, id, move || _ = sender.send(()));
            _ = told.recv_timeout(TELLING_TIME);
        }
        if let Some(tree) = removed {
            let image = tree.layers.last().map(image_of).unwrap_or_default();
            info!(image, tree = %id, "tree unmounted");
        }
        Ok(())
    }

    /// Takes images away as places of layers; nothing loses its only one. Blocks.
    pub(crate) fn forget_places(&self, places: &[(LayerId, String)]) {
        for (id, image) in places {
            self.0.cache.forget_place(*id, &json!({ IMAGE: image }));
        }
    }

    /// Deletes the cache of a layer; unknown ones are deleted already. Once begun it is done, whoever waits.
    ///
    /// # Errors
    ///
    /// When a tree uses it, or the disk refuses.
    pub(crate) async fn remove_layer(&self, id: LayerId) -> Result<(), Error> {
        let Some(removal) = self.0.trees.begin_removal(id)? else {
            self.0.trees.wait_for_removals(std::iter::once(id)).await;
            return Ok(());
        };
        let service = self.clone();
        let removing = tokio::spawn(async move {
            service.0.namespace.remove_layer(id);
            service.tell(Node::Layers, id).await;
            let known = service.0.cache.open_layers().into_iter().find(|layer| layer.lazy_layer().id() == id);
            let disk_bytes = service.layer_usage(id).await.unwrap_or_default();
            let removed = service.0.cache.remove(id).await;
            drop(removal);
            if let (Some(layer), Ok(())) = (known, &removed) {
                info!(image = image_of(&layer), blob = %layer.lazy_layer().blob, disk_bytes, "layer removed");
            }
            removed
        });
        Ok(removing.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?)
    }

    /// Bytes that a layer takes on disk; 0 for unknown ones.
    ///
    /// # Errors
    ///
    /// When its files cannot be looked at.
    pub(crate) async fn layer_usage(&self, id: LayerId) -> Result<u64, Error> {
        let service = self.clone();
        self.0.pools.looking.run(move || service.0.cache.usage(id).map_err(Error::disk(id.hex()))).await
    }

    /// Every layer that the cache holds, sorted by digest.
    ///
    /// # Errors
    ///
    /// When the cache cannot be listed.
    pub(crate) async fn layers(&self) -> Result<Vec<LayerStatus>, Error> {
        let service = self.clone();
        let look = move || {
            let cache = &service.0.cache;
            let open: HashMap<Digest, Layer> =
                cache.open_layers().into_iter().map(|layer| (layer.lazy_layer().id(), layer)).collect();
            let status = |known: KnownLayer| {
                let id = known.layer.id();
                let disk_bytes = cache.usage(id).map_err(Error::disk(id.hex()))?;
                Ok(layer_status(&known, open.get(&id), disk_bytes))
            };
            cache.known_layers()?.into_iter().map(status).collect()
        };
        self.0.pools.looking.run(look).await
    }

    /// The waits of readers of these layers as far as they are open, of all where none are named; sorted by digest.
    pub(crate) async fn waits(&self, layers: Option<Vec<LayerId>>) -> Vec<LayerWaits> {
        let service = self.clone();
        let look = move || {
            let open = service.0.cache.open_layers();
            asked_for(open, layers, |layer| layer.lazy_layer().id()).iter().map(waits_of).collect()
        };
        self.0.pools.looking.run(look).await
    }

    /// Makes everything that arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        Ok(self.0.cache.flush()?)
    }

    /// Writes down what was recorded of starts so far; blocks.
    pub(crate) fn write_starts(&self) {
        if let Some(starts) = self.starts() {
            starts.write_now();
        }
    }

    /// Has the kernel hear of a change, and waits for that, not long.
    async fn tell(&self, directory: Node, name: Digest) {
        let (sender, told) = oneshot::channel();
        self.notify_change(directory, name, move || _ = sender.send(()));
        _ = tokio::time::timeout(TELLING_TIME, told).await;
    }

    /// Not while lookups wait for what the last process has shown: the kernel would keep this one waiting for them. All
    /// changes of that time are told at its end. `done` runs when the kernel knows, or is not told.
    fn notify_change(&self, directory: Node, name: Digest, done: impl FnOnce() + Send + 'static) {
        if self.0.namespace.is_incomplete() {
            return done();
        }
        self.notify(move |notifier| {
            session::notify_change(notifier, directory.number(), &name.hex());
            done();
        });
    }

    /// The kernel answers only when it holds no lock that a lookup under way needs: who waits for it does so for a while.
    fn notify(&self, notify: impl FnOnce(&Notifier) + Send + 'static) {
        if let Some(notifier) = self.0.notifier.clone() {
            self.0.pools.telling.begin(move || notify(&notifier));
        }
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

/// The image that a tree of these layers is wanted for.
fn image_of_tree(layers: &[RemoteLayer]) -> &str {
    layers.last().map_or("", |top| top.image.as_str())
}

/// The image that a layer was last pulled for.
fn image_of(layer: &Layer) -> String {
    layer.description().get(IMAGE).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// A layer that was refused is in no new mount.
pub(crate) fn check_not_refused(layers: &[Layer], remote: &[RemoteLayer]) -> Result<(), Error> {
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
        verdict: open.and_then(Layer::verdict).map(told),
        disk_bytes,
        healed_pages: progress.healed_pages,
        reading: open.map(|layer| reading(layer, Instant::now())).unwrap_or_default(),
    }
}

/// A verdict as clients hear it.
fn told(verdict: Verdict) -> control::Verdict {
    match verdict {
        Verdict::Verified { tar } => control::Verdict::Verified { tar },
        Verdict::Refused { reason } => control::Verdict::Refused { reason },
    }
}
