//! Faults of the disk.

use std::{fs, path::PathBuf, thread, time::Duration};

use lazuli_tests::{
    FaultyRegistry, HarnessError, Node, Result, SnapshotterOptions, TarLayer,
    disks::{BadDisk, SmallDisk},
    error::Context as _,
    process::{command, run},
};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    bench::{Bench, HEALTHY_WITHIN, fused, logged, send},
    images::{HEALTHY_FILES, HEALTHY_LEN, SINGLE_LEN, healthy_content, publish_lazy, single, single_content},
    reader::{Seen, flip_bit, forget_pages},
    snapshots::{Call, Snapshots, has_code, words},
};

/// Where a node's root lies.
const ROOT: &str = "snapshotter";
/// Content that is read from the cache is written down every few seconds.
const WRITTEN_DOWN: Duration = Duration::from_secs(5);

/// The files called `name` of the layers in a node's cache.
fn cache_files(node: &Node, name: &str) -> Result<Vec<PathBuf>> {
    let layers = node.snapshotter.root().join("cache/layers");
    let entries = fs::read_dir(&layers).at("listing", &layers)?;
    Ok(entries.flatten().map(|entry| entry.path().join(name)).filter(|path| path.exists()).collect())
}

/// The cache directory of the layer of an image of one layer.
fn cache_of(node: &Node, repository: &str) -> Result<PathBuf> {
    let layers = cache_files(node, "layer.json")?;
    let found = layers.into_iter().find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(repository)));
    let record = found.ok_or_else(|| HarnessError::Unexpected(format!("no cache of {repository}")))?;
    Ok(record.parent().map(PathBuf::from).unwrap_or_default())
}

/// The whole disk is full, the log with it; then a daemon is killed; then there is room again.
pub(crate) fn full(bench: &Bench) -> Result<()> {
    let disk = SmallDisk::mount(&bench.scratch, ROOT, 64 << 20)?;
    let node = bench.node()?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    bench.read_healthy(&tree, 0)?;
    disk.fill()?;
    bench.healthy_line(&node, "no room, log and cache: a read of what is not there", &tree, 3)?;
    send(fused(&node)?, Signal::KILL)?;
    forget_pages(&tree.join("files/0")).at("forgetting pages of", &tree)?;
    bench.healthy_line(&node, "the same, lazuli-fused is killed: a read of what is there", &tree, 0)?;
    bench.healthy_line(&node, "the same: a read of what is not there", &tree, 5)?;
    disk.free()?;
    bench.healthy_line(&node, "there is room again", &tree, 7)?;
    Ok(())
}

/// The snapshotter's database has no room; then it has.
pub(crate) fn full_database(bench: &Bench) -> Result<()> {
    const CALLS: usize = 200;
    let disk = SmallDisk::mount(&bench.scratch, ROOT, 48 << 20)?;
    let node = bench.node()?;
    let snapshots = Snapshots::connect(&node)?;
    let prepare = |key: &str| snapshots.call(Call::Prepare, key, "", Duration::from_secs(10));
    let first = prepare("default/1/first");
    disk.fill()?;
    let answers = (0..CALLS).map(|number| prepare(&format!("default/{}/full", number + 10)));
    let refused = answers.into_iter().find(|answer| !has_code(answer, Code::Ok));
    let sees = refused.as_ref().map_or("200 snapshots without room".to_owned(), words);
    let is_right = refused.is_none_or(|answer| has_code(&answer, Code::ResourceExhausted));
    bench.line("no room for a snapshot", sees, logged(&node, &[]), is_right && has_code(&first, Code::Ok));
    let removed = snapshots.call(Call::Remove, "default/1/first", "", Duration::from_secs(10));
    bench.line("the same: one is removed", words(&removed), "", has_code(&removed, Code::Ok));
    disk.free()?;
    let again = prepare("default/2/again");
    bench.line("there is room again", words(&again), logged(&node, &[]), has_code(&again, Code::Ok));
    Ok(())
}

/// A block under the index of an image cannot be read: other images do not notice.
pub(crate) fn bad_block(bench: &Bench) -> Result<()> {
    let disk = BadDisk::mount(&bench.scratch, ROOT, 256 << 20)?;
    let mut node = bench.node()?;
    let victim = bench.registry.reference(&format!("{}:lazy", single(0)));
    let healthy = bench.registry.reference("healthy:lazy");
    let victim_tree = bench.pulled_and_mounted(&node, &victim)?;
    let healthy_tree = bench.pulled_and_mounted(&node, &healthy)?;
    for number in 0..HEALTHY_FILES {
        bench.read_healthy(&healthy_tree, number)?;
    }
    thread::sleep(WRITTEN_DOWN);
    let index = cache_of(&node, &single(0))?.join("index");
    run(&mut command("sync", ["-f", &node.snapshotter.root().to_string_lossy()]))?;
    disk.spoil(&index)?;
    // The next daemon must find the block, not the page that the last one left.
    let (snapshotter, daemon) = (node.snapshotter.id().unwrap_or_default(), fused(&node)?);
    send(snapshotter, Signal::STOP)?;
    send(daemon, Signal::KILL)?;
    thread::sleep(Duration::from_millis(200));
    forget_pages(&index).at("forgetting pages of", &index)?;
    let is_bad = fs::read(&index).is_err();
    send(snapshotter, Signal::CONT)?;
    let fault = "an unreadable block under an index";
    if !is_bad {
        bench.line(fault, "the block could be read all the same: not tried", "", false);
    }
    let again = bench.mount(&node, &healthy, Duration::from_secs(30))?;
    let sees = format!("another image: {}", again.words());
    bench.line(fault, sees, logged(&node, &["index"]), again.path().is_some());
    let (seen, expected) =
        (bench.read(&victim_tree.join("data"), SINGLE_LEN, Duration::from_secs(30))?, single_content(0));
    let sees = format!("its own running container: {}", seen.words(&expected));
    let is_right = !seen.is_wrong(&expected) && !matches!(seen, Seen::Waiting(_));
    bench.line(fault, sees, logged(&node, &["index"]), is_right);
    node.snapshotter.stop();
    Ok(())
}

/// Blocks under an index and a tree cannot be read any longer while they are mapped into `lazuli-fused`: it may end by
/// that once, not again and again.
pub(crate) fn mapped_bad_block(bench: &Bench) -> Result<()> {
    /// So many that the pages that are looked at are none that were looked at before.
    const FILES: u64 = 20_000;
    let content = |number: u64| format!("content of {number}").into_bytes();
    let layer = (0..FILES).fold(TarLayer::new().directory("files"), |layer, number| {
        layer.file(&format!("files/{number}"), content(number))
    });
    publish_lazy(&bench.scratch, &bench.upstream, "wide", layer)?;
    let disk = BadDisk::mount(&bench.scratch, ROOT, 256 << 20)?;
    let mut node = bench.node()?;
    let healthy = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    let wide = bench.pulled_and_mounted(&node, &bench.registry.reference("wide:lazy"))?;
    let root = node.snapshotter.root().to_owned();
    let mut mapped = vec![cache_of(&node, "wide")?.join("index")];
    if bench.mode == "fuse" {
        // Those of trees have no dot in their names.
        let trees = fs::read_dir(root.join("trees")).at("listing", &root)?.flatten().map(|entry| entry.path());
        mapped.extend(trees.filter(|path| path.extension().is_none() && !path.ends_with("next-slot")));
    }
    run(&mut command("sync", ["-f", &root.to_string_lossy()]))?;
    for path in &mapped {
        disk.spoil_all(path)?;
        forget_pages(path).at("forgetting pages of", path)?;
    }
    let fault = "unreadable blocks under a mapped index and tree";
    if fs::read(&mapped[0]).is_ok() {
        bench.line(fault, "the blocks could be read all the same: not tried", "", false);
    }
    let mut daemons = vec![fused(&node)?];
    for number in [FILES / 2, 7, FILES - 7] {
        let path = wide.join(format!("files/{number}"));
        let seen = bench.read(&path, content(number).len(), Duration::from_secs(30))?;
        daemons.push(fused(&node)?);
        daemons.dedup();
        let sees =
            format!("its container: {}; {} restarts of lazuli-fused", seen.words(&content(number)), daemons.len() - 1);
        bench.line(fault, sees, logged(&node, &["cannot be read"]), seen.is(&content(number)) && daemons.len() <= 2);
    }
    bench.healthy_line(&node, "the same: another image", &healthy, 1)?;
    node.snapshotter.stop();
    Ok(())
}

/// Syncs of `lazuli-fused` take ten seconds each.
pub(crate) fn slow_sync(bench: &Bench) -> Result<()> {
    let directory = bench.scratch.directory("shim")?;
    let (source, library, switch) = (directory.join("slow.c"), directory.join("slow.so"), directory.join("on"));
    fs::write(&source, SLOW_SYNC).at("writing", &source)?;
    run(command("cc", ["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl"))?;
    let environment = vec![
        ("LD_PRELOAD".to_owned(), library.to_string_lossy().into_owned()),
        ("LAZULI_SLOW_SYNC".to_owned(), switch.to_string_lossy().into_owned()),
    ];
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let node = bench.node_as(SnapshotterOptions { environment, flags, ..SnapshotterOptions::default() })?;
    let elsewhere = FaultyRegistry::before(&bench.upstream)?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    let slow = bench.pulled_and_mounted(&node, &bench.registry.reference("slow:lazy"))?;
    fs::write(&switch, "").at("writing", &switch)?;
    bench.read(&slow.join("files/0"), 4096, HEALTHY_WITHIN)?;
    // Now a flush is under way, or begins with the next tick.
    thread::sleep(Duration::from_secs(4));
    let mut pull = node.lazuli_pull_command(&elsewhere.reference("slow:lazy"))?;
    let pulled = bench.bounded(pull.args(["--namespace", "other"]), Duration::from_secs(15))?;
    let sees = pulled.map_or("a pull: no end in 15 s".to_owned(), |(finished, time)| {
        format!("a pull: exit code {:?} in {:.1} s", finished.code, time.as_secs_f64())
    });
    let is_right = sees.contains("Some(0)");
    bench.line("a sync takes 10 s: another image with the layer", sees, logged(&node, &[]), is_right);
    let mut readers = Vec::new();
    for number in [40, 80, 120, 159] {
        readers.push(bench.reader(&slow.join(format!("files/{number}")), 4096)?);
    }
    bench.healthy_line(&node, "the same: a read of what is not there", &tree, 3)?;
    bench.healthy_line(&node, "the same, once more", &tree, 6)?;
    for reader in readers {
        reader.finish(Duration::from_secs(30))?;
    }
    Ok(())
}

/// Makes `fsync` and `fdatasync` of `lazuli-fused` slow while the file `LAZULI_SLOW_SYNC` is there.
const SLOW_SYNC: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void slow(void) {
    const char *on = getenv("LAZULI_SLOW_SYNC");
    if (on && !strcmp(program_invocation_short_name, "lazuli-fused") && !access(on, F_OK)) sleep(10);
}
int fsync(int fd) { slow(); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { slow(); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"#;

/// Both daemons end and a bit of a complete layer changes: it is fetched again.
pub(crate) fn flipped_bit(bench: &Bench) -> Result<()> {
    let mut node = bench.node_with(&["--background-rate", "64"])?;
    let image = bench.registry.reference("healthy:lazy");
    bench.pulled_and_mounted(&node, &image)?;
    bench.is_complete_within(&node, &image, Duration::from_secs(30))?;
    thread::sleep(WRITTEN_DOWN);
    let data = cache_of(&node, "healthy")?.join("data");
    node.snapshotter.stop();
    send(fused(&node)?, Signal::KILL)?;
    thread::sleep(Duration::from_millis(300));
    flip_bit(&data, 4096).at("changing", &data)?;
    flip_bit(&data, 5 << 20).at("changing", &data)?;
    node.snapshotter.restart()?;
    let mounted = bench.mount(&node, &image, Duration::from_secs(30))?;
    let Some(tree) = mounted.path() else {
        bench.line("two bits of a complete layer change", mounted.words(), logged(&node, &[]), false);
        return Ok(());
    };
    let (mut wrong, mut right) = (0, 0);
    for number in 0..HEALTHY_FILES {
        let seen = bench.read_healthy(tree, number)?;
        wrong += u64::from(seen.is_wrong(&healthy_content(number)));
        right += u64::from(seen.is(&healthy_content(number)));
    }
    let sees = format!("{right} of {HEALTHY_FILES} files right, {wrong} WITH OTHER BYTES");
    bench.line("two bits of a complete layer change", sees, logged(&node, &[]), right == HEALTHY_FILES);
    Ok(())
}

/// The record of which frames are there is damaged while a container has the layer mounted.
pub(crate) fn damaged_presence(bench: &Bench) -> Result<()> {
    let node = bench.node_with(&["--background-rate", "64"])?;
    let image = bench.registry.reference("healthy:lazy");
    bench.pull(&node, &image)?;
    bench.mounted(&node, &image)?;
    bench.is_complete_within(&node, &image, Duration::from_secs(30))?;
    // Mounted again now that it is complete, maybe over the cache file itself.
    let tree = bench.mounted(&node, &image)?;
    thread::sleep(WRITTEN_DOWN);
    for presence in cache_files(&node, "presence")? {
        fs::write(presence.with_extension("new"), "damaged").at("writing", &presence)?;
        fs::rename(presence.with_extension("new"), &presence).at("writing", &presence)?;
    }
    send(fused(&node)?, Signal::KILL)?;
    thread::sleep(Duration::from_secs(1));
    let mut right = 0;
    let mut sees = String::new();
    for number in 0..HEALTHY_FILES {
        let path = tree.join(format!("files/{number}"));
        let seen = bench.read(&path, HEALTHY_LEN, Duration::from_secs(20))?;
        right += u64::from(seen.is(&healthy_content(number)));
        sees = seen.words(&healthy_content(number));
    }
    let sees = format!("{right} of {HEALTHY_FILES} files right; the last: {sees}");
    let is_right = right == HEALTHY_FILES;
    bench.line("presence is damaged and lazuli-fused killed", sees, logged(&node, &["presence"]), is_right);
    Ok(())
}
