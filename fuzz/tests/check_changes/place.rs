//! Where images lie while they are checked: layouts in memory, one for each thread.

use std::{collections::BTreeMap, fs, path::Path};

use converter::{
    check::{CheckReport, check},
    image::ImageSource,
};
use format_spec::Digest;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::image::{Built, Image, open, scratch};

/// A layout that holds the pristine image between two checks, and the original.
pub(crate) struct Place {
    directory: TempDir,
    blobs: BTreeMap<Digest, Vec<u8>>,
    source: ImageSource,
    original: ImageSource,
    runtime: Runtime,
}

impl Place {
    pub(crate) fn new(pristine: &Image) -> Self {
        let directory = scratch();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let source = runtime.block_on(open(directory.path()));
        let original = runtime.block_on(open(&pristine.original));
        let place = Self { directory, blobs: pristine.built.blobs.clone(), source, original, runtime };
        place.blobs.iter().for_each(|(digest, content)| fs::write(place.blob(digest), content).unwrap());
        place
    }

    fn blob(&self, digest: &Digest) -> std::path::PathBuf {
        self.directory.path().join("blobs/sha256").join(digest.hex())
    }

    /// Checks an image, and leaves the pristine one behind.
    pub(crate) fn check(&self, image: &Built) -> Result<CheckReport, String> {
        let differing: Vec<&Digest> = self
            .blobs
            .keys()
            .chain(image.blobs.keys())
            .filter(|digest| self.blobs.get(digest) != image.blobs.get(digest))
            .collect();
        differing.iter().for_each(|digest| put(&self.blob(digest), image.blobs.get(digest)));
        let root = json!({"mediaType": image.root_type, "digest": image.root, "size": image.root_len});
        let list = json!({"schemaVersion": 2, "manifests": [root]});
        fs::write(self.directory.path().join("index.json"), list.to_string()).unwrap();
        let result = self.runtime.block_on(check(&self.source, Some(&self.original), None, &[], &|_| {}));
        differing.iter().for_each(|digest| put(&self.blob(digest), self.blobs.get(digest)));
        result.map_err(|error| error.to_string())
    }
}

fn put(path: &Path, content: Option<&Vec<u8>>) {
    match content {
        Some(content) => fs::write(path, content).unwrap(),
        None => drop(fs::remove_file(path)),
    }
}
