//! Images as they come: indexes with odd entries, documents that other tools take, and what becomes of them.

#![allow(clippy::unwrap_used, reason = "only tests use it")]

mod scene;

use std::fs;

use converter::manifest::Descriptor;
use format_spec::Digest;
use scene::Scene;
use serde_json::{Value, json};

/// An entry of an index.
fn entry(descriptor: &Descriptor, platform: Value) -> Value {
    let mut entry = serde_json::to_value(descriptor).unwrap();
    entry["platform"] = platform;
    entry
}

/// What the file `which` says in the image that `lazuli convert` takes, or the error.
fn which(scene: &Scene, arguments: &[&str]) -> String {
    let _ = fs::remove_dir_all(scene.path("dst"));
    let output = scene.lazuli(&[&["convert", "oci:src", "oci:dst"], arguments].concat());
    if !output.status.success() {
        return String::from_utf8(output.stderr).unwrap();
    }
    let layer = scene.converted().layers.remove(0);
    let tar = zstd::decode_all(fs::File::open(scene.blob("dst", &layer.digest)).unwrap()).unwrap();
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut file = archive.entries().unwrap().next().unwrap().unwrap();
    std::io::read_to_string(&mut file).unwrap()
}

/// The digest of the image that a command which only reads takes from `image`.
fn taken(scene: &Scene, image: &str, platform: &str) -> Value {
    let digests = ["inspect", "check"].map(|command| {
        let output = scene.lazuli(&[command, image, "--platform", platform, "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["digest"].clone()
    });
    assert_eq!(digests[0], digests[1]);
    digests[0].clone()
}

#[test]
fn the_best_image_of_an_index_is_taken_and_not_the_first() {
    let scene = Scene::new();
    let amd64 = |variant: &str| {
        let image = scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), variant);
        let mut platform = json!({"os": "linux", "architecture": "amd64", "variant": variant});
        if variant == "plain" {
            platform.as_object_mut().unwrap().remove("variant");
        }
        entry(&image, platform)
    };
    scene.put_index_of(["v3", "v2", "plain"].map(amd64).into());
    for (platform, expected) in [
        ("linux/amd64", "plain"),
        ("Linux/x86_64", "plain"),
        ("linux/amd64/v2", "v2"),
        ("linux/amd64/v3", "v3"),
        ("linux/amd64/v4", "v3"),
    ] {
        assert_eq!(which(&scene, &["--platform", platform]), expected, "{platform}");
    }
}

/// Configs without a variant are what docker wrote until 2020, and what many builders write.
#[test]
fn the_index_says_the_variant_and_not_the_config() {
    let scene = Scene::new();
    let variants = ["v5", "v6", "v7"];
    let images = variants.map(|text| scene.put_marked(json!({"os": "linux", "architecture": "arm"}), text));
    let entries = images.iter().zip(variants);
    let platform = |variant: &str| json!({"os": "linux", "architecture": "arm", "variant": variant});
    scene.put_index_of(entries.map(|(image, variant)| entry(image, platform(variant))).collect());
    assert_eq!(which(&scene, &["--platform", "linux/arm"]), "v7");
    for (image, variant) in images.iter().zip(variants) {
        let wanted = format!("linux/arm/{variant}");
        assert_eq!(which(&scene, &["--platform", &wanted]), variant);
        assert_eq!(taken(&scene, "oci:src", &wanted), json!(image.digest));
    }
    // And so afterwards, when all have been converted.
    let _ = fs::remove_dir_all(scene.path("dst"));
    let report = scene.convert(&["--all-platforms"]);
    for (number, variant) in variants.iter().enumerate() {
        let wanted = format!("linux/arm/{variant}");
        assert_eq!(taken(&scene, "oci:dst:v1", &wanted), report["images"][number]["digest"]);
        let output = scene.lazuli(&["check", "oci:dst:v1", "--against", "oci:src", "--platform", &wanted]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn entries_that_say_no_platform_are_told_by_their_configs() {
    let scene = Scene::new();
    let artifact = scene
        .put(registry::media_type::OCI_MANIFEST, br#"{"schemaVersion":2,"config":{"mediaType":"application/wasm"}}"#);
    let gone = Descriptor { digest: Digest::of(b"nowhere"), ..artifact.clone() };
    let windows = scene.put_marked(json!({"os": "windows", "architecture": "amd64"}), "windows");
    let later = scene.put_marked(json!({"os": "linux", "architecture": "amd64", "variant": "v3"}), "v3");
    let linux = scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), "linux");
    let plain = |descriptor: &Descriptor| serde_json::to_value(descriptor).unwrap();
    scene.put_index_of([&artifact, &gone, &windows, &later, &linux].map(plain).into());
    assert_eq!(which(&scene, &["--platform", "linux/amd64"]), "linux");
    assert_eq!(which(&scene, &["--platform", "windows/amd64"]), "windows");
    assert_eq!(
        which(&scene, &["--platform", "linux/arm64"]),
        "lazuli: oci:src: no image for linux/arm64; there is: windows/amd64, linux/amd64/v3, linux/amd64; choose one \
         with --platform\n"
    );
}

#[test]
fn an_odd_entry_is_refused_only_where_it_is_the_one() {
    let scene = Scene::new();
    let linux = json!({"os": "linux", "architecture": "amd64"});
    let good = entry(&scene.put_marked(linux.clone(), "linux"), linux.clone());
    let mut empty = good.clone();
    empty["platform"] = json!({});
    let mut sha512 = good.clone();
    sha512["digest"] = format!("sha512:{}", "ab".repeat(64)).into();
    sha512["platform"] = json!({"os": "linux", "architecture": "arm64", "variant": null});
    scene.put_index_of(vec![empty, sha512.clone(), json!("text"), good]);
    assert_eq!(which(&scene, &["--platform", "linux/amd64"]), "linux");
    for arguments in [&["--platform", "linux/arm64"][..], &["--all-platforms"]] {
        let error = which(&scene, arguments);
        assert!(error.contains(": entry 2: \"sha512:abab") && error.contains("is no digest"), "{error}");
    }
}
