//! A temporary directory with images made here, and the `lazuli` command run in it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use converter::image::manifest::{Descriptor, ImageIndex, ImageManifest, IndexEntry, media_type};
use format_spec::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;
pub(crate) use test_kit::gzip;

/// A temporary directory with an image `src` of three layers: gzip, bare and zstd.
pub(crate) struct Scene {
    pub(crate) directory: TempDir,
}

pub(crate) fn tar(files: &[(&str, usize)]) -> Vec<u8> {
    let content = |path: &str, len| path.bytes().cycle().take(len).collect::<Vec<_>>();
    test_kit::tar(files.iter().map(|(path, len)| (path, 0o644, content(path, *len))))
}

pub(crate) fn layer_type(suffix: &str) -> String {
    format!("application/vnd.oci.image.layer.v1.tar{suffix}")
}

pub(crate) fn list(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

impl Scene {
    pub(crate) fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap() };
        let layers = scene.tars();
        let blobs = [gzip(&layers[0]), layers[1].clone(), zstd::encode_all(layers[2].as_slice(), 1).unwrap()];
        let types = ["+gzip", "", "+zstd"].map(layer_type);
        let descriptors = blobs.iter().zip(types).map(|(blob, kind)| scene.put(&kind, blob)).collect();
        scene.put_image(descriptors, &layers.map(|tar| Digest::of(&tar)));
        scene
    }

    pub(crate) fn tars(&self) -> [Vec<u8>; 3] {
        [tar(&[("etc/a", 10), ("large", 3_000_000)]), tar(&[("usr/b", 20)]), tar(&[("etc/.wh.a", 0)])]
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn put(&self, kind: &str, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of(kind, bytes);
        fs::create_dir_all(self.path("src/blobs/sha256")).unwrap();
        fs::write(self.blob("src", &descriptor.digest), bytes).unwrap();
        descriptor
    }

    pub(crate) fn put_image(&self, layers: Vec<Descriptor>, diff_ids: &[Digest]) -> Descriptor {
        let descriptor = self.put_image_for(json!({"architecture": "amd64", "os": "linux"}), layers, diff_ids);
        self.put_index(vec![descriptor.clone()]);
        descriptor
    }

    /// An image for the platform that `config` says; nothing points to it yet.
    pub(crate) fn put_image_for(&self, mut config: Value, layers: Vec<Descriptor>, diff_ids: &[Digest]) -> Descriptor {
        config["rootfs"] = json!({"type": "layers", "diff_ids": diff_ids});
        config["odd"] = json!([1, 2]);
        let config = self.put(media_type::OCI_CONFIG, config.to_string().as_bytes());
        let annotations = Some([("note".to_owned(), "kept".to_owned())].into());
        let manifest = ImageManifest {
            schema_version: 2,
            media_type: Some(registry::media_type::OCI_MANIFEST.to_owned()),
            config,
            layers,
            annotations,
            rest: BTreeMap::new(),
        };
        self.put(registry::media_type::OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap())
    }

    /// An image of one layer with the file `which`, whose content is `text`.
    pub(crate) fn put_marked(&self, config: Value, text: &str) -> Descriptor {
        let tar = test_kit::tar([("which", 0o644, text)]);
        let layer = self.put(&layer_type("+gzip"), &gzip(&tar));
        self.put_image_for(config, vec![layer], &[Digest::of(&tar)])
    }

    /// Makes `src` the index over these entries.
    pub(crate) fn put_index_of(&self, entries: Vec<Value>) {
        let index = json!({"schemaVersion": 2, "mediaType": registry::media_type::OCI_INDEX, "manifests": entries});
        self.put_index(vec![self.put(registry::media_type::OCI_INDEX, index.to_string().as_bytes())]);
    }

    pub(crate) fn put_index(&self, manifests: Vec<Descriptor>) {
        let manifests = manifests.into_iter().map(IndexEntry::Known).collect();
        let index =
            ImageIndex { schema_version: 2, media_type: None, manifests, annotations: None, rest: BTreeMap::new() };
        fs::write(self.path("src/index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        fs::write(self.path("src/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }

    pub(crate) fn blob(&self, layout: &str, digest: &Digest) -> PathBuf {
        self.path(layout).join("blobs/sha256").join(digest.hex())
    }

    /// Runs the command in the scene's directory.
    pub(crate) fn lazuli(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
        command.args(arguments).current_dir(self.directory.path()).env("TMPDIR", self.directory.path());
        // The cache of whoever runs the tests is left alone.
        command.env("XDG_CACHE_HOME", "/dev/null");
        command.output().unwrap()
    }

    /// Converts `src` to `dst`; returns the report.
    pub(crate) fn convert(&self, arguments: &[&str]) -> Value {
        let output = self.lazuli(&[&["convert", "oci:src", "oci:dst:v1", "--json"], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn manifest(&self, layout: &str, digest: &Digest) -> ImageManifest {
        serde_json::from_slice(&fs::read(self.blob(layout, digest)).unwrap()).unwrap()
    }

    /// The content of a layout's `index.json`.
    pub(crate) fn index_of_layout(&self, layout: &str) -> ImageIndex {
        serde_json::from_slice(&fs::read(self.path(layout).join("index.json")).unwrap()).unwrap()
    }

    /// The index that is the only thing in a layout.
    pub(crate) fn index(&self, layout: &str) -> ImageIndex {
        let digest = self.index_of_layout(layout).known().next().unwrap().digest;
        serde_json::from_slice(&fs::read(self.blob(layout, &digest)).unwrap()).unwrap()
    }

    pub(crate) fn converted(&self) -> ImageManifest {
        self.manifest("dst", &self.index_of_layout("dst").known().next().unwrap().digest)
    }

    /// The command fails with exactly this line and leaves nothing in `dst`.
    pub(crate) fn check_refusal(&self, arguments: &[&str], expected: &str) {
        let output = self.lazuli(&[&["convert", "--json"], arguments].concat());
        assert_eq!(String::from_utf8_lossy(&output.stderr), format!("lazuli: {expected}\n"));
        assert_eq!(output.status.code(), Some(1));
        assert!(!self.path("dst").exists());
        assert_eq!(list(self.directory.path()), ["src"]);
    }
}
