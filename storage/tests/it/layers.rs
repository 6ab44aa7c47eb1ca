//! Layers of a cache: opened, known, replaced, removed.

use std::{
    os::unix::fs::PermissionsExt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use format_spec::{Digest, LazyLayer};
use serde_json::json;
use storage::{KnownLayer, Priority, ReadError};

use crate::{
    support::{Fixture, MemorySource, TestLayer, check_read, one_request_a_class, open_cache},
    watched::{Kind, WatchedDisk},
};

/// Counts the warnings of a thread.
#[derive(Debug, Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// `lazuli status` beside a pull: the layer has a directory, and its record a moment later.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_being_opened_is_no_damaged_one() {
    let test = TestLayer::of_frames(1, 1000);
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(WatchedDisk::default());
    let cache = storage::Cache::open(directory.path(), tokio::runtime::Handle::current(), disk.options()).unwrap();
    disk.hold(Kind::Write, "layer.json");
    let opening = {
        let (cache, source, layer) = (cache.clone(), MemorySource::new(&test), test.lazy);
        tokio::spawn(async move { cache.layer(&layer, source, json!(null)).await.map(drop) })
    };
    let watched = disk.clone();
    tokio::task::spawn_blocking(move || watched.wait_until_held()).await.unwrap();
    let at = directory.path().join("layers").join(test.lazy.id().hex());
    assert!(at.exists());
    let warnings = Warnings::default();
    let known = || tracing::subscriber::with_default(warnings.clone(), || cache.known_layers().unwrap().len());
    assert_eq!((known(), warnings.0.load(Ordering::Relaxed)), (0, 0));
    disk.release();
    opening.await.unwrap().unwrap();
    assert_eq!((known(), warnings.0.load(Ordering::Relaxed)), (1, 0));
    // A directory that nobody is changing and that has no record is worth a look.
    std::fs::create_dir(at.with_file_name("0".repeat(64))).unwrap();
    assert_eq!((known(), warnings.0.load(Ordering::Relaxed)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_at_once_share_one_request_for_the_index() {
    let test = Arc::new(TestLayer::of_frames(1, 1000));
    let directory = tempfile::tempdir().unwrap();
    let cache = open_cache(directory.path());
    let source = MemorySource::new(&test);
    source.hold_at(test.lazy.index.offset);
    let open = || {
        let (cache, source, test) = (cache.clone(), source.clone(), test.clone());
        tokio::spawn(async move { cache.layer(&test.lazy, source, json!(null)).await.map(drop) })
    };
    let first = open();
    source.wait_for_frame_requests(0).await;
    let others: Vec<_> = (0..20).map(|_| open()).collect();
    // Whoever asked first may go: the others still get the layer.
    first.abort();
    source.release(test.lazy.index.offset);
    for other in others {
        other.await.unwrap().unwrap();
    }
    assert_eq!(source.requests(), [test.index_request()]);
    assert_eq!(cache.open_layers().len(), 1);
}

/// An image can claim another one's blob under an index of its own. It gets what its own index says, and the
/// other image what that says.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_blob_under_another_index_is_another_layer() {
    let test = TestLayer::of_frames(1, 1000);
    let fixture = Fixture::new(&test).await;
    let other = TestLayer::of_frames(2, 1000);
    let lie = LazyLayer { blob: test.lazy.blob, ..other.lazy };
    let lying = fixture.cache.layer(&lie, MemorySource::new(&other), json!(null)).await.unwrap();
    check_read(&fixture.layer, &test, 0..1000).await;
    check_read(&lying, &other, 0..2000).await;
    assert_eq!(fixture.cache.open_layers().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_knows_layers_and_their_last_description() {
    let test = TestLayer::of_frames(1, 1000);
    let fixture = Fixture::new(&test).await;
    let known = |description| vec![KnownLayer { layer: test.lazy, description }];
    let open_again = || open_cache(fixture.directory.path()).known_layers().unwrap();
    assert_eq!(open_again(), known(json!("test")));

    let new_source = MemorySource::new(&test);
    let layer = fixture.cache.layer(&test.lazy, new_source.clone(), json!({"image": "new"})).await.unwrap();
    assert_eq!(layer.description(), json!({"image": "new"}));
    // Nobody waits for the disk here.
    while open_again() != known(json!({"image": "new"})) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    // The place that has worked is asked, not the newest one.
    check_read(&fixture.layer, &test, 0..10).await;
    assert_eq!((fixture.source.requests().len(), new_source.requests().len()), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_belong_to_the_daemons_user_alone() {
    let test = TestLayer::of_frames(1, 1000);
    let fixture = Fixture::new(&test).await;
    let layers = fixture.directory.path().join("layers");
    for path in [layers.join(test.lazy.id().hex()), layers] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_layer_frees_it_and_stops_its_fetches() {
    let test = TestLayer::of_frames(20, 1 << 20);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    let (id, second) = (test.lazy.id(), test.frames[1].blob_offset.get());
    fixture.source.hold_at(second);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    fixture.layer.fetch(0..u64::MAX, Priority::Background, move |result| sender.send(result).unwrap());
    check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    assert!(fixture.cache.usage(id).unwrap() >= 1 << 20);

    fixture.cache.remove(id).await.unwrap();
    assert_eq!(fixture.cache.usage(id).unwrap(), 0);
    assert_eq!(fixture.cache.known_layers().unwrap(), []);
    assert!(matches!(receiver.await.unwrap(), Err(ReadError::Stopped(_))));
    fixture.source.release(second);
    check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    assert!(matches!(fixture.layer.read_async(15 << 20, 1).await, Err(ReadError::Stopped(_))));
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..3)]);

    fixture.cache.remove(id).await.unwrap();
    fixture.cache.remove(Digest::of(b"unknown")).await.unwrap();
    assert_eq!(std::fs::read_dir(fixture.directory.path().join("removed")).unwrap().count(), 0);

    let layer = fixture.cache.layer(&test.lazy, fixture.source.clone(), json!("again")).await.unwrap();
    assert_eq!(layer.progress().frames_present, 0);
    fixture.layer.flush().unwrap();
    check_read(&layer, &test, test.plain_of_frame(0)).await;
}
