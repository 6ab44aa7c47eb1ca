//! How a layer is opened: from the directory, or with an index that is fetched and verified first.

use std::{io, sync::Arc};

use format_spec::{FormatError, Index, LazyLayer, annotation::INDEX_LEN_MAX};

use super::{CacheInner, OpeningPlace, disk_error};
use crate::{
    directory::{LayerDirectory, LayerRecord},
    error::CacheError,
    frame_store::{FrameStore, lock},
    layer::{Layer, LayerIndex, Origin},
    source::{Incoming, Source},
};

/// Times an index is asked for when the bytes are wrong or break off.
const INDEX_ATTEMPTS: u32 = 3;

/// An index that was verified, and what follows it in the same answer.
struct FetchedIndex {
    index: Index<Vec<u8>>,
    /// Stands at the first byte behind the index.
    incoming: Incoming,
    fetched_bytes: u64,
}

impl CacheInner {
    /// Opens a layer; the index is fetched if the directory does not have it.
    pub(super) async fn open_layer(
        self: &Arc<Self>,
        number: u64,
        layer: &LazyLayer,
        origin: Origin,
        place: &OpeningPlace,
    ) -> Result<Layer, CacheError> {
        let (id, blob) = (layer.id(), layer.blob);
        let (inner, at) = (self.clone(), place.clone());
        let domain = (self.domain)(&origin.description);
        let look = move || Ok((inner.open_cached(&at)?, inner.has_peers(id, &domain)));
        let (cached, has_peers) = self.blocking(blob, look).await?;
        if let Some((record, store)) = cached {
            let old = Origin { source: origin.source, description: record.description };
            let layer = Layer::new(number, record.layer, store, old, self.scheduler.clone(), 0);
            self.start_up(&layer, None, has_peers);
            return Ok(layer);
        }
        // Where other layers may have what the hot pack has, it is asked for when that is known.
        let with_hot_pack = layer.hot_range().filter(|_| !has_peers);
        let end = with_hot_pack.as_ref().map_or(layer.index.range().end, |hot| hot.end);
        let FetchedIndex { index, incoming, fetched_bytes } = self.fetch_index(layer, end, &*origin.source).await?;
        let (inner, at) = (self.clone(), place.clone());
        let record = LayerRecord { layer: *layer, description: origin.description.clone() };
        let store = self.blocking(blob, move || inner.store_layer(&at, &record, &index)).await?;
        let layer = Layer::new(number, *layer, store, origin, self.scheduler.clone(), fetched_bytes);
        self.start_up(&layer, with_hot_pack.map(|_| incoming), has_peers);
        Ok(layer)
    }

    /// Opens what the directory holds; `None` without a whole record and index.
    fn open_cached(&self, place: &OpeningPlace) -> Result<Option<(LayerRecord, FrameStore)>, CacheError> {
        let directory = &place.directory;
        self.unless_cancelled(place, || {
            let record = directory.read_record()?.filter(|record| directory.is_of(record.layer.id()));
            let Some(record) = record else { return Ok(None) };
            let Some(index) = directory.open_index()? else { return Ok(None) };
            let store = self.open_store(directory, index, &record)?;
            Ok(Some((record, store)))
        })
    }

    /// Makes the directory of a layer whose index was verified, in place of a damaged one.
    ///
    /// `data` and `presence` of the damaged one stay if they belong to the same index.
    fn store_layer(
        &self,
        place: &OpeningPlace,
        record: &LayerRecord,
        index: &Index<Vec<u8>>,
    ) -> Result<FrameStore, CacheError> {
        let directory = &place.directory;
        self.unless_cancelled(place, || {
            directory.create()?;
            directory.write_index(record, index.as_bytes())?;
            let index = directory.open_index()?;
            let index = index.ok_or_else(|| io::Error::other("index is damaged right after it was written"))?;
            self.open_store(directory, index, record)
        })
    }

    fn open_store(&self, at: &LayerDirectory, index: LayerIndex, record: &LayerRecord) -> io::Result<FrameStore> {
        FrameStore::open(at.clone(), index, record.layer.index.digest, self.flush_soon.clone())
    }

    /// Works on the directory of a layer that is being opened, unless it is removed already.
    fn unless_cancelled<T>(&self, place: &OpeningPlace, work: impl FnOnce() -> io::Result<T>) -> Result<T, CacheError> {
        let is_cancelled = lock(&place.is_cancelled);
        if *is_cancelled {
            return Err(disk_error(place.directory.path(), io::Error::other("layer was removed")));
        }
        work().map_err(|error| disk_error(place.directory.path(), error))
    }

    /// Fetches and verifies an index, in a request that goes on up to `end` of the blob.
    async fn fetch_index(&self, layer: &LazyLayer, end: u64, source: &dyn Source) -> Result<FetchedIndex, CacheError> {
        let LazyLayer { blob, index: location, .. } = *layer;
        let len = usize::try_from(location.compressed_len.min(INDEX_LEN_MAX + 1)).unwrap_or(usize::MAX);
        if location.compressed_len > INDEX_LEN_MAX {
            let (expected, found) = (INDEX_LEN_MAX, location.compressed_len);
            let error = FormatError::Length { what: "compressed index", expected, found };
            return Err(CacheError::Index { blob, error });
        }
        let source_error = |error| CacheError::Source { blob, error };
        let mut fetched_bytes = 0;
        let mut attempt = 1;
        loop {
            let mut incoming = Incoming::open(source, location.offset..end).await.map_err(source_error)?;
            let result = match incoming.take(len, |len| fetched_bytes += len as u64).await {
                Err(error) => Err(source_error(error)),
                Ok(compressed) => {
                    let open = move || Index::from_compressed(&compressed, &location);
                    self.blocking(blob, move || open().map_err(|error| CacheError::Index { blob, error })).await
                }
            };
            match result {
                Ok(index) => return Ok(FetchedIndex { index, incoming, fetched_bytes }),
                Err(error @ (CacheError::Index { .. } | CacheError::Source { .. })) if attempt < INDEX_ATTEMPTS => {
                    tracing::debug!(%blob, %error, attempt, "index asked for again");
                    attempt += 1;
                }
                Err(error) => {
                    tracing::error!(%blob, %error, "index refused");
                    return Err(error);
                }
            }
        }
    }
}
