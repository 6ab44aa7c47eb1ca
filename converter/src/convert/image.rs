//! Converts one image: its layers side by side, then what points to them.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    sync::Arc,
    time::Instant,
};

use format_spec::{Digest, HotPiece, Index, LazyLayer, SigningKey};
use futures_util::{StreamExt, TryStreamExt, stream};
use storage::ByteStream;
use tokio::runtime::Handle;

use crate::{
    blob::{
        reader::BlobReader,
        spool::Spool,
        thread::{Pieces, read_blob},
    },
    convert::{
        Conversion, ConvertError,
        cache::{ConversionKey, annotations_of, check_all},
        index::NewManifest,
        report::{ImageReport, LayerContent, LayerReport},
    },
    image::{
        ImageSource,
        destination::EarlyUpload,
        manifest::{Descriptor, media_type},
        resolve::ResolvedImage,
        stale::for_new_layers,
    },
    layer::{
        ConvertedLayer, LayerError, LayerFacts, SpooledLayer,
        frame_reader::{FrameReader, ReadBlob},
        lazy::{annotate, find_lazy_layer},
        sign::sign,
        spool_layer,
        start_up::{HotPackChoice, ReadableLayer, choose_hot_pieces},
    },
};

/// A layer that is still to be brought to the destination.
#[derive(Debug, Clone)]
struct PendingLayer {
    /// Its place in the image.
    number: usize,
    descriptor: Descriptor,
    diff_id: Digest,
}

/// A layer that was read.
struct PreparedLayer {
    pending: PendingLayer,
    state: Preparation,
    started: Instant,
}

/// A layer that is at the destination.
enum Finished {
    /// As it was; what it says of itself, if it is lazy.
    CarriedOver(Option<LazyLayer>),
    /// It became this one.
    Converted(LazyLayer, ConversionKey),
}

impl Finished {
    /// The descriptor that points to it now, where `original` pointed to the original: of two descriptors of one blob
    /// each keeps its own annotations. Lazy ones, of which the tar stream is `diff_id`, are signed with `keys`.
    fn descriptor(&self, original: &Descriptor, diff_id: Digest, keys: &[SigningKey]) -> Descriptor {
        let (mut descriptor, lazy) = match self {
            Self::CarriedOver(lazy) => (annotate(original.clone(), *lazy), *lazy),
            Self::Converted(layer, key) => (lazy_descriptor(original.clone(), layer, key), Some(*layer)),
        };
        if let Some(lazy) = lazy {
            sign(&mut descriptor, &lazy, diff_id, keys);
        }
        descriptor
    }
}

enum Preparation {
    /// It stays as it is.
    CarriedOver {
        /// Whether it had to be sent.
        uploaded: bool,
        /// What it says of itself, if it is lazy already.
        lazy: Option<LazyLayer>,
    },
    /// It was converted before and is at the destination.
    Cached(LazyLayer),
    /// Its frames are written, and perhaps on their way already.
    Spooled(Box<SpooledLayer>, Option<EarlyUpload>),
}

/// Every different layer once; the largest first, so that it is not waited for alone.
fn pending_layers(image: &ResolvedImage) -> Result<Vec<PendingLayer>, ConvertError> {
    let mut pending: Vec<PendingLayer> = Vec::new();
    for (number, (layer, diff_id)) in image.manifest.layers.iter().zip(&image.diff_ids).enumerate() {
        match pending.iter().find(|other| other.descriptor.digest == layer.digest) {
            None => pending.push(PendingLayer { number, descriptor: layer.clone(), diff_id: *diff_id }),
            // One blob has one tar stream, so one of the two is a lie.
            Some(other) if other.diff_id != *diff_id => {
                let (digest, diff_ids) = (layer.digest, Box::new([other.diff_id, *diff_id]));
                return Err(ConvertError::TwoDiffIds { digest, diff_ids });
            }
            Some(_) => {}
        }
    }
    pending.sort_by_key(|layer| (std::cmp::Reverse(layer.descriptor.size), layer.number));
    Ok(pending)
}

impl Conversion<'_> {
    /// Converts one image; stores everything but its manifest.
    pub(crate) async fn convert_image(
        &self,
        mut image: ResolvedImage,
    ) -> Result<(NewManifest, ImageReport), ConvertError> {
        let prepared: Vec<PreparedLayer> = stream::iter(pending_layers(&image)?)
            .map(|layer| self.prepare(layer))
            .buffer_unordered(self.layers_at_once)
            .try_collect()
            .await?;
        let (prepared, hot_pieces) = self.choose_hot_pieces(&image, prepared).await?;
        let done: HashMap<Digest, (Finished, LayerReport)> = stream::iter(prepared)
            .map(|layer| {
                let hot_pieces = hot_pieces.get(&layer.pending.descriptor.digest).cloned().unwrap_or_default();
                self.finish(layer, hot_pieces)
            })
            .buffer_unordered(self.layers_at_once)
            .map_ok(|(finished, report)| (report.source_digest, (finished, report)))
            .try_collect()
            .await?;
        let mut reports = Vec::with_capacity(image.manifest.layers.len());
        let mut has_new_blobs = false;
        for layer in &mut image.manifest.layers {
            let (finished, report) = &done[&layer.digest];
            has_new_blobs |= report.digest != layer.digest;
            reports.push(report.clone());
            *layer = finished.descriptor(layer, report.diff_id, self.sign);
        }
        if has_new_blobs {
            for_new_layers(&mut image.manifest.annotations);
        }
        let new = self.finish_manifest(&mut image).await?;
        let report = ImageReport {
            platform: image.platform.to_string(),
            digest: new.descriptor().digest,
            source_digest: image.digest,
            config_digest: image.manifest.config.digest,
            layers: reports,
        };
        Ok((new, report))
    }

    /// What the hot packs of the layers shall hold; gives the layers back.
    async fn choose_hot_pieces(
        &self,
        image: &ResolvedImage,
        prepared: Vec<PreparedLayer>,
    ) -> Result<(Vec<PreparedLayer>, HashMap<Digest, Vec<HotPiece>>), ConvertError> {
        let is_needed = prepared.iter().any(|layer| matches!(layer.state, Preparation::Spooled(..)));
        if !is_needed || matches!(self.hot_pack, HotPackChoice::None) {
            return Ok((prepared, HashMap::new()));
        }
        let mut lazy_blobs = HashMap::new();
        for layer in &prepared {
            if let Some(blob) = self.lazy_blob(layer).await? {
                lazy_blobs.insert(layer.pending.descriptor.digest, blob);
            }
        }
        let order: Vec<Digest> = image.manifest.layers.iter().map(|layer| layer.digest).collect();
        let (config, choice) = (image.config.clone(), self.hot_pack.clone());
        let runtime = Handle::current();
        let thread = tokio::task::spawn_blocking(move || {
            let layers: HashMap<Digest, &PreparedLayer> =
                prepared.iter().map(|layer| (layer.pending.descriptor.digest, layer)).collect();
            let readable = order.iter().filter_map(|digest| {
                let (index, reader) = match &layers.get(digest)?.state {
                    Preparation::Spooled(spooled, _) => (&spooled.index, spooled.reader()),
                    Preparation::CarriedOver { .. } | Preparation::Cached(_) => {
                        let blob = lazy_blobs.get(digest)?;
                        (&blob.index, FrameReader::new(&blob.index, blob.reader(&runtime)))
                    }
                };
                Some(ReadableLayer { digest: *digest, index, reader })
            });
            let hot_pieces = choose_hot_pieces(readable.collect(), &choice, &config);
            hot_pieces.map(|hot_pieces| (prepared, hot_pieces))
        });
        Ok(thread.await.map_err(|_| ConvertError::Aborted(image.digest))??)
    }

    /// A layer that is lazy already, read where it is: its index now, a few frames of it perhaps.
    async fn lazy_blob(&self, layer: &PreparedLayer) -> Result<Option<LazyBlob>, ConvertError> {
        let (lazy, source) = match &layer.state {
            Preparation::CarriedOver { lazy: Some(lazy), .. } => (lazy, self.source.clone()),
            Preparation::Cached(lazy) => (lazy, self.destination.to_source()),
            Preparation::CarriedOver { .. } | Preparation::Spooled(..) => return Ok(None),
        };
        let digest = lazy.blob;
        let descriptor = Descriptor { digest, size: lazy.blob_len, ..Descriptor::of(media_type::OCI_LAYER_ZSTD, b"") };
        let compressed = source.blob_range(&descriptor, lazy.index.range()).await?;
        let index = Index::from_compressed(&compressed, &lazy.index);
        let index = index.map_err(|error| ConvertError::Index { digest, error })?;
        Ok(Some(LazyBlob { source, descriptor, index }))
    }

    /// Stores the config; returns the manifest over it and the new layers.
    async fn finish_manifest(&self, image: &mut ResolvedImage) -> Result<NewManifest, ConvertError> {
        let config = &mut image.manifest.config;
        // Both types name the same content; an OCI manifest has the OCI one.
        config.media_type = media_type::OCI_CONFIG.to_owned();
        if !self.destination.has_blob(&config.digest, config.size).await?
            && !self.destination.mount_blob(self.source, &config.digest).await?
        {
            self.destination.put_bytes(&config.digest, &image.config).await?;
        }
        let media_type = registry::media_type::OCI_MANIFEST.to_owned();
        image.manifest.media_type = Some(media_type.clone());
        let bytes = serde_json::to_vec(&image.manifest).expect("maps with text keys").into();
        Ok(NewManifest { media_type, bytes })
    }

    /// What names the result of converting a layer.
    fn key(&self, layer: &PendingLayer) -> ConversionKey {
        ConversionKey { source: layer.descriptor.digest, diff_id: layer.diff_id, options: self.shape.clone() }
    }

    /// Reads one layer: writes its frames, or sends it on as it is where it cannot or need not be converted.
    async fn prepare(&self, pending: PendingLayer) -> Result<PreparedLayer, ConvertError> {
        let started = Instant::now();
        let digest = pending.descriptor.digest;
        self.observer.layer_starts(pending.number, &digest, pending.descriptor.size);
        let lazy = find_lazy_layer(self.source, &pending.descriptor).await?;
        let media_type = pending.descriptor.media_type.as_str();
        let is_convertible = media_type::CONVERTIBLE_LAYERS.contains(&media_type) && !pending.descriptor.is_elsewhere();
        if let Some(lazy) = lazy.filter(|_| !self.sign.is_empty()) {
            // Its maker is not known, and whoever believes the key believes this.
            let checked = check_all(self.source, &lazy, pending.diff_id).await;
            checked.map_err(|reason| ConvertError::NotSigned { digest, reason })?;
        }
        let state = if lazy.is_some() || !is_convertible {
            let uploaded = self.carry_over(pending.number, &pending.descriptor).await?;
            Preparation::CarriedOver { uploaded, lazy }
        } else if let Some(layer) = self.cache.find(&self.key(&pending), self.destination).await? {
            Preparation::Cached(layer)
        } else {
            let (spooled, upload) = self.spool(&pending).await?;
            Preparation::Spooled(Box::new(spooled), upload)
        };
        Ok(PreparedLayer { pending, state, started })
    }

    /// Writes the frames of a layer; sends them meanwhile where that takes time.
    async fn spool(&self, pending: &PendingLayer) -> Result<(SpooledLayer, Option<EarlyUpload>), ConvertError> {
        let PendingLayer { number, descriptor, diff_id } = pending;
        let stream = self.source.blob_stream(&descriptor.digest).await?;
        let spool = Spool::new(self.destination.spool()?);
        let (growing, observer, number) = (spool.growing(), Arc::clone(&self.observer), *number);
        let growth = growing.growth.clone();
        let progress = move |sent_len| {
            // Until then there is more to tell about reading.
            let growth = *growth.borrow();
            if growth.is_complete {
                observer.layer_sent(number, sent_len, growth.len);
            }
        };
        let upload = self.destination.upload_early(growing, Arc::new(progress));
        let compressor = Arc::clone(&self.compressor);
        let work = move |blob: BlobReader<Pieces>| spool_layer(blob, spool, &compressor);
        let spooled = self.read_blob(number, stream, descriptor, work).await?;
        if spooled.facts.diff_id != *diff_id {
            let (expected, found) = (*diff_id, spooled.facts.diff_id);
            return Err(ConvertError::DiffId { digest: descriptor.digest, expected, found });
        }
        Ok((spooled, upload))
    }

    /// Brings a layer to the destination.
    async fn finish(
        &self,
        layer: PreparedLayer,
        hot_pieces: Vec<HotPiece>,
    ) -> Result<(Finished, LayerReport), ConvertError> {
        let PreparedLayer { pending, state, started } = layer;
        let key = self.key(&pending);
        let PendingLayer { number, descriptor, diff_id } = pending;
        let (source_digest, source_len) = (descriptor.digest, descriptor.size);
        let cached = matches!(state, Preparation::Cached(_));
        let (finished, content, uploaded) = match state {
            Preparation::CarriedOver { uploaded, lazy } => (Finished::CarriedOver(lazy), None, uploaded),
            Preparation::Cached(layer) => (Finished::Converted(layer, key), None, false),
            Preparation::Spooled(spooled, upload) => {
                let (layer, content, uploaded) =
                    self.finish_spooled(number, source_digest, *spooled, upload, hot_pieces).await?;
                self.cache.add(&key, layer, self.destination);
                (Finished::Converted(layer, key), Some(content), uploaded)
            }
        };
        let target = finished.descriptor(&descriptor, diff_id, self.sign);
        let report = LayerReport {
            source_digest,
            source_compressed_len: source_len,
            digest: target.digest,
            compressed_len: target.size,
            diff_id,
            is_converted: content.is_some(),
            is_cached: cached,
            content,
            is_uploaded: uploaded,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.observer.layer_done(number, &report);
        Ok((finished, report))
    }

    async fn finish_spooled(
        &self,
        number: usize,
        digest: Digest,
        spooled: SpooledLayer,
        upload: Option<EarlyUpload>,
        hot_pieces: Vec<HotPiece>,
    ) -> Result<(LazyLayer, LayerContent, bool), ConvertError> {
        let facts = spooled.facts;
        let compressor = Arc::clone(&self.compressor);
        let thread = tokio::task::spawn_blocking(move || spooled.finish(&hot_pieces, &compressor));
        let converted = thread
            .await
            .map_err(|_| ConvertError::Aborted(digest))?
            .map_err(|error| ConvertError::Layer { digest, error })?;
        let layer = converted.layer;
        let is_stored = match upload {
            Some(upload) => upload.commit(&layer.blob).await,
            None => false,
        };
        let uploaded = is_stored || self.send(number, &layer.blob, layer.blob_len, &converted.file).await?;
        Ok((layer, content_of(&facts, &converted), uploaded))
    }

    /// Copies a blob as it is; returns whether bytes had to be moved.
    async fn carry_over(&self, number: usize, descriptor: &Descriptor) -> Result<bool, ConvertError> {
        let Descriptor { digest, size, .. } = descriptor;
        if descriptor.is_elsewhere()
            || self.destination.has_blob(digest, *size).await?
            || self.destination.mount_blob(self.source, digest).await?
        {
            return Ok(false);
        }
        let stream = self.source.blob_stream(digest).await?;
        let mut spool = self.destination.spool()?;
        let spool = self
            .read_blob(number, stream, descriptor, move |mut blob| {
                std::io::copy(&mut blob, &mut spool).map_err(LayerError::Write)?;
                blob.finish()?;
                Ok(spool)
            })
            .await?;
        self.send(number, digest, *size, &spool).await
    }

    /// Runs `work` on a thread of its own over a blob that streams in.
    async fn read_blob<T: Send + 'static>(
        &self,
        number: usize,
        stream: ByteStream,
        descriptor: &Descriptor,
        work: impl FnOnce(BlobReader<Pieces>) -> Result<T, LayerError> + Send + 'static,
    ) -> Result<T, ConvertError> {
        let digest = descriptor.digest;
        let observer = Arc::clone(&self.observer);
        let mut read_len = 0;
        let counted = stream.inspect_ok(move |piece| {
            read_len += piece.len() as u64;
            observer.layer_read(number, read_len);
        });
        let result = read_blob(Box::pin(counted), digest, descriptor.size, work).await;
        let result = result.map_err(|_| ConvertError::Aborted(digest))?;
        result.map_err(|error| ConvertError::Layer { digest, error })
    }

    /// Sends a spooled blob to the destination; returns whether that was necessary.
    async fn send(&self, number: usize, digest: &Digest, len: u64, spool: &File) -> Result<bool, ConvertError> {
        if self.destination.has_blob(digest, len).await? {
            return Ok(false);
        }
        let observer = Arc::clone(&self.observer);
        let progress = Arc::new(move |sent_len| observer.layer_sent(number, sent_len, len));
        self.destination.put_file(digest, len, spool, progress).await?;
        Ok(true)
    }
}

/// A layer that is lazy already.
struct LazyBlob {
    /// Where it is.
    source: ImageSource,
    descriptor: Descriptor,
    index: Index<Vec<u8>>,
}

impl LazyBlob {
    /// Reads ranges of it, from a thread that may wait.
    fn reader<'a>(&'a self, runtime: &'a Handle) -> ReadBlob<'a> {
        Box::new(move |range| {
            let bytes = runtime.block_on(self.source.blob_range(&self.descriptor, range));
            Ok(bytes.map_err(std::io::Error::other)?.into())
        })
    }
}

/// What points to a layer that was made of what `original` points to.
fn lazy_descriptor(original: Descriptor, layer: &LazyLayer, key: &ConversionKey) -> Descriptor {
    Descriptor {
        media_type: media_type::OCI_LAYER_ZSTD.to_owned(),
        digest: layer.blob,
        size: layer.blob_len,
        annotations: Some(annotations_of(original.annotations, layer, key)),
        platform: None,
        // What else there is says something about the original blob, like its address.
        rest: BTreeMap::new(),
    }
}

fn content_of(facts: &LayerFacts, converted: &ConvertedLayer) -> LayerContent {
    LayerContent {
        plain_len: facts.tar_len,
        content_len: facts.content_len,
        frame_count: facts.frame_count,
        inode_count: facts.inode_count,
        index_len: converted.layer.index.compressed_len,
        hot_pack_len: converted.layer.hot_len,
        dedup_len: converted.dedup_len,
    }
}
