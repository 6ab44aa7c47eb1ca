//! The cache directory: one directory a layer, shared by all images that have the layer.
//!
//! ```text
//! <root>/layers/<64 hex digits of the index digest>/   see directory.rs
//! <root>/removed/                                      what is being deleted
//! <root>/incoming/                                     indexes that are being unpacked, see unpack.rs
//! ```
//!
//! A layer is known by the digest of its index: it covers all that is believed of a layer that is read in
//! parts, while nobody ever sees the whole blob to hash it.
//!
//! `opening.rs` opens layers, `start_up.rs` does what is to be done for one right afterwards, `rest.rs` fetches what
//! nobody asks for, `verifying.rs` has complete layers verified.

use std::{
    collections::HashMap,
    fs, io,
    num::NonZeroU64,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use format_spec::{Digest, LayerId, LazyLayer};
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use serde_json::Value;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::AbortHandle,
    time::Instant,
};

use crate::{
    disk::{
        Disk,
        directory::{LayerDirectory, LayerRecord},
        unkept::Unkept,
        unpack::Unpacker,
    },
    error::{CacheError, ReadError},
    fetch::{
        places::{Place, Places},
        rate::BestRate,
        scheduler::{RequestOptions, Scheduler},
        source::{Source, Sources},
        transfer,
    },
    layer::Layer,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
        lock,
    },
};

mod opening;
mod quiet;
mod rest;
mod scrub;
mod section;
mod shares;
mod start_up;
mod verifying;

pub use rest::RestOptions;

/// `f_type` of overlayfs (Linux include/uapi/linux/magic.h).
const OVERLAYFS_SUPER_MAGIC: u64 = 0x794c_7630;

/// Longer than a registry takes to restart, shorter than what watches a container takes to give it up.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a cache behaves.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// How many requests are made at once, and when somebody else is asked.
    pub requests: RequestOptions,
    /// How long a reader waits, and who opens a layer, whatever the places of the layer answer: only wrong bytes fail
    /// at once. `None` passes a failure on as soon as every place was asked: then patience is the source's business.
    pub patience: Option<Duration>,
    /// Makes sources of the places that an earlier process has known.
    pub sources: Sources,
    /// When and how fast the rest of every layer is fetched; `None` leaves it at the source.
    pub rest: Option<RestOptions>,
    /// The readers of a layer, by its description: content is copied between layers for which this says the same.
    pub domain: fn(&Value) -> String,
    /// Whose a place is, by its description: of too many places of a layer, those of whoever has most go first.
    pub owner: fn(&Value) -> String,
    /// Time between two writes of what arrived to the disk.
    pub flush_interval: Duration,
    /// Bytes of memory that all indexes together use while they are opened, whatever they claim.
    pub index_memory: u64,
    /// Bytes a second at which cached content is compared with its checksums when nobody waits; without it only what an
    /// earlier process left is compared, when it is read and when it would be mounted.
    pub scrub_rate: Option<NonZeroU64>,
    /// Where files are changed.
    pub disk: Disk,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            requests: RequestOptions::default(),
            patience: Some(PATIENCE),
            sources: Sources::default(),
            rest: None,
            domain: |_| String::new(),
            owner: |_| String::new(),
            flush_interval: Duration::from_secs(3),
            index_memory: 64 << 20,
            scrub_rate: None,
            disk: Disk::default(),
        }
    }
}

/// A layer that the cache directory holds.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownLayer {
    /// What names it.
    pub layer: LazyLayer,
    /// The description that a caller of [`Cache::layer`] gave for the newest of its places.
    pub description: Value,
}

/// A cache directory. Cheap to clone.
///
/// When the last handle goes, what arrived is made durable, which may block for a moment.
#[derive(Debug, Clone)]
pub struct Cache {
    inner: Arc<CacheInner>,
    /// Background work holds `inner` now and then, and this never.
    _ending: Arc<Ending>,
}

/// Makes everything durable when it is dropped.
#[derive(Debug)]
struct Ending(Arc<CacheInner>);

#[derive(Debug)]
struct CacheInner {
    root: PathBuf,
    runtime: Handle,
    disk: Disk,
    scheduler: Arc<Scheduler>,
    sources: Sources,
    /// Held for a look or a change, never over I/O.
    layers: Mutex<HashMap<Digest, Entry>>,
    layer_count: AtomicU64,
    /// Layers are verified as soon as they are complete.
    verifies: bool,
    domain: fn(&Value) -> String,
    owner: fn(&Value) -> String,
    flush_soon: Arc<Notify>,
    place_count: AtomicU64,
    unpacker: Arc<Unpacker>,
    refusals: opening::Refusals,
    unkept: Arc<Unkept>,
}

#[derive(Debug)]
enum Entry {
    Opening(OpeningEntry),
    Open(Layer),
    /// Its directory is being moved away; closed when that is over.
    Leaving(watch::Receiver<()>),
}

/// A layer that is being opened, as who removes it knows it.
#[derive(Debug)]
struct OpeningEntry {
    number: u64,
    result: Opening,
    task: AbortHandle,
    place: OpeningPlace,
    places: Arc<Places>,
}

/// Where a layer is opened.
#[derive(Debug, Clone)]
struct OpeningPlace {
    directory: LayerDirectory,
    /// Held while the opening changes the directory; once this is true it begins no more of that.
    is_cancelled: Arc<Mutex<bool>>,
}

/// A layer that is being opened, for everybody who asks meanwhile.
type Opening = Shared<BoxFuture<'static, Result<Layer, CacheError>>>;

impl Cache {
    /// Opens the cache under `root`, making it if needed; transfers run on `runtime`, which has its timers enabled.
    ///
    /// # Errors
    ///
    /// When `root` lies on overlayfs or cannot be made.
    pub fn open(root: &Path, runtime: Handle, options: CacheOptions) -> Result<Self, CacheError> {
        let disk_error = |error: io::Error| disk_error(root, error);
        options.disk.make_directory(root).map_err(disk_error)?;
        let magic = rustix::fs::statfs(root).map_err(|error| disk_error(error.into()))?.f_type;
        if u64::try_from(magic) == Ok(OVERLAYFS_SUPER_MAGIC) {
            return Err(CacheError::OnOverlay(root.to_owned()));
        }
        let unpacker = Unpacker::open(root.join("incoming"), options.disk.clone(), options.index_memory);
        let inner = Arc::new(CacheInner {
            unpacker: Arc::new(unpacker.map_err(disk_error)?),
            refusals: opening::Refusals::default(),
            unkept: Arc::default(),
            root: root.to_owned(),
            scheduler: Scheduler::new(runtime.clone(), options.requests, options.patience, transfer::start),
            runtime,
            disk: options.disk,
            sources: options.sources,
            layers: Mutex::default(),
            layer_count: AtomicU64::new(0),
            verifies: options.rest.is_some(),
            domain: options.domain,
            owner: options.owner,
            flush_soon: Arc::default(),
            place_count: AtomicU64::new(0),
        });
        if !root.join("layers").exists() {
            inner.disk.make_directory(&root.join("layers")).map_err(disk_error)?;
            inner.disk.sync_directory(root).map_err(disk_error)?;
        }
        match fs::remove_dir_all(inner.graveyard()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk_error(error)),
            _ => inner.disk.make_directory(&inner.graveyard()).map_err(disk_error)?,
        }
        let soon = inner.flush_soon.clone();
        inner.runtime.spawn(flush_now_and_then(Arc::downgrade(&inner), soon, options.flush_interval));
        inner.runtime.spawn(scrub::scrub_layers(Arc::downgrade(&inner), inner.runtime.clone(), options.scrub_rate));
        if let Some(rest) = options.rest {
            let (weak, runtime) = (Arc::downgrade(&inner), inner.runtime.clone());
            inner.runtime.spawn(verifying::verify_layers(weak.clone(), runtime.clone(), rest.clone()));
            inner.runtime.spawn(rest::fetch_rest(weak, runtime, rest));
        }
        Ok(Self { _ending: Arc::new(Ending(inner.clone())), inner })
    }

    /// Opens a layer, fetching its index if the cache does not have it. Concurrent calls share one request.
    ///
    /// `source` is a place of the layer and `description` its name: a call with another description than those before,
    /// or with another blob under the same index, adds a place, which is asked when the others do not answer. Places are
    /// kept beside the layer for a later process ([`CacheOptions::sources`], [`Self::known_layers`]).
    ///
    /// # Errors
    ///
    /// When the index cannot be had or the disk refuses.
    pub async fn layer(
        &self,
        layer: &LazyLayer,
        source: Arc<dyn Source>,
        description: Value,
    ) -> Result<Layer, CacheError> {
        self.open_from(layer, self.inner.new_place(layer, source, description), false).await
    }

    /// Like [`Self::layer`], for somebody who goes on using the layer: until [`Self::forget_place`] this place is given
    /// up for none that is only named.
    ///
    /// # Errors
    ///
    /// Those of [`Self::layer`].
    pub async fn held_layer(
        &self,
        layer: &LazyLayer,
        source: Arc<dyn Source>,
        description: Value,
    ) -> Result<Layer, CacheError> {
        self.open_from(layer, self.inner.new_place(layer, source, description), true).await
    }

    /// Adds a place to a layer that is open, or holds one that it has, as [`Self::held_layer`] does. Opens nothing.
    pub fn hold_place(&self, layer: &LazyLayer, source: Arc<dyn Source>, description: Value) {
        let open = match lock(&self.inner.layers).get(&layer.id()) {
            Some(Entry::Open(open)) => open.clone(),
            _ => return,
        };
        let place = self.inner.new_place(layer, source, description);
        if open.core().places.add(place, true) {
            self.inner.scheduler.places_changed(open.core().number, layer.blob);
            self.inner.keep_places(&open);
        }
    }

    async fn open_from(&self, layer: &LazyLayer, place: Place, is_held: bool) -> Result<Layer, CacheError> {
        let (mut place, mut added_to) = (Some(place), None);
        let open = loop {
            let looked = {
                let mut layers = lock(&self.inner.layers);
                match layers.get(&layer.id()) {
                    Some(Entry::Open(open)) => {
                        let is_new = place.take().is_some_and(|place| open.core().places.add(place, is_held));
                        added_to = is_new.then_some(open.core().number).or(added_to);
                        Ok(futures_util::future::ready(Ok(open.clone())).boxed().shared())
                    }
                    Some(Entry::Opening(opening)) => {
                        let is_new = place.take().is_some_and(|place| opening.places.add(place, is_held));
                        added_to = is_new.then_some(opening.number).or(added_to);
                        Ok(opening.result.clone())
                    }
                    Some(Entry::Leaving(left)) => Err(left.clone()),
                    None => {
                        let Some(place) = place.take() else { return Err(CacheError::Stopped(layer.blob)) };
                        let opening = self.inner.start_to_open(*layer, place, is_held);
                        let result = opening.result.clone();
                        layers.insert(layer.id(), Entry::Opening(opening));
                        Ok(result)
                    }
                }
            };
            if let Some(number) = added_to {
                self.inner.scheduler.places_changed(number, layer.blob);
            }
            match looked {
                Ok(opening) => break opening.await?,
                // Ends when the other side is dropped.
                Err(mut left) => drop(left.changed().await),
            }
        };
        if added_to.is_some() {
            self.inner.keep_places(&open);
        }
        Ok(open)
    }

    /// Takes the places with this description away from an open layer, as when the image that they belong to is gone; the
    /// last one stays.
    ///
    /// Returns whether there is one less.
    pub fn forget_place(&self, id: LayerId, description: &Value) -> bool {
        let open = match lock(&self.inner.layers).get(&id) {
            Some(Entry::Open(open)) => open.clone(),
            _ => return false,
        };
        let is_forgotten = open.core().places.forget(description);
        if is_forgotten {
            self.inner.scheduler.places_changed(open.core().number, open.lazy_layer().blob);
            self.inner.keep_places(&open);
        }
        is_forgotten
    }

    /// All layers that the directory holds, sorted by digest; damaged ones are left out, and those that are just being
    /// opened for the first time or removed.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed.
    pub fn known_layers(&self) -> Result<Vec<KnownLayer>, CacheError> {
        let path = self.inner.root.join("layers");
        let disk_error = |error| disk_error(&path, error);
        let mut known = Vec::new();
        for entry in fs::read_dir(&path).map_err(disk_error)? {
            let directory = LayerDirectory::new(entry.map_err(disk_error)?.path(), self.inner.disk.clone());
            let name = directory.path().file_name().unwrap_or_default().to_owned();
            // Before the record is read: it is there when the layer is open.
            let is_in_change = self.inner.is_in_change(&directory);
            match directory.read_record() {
                Ok(Some(LayerRecord { layer, description, .. })) if *name == *layer.id().hex() => {
                    known.push(KnownLayer { layer, description });
                }
                Ok(_) if is_in_change || !directory.path().exists() => {}
                Ok(_) => tracing::warn!(path = %directory.path().display(), "not a layer, or a damaged one"),
                Err(error) => tracing::warn!(path = %directory.path().display(), %error, "layer cannot be read"),
            }
        }
        known.sort_by_key(|known| known.layer.id());
        Ok(known)
    }

    /// The layers that are open in this process, sorted by digest.
    pub fn open_layers(&self) -> Vec<Layer> {
        self.inner.open_layers()
    }

    /// Deletes a layer and stops fetching it; unknown ones are deleted already.
    ///
    /// A caller that waits for the layer to be opened, or for content that nobody is bringing, hears of it at once.
    /// Handles that are still around read what arrived before, and nothing more.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub async fn remove(&self, id: LayerId) -> Result<(), CacheError> {
        let (leaving, left) = watch::channel(());
        let entry = loop {
            let other = {
                let mut layers = lock(&self.inner.layers);
                match layers.get(&id) {
                    Some(Entry::Leaving(other)) => other.clone(),
                    _ => break layers.insert(id, Entry::Leaving(left)),
                }
            };
            // Once that is over there may be nothing left, or a new one.
            drop({ other }.changed().await);
        };
        match &entry {
            Some(Entry::Opening(opening)) => {
                opening.task.abort();
                self.inner.scheduler.forget(opening.number);
            }
            Some(Entry::Open(layer)) => layer.stop(),
            _ => {}
        }
        let inner = self.inner.clone();
        let remove = move || {
            let directory = match entry {
                Some(Entry::Opening(opening)) => {
                    // Waits for what is being written, never for a source.
                    *lock(&opening.place.is_cancelled) = true;
                    opening.place.directory
                }
                Some(Entry::Open(layer)) => layer.directory().clone(),
                _ => inner.directory(id),
            };
            let buried = directory.bury(&inner.graveyard());
            lock(&inner.layers).remove(&id);
            drop(leaving);
            let deleted = buried.and_then(|grave| grave.map_or(Ok(()), |grave| delete(&grave)));
            deleted.map_err(|error| disk_error(directory.path(), error))
        };
        self.inner.blocking(id, remove).await
    }

    /// Bytes a layer takes on disk, index and data; 0 for an unknown one.
    ///
    /// # Errors
    ///
    /// When the files cannot be looked at.
    pub fn usage(&self, id: LayerId) -> io::Result<u64> {
        self.inner.directory(id).usage_bytes()
    }

    /// Makes everything that arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// The first layer's that failed; the others were tried.
    pub fn flush(&self) -> Result<(), ReadError> {
        let results: Vec<_> = self.open_layers().iter().map(Layer::flush).collect();
        results.into_iter().collect()
    }
}

impl CacheInner {
    fn directory(&self, id: LayerId) -> LayerDirectory {
        LayerDirectory::new(self.root.join("layers").join(id.hex()), self.disk.clone())
    }

    /// Whether the directory of a layer may have no record because the layer is on its way in, or out.
    fn is_in_change(&self, directory: &LayerDirectory) -> bool {
        let is_of = |id: &LayerId| directory.path().file_name().is_some_and(|name| *name == *id.hex());
        let layers = lock(&self.layers);
        layers.iter().any(|(id, entry)| is_of(id) && !matches!(entry, Entry::Open(_)))
    }

    fn graveyard(&self) -> PathBuf {
        self.root.join("removed")
    }

    fn open_layers(&self) -> Vec<Layer> {
        let layers = lock(&self.layers);
        let mut open: Vec<_> = layers
            .values()
            .filter_map(|entry| if let Entry::Open(layer) = entry { Some(layer.clone()) } else { None })
            .collect();
        open.sort_by_key(|layer| layer.lazy_layer().id());
        open
    }

    /// A place that no layer has yet.
    fn new_place(&self, layer: &LazyLayer, source: Arc<dyn Source>, description: Value) -> Place {
        let (number, owner) = (self.place_count.fetch_add(1, Ordering::Relaxed), (self.owner)(&description));
        Place { number, layer: *layer, source, description, owner, best_rate: BestRate::default() }
    }

    /// Writes down the places of a layer, which may take as long as the disk takes: nobody waits for it.
    ///
    /// A process that is killed before that is told of the place again by whoever uses it.
    fn keep_places(&self, layer: &Layer) {
        let layer = layer.clone();
        self.runtime.spawn_blocking(move || {
            if let Err(error) = layer.core().write_places() {
                tracing::warn!(blob = %layer.lazy_layer().blob, %error, "places of a layer cannot be kept");
            }
        });
    }

    /// Runs the opening as a task of its own: a caller that goes away does not end it for the others.
    fn start_to_open(self: &Arc<Self>, layer: LazyLayer, first: Place, is_held: bool) -> OpeningEntry {
        let (id, number) = (layer.id(), self.layer_count.fetch_add(1, Ordering::Relaxed));
        let place = OpeningPlace { directory: self.directory(id), is_cancelled: Arc::default() };
        let places = Places::new(first, is_held);
        self.scheduler.add_layer(number, layer.blob, &places);
        let (inner, at, known) = (self.clone(), place.clone(), places.clone());
        let task = self.runtime.spawn(async move {
            let opened = inner.open_layer(number, &layer, known, &at).await;
            inner.note_opened(id, number, opened)
        });
        let (abort, cache) = (task.abort_handle(), Arc::downgrade(self));
        let ended = move |opened: Result<_, _>| {
            opened.unwrap_or_else(|_| {
                let stopped = Err(CacheError::Stopped(id));
                cache.upgrade().map_or(stopped.clone(), |inner| inner.note_opened(id, number, stopped))
            })
        };
        OpeningEntry { number, result: task.map(ended).boxed().shared(), task: abort, place, places }
    }

    /// An opening has ended; its result counts unless the layer was removed meanwhile.
    fn note_opened(&self, id: LayerId, number: u64, opened: Result<Layer, CacheError>) -> Result<Layer, CacheError> {
        if opened.is_err() {
            self.scheduler.forget(number);
        }
        let mut layers = lock(&self.layers);
        let is_awaited = matches!(layers.get(&id), Some(Entry::Opening(opening)) if opening.number == number);
        if !is_awaited {
            drop(layers);
            if let Ok(layer) = opened {
                layer.stop();
            }
            return Err(CacheError::Stopped(id));
        }
        match &opened {
            Ok(open) => layers.insert(id, Entry::Open(open.clone())),
            Err(_) => layers.remove(&id),
        };
        opened
    }

    async fn blocking<T: Send + 'static>(
        &self,
        blob: Digest,
        work: impl FnOnce() -> Result<T, CacheError> + Send + 'static,
    ) -> Result<T, CacheError> {
        self.runtime.spawn_blocking(work).await.unwrap_or(Err(CacheError::Stopped(blob)))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        // Not left to the layers: requests that are just ending may hold them a little longer.
        for layer in self.0.open_layers() {
            if let Err(error) = layer.flush() {
                tracing::warn!(%error, "what arrived last is fetched again");
            }
        }
    }
}

/// Flushes all layers now and then, and the complete ones as soon as they are.
async fn flush_now_and_then(cache: Weak<CacheInner>, soon: Arc<Notify>, interval: Duration) {
    let mut next = Instant::now() + interval;
    loop {
        let is_due = tokio::time::timeout_at(next, soon.notified()).await.is_err();
        if is_due {
            next = Instant::now() + interval;
        }
        let Some(inner) = cache.upgrade() else { return };
        let flush = move || {
            let mut layers = inner.open_layers();
            layers.retain(|layer| is_due || layer.is_complete());
            // Somebody may be about to mount those.
            layers.sort_by_key(|layer| !layer.is_complete());
            for layer in layers {
                if let Err(error) = layer.flush() {
                    tracing::warn!(%error, "what arrived is not durable yet");
                }
            }
            // The last handle may be this one: it must go where blocking is allowed.
            drop(inner);
        };
        let _ = tokio::task::spawn_blocking(flush).await;
    }
}

/// Deletes what was moved away. Somebody may be about to leave a file there: what is left goes with the next start.
fn delete(grave: &Path) -> io::Result<()> {
    match fs::remove_dir_all(grave) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
        deleted => deleted,
    }
}

fn disk_error(path: &Path, error: io::Error) -> CacheError {
    CacheError::Disk { path: path.to_owned(), error: Arc::new(error) }
}
