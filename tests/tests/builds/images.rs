//! The images that are converted: honest ones that share a base layer, and those of somebody who means harm.

use std::{fs, os::unix::fs::symlink};

use format_spec::{
    Digest, LazyLayer,
    annotation::{SOURCE_DIFF_ID, SOURCE_DIGEST, SOURCE_OPTIONS},
};
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, LazyBlob, Result, Scratch, TarLayer, TestRegistry,
    error::Context as _,
    image::{Layout, edit_manifest, layout_blob, layout_manifest, replace_layer},
    programs::lazuli_ok,
    registry_server::digest_in,
    samples::{eventful_layers, noise},
};
use serde_json::Value;

/// Honest images over the base layer.
const APPS: u64 = 5;
/// Length of the file in one of them that is sent while it is converted.
const LARGE_LEN: usize = 20 << 20;
/// Zeros in the layer of a few kilobytes.
const ZEROS_LEN: usize = 64 << 20;

/// An image to convert.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// Also its tag where it is published.
    pub(crate) name: String,
    /// Where it lies: in the registry, for the comparison, where it is an image that containerd takes.
    pub(crate) pushed: Option<String>,
    /// The places that it is converted from: the same, or a layout.
    pub(crate) places: Vec<String>,
    /// Whether its conversion must fail.
    pub(crate) is_refused: bool,
}

impl Source {
    fn pushed(registry: &TestRegistry, layout: String, name: &str) -> Result<Self> {
        let pushed = registry.push(&layout, &format!("originals/{name}:1"))?;
        let places = vec![pushed.clone(), layout];
        Ok(Self { name: name.to_owned(), pushed: Some(pushed), places, is_refused: false })
    }

    fn refused(layout: String, name: &str) -> Self {
        Self { name: name.to_owned(), pushed: None, places: vec![layout], is_refused: true }
    }
}

/// The layer below most images: a public one, in the words of who wants to take its place.
fn base() -> Result<Vec<u8>> {
    let mut layer = TarLayer::new().directory("bin").program("bin/sh", noise(1, 700_000)).directory("lib");
    for number in 0..40 {
        layer = layer.file(&format!("lib/{number}"), noise(100 + number, 30_000));
    }
    layer.finish()
}

fn evil_base() -> Result<Vec<u8>> {
    TarLayer::new().directory("bin").program("bin/sh", "EVIL SHELL").finish()
}

/// Publishes the honest images below `originals/`.
pub(crate) fn honest(scratch: &Scratch, registry: &TestRegistry) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let eventful = eventful_layers()?.into_iter().zip(Compression::ALL);
    let eventful = eventful.fold(ImageBuilder::new(), |image, (tar, compression)| image.layer(tar, compression));
    sources.push(Source::pushed(registry, eventful.write(scratch, "eventful")?, "eventful")?);
    for number in 0..APPS {
        let name = format!("app-{number}");
        let len = if number == 0 { LARGE_LEN } else { 500_000 * usize::try_from(number).unwrap_or_default() };
        let app = TarLayer::new()
            .directory("app")
            .file("app/text", name.repeat(100_000))
            .file("app/data", noise(number, len));
        let compression = Compression::ALL[usize::try_from(number).unwrap_or_default() % 3];
        let image = ImageBuilder::new().layer(base()?, Compression::Gzip).layer(app.finish()?, compression);
        sources.push(Source::pushed(registry, image.write(scratch, &name)?, &name)?);
    }
    Ok(sources)
}

/// Makes the hostile ones; what containerd takes of them is published below `originals/` too.
pub(crate) fn hostile(scratch: &Scratch, registry: &TestRegistry) -> Result<Vec<Source>> {
    let honest = converted(scratch, "base-lazy", base()?)?;
    let said = layout_manifest(&honest)?["layers"][0].clone();
    let mut sources = Vec::new();

    // A lazy layer that says of itself that it was made from the base layer; then the base layer at the same tag.
    let poisoned = poisoned(scratch, "evil", &said)?;
    sources.push(Source { name: "evil".to_owned(), ..Source::pushed(registry, poisoned, "evil-1")? });
    let genuine = ImageBuilder::new().layer(base()?, Compression::Gzip).write(scratch, "evil-2")?;
    sources.push(Source { name: "evil".to_owned(), ..Source::pushed(registry, genuine, "evil-2")? });

    // The true tar stream, with other bytes in its hot pack.
    let lying = converted(scratch, "hot-lie", base()?)?;
    let blob = fs::read(layout_blob(&lying, digest_in(&said)?)).context("reading a layer")?;
    let mut blob = LazyBlob::open(&blob)?;
    blob.add_hot("/bin/sh", 700_000, 0)?;
    blob.hot.iter_mut().for_each(|(_, content)| content.fill(b'E'));
    let (bytes, layer) = blob.assemble(|_, _| {})?;
    replace(&lying, &bytes, &layer, &said)?;
    sources.push(Source::pushed(registry, lying, "hot-lie")?);

    // A lazy layer that says that it lies elsewhere; nobody must take it for the base layer.
    let elsewhere = self::poisoned(scratch, "elsewhere", &said)?;
    edit_manifest(&elsewhere, |manifest| {
        manifest["layers"][0]["urls"] = Value::from(vec!["https://registry.example/x"]);
    })?;
    let places = vec![elsewhere];
    sources.push(Source { name: "elsewhere".to_owned(), pushed: None, places, is_refused: false });

    // Kilobytes that become more.
    let imports = "x:".to_owned() + &"import a:".repeat(6000);
    let python = TarLayer::new().directory("usr").directory("usr/bin").program("usr/bin/python3.11", noise(2, 10_000));
    let image = ImageBuilder::new().command(&["/usr/bin/python3.11", "/app.py"]);
    let image = image.layer(python.file("app.py", imports).finish()?, Compression::Gzip).write(scratch, "imports")?;
    sources.push(Source::pushed(registry, image, "imports")?);
    let zeros = TarLayer::new().file("zeros", vec![0; ZEROS_LEN]).finish()?;
    let image = ImageBuilder::new().layer(zeros, Compression::Zstd).write(scratch, "zeros")?;
    sources.push(Source::pushed(registry, image, "zeros")?);

    // Images that must not be converted at all.
    sources.push(Source::refused(doubled(scratch, &said)?, "doubled"));
    sources.push(Source::refused(two_diff_ids(scratch)?, "two-diff-ids"));
    sources.push(Source::refused(damaged(scratch)?, "damaged"));
    let endless = ImageBuilder::new().layer(base()?, Compression::Gzip).write(scratch, "endless")?;
    let index = scratch.join("endless/index.json");
    fs::remove_file(&index).at("removing", &index)?;
    symlink("/dev/zero", &index).at("linking", &index)?;
    sources.push(Source::refused(endless, "endless"));
    Ok(sources)
}

/// An image of this layer, converted into the layout `<scratch>/<name>`.
fn converted(scratch: &Scratch, name: &str, tar: Vec<u8>) -> Result<String> {
    let original = ImageBuilder::new().layer(tar, Compression::Gzip).write(scratch, &format!("{name}-original"))?;
    let lazy = format!("oci:{}:latest", scratch.join(name).display());
    lazuli_ok(["convert", &original, &lazy])?;
    Ok(lazy)
}

/// A converted image with another base layer, of which it says what `said`, the true one, says of itself.
fn poisoned(scratch: &Scratch, name: &str, said: &Value) -> Result<String> {
    let evil = converted(scratch, name, evil_base()?)?;
    edit_manifest(&evil, |manifest| say(&mut manifest["layers"][0], said))?;
    Ok(evil)
}

fn say(layer: &mut Value, said: &Value) {
    for key in [SOURCE_DIGEST, SOURCE_DIFF_ID, SOURCE_OPTIONS] {
        layer["annotations"][key] = said["annotations"][key].clone();
    }
}

fn replace(layout: &str, blob: &[u8], layer: &LazyLayer, said: &Value) -> Result<()> {
    replace_layer(layout, 0, blob, layer)?;
    edit_manifest(layout, |manifest| say(&mut manifest["layers"][0], said))
}

/// An image whose manifest some programs read in another way than others.
fn doubled(scratch: &Scratch, evil: &Value) -> Result<String> {
    let layout = Layout::create(scratch.join("doubled"))?;
    let descriptor = ImageBuilder::new().layer(base()?, Compression::Gzip).add_to(&layout)?;
    let reference = layout.reference();
    let path = layout_blob(&reference, digest_in(&descriptor)?);
    let text = fs::read_to_string(&path).at("reading", &path)?;
    let text = text.replacen(r#""layers":"#, &format!(r#""Layers":[{evil}],"layers":"#), 1);
    layout.tag(layout.add(lazuli_tests::image::MANIFEST, text.as_bytes())?)?;
    Ok(reference)
}

/// An image that has one blob twice, and says of it that it has two tar streams.
fn two_diff_ids(scratch: &Scratch) -> Result<String> {
    let twice = ImageBuilder::new().layer(base()?, Compression::Gzip).layer(base()?, Compression::Gzip);
    let reference = twice.write(scratch, "two-diff-ids")?;
    let manifest = layout_manifest(&reference)?;
    let path = layout_blob(&reference, digest_in(&manifest["config"])?);
    let config = fs::read(&path).at("reading", &path)?;
    let mut config: Value =
        serde_json::from_slice(&config).map_err(|error| HarnessError::Unexpected(error.to_string()))?;
    config["rootfs"]["diff_ids"][1] = Digest::of(b"anything").to_string().into();
    let descriptor = lazuli_tests::image::put_blob(&reference, config.to_string().as_bytes())?;
    edit_manifest(&reference, |manifest| {
        for key in ["digest", "size"] {
            manifest["config"][key] = descriptor[key].clone();
        }
    })?;
    Ok(reference)
}

/// An image whose layer is not what its digest says; nobody has converted what it should be.
fn damaged(scratch: &Scratch) -> Result<String> {
    let tar = TarLayer::new().file("data", noise(9, 1_000_000)).finish()?;
    let reference = ImageBuilder::new().layer(tar, Compression::Gzip).write(scratch, "damaged")?;
    let path = layout_blob(&reference, digest_in(&layout_manifest(&reference)?["layers"][0])?);
    let mut blob = fs::read(&path).at("reading", &path)?;
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    fs::write(&path, blob).at("writing", &path)?;
    Ok(reference)
}
