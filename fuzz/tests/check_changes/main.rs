//! `lazuli check --against` over images of which one thing was changed: it finds every change that means anything.
//!
//! A tiny image for two platforms with an attestation, which has everything in it that an image can have, is
//! converted. Each change is one of `change.rs`, made at one place of it; all digests and checksums above that place
//! are put right, as somebody would who wants the change to go unnoticed. Where the check says that the result is
//! sound, `meaning.rs`, which knows nothing of the check, must say that it still means the same, and in what it
//! differs. `make fuzz-check CHANGES=n` makes that many changes; the change with number n is always the same.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod change;
mod container;
mod documents;
mod image;
mod meaning;
mod named;
mod numbers;
mod place;
mod trees;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use self::{change::Change, image::Image, numbers::Numbers, place::Place};

/// Changes of one run of the tests.
const CHANGE_COUNT: u64 = 2000;
/// Misses that are described; there may be thousands of one kind.
const DESCRIBED_MAX: usize = 20;

/// How a changed image ended.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Something was found.
    Found,
    /// Something could not be checked, which has an exit code of its own.
    NotChecked,
    /// The check could not look at it.
    Refused,
    /// It is sound, and means the same: in these words.
    SameMeaning(&'static str),
    /// It is sound, and it should not be.
    Missed(String),
}

fn number_of(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Makes change `number`, unless that does nothing, and checks what comes out.
fn outcome(number: u64, pristine: &Image, place: &Place) -> Option<(Change, Outcome)> {
    let mut change = Change::new(Numbers::new(number));
    let changed = pristine.build(&mut |stage| change.at(stage));
    if !change.is_made() || changed == pristine.built {
        return None;
    }
    let checked = catch_unwind(AssertUnwindSafe(|| place.check(&changed)));
    let outcome = match checked {
        Err(_) => Outcome::Missed("the check panics".to_owned()),
        Ok(Err(_)) => Outcome::Refused,
        Ok(Ok(report)) if report.finding_count() > 0 => Outcome::Found,
        Ok(Ok(report)) if !report.is_fully_checked => Outcome::NotChecked,
        Ok(Ok(_)) => match meaning::difference(&pristine.built, &changed) {
            Ok(words) => Outcome::SameMeaning(words),
            Err(difference) => Outcome::Missed(difference),
        },
    };
    Some((change, outcome))
}

#[test]
fn every_change_that_means_something_is_found() {
    let pristine = Image::new();
    let place = Place::new(&pristine);
    let report = place.check(&pristine.built).unwrap();
    assert!(report.is_sound, "{report:#?}");
    assert_eq!((report.images.len(), report.artifacts.len()), (2, 1));
    let layer = &report.images[0].layers[0];
    let counts = layer.counts;
    assert!(
        counts.checked_frame_count > 3 && counts.checked_hot_piece_count > 1 && counts.checked_dedup_piece_count > 5,
        "{counts:?}"
    );
    drop(place);

    let count = number_of("LAZULI_CHANGES").unwrap_or(CHANGE_COUNT);
    let first = number_of("LAZULI_CHANGE").unwrap_or(0);
    let next = AtomicU64::new(first);
    let counted = Mutex::new(BTreeMap::<(&'static str, String), u64>::new());
    let missed = Mutex::new(Vec::new());
    let made = AtomicU64::new(0);
    let worker = || {
        let place = Place::new(&pristine);
        while made.load(Ordering::Relaxed) < count {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((change, outcome)) = outcome(number, &pristine, &place) else { continue };
            made.fetch_add(1, Ordering::Relaxed);
            let words = match &outcome {
                Outcome::SameMeaning(words) => (*words).to_owned(),
                Outcome::Missed(_) => "MISSED".to_owned(),
                other => format!("{other:?}").to_lowercase(),
            };
            *counted.lock().unwrap().entry((change.target(), words)).or_default() += 1;
            if let Outcome::Missed(difference) = outcome {
                missed.lock().unwrap().push(format!("change {number}, {}: {difference}", change.words()));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(worker))));

    let counted = counted.into_inner().unwrap();
    for ((target, words), count) in &counted {
        println!("{count:8}  {target}: {words}");
    }
    println!("{:8}  changes", made.load(Ordering::Relaxed));
    let missed = missed.into_inner().unwrap();
    let described = missed.iter().take(DESCRIBED_MAX).cloned().collect::<Vec<_>>().join("\n");
    assert!(missed.is_empty(), "{} changes were not found:\n{described}", missed.len());
    // Every place was changed, and mostly in a way that was found.
    if first == 0 && count >= CHANGE_COUNT {
        for target in change::TARGETS {
            assert!(counted.contains_key(&(target, "found".to_owned())), "no change of {target} was found");
        }
    }
}
