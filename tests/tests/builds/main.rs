//! Two build machines, three repositories of a registry and a layout: honest, interrupted and hostile conversions at once.
//!
//! Goal: nobody's image changes another's, and nothing half-done hurts anybody: whatever was published is its original.
//! Method: machines with caches of their own convert images that share a base layer to the same places, some with
//! signals in between; others convert images that lie, put such images at honest tags, and spoil entries of the
//! caches and blobs of the layout. At the end every image is converted once more to every place, with all that
//! caches and places say by then. Then containerd's overlayfs unpacks each manifest that was ever published, and its
//! original, and every field and byte of both trees is compared.
//!
//! `LAZULI_BUILD_MINUTES` says how long, 20 seconds unless it is set; `make torture-builds` sets it.

mod dice;
mod images;
mod yard;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Containerd, ContainerdOptions, HarnessError, Result, Scratch, TestRegistry, compare_trees, containerd::OVERLAYFS,
    process::run, programs::lazuli, registry_server::digest_in,
};
use rustix::{
    mount::{UnmountFlags, unmount},
    process::Signal,
};

use crate::{
    dice::Dice,
    yard::{Machine, Place, Yard},
};

const MINUTES: &str = "LAZULI_BUILD_MINUTES";
const TIME: Duration = Duration::from_secs(20);
/// A conversion here takes about so long.
const CONVERSION_MS: usize = 400;

#[test]
fn whatever_two_build_machines_publish_is_the_original() -> Result<()> {
    let minutes = std::env::var(MINUTES).ok().and_then(|minutes| minutes.parse().ok());
    let time = minutes.map_or(TIME, |minutes: u64| Duration::from_secs(minutes * 60));
    let scratch = Scratch::new("builds")?;
    let registry = TestRegistry::start(&scratch)?;
    let honest = images::honest(&scratch, &registry)?;
    let hostile = images::hostile(&scratch, &registry)?;
    let yard = Yard {
        scratch: &scratch,
        registry: &registry,
        honest,
        hostile,
        record: Default::default(),
        power: Default::default(),
    };
    let machines = [Machine::new(&scratch, "machine-1")?, Machine::new(&scratch, "machine-2")?];
    let is_over = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let (yard, machines, is_over) = (&yard, &machines, &is_over);
        for (number, machine) in (0..).zip(machines) {
            let dice = move |kind: u64| Dice::new(10 * number + kind);
            let works = [
                scope.spawn(move || until(is_over, dice(1), |dice| honest_work(yard, machine, dice))),
                scope.spawn(move || until(is_over, dice(2), |dice| interrupted_work(yard, machine, dice))),
                scope.spawn(move || until(is_over, dice(3), |dice| hostile_work(yard, machines, machine, dice))),
            ];
            // A failure ends the work of its thread alone, and the test at its end.
            scope.spawn(move || {
                for work in works {
                    if let Ok(Err(error)) = work.join() {
                        yard.record().failures.push(error.to_string());
                    }
                }
            });
        }
        while started.elapsed() < time {
            thread::sleep(Duration::from_millis(100));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    last_conversions(&yard, &machines)?;
    compare(&yard)
}

fn until(is_over: &AtomicBool, mut dice: Dice, mut work: impl FnMut(&mut Dice) -> Result<()>) -> Result<()> {
    while !is_over.load(Ordering::Relaxed) {
        work(&mut dice)?;
    }
    Ok(())
}

fn honest_work(yard: &Yard<'_>, machine: &Machine, dice: &mut Dice) -> Result<()> {
    let source = &yard.honest[dice.below(yard.honest.len())];
    let from = &source.places[dice.below(source.places.len())];
    let evil = &yard.hostile[dice.below(3)].places[0];
    let learning = ["--cache-from", evil];
    let more = [&[][..], &learning, &["--no-cache"], &["--jobs", "1"]][dice.below(4)];
    yard.convert(machine, source, from, Place::ALL[dice.below(Place::ALL.len())], more)
}

fn interrupted_work(yard: &Yard<'_>, machine: &Machine, dice: &mut Dice) -> Result<()> {
    let source = &yard.honest[dice.below(yard.honest.len())];
    let place = Place::ALL[dice.below(Place::ALL.len())];
    let after = Duration::from_millis(dice.below(CONVERSION_MS) as u64);
    let signal = [Signal::TERM, Signal::KILL, Signal::HUP][dice.below(3)];
    yard.interrupt(machine, source, place, after, signal)
}

fn hostile_work(yard: &Yard<'_>, machines: &[Machine], machine: &Machine, dice: &mut Dice) -> Result<()> {
    let source = &yard.hostile[dice.below(yard.hostile.len())];
    yard.convert_hostile(machine, source, Place::ALL[dice.below(Place::ALL.len())])?;
    let done = yard.attack(machines, dice)?;
    yard.record().count(done);
    Ok(())
}

/// Every honest image to every place, the machines taking turns: whatever was spoilt is made good, or shows.
fn last_conversions(yard: &Yard<'_>, machines: &[Machine; 2]) -> Result<()> {
    thread::scope(|scope| {
        let works: Vec<_> = (0..)
            .zip(machines)
            .map(|(own, machine)| {
                scope.spawn(move || {
                    let pairs = yard.honest.iter().flat_map(|source| Place::ALL.map(|place| (source, place)));
                    for (source, place) in pairs.skip(own).step_by(machines.len()) {
                        yard.convert(machine, source, &source.places[0], place, &[])?;
                    }
                    Ok(())
                })
            })
            .collect();
        works.into_iter().try_for_each(|work| work.join().unwrap_or_else(|_| Err(unexpected("a machine has panicked"))))
    })
}

/// Compares everything that was published with its original.
fn compare(yard: &Yard<'_>) -> Result<()> {
    let containerd = Containerd::start(yard.scratch, &ContainerdOptions::default())?;
    let record = std::mem::take(&mut *yard.record());
    let mut failures = record.failures;
    let mut trees = Trees { yard, containerd: &containerd, number: 0, truths: BTreeMap::new() };
    let mut comparisons = 0;
    for ((digest, original), repositories) in &record.published {
        let is_honest = yard.honest.iter().any(|source| source.pushed.as_ref() == Some(original));
        for repository in repositories.iter().filter(|_| is_honest) {
            // Under the last tag or not, all of it is there.
            let published = yard.registry.reference(&format!("{repository}@{digest}"));
            let checked = lazuli(["check", &published])?;
            failures.extend((checked.code != Some(0)).then(|| format!("check of {published}: {checked:?}")));
        }
        let Some(repository) = repositories.first() else { continue };
        failures.extend(trees.differences(&format!("{repository}@{digest}"), original)?);
        comparisons += 1;
    }
    for source in &yard.honest {
        let Some(original) = &source.pushed else { continue };
        for place in Place::ALL {
            // The image that the tag names in the end.
            let name = match place {
                Place::Repository(repository) => format!("{repository}:{}", source.name),
                Place::Layout => {
                    let layout = format!("oci:{}:{}", yard.layout().display(), source.name);
                    yard.registry.push(&layout, &format!("layout/{}:1", source.name))?;
                    format!("layout/{}:1", source.name)
                }
            };
            let checked = lazuli(["check", &yard.registry.reference(&name), "--against", original])?;
            failures.extend((checked.code != Some(0)).then(|| format!("check of {name}: {checked:?}")));
            if place == Place::Layout {
                failures.extend(trees.differences(&name, original)?);
                comparisons += 1;
            }
        }
    }
    let counts: Vec<_> = record.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
    println!("conversions and attacks: {}", counts.join(", "));
    println!("{comparisons} trees of published images compared with those of their originals");
    failures.iter().for_each(|failure| println!("WRONG {failure}"));
    assert_eq!(failures.len(), 0);
    for what in ["honest", "interrupted", "killed", "hostile, refused", "hostile, converted", "layers from a cache"] {
        assert!(record.counts.contains_key(what), "nothing was {what}: {counts:?}");
    }
    Ok(())
}

/// Unpacked images, each in a namespace of its own: containerd takes what it has for unpacked by the config alone.
struct Trees<'a> {
    yard: &'a Yard<'a>,
    containerd: &'a Containerd,
    number: u32,
    /// Of the originals.
    truths: BTreeMap<String, PathBuf>,
}

impl Trees<'_> {
    /// In what `name` of the registry differs from `original`.
    fn differences(&mut self, name: &str, original: &str) -> Result<Vec<String>> {
        let registry = self.yard.registry;
        let ours = registry.manifest(name)?;
        let theirs = original.split_once('/').map_or(original, |(_, name)| name);
        let mut found = Vec::new();
        if digest_in(&ours["config"])? != digest_in(&registry.manifest(theirs)?["config"])? {
            found.push(format!("{name}: its config is not that of {original}"));
        }
        let truth = match self.truths.get(original) {
            Some(truth) => truth.clone(),
            None => self.unpack(original)?,
        };
        self.truths.insert(original.to_owned(), truth.clone());
        let tree = self.unpack(&registry.reference(name))?;
        found.extend(compare_trees(&truth, &tree)?.iter().map(|difference| format!("{name}: {difference}")));
        unmount(&tree, UnmountFlags::DETACH).map_err(|error| unexpected(&format!("unmounting: {error}")))?;
        Ok(found)
    }

    fn unpack(&mut self, reference: &str) -> Result<PathBuf> {
        self.number += 1;
        let namespace = format!("n{}", self.number);
        let tree = self.yard.scratch.directory(Path::new("trees").join(&namespace))?;
        let ctr = |words: &[&str]| run(self.containerd.ctr(["--namespace", &namespace, "images"]).args(words));
        ctr(&["pull", "--plain-http", "--snapshotter", OVERLAYFS, reference])?;
        ctr(&["mount", "--snapshotter", OVERLAYFS, reference, &tree.to_string_lossy()])?;
        Ok(tree)
    }
}

fn unexpected(what: &str) -> HarnessError {
    HarnessError::Unexpected(what.to_owned())
}
