//! The order in which the disk gets to know trees: a scenario is recorded, and at each of its steps the machine loses its
//! power. The next process must find the trees and images that somebody has heard of, and give no slot twice.
//!
//! Each sync of the recording is left out once, and then something must be found wrong.

use std::{
    collections::HashSet,
    fs, io,
    path::Path,
    sync::{Arc, Mutex},
};

use format_spec::Digest;
use storage::disk::{Disk, Observer, Operation};

use super::{
    TreeStore,
    tests::{layers, tree},
};

#[allow(clippy::cast_possible_truncation)]
#[path = "../../storage/tests/it/power_cut.rs"]
mod power_cut;

use power_cut::{Change, Model, State, choices};

#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<Change>>);

impl Observer for Recorder {
    fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        self.0.lock().unwrap().extend(Change::of(operation));
        Ok(())
    }
}

/// A promise that somebody has heard of after so many changes, and until so many.
#[derive(Debug, Clone)]
struct Promise {
    from: usize,
    until: usize,
    what: Promised,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Promised {
    /// The tree of this blob is there, with this slot.
    Tree(&'static [u8], u32),
    /// Its image is there.
    Image(&'static [u8]),
    /// The slot was seen.
    Slot(u32),
}

const BLOBS: [&[u8]; 3] = [b"first", b"second", b"third"];

fn id_of(blob: &[u8]) -> Digest {
    Digest::of(&[b"tree of ", blob].concat())
}

/// Trees are made and removed, one after the other; one gets an image.
fn record(root: &Path) -> (Vec<Change>, Vec<Promise>) {
    let recorder = Arc::new(Recorder::default());
    let store = TreeStore::open(root.join(control::root::TREES), Disk::observed(recorder.clone())).unwrap();
    // Somebody has made it long ago.
    recorder.0.lock().unwrap().push(Change::SyncDirectory(root.to_owned()));
    let now = || recorder.0.lock().unwrap().len();
    let mut promises: Vec<Promise> = Vec::new();
    for blob in BLOBS {
        let (id, layers) = (id_of(blob), layers(blob));
        let stored = store.create(id, &layers, &tree(&layers)).unwrap();
        let slot = stored.slot.number();
        promises.push(Promise { from: now(), until: usize::MAX, what: Promised::Slot(slot) });
        let mut heard = vec![(now(), Promised::Tree(blob, slot))];
        if blob == BLOBS[1] {
            store.image(id, &stored.index, &[]).unwrap();
            heard.push((now(), Promised::Image(blob)));
        }
        promises.extend(heard.into_iter().map(|(from, what)| Promise { from, until: now(), what }));
        store.remove(id).unwrap();
    }
    (recorder.0.lock().unwrap().clone(), promises)
}

/// The faults that the next process finds.
fn find_wrong(state: &State, promises: &[&Promised]) -> Vec<String> {
    let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    state.restore(root.path());
    let store = TreeStore::open(root.path().join(control::root::TREES), Disk::default()).unwrap();
    let mut wrong = Vec::new();
    for blob in BLOBS {
        let layers = layers(blob);
        let stored = store.load(id_of(blob), &layers).unwrap();
        let slot = stored.as_ref().map(|stored| stored.slot.number());
        let name = String::from_utf8_lossy(blob);
        let is_lost = |promise: &&&Promised| matches!(promise, Promised::Tree(of, expected) if *of == blob && slot != Some(*expected));
        wrong.extend(promises.iter().find(is_lost).map(|promise| format!("{promise:?}, found with slot {slot:?}")));
        let Some(stored) = stored else { continue };
        let image = store.known_image(id_of(blob), &stored.index);
        if promises.contains(&&Promised::Image(blob)) && image.is_none() {
            wrong.push(format!("the image of {name} is gone"));
        }
        if let Some(image) = image {
            let mut expected = Vec::new();
            ::tree::erofs::write_sparse_image(&stored.index, &[], &mut expected).unwrap();
            if fs::read(image).unwrap() != expected {
                wrong.push(format!("the image of {name} is another one"));
            }
        }
    }
    let layers = layers(b"new");
    let slot = store.create(id_of(b"new"), &layers, &tree(&layers)).unwrap().slot.number();
    if promises.contains(&&Promised::Slot(slot)) {
        wrong.push(format!("slot {slot} is given again"));
    }
    wrong
}

/// Crashes at every step from `first` on, until something is found wrong.
fn first_wrong(changes: &[Change], first: usize, promises: &[Promise], root: &Path) -> Option<String> {
    let (mut model, mut seen) = (Model::new(), HashSet::new());
    for step in 0..=changes.len() {
        if step >= first {
            let holding = promises.iter().filter(|promise| (promise.from..=promise.until).contains(&step));
            let holding: Vec<&Promised> = holding.map(|promise| &promise.what).collect();
            for choice in choices(model.pending_count()) {
                let state = model.crash(|number| choice[number]);
                if !seen.insert((state.clone(), format!("{holding:?}"))) {
                    continue;
                }
                let wrong = find_wrong(&state, &holding);
                if !wrong.is_empty() {
                    let before = step.checked_sub(1).map(|last| changes[last].shorten());
                    return Some(format!("crash after step {step} ({before:?}): {wrong:?}"));
                }
            }
        }
        if let Some(change) = changes.get(step) {
            model.apply(change, root);
        }
    }
    None
}

#[test]
fn after_a_power_cut_at_any_step_trees_are_there_and_no_sync_of_theirs_is_in_vain() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (changes, promises) = record(root);
    assert_eq!(first_wrong(&changes, 0, &promises, root), None);
    let by_hand = changes.iter().position(|change| *change == Change::SyncDirectory(root.to_owned())).unwrap();
    let mut needless = Vec::new();
    let mut sync_count = 0;
    for (number, sync) in changes.iter().enumerate().filter(|(number, sync)| sync.is_sync() && *number != by_hand) {
        sync_count += 1;
        let mut without = changes.clone();
        // In its place something that does nothing, so that all steps keep their numbers.
        without[number] = Change::Remove(root.join("nothing"));
        match first_wrong(&without, number, &promises, root) {
            Some(wrong) => println!("without step {number}, {sync:?}: {wrong}"),
            None => needless.push(format!("{number}: {sync:?} after {}", changes[number - 1].shorten())),
        }
    }
    assert_eq!(sync_count, 15, "three files and their names for each tree, two for the image");
    assert_eq!(needless, Vec::<String>::new(), "nothing is wrong without these");
}
