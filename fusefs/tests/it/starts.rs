//! Starts are recorded, and the next version of an image has what they read before anybody asks for it.

use std::{
    fs,
    num::NonZeroU64,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use control::{RemoteLayer, Request, Response, root::record_of_starts};
use format_spec::profile::Profile;
use fusefs::DaemonOptions;
use storage::{CacheOptions, RestOptions};

use crate::support::{
    daemon::{Running, options},
    *,
};

const REPOSITORY: &str = "registry.example.com/image";
/// Length of a file that is read: two frames and more, with those beside it.
const LEN: usize = 40_000;

/// The layers of a version: of its own a file that a start reads, one that it does not, and one that no other has.
fn version(registry: &Registry, base: &RemoteLayer, number: u64) -> Vec<RemoteLayer> {
    let own = format!("only-{number}");
    let top = layer([
        ("read", file(noise(number, LEN))),
        ("unread", file(noise(number + 100, 10 * LEN))),
        (own.as_str(), file(noise(number + 200, LEN))),
    ]);
    let image = format!("{REPOSITORY}:{number}");
    [base.clone(), registry.push(&top)].map(|layer| RemoteLayer { image: image.clone(), ..layer }).to_vec()
}

fn base(registry: &Registry) -> RemoteLayer {
    registry.push(&layer([("base", file(noise(1000, LEN)))]))
}

/// Reads what a start of this version reads, and ends it.
fn start(daemon: &Running, layers: &[RemoteLayer], names: &[&str]) {
    let path = daemon.mount(layers);
    for name in names {
        fs::read(path.join(name)).unwrap();
    }
    release(daemon, layers);
}

fn release(daemon: &Running, layers: &[RemoteLayer]) {
    assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(layers) }), Response::Done);
}

fn recorded(root: &Path, repository: &str) -> Option<Vec<String>> {
    let bytes = fs::read(root.join(record_of_starts(repository))).ok()?;
    let profile = Profile::parse(&bytes).unwrap();
    assert_eq!(profile.origin().unwrap().repository, repository);
    Some(profile.files().map(|(path, _)| String::from_utf8(path.to_vec()).unwrap()).collect())
}

/// Frames of a layer that are there, as soon as they are as many as expected; those that are at the end of all patience.
fn frames_present(daemon: &Running, layer: &RemoteLayer, expected: u64) -> u64 {
    let give_up_at = Instant::now() + Duration::from_secs(20);
    loop {
        let Response::Status { layers, .. } = daemon.ask(&Request::Status) else { panic!("no status") };
        let present = layers.iter().find(|known| known.layer.layer == layer.layer).unwrap().frames_present;
        if present == expected || Instant::now() > give_up_at {
            return present;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The rest of layers is fetched only when nobody has waited for an hour: what comes before is foreseen.
fn fetches_ahead(root: &Path) -> DaemonOptions {
    let rest = RestOptions { quiet: Duration::from_secs(3600), ..RestOptions::new(NonZeroU64::MAX) };
    let options = options(root);
    DaemonOptions { cache: CacheOptions { rest: Some(rest), ..options.cache.clone() }, ..options }
}

#[test]
fn the_next_version_has_what_a_start_read_before_anybody_asks() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let (base, daemon) = (base(&registry), Running::start_with(fetches_ahead(root.path()), &registry));
    let (first, second) = (version(&registry, &base, 1), version(&registry, &base, 2));
    start(&daemon, &first, &["read", "base", "only-1"]);
    assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read", "/base", "/only-1"]);

    let path = daemon.mount(&second);
    // 40,000 bytes lie in three frames of 16 KiB, behind a header.
    assert_eq!(frames_present(&daemon, &second[1], 3), 3);
    let requests = registry.requests();
    assert!(fs::read(path.join("read")).unwrap() == noise(2, LEN));
    assert_eq!(registry.requests(), requests);
    release(&daemon, &second);
    // The base was read before: this start only adds, and what the second version has not is forgotten.
    assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read", "/base"]);
}

#[test]
fn without_records_nothing_is_fetched_before_it_is_read() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let options = DaemonOptions { records_starts: false, ..fetches_ahead(root.path()) };
    let (base, daemon) = (base(&registry), Running::start_with(options, &registry));
    let (first, second) = (version(&registry, &base, 1), version(&registry, &base, 2));
    start(&daemon, &first, &["read"]);
    assert!(!daemon.root.join("starts").exists());
    let path = daemon.mount(&second);
    let requests = registry.requests();
    fs::read(path.join("read")).unwrap();
    assert!(registry.requests() > requests);
}

#[test]
fn where_only_what_is_read_is_fetched_no_record_has_anything_fetched() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let (base, daemon) = (base(&registry), Running::start_with(options(root.path()), &registry));
    let (first, second) = (version(&registry, &base, 1), version(&registry, &base, 2));
    start(&daemon, &first, &["read"]);
    assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read"]);
    let path = daemon.mount(&second);
    // Time enough for what would come by itself.
    thread::sleep(Duration::from_millis(500));
    assert_eq!(frames_present(&daemon, &second[1], 0), 0);
    let requests = registry.requests();
    fs::read(path.join("read")).unwrap();
    assert!(registry.requests() > requests);
}

#[test]
fn what_a_tree_is_read_for_that_others_named_before_a_restart_is_in_nobodys_record() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let base = base(&registry);
    let mine = version(&registry, &base, 1);
    let elsewhere = "elsewhere.example.com/image:1".to_owned();
    let theirs = mine.iter().map(|layer| RemoteLayer { image: elsewhere.clone(), ..layer.clone() });
    let theirs: Vec<_> = theirs.collect();
    let daemon = Running::start(root.path(), &registry);
    assert_eq!(daemon.mount(&mine), daemon.mount(&theirs));
    drop(daemon);

    // The record of the tree names my image alone.
    let daemon = Running::start(root.path(), &registry);
    let next = version(&registry, &base, 2);
    let path = daemon.mount(&next);
    let tree = daemon.root.join("mnt/trees").join(id_of(&mine).hex());
    fs::read(tree.join("base")).unwrap();
    fs::read(path.join("read")).unwrap();
    release(&daemon, &next);
    assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read"]);
}

#[test]
fn what_others_read_of_a_shared_layer_is_in_nobodys_record() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let (base, daemon) = (base(&registry), Running::start_with(fetches_ahead(root.path()), &registry));
    let mine = version(&registry, &base, 1);
    let other = version(&registry, &base, 2).into_iter();
    let elsewhere = "elsewhere.example.com/image";
    let other: Vec<_> = other.map(|layer| RemoteLayer { image: format!("{elsewhere}:2"), ..layer }).collect();
    let path = daemon.mount(&mine);
    fs::read(path.join("read")).unwrap();
    start(&daemon, &other, &["base", "only-2"]);
    release(&daemon, &mine);
    assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read"]);
    assert_eq!(recorded(&daemon.root, elsewhere).unwrap(), ["/only-2"]);

    // The same name in another registry: nothing comes of that record.
    let next = version(&registry, &base, 3).into_iter();
    let next: Vec<_> =
        next.map(|layer| RemoteLayer { image: "third.example.com/image:3".to_owned(), ..layer }).collect();
    let path = daemon.mount(&next);
    let requests = registry.requests();
    fs::read(path.join("read")).unwrap();
    assert!(registry.requests() > requests);
}

#[test]
fn a_record_of_nonsense_costs_a_start_nothing() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let base = base(&registry);
    for (number, record) in
        (1..).zip([&b"{"[..], b"", &[0xff; 100], br#"{"version": 1, "files": [{"path": "/read"}]}"#])
    {
        let layers = version(&registry, &base, number);
        let daemon = Running::start(root.path(), &registry);
        fs::write(daemon.root.join(record_of_starts(REPOSITORY)), record).unwrap();
        start(&daemon, &layers, &["read"]);
        assert_eq!(recorded(&daemon.root, REPOSITORY).unwrap(), ["/read"]);
    }
}

#[test]
fn a_daemon_that_ends_writes_what_it_has_recorded_and_the_next_one_records_no_tree_again() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = version(&registry, &base(&registry), 1);
    let daemon = Running::start(root.path(), &registry);
    let (path, directory) = (daemon.mount(&layers), daemon.root.clone());
    fs::read(path.join("read")).unwrap();
    drop(daemon);
    assert_eq!(recorded(&directory, REPOSITORY).unwrap(), ["/read"]);
    let daemon = Running::start(root.path(), &registry);
    start(&daemon, &layers, &["base"]);
    assert_eq!(recorded(&directory, REPOSITORY).unwrap(), ["/read"]);
}
