//! The descriptors of a daemon after many mounts. One test: it counts what its process has.

#![allow(clippy::unwrap_used, reason = "only tests use it")]

#[path = "it/support/mod.rs"]
mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use control::{Mode, Request, Response};
use support::{daemon::Running, *};

/// Mounts and unmounts; `LAZULI_MOUNTS` says another number.
const ROUNDS: usize = 200;
/// Threads that have nothing to do go after ten seconds.
const SOON: Duration = Duration::from_secs(60);

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

fn counts() -> (usize, usize, usize) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    (count("/proc/self/fd"), count("/proc/self/task"), mounts.lines().count())
}

fn round(daemon: &Running, registry: &Registry, number: usize) {
    let content = noise(number as u64, 20_000);
    let layers = [registry.push(&layer([("file", file(&content))]))];
    let path = daemon.mount(&layers);
    assert_eq!(fs::read(path.join("file")).unwrap(), content);
    assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(&layers) }), Response::Done);
    assert_eq!(daemon.ask(&Request::RemoveLayer { layer: layers[0].layer.id() }), Response::Done);
}

#[test]
fn many_mounts_leave_no_descriptor_no_thread_and_no_mount() {
    let rounds = std::env::var("LAZULI_MOUNTS").ok().map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    for mode in [Mode::Fuse, Mode::Erofs] {
        let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
        let daemon = Running::start_in(mode, root.path(), &registry);
        (0..10).for_each(|number| round(&daemon, &registry, number));
        let before = counts();
        (10..10 + rounds).for_each(|number| round(&daemon, &registry, number));
        let give_up_at = Instant::now() + SOON;
        loop {
            let after = counts();
            if after.0 <= before.0 && after.1 <= before.1 && after.2 <= before.2 {
                break;
            }
            assert!(Instant::now() < give_up_at, "{mode}: {before:?} before, {after:?} after {rounds} mounts");
            std::thread::sleep(Duration::from_millis(200));
        }
        for directory in ["erofs", "trees", "cache/layers", "cache/removed"] {
            let names = fs::read_dir(daemon.root.join(directory));
            let names: Vec<_> = names.into_iter().flatten().map(|entry| entry.unwrap().file_name()).collect();
            assert!(names.iter().all(|name| name == "next-slot"), "{mode}: {directory} has {names:?}");
        }
    }
}
