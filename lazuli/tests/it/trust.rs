//! An image's words about itself, and content at a destination, are believed as far as it was compared.

use std::{
    fs, iter,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use crate::scene::{Scene, gzip, layer_type, list, tar};
use converter::image::manifest::{Descriptor, ImageManifest};
use format_spec::{
    Digest,
    annotation::{SOURCE_DIFF_ID, SOURCE_DIGEST, SOURCE_OPTIONS},
};
use registry::media_type::OCI_MANIFEST;
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, Signal, kill_process},
};
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

/// Anybody who may have an image converted could make everybody's base layer his own: his image says of its lazy layer
/// that it was made from the base layer, and with the next version of it the machine learned that.
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
        assert_eq!(done["is_cached"], destination == "oci:dst:other");
    }
}

#[test]
fn what_a_destination_says_is_used_once_it_was_compared() {
    let scene = Scene::new();
    put(&scene, &tar(&[("a", 1000)]));
    let (first, done) = convert(&scene, "oci:dst:v1", &[]);
    assert_eq!(done["is_cached"], false);
    let (second, done) = convert(&scene, "oci:dst:v1", &[]);
    assert_eq!((second, done["is_cached"].clone()), (first, json!(true)));
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

/// An image of one layer, converted to `dst`; returns its manifest as a document.
fn converted(scene: &Scene) -> Value {
    put(scene, &tar(&[("bin/sh", 1000)]));
    serde_json::to_value(convert(scene, "oci:dst", &[]).0).unwrap()
}

/// Makes this document the image of `dst`; returns what `check --against oci:src` finds, or how it refuses, and the
/// exit code.
fn check(scene: &Scene, manifest: &str, arguments: &[&str]) -> (String, Option<i32>) {
    let descriptor = Descriptor::of(OCI_MANIFEST, manifest.as_bytes());
    fs::write(scene.blob("dst", &descriptor.digest), manifest).unwrap();
    let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
    fs::write(scene.path("dst/index.json"), index.to_string()).unwrap();
    let output = scene.lazuli(&[&["check", "oci:dst", "--against", "oci:src"], arguments].concat());
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (text, output.status.code())
}

fn check_finds(scene: &Scene, manifest: &str, words: &[&str]) {
    let (text, code) = check(scene, manifest, &[]);
    assert_eq!(code, Some(1), "{text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains("is sound"), "{text}");
}

/// A hostile lazy layer under the config of the original: its descriptor and the place of its blob.
fn hostile_layer(scene: &Scene) -> Value {
    put(scene, &tar(&[("bin/sh", 1001)]));
    let layer = convert(scene, "oci:evil", &[]).0.layers.remove(0);
    fs::copy(scene.blob("evil", &layer.digest), scene.blob("dst", &layer.digest)).unwrap();
    serde_json::to_value(layer).unwrap()
}

#[test]
fn a_lazy_layer_is_checked_wherever_it_says_that_it_lies() {
    let scene = Scene::new();
    let mut manifest = converted(&scene);
    let mut evil = hostile_layer(&scene);
    put(&scene, &tar(&[("bin/sh", 1000)]));
    assert_eq!(check(&scene, &manifest.to_string(), &[]).1, Some(0));
    evil["urls"] = json!(["https://registry.example/layer"]);
    manifest["layers"][0] = evil;
    check_finds(&scene, &manifest.to_string(), &["its digest is", "urls: it is"]);
}

#[test]
fn a_layer_that_must_not_be_redistributed_is_compared_with_its_diff_id() {
    let scene = Scene::new();
    let mut manifest = converted(&scene);
    let evil = gzip(&tar(&[("bin/sh", 1001)]));
    let kind = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    let layer = Descriptor::of(kind, &evil);
    fs::write(scene.blob("dst", &layer.digest), evil).unwrap();
    manifest["layers"][0] = serde_json::to_value(layer).unwrap();
    check_finds(&scene, &manifest.to_string(), &["the diff ID in the config is"]);
}

/// containerd and skopeo take keys without regard to case, the last of several.
#[test]
fn documents_that_programs_read_in_two_ways_are_refused_by_all_commands() {
    let scene = Scene::new();
    let manifest = converted(&scene);
    let evil = hostile_layer(&scene);
    put(&scene, &tar(&[("bin/sh", 1000)]));
    let text = manifest.to_string();
    let doubled = text.replacen(r#""layers":"#, &format!(r#""Layers":[{evil}],"layers":"#), 1);
    check_finds(&scene, &doubled, &[r#"some programs take the key "Layers" for "layers""#]);
    for command in [&["inspect", "oci:dst"][..], &["convert", "oci:dst", "oci:other"], &["mount", "oci:dst", "src"]] {
        let output = scene.lazuli(command);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains(r#"the key "Layers""#), "{command:?}: {error}");
    }
    let twice = text.replacen(r#""layers":"#, &format!(r#""layers":[{evil}],"layers":"#), 1);
    check_finds(&scene, &twice, &["programs take one of the keys"]);
}

#[test]
fn what_an_image_has_and_the_original_has_not_is_found() {
    let scene = Scene::new();
    let manifest = converted(&scene);
    let with = |change: fn(&mut Value)| {
        let mut changed = manifest.clone();
        change(&mut changed);
        changed.to_string()
    };
    check_finds(&scene, &with(|manifest| manifest["subject"] = json!({"odd": true})), &["manifest, subject: it is"]);
    check_finds(&scene, &with(|manifest| manifest["artifactType"] = "a/b".into()), &["manifest, artifactType"]);
    check_finds(&scene, &with(|manifest| manifest["annotations"]["more"] = "x".into()), &["manifest, annotation more"]);
    for key in ["containerd.io/snapshot/lazuli/image", "containerd.io/snapshot/cri.image-ref", "note"] {
        let mut changed = manifest.clone();
        changed["layers"][0]["annotations"][key] = "registry.example/other".into();
        check_finds(&scene, &changed.to_string(), &[&format!("annotation {key}: it is")]);
    }
    let origin = |manifest: &mut Value| {
        manifest["layers"][0]["annotations"][SOURCE_DIFF_ID] = Digest::of(b"other").to_string().into();
    };
    check_finds(&scene, &with(origin), &["annotation io.lazuli.source.diff-id: it is"]);
}

#[test]
fn an_image_of_which_a_part_lies_elsewhere_is_not_called_sound() {
    let scene = Scene::new();
    let tar = tar(&[("a", 10)]);
    let mut layer = Descriptor::of("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", &gzip(&tar));
    layer.rest.insert("urls".to_owned(), json!(["https://registry.example/layer"]));
    // A length that nobody can add up, of a blob that nobody reads.
    layer.size = 1 << 63;
    let other = Descriptor { digest: Digest::of(b"other"), ..layer.clone() };
    scene.put_image(vec![layer, other], &[Digest::of(&tar), Digest::of(b"tar")]);
    convert(&scene, "oci:dst", &[]);
    assert!(scene.lazuli(&["inspect", "oci:dst"]).status.success());
    let output = scene.lazuli(&["check", "oci:dst", "--against", "oci:src"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("has nothing wrong in what was checked of it") && !text.contains("sound"), "{text}");
    let allowed = scene.lazuli(&["check", "oci:dst", "--against", "oci:src", "--allow-unchecked"]);
    assert_eq!(allowed.status.code(), Some(0));
}

/// Such a layer was asked for at the source, where it is not, unless its media type said that it lies elsewhere.
#[test]
fn a_layer_that_lies_elsewhere_stays_there_however_it_is_compressed() {
    for suffix in ["+zstd", "+gzip", ""] {
        let scene = Scene::new();
        let tar = tar(&[("a", 10)]);
        let mut far = Descriptor::of(&layer_type(suffix), b"far away");
        far.rest.insert("urls".to_owned(), json!(["https://registry.example/layer"]));
        let near = scene.put(&layer_type("+gzip"), &gzip(&tar));
        scene.put_image(vec![far.clone(), near], &[Digest::of(b"far"), Digest::of(&tar)]);
        let (image, _) = convert(&scene, "oci:dst", &[]);
        assert_eq!(image.layers[0], far, "{suffix}");
        assert_eq!(content(&scene, "dst", &image.layers[1]), tar);
    }
}

/// A copy for one platform has the index of all: the first image that was not there ended the search.
#[test]
fn an_index_of_which_images_are_missing_gives_the_layers_of_those_that_are_there() {
    let scene = Scene::new();
    let entry = |architecture: &str| {
        let platform = json!({"os": "linux", "architecture": architecture});
        let mut entry = serde_json::to_value(scene.put_marked(platform.clone(), architecture)).unwrap();
        entry["platform"] = platform;
        entry
    };
    scene.put_index_of(vec![entry("amd64"), entry("arm64")]);
    scene.convert(&["--all-platforms"]);
    let first = scene.index("dst").known().next().unwrap().digest;
    fs::remove_file(scene.blob("dst", &first)).unwrap();
    let arguments = ["--cache-from", "oci:dst:v1", "--platform", "linux/arm64"];
    let (_, done) = convert(&scene, "oci:dst:v2", &arguments);
    assert_eq!(done["is_cached"], true);
}

/// An image could clear the findings off the screen and print the verdict itself.
#[test]
fn no_byte_of_an_image_is_a_command_to_a_terminal() {
    let scene = Scene::new();
    let architecture = "amd64\u{1b}[2J\n oci:src linux/amd64 is sound\u{1b}[8m";
    let mut image = scene.put_marked(json!({"os": "linux", "architecture": architecture}), "text");
    image.annotations = Some([("org.opencontainers.image.ref.name".to_owned(), "a\u{1b}[2J".to_owned())].into());
    scene.put_index(vec![image.clone(), image]);
    for arguments in [
        &["check", "oci:src:@0"][..],
        &["inspect", "oci:src:@0"],
        &["convert", "oci:src:@0", "oci:dst", "--platform", "linux/amd64"],
        &["check", "oci:src:none"],
    ] {
        let output = scene.lazuli(arguments);
        let text = [output.stdout, output.stderr].concat();
        assert!(!text.is_empty() && text.iter().all(|byte| *byte != 0x1b), "{arguments:?}: {text:?}");
        assert!(!String::from_utf8(text).unwrap().contains("\n oci:src linux/amd64 is sound"), "{arguments:?}");
    }
}

/// docker reads a command that is a text; what a start reads is a hint.
#[test]
fn a_config_that_only_the_hint_cannot_read_does_not_end_a_conversion() {
    let scene = Scene::new();
    scene.put_index(vec![
        scene.put_marked(json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": "/bin/sh"}}), "text"),
    ]);
    let output = scene.lazuli(&["convert", "oci:src", "oci:dst"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.contains("no hot packs"), "{told}");
}

/// Each word of a command is looked up in each directory of its `PATH`.
#[test]
fn a_start_that_takes_too_long_to_find_out_is_said() {
    let scene = Scene::new();
    // A program of 64 bits without sections and segments (ELF-64 object file format, 3).
    let mut program = b"\x7fELF\x02\x01\x01".to_vec();
    program.resize(64, 0);
    program[20] = 1;
    program[52] = 64;
    let tar = test_kit::tar([("run", 0o755, program)]);
    let layer = scene.put(&layer_type("+gzip"), &gzip(&tar));
    let directory = "/".to_owned() + &("d".repeat(250) + "/").repeat(15) + ":";
    let is_said = |word_count: usize, directory_count: usize| {
        let words = (0..word_count).map(|word| format!("w{word}"));
        let words: Vec<_> = iter::once("/run".to_owned()).chain(words).collect();
        let config = json!({"Cmd": words, "Env": [format!("PATH={}", directory.repeat(directory_count))]});
        let config = json!({"os": "linux", "architecture": "amd64", "config": config});
        scene.put_index(vec![scene.put_image_for(config, vec![layer.clone()], &[Digest::of(&tar)])]);
        let output = scene.lazuli(&["convert", "--no-cache", "oci:src", "oci:dst"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap().contains("the search for what a start reads was ended")
    };
    assert_eq!([is_said(10, 10), is_said(600, 200)], [false, true]);
}

/// Two conversions into one layout: the one that is interrupted takes nothing away that the other relies on.
#[test]
fn a_conversion_that_gives_up_leaves_what_another_relies_on() {
    let scene = Scene::new();
    let base = scene.put(&layer_type("+gzip"), &gzip(&tar(&[("base", 1000)])));
    let top = tar(&[("top", 10)]);
    let waiting = scene.put(&layer_type("+gzip"), &gzip(&top));
    let base_id = Digest::of(&tar(&[("base", 1000)]));
    let amd64 = json!({"os": "linux", "architecture": "amd64"});
    let both = scene.put_image_for(amd64.clone(), vec![base.clone(), waiting.clone()], &[base_id, Digest::of(&top)]);
    let first = scene.put_image_for(amd64, vec![base], &[base_id]);
    // The first image of the index is done when the second one waits for a layer that does not come.
    scene.put_index_of([&first, &both].map(|image| serde_json::to_value(image).unwrap()).into());
    let path = scene.blob("src", &waiting.digest);
    fs::remove_file(&path).unwrap();
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let start = |destination: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
        let arguments = ["convert", "--json", "--no-cache", "--all-platforms", "oci:src", destination];
        command.args(arguments).current_dir(scene.directory.path()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let interrupted = start("oci:dst:interrupted");
    let writer = fs::File::options().write(true).open(&path).unwrap();
    scene.put_index(vec![first]);
    let (image, _) = convert(&scene, "oci:dst:finished", &["--no-cache"]);
    kill_process(Pid::from_child(&interrupted), Signal::HUP).unwrap();
    let output = interrupted.wait_with_output().unwrap();
    drop(writer);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "lazuli: interrupted\n");
    assert!(scene.lazuli(&["check", "oci:dst:finished"]).status.success());
    assert_eq!(content(&scene, "dst", &image.layers[0]), tar(&[("base", 1000)]));
}

#[test]
fn a_layout_that_was_begun_is_gone_on_with() {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("dst/blobs/sha256")).unwrap();
    fs::write(scene.path("dst/blobs/sha256/.tmp123"), "half").unwrap();
    convert(&scene, "oci:dst", &[]);
    assert!(scene.path("dst/oci-layout").exists());
    fs::create_dir(scene.path("other")).unwrap();
    fs::write(scene.path("other/file"), "").unwrap();
    let output = scene.lazuli(&["convert", "oci:src", "oci:other"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn an_archive_takes_the_place_of_no_device() {
    let scene = Scene::new();
    let device = scene.path("device");
    mknodat(CWD, &device, FileType::Fifo, Mode::RWXU, 0).unwrap();
    fs::write(scene.path("real.tar"), "old").unwrap();
    std::os::unix::fs::symlink("real.tar", scene.path("link.tar")).unwrap();
    let output = scene.lazuli(&["convert", "oci:src", "oci-archive:device"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("device: no regular file"), "{error}");
    assert!(!fs::metadata(&device).unwrap().is_file());
    assert!(scene.lazuli(&["convert", "oci:src", "oci-archive:link.tar"]).status.success());
    assert!(scene.path("link.tar").is_symlink() && fs::metadata(scene.path("real.tar")).unwrap().len() > 1000);
}

/// Nobody reads the progress, and the result has no place.
#[test]
fn a_closed_pipe_ends_no_conversion_and_a_full_disk_is_said() {
    let scene = Scene::new();
    let run = |destination: &str, stdout: Stdio, stderr: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
        command.args(["convert", "--no-cache", "oci:src", destination]).current_dir(scene.directory.path());
        command.stdout(stdout).stderr(stderr).status().unwrap()
    };
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    assert_eq!(run("oci:one", Stdio::null(), closed()).code(), Some(0));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(run("oci:two", full.into(), closed()).code(), Some(1));
    for layout in ["one", "two"] {
        assert!(scene.lazuli(&["check", &format!("oci:{layout}")]).status.success());
    }
}

/// Empty and relative paths in the environment name no directory.
#[test]
fn a_cache_lies_in_the_directory_of_a_user_or_nowhere() {
    let scene = Scene::new();
    let home = scene.path("home");
    for (cache, home, expected) in [("", "", None), (".cache", "", None), ("", home.to_str().unwrap(), Some(".cache"))]
    {
        // A layer that the destination has is learned from it, and not remembered.
        let _ = fs::remove_dir_all(scene.path("dst"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli"));
        command.args(["convert", "oci:src", "oci:dst"]).current_dir(scene.directory.path());
        let output = command.env("XDG_CACHE_HOME", cache).env("HOME", home).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let expected = expected.map(|name| format!("{home}/{name}/lazuli/conversions/key"));
        assert!(expected.is_none_or(|path| fs::exists(path).unwrap()));
    }
    assert_eq!(list(scene.directory.path()), ["dst", "home", "src"]);
}

/// The blobs have lengths; nothing says how long the list is.
#[test]
fn a_device_in_the_place_of_the_list_of_a_layout_is_not_read_without_end() {
    let scene = Scene::new();
    fs::remove_file(scene.path("src/index.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", scene.path("src/index.json")).unwrap();
    let output = scene.lazuli(&["convert", "oci:src", "oci:dst"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("it is no regular file") && output.status.code() == Some(1), "{text}");
}

#[test]
fn a_layout_is_as_private_as_its_user_wants_it() {
    let scene = Scene::new();
    let program = env!("CARGO_BIN_EXE_lazuli");
    let command = format!("umask 077 && exec {program} convert --no-cache oci:src oci:dst");
    assert!(Command::new("sh").args(["-c", &command]).current_dir(scene.path("")).status().unwrap().success());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let blobs = scene.path("dst/blobs/sha256");
    let mut files: Vec<_> = list(&blobs).iter().map(|name| blobs.join(name)).collect();
    files.extend(["index.json", "oci-layout"].map(|name| scene.path("dst").join(name)));
    assert!(files.len() > 5 && files.iter().all(|file| mode(file) == 0o600), "{files:?}");
}
