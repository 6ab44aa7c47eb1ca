//! The cache directory: one directory a layer, shared by all images that have the layer.
//!
//! ```text
//! <root>/layers/<64 hex digits of the index digest>/   see directory.rs
//! <root>/removed/                                      what is being deleted
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
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
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
    directory::{LayerDirectory, LayerRecord},
    disk::Disk,
    error::{CacheError, ReadError},
    frame_store::lock,
    layer::{Layer, Origin},
    scheduler::Scheduler,
    source::Source,
};

mod opening;
mod rest;
mod start_up;
mod verifying;

pub use rest::RestOptions;

/// `f_type` of overlayfs (Linux include/uapi/linux/magic.h).
const OVERLAYFS_SUPER_MAGIC: u64 = 0x794c_7630;

/// How a cache behaves.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Requests in flight for blocked reads.
    pub read_requests_max: usize,
    /// Requests in flight for what will be read soon.
    pub hot_requests_max: usize,
    /// Requests in flight for everything else.
    pub background_requests_max: usize,
    /// When and how fast the rest of every layer is fetched; `None` leaves it at the source.
    pub rest: Option<RestOptions>,
    /// Who may read a layer, by its description: content is copied between layers for which this says the same.
    pub domain: fn(&Value) -> String,
    /// Time between two writes of what arrived to the disk.
    pub flush_interval: Duration,
    /// Where files are changed.
    pub disk: Disk,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            read_requests_max: 16,
            hot_requests_max: 4,
            background_requests_max: 2,
            rest: None,
            domain: |_| String::new(),
            flush_interval: Duration::from_secs(3),
            disk: Disk::default(),
        }
    }
}

/// A layer that the cache directory holds.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownLayer {
    /// What names it.
    pub layer: LazyLayer,
    /// What the caller of [`Cache::layer`] gave last.
    pub description: Value,
}

/// A cache directory. Cheap to clone.
///
/// When the last handle goes, what arrived is made durable, which may block for a moment.
#[derive(Debug, Clone)]
pub struct Cache {
    inner: Arc<CacheInner>,
    /// What works in the background holds `inner` now and then, and this never.
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
    /// Held for a look or a change, never over I/O.
    layers: Mutex<HashMap<Digest, Entry>>,
    layer_count: AtomicU64,
    /// Layers are verified as soon as they are complete.
    verifies: bool,
    domain: fn(&Value) -> String,
    flush_soon: Arc<Notify>,
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
        let inner = Arc::new(CacheInner {
            root: root.to_owned(),
            scheduler: Scheduler::new(runtime.clone(), &options),
            runtime,
            disk: options.disk,
            layers: Mutex::default(),
            layer_count: AtomicU64::new(0),
            verifies: options.rest.is_some(),
            domain: options.domain,
            flush_soon: Arc::default(),
        });
        inner.disk.make_directory(&root.join("layers")).map_err(disk_error)?;
        inner.disk.sync_directory(root).map_err(disk_error)?;
        match fs::remove_dir_all(inner.graveyard()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk_error(error)),
            _ => inner.disk.make_directory(&inner.graveyard()).map_err(disk_error)?,
        }
        let soon = inner.flush_soon.clone();
        inner.runtime.spawn(flush_now_and_then(Arc::downgrade(&inner), soon, options.flush_interval));
        if let Some(rest) = options.rest {
            let (weak, runtime) = (Arc::downgrade(&inner), inner.runtime.clone());
            inner.runtime.spawn(verifying::verify_layers(weak.clone(), runtime.clone(), rest.clone()));
            inner.runtime.spawn(rest::fetch_rest(weak, runtime, rest));
        }
        Ok(Self { _ending: Arc::new(Ending(inner.clone())), inner })
    }

    /// Opens a layer, fetching its index if the cache does not have it. Concurrent calls share one request.
    ///
    /// `description` is kept beside the layer for [`Self::known_layers`] of a later process. A call with another
    /// description than the one before replaces it, and the source with it.
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
        let origin = Origin { source, description };
        let open = loop {
            let looked = {
                let mut layers = lock(&self.inner.layers);
                match layers.get(&layer.id()) {
                    Some(Entry::Open(open)) => Ok(futures_util::future::ready(Ok(open.clone())).boxed().shared()),
                    Some(Entry::Opening(opening)) => Ok(opening.result.clone()),
                    Some(Entry::Leaving(left)) => Err(left.clone()),
                    None => {
                        let first = Origin { source: origin.source.clone(), description: origin.description.clone() };
                        let opening = self.inner.start_to_open(*layer, first);
                        let result = opening.result.clone();
                        layers.insert(layer.id(), Entry::Opening(opening));
                        Ok(result)
                    }
                }
            };
            match looked {
                Ok(opening) => break opening.await?,
                // Ends when the other side is dropped.
                Err(mut left) => drop(left.changed().await),
            }
        };
        if open.description() != origin.description {
            let (layer, path) = (open.clone(), self.inner.directory(layer.id()).path().to_owned());
            self.inner
                .blocking(layer.lazy_layer().blob, move || {
                    layer.replace_origin(origin).map_err(|error| disk_error(&path, error))
                })
                .await?;
        }
        Ok(open)
    }

    /// All layers that the directory holds, sorted by digest; damaged ones are left out.
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
            match directory.read_record() {
                Ok(Some(LayerRecord { layer, description })) if *name == *layer.id().hex() => {
                    known.push(KnownLayer { layer, description });
                }
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
    /// Who waits for the layer to be opened, or for content that nobody is bringing, hears of it at once. Handles that
    /// are still around read what arrived before, and nothing more.
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
            Some(Entry::Opening(opening)) => opening.task.abort(),
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

    /// Runs the opening as a task of its own: a caller that goes away does not end it for the others.
    fn start_to_open(self: &Arc<Self>, layer: LazyLayer, origin: Origin) -> OpeningEntry {
        let (id, number) = (layer.id(), self.layer_count.fetch_add(1, Ordering::Relaxed));
        let place = OpeningPlace { directory: self.directory(id), is_cancelled: Arc::default() };
        let (inner, at) = (self.clone(), place.clone());
        let task = self.runtime.spawn(async move {
            let opened = inner.open_layer(number, &layer, origin, &at).await;
            inner.note_opened(id, number, opened)
        });
        let (abort, cache) = (task.abort_handle(), Arc::downgrade(self));
        let ended = move |opened: Result<_, _>| {
            opened.unwrap_or_else(|_| {
                let stopped = Err(CacheError::Stopped(id));
                cache.upgrade().map_or(stopped.clone(), |inner| inner.note_opened(id, number, stopped))
            })
        };
        OpeningEntry { number, result: task.map(ended).boxed().shared(), task: abort, place }
    }

    /// An opening has ended; its result counts unless the layer was removed meanwhile.
    fn note_opened(&self, id: LayerId, number: u64, opened: Result<Layer, CacheError>) -> Result<Layer, CacheError> {
        let mut layers = lock(&self.layers);
        let is_awaited = matches!(layers.get(&id), Some(Entry::Opening(opening)) if opening.number == number);
        if !is_awaited {
            drop(layers);
            opened.inspect(Layer::stop)?;
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
