//! Layers that were converted before are not converted again.
//!
//! An entry says: this blob, converted with these options, is that lazy layer. Entries come from a directory on this
//! machine and from images that were converted earlier, whose layers say in their annotations what they were made
//! from. An entry alone does not help: it counts where the destination has the blob, or a repository of the same
//! registry from which it can be mounted.
//!
//! A layer that is found keeps the hot pack of the image that it was first converted for: that is what lets images
//! share their base layers. Without a cache the result depends on input and options alone.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use format_spec::{
    Digest, LazyLayer,
    annotation::{SOURCE_DIFF_ID, SOURCE_DIGEST, SOURCE_OPTIONS},
};
use registry::Reference;
use serde::{Deserialize, Serialize};

use crate::{
    image::{ImageDestination, ImageError, ImageSource, StoredManifest},
    manifest::{Descriptor, ImageIndex, ImageManifest},
    stale::for_new_blob,
};

/// Longest file of the directory that is read; they have a kilobyte.
const ENTRY_LEN_MAX: u64 = 64 << 10;
/// Repositories remembered for a blob: the last ones.
const REPOSITORY_COUNT_MAX: usize = 16;

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
struct Known {
    layer: LazyLayer,
    /// Where its blob was seen: `host/repository`, the last one last.
    repositories: Vec<String>,
}

impl Known {
    fn add_repository(&mut self, name: String) {
        self.repositories.retain(|other| *other != name);
        self.repositories.push(name);
        let surplus = self.repositories.len().saturating_sub(REPOSITORY_COUNT_MAX);
        self.repositories.drain(..surplus);
    }
}

/// A file of the directory.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: ConversionKey,
    known: Known,
}

/// The layers that were converted before, in this run or an earlier one.
#[derive(Debug, Default)]
pub(crate) struct ConversionCache {
    directory: Option<PathBuf>,
    known: Mutex<HashMap<ConversionKey, Known>>,
}

impl ConversionCache {
    /// Reads what images say that were converted earlier: those of `options`, and what `destination` holds now.
    ///
    /// Without `options` only this run counts.
    pub(crate) async fn open(options: Option<&CacheOptions>, destination: &ImageDestination) -> Self {
        let Some(options) = options else { return Self::default() };
        let cache = Self { directory: options.directory.clone(), known: Mutex::default() };
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
        let index: ImageIndex = serde_json::from_slice(&stored.bytes)
            .map_err(|error| ImageError::Malformed { what: source.name(), reason: error.to_string() })?;
        for entry in index.known() {
            self.learn_manifest(source, &source.manifest_of(entry).await?);
        }
        Ok(())
    }

    fn learn_manifest(&self, source: &ImageSource, stored: &StoredManifest) {
        // Artifacts have no layers of ours.
        let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&stored.bytes) else { return };
        for layer in &manifest.layers {
            let lazy = LazyLayer::from_annotations(|key| layer.annotation(key)).ok().flatten();
            let lazy = lazy.filter(|lazy| lazy.blob == layer.digest && lazy.blob_len == layer.size);
            if let (Some(lazy), Some(key)) = (lazy, ConversionKey::from_annotations(layer)) {
                let mut known = Known { layer: lazy, repositories: Vec::new() };
                if let ImageSource::Registry { reference, .. } = source {
                    known.add_repository(reference.name());
                }
                self.known().insert(key, known);
            }
        }
    }

    /// The layer that was made from `key`, if the destination has its blob now.
    ///
    /// # Errors
    ///
    /// When the destination does not answer.
    pub(crate) async fn find(
        &self,
        key: &ConversionKey,
        destination: &ImageDestination,
    ) -> Result<Option<LazyLayer>, ImageError> {
        let known = self.known().get(key).cloned();
        for known in known.into_iter().chain(self.read_entry(key)) {
            if is_available(&known, destination).await? {
                self.add(key, known.layer, destination);
                return Ok(Some(known.layer));
            }
        }
        Ok(None)
    }

    /// Remembers that `layer`, made from `key`, is at the destination.
    pub(crate) fn add(&self, key: &ConversionKey, layer: LazyLayer, destination: &ImageDestination) {
        let mut known = self.read_entry(key).filter(|known| known.layer == layer);
        let known = known.get_or_insert_with(|| Known { layer, repositories: Vec::new() });
        if let ImageDestination::Registry { reference, .. } = destination {
            known.add_repository(reference.name());
        }
        self.known().insert(key.clone(), known.clone());
        let Some(path) = self.entry_path(key) else { return };
        if let Err(error) = write_entry(&path, &Entry { key: key.clone(), known: known.clone() }) {
            // The next conversion takes longer; this one has done its work.
            tracing::debug!(%error, path = %path.display(), "conversion not remembered");
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ConversionKey, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry_path(&self, key: &ConversionKey) -> Option<PathBuf> {
        let name = Digest::of(&serde_json::to_vec(key).expect("texts")).hex();
        Some(self.directory.as_ref()?.join(name + ".json"))
    }

    /// What the directory says; a file that cannot be read or understood says nothing.
    fn read_entry(&self, key: &ConversionKey) -> Option<Known> {
        let path = self.entry_path(key)?;
        if fs::metadata(&path).ok()?.len() > ENTRY_LEN_MAX {
            return None;
        }
        let entry: Entry = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        (entry.key == *key).then_some(entry.known)
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

/// Writes a file that is there completely or not at all.
fn write_entry(path: &Path, entry: &Entry) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    serde_json::to_writer(&mut file, entry)?;
    file.persist(path)?;
    Ok(())
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
        ConversionCache { directory: Some(directory.to_owned()), known: Mutex::default() }
    }

    #[tokio::test]
    async fn an_entry_counts_where_the_blob_is() {
        let directory = tempfile::tempdir().unwrap();
        let client = registry::Client::new(registry::ClientOptions::default());
        let destination = |name: &str| {
            let location = format!("oci:{}", directory.path().join(name).display()).parse().unwrap();
            ImageDestination::open(&location, &client, directory.path()).unwrap()
        };
        let (here, there) = (destination("here"), destination("there"));
        let layer = layer(b"blob");
        here.put_bytes(&layer.blob, &b"blob"[..].into()).await.unwrap();
        open(directory.path()).add(&key("a"), layer, &here);
        // Another process, which has read nothing yet.
        let cache = open(directory.path());
        assert_eq!(cache.find(&key("a"), &here).await.unwrap(), Some(layer));
        assert_eq!(cache.find(&key("b"), &here).await.unwrap(), None);
        assert_eq!(cache.find(&key("a"), &there).await.unwrap(), None);
        let path = cache.entry_path(&key("a")).unwrap();
        for damaged in [&b"{"[..], b"{}", &vec![b' '; 100_000]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(open(directory.path()).find(&key("a"), &here).await.unwrap(), None);
        }
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
