//! The seeds of every target, and changes of them, pass: what `make fuzz` does for long, for a moment.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{fs, panic, path::PathBuf};

use lazuli_fuzz::{TARGETS, Target};

/// Most bytes of all seeds together: they are part of the repository.
const CORPUS_LEN_MAX: u64 = 2 << 20;

fn directory(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

/// The seeds of a target by name.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(directory(target)).unwrap_or_else(|error| panic!("seeds of {target}: {error}"));
    let paths = entries.map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut seeds: Vec<_> = paths.map(|path| (name(&path), fs::read(&path).unwrap())).collect();
    seeds.sort();
    seeds
}

fn target(name: &str) -> Target {
    TARGETS.into_iter().find(|target| target.name == name).unwrap()
}

/// Runs a target; a failure says which input did it, in hex if it is no file.
fn run(target: &Target, name: &str, input: &[u8]) {
    let ended = panic::catch_unwind(|| (target.run)(input));
    let hex = || input.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(ended.is_ok(), "target {} fails on {name}: {}", target.name, hex());
}

/// Numbers that are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit.max(1) as u64).unwrap()
    }

    /// A seed with a few changes: bytes replaced, cut out or put in, numbers made extreme, another seed's end.
    fn change(&mut self, seeds: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].1.clone();
        for _ in 0..=self.below(4) {
            let at = self.below(input.len());
            let end = (at + 1 + self.below(8)).min(input.len());
            match self.below(7) {
                0 => input[at..end].fill(0xff),
                1 => input[at..end].fill(0),
                2 => input[at] = self.below(256).to_le_bytes()[0],
                3 => input[at] ^= 1 << self.below(8),
                4 => _ = input.drain(at..end),
                5 => input.truncate(end),
                _ => {
                    let other = &seeds[self.below(seeds.len())].1;
                    let from = self.below(other.len());
                    input.truncate(at);
                    input.extend_from_slice(&other[from..]);
                }
            }
            if input.is_empty() {
                break;
            }
        }
        input
    }
}

/// Replays the seeds of a target and this many changes of them.
fn replay(name: &str, change_count: usize) {
    let (target, seeds) = (target(name), seeds(name));
    for (name, input) in &seeds {
        run(&target, name, input);
    }
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    for number in 0..change_count {
        let input = numbers.change(&seeds);
        run(&target, &format!("change {number}"), &input);
    }
}

macro_rules! replays {
    ($($test:ident: $target:literal, $change_count:literal;)*) => {
        const REPLAYED: &[&str] = &[$($target),*];
        $(
            #[test]
            fn $test() {
                replay($target, $change_count);
            }
        )*
    };
}

replays! {
    tar_streams_break_nothing: "tar", 3000;
    layer_blobs_break_nothing: "layer", 1000;
    indexes_break_nothing: "index", 3000;
    trees_break_nothing: "trees", 500;
    ends_of_blobs_break_nothing: "blob_end", 5000;
    manifests_break_nothing: "manifest", 5000;
    archives_break_nothing: "archive", 3000;
    what_starts_breaks_nothing: "start", 1000;
    names_break_nothing: "names", 5000;
    answers_of_registries_break_nothing: "registry", 5000;
    what_reaches_a_node_breaks_nothing: "node", 5000;
    damaged_caches_return_no_wrong_byte: "cache", 200;
}

#[test]
fn every_target_is_replayed_and_has_seeds_of_a_modest_size() {
    assert_eq!(TARGETS.map(|target| target.name), REPLAYED);
    let mut total = 0;
    for name in REPLAYED {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name}");
        total += seeds.iter().map(|(_, seed)| seed.len() as u64).sum::<u64>();
    }
    assert!(total <= CORPUS_LEN_MAX, "{total} bytes of seeds");
}
