//! Converts whatever a name points to, and publishes the result last.
//!
//! Nothing but layers changes: the config is carried over byte for byte, and a layer is only accepted when
//! its tar stream is what the config says. `index.rs` walks indexes, `image.rs` converts an image.

pub mod cache;
mod image;
mod index;
mod referrers;
pub mod report;

use std::{num::NonZeroUsize, sync::Arc, time::Instant};

use format_spec::{Digest, FormatError, SigningKey, records::FORMAT_VERSION};
use tar_index::TREE_GENERATION;

use crate::{
    convert::{
        cache::{CacheOptions, ConversionCache},
        index::Made,
        referrers::carry_referrers,
        report::{LayerReport, Observer, Report},
    },
    image::{
        ImageDestination, ImageError, ImageSource,
        platform::Platform,
        resolve::{ResolveError, find_manifest},
    },
    layer::{
        LayerError,
        compress::{Compressor, FRAMES_GENERATION, FrameOptions},
        lazy::LazyLayerError,
        start_up::{HotPackChoice, StartUpError},
    },
};

/// Layers converted side by side at most: more only cost memory and temporary space.
const LAYERS_AT_ONCE_MAX: usize = 8;

/// Which images of an index to convert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platforms {
    /// The one for this platform; `None` for the host's, or the only one.
    One(Option<Platform>),
    /// All; the result is an index again.
    All,
}

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Which images of an index to convert.
    pub platforms: Platforms,
    /// Whether signatures, SBOMs and other referrers come along.
    pub referrers: bool,
    /// Where to look for layers that were converted before; `None`: nowhere but in this run.
    pub cache: Option<CacheOptions>,
    /// zstd level of the frames.
    pub level: i32,
    /// Number of compressor threads, and of layers side by side.
    pub jobs: NonZeroUsize,
    /// What goes into hot packs.
    pub hot_pack: HotPackChoice,
    /// Keys that sign every lazy layer.
    pub sign: Arc<[SigningKey]>,
}

impl ConvertOptions {
    /// What changes the result of converting a layer, as a text: equal texts mean equal results.
    fn shape(&self) -> String {
        // All fields are named here, so that a new one is thought about.
        let Self { platforms: _, referrers: _, cache: _, level, jobs: _, hot_pack, sign: _ } = self;
        let hot_pack = match hot_pack {
            HotPackChoice::Derived => "derived".to_owned(),
            HotPackChoice::Profile { digest, .. } => digest.to_string(),
            HotPackChoice::None => "none".to_owned(),
        };
        format!(
            "format={FORMAT_VERSION} frames={FRAMES_GENERATION} tree={TREE_GENERATION} level={level} hot={hot_pack}"
        )
    }
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
    /// The config says two things of one blob.
    #[error("layer {digest}: the config says that its tar stream has digest {}, and elsewhere {}", .diff_ids[0], .diff_ids[1])]
    TwoDiffIds {
        /// The original blob.
        digest: Digest,
        /// The diff IDs.
        diff_ids: Box<[Digest; 2]>,
    },
    /// A layer that was lazy already is not what its index or the config says.
    #[error("layer {digest}: it cannot be signed as it is: {reason}")]
    NotSigned {
        /// The blob.
        digest: Digest,
        /// Its fault.
        reason: String,
    },
    /// Finding out whether a layer is lazy already.
    #[error(transparent)]
    LazyLayer(Box<LazyLayerError>),
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

impl From<LazyLayerError> for ConvertError {
    fn from(error: LazyLayerError) -> Self {
        Self::LazyLayer(Box::new(error))
    }
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
    let (stored, platform) = match &options.platforms {
        Platforms::One(platform) => {
            let found = find_manifest(source, platform.as_ref()).await?;
            // An image that its entry in an index chose need not say it again.
            (found.stored, platform.as_ref().filter(|_| found.platform.is_none()))
        }
        Platforms::All => (source.manifest().await?, None),
    };
    let source_digest = stored.digest;
    let jobs = options.jobs.get();
    let layers_at_once = jobs.min(LAYERS_AT_ONCE_MAX);
    let frames = FrameOptions { level: options.level, ..FrameOptions::default() };
    let compressor = Compressor::new(&frames, jobs, layers_at_once).map_err(ConvertError::Compressor)?;
    let conversion = Conversion {
        source,
        destination,
        observer,
        compressor: Arc::new(compressor),
        layers_at_once,
        hot_pack: &options.hot_pack,
        sign: &options.sign,
        cache: ConversionCache::open(options.cache.as_ref(), destination).await,
        shape: options.shape(),
        platform,
    };
    let mut made = Made::default();
    let root = conversion.convert_manifest(stored, 0, &mut made).await?;
    let referrers = match options.referrers {
        true => {
            // Some registries want to see the subject before what refers to it.
            destination.put_manifest(&root.media_type, &root.bytes).await?;
            carry_referrers(source, destination, &made).await?
        }
        false => Vec::new(),
    };
    let digest = root.descriptor().digest;
    destination.publish(&root.media_type, root.bytes).await?;
    let layers = || made.images.iter().flat_map(|image| &image.layers);
    // Lengths of layers that nobody reads are a stranger's numbers.
    let sum = |len: fn(&LayerReport) -> u64| layers().map(len).fold(0, u64::saturating_add);
    Ok(Report {
        destination: destination.name(),
        digest,
        source_digest,
        source_compressed_len: sum(|layer| layer.source_compressed_len),
        compressed_len: sum(|layer| layer.compressed_len),
        plain_len: sum(|layer| layer.content.map_or(0, |content| content.plain_len)),
        signed_by: options.sign.iter().map(|key| key.public().id().to_string()).collect(),
        uploaded_bytes: sum(|layer| if layer.is_uploaded { layer.compressed_len } else { 0 }),
        images: made.images,
        artifacts: made.artifacts,
        referrers,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The work on every image of a conversion.
pub(crate) struct Conversion<'a> {
    pub(crate) source: &'a ImageSource,
    pub(crate) destination: &'a ImageDestination,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) compressor: Arc<Compressor>,
    pub(crate) layers_at_once: usize,
    pub(crate) hot_pack: &'a HotPackChoice,
    pub(crate) sign: &'a [SigningKey],
    pub(crate) cache: ConversionCache,
    /// [`ConvertOptions::shape`].
    pub(crate) shape: String,
    /// What the config of the image must say; `None` for anything.
    pub(crate) platform: Option<&'a Platform>,
}
