//! From a name to one image: through indexes to the manifest for a platform, its config and diff IDs.
//!
//! An index says for which platform each image is, and is believed: configs often leave their variant out. Where an
//! entry says nothing, the config decides. An entry that cannot be understood matters to who wants that one.

use std::pin::Pin;

use bytes::Bytes;
use format_spec::{Digest, limits::LAYER_COUNT_MAX};

use crate::image::{
    ImageError, ImageSource, StoredManifest, document,
    manifest::{ConfigKind, Descriptor, ImageConfig, ImageIndex, ImageManifest, media_type},
    platform::{DescriptorPlatform, Platform},
};

/// Indexes within indexes followed at most; real ones have one level.
pub(crate) const INDEX_DEPTH_MAX: usize = 4;
/// Most entries without a platform whose configs are read to find one: each costs two requests.
const UNSTATED_COUNT_MAX: usize = 64;

/// One image.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The config as it is stored, verified.
    pub config: Bytes,
    /// Digests of the layers' tar streams, as many as there are layers.
    pub diff_ids: Vec<Digest>,
    /// The platform that the entry of its index says, or else the config.
    pub platform: DescriptorPlatform,
}

/// A manifest of one image, and how it was found.
#[derive(Debug, Clone)]
pub struct FoundManifest {
    /// The indexes on the way to it, outermost first.
    pub indexes: Vec<StoredManifest>,
    /// The manifest.
    pub stored: StoredManifest,
    /// The platform for which it was chosen; `None` where there was nothing to choose from.
    pub platform: Option<DescriptorPlatform>,
}

/// An image cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Reading it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is none for the platform.
    #[error("no image for {wanted}; there is: {available}; choose one with --platform")]
    Platform {
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        available: String,
    },
    /// An entry of an index that is needed cannot be used.
    #[error("index {index}: entry {number}: {reason}")]
    Entry {
        /// The index.
        index: Digest,
        /// The entry's place, from 1.
        number: usize,
        /// Its fault.
        reason: String,
    },
    /// The manifest describes no container image.
    #[error("manifest {digest}: {reason}")]
    NoImage {
        /// The manifest.
        digest: Digest,
        /// What it is instead.
        reason: String,
    },
}

/// Finds the image for `platform` at `source`: by default the one for this host, or the only one.
///
/// # Errors
///
/// When it is not there, is for other platforms, or is no container image.
pub async fn resolve_image(source: &ImageSource, platform: Option<&Platform>) -> Result<ResolvedImage, ResolveError> {
    let found = find_manifest(source, platform).await?;
    found.read(source, platform).await
}

impl FoundManifest {
    /// The image that the manifest describes.
    ///
    /// # Errors
    ///
    /// When it describes none, cannot be understood, or nothing but its config says for which platform it is and
    /// that is another one than `wanted`.
    pub async fn read(&self, source: &ImageSource, wanted: Option<&Platform>) -> Result<ResolvedImage, ResolveError> {
        let Some(image) = read_image(source, &self.stored).await? else {
            let reason = match parse::<ImageManifest>(&self.stored) {
                Ok(manifest) => format!("no container image: its config is of type {:?}", manifest.config.media_type),
                Err(_) => "no container image".to_owned(),
            };
            return Err(ResolveError::NoImage { digest: self.stored.digest, reason });
        };
        match &self.platform {
            Some(platform) => Ok(ResolvedImage { platform: platform.clone(), ..image }),
            None => image.check_platform(wanted).map(|()| image),
        }
    }
}

/// The image that a manifest describes; `None` for a manifest of something else: an artifact.
///
/// Its config, and a layer that unpacks, make an image: attestations and Wasm modules come with configs of images, but
/// with layers of their own types. Docker once called configs by types that say nothing, and some registries still do;
/// then the layers and what is in the config decide.
///
/// # Errors
///
/// When the manifest or the config cannot be understood, or they contradict each other.
pub(crate) async fn read_image(
    source: &ImageSource,
    stored: &StoredManifest,
) -> Result<Option<ResolvedImage>, ResolveError> {
    let digest = stored.digest;
    let no_image = |reason: String| ResolveError::NoImage { digest, reason };
    use registry::media_type::{DOCKER_MANIFEST, OCI_MANIFEST};
    // Artifact manifests of before OCI 1.1 have no config.
    if !matches!(stored.media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST) {
        return Ok(None);
    }
    let manifest: ImageManifest = parse(stored)?;
    let config_kind = media_type::config_kind(&manifest.config.media_type);
    let unpacks = |layer: &Descriptor| media_type::is_file_system(&layer.media_type);
    let may_be_image = match config_kind {
        ConfigKind::Image => manifest.layers.is_empty() || manifest.layers.iter().any(unpacks),
        ConfigKind::Unsaid => !manifest.layers.is_empty() && manifest.layers.iter().all(unpacks),
        ConfigKind::Other => false,
    };
    if !may_be_image {
        return Ok(None);
    }
    let config_bytes = source.config(&manifest.config).await?;
    let config = document::parse::<ImageConfig>(&config_bytes, document::Kind::Config);
    let layer_count = manifest.layers.len();
    let is_complete = |config: &ImageConfig| config.rootfs.diff_ids.len() == layer_count;
    let config = match config {
        // Tars beside some other document are no image.
        other if config_kind == ConfigKind::Unsaid && !other.as_ref().is_ok_and(is_complete) => return Ok(None),
        config => config.map_err(|error| no_image(format!("its config: {error}")))?,
    };
    let diff_id_count = config.rootfs.diff_ids.len();
    if layer_count != diff_id_count || layer_count > LAYER_COUNT_MAX {
        return Err(no_image(format!("it has {layer_count} layers, its config says {diff_id_count}")));
    }
    let ImageConfig { os, architecture, variant, rootfs } = config;
    let platform = DescriptorPlatform { architecture, os, variant, rest: Default::default() };
    Ok(Some(ResolvedImage { digest, manifest, config: config_bytes, diff_ids: rootfs.diff_ids, platform }))
}

impl ResolvedImage {
    /// Holds system and architecture against what is `wanted`. Variants are left out of most configs.
    ///
    /// # Errors
    ///
    /// When the image is for others.
    pub(crate) fn check_platform(&self, wanted: Option<&Platform>) -> Result<(), ResolveError> {
        match wanted.filter(|wanted| !wanted.runs(&self.platform)) {
            None => Ok(()),
            Some(wanted) => {
                let available = self.platform.to_string();
                Err(ResolveError::Platform { wanted: wanted.clone(), available })
            }
        }
    }
}

/// Follows indexes to the manifest for the platform, by default that of this host.
///
/// # Errors
///
/// When one cannot be read, or there is none for the platform.
pub async fn find_manifest(source: &ImageSource, platform: Option<&Platform>) -> Result<FoundManifest, ResolveError> {
    let stored = source.manifest().await?;
    if !stored.is_index() {
        return Ok(FoundManifest { indexes: Vec::new(), stored, platform: None });
    }
    let wanted = platform.cloned().unwrap_or_else(Platform::host);
    let mut search = Search { source, wanted: &wanted, available: Vec::new(), unstated_count: 0 };
    match search.within(stored, 1).await? {
        Some(found) => Ok(found),
        None => Err(ResolveError::Platform { available: search.available(), wanted }),
    }
}

/// A search through an index, and those in it.
struct Search<'a> {
    source: &'a ImageSource,
    wanted: &'a Platform,
    /// The platforms that it came by, for a message.
    available: Vec<String>,
    /// Entries without a platform that it has looked at.
    unstated_count: usize,
}

impl Search<'_> {
    /// The manifest for the platform in an index that is itself the `depth`th.
    fn within(
        &mut self,
        stored: StoredManifest,
        depth: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Option<FoundManifest>, ResolveError>> + Send + '_>> {
        Box::pin(async move {
            if depth > INDEX_DEPTH_MAX {
                let reason = format!("more than {INDEX_DEPTH_MAX} indexes within one another");
                return Err(ResolveError::NoImage { digest: stored.digest, reason });
            }
            let index: ImageIndex = parse(&stored)?;
            let found = match self.choose_stated(&stored, &index)? {
                Some(entry) => self.stated(entry, depth).await?,
                None => self.unstated(&index, depth).await?,
            };
            Ok(found.map(|mut found| {
                found.indexes.insert(0, stored);
                found
            }))
        })
    }

    /// The entry that says the platform that comes nearest.
    fn choose_stated<'i>(
        &mut self,
        stored: &StoredManifest,
        index: &'i ImageIndex,
    ) -> Result<Option<&'i Descriptor>, ResolveError> {
        let stated: Vec<(usize, DescriptorPlatform)> =
            index.manifests.iter().enumerate().filter_map(|(place, entry)| Some((place, entry.platform()?))).collect();
        let known = stated.iter().filter(|(_, platform)| !platform.is_unknown());
        self.available.extend(known.map(|(_, platform)| platform.to_string()));
        let Some((place, count)) = self.wanted.choose(stated.iter().map(|(place, platform)| (*place, platform))) else {
            return Ok(None);
        };
        if count > 1 {
            tracing::warn!(index = %stored.digest, platform = %self.wanted, count, "several images serve equally well: the first is taken");
        }
        let refuse = |reason| ResolveError::Entry { index: stored.digest, number: place + 1, reason };
        index.manifests[place].descriptor().map(Some).map_err(refuse)
    }

    /// The manifest of an entry that says its platform.
    async fn stated(&mut self, entry: &Descriptor, depth: usize) -> Result<Option<FoundManifest>, ResolveError> {
        let stored = self.source.manifest_of(entry).await?;
        if stored.is_index() {
            return self.within(stored, depth + 1).await;
        }
        Ok(Some(FoundManifest { indexes: Vec::new(), stored, platform: entry.platform.clone() }))
    }

    /// The best of the entries that say no platform, by their configs.
    async fn unstated(&mut self, index: &ImageIndex, depth: usize) -> Result<Option<FoundManifest>, ResolveError> {
        let entries: Vec<&Descriptor> = index
            .known()
            .filter(|entry| entry.platform.as_ref().is_none_or(|platform| !platform.is_stated()))
            .collect();
        if let ([only], 1) = (entries.as_slice(), index.manifests.len()) {
            // An index of one image need not say for which platform it is, and there is nothing to choose from.
            let stored = self.source.manifest_of(only).await?;
            return match stored.is_index() {
                true => self.within(stored, depth + 1).await,
                false => Ok(Some(FoundManifest { indexes: Vec::new(), stored, platform: None })),
            };
        }
        let mut images = Vec::new();
        for entry in entries {
            self.unstated_count += 1;
            if self.unstated_count > UNSTATED_COUNT_MAX {
                tracing::warn!("more than {UNSTATED_COUNT_MAX} entries say no platform: the others are not looked at");
                break;
            }
            match self.look_at(entry, depth).await {
                Ok(found) => images.extend(found),
                Err(error) if is_of_the_entry(&error) => {
                    tracing::debug!(entry = %entry.digest, %error, "an entry without a platform is no image");
                }
                Err(error) => return Err(error),
            }
        }
        let platforms: Vec<DescriptorPlatform> =
            images.iter().map(|found| found.platform.clone().unwrap_or_default()).collect();
        let chosen = self.wanted.choose(platforms.iter().enumerate());
        Ok(chosen.map(|(place, _)| images.swap_remove(place)))
    }

    /// The image that an entry points to that does not say for which platform that is; `None` for an artifact.
    async fn look_at(&mut self, entry: &Descriptor, depth: usize) -> Result<Option<FoundManifest>, ResolveError> {
        let stored = self.source.manifest_of(entry).await?;
        if stored.is_index() {
            return self.within(stored, depth + 1).await;
        }
        let Some(image) = read_image(self.source, &stored).await? else { return Ok(None) };
        self.available.push(image.platform.to_string());
        Ok(Some(FoundManifest { indexes: Vec::new(), stored, platform: Some(image.platform) }))
    }

    fn available(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for name in &self.available {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        if names.is_empty() { "no image that says for which platform it is".to_owned() } else { names.join(", ") }
    }
}

/// Whether an error says something about one entry alone, and not about the way to all of them.
fn is_of_the_entry(error: &ResolveError) -> bool {
    match error {
        ResolveError::Image(ImageError::Registry(error)) => error.is_not_found(),
        ResolveError::Image(ImageError::File { error, .. }) => error.kind() == std::io::ErrorKind::NotFound,
        ResolveError::Image(ImageError::Malformed { .. }) | ResolveError::NoImage { .. } => true,
        _ => false,
    }
}

/// The type of a config that says that there is none. Source: OCI image specification, manifest.md.
const EMPTY_CONFIG: &str = "application/vnd.oci.empty.v1+json";

/// The kind that a manifest says that it is: its artifact type, or else the type of its config.
///
/// The manifest is believed, not the entry that points to it: the digest covers the manifest.
pub(crate) fn artifact_kind(stored: &StoredManifest) -> Option<String> {
    let manifest: serde_json::Value = serde_json::from_slice(&stored.bytes).ok()?;
    let said = [&manifest["artifactType"], &manifest["config"]["mediaType"]];
    let mut said = said.into_iter().filter_map(serde_json::Value::as_str);
    said.find(|said| !matches!(*said, "" | EMPTY_CONFIG)).map(str::to_owned)
}

/// A manifest as what it should be.
///
/// # Errors
///
/// When it is something else.
pub fn parse<T: serde::de::DeserializeOwned>(stored: &StoredManifest) -> Result<T, ImageError> {
    document::parse(&stored.bytes, document::Kind::Manifest)
        .map_err(|reason| ImageError::Malformed { what: format!("manifest {}", stored.digest), reason })
}
