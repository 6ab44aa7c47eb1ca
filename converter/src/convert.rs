//! Converts an image: finds it, converts its layers side by side, publishes the new manifest last.
//!
//! Nothing but layers changes: the config is carried over byte for byte, and a layer is only accepted when
//! its tar stream is what the config says.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    num::NonZeroUsize,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use format_spec::{Digest, FormatError, HotPiece, Index, LazyLayer};
use futures_util::{StreamExt, TryStreamExt, stream};
use storage::ByteStream;
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    blob_reader::BlobReader,
    compress::{Compressor, FrameOptions},
    frame_reader::{FrameReader, ReadBlob},
    image::{ImageDestination, ImageError, ImageSource},
    layer::{ConvertedLayer, LayerError, LayerFacts, SpooledLayer, spool_layer},
    lazy_layer::{LazyLayerError, annotate, find_lazy_layer},
    manifest::{Descriptor, Platform, media_type},
    report::{LayerContent, LayerReport, Observer, Report},
    resolve::{ResolveError, ResolvedImage, resolve_image},
    start_up::{HotPackChoice, ReadableLayer, StartUpError, choose_hot_pieces},
};

/// Pieces of a blob that wait for the decompressor; registry and file pieces have up to 256 KiB.
const PIECES_WAITING_MAX: usize = 16;
/// Layers converted side by side at most: more only cost memory and temporary space.
const LAYERS_AT_ONCE_MAX: usize = 8;

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The platform to take from an index; `None` for the host's.
    pub platform: Option<Platform>,
    /// zstd level of the frames.
    pub level: i32,
    /// Number of compressor threads, and of layers side by side.
    pub jobs: NonZeroUsize,
    /// What goes into hot packs.
    pub hot_pack: HotPackChoice,
}

/// An image cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Finding the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Reading or writing the image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A layer.
    #[error("layer {digest}: {error}")]
    Layer {
        /// The original blob.
        digest: Digest,
        /// What is wrong with it.
        error: LayerError,
    },
    /// A layer's content is not what the config says.
    #[error("layer {digest}: its tar stream has digest {found}, the config says {expected}: the image is damaged")]
    DiffId {
        /// The original blob.
        digest: Digest,
        /// Diff ID in the config.
        expected: Digest,
        /// Digest of the tar stream.
        found: Digest,
    },
    /// Finding out whether a layer is lazy already.
    #[error(transparent)]
    LazyLayer(#[from] LazyLayerError),
    /// Finding out what a start reads.
    #[error(transparent)]
    StartUp(#[from] StartUpError),
    /// The index of a layer that is lazy already.
    #[error("layer {digest}: {error}")]
    Index {
        /// The blob.
        digest: Digest,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The compressor threads could not be started.
    #[error("compressor: {0}")]
    Compressor(std::io::Error),
    /// A bug or a lack of memory: a thread ended early.
    #[error("layer {0}: the conversion ended abnormally")]
    Aborted(Digest),
}

/// Converts the image at `source` and publishes it at `destination`.
///
/// # Errors
///
/// When the image cannot be found, read, converted or written; then nothing is published.
pub async fn convert(
    source: &ImageSource,
    destination: &ImageDestination,
    options: &ConvertOptions,
    observer: Arc<dyn Observer>,
) -> Result<Report, ConvertError> {
    let started = Instant::now();
    let mut image = resolve_image(source, options.platform.as_ref()).await?;
    let jobs = options.jobs.get();
    let layers_at_once = jobs.min(LAYERS_AT_ONCE_MAX);
    let frames = FrameOptions { level: options.level, ..FrameOptions::default() };
    let compressor = Compressor::new(&frames, jobs, layers_at_once).map_err(ConvertError::Compressor)?;
    let work = LayerWork { source, destination, compressor: Arc::new(compressor), observer };
    let prepared: Vec<PreparedLayer> = stream::iter(pending_layers(&image))
        .map(|layer| work.prepare(layer))
        .buffer_unordered(layers_at_once)
        .try_collect()
        .await?;
    let (prepared, hot_pieces) = choose_hot_pieces_of(&image, source, prepared, &options.hot_pack).await?;
    let done: HashMap<Digest, (Descriptor, LayerReport)> = stream::iter(prepared)
        .map(|layer| {
            let hot_pieces = hot_pieces.get(&layer.pending.descriptor.digest).cloned().unwrap_or_default();
            work.finish(layer, hot_pieces)
        })
        .buffer_unordered(layers_at_once)
        .map_ok(|(descriptor, report)| (report.source_digest, (descriptor, report)))
        .try_collect()
        .await?;
    let mut reports = Vec::with_capacity(image.manifest.layers.len());
    for layer in &mut image.manifest.layers {
        let (descriptor, report) = &done[&layer.digest];
        reports.push(report.clone());
        *layer = descriptor.clone();
    }
    let digest = publish(destination, source, &mut image).await?;
    let content = |of: fn(&LayerReport) -> u64| reports.iter().map(of).sum();
    Ok(Report {
        destination: destination.name(),
        digest,
        source_digest: image.digest,
        config_digest: image.manifest.config.digest,
        source_len: content(|layer| layer.source_len),
        target_len: content(|layer| layer.target_len),
        plain_len: content(|layer| layer.content.map_or(0, |content| content.plain_len)),
        uploaded_len: content(|layer| if layer.uploaded { layer.target_len } else { 0 }),
        layers: reports,
        seconds: started.elapsed().as_secs_f64(),
    })
}

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

enum Preparation {
    /// It stays as it is.
    CarriedOver {
        /// Whether it had to be sent.
        uploaded: bool,
        /// What it says of itself, if it is lazy already.
        lazy: Option<LazyLayer>,
    },
    /// Its frames are written.
    Spooled(Box<SpooledLayer>),
}

/// Every different layer once; the largest first, so that it is not waited for alone.
fn pending_layers(image: &ResolvedImage) -> Vec<PendingLayer> {
    let mut pending: Vec<PendingLayer> = Vec::new();
    for (number, (layer, diff_id)) in image.manifest.layers.iter().zip(&image.diff_ids).enumerate() {
        if pending.iter().all(|other| other.descriptor.digest != layer.digest) {
            pending.push(PendingLayer { number, descriptor: layer.clone(), diff_id: *diff_id });
        }
    }
    pending.sort_by_key(|layer| (std::cmp::Reverse(layer.descriptor.size), layer.number));
    pending
}

/// What the hot packs of the layers shall hold; gives the layers back.
async fn choose_hot_pieces_of(
    image: &ResolvedImage,
    source: &ImageSource,
    prepared: Vec<PreparedLayer>,
    choice: &HotPackChoice,
) -> Result<(Vec<PreparedLayer>, HashMap<Digest, Vec<HotPiece>>), ConvertError> {
    let is_needed = prepared.iter().any(|layer| matches!(layer.state, Preparation::Spooled(_)));
    if !is_needed || matches!(choice, HotPackChoice::None) {
        return Ok((prepared, HashMap::new()));
    }
    // The layers that are lazy already are read where they are, a few frames of them.
    let mut lazy_indexes = HashMap::new();
    for layer in &prepared {
        if let Preparation::CarriedOver { lazy: Some(lazy), .. } = &layer.state {
            let digest = lazy.blob;
            let compressed = source.blob_range(&layer.pending.descriptor, lazy.index.range()).await?;
            let index = Index::from_compressed(&compressed, &lazy.index);
            lazy_indexes.insert(digest, index.map_err(|error| ConvertError::Index { digest, error })?);
        }
    }
    let order: Vec<Digest> = image.manifest.layers.iter().map(|layer| layer.digest).collect();
    let (source, config, choice) = (source.clone(), image.config.clone(), choice.clone());
    let runtime = Handle::current();
    let thread = tokio::task::spawn_blocking(move || {
        let layers: HashMap<Digest, &PreparedLayer> =
            prepared.iter().map(|layer| (layer.pending.descriptor.digest, layer)).collect();
        let readable = order.iter().filter_map(|digest| {
            let layer = layers.get(digest)?;
            let (index, reader) = match &layer.state {
                Preparation::Spooled(spooled) => (&spooled.index, spooled.reader()),
                Preparation::CarriedOver { .. } => {
                    let index = lazy_indexes.get(digest)?;
                    (index, FrameReader::new(index, read_remotely(&runtime, &source, &layer.pending.descriptor)))
                }
            };
            Some(ReadableLayer { digest: *digest, index, reader })
        });
        let hot_pieces = choose_hot_pieces(readable.collect(), &choice, &config)?;
        Ok((prepared, hot_pieces))
    });
    thread.await.map_err(|_| ConvertError::Aborted(image.digest))?
}

/// Reads ranges of a blob at the image's source, from a thread that may wait.
fn read_remotely<'a>(runtime: &'a Handle, source: &'a ImageSource, blob: &'a Descriptor) -> ReadBlob<'a> {
    Box::new(move |range| {
        let bytes = runtime.block_on(source.blob_range(blob, range)).map_err(std::io::Error::other)?;
        Ok(bytes.into())
    })
}

/// Stores the config and then the manifest.
async fn publish(
    destination: &ImageDestination,
    source: &ImageSource,
    image: &mut ResolvedImage,
) -> Result<Digest, ConvertError> {
    let config = &mut image.manifest.config;
    // Both types name the same content; an OCI manifest has the OCI one.
    config.media_type = media_type::OCI_CONFIG.to_owned();
    if !destination.has_blob(&config.digest, config.size).await?
        && !destination.mount_blob(source, &config.digest).await?
    {
        destination.put_bytes(&config.digest, &image.config).await?;
    }
    let manifest_type = registry::media_type::OCI_MANIFEST;
    image.manifest.media_type = Some(manifest_type.to_owned());
    let bytes = Bytes::from(serde_json::to_vec(&image.manifest).expect("maps with text keys"));
    let digest = Digest::of(&bytes);
    destination.publish(manifest_type, bytes).await?;
    Ok(digest)
}

/// What the work on every layer needs.
struct LayerWork<'a> {
    source: &'a ImageSource,
    destination: &'a ImageDestination,
    compressor: Arc<Compressor>,
    observer: Arc<dyn Observer>,
}

impl LayerWork<'_> {
    /// Reads one layer: writes its frames, or sends it on as it is where it cannot or need not be converted.
    async fn prepare(&self, mut pending: PendingLayer) -> Result<PreparedLayer, ConvertError> {
        let started = Instant::now();
        let digest = pending.descriptor.digest;
        self.observer.layer_starts(pending.number, &digest, pending.descriptor.size);
        let lazy = find_lazy_layer(self.source, &pending.descriptor).await?;
        let is_convertible = media_type::CONVERTIBLE_LAYERS.contains(&pending.descriptor.media_type.as_str());
        let state = if lazy.is_some() || !is_convertible {
            let uploaded = self.carry_over(pending.number, &pending.descriptor).await?;
            pending.descriptor = annotate(pending.descriptor, lazy);
            Preparation::CarriedOver { uploaded, lazy }
        } else {
            Preparation::Spooled(Box::new(self.spool(&pending).await?))
        };
        Ok(PreparedLayer { pending, state, started })
    }

    async fn spool(&self, pending: &PendingLayer) -> Result<SpooledLayer, ConvertError> {
        let PendingLayer { number, descriptor, diff_id } = pending;
        let stream = self.source.blob_stream(&descriptor.digest).await?;
        let spool = self.destination.spool()?;
        let compressor = Arc::clone(&self.compressor);
        let work = move |blob: BlobReader<Pieces>| spool_layer(blob, spool, &compressor);
        let spooled = self.read_blob(*number, stream, descriptor, work).await?;
        if spooled.facts.diff_id != *diff_id {
            let (expected, found) = (*diff_id, spooled.facts.diff_id);
            return Err(ConvertError::DiffId { digest: descriptor.digest, expected, found });
        }
        Ok(spooled)
    }

    /// Brings a layer to the destination; returns its new descriptor.
    async fn finish(
        &self,
        layer: PreparedLayer,
        hot_pieces: Vec<HotPiece>,
    ) -> Result<(Descriptor, LayerReport), ConvertError> {
        let PreparedLayer { pending: PendingLayer { number, descriptor, diff_id }, state, started } = layer;
        let (source_digest, source_len) = (descriptor.digest, descriptor.size);
        let (target, content, uploaded) = match state {
            Preparation::CarriedOver { uploaded, .. } => (descriptor, None, uploaded),
            Preparation::Spooled(spooled) => self.finish_spooled(number, descriptor, *spooled, hot_pieces).await?,
        };
        let report = LayerReport {
            source_digest,
            source_len,
            target_digest: target.digest,
            target_len: target.size,
            diff_id,
            converted: content.is_some(),
            content,
            uploaded,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.observer.layer_done(number, &report);
        Ok((target, report))
    }

    async fn finish_spooled(
        &self,
        number: usize,
        descriptor: Descriptor,
        spooled: SpooledLayer,
        hot_pieces: Vec<HotPiece>,
    ) -> Result<(Descriptor, Option<LayerContent>, bool), ConvertError> {
        let digest = descriptor.digest;
        let facts = spooled.facts;
        let compressor = Arc::clone(&self.compressor);
        let thread = tokio::task::spawn_blocking(move || spooled.finish(&hot_pieces, &compressor));
        let mut converted = thread
            .await
            .map_err(|_| ConvertError::Aborted(digest))?
            .map_err(|error| ConvertError::Layer { digest, error })?;
        let lazy = converted.layer;
        let uploaded = self.send(number, &lazy.blob, lazy.blob_len, &mut converted.spool).await?;
        let mut annotations = descriptor.annotations.unwrap_or_default();
        annotations.extend(lazy.to_annotations());
        let target = Descriptor {
            media_type: media_type::OCI_LAYER_ZSTD.to_owned(),
            digest: lazy.blob,
            size: lazy.blob_len,
            annotations: Some(annotations),
            platform: None,
            // What else there is says something about the original blob, like its address.
            rest: BTreeMap::new(),
        };
        Ok((target, Some(content_of(&facts, &converted)), uploaded))
    }

    /// Copies a blob as it is; returns whether bytes had to be moved.
    async fn carry_over(&self, number: usize, descriptor: &Descriptor) -> Result<bool, ConvertError> {
        let Descriptor { digest, size, .. } = descriptor;
        // A layer that lies elsewhere, as those of Windows do, stays there.
        let is_elsewhere = descriptor.rest.contains_key("urls");
        if is_elsewhere
            || self.destination.has_blob(digest, *size).await?
            || self.destination.mount_blob(self.source, digest).await?
        {
            return Ok(false);
        }
        let stream = self.source.blob_stream(digest).await?;
        let mut spool = self.destination.spool()?;
        let mut spool = self
            .read_blob(number, stream, descriptor, move |mut blob| {
                std::io::copy(&mut blob, &mut spool).map_err(LayerError::Write)?;
                blob.finish()?;
                Ok(spool)
            })
            .await?;
        self.send(number, digest, *size, &mut spool).await
    }

    /// Runs `work` on a thread of its own over a blob that streams in.
    async fn read_blob<T: Send + 'static>(
        &self,
        number: usize,
        mut stream: ByteStream,
        descriptor: &Descriptor,
        work: impl FnOnce(BlobReader<Pieces>) -> Result<T, LayerError> + Send + 'static,
    ) -> Result<T, ConvertError> {
        let (digest, len) = (descriptor.digest, descriptor.size);
        let (sender, receiver) = mpsc::channel(PIECES_WAITING_MAX);
        let thread = tokio::task::spawn_blocking(move || work(BlobReader::new(Pieces(receiver), digest, len)));
        let mut read_len = 0;
        while let Some(piece) = stream.next().await {
            read_len += piece.as_ref().map_or(0, Bytes::len) as u64;
            self.observer.layer_read(number, read_len);
            // The thread stops listening when it has failed; it says why.
            if sender.send(piece.map_err(|error| error.0)).await.is_err() {
                break;
            }
        }
        drop((sender, stream));
        let result = thread.await.map_err(|_| ConvertError::Aborted(digest))?;
        result.map_err(|error| ConvertError::Layer { digest, error })
    }

    /// Sends a spooled blob to the destination; returns whether that was necessary.
    async fn send(&self, number: usize, digest: &Digest, len: u64, spool: &mut File) -> Result<bool, ConvertError> {
        if self.destination.has_blob(digest, len).await? {
            return Ok(false);
        }
        let observer = Arc::clone(&self.observer);
        let progress = Arc::new(move |sent_len| observer.layer_sent(number, sent_len, len));
        self.destination.put_file(digest, len, spool, progress).await?;
        Ok(true)
    }
}

fn content_of(facts: &LayerFacts, converted: &ConvertedLayer) -> LayerContent {
    LayerContent {
        plain_len: facts.tar_len,
        content_len: facts.content_len,
        frames: facts.frame_count,
        files: facts.inode_count,
        index_len: converted.layer.index.compressed_len,
        hot_len: converted.layer.hot_len,
        dedup_len: converted.dedup_len,
    }
}

/// The pieces of a blob, as the thread that works on it takes them.
struct Pieces(mpsc::Receiver<Result<Bytes, String>>);

impl Iterator for Pieces {
    type Item = Result<Bytes, String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.blocking_recv()
    }
}
