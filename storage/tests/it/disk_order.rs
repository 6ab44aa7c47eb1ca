//! The order in which the disk gets to know things: a scenario is recorded, and at each of its steps the machine loses
//! its power. Any subset of what was not synced may be lost. The next process must find what was promised, and no wrong
//! byte.
//!
//! Each sync of the recording is left out once, and then something must be found wrong: no sync is there in vain, and
//! none is missing without this test.

use std::{
    collections::HashSet,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
    path::Path,
    sync::Arc,
    time::Duration,
};

use format_spec::Digest;
use serde_json::{Value, json};
use storage::{Cache, Layer, Verdict};

use crate::{
    power_cut::{Change, Model, State, choices},
    support::{MemorySource, TestLayer, check_read, open_cache},
    watched::WatchedDisk,
};

/// A promise that holds after a crash at any step in `from..=until`.
#[derive(Debug, Clone)]
struct Promise {
    from: usize,
    until: usize,
    what: Promised,
}

#[derive(Debug, Clone, PartialEq)]
enum Promised {
    /// The layer is known with this description, and its index need not be fetched.
    Known(Value),
    /// This content need not be fetched.
    Present(Range<u64>),
    /// The tar stream need not be put together again.
    Verified,
    /// The layer is unknown.
    Removed,
}

/// A scenario as it is recorded.
struct Recording {
    disk: Arc<WatchedDisk>,
    promises: Vec<Promise>,
}

impl Recording {
    fn promise(&mut self, what: Promised) {
        let from = self.disk.changes().len();
        self.promises.push(Promise { from, until: usize::MAX, what });
    }

    /// Opens a layer that is there from another place.
    async fn describe(&mut self, cache: &Cache, test: &TestLayer, description: &str) -> Layer {
        let is_record = |change: &Change| matches!(change, Change::Rename { to, .. } if to.ends_with("layer.json"));
        let count = |disk: &WatchedDisk| disk.changes().iter().filter(|change| is_record(change)).count();
        let before = count(&self.disk);
        let layer = open(cache, test, description).await;
        // Nobody waits for the record: it is promised when it is done.
        while count(&self.disk) == before || !matches!(self.disk.changes().last(), Some(Change::SyncDirectory(_))) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.promise(Promised::Known(json!(description)));
        layer
    }

    /// The operation that begins now may end promises of this kind.
    fn end(&mut self, is_meant: impl Fn(&Promised) -> bool) {
        let now = self.disk.changes().len();
        let meant = self.promises.iter_mut().filter(|promise| promise.until == usize::MAX && is_meant(&promise.what));
        meant.for_each(|promise| promise.until = now);
    }
}

async fn verdict_of(layer: &Layer) -> Verdict {
    layer.verify();
    loop {
        if let Some(verdict) = layer.verdict() {
            return verdict;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The faults that the next process finds.
async fn find_wrong(state: &State, promises: &[&Promised], test: &TestLayer) -> Vec<String> {
    // In memory where that is possible: nothing is lost here any more.
    let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    state.restore(root.path());
    let cache = open_cache(root.path());
    let known = cache.known_layers().unwrap();
    let mut wrong = Vec::new();
    for promise in promises {
        match promise {
            Promised::Known(description) if known.first().is_none_or(|known| known.description != *description) => {
                wrong.push(format!("{description} is not known: {known:?}"));
            }
            Promised::Removed if !known.is_empty() => wrong.push("a removed layer is there".to_owned()),
            _ => {}
        }
    }
    let source = MemorySource::new(test);
    let layer = cache.layer(&test.lazy, source.clone(), json!("after")).await.unwrap();
    if !source.requests().is_empty() && promises.iter().any(|promise| matches!(promise, Promised::Known(_))) {
        wrong.push("the index is fetched again".to_owned());
    }
    if let Some(path) = layer.complete_file()
        && fs::read(path).unwrap() != test.space
    {
        wrong.push("a file with wrong content is given away".to_owned());
    }
    if promises.contains(&&Promised::Verified) && layer.verdict().is_none() {
        wrong.push("the verdict is gone".to_owned());
    }
    for promise in promises {
        if let Promised::Present(plain) = promise {
            let mut bytes = vec![0; (plain.end - plain.start) as usize];
            if layer.read_at_if_present(plain.start, &mut bytes).unwrap().is_none() {
                wrong.push(format!("{plain:?} is gone"));
            }
        }
    }
    if layer.read_async(0, test.space.len()).await.unwrap() != test.space {
        wrong.push("wrong bytes are read".to_owned());
    }
    // Of what was kept for it, and is not what was written, nothing may be believed.
    let verdict = verdict_of(&layer).await;
    if verdict != (Verdict::Verified { tar: Digest::of(&test.tar) }) {
        wrong.push(format!("the layer is {verdict}"));
    }
    wrong
}

/// Crashes at every step from `first` on, until something is found wrong.
async fn first_wrong(
    changes: &[Change],
    first: usize,
    promises: &[Promise],
    root: &Path,
    test: &TestLayer,
) -> Option<String> {
    let mut model = Model::new();
    let mut seen = HashSet::new();
    for step in 0..=changes.len() {
        if step >= first {
            let holding = promises.iter().filter(|promise| (promise.from..=promise.until).contains(&step));
            let holding: Vec<&Promised> = holding.map(|promise| &promise.what).collect();
            for choice in choices(model.pending_count()) {
                let state = model.crash(|number| choice[number]);
                let mut hasher = DefaultHasher::new();
                (&state, format!("{holding:?}")).hash(&mut hasher);
                if !seen.insert(hasher.finish()) {
                    continue;
                }
                let wrong = find_wrong(&state, &holding, test).await;
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

async fn open(cache: &Cache, test: &TestLayer, description: &str) -> Layer {
    cache.layer(&test.lazy, MemorySource::new(test), json!(description)).await.unwrap()
}

/// Opened, read, flushed, described anew, completed, verified, lost and replaced, removed, opened again.
async fn record(test: &TestLayer, root: &Path) -> Recording {
    let disk = Arc::new(WatchedDisk::default());
    let mut recording = Recording { disk: disk.clone(), promises: Vec::new() };
    let start = || Cache::open(root, tokio::runtime::Handle::current(), disk.options()).unwrap();
    let cache = start();
    let layer = open(&cache, test, "first").await;
    recording.promise(Promised::Known(json!("first")));
    let [first, rest] = [test.plain_of_frame(0), test.plain_of_frame(1).start..test.space.len() as u64];
    // Whole pages: the last one has bytes of the next frame.
    let first = first.start..first.end / 4096 * 4096;
    check_read(&layer, test, first.clone()).await;
    layer.flush().unwrap();
    recording.promise(Promised::Present(first.clone()));
    recording.end(|what| matches!(what, Promised::Known(_)));
    recording.describe(&cache, test, "second").await;
    check_read(&layer, test, rest.clone()).await;
    check_read(&layer, test, 0..test.space.len() as u64).await;
    while layer.complete_file().is_none() {
        layer.flush().unwrap();
    }
    recording.promise(Promised::Present(0..test.space.len() as u64));
    verdict_of(&layer).await;
    recording.promise(Promised::Verified);
    let directory = root.join("layers").join(test.lazy.id().hex());
    // Deleted behind the verdict.
    while directory.join("gaps").exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    // Somebody deletes the file under a process that has ended; the next one knows nothing of its content.
    drop((layer, cache));
    recording.end(|what| matches!(what, Promised::Present(_) | Promised::Verified));
    fs::remove_file(directory.join("data")).unwrap();
    disk.note(Change::Remove(directory.join("data")));
    disk.note(Change::SyncDirectory(directory));
    let cache = start();
    recording.end(|what| matches!(what, Promised::Known(_)));
    let layer = recording.describe(&cache, test, "third").await;
    check_read(&layer, test, first.clone()).await;
    layer.flush().unwrap();
    recording.promise(Promised::Present(first));

    drop(layer);
    recording.end(|_| true);
    cache.remove(test.lazy.id()).await.unwrap();
    recording.promise(Promised::Removed);
    recording.end(|_| true);
    let layer = open(&cache, test, "fourth").await;
    recording.promise(Promised::Known(json!("fourth")));
    check_read(&layer, test, rest.clone()).await;
    layer.flush().unwrap();
    let whole_pages = rest.start.next_multiple_of(4096)..rest.end;
    recording.promise(Promised::Present(whole_pages));
    recording
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_cut_at_any_step_promises_hold_and_no_sync_is_there_in_vain() {
    let test = TestLayer::of_frames(3, 10_000);
    let directory = tempfile::tempdir().unwrap();
    let Recording { disk, promises } = record(&test, directory.path()).await;
    let changes = disk.changes();
    assert_eq!(first_wrong(&changes, 0, &promises, directory.path(), &test).await, None);

    let is_by_hand =
        |pair: &[Change]| matches!(pair, [Change::Remove(path), Change::SyncDirectory(_)] if path.ends_with("data"));
    let by_hand = changes.windows(2).position(is_by_hand).unwrap() + 1;
    let mut needless = Vec::new();
    let mut sync_count = 0;
    for (number, sync) in changes.iter().enumerate().filter(|(_, change)| change.is_sync()) {
        if number == by_hand {
            continue;
        }
        sync_count += 1;
        let mut without = changes.clone();
        // In its place something that does nothing, so that all steps keep their numbers.
        without[number] = Change::Remove(directory.path().join("nothing"));
        match first_wrong(&without, number, &promises, directory.path(), &test).await {
            Some(wrong) => println!("without step {number}, {sync:?}: {wrong}"),
            None => needless.push(format!("{number}: {sync:?} after {}", changes[number - 1].shorten())),
        }
    }
    assert!(sync_count >= 15, "{sync_count} syncs");
    assert_eq!(needless, Vec::<String>::new(), "nothing is wrong without these");
}
