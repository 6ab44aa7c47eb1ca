//! Small images made by the tests themselves, written as OCI layouts.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use flate2::write::GzEncoder;
use format_spec::{Digest, DigestHasher, LazyLayer};
use serde_json::{Value, json};

use crate::{
    error::{Context as _, Result},
    scratch::Scratch,
};

/// Media type of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip in one member.
    Gzip,
    /// zstd in one frame.
    Zstd,
}

impl Compression {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Gzip, Self::Zstd];

    fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    fn compress(self, tar: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::None => Ok(tar.to_vec()),
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(tar)?;
                encoder.finish()
            }
            Self::Zstd => zstd::encode_all(tar, 0),
        }
    }
}

/// An image in the making.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    layers: Vec<(Vec<u8>, Compression)>,
    command: Vec<String>,
    environment: Vec<String>,
    architecture: String,
}

impl Default for ImageBuilder {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            command: vec!["/bin/sh".to_owned()],
            environment: vec!["PATH=/usr/local/bin:/usr/bin:/bin".to_owned()],
            architecture: own_architecture().to_owned(),
        }
    }
}

impl ImageBuilder {
    /// An image without layers, for this machine.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a layer on top: the bytes of a tar stream.
    pub fn layer(mut self, tar: Vec<u8>, compression: Compression) -> Self {
        self.layers.push((tar, compression));
        self
    }

    /// What the image runs.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Its environment, `NAME=value` each.
    pub fn environment(mut self, entries: &[&str]) -> Self {
        self.environment = entries.iter().map(|&entry| entry.to_owned()).collect();
        self
    }

    /// The architecture that the image says it is for, in the words of OCI.
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.architecture = architecture.to_owned();
        self
    }

    /// Writes the image into the layout `<scratch>/<name>`; returns `oci:DIR:latest`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write(&self, scratch: &Scratch, name: &str) -> Result<String> {
        let layout = Layout::create(scratch.join(name))?;
        let manifest = self.add_to(&layout)?;
        layout.tag(manifest)?;
        Ok(layout.reference())
    }

    /// Writes the image into the layout `<scratch>/<name>` as the only one of an index that says for
    /// which platform it is; returns `oci:DIR:latest`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write_index(&self, scratch: &Scratch, name: &str) -> Result<String> {
        let layout = Layout::create(scratch.join(name))?;
        let mut manifest = self.add_to(&layout)?;
        manifest["platform"] = json!({ "os": "linux", "architecture": self.architecture });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
        layout.tag(layout.add(INDEX, index.to_string().as_bytes())?)?;
        Ok(layout.reference())
    }

    /// Writes several images into the layout `<scratch>/<name>`, each under its tag, and the layout into
    /// the archive `<scratch>/<name>.tar`, in which containerd finds the images as `<name>/<tag>:latest`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write_all(images: &[(String, Self)], scratch: &Scratch, name: &str) -> Result<PathBuf> {
        let layout = Layout::create(scratch.join(name))?;
        let mut manifests = Vec::new();
        for (tag, image) in images {
            let mut manifest = image.add_to(&layout)?;
            manifest["annotations"] = json!({
                "org.opencontainers.image.ref.name": tag,
                "io.containerd.image.name": format!("{name}/{tag}:latest"),
            });
            manifests.push(manifest);
        }
        layout.write("index.json", &json!({ "schemaVersion": 2, "manifests": manifests }))?;
        let archive = scratch.join(format!("{name}.tar"));
        let mut tar = tar::Builder::new(fs::File::create(&archive).at("creating", &archive)?);
        tar.append_dir_all("", &layout.directory).at("writing", &archive)?;
        tar.into_inner().at("writing", &archive)?;
        Ok(archive)
    }

    /// Writes the image into a layout, under no tag; returns its descriptor.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn add_to(&self, layout: &Layout) -> Result<Value> {
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for (tar, compression) in &self.layers {
            diff_ids.push(Digest::of(tar).to_string());
            let blob = compression.compress(tar).context("compressing a layer")?;
            layers.push(layout.add(compression.media_type(), &blob)?);
        }
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "created": "2025-01-01T00:00:00Z",
            "config": { "Cmd": self.command, "Env": self.environment, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        layout.add_manifest(&config, &layers)
    }
}

/// An image in the layout `base` (`oci:DIR:tag`) with one more layer, written to `<scratch>/<name>`.
///
/// This is what a builder does with `FROM base`: the layers below stay as they are, annotations and all.
///
/// # Errors
///
/// When the layout cannot be read or written.
pub fn extend_image(base: &str, tar: &[u8], scratch: &Scratch, name: &str) -> Result<String> {
    let source = Layout { directory: layout_directory(base) };
    let manifest = source.manifest()?;
    let layout = Layout::create(scratch.join(name))?;
    let mut layers = manifest["layers"].as_array().cloned().unwrap_or_default();
    for layer in &layers {
        let digest = crate::registry_server::digest_in(layer)?;
        let (from, to) = (source.blob(digest), layout.blob(digest));
        fs::copy(&from, &to).at("copying", &from)?;
    }
    let mut config = source.read(&manifest["config"])?;
    if let Some(diff_ids) = config["rootfs"]["diff_ids"].as_array_mut() {
        diff_ids.push(json!(Digest::of(tar).to_string()));
    }
    // A history that does not list the new layer would be wrong, none at all is allowed.
    config.as_object_mut().map(|config| config.remove("history"));
    let blob = Compression::Gzip.compress(tar).context("compressing a layer")?;
    layers.push(layout.add(Compression::Gzip.media_type(), &blob)?);
    let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    layout.tag(layout.add_manifest(&config, &layers)?)?;
    Ok(layout.reference())
}

/// The file of a blob in the layout `layout` (`oci:DIR:tag`).
pub fn layout_blob(layout: &str, digest: Digest) -> PathBuf {
    Layout { directory: layout_directory(layout) }.blob(digest)
}

/// The only manifest of the layout `layout` (`oci:DIR:tag`).
///
/// # Errors
///
/// When it cannot be read.
pub fn layout_manifest(layout: &str) -> Result<Value> {
    Layout { directory: layout_directory(layout) }.manifest()
}

/// The image configuration of the layout `layout` (`oci:DIR:tag`).
///
/// # Errors
///
/// When it cannot be read.
pub fn layout_config(layout: &str) -> Result<Value> {
    let layout = Layout { directory: layout_directory(layout) };
    layout.read(&layout.manifest()?["config"])
}

/// The files of the layers of the layout `layout` (`oci:DIR:tag`), the lowest first.
///
/// # Errors
///
/// When its manifest cannot be read.
pub fn layout_layers(layout: &str) -> Result<Vec<PathBuf>> {
    let layout = Layout { directory: layout_directory(layout) };
    let manifest = layout.manifest()?;
    let layers = manifest["layers"].as_array().into_iter().flatten();
    layers.map(|layer| Ok(layout.blob(crate::registry_server::digest_in(layer)?))).collect()
}

/// Stores a blob in the layout `layout` (`oci:DIR:tag`); returns a descriptor without media type.
///
/// # Errors
///
/// When it cannot be written.
pub fn put_blob(layout: &str, content: &[u8]) -> Result<Value> {
    let mut descriptor = Layout { directory: layout_directory(layout) }.add("", content)?;
    descriptor.as_object_mut().map(|descriptor| descriptor.remove("mediaType"));
    Ok(descriptor)
}

/// Makes a lazy blob layer `number` (lowest 0) of the only image of the layout `layout` (`oci:DIR:tag`).
///
/// # Errors
///
/// When it cannot be read or written.
pub fn replace_layer(layout: &str, number: usize, blob: &[u8], lazy: &LazyLayer) -> Result<()> {
    let descriptor = put_blob(layout, blob)?;
    edit_manifest(layout, |manifest| {
        let layer = &mut manifest["layers"][number];
        layer["digest"] = descriptor["digest"].clone();
        layer["size"] = descriptor["size"].clone();
        layer["annotations"] = json!(lazy.to_annotations());
    })
}

/// Changes the only manifest of the layout `layout` (`oci:DIR:tag`), which stays what the tag names.
///
/// # Errors
///
/// When it cannot be read or written.
pub fn edit_manifest(layout: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
    let layout = Layout { directory: layout_directory(layout) };
    let mut manifest = layout.manifest()?;
    edit(&mut manifest);
    let media_type = manifest["mediaType"].as_str().unwrap_or_default().to_owned();
    layout.tag(layout.add(&media_type, manifest.to_string().as_bytes())?)
}

/// This machine's architecture in the words of OCI.
pub fn own_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn layout_directory(layout: &str) -> PathBuf {
    let path = layout.strip_prefix("oci:").unwrap_or(layout);
    path.rsplit_once(':').map_or(path, |(directory, _)| directory).into()
}

/// An OCI image layout in the making.
#[derive(Debug)]
pub struct Layout {
    directory: PathBuf,
}

impl Layout {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn create(directory: PathBuf) -> Result<Self> {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).at("creating", &blobs)?;
        let layout = Self { directory };
        layout.write("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
        Ok(layout)
    }

    /// `oci:DIR:latest`.
    pub fn reference(&self) -> String {
        format!("oci:{}:latest", self.directory.display())
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.directory.join("blobs/sha256").join(digest.hex())
    }

    /// Adds a blob; returns its descriptor.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn add(&self, media_type: &str, content: &[u8]) -> Result<Value> {
        let digest = Digest::of(content);
        let path = self.blob(digest);
        fs::write(&path, content).at("writing", &path)?;
        Ok(json!({ "mediaType": media_type, "digest": digest.to_string(), "size": content.len() }))
    }

    /// Adds a layer by moving the file of its blob here, gzip of a tar stream; returns its descriptor.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or is on another file system.
    pub fn add_layer_file(&self, path: &Path) -> Result<Value> {
        let digest = digest_of(path)?;
        let len = fs::metadata(path).at("looking at", path)?.len();
        fs::rename(path, self.blob(digest)).at("moving", path)?;
        let media_type = Compression::Gzip.media_type();
        Ok(json!({ "mediaType": media_type, "digest": digest.to_string(), "size": len }))
    }

    /// Adds a manifest; returns its descriptor.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn add_manifest(&self, config: &Value, layers: &[Value]) -> Result<Value> {
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        self.add(MANIFEST, manifest.to_string().as_bytes())
    }

    /// Makes `latest` of the manifest or index that `descriptor` describes.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn tag(&self, descriptor: Value) -> Result<()> {
        self.list(&[with_tag(descriptor, "latest")])
    }

    /// Makes these the entries of `index.json`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn list(&self, descriptors: &[Value]) -> Result<()> {
        self.write("index.json", &json!({ "schemaVersion": 2, "manifests": descriptors }))
    }

    fn manifest(&self) -> Result<Value> {
        let index = read_json(&self.directory.join("index.json"))?;
        self.read(&index["manifests"][0])
    }

    fn read(&self, descriptor: &Value) -> Result<Value> {
        read_json(&self.blob(crate::registry_server::digest_in(descriptor)?))
    }

    fn write(&self, name: &str, document: &Value) -> Result<()> {
        let path = self.directory.join(name);
        fs::write(&path, document.to_string()).at("writing", &path)
    }
}

/// An entry of `index.json` under a tag.
pub fn with_tag(mut descriptor: Value, tag: &str) -> Value {
    descriptor["annotations"]["org.opencontainers.image.ref.name"] = tag.into();
    descriptor
}

/// The digest of a file, however long.
///
/// # Errors
///
/// When it cannot be read.
pub fn digest_of(path: &Path) -> Result<Digest> {
    let mut file = fs::File::open(path).at("opening", path)?;
    let mut hasher = DigestHasher::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).at("reading", path)? {
            0 => return Ok(hasher.finish()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).at("reading", path)?;
    serde_json::from_slice(&text).map_err(std::io::Error::from).at("parsing", path)
}
