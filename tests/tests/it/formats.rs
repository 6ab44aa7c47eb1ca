//! Where images come from and go to: archives, indexes, artifacts, referrers, and what other tools make of it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use format_spec::Digest;
use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, Finished, ImageBuilder, LazyMount, Result, Scratch, TarLayer,
    TestRegistry,
    containerd::OVERLAYFS,
    error::Context as _,
    image::{INDEX, Layout, layout_blob, layout_manifest, own_architecture, with_tag},
    lazuli,
    process::{command, run},
    programs::{lazuli_ok, program},
    registry_server::digest_in,
    samples::{eventful_layers, noise, readable_layers},
};
use serde_json::{Value, json};

use crate::json::check_schema;

/// The user that nobody is.
const NOBODY: u32 = 65534;
const REF_NAME: &str = "org.opencontainers.image.ref.name";

fn image_of(layers: Vec<Vec<u8>>) -> ImageBuilder {
    layers.into_iter().fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip))
}

fn runnable_image() -> Result<ImageBuilder> {
    Ok(image_of(readable_layers()?).command(&["/bin/sh", "-c", "cat /etc/greeting"]))
}

fn skopeo(arguments: &[&str]) -> Result<String> {
    let insecure = ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
    run(command("skopeo", insecure).args(arguments))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are ASCII")
}

/// The document behind a descriptor or digest in an `oci:` layout.
fn document(layout: &str, descriptor: &Value) -> Result<Value> {
    let path = layout_blob(layout, digest_in(descriptor)?);
    let bytes = fs::read(&path).at("reading", &path)?;
    serde_json::from_slice(&bytes).map_err(std::io::Error::from).at("parsing", &path)
}

/// The entries of a layout's `index.json`.
fn entries(layout: &Path) -> Result<Vec<Value>> {
    let path = layout.join("index.json");
    let bytes = fs::read(&path).at("reading", &path)?;
    let index: Value = serde_json::from_slice(&bytes).map_err(std::io::Error::from).at("parsing", &path)?;
    Ok(index["manifests"].as_array().cloned().unwrap_or_default())
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn digests(descriptors: &Value) -> Vec<String> {
    list(descriptors).iter().map(|descriptor| descriptor["digest"].as_str().unwrap_or_default().to_owned()).collect()
}

/// One line on standard error with all `words`, exit code 1.
fn check_failure(finished: &Finished, words: &[&str]) {
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""), "{finished:?}");
    let lines: Vec<_> = finished.stderr.lines().filter(|line| !line.starts_with("layer ")).collect();
    let [line] = lines.as_slice() else { panic!("not one line: {finished:?}") };
    for word in words {
        assert!(line.contains(word), "{word:?} is missing: {line}");
    }
}

/// skopeo writes a docker archive of an image with a layer used twice and an empty one; nobody, who has no
/// rights, converts it into an OCI archive; skopeo takes that to a registry.
#[test]
fn docker_archives_go_in_and_oci_archives_come_out_without_root() -> Result<()> {
    let scratch = Scratch::new("docker-archive-in")?;
    let registry = TestRegistry::start(&scratch)?;
    let mut layers = eventful_layers()?;
    layers.push(layers[1].clone());
    layers.push(TarLayer::new().finish()?);
    let original = image_of(layers).write(&scratch, "image")?;
    let home = scratch.directory("home")?;
    fs::copy(program("lazuli")?, home.join("lazuli")).context("copying lazuli")?;
    let docker = home.join("image.tar");
    skopeo(&[&original, &format!("docker-archive:{}:sample:v1", text(&docker))])?;
    for path in [&home, &docker] {
        chown(path, Some(NOBODY), Some(NOBODY)).at("giving away", path)?;
    }

    let drop_rights = ["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "./lazuli", "convert"];
    let mut convert = command("setpriv", drop_rights);
    convert.args(["docker-archive:image.tar:sample:v1", "oci-archive:lazy.tar:v1"]).current_dir(&home);
    run(convert.env("TMPDIR", &home).env("HOME", &home))?;
    let mut left: Vec<_> = fs::read_dir(&home).at("listing", &home)?.flatten().map(|entry| entry.file_name()).collect();
    left.retain(|name| name != ".cache");
    left.sort();
    assert_eq!(left, ["image.tar", "lazuli", "lazy.tar"]);

    let lazy = registry.reference("sample:lazy");
    skopeo(&[&format!("oci-archive:{}:v1", text(&home.join("lazy.tar"))), &format!("docker://{lazy}")])?;
    let (before, after) = (layout_manifest(&original)?, registry.manifest("sample:lazy")?);
    let diff_ids = |config: &Value| config["rootfs"]["diff_ids"].clone();
    // skopeo writes a config of its own into docker archives only when the layers change, which they do not.
    assert_eq!(diff_ids(&registry.config("sample:lazy")?), diff_ids(&document(&original, &before["config"])?));
    let layers = list(&after["layers"]);
    assert_eq!(layers.len(), 5);
    assert_eq!(layers[1], layers[3]);
    lazuli_ok(["convert", &original, &registry.reference("sample:direct")])?;
    assert_eq!(digests(&after["layers"]), digests(&registry.manifest("sample:direct")?["layers"]));
    Ok(())
}

/// What older versions of docker write: a directory for each layer, a link where one is used twice,
/// `repositories` beside, two images; and all of it compressed by whoever kept it.
#[test]
fn docker_save_archives_are_read_whatever_their_age() -> Result<()> {
    let scratch = Scratch::new("docker-save")?;
    let layers = [TarLayer::new().file("a", "a").finish()?, TarLayer::new().file("b", noise(1, 100_000)).finish()?];
    let config = |diff_ids: &[&[u8]]| {
        let diff_ids: Vec<_> = diff_ids.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let config = json!({
            "architecture": own_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        config.to_string()
    };
    let (first, second) = (config(&[&layers[0], &layers[1], &layers[0]]), config(&[&layers[1]]));
    let manifest = json!([
        {"Config": "first.json", "RepoTags": ["sample:v1"], "Layers": ["1/layer.tar", "2/layer.tar", "3/layer.tar"]},
        {"Config": "second.json", "RepoTags": ["other:v1", "other:v2"], "Layers": ["2/layer.tar"]},
    ]);
    let archive = TarLayer::new()
        .directory("1")
        .file("1/VERSION", "1.0")
        .file("1/layer.tar", &layers[0])
        .directory("2")
        .file("2/layer.tar", &layers[1])
        .symlink("3/layer.tar", "../1/layer.tar")
        .file("first.json", &first)
        .file("second.json", &second)
        .file("manifest.json", manifest.to_string())
        .file("repositories", r#"{"sample":{"v1":"1"}}"#)
        .finish()?;
    let plain = scratch.join("plain.tar");
    fs::write(&plain, &archive).at("writing", &plain)?;
    let zstd = scratch.join("archive.tar.zst");
    fs::write(&zstd, zstd::encode_all(&archive[..], 0).context("compressing")?).at("writing", &zstd)?;
    run(command("gzip", ["--keep", "--suffix=.old"]).arg(&plain))?;

    let mut found = Vec::new();
    for file in ["plain.tar", "plain.tar.old", "archive.tar.zst"] {
        let lazy = format!("oci:{}:lazy", scratch.join(format!("{file}.lazy")).display());
        lazuli_ok(["convert", &format!("docker-archive:{}:sample:v1", text(&scratch.join(file))), &lazy])?;
        found.push(layout_manifest(&lazy)?);
    }
    assert_eq!(digest_in(&found[0]["config"])?, Digest::of(first.as_bytes()));
    assert_eq!(list(&found[0]["layers"]).len(), 3);
    assert!(found.iter().all(|manifest| *manifest == found[0]));
    let other = format!("oci:{}:lazy", scratch.join("other").display());
    lazuli_ok(["convert", &format!("docker-archive:{}:other:v2", text(&plain)), &other])?;
    assert_eq!(digest_in(&layout_manifest(&other)?["config"])?, Digest::of(second.as_bytes()));
    let words = ["sample:v1", "other:v1", "other:v2"];
    let refused = lazuli(["convert", &format!("docker-archive:{}", text(&plain)), &other])?;
    check_failure(&refused, &words);
    let refused = lazuli(["convert", &format!("docker-archive:{}:none:v1", text(&plain)), &other])?;
    check_failure(&refused, &["none:v1", "sample:v1", "other:v1"]);
    Ok(())
}

#[test]
fn an_image_in_an_archive_is_mounted_where_it_is() -> Result<()> {
    let scratch = Scratch::new("mounted-archive")?;
    let original = image_of(readable_layers()?).write(&scratch, "image")?;
    let lazy = format!("oci-archive:{}", scratch.join("lazy.tar").display());
    lazuli_ok(["convert", &original, &lazy])?;
    let mount = LazyMount::new(&scratch, "mounted", &lazy)?;
    let greeting = fs::read_to_string(mount.path().join("etc/greeting")).context("reading lazily")?;
    assert!(greeting.starts_with("good morning"), "{greeting}");
    let large = fs::read(mount.path().join("large/3")).context("reading lazily")?;
    assert_eq!(Digest::of(&large), Digest::of(&lazuli_tests::samples::large_file(3)));
    Ok(())
}

/// Two platforms that share their layers but for one, each with an attestation as buildkit writes it, and a
/// Wasm module. `latest` is the index; `nested` has it within another one, beside a third image.
fn index_for_many(scratch: &Scratch) -> Result<(Layout, Value)> {
    let layout = Layout::create(scratch.join("many"))?;
    let mut manifests = Vec::new();
    for architecture in [own_architecture(), "s390x"] {
        let image = runnable_image()?.architecture(architecture);
        let own = TarLayer::new().file("architecture", architecture).finish()?;
        let mut descriptor = image.layer(own, Compression::Gzip).add_to(&layout)?;
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture, "odd": true});
        descriptor["annotations"] = json!({"note": architecture});
        manifests.push(descriptor);
    }
    for number in 0..2 {
        let about = manifests[number]["digest"].clone();
        let statement = json!({"subject": [{"digest": about}]}).to_string();
        let layer = layout.add("application/vnd.in-toto+json", statement.as_bytes())?;
        let config = json!({
            "architecture": "unknown", "os": "unknown",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(statement.as_bytes()).to_string()]},
        });
        let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        let mut attestation = layout.add_manifest(&config, &[layer])?;
        attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
        attestation["annotations"] = json!({
            "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": about,
        });
        manifests.push(attestation);
    }
    let config = layout.add("application/vnd.wasm.config.v0+json", b"{}")?;
    let wasm = layout.add("application/wasm", b"\0asm")?;
    manifests.push(layout.add_manifest(&config, &[wasm])?);
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests, "annotations": {"of": "the index"},
    });
    let inner = layout.add(INDEX, index.to_string().as_bytes())?;
    let third = vec![TarLayer::new().file("third", "third").finish()?];
    let mut third = image_of(third).architecture("riscv64").add_to(&layout)?;
    third["platform"] = json!({"os": "linux", "architecture": "riscv64"});
    let outer = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner, third]});
    let outer = layout.add(INDEX, outer.to_string().as_bytes())?;
    layout.list(&[with_tag(inner, "latest"), with_tag(outer, "nested")])?;
    Ok((layout, index))
}

#[test]
fn all_platforms_of_an_index_are_converted_and_the_rest_is_kept() -> Result<()> {
    let scratch = Scratch::new("all-platforms")?;
    let registry = TestRegistry::start(&scratch)?;
    let (layout, index) = index_for_many(&scratch)?;
    let original = registry.reference("many:original");
    skopeo(&["--all", &layout.reference(), &format!("docker://{original}")])?;
    let before = registry.served()?.len();
    let lazy = registry.reference("lazy:v1");
    let report = lazuli_ok(["convert", "--all-platforms", "--json", &original, &lazy])?;
    check_schema("convert", &report)?;
    let report: Value = serde_json::from_str(&report).map_err(std::io::Error::from).context("parsing the report")?;
    assert_eq!((list(&report["images"]).len(), list(&report["artifacts"]).len()), (2, 3));
    // What is at the destination already is read again to see what a start of the second image reads.
    let mut reads = BTreeMap::new();
    let served = registry.served()?.split_off(before);
    for served in served.iter().filter(|served| served.is_blob_read() && served.path.starts_with("/v2/many/")) {
        *reads.entry(served.path.clone()).or_insert(0) += 1;
    }
    assert!(reads.values().all(|count| *count == 1), "something was read twice: {reads:?}");

    let converted = registry.manifest("lazy:v1")?;
    let get =
        |descriptor: &Value| registry.manifest(&format!("lazy@{}", descriptor["digest"].as_str().unwrap_or_default()));
    assert_eq!(converted["annotations"], index["annotations"]);
    let (old, new) = (list(&index["manifests"]), list(&converted["manifests"]));
    assert_eq!(new.len(), 5);
    for number in 0..2 {
        assert_ne!(new[number]["digest"], old[number]["digest"]);
        assert_eq!(new[number]["platform"], old[number]["platform"]);
        assert_eq!(new[number]["annotations"], old[number]["annotations"]);
        let manifest = get(&new[number])?;
        assert_eq!(manifest["config"]["digest"], document(&layout.reference(), &old[number])?["config"]["digest"]);
        let is_lazy = |layer: &Value| layer["annotations"]["containerd.io/snapshot/lazuli/version"] == "1";
        assert!(list(&manifest["layers"]).iter().all(is_lazy));
        // The attestation is the same, and is about the new image.
        let attestation = &new[2 + number];
        assert_eq!(attestation["digest"], old[2 + number]["digest"]);
        assert_eq!(attestation["annotations"]["vnd.docker.reference.digest"], new[number]["digest"]);
    }
    assert_eq!(new[4], old[4]);
    for artifact in &new[2..] {
        let manifest = get(artifact)?;
        for blob in list(&manifest["layers"]).iter().chain([&manifest["config"]]) {
            assert!(registry.blob_file(digest_in(blob)?).exists());
        }
    }

    // An index within an index is converted like one that is not.
    let outer = format!("oci:{}:lazy", scratch.join("outer").display());
    let nested = layout.reference().replace(":latest", ":nested");
    lazuli_ok(["convert", "--all-platforms", &nested, &outer])?;
    for (image, original) in [(&lazy, &original), (&outer, &nested)] {
        let said = lazuli_ok(["check", image, "--against", original])?;
        assert!(said.contains(" images (linux/") && said.ends_with("and 3 artifacts is sound\n"), "{said}");
    }
    let entries = list(&layout_manifest(&outer)?["manifests"]);
    assert_eq!(digest_in(&entries[0])?, registry.digest("lazy:v1")?);
    assert_eq!(entries[1]["platform"]["architecture"], "riscv64");

    // Others see an ordinary index.
    let copy = format!("oci:{}:copy", scratch.join("copy").display());
    skopeo(&["--all", &format!("docker://{lazy}"), &copy])?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    containerd.pull(&lazy, OVERLAYFS)?;
    let finished = containerd.run(&lazy, OVERLAYFS, "converted", &[])?;
    assert!(finished.stdout.starts_with("good morning"), "{finished:?}");
    Ok(())
}

/// skopeo writes docker's own manifests and list.
#[test]
fn docker_lists_become_indexes_of_oci() -> Result<()> {
    let scratch = Scratch::new("docker-lists")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = Layout::create(scratch.join("images"))?;
    let tars = vec![TarLayer::new().file("a", "a").finish()?, TarLayer::new().finish()?];
    let mut manifests = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let mut descriptor = image_of(tars.clone()).architecture(architecture).add_to(&layout)?;
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        manifests.push(descriptor);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    layout.tag(layout.add(INDEX, index.to_string().as_bytes())?)?;
    let original = registry.reference("docker:list");
    skopeo(&["--all", "--format", "v2s2", &layout.reference(), &format!("docker://{original}")])?;
    let list_type = "application/vnd.docker.distribution.manifest.list.v2+json";
    assert_eq!(registry.manifest("docker:list")?["mediaType"], list_type);
    let lazy = format!("oci:{}:lazy", scratch.join("lazy").display());
    lazuli_ok(["convert", "--all-platforms", &original, &lazy])?;
    let converted = layout_manifest(&lazy)?;
    assert_eq!(converted["mediaType"], INDEX);
    for (entry, architecture) in list(&converted["manifests"]).iter().zip(["amd64", "arm64"]) {
        assert_eq!(entry["platform"], json!({"os": "linux", "architecture": architecture}));
        let manifest = document(&lazy, entry)?;
        assert_eq!((&entry["mediaType"], &entry["mediaType"]), (&manifest["mediaType"], &manifest["mediaType"]));
        assert_eq!(manifest["config"]["mediaType"], "application/vnd.oci.image.config.v1+json");
        assert_eq!(document(&lazy, &manifest["config"])?["architecture"], architecture);
    }
    Ok(())
}

#[test]
fn an_artifact_is_copied_as_it_is() -> Result<()> {
    let scratch = Scratch::new("artifact")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = Layout::create(scratch.join("chart"))?;
    let config = layout.add("application/vnd.cncf.helm.config.v1+json", b"{}")?;
    let chart = layout.add("application/vnd.cncf.helm.chart.content.v1.tar+gzip", &noise(3, 5000))?;
    let descriptor = layout.add_manifest(&config, std::slice::from_ref(&chart))?;
    layout.tag(descriptor.clone())?;
    let copy = registry.reference("charts:v1");
    let finished = lazuli(["convert", &layout.reference(), &copy])?;
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    let told = format!("{digest}: no container image (application/vnd.cncf.helm.config.v1+json), copied as it is");
    assert!(finished.stderr.contains(&told), "{finished:?}");
    assert!(finished.stderr.contains("warning: nothing was converted"), "{finished:?}");
    assert_eq!(finished.stdout, format!("{copy} {digest}\n"));
    let stored = fs::read(registry.blob_file(digest_in(&chart)?)).context("reading the chart")?;
    assert_eq!(stored, noise(3, 5000));
    Ok(())
}

/// A layer that lies elsewhere, docker's empty layer, and something that is no file system.
#[test]
fn odd_layers_are_converted_or_carried_over() -> Result<()> {
    let scratch = Scratch::new("odd-layers")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = Layout::create(scratch.join("odd"))?;
    let tar = TarLayer::new().file("a", "a").finish()?;
    // 1024 zeros, as docker has compressed them for years.
    let empty = [
        0x1f, 0x8b, 8, 0, 0, 9, 0x6e, 0x88, 0, 0xff, 0x62, 0x18, 5, 0xa3, 0x60, 0x14, 0x8c, 0x58, 0, 8, 0, 0, 0xff,
        0xff, 0x2e, 0xaf, 0xb5, 0xef, 0, 4, 0, 0,
    ];
    assert!(Digest::of(&empty).to_string().starts_with("sha256:a3ed95cae"));
    let foreign = json!({
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": 1000,
        "digest": Digest::of(b"elsewhere").to_string(), "urls": ["https://windows.example/layer"],
    });
    let model = layout.add("application/vnd.example.model", b"weights")?;
    let ordinary = layout.add("application/vnd.oci.image.layer.v1.tar", &tar)?;
    let empty_layer = layout.add("application/vnd.oci.image.layer.v1.tar+gzip", &empty)?;
    let diff_ids = [Digest::of(b"foreign"), Digest::of(&[0; 1024]), Digest::of(&tar), Digest::of(b"weights")];
    let config = json!({
        "architecture": own_architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids.map(|digest| digest.to_string())},
    });
    let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    layout.tag(layout.add_manifest(&config, &[foreign.clone(), empty_layer, ordinary, model.clone()])?)?;
    lazuli_ok(["convert", &layout.reference(), &registry.reference("odd:lazy")])?;
    let layers = list(&registry.manifest("odd:lazy")?["layers"]);
    assert_eq!((&layers[0], &layers[3]), (&foreign, &model));
    for layer in &layers[1..3] {
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+zstd");
    }
    assert!(registry.blob_file(digest_in(&model)?).exists());
    Ok(())
}

/// An SBOM, a signature of the image, a signature of the SBOM, and what cosign stores under tags: to a registry
/// and from there to a layout.
#[test]
fn referrers_come_along_and_what_is_unsigned_refers_to_the_new_image_too() -> Result<()> {
    let scratch = Scratch::new("referrers")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = Layout::create(scratch.join("signed"))?;
    let image = image_of(vec![TarLayer::new().file("a", "a").finish()?]).add_to(&layout)?;
    let empty = layout.add("application/vnd.oci.empty.v1+json", b"{}")?;
    let refer = |subject: &Value, artifact_type: &str, content: &str| {
        let blob = layout.add(artifact_type, content.as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": lazuli_tests::image::MANIFEST, "artifactType": artifact_type,
            "config": empty, "layers": [blob], "subject": subject,
        });
        layout.add(lazuli_tests::image::MANIFEST, manifest.to_string().as_bytes())
    };
    let sbom = refer(&image, "application/spdx+json", "all that is in it")?;
    let signature = refer(&image, "application/vnd.cncf.notary.signature", "signed")?;
    let sbom_signature = refer(&sbom, "application/vnd.cncf.notary.signature", "signed too")?;
    let hex = digest_in(&image)?.hex();
    let cosign =
        layout.add_manifest(&empty, &[layout.add("application/vnd.dev.cosign.simplesigning.v1+json", b"c")?])?;
    let cosign_sbom = layout.add_manifest(&empty, &[layout.add("text/spdx", b"s")?])?;
    layout.list(&[
        with_tag(image.clone(), "latest"),
        sbom.clone(),
        signature.clone(),
        sbom_signature.clone(),
        with_tag(cosign.clone(), &format!("sha256-{hex}.sig")),
        with_tag(cosign_sbom.clone(), &format!("sha256-{hex}.sbom")),
    ])?;

    let first = registry.reference("signed:lazy");
    check_schema("convert", &lazuli_ok(["convert", "--json", "--referrers", &layout.reference(), &first])?)?;
    // The registry knows no subjects, so there are lists under tags.
    let new = registry.digest("signed:lazy")?;
    let referrers =
        |subject: &str| registry.manifest(&format!("signed:sha256-{}", subject.trim_start_matches("sha256:")));
    assert_eq!(digests(&referrers(&hex)?["manifests"]), digests(&json!([sbom, signature])));
    assert_eq!(digests(&referrers(&digest_in(&sbom)?.hex())?["manifests"]), digests(&json!([sbom_signature])));
    let attached = referrers(&new.hex())?;
    assert_eq!(list(&attached["manifests"]).len(), 1);
    assert_eq!(attached["manifests"][0]["artifactType"], "application/spdx+json");
    let attached =
        registry.manifest(&format!("signed@{}", attached["manifests"][0]["digest"].as_str().unwrap_or_default()))?;
    assert_eq!(attached["subject"]["digest"], new.to_string());
    assert_eq!(attached["layers"], document(&layout.reference(), &sbom)?["layers"]);
    for tag in [format!("sha256-{hex}.sig"), format!("sha256-{hex}.sbom"), format!("sha256-{}.sbom", new.hex())] {
        assert!(registry.tags("signed").contains(&tag), "{tag}");
    }
    assert!(!registry.tags("signed").contains(&format!("sha256-{}.sig", new.hex())));

    // The result is lazy already: it is carried over, and so is what refers to it.
    let second = scratch.join("second");
    lazuli_ok(["convert", "--referrers", &first, &format!("oci:{}:lazy", second.display())])?;
    let entries = entries(&second)?;
    let tags: Vec<_> =
        entries.iter().map(|entry| entry["annotations"][REF_NAME].as_str().unwrap_or_default()).collect();
    assert_eq!(tags, ["", &format!("sha256-{}.sbom", new.hex()), "lazy"]);
    assert_eq!(entries[0]["artifactType"], "application/spdx+json");
    Ok(())
}

/// buildah reads the OCI archive and shows its files; umoci reads what is not a layer, and the layers
/// once skopeo has compressed them as umoci 0.4 can read them.
#[test]
fn buildah_and_umoci_read_the_result() -> Result<()> {
    let scratch = Scratch::new("buildah-and-umoci")?;
    let original = runnable_image()?.write(&scratch, "image")?;
    let archive = format!("oci-archive:{}:lazy", scratch.join("lazy.tar").display());
    lazuli_ok(["convert", &original, &archive])?;

    let buildah = |arguments: &[&str]| {
        let (root, state) = (scratch.join("containers"), scratch.join("state"));
        let mut buildah =
            command("buildah", ["--storage-driver", "vfs", "--root", text(&root), "--runroot", text(&state)]);
        run(buildah.args(arguments).env("HOME", scratch.path()).env("BUILDAH_ISOLATION", "chroot"))
    };
    let policy = scratch.join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).at("writing", &policy)?;
    let container = buildah(&["from", "--signature-policy", text(&policy), &archive])?;
    let mounted = PathBuf::from(buildah(&["mount", container.trim()])?.trim());
    let greeting = fs::read_to_string(mounted.join("etc/greeting")).context("reading what buildah unpacked")?;
    assert!(greeting.starts_with("good morning"), "{greeting}");
    buildah(&["umount", container.trim()])?;

    let layout = scratch.join("layout");
    skopeo(&[&archive, &format!("oci:{}:lazy", text(&layout))])?;
    let listed = run(command("umoci", ["ls", "--layout", text(&layout)]).env("HOME", scratch.path()))?;
    assert_eq!(listed, "lazy\n");
    let gzip = format!("{}:gzip", scratch.join("gzip").display());
    skopeo(&["--dest-compress-format", "gzip", "--dest-compress", &archive, &format!("oci:{gzip}")])?;
    let bundle = scratch.join("bundle");
    run(&mut command("umoci", ["unpack", "--image", &gzip, text(&bundle)]))?;
    assert_eq!(
        fs::read_to_string(bundle.join("rootfs/etc/greeting")).context("reading what umoci unpacked")?,
        greeting
    );
    Ok(())
}

#[test]
fn archives_that_cannot_be_read_or_written_are_refused_in_one_line() -> Result<()> {
    let scratch = Scratch::new("bad-archives")?;
    let original =
        image_of(vec![TarLayer::new().file("noise", noise(1, 100_000)).finish()?]).write(&scratch, "image")?;
    let docker = scratch.join("docker.tar");
    skopeo(&[&original, &format!("docker-archive:{}:sample:v1", text(&docker))])?;
    let oci = scratch.join("oci.tar");
    skopeo(&[&original, &format!("oci-archive:{}:v1", text(&oci))])?;
    let bytes = fs::read(&docker).at("reading", &docker)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = scratch.join(name);
        fs::write(&path, bytes).at("writing", &path)
    };
    write("cut.tar", &bytes[..bytes.len() / 2])?;
    write("junk.tar", &noise(2, 4096))?;
    let mut damaged = bytes;
    let place = damaged.windows(16).position(|window| window == &noise(1, 16)[..]).expect("layers are not compressed");
    damaged[place] ^= 1;
    write("damaged.tar", &damaged)?;
    let lacking = json!([{"Config": "none.json", "RepoTags": [], "Layers": []}]).to_string();
    write("lacking.tar", &TarLayer::new().file("manifest.json", lacking).finish()?)?;
    write("other.tar", &TarLayer::new().file("README", "no image").finish()?)?;

    let destination = scratch.join("never-written");
    let check = |source: &str, words: &[&str]| {
        for kind in ["oci", "oci-archive"] {
            let finished = lazuli(["convert", source, &format!("{kind}:{}:lazy", text(&destination))])?;
            check_failure(&finished, words);
            assert!(!destination.exists());
        }
        Ok::<_, lazuli_tests::HarnessError>(())
    };
    let named = |kind: &str, name: &str| format!("{kind}:{}", text(&scratch.join(name)));
    check(&named("docker-archive", "none.tar"), &["none.tar", "No such file"])?;
    check(&named("docker-archive", "junk.tar"), &["junk.tar", "no tar archive"])?;
    check(&named("docker-archive", "cut.tar"), &["cut.tar", "truncated"])?;
    check(&named("docker-archive", "damaged.tar"), &["digest", "damaged"])?;
    check(&named("docker-archive", "lacking.tar"), &["lacking.tar", "none.json is not in this archive"])?;
    check(&named("docker-archive", "other.tar"), &["other.tar", "no manifest.json"])?;
    check(&named("docker-archive", "oci.tar"), &["oci.tar", "oci-archive:FILE"])?;
    check(&named("oci-archive", "docker.tar"), &["docker.tar", "docker-archive:FILE"])?;
    check(&named("oci-archive", "oci.tar:v2"), &["oci.tar", "v2", "v1"])?;
    check(&named("oci-archive", "image"), &["image", "oci:DIR"])?;

    let refused = lazuli(["convert", &original, &named("docker-archive", "new.tar")])?;
    check_failure(&refused, &["new.tar", "oci-archive:FILE"]);
    assert!(!scratch.join("new.tar").exists());
    let refused = lazuli(["convert", &original, &named("oci-archive", "no-such-directory/new.tar")])?;
    check_failure(&refused, &["no-such-directory/new.tar"]);
    let left: Vec<_> =
        fs::read_dir(scratch.path()).at("listing", scratch.path())?.flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
    Ok(())
}

/// The last layer of the second platform is missing, which shows when the first platform is uploaded.
#[test]
fn a_conversion_that_breaks_off_leaves_no_tag() -> Result<()> {
    let scratch = Scratch::new("broken-off")?;
    let (layout, index) = index_for_many(&scratch)?;
    let registry = TestRegistry::start(&scratch)?;
    let second = document(&layout.reference(), &index["manifests"][1])?;
    let missing = digest_in(list(&second["layers"]).last().expect("it has layers"))?;
    fs::remove_file(layout_blob(&layout.reference(), missing)).context("removing a blob")?;
    let archive = scratch.join("broken.tar");
    let destinations = [registry.reference("broken:lazy"), format!("oci-archive:{}", text(&archive))];
    for destination in &destinations {
        let finished = lazuli(["convert", "--all-platforms", &layout.reference(), destination])?;
        assert_eq!(finished.code, Some(1), "{finished:?}");
        let last = finished.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("lazuli: ") && last.contains(&missing.hex()), "{finished:?}");
    }
    assert_eq!(registry.tags("broken"), [] as [String; 0]);
    assert!(!archive.exists());
    Ok(())
}

/// What a conversion has read of original layers, and how many blobs it has sent.
fn work_of(registry: &TestRegistry, convert: impl FnOnce() -> Result<()>) -> Result<(Vec<String>, usize)> {
    let before = registry.served()?.len();
    convert()?;
    let served = registry.served()?.split_off(before);
    let mut read: Vec<_> = served
        .iter()
        .filter(|served| served.is_blob_read() && served.path.starts_with("/v2/sample/"))
        .filter_map(|served| served.path.rsplit_once('/').map(|(_, digest)| digest.to_owned()))
        .collect();
    read.sort();
    let sent = served.iter().filter(|served| served.method == "PUT" && served.path.contains("/blobs/uploads/")).count();
    Ok((read, sent))
}

/// Two versions of an image that differ in their last layer, and a third; the registry tells what was read and sent.
#[test]
fn the_next_version_costs_only_what_is_new() -> Result<()> {
    let scratch = Scratch::new("next-version")?;
    let registry = TestRegistry::start(&scratch)?;
    let mut originals = Vec::new();
    for version in ["v1", "v2", "v3"] {
        let mut layers = readable_layers()?;
        layers.push(TarLayer::new().file("version", version).file("noise", noise(9, 100_000)).finish()?);
        let layout = image_of(layers).write(&scratch, version)?;
        originals.push(registry.push(&layout, &format!("sample:{version}"))?);
    }
    let new_of = |version: &str| -> Result<Vec<String>> {
        let manifest = registry.manifest(&format!("sample:{version}"))?;
        let mut new = vec![
            digest_in(&manifest["config"])?.to_string(),
            digest_in(list(&manifest["layers"]).last().expect("it has layers"))?.to_string(),
        ];
        new.sort();
        Ok(new)
    };
    let cache = scratch.join("cache");
    let convert = |version: usize, destination: &str, options: &[&str]| {
        let destination = registry.reference(destination);
        let arguments = ["convert", &originals[version - 1], &destination];
        lazuli_ok(arguments.iter().chain(options)).map(drop)
    };
    let local = ["--cache", text(&cache)];
    convert(1, "lazy:v1", &local)?;

    // This machine knows: only the new layer is read, and sent with nothing else (configs are mounted).
    let (read, sent) = work_of(&registry, || convert(2, "lazy:v2", &local))?;
    assert_eq!((read, sent), (new_of("v2")?, 1));
    // Another repository gets the layers without a byte of them.
    let (read, sent) = work_of(&registry, || convert(2, "other:v2", &local))?;
    assert_eq!((read.len(), sent), (1, 0), "{read:?}");
    assert_eq!(registry.manifest("other:v2")?, registry.manifest("lazy:v2")?);
    // A machine that knows nothing learns it from a named image, or from what the destination's tag is now.
    let (read, sent) = work_of(&registry, || convert(3, "lazy:v3", &["--cache-from", &registry.reference("lazy:v1")]))?;
    assert_eq!((read, sent), (new_of("v3")?, 1));
    let (read, sent) = work_of(&registry, || convert(2, "lazy:v3", &[]))?;
    assert_eq!((read, sent), (new_of("v2")?, 0));
    // Other options are another conversion, and nobody has to use a cache.
    let all = list(&registry.manifest("sample:v2")?["layers"]).len() + 1;
    let (read, _) = work_of(&registry, || convert(2, "lazy:v2", &[&local[..], &["--level", "4"]].concat()))?;
    assert_eq!(read.len(), all);
    let (read, _) = work_of(&registry, || convert(2, "lazy:v2", &["--no-cache"]))?;
    assert_eq!(read.len(), all);
    Ok(())
}

#[test]
fn blobs_of_a_sister_repository_are_mounted_and_not_moved() -> Result<()> {
    let scratch = Scratch::new("sister-repository")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = Layout::create(scratch.join("module"))?;
    let config = layout.add("application/vnd.wasm.config.v0+json", b"{\"a\":1}")?;
    let module = layout.add("application/wasm", &noise(4, 5000))?;
    layout.tag(layout.add_manifest(&config, &[module])?)?;
    let original = registry.push(&layout.reference(), "sample:wasm")?;
    let copy = registry.reference("copy/of/sample:wasm");
    let (read, sent) = work_of(&registry, || lazuli_ok(["convert", &original, &copy]).map(drop))?;
    assert_eq!((read, sent), (Vec::new(), 0));
    assert_eq!(registry.manifest("copy/of/sample:wasm")?, registry.manifest("sample:wasm")?);
    Ok(())
}

#[test]
fn a_directory_of_hosts_says_where_a_registry_is() -> Result<()> {
    let scratch = Scratch::new("hosts-directory")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = image_of(vec![TarLayer::new().file("a", "a").finish()?]).write(&scratch, "image")?;
    registry.push(&layout, "sample:v1")?;
    let hosts = scratch.directory("hosts/registry.test_5000_")?.join("hosts.toml");
    fs::write(&hosts, format!("server = \"http://{}\"\n", registry.address())).at("writing", &hosts)?;
    let named = ["registry.test:5000/sample:v1", "registry.test:5000/sample:lazy"];
    let hosts_dir = scratch.join("hosts");
    lazuli_ok(["convert", "--hosts-dir", text(&hosts_dir), named[0], named[1]])?;
    assert_eq!(registry.tags("sample"), ["lazy", "v1"]);
    Ok(())
}
