//! `--sign` and `--key`, with keys of openssl: who signs, what is signed, and what is not.

use std::{
    fs,
    process::{Command, Output},
};

use crate::scene::{Scene, tar};
use converter::image::manifest::ImageManifest;
use format_spec::{Digest, LayerSignatures, LazyLayer, signature};
use serde_json::Value;

fn openssl(scene: &Scene, words: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl").args(words).current_dir(scene.directory.path()).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Makes `NAME.pem` and `NAME.pub`; returns the id of the key.
fn make_key(scene: &Scene, name: &str) -> String {
    let (private, public) = (format!("{name}.pem"), format!("{name}.pub"));
    openssl(scene, &["genpkey", "-algorithm", "ed25519", "-out", &private]);
    openssl(scene, &["pkey", "-in", &private, "-pubout", "-out", &public]);
    Digest::of(&openssl(scene, &["pkey", "-pubin", "-in", &public, "-outform", "DER"])).hex()
}

fn ok(output: Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Converts, and returns the manifest that it became.
fn convert(scene: &Scene, source: &str, destination: &str, options: &[&str]) -> ImageManifest {
    let words = [&["convert", source, destination, "--json", "--cache", "cache"], options].concat();
    let report = ok(scene.lazuli(&words));
    let digest: Digest = report["digest"].as_str().unwrap().parse().unwrap();
    scene.manifest(destination.split(':').nth(1).unwrap(), &digest)
}

fn check(scene: &Scene, image: &str, options: &[&str]) -> Output {
    scene.lazuli(&[&["check", image, "--json"], options].concat())
}

fn keys_of(manifest: &ImageManifest) -> Vec<Vec<String>> {
    let keys = |signed: LayerSignatures| signed.signatures.iter().map(|signature| signature.key.to_string()).collect();
    let layers = manifest.layers.iter();
    layers
        .map(|layer| layer.annotation(signature::SIGNATURE).map_or(Vec::new(), |text| keys(text.parse().unwrap())))
        .collect()
}

#[test]
fn every_layer_is_signed_and_openssl_and_check_verify_it() {
    let scene = Scene::new();
    let (one, two) = (make_key(&scene, "one"), make_key(&scene, "two"));
    let image = convert(&scene, "oci:src", "oci:dst", &["--sign", "one.pem"]);
    assert_eq!(keys_of(&image), [[one.clone()], [one.clone()], [one.clone()]]);
    for (layer, tar) in image.layers.iter().zip(scene.tars()) {
        let lazy = LazyLayer::from_annotations(|key| layer.annotation(key)).unwrap().unwrap();
        let text = layer.annotation(signature::SIGNATURE).unwrap();
        let (_, hex) = text.split_once(&format!(",{one}:")).unwrap();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        fs::write(scene.path("signature"), (0..128).step_by(2).map(byte).collect::<Vec<_>>()).unwrap();
        let message = format!("lazuli layer signature v1\n{}\n{}\n", Digest::of(&tar), lazy.index.digest);
        fs::write(scene.path("message"), message).unwrap();
        let verify = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "one.pub", "-in", "message"];
        openssl(&scene, &[&verify[..], &["-sigfile", "signature"]].concat());
    }
    let report = ok(check(&scene, "oci:dst", &["--key", "two.pub", "--key", "one.pub", "--against", "oci:src"]));
    assert_eq!(report["images"][0]["layers"][2]["signatures"][0]["key"], one);
    assert_eq!(report["images"][0]["layers"][2]["signatures"][0]["is_verified"], true);
    // Without its key there is nothing to compare a signature with; another key is a demand that is not met.
    let report = ok(check(&scene, "oci:dst", &[]));
    assert_eq!(report["images"][0]["layers"][0]["signatures"][0]["is_verified"], Value::Null);
    let refused = check(&scene, "oci:dst", &["--key", "two.pub"]);
    assert_eq!(refused.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(report["images"][0]["layers"][0]["findings"][0]["part"], "signature");
    let inspected = ok(scene.lazuli(&["inspect", "oci:dst", "--json"]));
    assert_eq!(inspected["layers"][1]["signed_by"][0], one);
    assert_ne!(one, two);
}

#[test]
fn layers_of_the_cache_and_lazy_ones_are_signed_too_and_keep_other_signatures() {
    let scene = Scene::new();
    let (one, two) = (make_key(&scene, "one"), make_key(&scene, "two"));
    let unsigned = convert(&scene, "oci:src", "oci:dst", &[]);
    assert_eq!(keys_of(&unsigned), [[""; 0]; 3]);
    let cached = convert(&scene, "oci:src", "oci:dst", &["--sign", "one.pem"]);
    assert_eq!(keys_of(&cached), [[one.clone()], [one.clone()], [one.clone()]]);
    let again = convert(&scene, "oci:dst", "oci:next", &["--sign", "two.pem"]);
    assert_eq!(again.layers[0].digest, unsigned.layers[0].digest);
    assert_eq!(keys_of(&again), vec![vec![two.clone(), one.clone()]; 3]);
    ok(check(&scene, "oci:next", &["--key", "one.pub", "--key", "two.pub", "--against", "oci:dst"]));
    // Without a key they go along.
    let carried = convert(&scene, "oci:next", "oci:last", &[]);
    assert_eq!(keys_of(&carried), vec![vec![two, one]; 3]);
}

/// Whoever believes the key would believe the lie.
#[test]
fn a_lazy_layer_that_is_not_what_the_config_says_is_not_signed() {
    let scene = Scene::new();
    make_key(&scene, "one");
    let lazy = convert(&scene, "oci:src", "oci:dst", &[]).layers.remove(0);
    fs::copy(scene.blob("dst", &lazy.digest), scene.blob("src", &lazy.digest)).unwrap();
    let other = Digest::of(&tar(&[("another", 5)]));
    scene.put_image(vec![lazy.clone()], &[other]);
    convert(&scene, "oci:src", "oci:dst:trap", &[]);
    let refused = scene.lazuli(&["convert", "oci:src", "oci:dst:signed", "--sign", "one.pem"]);
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("it cannot be signed as it is: tar stream: its digest is"), "{message}");
    assert!(!fs::read_to_string(scene.path("dst/index.json")).unwrap().contains("\"signed\""));
}

#[test]
fn a_signature_of_another_layer_is_found() {
    let scene = Scene::new();
    make_key(&scene, "one");
    let signed = convert(&scene, "oci:src", "oci:dst", &["--sign", "one.pem"]);
    let text = |number: usize| signed.layers[number].annotation(signature::SIGNATURE).unwrap().to_owned();
    let mut moved = signed.clone();
    let mut set = |layer: usize, text: String| {
        moved.layers[layer].annotations.as_mut().unwrap().insert(signature::SIGNATURE.to_owned(), text);
    };
    set(0, text(1));
    set(1, "SHA256:".to_owned());
    for layer in &signed.layers {
        fs::copy(scene.blob("dst", &layer.digest), scene.blob("src", &layer.digest)).unwrap();
    }
    let manifest = serde_json::to_vec(&moved).unwrap();
    scene.put_index(vec![scene.put(registry::media_type::OCI_MANIFEST, &manifest)]);
    let refused = check(&scene, "oci:src", &["--key", "one.pub"]);
    assert_eq!(refused.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&refused.stdout).unwrap();
    let problems = |layer: usize| -> Vec<_> {
        let findings = report["images"][0]["layers"][layer]["findings"].as_array().unwrap();
        findings.iter().map(|finding| finding["problem"].as_str().unwrap().to_owned()).collect()
    };
    assert!(problems(0)[0].starts_with("it is about the tar stream sha256:"), "{:?}", problems(0));
    assert!(problems(0)[1].ends_with("does not verify"), "{:?}", problems(0));
    assert_eq!(problems(1), ["it does not begin with the digest of a tar stream"]);
    assert_eq!(problems(2), [""; 0]);
}

#[test]
fn a_file_that_is_no_key_is_named_in_one_line() {
    let scene = Scene::new();
    make_key(&scene, "one");
    openssl(&scene, &["genpkey", "-algorithm", "ed448", "-out", "ed448.pem"]);
    fs::write(scene.path("long"), vec![b' '; 1 << 20]).unwrap();
    let sign = |file: &str| scene.lazuli(&["convert", "oci:src", "oci:dst", "--sign", file]);
    let check = |file: &str| check(&scene, "oci:src", &["--key", file]);
    for (output, expected) in [
        (sign("none"), "key none: No such file"),
        (sign("one.pub"), "key one.pub: it is no Ed25519 private key"),
        (sign("ed448.pem"), "key ed448.pem: it is no Ed25519 private key"),
        (sign("long"), "key long: it is longer than 65536 bytes"),
        (check("one.pem"), "key one.pem: it is a private key, and a public one is wanted"),
        (check("long"), "key long: it is longer than 65536 bytes"),
    ] {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), message.lines().count()), (Some(1), 1), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    assert!(!scene.path("dst/index.json").exists());
}
