//! Layers that were converted before are not converted again.
//!
//! An entry says: this blob, converted with these options, is that lazy layer. It alone does not help: it counts
//! where the destination has the blob, or a repository of the same registry from which it can be mounted.
//!
//! Entries are believed by who made them. Those of this run and of this user's directory are our own, and only the
//! end of the blob is looked at, whether it is there as we wrote it. Anybody may have written what an image says that
//! was converted earlier: it serves this run alone, and only after the whole layer was read and held against the diff
//! ID that is wanted.
//!
//! A layer that is found keeps the hot pack of the image that it was first converted for: that is what lets images
//! share their base layers. Without a cache the result depends on input and options alone.

mod directory;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use format_spec::{
    Digest, Footer, Index, LazyLayer,
    annotation::{SOURCE_DIFF_ID, SOURCE_DIGEST, SOURCE_OPTIONS},
    footer::FOOTER_FRAME_LEN,
};
use registry::Reference;
use serde::{Deserialize, Serialize};

use self::directory::CacheDirectory;
use crate::{
    check::check_layer,
    image::{
        ImageDestination, ImageError, ImageSource, StoredManifest,
        manifest::{Descriptor, ImageIndex, ImageManifest, media_type},
        resolve::parse,
        stale::for_new_blob,
    },
};

/// Repositories remembered for a blob: the last ones.
const REPOSITORY_COUNT_MAX: usize = 16;
/// Most images of an index whose layers are learned: each costs a request. An index has an image for each platform.
const LEARNED_IMAGE_COUNT_MAX: usize = 64;

/// Where to look for layers that were converted before.
#[derive(Debug, Clone, Default)]
pub struct CacheOptions {
    /// A directory with an entry for each layer; made when the first one is written.
    pub directory: Option<PathBuf>,
    /// Images that were converted before, for instance the last version of this one.
    pub images: Vec<ImageSource>,
}

/// What a converted layer was made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct ConversionKey {
    /// The original blob.
    pub(crate) source: Digest,
    /// The tar stream in it.
    pub(crate) diff_id: Digest,
    /// What of the options changes the result.
    pub(crate) options: String,
}

impl ConversionKey {
    /// The annotations that say so.
    pub(crate) fn to_annotations(&self) -> [(String, String); 3] {
        [
            (SOURCE_DIGEST.to_owned(), self.source.to_string()),
            (SOURCE_DIFF_ID.to_owned(), self.diff_id.to_string()),
            (SOURCE_OPTIONS.to_owned(), self.options.clone()),
        ]
    }

    fn from_annotations(descriptor: &Descriptor) -> Option<Self> {
        let digest = |key| descriptor.annotation(key)?.parse().ok();
        Some(Self {
            source: digest(SOURCE_DIGEST)?,
            diff_id: digest(SOURCE_DIFF_ID)?,
            options: descriptor.annotation(SOURCE_OPTIONS)?.to_owned(),
        })
    }
}

/// A layer that was converted before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) layer: LazyLayer,
    /// Where its blob was seen: `host/repository`, the last one last.
    pub(crate) repositories: Vec<String>,
}

impl Known {
    fn add_repository(&mut self, name: String) {
        self.repositories.retain(|other| *other != name);
        self.repositories.push(name);
        let surplus = self.repositories.len().saturating_sub(REPOSITORY_COUNT_MAX);
        self.repositories.drain(..surplus);
    }
}

/// The layers that were converted before, in this run or an earlier one.
#[derive(Debug, Default)]
pub(crate) struct ConversionCache {
    directory: Option<CacheDirectory>,
    /// Converted in this run, or found at the destination and compared in it.
    own: Mutex<HashMap<ConversionKey, Known>>,
    /// The words of images about themselves.
    learned: Mutex<HashMap<ConversionKey, Known>>,
}

impl ConversionCache {
    /// Reads what images say that were converted earlier: those of `options`, and what `destination` holds now.
    ///
    /// Without `options` only this run counts.
    pub(crate) async fn open(options: Option<&CacheOptions>, destination: &ImageDestination) -> Self {
        let Some(options) = options else { return Self::default() };
        let directory = options.directory.clone().map(CacheDirectory::new);
        let cache = Self { directory, ..Self::default() };
        for image in &options.images {
            if let Err(error) = cache.learn(image).await {
                tracing::warn!(image = image.name(), %error, "no layers taken from this image");
            }
        }
        if let Err(error) = cache.learn(&destination.to_source()).await {
            // Mostly there is none yet.
            tracing::debug!(%error, "no layers taken from what is at the destination");
        }
        cache
    }

    /// Takes in the layers of all images at `source`.
    async fn learn(&self, source: &ImageSource) -> Result<(), ImageError> {
        let stored = source.manifest().await?;
        if !stored.is_index() {
            self.learn_manifest(source, &stored);
            return Ok(());
        }
        let index: ImageIndex = parse(&stored)?;
        for entry in index.known().take(LEARNED_IMAGE_COUNT_MAX) {
            match source.manifest_of(entry).await {
                Ok(stored) => self.learn_manifest(source, &stored),
                // The others may be there.
                Err(error) => tracing::debug!(entry = %entry.digest, %error, "no layers taken from this image"),
            }
        }
        Ok(())
    }

    fn learn_manifest(&self, source: &ImageSource, stored: &StoredManifest) {
        // Artifacts have no layers of ours.
        let Ok(manifest) = parse::<ImageManifest>(stored) else { return };
        for layer in &manifest.layers {
            let lazy = LazyLayer::from_annotations(|key| layer.annotation(key)).ok().flatten();
            let lazy = lazy.filter(|lazy| lazy.blob == layer.digest && lazy.blob_len == layer.size);
            if let (Some(lazy), Some(key)) = (lazy, ConversionKey::from_annotations(layer)) {
                let mut known = Known { layer: lazy, repositories: Vec::new() };
                if let ImageSource::Registry { reference, .. } = source {
                    known.add_repository(reference.name());
                }
                lock(&self.learned).insert(key, known);
            }
        }
    }

    /// The layer that was made from `key`, if the destination has its blob now and it is what it should be.
    ///
    /// # Errors
    ///
    /// When the destination does not answer.
    pub(crate) async fn find(
        &self,
        key: &ConversionKey,
        destination: &ImageDestination,
    ) -> Result<Option<LazyLayer>, ImageError> {
        let own = lock(&self.own).get(key).cloned();
        if let Some(known) = own
            && is_available(&known, destination).await?
        {
            return Ok(Some(known.layer));
        }
        if let Some(known) = self.directory.as_ref().and_then(|directory| directory.read(key))
            && is_available(&known, destination).await?
        {
            match check_end(destination, &known.layer).await {
                Ok(()) => {
                    self.add(key, known.layer, destination);
                    return Ok(Some(known.layer));
                }
                Err(reason) => {
                    let blob = known.layer.blob;
                    tracing::warn!(%blob, reason, "a layer that was converted earlier is damaged: it is converted again");
                    self.directory.iter().for_each(|directory| directory.remove(key));
                }
            }
        }
        let learned = lock(&self.learned).get(key).cloned();
        if let Some(known) = learned
            && is_available(&known, destination).await?
        {
            match check_all(&destination.to_source(), &known.layer, key.diff_id).await {
                Ok(()) => {
                    // Not into the directory: what somebody else has made serves nobody but this image.
                    lock(&self.own).insert(key.clone(), known.clone());
                    return Ok(Some(known.layer));
                }
                Err(reason) => {
                    let blob = known.layer.blob;
                    tracing::warn!(%blob, reason, "an image says of a layer that it is another one: that is converted");
                    lock(&self.learned).remove(key);
                }
            }
        }
        Ok(None)
    }

    /// Remembers that `layer`, which was made from `key` by this program, is at the destination.
    pub(crate) fn add(&self, key: &ConversionKey, layer: LazyLayer, destination: &ImageDestination) {
        let read = self.directory.as_ref().and_then(|directory| directory.read(key));
        let mut known = read.filter(|known| known.layer == layer);
        let known = known.get_or_insert_with(|| Known { layer, repositories: Vec::new() });
        if let ImageDestination::Registry { reference, .. } = destination {
            known.add_repository(reference.name());
        }
        lock(&self.own).insert(key.clone(), known.clone());
        if let Some(Err(error)) = self.directory.as_ref().map(|directory| directory.write(key, known)) {
            // The next conversion takes longer; this one has done its work.
            tracing::debug!(%error, "conversion not remembered");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A descriptor of a layer.
fn descriptor_of(layer: &LazyLayer) -> Descriptor {
    Descriptor {
        digest: layer.blob,
        size: layer.blob_len,
        annotations: Some(layer.to_annotations().into_iter().collect()),
        ..Descriptor::of(media_type::OCI_LAYER_ZSTD, b"")
    }
}

/// Whether footer and index at the destination are those of `layer`; the reason where they are not.
async fn check_end(destination: &ImageDestination, layer: &LazyLayer) -> Result<(), String> {
    let (source, descriptor) = (destination.to_source(), descriptor_of(layer));
    let text = |error: ImageError| error.to_string();
    let footer_start = layer.blob_len.checked_sub(FOOTER_FRAME_LEN).ok_or("it has no footer")?;
    let frame = source.blob_range(&descriptor, footer_start..layer.blob_len).await.map_err(text)?;
    let footer = Footer::from_frame(&frame, layer.blob_len).map_err(|error| error.to_string())?;
    if footer != Some((layer.index, layer.hot_len)) {
        return Err("its footer says something else".to_owned());
    }
    let compressed = source.blob_range(&descriptor, layer.index.range()).await.map_err(text)?;
    Index::from_compressed(&compressed, &layer.index).map(drop).map_err(|error| error.to_string())
}

/// Whether a layer of which nothing is known is all that a conversion of the layer `diff_id` would be; the reason
/// where it is not. Reads all of it.
pub(crate) async fn check_all(source: &ImageSource, layer: &LazyLayer, diff_id: Digest) -> Result<(), String> {
    let checked = check_layer(source, &descriptor_of(layer), diff_id, &[]).await;
    let checked = checked.map_err(|error| error.to_string())?;
    match (checked.findings.first(), checked.not_checked.first()) {
        (Some(finding), _) => Err(finding.to_string()),
        (None, Some(what)) => Err(format!("not checked: {what}")),
        (None, None) if checked.is_lazy && checked.tar_digest == Some(diff_id) => Ok(()),
        (None, None) => Err("it is no lazy layer".to_owned()),
    }
}

/// Whether the destination has the blob, or can have it without moving bytes.
async fn is_available(known: &Known, destination: &ImageDestination) -> Result<bool, ImageError> {
    let LazyLayer { blob, blob_len, .. } = &known.layer;
    if destination.has_blob(blob, *blob_len).await? {
        return Ok(true);
    }
    for name in known.repositories.iter().rev() {
        let Ok(repository) = name.parse::<Reference>() else { continue };
        match destination.mount_blob_of(&repository, blob).await {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            // Who may write here need not be allowed to read there.
            Err(error) => tracing::debug!(%error, repository = name, "blob not mounted"),
        }
    }
    Ok(false)
}

/// The annotations of a new layer: those of the original that do not describe its blob, what a node must be told, and where it came from.
pub(crate) fn annotations_of(
    original: Option<BTreeMap<String, String>>,
    layer: &LazyLayer,
    key: &ConversionKey,
) -> BTreeMap<String, String> {
    let mut annotations = for_new_blob(original);
    annotations.extend(layer.to_annotations());
    annotations.extend(key.to_annotations());
    annotations
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use format_spec::IndexLocation;

    use super::*;

    fn layer(blob: &[u8]) -> LazyLayer {
        let index = IndexLocation { offset: 1, compressed_len: 2, plain_len: 3, digest: Digest::of(b"index") };
        LazyLayer { blob: Digest::of(blob), blob_len: blob.len() as u64, index, hot_len: 0 }
    }

    fn key(options: &str) -> ConversionKey {
        ConversionKey { source: Digest::of(b"source"), diff_id: Digest::of(b"tar"), options: options.to_owned() }
    }

    fn open(directory: &Path) -> ConversionCache {
        ConversionCache { directory: Some(CacheDirectory::new(directory.join("cache"))), ..Default::default() }
    }

    /// A layer without content, as a conversion makes it.
    fn converted() -> (LazyLayer, Vec<u8>) {
        let made = crate::layer::empty_layer().unwrap();
        let mut blob = vec![0; usize::try_from(made.layer.blob_len).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&*made.file, &mut blob, 0).unwrap();
        (made.layer, blob)
    }

    struct Place {
        directory: tempfile::TempDir,
        here: ImageDestination,
        there: ImageDestination,
    }

    fn place() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let client = registry::Client::new(registry::ClientOptions::default());
        let destination = |name: &str| {
            let location = format!("oci:{}", directory.path().join(name).display()).parse().unwrap();
            ImageDestination::open(&location, &client, directory.path()).unwrap()
        };
        let (here, there) = (destination("here"), destination("there"));
        Place { here, there, directory }
    }

    #[tokio::test]
    async fn an_entry_counts_where_the_blob_is() {
        let Place { directory, here, there } = place();
        let (layer, blob) = converted();
        here.put_bytes(&layer.blob, &blob.into()).await.unwrap();
        open(directory.path()).add(&key("a"), layer, &here);
        // Another process, which has read nothing yet.
        let cache = open(directory.path());
        assert_eq!(cache.find(&key("a"), &here).await.unwrap(), Some(layer));
        assert_eq!(cache.find(&key("b"), &here).await.unwrap(), None);
        assert_eq!(cache.find(&key("a"), &there).await.unwrap(), None);
    }

    /// One wrong digit was believed, published, and learned again from what had been published.
    #[tokio::test]
    async fn an_entry_that_is_not_what_the_blob_says_is_dropped() {
        let Place { directory, here, .. } = place();
        let (layer, blob) = converted();
        here.put_bytes(&layer.blob, &blob.into()).await.unwrap();
        let index = format_spec::IndexLocation { digest: Digest::of(b"another"), ..layer.index };
        open(directory.path()).add(&key("a"), LazyLayer { index, ..layer }, &here);
        assert_eq!(open(directory.path()).find(&key("a"), &here).await.unwrap(), None);
        assert_eq!(CacheDirectory::new(directory.path().join("cache")).read(&key("a")), None);
    }

    /// Whoever has an image converted could say that a public base layer becomes his.
    #[tokio::test]
    async fn what_an_image_says_is_believed_after_its_layer_was_read() {
        let Place { directory, here, .. } = place();
        let (layer, blob) = converted();
        here.put_bytes(&layer.blob, &blob.into()).await.unwrap();
        let learn = |cache: &ConversionCache, key: ConversionKey| {
            let known = Known { layer, repositories: Vec::new() };
            lock(&cache.learned).insert(key, known);
        };
        // The layer has another tar stream than the one that is wanted.
        let cache = open(directory.path());
        learn(&cache, key("a"));
        assert_eq!(cache.find(&key("a"), &here).await.unwrap(), None);
        // It has the right one, and serves this run, but nobody else.
        let right = ConversionKey { diff_id: Digest::of(b""), ..key("a") };
        learn(&cache, right.clone());
        assert_eq!(cache.find(&right, &here).await.unwrap(), Some(layer));
        assert_eq!(open(directory.path()).find(&right, &here).await.unwrap(), None);
    }

    #[test]
    fn what_a_layer_was_made_from_stands_in_its_annotations() {
        let layer = layer(b"blob");
        let mut descriptor = Descriptor::of("m", b"blob");
        descriptor.annotations =
            Some(annotations_of(Some([("a".to_owned(), "b".to_owned())].into()), &layer, &key("o")));
        assert_eq!(ConversionKey::from_annotations(&descriptor), Some(key("o")));
        assert_eq!(
            (descriptor.annotation("a"), descriptor.annotations.as_ref().map(BTreeMap::len)),
            (Some("b"), Some(11))
        );
        descriptor.annotations.as_mut().unwrap().remove(SOURCE_DIFF_ID);
        assert_eq!(ConversionKey::from_annotations(&descriptor), None);
    }

    #[test]
    fn the_last_repositories_are_remembered() {
        let mut known = Known { layer: layer(b"blob"), repositories: Vec::new() };
        for number in 0..REPOSITORY_COUNT_MAX + 2 {
            known.add_repository(format!("host/{number}"));
        }
        known.add_repository("host/5".to_owned());
        assert_eq!(known.repositories.len(), REPOSITORY_COUNT_MAX);
        assert_eq!((&*known.repositories[0], &*known.repositories[REPOSITORY_COUNT_MAX - 1]), ("host/2", "host/5"));
    }
}
