//! `lazuli convert`: the same image comes out, and everyone can use it.

use std::{collections::BTreeMap, io::Read as _};

use format_spec::{Digest, DigestHasher, LazyLayer};
use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, ImageBuilder, Result, Scratch, TestRegistry, compare_trees,
    containerd::OVERLAYFS,
    error::Context as _,
    image::{layout_blob, layout_manifest},
    process::{command, run},
    programs::lazuli_ok,
    registry_server::digest_in,
    samples::{eventful_layers, readable_layers},
};
use serde_json::Value;

/// The sample layers, each compressed in another way.
fn mixed_image() -> Result<ImageBuilder> {
    let layers = eventful_layers()?.into_iter().zip(Compression::ALL);
    Ok(layers.fold(ImageBuilder::new(), |image, (tar, compression)| image.layer(tar, compression)))
}

fn runnable_image() -> Result<ImageBuilder> {
    let image = ImageBuilder::new().command(&["/bin/sh", "-c", "cat /etc/greeting; sha256sum /large/3"]);
    Ok(readable_layers()?.into_iter().fold(image, |image, tar| image.layer(tar, Compression::Gzip)))
}

fn annotations(descriptor: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(descriptor["annotations"].clone()).unwrap_or_default()
}

/// The digest of what a zstd blob decompresses to, skippable frames skipped.
fn plain_digest(blob: &[u8]) -> Result<Digest> {
    let mut decoder = zstd::Decoder::new(blob).context("reading zstd")?;
    let mut hasher = DigestHasher::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match decoder.read(&mut buffer).context("reading zstd")? {
            0 => return Ok(hasher.finish()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

/// Converts from registry to registry, then looks at what is stored: the config is the same blob,
/// every layer is zstd, decompresses to its old diff ID and says in its annotations how to mount it.
#[test]
fn config_and_diff_ids_stay() -> Result<()> {
    let scratch = Scratch::new("config-and-diff-ids-stay")?;
    let registry = TestRegistry::start(&scratch)?;
    let original = registry.push(&mixed_image()?.write(&scratch, "image")?, "sample:original")?;
    lazuli_ok(["convert", &original, &registry.reference("sample:lazy")])?;

    let (before, after) = (registry.manifest("sample:original")?, registry.manifest("sample:lazy")?);
    assert_eq!(digest_in(&before["config"])?, digest_in(&after["config"])?);
    let config = registry.config("sample:lazy")?;
    let layers = after["layers"].as_array().expect("a manifest has layers");
    assert_eq!(layers.len(), 3);
    for (layer, diff_id) in layers.iter().zip(config["rootfs"]["diff_ids"].as_array().expect("diff IDs")) {
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
        let blob = std::fs::read(registry.blob_file(digest_in(layer)?)).context("reading a blob")?;
        assert_eq!(Digest::of(&blob), digest_in(layer)?);
        assert_eq!(plain_digest(&blob)?.to_string(), diff_id.as_str().expect("a diff ID is a text"));
        let annotations = annotations(layer);
        let lazy = LazyLayer::from_annotations(|key| annotations.get(key).map(String::as_str));
        let lazy = lazy.expect("annotations are well-formed").expect("the layer is lazy");
        assert_eq!((lazy.blob, lazy.blob_len), (digest_in(layer)?, blob.len() as u64));
        let index =
            usize::try_from(lazy.index.offset).expect("fits")..usize::try_from(lazy.index.range().end).expect("fits");
        assert_eq!(Digest::of(&blob[index]), lazy.index.digest);
    }
    Ok(())
}

#[test]
fn converting_twice_gives_the_same_bytes_and_uploads_no_layer_again() -> Result<()> {
    let scratch = Scratch::new("converting-twice")?;
    let registry = TestRegistry::start(&scratch)?;
    let original = registry.push(&mixed_image()?.write(&scratch, "image")?, "sample:original")?;
    lazuli_ok(["convert", &original, &registry.reference("sample:first"), "--jobs", "1"])?;
    let before = registry.served()?.len();
    lazuli_ok(["convert", &original, &registry.reference("sample:second"), "--jobs", "4"])?;
    let uploads: Vec<_> = registry.served()?.split_off(before);
    let uploads: Vec<_> = uploads.iter().filter(|served| served.method != "HEAD" && served.method != "GET").collect();
    assert!(uploads.iter().all(|served| served.path.contains("/manifests/")), "{uploads:?}");
    assert_eq!(registry.manifest("sample:first")?, registry.manifest("sample:second")?);
    Ok(())
}

#[test]
fn layouts_and_registries_hold_the_same_result() -> Result<()> {
    let scratch = Scratch::new("layouts-and-registries")?;
    let registry = TestRegistry::start(&scratch)?;
    let source = mixed_image()?.write(&scratch, "image")?;
    let layout = format!("oci:{}:lazy", scratch.join("lazy").display());
    lazuli_ok(["convert", &source, &layout])?;
    lazuli_ok(["convert", &source, &registry.reference("sample:lazy")])?;
    let back = format!("oci:{}:latest", scratch.join("back").display());
    let original = registry.push(&source, "sample:original")?;
    lazuli_ok(["convert", &original, &back])?;
    assert_eq!(layout_manifest(&layout)?, registry.manifest("sample:lazy")?);
    // skopeo compresses bare layers when it pushes: the annotations name other original blobs.
    let blobs = |layout: &str| -> Result<Vec<Digest>> {
        layout_manifest(layout)?["layers"].as_array().into_iter().flatten().map(digest_in).collect()
    };
    assert_eq!(blobs(&layout)?, blobs(&back)?);
    for layer in layout_manifest(&layout)?["layers"].as_array().expect("a manifest has layers") {
        let blob = std::fs::read(layout_blob(&layout, digest_in(layer)?)).context("reading a blob")?;
        assert_eq!(Digest::of(&blob), digest_in(layer)?);
    }
    Ok(())
}

/// Copies the converted image with skopeo to another repository and layout, pulls it with a
/// containerd that knows nothing of Lazuli, runs it, and compares its tree with the original's.
#[test]
fn converted_image_is_an_ordinary_image_to_others() -> Result<()> {
    let scratch = Scratch::new("ordinary-to-others")?;
    let registry = TestRegistry::start(&scratch)?;
    let original = registry.push(&runnable_image()?.write(&scratch, "image")?, "sample:original")?;
    let lazy = registry.reference("sample:lazy");
    lazuli_ok(["convert", &original, &lazy])?;

    let copy = format!("docker://{}", registry.reference("copied:lazy"));
    let copy_options = ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
    run(command("skopeo", copy_options).arg(format!("docker://{lazy}")).arg(copy))?;
    assert_eq!(registry.manifest("copied:lazy")?, registry.manifest("sample:lazy")?);

    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    let mut outputs = Vec::new();
    let mut views = Vec::new();
    for (name, reference) in [("original", original), ("converted", registry.reference("copied:lazy"))] {
        containerd.pull(&reference, OVERLAYFS)?;
        let finished = containerd.run(&reference, OVERLAYFS, name, &[])?;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        outputs.push(finished.stdout);
        let view = scratch.directory(name)?;
        containerd.mount_image(&reference, OVERLAYFS, &view)?;
        views.push(view);
    }
    assert!(outputs[0].starts_with("good morning\n"), "{}", outputs[0]);
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(compare_trees(&views[0], &views[1])?, []);
    Ok(())
}
