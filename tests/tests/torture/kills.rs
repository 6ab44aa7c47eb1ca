//! `kill -9` from the first millisecond of a pull and a start on.
//!
//! `tests/kills.rs` kills while a container reads; this kills while its image is pulled, mounted and read for the first
//! time. A pull or a start that fails for it may be tried again, as a kubelet does; a read may not.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Fault, Finished, HarnessError, Node, Result, Scratch, TarLayer, containerd::LAZULI, samples::noise,
};
use rustix::process::Signal;

use crate::{
    bench::{Bench, mount_command, send},
    images::publish_lazy,
    reader::{Reader, Running, Seen},
    snapshots::unmount,
};

/// Files of an image, and the length of each: together less than what arrives in a moment.
const FILES: u64 = 4;
const FILE_LEN: usize = 200 << 10;
/// The last moment of a kill: after the cache has been written down.
const LAST_MOMENT: f64 = 5.0;
/// How long a pull, a start or a read may take in all.
const WITHIN: Duration = Duration::from_secs(60);

/// The results of kills.
#[derive(Debug, Default)]
pub(crate) struct Kills {
    kills: u64,
    reads: u64,
    tries_again: u64,
    failures: Vec<String>,
    longest: Duration,
}

impl Kills {
    pub(crate) fn are_right(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn words(&self) -> String {
        let Self { kills, reads, tries_again, failures, longest } = self;
        format!(
            "{kills} kills, {reads} reads, {} failed or wrong {}; {tries_again} pulls or starts tried again; longest read {:.1} s",
            failures.len(),
            failures.first().map_or("", String::as_str),
            longest.as_secs_f64()
        )
    }
}

fn content(image: u64, file: u64) -> Vec<u8> {
    noise(70_000 + image * FILES + file, FILE_LEN)
}

/// A number from 0 to 1 that follows from another.
fn random(seed: u64) -> f64 {
    let mixed = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

/// Pulls, mounts and reads an image of its own, while one of the daemons is killed; which and when follows from `number`.
pub(crate) fn kill_early(bench: &Bench, node: &mut Node, number: u64, kills: &mut Kills) -> Result<()> {
    let repository = format!("kill-{}-{number}", bench.mode);
    let tar = (0..FILES).fold(TarLayer::new(), |layer, file| layer.file(&file.to_string(), content(number, file)));
    publish_lazy(&bench.scratch, &bench.upstream, &repository, tar)?;
    let is_fused = number % 2 == 0;
    // As many kills in the first 10 ms as between half a second and five.
    let moment = Duration::from_secs_f64(0.001 * (LAST_MOMENT / 0.001).powf(random(number)));
    bench.registry.set(&repository, Fault::Delay(Duration::from_secs_f64(0.3 * random(number + 1000))));
    let reference = bench.registry.reference(&format!("{repository}:lazy"));
    let directory = bench.scratch.directory(format!("kill-{number}"))?;
    let (scratch, started) = (&bench.scratch, Instant::now());
    let Node { containerd, snapshotter, .. } = node;
    let (pull, mount) = (
        || {
            let mut pull = lazuli_tests::process::command(lazuli_tests::programs::program("lazuli")?, ["pull"]);
            pull.arg(&reference).arg("--address").arg(containerd.socket());
            Ok(pull)
        },
        |at: &Path| Ok(mount_command(containerd.socket(), "default", LAZULI, &reference, at)),
    );
    let outcome = thread::scope(|scope| -> Result<_> {
        let containers = scope.spawn(|| -> Result<_> {
            let mut tries_again = again_until_done(scratch, pull)?;
            let mut seen = Vec::new();
            for container in 0..2 {
                let at = directory.join(container.to_string());
                std::fs::create_dir_all(&at).unwrap_or_default();
                tries_again += again_until_done(scratch, || mount(&at))?;
                for file in 0..FILES {
                    seen.push((file, Reader::start(scratch, &at.join(file.to_string()), FILE_LEN)?.finish(WITHIN)?));
                }
                // The second container begins when most has been written down, or was about to be.
                thread::sleep(Duration::from_millis(500));
            }
            Ok((tries_again, seen))
        });
        thread::sleep(moment.saturating_sub(started.elapsed()));
        if is_fused {
            // At the first moments there may be none yet: the next one that comes is as good.
            while snapshotter.fused_id().is_none() && !containers.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            if let Some(id) = snapshotter.fused_id() {
                // It may have ended by itself in between.
                let _ = send(id, Signal::KILL);
            }
        } else {
            snapshotter.kill_and_restart()?;
        }
        containers.join().unwrap_or_else(|_| Err(HarnessError::Unexpected("a thread panicked".to_owned())))
    });
    kills.kills += 1;
    let daemon = if is_fused { "lazuli-fused" } else { "lazuli-snapshotter" };
    let what = format!("{daemon} at {:.0} ms", moment.as_secs_f64() * 1000.0);
    match outcome {
        Err(error) => kills.failures.push(format!("{what}: {error}")),
        Ok((tries_again, seen)) => {
            kills.tries_again += tries_again;
            for (file, seen) in seen {
                note(kills, &what, &seen, &content(number, file));
            }
        }
    }
    forget(bench, &directory)
}

fn note(kills: &mut Kills, what: &str, seen: &Seen, expected: &[u8]) {
    kills.reads += 1;
    kills.longest = kills.longest.max(seen.time());
    if !seen.is(expected) {
        kills.failures.push(format!("{what}: {}", seen.words(expected)));
    }
}

/// Runs a command until it succeeds; returns how often it did not.
fn again_until_done(scratch: &Scratch, command: impl Fn() -> Result<Command>) -> Result<u64> {
    let started = Instant::now();
    for failures in 0.. {
        let finished = Running::start(scratch, &mut command()?)?.finish(WITHIN)?;
        match finished {
            Some((Finished { code: Some(0), .. }, _)) => return Ok(failures),
            other if started.elapsed() > WITHIN => {
                let text = other.map_or("no end".to_owned(), |(finished, _)| finished.stderr);
                return Err(HarnessError::Unexpected(format!("tried {failures} times: {}", text.trim())));
            }
            _ => thread::sleep(Duration::from_millis(200)),
        }
    }
    Ok(0)
}

fn forget(bench: &Bench, directory: &Path) -> Result<()> {
    let mounts: Vec<PathBuf> = bench.scratch.mounts().into_iter().filter(|path| path.starts_with(directory)).collect();
    mounts.iter().try_for_each(|path| unmount(path))
}

/// `make torture-kills`: so many kills of each daemon in each mode. Whether all was right.
pub(crate) fn run(count: u64) -> Result<bool> {
    let scratch = Scratch::new("torture-kills")?;
    let registry = lazuli_tests::TestRegistry::start(&scratch)?;
    let mut is_right = true;
    for mode in lazuli_tests::programs::MODES {
        let bench = Bench::new("kills", registry.address(), mode)?;
        let mut node = bench.node_with(&["--background-rate", "64"])?;
        let mut kills = Kills::default();
        for number in 0..2 * count {
            kill_early(&bench, &mut node, number, &mut kills)?;
        }
        println!("{mode}: {}", kills.words());
        kills.failures.iter().for_each(|failure| println!("{mode}: WRONG {failure}"));
        is_right &= kills.are_right();
    }
    Ok(is_right)
}
