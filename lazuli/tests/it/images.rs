//! Images as they come: indexes with odd entries, documents that other tools take, and what becomes of them.

use std::{fs, io::Write};

use crate::scene::{Scene, gzip, layer_type, tar};
use base64::Engine;
use converter::image::manifest::{Descriptor, ImageManifest, media_type};
use format_spec::Digest;
use registry::media_type::{DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use serde_json::{Value, json};

/// An entry of an index.
fn entry(descriptor: &Descriptor, platform: Value) -> Value {
    let mut entry = serde_json::to_value(descriptor).unwrap();
    entry["platform"] = platform;
    entry
}

/// The content of the file `which` in the image that `lazuli convert` takes, or the error.
fn which(scene: &Scene, arguments: &[&str]) -> String {
    let _ = fs::remove_dir_all(scene.path("dst"));
    let output = scene.lazuli(&[&["convert", "oci:src", "oci:dst"], arguments].concat());
    if !output.status.success() {
        return String::from_utf8(output.stderr).unwrap();
    }
    which_of(scene, &scene.converted())
}

/// The content of the file `which` in this image of `dst`.
fn which_of(scene: &Scene, image: &ImageManifest) -> String {
    let tar = zstd::decode_all(fs::File::open(scene.blob("dst", &image.layers[0].digest)).unwrap()).unwrap();
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
    let artifact = scene.put(OCI_MANIFEST, br#"{"schemaVersion":2,"config":{"mediaType":"application/wasm"}}"#);
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

#[test]
fn annotations_that_describe_the_old_blob_go_and_the_others_stay() {
    let scene = Scene::new();
    let notes = json!({
        "io.github.containers.zstd-chunked.manifest-checksum": "sha256:22",
        "io.github.containers.zstd-chunked.manifest-position": "10:20:30:1",
        "io.containers.zstd-chunked.manifest-position": "10:20:30:1",
        "containerd.io/snapshot/stargz/toc.digest": "sha256:11",
        "io.containers.estargz.uncompressed-size": "7",
        "containerd.io/snapshot/overlaybd/blob-size": "7",
        "containerd.io/snapshot/nydus-blob": "true",
        "containerd.io/snapshot/lazuli/hot.len": "123456",
        "org.example.note": "kept",
    });
    let tar = tar(&[("a", 10)]);
    let mut layer = scene.put(&layer_type("+gzip"), &gzip(&tar));
    layer.annotations = serde_json::from_value(notes).unwrap();
    let image = scene.put_image_for(json!({"os": "linux", "architecture": "amd64"}), vec![layer], &[Digest::of(&tar)]);
    let mut manifest = scene.manifest("src", &image.digest);
    let soci = ("com.amazon.soci.index-digest".to_owned(), "sha256:33".to_owned());
    manifest.annotations.as_mut().unwrap().extend([soci.clone()]);
    let mut image = scene.put(OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap());
    image.annotations = Some([soci, ("of".to_owned(), "the entry".to_owned())].into());
    scene.put_index_of(vec![entry(&image, json!({"os": "linux", "architecture": "amd64"}))]);
    scene.convert(&["--all-platforms"]);

    let index = scene.index("dst");
    let [entry] = index.manifests.as_slice() else { panic!("{index:?}") };
    let entry = entry.descriptor().unwrap();
    assert_eq!(entry.annotations, Some([("of".to_owned(), "the entry".to_owned())].into()));
    let converted = scene.manifest("dst", &entry.digest);
    assert_eq!(converted.annotations, Some([("note".to_owned(), "kept".to_owned())].into()));
    let kept = converted.layers[0].annotations.clone().unwrap();
    let is_ours = |key: &String| key.starts_with("containerd.io/snapshot/lazuli/") || key.starts_with("io.lazuli.");
    let others: Vec<_> = kept.iter().filter(|(key, _)| !is_ours(key)).collect();
    assert_eq!(others, [(&"org.example.note".to_owned(), &"kept".to_owned())]);
    // Without a hot pack nothing says how long it is.
    assert_eq!(kept.get("containerd.io/snapshot/lazuli/hot.len"), None);
    let output = scene.lazuli(&["check", "oci:dst:v1", "--against", "oci:src", "--platform", "linux/amd64"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// An image of one layer whose config is called `config_type`.
fn with_config_type(scene: &Scene, manifest_type: &str, config_type: &str) -> Descriptor {
    let image = scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), "it is an image");
    let mut manifest = scene.manifest("src", &image.digest);
    manifest.media_type = Some(manifest_type.to_owned());
    manifest.config.media_type = config_type.to_owned();
    let descriptor = scene.put(manifest_type, &serde_json::to_vec(&manifest).unwrap());
    scene.put_index(vec![descriptor.clone()]);
    descriptor
}

/// docker 1.10 and an old registry of Google wrote such manifests; docker and containerd run them.
#[test]
fn a_config_whose_type_says_nothing_is_told_by_its_content() {
    let scene = Scene::new();
    for (manifest_type, config_type) in [
        (DOCKER_MANIFEST, "application/octet-stream"),
        (DOCKER_MANIFEST, "text/html"),
        (DOCKER_MANIFEST, "text/plain; charset=utf-8"),
        (OCI_MANIFEST, "application/octet-stream"),
    ] {
        with_config_type(&scene, manifest_type, config_type);
        assert_eq!(which(&scene, &[]), "it is an image", "{config_type}");
        assert_eq!(scene.converted().config.media_type, media_type::OCI_CONFIG);
        assert!(scene.lazuli(&["check", "oci:src"]).status.success());
    }
    // Layers beside a document that is no config of an image, and what says that it is something else.
    let mut manifest = scene.manifest("src", &with_config_type(&scene, DOCKER_MANIFEST, "text/html").digest);
    manifest.config = scene.put("text/html", b"<html>");
    let page = scene.put(DOCKER_MANIFEST, &serde_json::to_vec(&manifest).unwrap());
    let plugin = with_config_type(&scene, DOCKER_MANIFEST, "application/vnd.docker.plugin.v1+json");
    for (image, kind) in [(page, "text/html"), (plugin, "application/vnd.docker.plugin.v1+json")] {
        scene.put_index(vec![image.clone()]);
        let output = scene.lazuli(&["convert", "oci:src", "oci:copied"]);
        let expected = format!(
            "{}: no container image ({kind}), copied as it is\nwarning: nothing was converted: oci:copied:latest holds \
             no lazy image\n",
            image.digest
        );
        assert_eq!((String::from_utf8(output.stderr).unwrap(), output.status.code()), (expected, Some(0)));
    }
}

#[test]
fn windows_of_zstd_are_read_as_far_as_containerd_reads_them() {
    let scene = Scene::new();
    let tar = tar(&[("a", 1000)]);
    let compressed = |log: u32| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(log).unwrap();
        encoder.write_all(&tar).unwrap();
        encoder.finish().unwrap()
    };
    let image = |log: u32| {
        let layer = scene.put(&layer_type("+zstd"), &compressed(log));
        scene.put_image(vec![layer.clone()], &[Digest::of(&tar)]);
        layer.digest
    };
    for log in [28, 29] {
        image(log);
        scene.convert(&["--no-cache"]);
        assert!(scene.lazuli(&["check", "oci:dst:v1", "--against", "oci:src"]).status.success());
    }
    let digest = image(30);
    let error = String::from_utf8(scene.lazuli(&["convert", "oci:src", "oci:large", "--json"]).stderr).unwrap();
    assert!(error.contains(&digest.to_string()) && error.contains("a window of more than 512 MiB"), "{error}");
}

/// Go writes `null` for a list that has nothing in it.
#[test]
fn an_image_may_have_no_layers_and_say_null() {
    let scene = Scene::new();
    let put = |config: Value, layers: Option<Value>| {
        let config = scene.put(media_type::OCI_CONFIG, config.to_string().as_bytes());
        let mut manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config});
        if let Some(layers) = layers {
            manifest["layers"] = layers;
        }
        scene.put_index(vec![scene.put(OCI_MANIFEST, manifest.to_string().as_bytes())]);
    };
    for (config, layers) in [
        (
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}),
            Some(json!([])),
        ),
        (
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": null}}),
            Some(json!(null)),
        ),
        (json!({"os": "linux", "architecture": "amd64", "rootfs": null}), Some(json!(null))),
        (json!({"os": "linux", "architecture": "amd64"}), None),
    ] {
        put(config, layers);
        let report = scene.convert(&[]);
        assert_eq!(report["images"][0]["layers"], json!([]));
        assert_eq!(scene.converted().layers, []);
        for command in ["check", "inspect"] {
            assert!(scene.lazuli(&[command, "oci:dst:v1"]).status.success());
        }
    }
}

/// skopeo, podman and crane tell zstd by the magic number of a data frame at the start of a blob.
#[test]
fn a_layer_without_bytes_begins_with_a_frame() {
    let scene = Scene::new();
    let layer = scene.put(&layer_type("+gzip"), &gzip(b""));
    scene.put_image(vec![layer], &[Digest::of(b"")]);
    scene.convert(&[]);
    let layer = scene.converted().layers.remove(0);
    let blob = fs::read(scene.blob("dst", &layer.digest)).unwrap();
    assert_eq!(blob[..9], format_spec::footer::EMPTY_FRAME);
    assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), b"");
    assert!(scene.lazuli(&["check", "oci:dst:v1", "--against", "oci:src"]).status.success());

    // As it was written before: a check says what is wrong with it.
    let old = without_first_frame(&blob, &layer);
    fs::write(scene.blob("dst", &old.0.digest), old.1).unwrap();
    let mut manifest = scene.converted();
    manifest.layers = vec![old.0];
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let descriptor = Descriptor::of(OCI_MANIFEST, &bytes);
    fs::write(scene.blob("dst", &descriptor.digest), bytes).unwrap();
    let output = scene.lazuli(&["check", &format!("oci:dst@{}", descriptor.digest)]);
    assert_eq!(output.status.code(), Some(1));
}

/// The layer of `blob` with its index at the start.
fn without_first_frame(blob: &[u8], descriptor: &Descriptor) -> (Descriptor, Vec<u8>) {
    let lazy = format_spec::LazyLayer::from_annotations(|key| descriptor.annotation(key)).unwrap().unwrap();
    let index = format_spec::IndexLocation { offset: 8, ..lazy.index };
    let footer_len = usize::try_from(format_spec::footer::FOOTER_FRAME_LEN).unwrap();
    let mut old = blob[9..blob.len() - footer_len].to_vec();
    old.extend(format_spec::Footer::new(&index, 0, 0).to_frame());
    let layer = format_spec::LazyLayer { blob: Digest::of(&old), blob_len: old.len() as u64, index, ..lazy };
    let mut new = Descriptor::of(&descriptor.media_type, &old);
    new.annotations = Some(layer.to_annotations().into_iter().collect());
    (new, old)
}

#[test]
fn images_of_a_layout_are_named_by_whole_names_digests_and_numbers() {
    let scene = Scene::new();
    let image = |text: &str| scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), text);
    let (one, two, mut three) = (image("one"), image("two"), image("three"));
    let name = "registry.example/team/app:1.4";
    three.annotations = Some([("org.opencontainers.image.ref.name".to_owned(), name.to_owned())].into());
    scene.put_index(vec![one.clone(), two.clone(), three]);
    let convert = |source: &str, expected: &str| {
        let output = scene.lazuli(&["convert", source, "oci:dst", "--no-cache"]);
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(which_of(&scene, &scene.converted()), expected, "{source}");
        fs::remove_dir_all(scene.path("dst")).unwrap();
    };
    convert(&format!("oci:src:{name}"), "three");
    convert(&format!("oci:src@{}", two.digest), "two");
    convert("oci:src:@0", "one");
    convert("oci:src:@2", "three");
    // A directory with a colon in its name still is one.
    fs::rename(scene.path("src"), scene.path("a:b")).unwrap();
    convert(&format!("oci:a:b:{name}"), "three");
    fs::rename(scene.path("a:b"), scene.path("src")).unwrap();
    let refused = |source: &str, expected: &str| scene.check_refusal(&[source, "oci:dst"], expected);
    let there = format!("there is: @{}, @{}, {name}", one.digest, two.digest);
    refused("oci:src", &format!("oci:src: src: no image tagged latest; {there}"));
    refused("oci:src:@3", &format!("oci:src:@3: src: no image @3; {there}"));
    let output = scene.lazuli(&["convert", "oci:src:@0", "oci:dst:@0"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("a destination needs a tag"), "{output:?}");
    // A whole name is a tag of what is written, too.
    let output = scene.lazuli(&["convert", "oci:src:@0", &format!("oci:dst:{name}")]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scene.index_of_layout("dst").manifests[0].annotation("org.opencontainers.image.ref.name"), Some(name));
}

#[test]
fn an_artifact_that_cannot_be_carried_along_is_named_by_its_number() {
    let scene = Scene::new();
    let linux = json!({"os": "linux", "architecture": "amd64"});
    let good = entry(&scene.put_marked(linux.clone(), "linux"), linux);
    let artifact = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": scene.put("application/vnd.example", b"{}"),
        "layers": [{"mediaType": "a", "digest": format!("sha512:{}", "ab".repeat(64)), "size": 1}],
    });
    let artifact = scene.put(OCI_MANIFEST, artifact.to_string().as_bytes());
    scene.put_index_of(vec![good, serde_json::to_value(artifact).unwrap()]);
    assert_eq!(which(&scene, &["--platform", "linux/amd64"]), "linux");
    let error = which(&scene, &["--all-platforms"]);
    assert!(error.contains(": entry 2: ") && error.contains("; convert one image with --platform"), "{error}");
}

/// `cosign copy` leaves the image's own manifest under the tag of its referrers where the registry has no API for
/// them. Indexes call some of what they list by types that the manifests do not have.
#[test]
fn a_tag_of_referrers_that_is_no_index_is_passed_over() {
    let scene = Scene::new();
    let image = scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), "signed");
    let tagged = |descriptor: &Descriptor, tag: &str| Descriptor {
        annotations: Some([("org.opencontainers.image.ref.name".to_owned(), tag.to_owned())].into()),
        ..descriptor.clone()
    };
    let empty = scene.put("application/vnd.oci.empty.v1+json", b"{}");
    let signature = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": []});
    let signature = scene.put(OCI_MANIFEST, signature.to_string().as_bytes());
    let hex = image.digest.hex();
    scene.put_index(vec![
        tagged(&image, "latest"),
        tagged(&image, &format!("sha256-{hex}")),
        tagged(&signature, &format!("sha256-{hex}.sig")),
    ]);
    let output = scene.lazuli(&["convert", "--referrers", "oci:src:latest", "oci:dst"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.contains("names no index"), "{told}");
    let tags: Vec<_> = scene.index_of_layout("dst").known().map(|entry| entry.digest).collect();
    assert!(tags.contains(&signature.digest), "{tags:?}");

    let bundle = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "config": empty, "layers": [], "subject": image,
    });
    let bundle = scene.put(OCI_MANIFEST, bundle.to_string().as_bytes());
    let mut listed = serde_json::to_value(&bundle).unwrap();
    listed["artifactType"] = empty.media_type.clone().into();
    let list = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]});
    let list = scene.put(OCI_INDEX, list.to_string().as_bytes());
    scene.put_index(vec![tagged(&image, "latest"), tagged(&list, &format!("sha256-{hex}"))]);
    let output = scene.lazuli(&["convert", "--referrers", "oci:src:latest", "oci:other", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!({
        "subject": image.digest, "digest": bundle.digest, "kind": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "attached": null,
    });
    assert_eq!(report["referrers"], json!([expected]));
}

/// containerd and crane take a config from its descriptor where the registry does not have the blob.
#[test]
fn a_config_in_its_descriptor_needs_no_blob() {
    let scene = Scene::new();
    let image = scene.put_marked(json!({"os": "linux", "architecture": "amd64"}), "embedded");
    let mut manifest = scene.manifest("src", &image.digest);
    let path = scene.blob("src", &manifest.config.digest);
    let config = fs::read(&path).unwrap();
    fs::remove_file(path).unwrap();
    manifest.config.rest.insert("data".to_owned(), base64::prelude::BASE64_STANDARD.encode(&config).into());
    scene.put_index(vec![scene.put(OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap())]);
    assert_eq!(which(&scene, &[]), "embedded");
    assert_eq!(fs::read(scene.blob("dst", &manifest.config.digest)).unwrap(), config);
    // Other content is not believed.
    manifest.config.rest.insert("data".to_owned(), base64::prelude::BASE64_STANDARD.encode(b"{}").into());
    scene.put_index(vec![scene.put(OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap())]);
    let error = which(&scene, &[]);
    assert!(error.contains("No such file"), "{error}");
}

/// A directory that is misspelt would be as if there were no mirrors and certificates, and the failure another one.
#[test]
fn a_hosts_dir_that_is_none_is_refused() {
    let scene = Scene::new();
    fs::write(scene.path("file"), "").unwrap();
    let image = "127.0.0.1:1/image:tag";
    for arguments in [&["inspect", image][..], &["check", image], &["convert", image, "oci:dst"], &["pull", image]] {
        for directory in ["nosuch", "file"] {
            let output = scene.lazuli(&[arguments, &["--hosts-dir", directory]].concat());
            let expected = format!("lazuli: --hosts-dir {directory}: there is no such directory\n");
            assert_eq!(String::from_utf8_lossy(&output.stderr), expected, "{arguments:?}");
        }
    }
}
