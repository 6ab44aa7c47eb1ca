//! The order in which the disk gets to know things: a scenario is recorded, and at each of its steps the machine loses
//! its power. Any subset of what was not synced may be lost. The next process must find what was promised, and no wrong
//! byte.
//!
//! Each sync of the recording is left out once, and then something must be found wrong: no sync is there in vain, and
//! none is missing without this test.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use storage::{Cache, Layer};

use crate::{
    support::{MemorySource, TestLayer, check_read, open_cache},
    watched::{Change, WatchedDisk},
};

/// Random choices of what is lost, beside all the simple ones.
const RANDOM_CHOICES: u64 = 4;

/// What holds after a crash at any step in `from..=until`.
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

    /// What begins now may end promises of this kind.
    fn end(&mut self, is_meant: impl Fn(&Promised) -> bool) {
        let now = self.disk.changes().len();
        let meant = self.promises.iter_mut().filter(|promise| promise.until == usize::MAX && is_meant(&promise.what));
        meant.for_each(|promise| promise.until = now);
    }
}

/// A file system in memory that knows what is durable.
#[derive(Debug, Clone, Default)]
struct Model {
    nodes: Vec<Node>,
    open: HashMap<u64, usize>,
    /// Changes of names that are not durable, oldest first.
    namings: Vec<Naming>,
}

#[derive(Debug, Clone)]
enum Node {
    Directory { now: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
    File { durable: Vec<u8>, pending: Vec<Write> },
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(usize, Vec<u8>),
    Len(usize),
}

/// Directory, name, and what has the name afterwards; all at once or not at all.
type Naming = Vec<(usize, String, Option<usize>)>;

impl Write {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Len(len) => content.resize(*len, 0),
            Self::Bytes(offset, bytes) => {
                content.resize(content.len().max(offset + bytes.len()), 0);
                content[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

impl Model {
    fn new() -> Self {
        Self { nodes: vec![Node::Directory { now: BTreeMap::new(), durable: BTreeMap::new() }], ..Self::default() }
    }

    fn entries(&mut self, directory: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[directory] {
            Node::Directory { now, .. } => now,
            Node::File { .. } => panic!("a file is no directory"),
        }
    }

    fn find(&mut self, path: &Path) -> Option<usize> {
        path.iter().try_fold(0, |node, name| self.entries(node).get(name.to_str().unwrap()).copied())
    }

    fn place(&mut self, path: &Path) -> Option<(usize, String)> {
        let name = path.file_name()?.to_str().unwrap().to_owned();
        Some((self.find(path.parent().unwrap())?, name))
    }

    fn name(&mut self, naming: Naming) {
        for (directory, name, node) in &naming {
            match node {
                Some(node) => self.entries(*directory).insert(name.clone(), *node),
                None => self.entries(*directory).remove(name),
            };
        }
        self.namings.push(naming);
    }

    fn write(&mut self, file: u64, write: Write) {
        let Some(node) = self.open.get(&file) else { return };
        match &mut self.nodes[*node] {
            Node::File { pending, .. } => pending.push(write),
            Node::Directory { .. } => panic!("a directory is not written"),
        }
    }

    fn apply(&mut self, change: &Change, root: &Path) {
        let inside = |path: &Path| path.strip_prefix(root).unwrap().to_owned();
        match change {
            Change::MakeDirectory(path) => {
                let path = inside(path);
                for ancestor in path.ancestors().collect::<Vec<_>>().into_iter().rev().skip(1) {
                    if self.find(ancestor).is_none() {
                        let (directory, name) = self.place(ancestor).unwrap();
                        self.nodes.push(Node::Directory { now: BTreeMap::new(), durable: BTreeMap::new() });
                        self.name(vec![(directory, name, Some(self.nodes.len() - 1))]);
                    }
                }
            }
            Change::Open { path, file, is_new } => {
                let path = inside(path);
                if *is_new {
                    let (directory, name) = self.place(&path).unwrap();
                    self.nodes.push(Node::File { durable: Vec::new(), pending: Vec::new() });
                    self.name(vec![(directory, name, Some(self.nodes.len() - 1))]);
                }
                let node = self.find(&path);
                node.and_then(|node| self.open.insert(*file, node));
            }
            Change::Write { file, offset, bytes } => self.write(*file, Write::Bytes(*offset as usize, bytes.clone())),
            Change::SetLen { file, len } => self.write(*file, Write::Len(*len as usize)),
            Change::Sync(file) => {
                if let Some(node) = self.open.get(file)
                    && let Node::File { durable, pending } = &mut self.nodes[*node]
                {
                    pending.drain(..).for_each(|write| write.apply(durable));
                }
            }
            Change::Rename { from, to } => {
                let (from, to) = (inside(from), inside(to));
                let Some(node) = self.find(&from) else { return };
                let ((old, old_name), (new, new_name)) = (self.place(&from).unwrap(), self.place(&to).unwrap());
                self.name(vec![(old, old_name, None), (new, new_name, Some(node))]);
            }
            Change::Remove(path) => {
                let path = inside(path);
                if self.find(&path).is_some() {
                    let (directory, name) = self.place(&path).unwrap();
                    self.name(vec![(directory, name, None)]);
                }
            }
            Change::SyncDirectory(path) => {
                let Some(synced) = self.find(&inside(path)) else { return };
                let namings = std::mem::take(&mut self.namings);
                for naming in namings {
                    if naming.iter().any(|(directory, ..)| *directory == synced) {
                        self.make_durable(&naming);
                    } else {
                        self.namings.push(naming);
                    }
                }
            }
        }
    }

    fn make_durable(&mut self, naming: &Naming) {
        for (directory, name, node) in naming {
            if let Node::Directory { durable, .. } = &mut self.nodes[*directory] {
                match node {
                    Some(node) => durable.insert(name.clone(), *node),
                    None => durable.remove(name),
                };
            }
        }
    }

    /// Number of changes that a crash may lose.
    fn pending_count(&self) -> usize {
        let pending = |node: &Node| if let Node::File { pending, .. } = node { pending.len() } else { 0 };
        self.namings.len() + self.nodes.iter().map(pending).sum::<usize>()
    }

    /// What is on the disk after a crash: every file with its content, and every directory without one.
    fn crash(&self, mut is_kept: impl FnMut(usize) -> bool) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut model = self.clone();
        let mut numbers = 0..;
        for naming in self.namings.iter().filter(|_| is_kept(numbers.next().unwrap())) {
            model.make_durable(naming);
        }
        for node in &mut model.nodes {
            if let Node::File { durable, pending } = node {
                pending.drain(..).filter(|_| is_kept(numbers.next().unwrap())).for_each(|write| write.apply(durable));
            }
        }
        let mut found = BTreeMap::new();
        model.collect(0, Path::new(""), &mut found);
        found
    }

    fn collect(&self, node: usize, path: &Path, found: &mut BTreeMap<PathBuf, Option<Vec<u8>>>) {
        match &self.nodes[node] {
            Node::File { durable, .. } => {
                found.insert(path.to_owned(), Some(durable.clone()));
            }
            Node::Directory { durable, .. } => {
                found.insert(path.to_owned(), None);
                durable.iter().for_each(|(name, node)| self.collect(*node, &path.join(name), found));
            }
        }
    }
}

/// Which of `count` pending changes survive a crash: none, all, all but one, one, and some at random.
fn choices(count: usize) -> impl Iterator<Item = Vec<bool>> {
    let simple = [vec![false; count], vec![true; count]].into_iter();
    let single = (0..count).flat_map(move |one| {
        [false, true].map(|others| (0..count).map(|number| (number == one) != others).collect::<Vec<_>>())
    });
    let random = (0..RANDOM_CHOICES).map(move |seed| {
        let byte = |number: usize| {
            let mut hasher = DefaultHasher::new();
            (seed, number, count).hash(&mut hasher);
            hasher.finish()
        };
        (0..count).map(|number| byte(number) & 1 == 1).collect()
    });
    simple.chain(single).chain(random)
}

/// What the next process finds wrong.
async fn find_wrong(
    state: &BTreeMap<PathBuf, Option<Vec<u8>>>,
    promises: &[&Promised],
    test: &TestLayer,
) -> Vec<String> {
    // In memory where that is possible: nothing is lost here any more.
    let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    for (path, content) in state.iter().filter(|(path, _)| !path.as_os_str().is_empty()) {
        match content {
            None => fs::create_dir(root.path().join(path)).unwrap(),
            Some(content) => fs::write(root.path().join(path), content).unwrap(),
        }
    }
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
                    let before = step.checked_sub(1).map(|last| shorten(&changes[last]));
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

/// A change without its bytes.
fn shorten(change: &Change) -> String {
    match change {
        Change::Write { file, offset, bytes } => format!("Write {{ {file}, {offset}, {} bytes }}", bytes.len()),
        change => format!("{change:?}"),
    }
}

async fn open(cache: &Cache, test: &TestLayer, description: &str) -> Layer {
    cache.layer(&test.lazy, MemorySource::new(test), json!(description)).await.unwrap()
}

/// Opened, read, flushed, described anew, completed, lost and replaced, removed, opened again.
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

    // Somebody deletes the file under a process that has ended; the next one knows nothing of its content.
    drop((layer, cache));
    recording.end(|what| matches!(what, Promised::Present(_)));
    let directory = root.join("layers").join(test.lazy.id().hex());
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

    let is_sync = |change: &Change| matches!(change, Change::Sync(_) | Change::SyncDirectory(_));
    let is_by_hand =
        |pair: &[Change]| matches!(pair, [Change::Remove(path), Change::SyncDirectory(_)] if path.ends_with("data"));
    let by_hand = changes.windows(2).position(is_by_hand).unwrap() + 1;
    let mut needless = Vec::new();
    let mut sync_count = 0;
    for (number, sync) in changes.iter().enumerate().filter(|(_, change)| is_sync(change)) {
        if number == by_hand {
            continue;
        }
        sync_count += 1;
        let mut without = changes.clone();
        // In its place something that does nothing, so that all steps keep their numbers.
        without[number] = Change::Remove(directory.path().join("nothing"));
        match first_wrong(&without, number, &promises, directory.path(), &test).await {
            Some(wrong) => println!("without step {number}, {sync:?}: {wrong}"),
            None => needless.push(format!("{number}: {sync:?} after {}", shorten(&changes[number - 1]))),
        }
    }
    assert!(sync_count >= 15, "{sync_count} syncs");
    assert_eq!(needless, Vec::<String>::new(), "nothing is wrong without these");
}
