//! The `lazuli convert` command on OCI layouts made here: what it keeps, what it refuses, what it leaves behind.
//!
//! Registries are the business of the end-to-end tests; images of all kinds are in `images.rs`.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
};

use crate::scene::{Scene, gzip, layer_type, list, tar};
use converter::image::manifest::{Descriptor, ImageIndex, ImageManifest, IndexEntry, media_type};
use format_spec::{Digest, LazyLayer};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, Signal, kill_process},
};
use serde_json::{Value, json};

#[test]
fn the_image_stays_the_same_image() {
    let scene = Scene::new();
    let report = scene.convert(&[]);
    let converted = scene.converted();
    assert_eq!(report["digest"], Digest::of(&serde_json::to_vec(&converted).unwrap()).to_string());
    let config = fs::read(scene.blob("dst", &converted.config.digest)).unwrap();
    assert_eq!(Digest::of(&config), converted.config.digest);
    assert_eq!(config, fs::read(scene.blob("src", &converted.config.digest)).unwrap());
    assert_eq!(converted.annotations.unwrap()["note"], "kept");
    for (layer, tar) in converted.layers.iter().zip(scene.tars()) {
        let blob = fs::read(scene.blob("dst", &layer.digest)).unwrap();
        assert_eq!((layer.media_type.as_str(), layer.size), (media_type::OCI_LAYER_ZSTD, blob.len() as u64));
        assert_eq!(Digest::of(&blob), layer.digest);
        assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), tar);
        let lazy = LazyLayer::from_annotations(|key| layer.annotation(key)).unwrap().unwrap();
        assert_eq!((lazy.blob, lazy.blob_len), (layer.digest, layer.size));
    }
    // Manifest, config and three layers, and nothing that is only half there.
    assert_eq!(list(&scene.path("dst")), ["blobs", "index.json", "oci-layout"]);
    assert_eq!(list(&scene.path("dst/blobs/sha256")).len(), 5);
}

#[test]
fn any_number_of_jobs_gives_the_same_image() {
    let scene = Scene::new();
    let expected = scene.convert(&["--jobs", "1"])["digest"].clone();
    for jobs in ["2", "5"] {
        fs::remove_dir_all(scene.path("dst")).unwrap();
        assert_eq!(scene.convert(&["--jobs", jobs])["digest"], expected, "{jobs}");
    }
}

#[test]
fn what_is_there_is_not_written_again() {
    let scene = Scene::new();
    let first = scene.convert(&[]);
    let second = scene.convert(&[]);
    assert_eq!(first["digest"], second["digest"]);
    assert_eq!(
        (first["uploaded_bytes"].clone(), second["uploaded_bytes"].clone()),
        (first["compressed_len"].clone(), json!(0))
    );
    let index: ImageIndex = serde_json::from_slice(&fs::read(scene.path("dst/index.json")).unwrap()).unwrap();
    assert_eq!(index.manifests.len(), 1);
}

#[test]
fn a_lazy_image_is_carried_over() {
    let scene = Scene::new();
    let first = scene.convert(&[]);
    let output = scene.lazuli(&["convert", "oci:dst:v1", "oci:third", "--json"]);
    let second: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(first["digest"], second["digest"]);
    assert_eq!(
        (&second["images"][0]["layers"][0]["is_converted"], &second["images"][0]["layers"][0]["is_uploaded"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(list(&scene.path("third/blobs/sha256")), list(&scene.path("dst/blobs/sha256")));
}

/// What a node is told of a layer.
fn labels_of(layer: &Descriptor) -> BTreeMap<String, String> {
    let annotations = layer.annotations.clone().unwrap_or_default().into_iter();
    annotations.filter(|(key, _)| key.starts_with("containerd.io/snapshot/")).collect()
}

/// Without annotations the footer of a blob says that it is lazy, but only after the blob was read.
#[test]
fn a_lazy_image_that_lost_its_annotations_gets_them_back() {
    let scene = Scene::new();
    scene.convert(&[]);
    let converted = scene.converted();
    let bare: Vec<_> = converted.layers.iter().map(|layer| Descriptor { annotations: None, ..layer.clone() }).collect();
    for layer in &bare {
        fs::copy(scene.blob("dst", &layer.digest), scene.blob("src", &layer.digest)).unwrap();
    }
    scene.put_image(bare, &scene.tars().map(|tar| Digest::of(&tar)));
    fs::remove_dir_all(scene.path("dst")).unwrap();
    let report = scene.convert(&[]);
    assert!(
        report["images"][0]["layers"].as_array().unwrap().iter().all(|layer| layer["is_converted"] == false),
        "{report}"
    );
    let labels = |image: &ImageManifest| image.layers.iter().map(labels_of).collect::<Vec<_>>();
    assert_eq!(labels(&scene.converted()), labels(&converted));

    fs::remove_dir_all(scene.path("dst")).unwrap();
    let digest = converted.layers[0].digest;
    let mut blob = fs::read(scene.blob("src", &digest)).unwrap();
    blob[20] ^= 1;
    fs::write(scene.blob("src", &digest), &blob).unwrap();
    let found = Digest::of(&blob);
    scene.check_refusal(
        &["oci:src", "oci:dst:v1"],
        &format!("oci:src: blob {digest} has digest {found}: the source is damaged"),
    );
}

#[test]
fn a_layer_used_twice_is_converted_once() {
    let scene = Scene::new();
    let layer = scene.put(&layer_type("+gzip"), &gzip(&tar(&[])));
    let diff_id = Digest::of(&tar(&[]));
    scene.put_image(vec![layer.clone(), layer], &[diff_id, diff_id]);
    scene.convert(&[]);
    let converted = scene.converted();
    assert_eq!(converted.layers[0], converted.layers[1]);
    assert_eq!(list(&scene.path("dst/blobs/sha256")).len(), 3);
}

#[test]
fn docker_media_types_become_those_of_oci() {
    let scene = Scene::new();
    let tar = tar(&[("a", 1)]);
    let layer = scene.put("application/vnd.docker.image.rootfs.diff.tar.gzip", &gzip(&tar));
    let image = scene.put_image(vec![layer], &[Digest::of(&tar)]);
    let mut manifest = scene.manifest("src", &image.digest);
    manifest.media_type = Some(registry::media_type::DOCKER_MANIFEST.to_owned());
    manifest.config.media_type = media_type::DOCKER_CONFIG.to_owned();
    let bytes = serde_json::to_vec(&manifest).unwrap();
    scene.put_index(vec![scene.put(registry::media_type::DOCKER_MANIFEST, &bytes)]);
    scene.convert(&[]);
    let converted = scene.converted();
    assert_eq!(converted.media_type.as_deref(), Some(registry::media_type::OCI_MANIFEST));
    assert_eq!(converted.config.media_type, media_type::OCI_CONFIG);
    assert_eq!(converted.config.digest, manifest.config.digest);
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let scene = Scene::new();
    let platform = |architecture: &str| serde_json::from_value(json!({"os": "linux", "architecture": architecture}));
    let images = ["s390x", "riscv64"].map(|architecture| {
        let tar = tar(&[(architecture, 1)]);
        let layer = scene.put(&layer_type("+gzip"), &gzip(&tar));
        let mut image = scene.put_image(vec![layer], &[Digest::of(&tar)]);
        image.platform = Some(platform(architecture).unwrap());
        image
    });
    let index = ImageIndex {
        schema_version: 2,
        media_type: Some(registry::media_type::OCI_INDEX.to_owned()),
        manifests: images.map(IndexEntry::Known).into(),
        annotations: None,
        rest: BTreeMap::new(),
    };
    scene.put_index(vec![scene.put(registry::media_type::OCI_INDEX, &serde_json::to_vec(&index).unwrap())]);
    let refused = "oci:src: no image for linux/arm64; there is: linux/s390x, linux/riscv64; choose one with --platform";
    scene.check_refusal(&["oci:src", "oci:dst", "--platform", "linux/arm64"], refused);
    // The config in it says amd64, but an index is believed.
    assert_eq!(scene.convert(&["--platform", "linux/s390x"])["images"].as_array().map(Vec::len), Some(1));
    // Where there is no index, the config is all there is.
    let scene = Scene::new();
    let refused = "oci:src: no image for linux/s390x; there is: linux/amd64; choose one with --platform";
    scene.check_refusal(&["oci:src", "oci:dst", "--platform", "linux/s390x"], refused);
}

#[test]
fn refuses_what_is_not_there() {
    let scene = Scene::new();
    scene.check_refusal(&["oci:none", "oci:dst"], "oci:none: none: no OCI image layout in this directory");
    let digest = scene.put_image(Vec::new(), &[]).digest;
    let refused = format!("oci:src:v2: src: no image tagged v2; there is: @{digest}");
    scene.check_refusal(&["oci:src:v2", "oci:dst"], &refused);
    fs::create_dir(scene.path("src/other")).unwrap();
    scene.check_refusal(&["oci:src", "oci:src/blobs"], "oci:src: src/blobs: no OCI image layout in this directory");
}

/// Replaces the first layer's blob in place.
fn damage(scene: &Scene, change: impl FnOnce(&mut Vec<u8>)) -> (Digest, Vec<u8>) {
    let digest = Digest::of(&gzip(&scene.tars()[0]));
    let path = scene.blob("src", &digest);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, &bytes).unwrap();
    (digest, bytes)
}

#[test]
fn refuses_damaged_layers_and_leaves_nothing() {
    let scene = Scene::new();
    let (digest, bytes) = damage(&scene, |bytes| bytes[1000] ^= 1);
    let found = Digest::of(&bytes);
    let refused = format!("oci:src: layer {digest}: its content has digest {found}: the source is damaged");
    scene.check_refusal(&["oci:src", "oci:dst/deep/er"], &refused);

    let scene = Scene::new();
    let (digest, bytes) = damage(&scene, |bytes| bytes.truncate(2000));
    let len = gzip(&scene.tars()[0]).len();
    let refused =
        format!("oci:src: layer {digest}: it ends after {} of {len} bytes: the source is damaged", bytes.len());
    scene.check_refusal(&["oci:src", "oci:dst"], &refused);
}

#[test]
fn refuses_layers_that_are_not_what_the_config_says() {
    let scene = Scene::new();
    let tar = tar(&[("a", 1)]);
    let layer = scene.put(&layer_type("+gzip"), &gzip(&tar));
    let other = Digest::of(b"other");
    scene.put_image(vec![layer.clone()], &[other]);
    let digest = layer.digest;
    let refused = format!(
        "oci:src: layer {digest}: its tar stream has digest {}, the config says {other}: the image is damaged",
        Digest::of(&tar)
    );
    scene.check_refusal(&["oci:src", "oci:dst"], &refused);
    let image = scene.put_image(vec![layer.clone(), layer], &[other]);
    let refused = format!("oci:src: manifest {}: it has 2 layers, its config says 1", image.digest);
    scene.check_refusal(&["oci:src", "oci:dst"], &refused);
    let text = b"no tar at all, whatever its media type says";
    let layer = scene.put(&layer_type("+gzip"), text);
    scene.put_image(vec![layer.clone()], &[Digest::of(text)]);
    let reason = "tar entry at byte 0: the stream ends within a header";
    scene.check_refusal(&["oci:src", "oci:dst"], &format!("oci:src: layer {}: {reason}", layer.digest));
}

#[test]
fn what_is_no_image_is_copied_as_it_is() {
    let scene = Scene::new();
    let config = scene.put("application/vnd.wasm.config.v1+json", b"{}");
    let mut manifest = scene.manifest("src", &scene.put_image(Vec::new(), &[]).digest);
    manifest.config = config.clone();
    manifest.layers = vec![scene.put("application/wasm", b"module")];
    let image = scene.put(registry::media_type::OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap());
    scene.put_index(vec![image.clone()]);
    let report = scene.convert(&[]);
    assert_eq!(report["artifacts"], json!([{"digest": image.digest, "copied_bytes": 8, "kind": config.media_type}]));
    assert_eq!((&report["digest"], &report["images"]), (&json!(image.digest), &json!([])));
    for digest in [image.digest, config.digest, manifest.layers[0].digest] {
        assert_eq!(fs::read(scene.blob("dst", &digest)).unwrap(), fs::read(scene.blob("src", &digest)).unwrap());
    }
}

#[test]
fn a_failure_leaves_an_existing_layout_as_it_was() {
    let scene = Scene::new();
    scene.convert(&[]);
    let before = (list(&scene.path("dst/blobs/sha256")), fs::read(scene.path("dst/index.json")).unwrap());
    let good = tar(&[("new", 1_000_000)]);
    let layers = vec![scene.put(&layer_type("+gzip"), &gzip(&good)), scene.put(&layer_type(""), b"no tar")];
    scene.put_image(layers, &[Digest::of(&good), Digest::of(b"no tar")]);
    let output = scene.lazuli(&["convert", "oci:src", "oci:dst:v2", "--jobs", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((list(&scene.path("dst/blobs/sha256")), fs::read(scene.path("dst/index.json")).unwrap()), before);
}

#[test]
fn an_interrupted_command_leaves_nothing() {
    let scene = Scene::new();
    // A blob that does not come: opening the pipe for writing waits until the command reads it.
    let blob = scene.blob("src", &Digest::of(&gzip(&scene.tars()[0])));
    fs::remove_file(&blob).unwrap();
    mknodat(CWD, &blob, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
    command.args(["convert", "--json", "oci:src", "oci:dst"]).current_dir(scene.directory.path());
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let writer = fs::File::options().write(true).open(&blob).unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    drop(writer);
    let found = (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code());
    assert_eq!(found, ("lazuli: interrupted\n".to_owned(), Some(1)));
    assert_eq!(list(scene.directory.path()), ["src"]);
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let scene = Scene::new();
    for arguments in [
        &["convert"][..],
        &["convert", "oci:src"],
        &["convert", "src", "oci:dst"],
        &["convert", "oci:src", "oci:dst", "--level", "99"],
        &["convert", "oci:src", "oci:dst", "--jobs", "0"],
        &["convert", "oci:src", "oci:dst", "--platform", "amd64"],
        &["levitate"],
    ] {
        assert_eq!(scene.lazuli(arguments).status.code(), Some(2), "{arguments:?}");
    }
    assert_eq!(list(scene.directory.path()), ["src"]);
}

#[test]
fn mounting_an_ordinary_image_says_what_to_do() {
    let scene = Scene::new();
    fs::create_dir(scene.path("mnt")).unwrap();
    let output = scene.lazuli(&["mount", "oci:src", "mnt", "--cache", "cache"]);
    let digest = Digest::of(&gzip(&scene.tars()[0]));
    let expected =
        format!("lazuli: oci:src: layer {digest} is an ordinary layer: convert the image first, with lazuli convert\n");
    assert_eq!((String::from_utf8_lossy(&output.stderr).as_ref(), output.status.code()), (expected.as_str(), Some(1)));
}
