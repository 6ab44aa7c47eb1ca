//! `lazuli check` of an index: everything that it lists.

use std::fs;

use crate::scene::Scene;
use converter::image::manifest::Descriptor;
use registry::media_type::{OCI_INDEX, OCI_MANIFEST};
use serde_json::{Value, json};

/// `src` with two images and an attestation, converted to `dst`; the index of that.
fn converted(scene: &Scene) -> Value {
    let image = |architecture: &str| {
        let platform = json!({"os": "linux", "architecture": architecture});
        let mut entry = serde_json::to_value(scene.put_marked(platform.clone(), architecture)).unwrap();
        entry["platform"] = platform;
        entry
    };
    let [first, second] = ["amd64", "arm64"].map(image);
    let config = scene.put("application/vnd.oci.image.config.v1+json", b"{}");
    let statement = scene.put("application/vnd.in-toto+json", b"a statement");
    let attestation = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [statement]});
    let attestation = scene.put(OCI_MANIFEST, attestation.to_string().as_bytes());
    let mut attestation = serde_json::to_value(attestation).unwrap();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.digest": first["digest"]});
    scene.put_index_of(vec![first, second, attestation]);
    scene.convert(&["--all-platforms"]);
    read(scene, &index_of(scene)["manifests"][0])
}

fn index_of(scene: &Scene) -> Value {
    serde_json::from_slice(&fs::read(scene.path("dst/index.json")).unwrap()).unwrap()
}

fn read(scene: &Scene, descriptor: &Value) -> Value {
    let digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
    serde_json::from_slice(&fs::read(scene.blob("dst", &digest)).unwrap()).unwrap()
}

fn put(scene: &Scene, content: &[u8]) -> Descriptor {
    let descriptor = Descriptor::of(OCI_INDEX, content);
    fs::write(scene.blob("dst", &descriptor.digest), content).unwrap();
    descriptor
}

/// The output of a check of `dst` with this index, and its exit code.
fn check(scene: &Scene, list: &Value, arguments: &[&str]) -> (String, Option<i32>) {
    let image = format!("oci:dst@{}", put(scene, list.to_string().as_bytes()).digest);
    let mut index = index_of(scene);
    let root = put(scene, list.to_string().as_bytes());
    index["manifests"].as_array_mut().unwrap().push(serde_json::to_value(root).unwrap());
    fs::write(scene.path("dst/index.json"), index.to_string()).unwrap();
    let output = scene.lazuli(&[&["check", &image], arguments].concat());
    (String::from_utf8([output.stdout, output.stderr].concat()).unwrap(), output.status.code())
}

#[test]
fn of_an_index_every_image_and_every_attestation_is_checked() {
    let scene = Scene::new();
    let list = converted(&scene);
    let against = ["--against", "oci:src"];
    let (said, code) = check(&scene, &list, &against);
    assert!(said.ends_with("with 2 images (linux/amd64, linux/arm64) and 1 artifact is sound\n"), "{said}");
    assert_eq!(code, Some(0), "{said}");
    // The statement, read by nobody else.
    let attestation = read(&scene, &list["manifests"][2]);
    let statement = scene.blob("dst", &attestation["layers"][0]["digest"].as_str().unwrap().parse().unwrap());
    fs::write(&statement, "A statement").unwrap();
    let (said, code) = check(&scene, &list, &[]);
    assert!(said.contains("artifact sha256:") && said.contains("its digest is sha256:"), "{said}");
    assert_eq!(code, Some(1));
    fs::write(&statement, "a statement").unwrap();

    let check_found = |change: &dyn Fn(&mut Value), words: &str| {
        let mut changed = list.clone();
        change(&mut changed);
        let (said, code) = check(&scene, &changed, &against);
        assert!(said.contains(words), "{words} in {said}");
        assert_eq!(code, Some(1), "{said}");
    };
    check_found(&|list| drop(list["manifests"].as_array_mut().unwrap().pop()), "it has 2 entries, the original 3");
    check_found(&|list| list["manifests"].as_array_mut().unwrap().swap(0, 1), "entry 1, platform");
    check_found(
        &|list| list["manifests"][1]["digest"] = list["manifests"][0]["digest"].clone(),
        "linux/arm64: config: its digest",
    );
    check_found(
        &|list| {
            let about = list["manifests"][1]["digest"].clone();
            list["manifests"][2]["annotations"]["vnd.docker.reference.digest"] = about;
        },
        "entry 3, annotation vnd.docker.reference.digest",
    );
    check_found(&|list| list["manifests"][1]["digest"] = format!("sha256:{}", "0".repeat(64)).into(), "entry 2: ");
    // An attestation that is not the original's.
    let mut other = attestation.clone();
    other["annotations"] = json!({"of": "another"});
    let other = serde_json::to_value(put(&scene, other.to_string().as_bytes())).unwrap();
    check_found(
        &|list| {
            list["manifests"][2]["digest"] = other["digest"].clone();
            list["manifests"][2]["size"] = other["size"].clone();
        },
        "which must stay as it is",
    );
}

/// The image for another platform is another tenant's business as much as that for this one.
#[test]
fn an_image_for_another_platform_is_not_overlooked() {
    let scene = Scene::new();
    let mut list = converted(&scene);
    let mut other = read(&scene, &list["manifests"][1]);
    other["layers"] = read(&scene, &list["manifests"][0])["layers"].clone();
    let other = serde_json::to_value(put(&scene, other.to_string().as_bytes())).unwrap();
    list["manifests"][1]["digest"] = other["digest"].clone();
    list["manifests"][1]["size"] = other["size"].clone();
    let (said, code) = check(&scene, &list, &["--against", "oci:src"]);
    assert!(said.contains("image linux/arm64: layer 1") && code == Some(1), "{said}");
    // Each alone, where that is asked for.
    let alone = |platform| check(&scene, &list, &["--against", "oci:src", "--platform", platform]).1;
    assert_eq!([alone("linux/amd64"), alone("linux/arm64")], [Some(0), Some(1)]);
}
