//! A node records its starts, and has what they read when the next version of an image is started.
//!
//! Two versions of an image: their command is a shell, and a container reads a file that no look at the image tells. In
//! the second version this file is another one, in a layer on top. A container is made before one is started: whatever is
//! sent by then, nobody has asked for.

use std::{fs, thread, time::Duration};

use format_spec::Digest;
use lazuli_tests::{
    Compression, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry,
    containerd::LAZULI,
    error::Context as _,
    process::{run as run_to_end, wait_for},
    programs::{MODES, lazuli, lazuli_ok},
    samples::{LARGE_FILE_LEN, checksum_line, noise, readable_layers},
};

/// Length of the file that it reads.
const READ_LEN: u64 = LARGE_FILE_LEN as u64;
const READS: [&str; 3] = ["/bin/sh", "-c", "sha256sum /large/3"];

fn new_file() -> Vec<u8> {
    noise(1003, LARGE_FILE_LEN)
}

/// `app:1` and `app:2`, lazy.
fn publish(scratch: &Scratch) -> Result<TestRegistry> {
    let registry = TestRegistry::start(scratch)?;
    let layers = readable_layers()?;
    let changed = TarLayer::new().directory("large").file("large/2", noise(1002, LARGE_FILE_LEN));
    let changed = changed.file("large/3", new_file()).finish()?;
    let next: Vec<_> = layers.iter().cloned().chain([changed]).collect();
    for (tag, layers) in [("1", layers), ("2", next)] {
        let image = ImageBuilder::new();
        let image = layers.into_iter().fold(image, |image, tar| image.layer(tar, Compression::Gzip));
        let original = registry.push(&image.write(scratch, &format!("app-{tag}"))?, &format!("app:original-{tag}"))?;
        lazuli_ok(["convert", &original, &registry.reference(&format!("app:{tag}"))])?;
    }
    Ok(registry)
}

/// With a rate of 0 nothing is fetched by records.
fn node(scratch: &Scratch, mode: &str, rate: &str, records: &str) -> Result<Node> {
    Node::start_with(&["--mode", mode, "--background-rate", rate, "--record-starts", records], scratch)
}

/// Runs a container of the version to its end; returns the bytes that the registry sent for it.
fn run(node: &Node, registry: &TestRegistry, tag: &str, expected: &str) -> Result<u64> {
    let before = registry.blob_bytes()?;
    let finished =
        node.containerd.run(&registry.reference(&format!("app:{tag}")), LAZULI, &format!("app-{tag}"), &READS)?;
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), expected), "{}", finished.stderr);
    Ok(registry.blob_bytes()? - before)
}

fn pull(node: &Node, registry: &TestRegistry, tag: &str) -> Result<()> {
    let pulled = node.lazuli_pull(&registry.reference(&format!("app:{tag}")))?;
    assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
    Ok(())
}

/// Waits until the registry is asked for nothing any longer: all of the first version is there.
fn settle(registry: &TestRegistry) -> Result<()> {
    loop {
        let before = registry.blob_bytes()?;
        thread::sleep(Duration::from_secs(4));
        if registry.blob_bytes()? == before {
            return Ok(());
        }
    }
}

/// Makes a container of the second version, and starts it not.
fn create(node: &Node, registry: &TestRegistry) -> Result<()> {
    let create = ["containers", "create", "--snapshotter", LAZULI, &registry.reference("app:2"), "waiting"];
    run_to_end(&mut node.containerd.ctr(create)).map(drop)
}

fn new_checksum() -> String {
    format!("{}  /large/3\n", Digest::of(&new_file()).hex())
}

#[test]
fn the_next_version_is_sent_what_starts_read_before_a_container_asks() -> Result<()> {
    for mode in MODES {
        let scratch = Scratch::new(&format!("starts-{mode}"))?;
        let registry = publish(&scratch)?;
        let node = node(&scratch, mode, "1", "true")?;
        pull(&node, &registry, "1")?;
        run(&node, &registry, "1", &checksum_line(3))?;
        let root = node.snapshotter.root().display().to_string();
        let record = || lazuli(["profile", "node", "--root", &root, &registry.reference("app:1")]);
        let recorded = wait_for("the start was not recorded", || {
            let found = record()?;
            Ok((found.code == Some(0) && found.stdout.contains("/large/3")).then_some(found.stdout))
        })?;
        assert!(!recorded.contains("/large/2") && !recorded.contains("origin"), "{recorded}");

        settle(&registry)?;
        let before = registry.blob_bytes()?;
        pull(&node, &registry, "2")?;
        create(&node, &registry)?;
        let moved = wait_for("nothing was fetched for the next version", || {
            Ok(Some(registry.blob_bytes()? - before).filter(|moved| *moved >= READ_LEN))
        })?;
        assert!(moved < READ_LEN * 3 / 2, "{moved} bytes: more than what was read");
        let moved = run(&node, &registry, "2", &new_checksum())?;
        assert!(moved < READ_LEN / 2, "{mode}: {moved} bytes for a container that has all it reads");
    }
    Ok(())
}

#[test]
fn a_node_that_records_no_starts_fetches_nothing_before_a_container_asks() -> Result<()> {
    for mode in MODES {
        let scratch = Scratch::new(&format!("starts-off-{mode}"))?;
        let registry = publish(&scratch)?;
        let node = node(&scratch, mode, "0", "false")?;
        pull(&node, &registry, "1")?;
        run(&node, &registry, "1", &checksum_line(3))?;
        pull(&node, &registry, "2")?;
        create(&node, &registry)?;
        let moved = run(&node, &registry, "2", &new_checksum())?;
        assert!(moved >= READ_LEN, "{mode}: {moved} bytes: somebody knew what it reads");
        assert!(!node.snapshotter.root().join("starts").exists());
        let listed = lazuli(["profile", "node", "--root", &node.snapshotter.root().display().to_string()])?;
        assert!(listed.stderr.starts_with("no start is recorded in /"), "{}", listed.stderr);
    }
    Ok(())
}

#[test]
fn what_a_node_recorded_is_listed_and_serves_a_conversion() -> Result<()> {
    let scratch = Scratch::new("starts-profile")?;
    let registry = publish(&scratch)?;
    let node = node(&scratch, "auto", "0", "true")?;
    pull(&node, &registry, "1")?;
    run(&node, &registry, "1", &checksum_line(3))?;
    let root = node.snapshotter.root().display().to_string();
    let listed = wait_for("the start was not recorded", || {
        let listed = lazuli(["profile", "node", "--root", &root])?;
        Ok((!listed.stdout.is_empty()).then_some(listed.stdout))
    })?;
    assert!(listed.starts_with(&format!("{}: ", registry.reference("app"))), "{listed}");
    assert!(listed.contains(" files, ") && listed.ends_with(" ago\n") && listed.lines().count() == 1, "{listed}");

    let file = scratch.join("app.profile").display().to_string();
    lazuli_ok(["profile", "node", "--root", &root, "-o", &file, &registry.reference("app")])?;
    let target = format!("oci:{}:lazy", scratch.join("lazy").display());
    lazuli_ok(["convert", "--no-cache", "--profile", &file, &registry.reference("app:original-2"), &target])?;
    let exported = scratch.join("exported").display().to_string();
    lazuli_ok(["profile", "export", "-o", &exported, &target])?;
    let exported = fs::read_to_string(&exported).context("reading a profile")?;
    assert!(exported.contains("/large/3") && !exported.contains("/large/2"), "{exported}");

    let none = lazuli(["profile", "node", "--root", &root, "host/other:1"])?;
    assert_eq!(none.code, Some(1));
    assert!(none.stderr.contains("host/other: no start of it is recorded in /"), "{}", none.stderr);
    Ok(())
}
