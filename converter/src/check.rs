//! Checks images: every digest, every lazy layer's index against its tar stream, and the whole against the original
//! it was converted from. Of an index everything is checked that it lists.
//!
//! Each blob is read once, as a stream: what is held of a layer is its index, the digests of its pieces and
//! a frame at a time. What is wrong becomes a finding and the check goes on, so that one run names all damage;
//! an error is what keeps it from looking.

mod artifact;
mod entries;
mod frames;
mod layer;
mod lazy;
mod notes;
mod opening;
mod original;
mod report;
mod space;

use std::collections::{HashMap, HashSet};

use format_spec::{Digest, PublicKey};
use futures_util::{StreamExt, TryStreamExt, stream};

pub(crate) use self::layer::check_layer;
pub use self::report::{ArtifactCheck, CheckReport, Counts, Finding, ImageCheck, LayerCheck, Part};
use self::{original::Original, report::Findings};
use crate::{
    blob::thread::Aborted,
    image::{
        ImageSource,
        manifest::Descriptor,
        platform::Platform,
        resolve::{FoundManifest, ResolveError, ResolvedImage, resolve_image},
    },
};

/// Layers checked side by side: hashing keeps a processor busy with each, and each may hold a large index.
const LAYERS_AT_ONCE: usize = 2;

/// An image cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Finding the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Finding the original.
    #[error("original: {0}")]
    Original(ResolveError),
    /// A bug or a lack of memory: a thread ended early.
    #[error("layer {digest}: {error}")]
    Aborted {
        /// The blob.
        digest: Digest,
        /// What happened.
        error: Aborted,
    },
}

/// Checks what `source` names, against what `original` names where that is given: of an index everything that it
/// lists, or the image for `platform` alone. With `keys` each lazy layer must have a signature of one of them.
///
/// `layer_done` is told of each layer, those of an image lowest first.
///
/// # Errors
///
/// When the named manifest or index, or config of the named image, cannot be read or are damaged; the same of the
/// original's. Everything else is a finding.
pub async fn check(
    source: &ImageSource,
    original: Option<&ImageSource>,
    platform: Option<&Platform>,
    keys: &[PublicKey],
    layer_done: &dyn Fn(&LayerCheck),
) -> Result<CheckReport, CheckError> {
    let mut check = Check { source, original, keys, layer_done, done: Done::default(), pairs: HashMap::new() };
    let mut seen = HashSet::new();
    let digest = match platform {
        Some(_) => check.one(resolve_image(source, platform).await?, platform).await?,
        None => {
            let stored = source.manifest().await.map_err(ResolveError::from)?;
            let digest = stored.digest;
            if stored.is_index() {
                let theirs = match original {
                    Some(original) => {
                        let stored = original.manifest().await;
                        Some(stored.map_err(|error| CheckError::Original(error.into()))?)
                    }
                    None => None,
                };
                check.index(stored, theirs, 1, &mut seen).await?;
            } else {
                let found = FoundManifest { indexes: Vec::new(), stored, platform: None };
                check.one(found.read(source, None).await?, None).await?;
            }
            digest
        }
    };
    Ok(check.done.report(digest))
}

/// A check under way.
struct Check<'a> {
    source: &'a ImageSource,
    original: Option<&'a ImageSource>,
    keys: &'a [PublicKey],
    layer_done: &'a dyn Fn(&LayerCheck),
    done: Done,
    /// For what the original's index lists: what this one has in its place.
    pairs: HashMap<Digest, Digest>,
}

/// The results so far.
#[derive(Default)]
struct Done {
    images: Vec<ImageCheck>,
    artifacts: Vec<ArtifactCheck>,
    /// Of the indexes.
    findings: Findings,
}

impl Done {
    fn report(self, digest: Digest) -> CheckReport {
        let Self { images, artifacts, findings } = self;
        let mut report = CheckReport {
            digest,
            is_sound: false,
            is_fully_checked: true,
            images,
            artifacts,
            findings: findings.list,
            further_finding_count: findings.further,
        };
        let layers = report.images.iter().flat_map(|image| &image.layers);
        report.is_fully_checked = layers.map(|layer| &layer.not_checked).all(Vec::is_empty)
            && report.artifacts.iter().all(|artifact| artifact.not_checked.is_empty());
        report.is_sound = report.is_fully_checked && report.finding_count() == 0;
        report
    }
}

impl Check<'_> {
    /// Checks the image that was named; returns the digest of its manifest.
    async fn one(&mut self, image: ResolvedImage, platform: Option<&Platform>) -> Result<Digest, CheckError> {
        let original = match self.original {
            Some(original) => Some(original::find(original, &image, platform).await?),
            None => None,
        };
        let digest = image.digest;
        self.image(image, original).await?;
        Ok(digest)
    }

    /// Checks one image.
    async fn image(&mut self, image: ResolvedImage, original: Option<Original<'_>>) -> Result<(), CheckError> {
        let mut findings = Findings::default();
        let config = &image.manifest.config;
        check_len("config", config, image.config.len() as u64, &mut findings);
        for (number, descriptor) in [config].into_iter().chain(&image.manifest.layers).enumerate() {
            let place = if number == 0 { "config".to_owned() } else { format!("layer {number}") };
            check_embedded(&place, descriptor, &mut findings);
        }
        let layers: Vec<LayerCheck> = stream::iter(image.manifest.layers.iter().zip(&image.diff_ids))
            .map(|(descriptor, diff_id)| check_layer(self.source, descriptor, *diff_id, self.keys))
            .buffered(LAYERS_AT_ONCE)
            .inspect_ok(|layer| (self.layer_done)(layer))
            .try_collect()
            .await?;
        if let Some(original) = &original {
            original::compare(&image, &layers, original, &mut findings).await?;
        }
        self.done.images.push(ImageCheck {
            digest: image.digest,
            config_digest: image.manifest.config.digest,
            platform: image.platform.to_string(),
            layers,
            findings: findings.list,
            further_finding_count: findings.further,
        });
        Ok(())
    }
}

/// Adds a finding where a document of `len` bytes has another length than its descriptor says.
fn check_len(place: &str, descriptor: &Descriptor, len: u64, findings: &mut Findings) {
    if descriptor.size != len {
        let problem = format!("it has {len} bytes, its descriptor says {}", descriptor.size);
        findings.add(Part::Manifest, place, problem);
    }
}

/// Adds a finding where a descriptor brings along other content than that which it names: some programs take it.
fn check_embedded(place: &str, descriptor: &Descriptor, findings: &mut Findings) {
    if descriptor.rest.contains_key("data") && descriptor.embedded().is_none() {
        findings.add(Part::Manifest, format!("{place}, data"), "it is not the content that the descriptor names");
    }
}
