//! The cache directory: one directory a layer, shared by all images that have the layer.

use std::{io, path::Path, sync::Arc, time::Duration};

use format_spec::{Digest, LazyLayer};
use serde_json::Value;
use tokio::runtime::Handle;

use crate::{
    error::{CacheError, ReadError},
    layer::Layer,
    source::Source,
};

/// How a cache behaves.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Requests in flight for blocked reads.
    pub read_requests_max: usize,
    /// Requests in flight for what will be read soon.
    pub hot_requests_max: usize,
    /// Requests in flight for everything else.
    pub background_requests_max: usize,
    /// Time between two writes of what arrived to the disk.
    pub flush_interval: Duration,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            read_requests_max: 16,
            hot_requests_max: 4,
            background_requests_max: 2,
            flush_interval: Duration::from_secs(3),
        }
    }
}

/// A layer that the cache directory holds.
#[derive(Debug, Clone)]
pub struct KnownLayer {
    /// The layer.
    pub layer: LazyLayer,
    /// What the caller of [`Cache::layer`] gave.
    pub description: Value,
}

/// A cache directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cache {}

impl Cache {
    /// Opens the cache under `root`, making it if needed; transfers run on `runtime`.
    ///
    /// # Errors
    ///
    /// When `root` lies on overlayfs or cannot be made.
    pub fn open(root: &Path, runtime: Handle, options: CacheOptions) -> Result<Self, CacheError> {
        let _ = (root, runtime, options);
        Ok(Self {})
    }

    /// Opens a layer, fetching its index if the cache does not have it. Concurrent calls share one request.
    ///
    /// `description` is kept beside the layer for [`Self::known_layers`] of a later process.
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
        let _ = (source, description);
        Err(CacheError::Stopped(layer.blob))
    }

    /// All layers that the directory holds, sorted by digest; damaged ones are left out.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed.
    pub fn known_layers(&self) -> Result<Vec<KnownLayer>, CacheError> {
        Ok(Vec::new())
    }

    /// The layers that are open in this process, sorted by digest.
    pub fn open_layers(&self) -> Vec<Layer> {
        Vec::new()
    }

    /// Deletes a layer and stops fetching it; unknown ones are deleted already.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub async fn remove(&self, blob: Digest) -> Result<(), CacheError> {
        let _ = blob;
        Ok(())
    }

    /// Bytes a layer takes on disk, index and data; 0 for an unknown one.
    ///
    /// # Errors
    ///
    /// When the files cannot be looked at.
    pub fn usage(&self, blob: Digest) -> io::Result<u64> {
        let _ = blob;
        Ok(0)
    }

    /// Makes everything that arrived durable; blocks.
    ///
    /// # Errors
    ///
    /// The first layer's that failed; the others were tried.
    pub fn flush(&self) -> Result<(), ReadError> {
        Ok(())
    }
}
