//! What an image says of itself, and what lies at a destination, is believed as far as it was compared.

#![allow(clippy::unwrap_used, reason = "only tests use it")]

mod scene;

use std::fs;

use converter::manifest::{Descriptor, ImageManifest};
use format_spec::{
    Digest,
    annotation::{SOURCE_DIFF_ID, SOURCE_DIGEST, SOURCE_OPTIONS},
};
use scene::{Scene, gzip, layer_type, tar};
use serde_json::{Value, json};

/// An image of one ordinary layer with this tar stream, as `src`.
fn put(scene: &Scene, tar: &[u8]) -> Descriptor {
    let layer = scene.put(&layer_type("+gzip"), &gzip(tar));
    scene.put_image(vec![layer.clone()], &[Digest::of(tar)]);
    layer
}

/// Converts `src` to a destination; returns its manifest and what was done with its only layer.
fn convert(scene: &Scene, destination: &str, arguments: &[&str]) -> (ImageManifest, Value) {
    let output = scene.lazuli(&[&["convert", "oci:src", destination, "--json"], arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layout = destination.split(':').nth(1).unwrap();
    let digest: Digest = report["digest"].as_str().unwrap().parse().unwrap();
    (scene.manifest(layout, &digest), report["images"][0]["layers"][0].clone())
}

fn content(scene: &Scene, layout: &str, layer: &Descriptor) -> Vec<u8> {
    zstd::decode_all(fs::read(scene.blob(layout, &layer.digest)).unwrap().as_slice()).unwrap()
}

/// Who may have an image converted could make everybody's base layer his own: his image says of its lazy layer that
/// it was made from the base layer, and with the next version of it the machine learned that.
#[test]
fn an_image_that_lies_about_its_origin_harms_nobody() {
    let scene = Scene::new();
    let (base, evil) = (tar(&[("bin/sh", 100)]), tar(&[("bin/sh", 101)]));
    put(&scene, &base);
    let (honest, _) = convert(&scene, "oci:elsewhere", &[]);
    put(&scene, &evil);
    let mut layer = convert(&scene, "oci:evil", &[]).0.layers.remove(0);
    for key in [SOURCE_DIGEST, SOURCE_DIFF_ID, SOURCE_OPTIONS] {
        let said = honest.layers[0].annotation(key).unwrap().to_owned();
        layer.annotations.as_mut().unwrap().insert(key.to_owned(), said);
    }
    fs::copy(scene.blob("evil", &layer.digest), scene.blob("src", &layer.digest)).unwrap();
    scene.put_image(vec![layer.clone()], &[Digest::of(&evil)]);
    let (first, _) = convert(&scene, "oci:dst:evil", &["--cache", "cache"]);
    assert_eq!(first.layers[0].digest, layer.digest);

    // The next version has the true base layer, and so has another image.
    put(&scene, &base);
    for destination in ["oci:dst:evil", "oci:dst:other"] {
        let (image, done) = convert(&scene, destination, &["--cache", "cache"]);
        assert_eq!(content(&scene, "dst", &image.layers[0]), base, "{destination}");
        assert_eq!(image.layers[0].digest, honest.layers[0].digest);
        // The second one comes from the directory, into which nothing came but what was made here.
        assert_eq!(done["cached"], destination == "oci:dst:other");
    }
}

#[test]
fn what_a_destination_says_is_used_once_it_was_compared() {
    let scene = Scene::new();
    put(&scene, &tar(&[("a", 1000)]));
    let (first, done) = convert(&scene, "oci:dst:v1", &[]);
    assert_eq!(done["cached"], false);
    let (second, done) = convert(&scene, "oci:dst:v1", &[]);
    assert_eq!((second, done["cached"].clone()), (first, json!(true)));
}

/// A layout may hold zeros by a blob's name after a power cut; its length alone says nothing.
#[test]
fn a_damaged_blob_at_the_destination_is_written_again() {
    let scene = Scene::new();
    let tar = tar(&[("a", 1000)]);
    put(&scene, &tar);
    for arguments in [&["--no-cache"][..], &["--cache", "cache"]] {
        let (image, _) = convert(&scene, "oci:dst", arguments);
        for digest in [image.layers[0].digest, image.config.digest] {
            let path = scene.blob("dst", &digest);
            let len = fs::metadata(&path).unwrap().len();
            fs::write(&path, vec![0; usize::try_from(len).unwrap()]).unwrap();
            convert(&scene, "oci:dst", arguments);
            assert_eq!(Digest::of(&fs::read(&path).unwrap()), digest, "{arguments:?}");
        }
        assert_eq!(content(&scene, "dst", &image.layers[0]), tar);
    }
}

/// docker's empty layer stands in many images several times.
#[test]
fn of_a_blob_that_is_there_twice_each_keeps_its_annotations_and_both_diff_ids_count() {
    let scene = Scene::new();
    let tar = tar(&[]);
    let layer = scene.put(&layer_type("+gzip"), &gzip(&tar));
    let noted = |note: &str| Descriptor {
        annotations: Some([("note".to_owned(), note.to_owned()), (note.to_owned(), "here".to_owned())].into()),
        ..layer.clone()
    };
    let layers = vec![noted("first"), noted("second")];
    scene.put_image(layers.clone(), &[Digest::of(&tar), Digest::of(&tar)]);
    let (image, _) = convert(&scene, "oci:dst", &[]);
    let said = |layer: &Descriptor| (layer.annotation("note").map(str::to_owned), layer.annotation("first").is_some());
    let found: Vec<_> = image.layers.iter().map(said).collect();
    assert_eq!(found, [(Some("first".to_owned()), true), (Some("second".to_owned()), false)]);
    let output = scene.lazuli(&["check", "oci:dst", "--against", "oci:src"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));

    let other = Digest::of(b"anything");
    scene.put_image(layers, &[Digest::of(&tar), other]);
    let output = scene.lazuli(&["convert", "oci:src", "oci:refused"]);
    let expected = format!(
        "lazuli: oci:src: layer {}: the config says that its tar stream has digest {}, and elsewhere {other}\n",
        layer.digest,
        Digest::of(&tar)
    );
    assert_eq!((String::from_utf8(output.stderr).unwrap(), output.status.code()), (expected, Some(1)));
}
