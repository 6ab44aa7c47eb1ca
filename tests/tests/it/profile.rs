//! A start is recorded by running it, goes into the hot packs, and is found there by the next version.

use std::{fs, path::Path, time::Duration};

use lazuli_tests::{
    Compression, ImageBuilder, Result, Scratch, TarLayer,
    error::Context as _,
    image::layout_manifest,
    process::{command, finish},
    programs::{lazuli, lazuli_ok, program},
    samples::readable_layers,
};
use serde_json::Value;

/// Reads one file by name and the end of another, which no look at the image would tell, is ready and goes on for so many
/// seconds, by which it is known.
fn script(seconds: u32) -> String {
    let read = "name=greet\ncat /etc/${name}ing\ntail -c 4096 /large/3 | sha256sum";
    format!("#!/bin/sh\n{read}\necho ready\nexec sleep {seconds}\n")
}

/// An image whose command is `script`, converted without hot packs.
fn image(scratch: &Scratch, name: &str, script: &str) -> Result<String> {
    let top = TarLayer::new().directory("app").program("app/start", script).file("app/unread", "x").finish()?;
    let layers = readable_layers()?.into_iter().chain([top]);
    let builder = ImageBuilder::new().command(&["/app/start"]);
    layers.fold(builder, |image, tar| image.layer(tar, Compression::Gzip)).write(scratch, name)
}

fn converted(scratch: &Scratch, source: &str, name: &str, options: &[&str]) -> Result<String> {
    let target = format!("oci:{}:lazy", scratch.join(name).display());
    lazuli_ok([&["convert", "--no-cache", source, &target], options].concat())?;
    Ok(target)
}

fn read(path: &Path) -> Result<Value> {
    serde_json::from_slice(&fs::read(path).context("reading a profile")?).context("parsing a profile")
}

fn paths(profile: &Value) -> Vec<&str> {
    profile["files"].as_array().into_iter().flatten().filter_map(|file| file["path"].as_str()).collect()
}

/// Nothing of a recording stays: no mount, no process, no directory.
fn assert_nothing_is_left(scratch: &Scratch, seconds: u32) -> Result<()> {
    let left = fs::read_dir(scratch.join("work")).context("listing")?.count();
    assert_eq!(left, 0);
    let mounts = fs::read_to_string("/proc/mounts").context("reading mounts")?;
    assert!(!mounts.contains(&scratch.join("work").display().to_string()), "{mounts}");
    assert!(!is_running(seconds));
    Ok(())
}

fn is_running(seconds: u32) -> bool {
    let found = finish(&mut command("pgrep", ["-x", "-f", &format!("sleep {seconds}")]));
    found.is_ok_and(|found| !found.stdout.is_empty())
}

#[test]
fn a_recorded_start_is_what_the_hot_packs_have_in_both_modes_and_the_next_version_keeps_it() -> Result<()> {
    let scratch = Scratch::new("profile")?;
    let work = scratch.directory("work")?.display().to_string();
    let original = image(&scratch, "image", &script(1001))?;
    let plain = converted(&scratch, &original, "plain", &["--no-hot-pack"])?;
    for mode in ["erofs", "fuse"] {
        let profile = scratch.join(mode);
        let file = profile.display().to_string();
        let words = ["profile", "record", "--ready-line", "ready", "--record-mode", mode, "--work", &work, "-o", &file];
        lazuli_ok([&words[..], &[&plain]].concat())?;
        assert_nothing_is_left(&scratch, 1001)?;
        let profile = read(&profile)?;
        let found = paths(&profile);
        let first = |path: &str| found.iter().position(|found| *found == path).unwrap_or(usize::MAX);
        assert!(
            first("/app/start") < first("/etc/greeting") && first("/etc/greeting") < first("/large/3"),
            "{found:?}"
        );
        assert!(first("/bin/busybox") < usize::MAX && !found.contains(&"/app/unread"), "{found:?}");
        assert_eq!(found.iter().filter(|path| path.starts_with("/large")).count(), 1, "{found:?}");
    }

    let file = scratch.join("erofs").display().to_string();
    let first = converted(&scratch, &original, "first", &["--profile", &file])?;
    let exported = scratch.join("exported").display().to_string();
    lazuli_ok(["profile", "export", "-o", &exported, &first])?;
    let (recorded, exported) = (read(Path::new(&file))?, read(Path::new(&exported))?);
    let sorted = |profile| {
        let mut paths = paths(profile);
        paths.sort_unstable();
        paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(sorted(&exported), sorted(&recorded));

    let next = image(&scratch, "next", &script(1001).replace("greet", "gree"))?;
    let target = format!("oci:{}:lazy", scratch.join("second").display());
    lazuli_ok(["convert", "--cache", &work, "--cache-from", &first, &next, &target])?;
    let carried = scratch.join("carried").display().to_string();
    lazuli_ok(["profile", "export", "-o", &carried, &target])?;
    assert_eq!(sorted(&read(Path::new(&carried))?), sorted(&recorded));
    // Three of four layers are those of the first version: they were not converted again.
    let blobs = |layout: &str| -> Result<Vec<String>> {
        let layers = layout_manifest(layout)?["layers"].as_array().cloned().unwrap_or_default();
        Ok(layers.iter().map(|layer| layer["digest"].to_string()).collect())
    };
    assert_eq!(blobs(&first)?[..3], blobs(&target)?[..3]);
    Ok(())
}

#[test]
fn convert_records_and_converts_in_one_command() -> Result<()> {
    let scratch = Scratch::new("profile-convert")?;
    let work = scratch.directory("work")?.display().to_string();
    let original = image(&scratch, "image", &script(1002))?;
    let target = converted(&scratch, &original, "lazy", &["--record", "--ready-line", "ready", "--work", &work])?;
    assert_nothing_is_left(&scratch, 1002)?;
    let exported = scratch.join("exported").display().to_string();
    lazuli_ok(["profile", "export", "-o", &exported, &target])?;
    let exported = read(Path::new(&exported))?;
    assert!(paths(&exported).contains(&"/etc/greeting") && !paths(&exported).contains(&"/app/unread"), "{exported}");
    Ok(())
}

#[test]
fn a_start_that_cannot_be_recorded_says_why_and_leaves_nothing() -> Result<()> {
    let scratch = Scratch::new("profile-faults")?;
    let work = scratch.directory("work")?.display().to_string();
    let record = |script: &str, name: &str, words: &[&str]| -> Result<String> {
        let original = image(&scratch, name, script)?;
        let plain = converted(&scratch, &original, &format!("{name}.lazy"), &["--no-hot-pack"])?;
        let output = scratch.join(format!("{name}.profile"));
        let (file, base) = (output.display().to_string(), ["profile", "record", "--work", &work]);
        let finished = lazuli([&base[..], words, &["-o", &file, &plain]].concat())?;
        assert_eq!(finished.code, Some(1), "{}", finished.stderr);
        assert!(!output.exists());
        assert_nothing_is_left(&scratch, 1003)?;
        Ok(finished.stderr.lines().last().unwrap_or_default().to_owned())
    };
    let ended = record("#!/bin/sh\necho broken\nexit 3\n", "ends", &["--ready-line", "ready"])?;
    assert!(
        ended.ends_with("the container ended (exit status: 3) before it was ready; its last lines: broken"),
        "{ended}"
    );
    let late = record(&script(1003), "late", &["--ready-line", "never said", "--ready-within", "2"])?;
    assert!(late.contains("not ready after 2 s; its last lines: ") && late.contains("ready"), "{late}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("binding")?;
    let port = listener.local_addr().context("the address")?.port().to_string();
    let taken = record(&script(1003), "port", &["--ready-port", &port])?;
    assert!(taken.contains(&format!("port {port} answers already")), "{taken}");

    let original = image(&scratch, "ordinary", &script(1003))?;
    let ordinary = lazuli(["profile", "record", "--work", &work, &original])?;
    assert!(ordinary.stderr.contains("is an ordinary layer: convert the image first"), "{}", ordinary.stderr);
    let derived = converted(&scratch, &original, "derived", &[])?;
    let none = lazuli(["profile", "export", &derived])?;
    assert!(none.stderr.contains("no profile is in its hot packs"), "{}", none.stderr);
    Ok(())
}

#[test]
fn a_recording_that_is_interrupted_leaves_nothing() -> Result<()> {
    let scratch = Scratch::new("profile-interrupted")?;
    let work = scratch.directory("work")?.display().to_string();
    let original = image(&scratch, "image", &script(1004))?;
    let plain = converted(&scratch, &original, "plain", &["--no-hot-pack"])?;
    let words = ["profile", "record", "--ready-line", "never", "--work", &work, &plain];
    let mut child = command(program("lazuli")?, words).spawn().context("starting lazuli")?;
    for _ in 0..200 {
        if is_running(1004) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(is_running(1004));
    finish(&mut command("kill", ["-INT", &child.id().to_string()]))?;
    let status = child.wait().context("waiting for lazuli")?;
    assert_eq!(status.code(), Some(1));
    assert_nothing_is_left(&scratch, 1004)
}
