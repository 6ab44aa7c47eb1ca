//! Readers wait: how long, for whom, and what that costs the source and everybody else.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use storage::{Cache, CacheOptions, Layer, Priority, ReadError, RequestOptions, SourceError};
use tokio::runtime::Handle;

use crate::support::{Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, options};

/// Shorter than a test may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// The times of a node, but for patience.
fn patient() -> CacheOptions {
    CacheOptions { patience: Some(PATIENCE), requests: RequestOptions::default(), ..options() }
}

fn every_failure() -> [SourceError; 4] {
    [
        SourceError::refused("answered 404"),
        SourceError::unusable("a page of a portal"),
        SourceError::passing("connection refused"),
        SourceError { retry_after: Some(Duration::from_secs(120)), ..SourceError::passing("answered 503") },
    ]
}

fn read_in_background(layer: &Layer, offset: u64) -> tokio::task::JoinHandle<Result<Vec<u8>, ReadError>> {
    let layer = layer.clone();
    tokio::spawn(async move { layer.read_async(offset, 100).await })
}

/// A registry that answered 404, 401 or 503 with a long `Retry-After` for three seconds gave a running container an
/// error within 50 ms.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_shorter_than_patience_is_not_seen_by_readers() {
    let mut requests = RequestOptions { retry_after_max: Duration::from_millis(500), ..RequestOptions::default() };
    requests.pause_max = Duration::from_millis(250);
    for error in every_failure() {
        let test = TestLayer::of_frames(2, 10_000);
        let options = CacheOptions { patience: Some(Duration::from_secs(60)), requests: requests.clone(), ..patient() };
        let fixture = Fixture::with_options(&test, options).await;
        fixture.source.set_outage(Some(error));
        let read = read_in_background(&fixture.layer, 0);
        fixture.source.wait_for_frame_requests(2).await;
        fixture.source.set_outage(None);
        assert!(read.await.unwrap().unwrap() == test.expected(0..100));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_opened_when_its_source_answers_within_patience() {
    let test = TestLayer::of_frames(1, 10_000);
    let other = TestLayer::of_frames(2, 10_000);
    let fixture = Fixture::with_options(&other, CacheOptions { patience: Some(Duration::from_secs(60)), ..patient() });
    let fixture = fixture.await;
    let source = MemorySource::new(&test);
    source.set_outage(Some(SourceError::passing("connection refused")));
    let (cache, lazy, opened_from) = (fixture.cache.clone(), test.lazy, source.clone());
    let opening = tokio::spawn(async move { cache.layer(&lazy, opened_from, json!("test")).await });
    source.wait_for_frame_requests(3).await;
    source.set_outage(None);
    check_read(&opening.await.unwrap().unwrap(), &test, 0..100).await;

    // A refusal comes at once: somebody waits for a command.
    let refused = TestLayer::of_frames(3, 10_000);
    let source = MemorySource::new(&refused);
    source.set_outage(Some(SourceError::refused("answered 404")));
    fixture.cache.layer(&refused.lazy, source.clone(), json!("test")).await.unwrap_err();
    assert_eq!(source.requests().len(), 1);
}

/// The longest wait: a source that takes a request and says nothing. The kernel asks a second time for what failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_patience_once_whatever_happens() {
    let test = TestLayer::of_frames(2, 10_000);
    let fixture = Fixture::with_options(&test, patient()).await;
    fixture.source.hold_at(0);
    let started = Instant::now();
    let error = fixture.layer.read_async(0, 100).await.unwrap_err();
    assert!(matches!(&error, ReadError::Source { .. }), "{error}");
    let requests = fixture.source.frame_requests().len();
    let again = fixture.layer.read_async(0, 100).await.unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    let waited = started.elapsed();
    assert!(waited >= PATIENCE && waited < PATIENCE * 2, "{waited:?}");
    assert_eq!(fixture.source.frame_requests().len(), requests);

    // Nothing is left of it: when the source answers, so does the layer.
    fixture.source.release(0);
    tokio::time::sleep(RequestOptions::default().failure_memory).await;
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
}

/// A hot pack that does not come is given up for the same reader within the same time.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_a_hot_pack_counts_too() {
    let files = [TestFile::of_len(50_000)];
    let test = LayerMaker { files: &files, hot: &[0..40_960], ..LayerMaker::default() }.make();
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), Handle::current(), patient()).unwrap();
    let source = MemorySource::new(&test);
    source.hold_at(test.hot_range(0..1).start);
    source.hold_at(0);
    let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
    let started = Instant::now();
    layer.read_async(0, 100).await.unwrap_err();
    assert!(started.elapsed() >= PATIENCE && started.elapsed() < PATIENCE * 2, "{:?}", started.elapsed());
}

/// 16,577 requests in 15 seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_tries_again_and_again_asks_a_bounded_number_of_times() {
    let test = TestLayer::of_frames(2, 10_000);
    let options = CacheOptions { patience: Some(Duration::from_millis(200)), ..patient() };
    let fixture = Fixture::with_options(&test, options).await;
    fixture.source.set_outage(Some(SourceError::refused("answered 404")));
    let (started, mut failures) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_secs(5) {
        fixture.layer.read_async(0, 100).await.unwrap_err();
        failures += 1;
    }
    assert!(failures > 10);
    // At 0, 0.25, 0.75, 1.75, 3.75 s at the most.
    let requests = fixture.source.frame_requests().len();
    assert!((1..=5).contains(&requests), "{requests} requests");
}

/// Twenty readers of one registry that did not answer stopped the reads of all others, and so did two steps of the rest.
#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_source_that_does_not_answer_take_nothing_from_others() {
    let dead = TestLayer::of_frames(200, 10_000);
    let fixture = Fixture::with_options(&dead, CacheOptions { patience: Some(Duration::from_secs(600)), ..patient() });
    let fixture = fixture.await;
    dead.frames.iter().for_each(|frame| fixture.source.hold_at(frame.blob_offset.get()));
    let readers: Vec<_> =
        (0..100).map(|number| read_in_background(&fixture.layer, dead.plain_of_frame(number * 2).start)).collect();
    for number in 0..20 {
        let plain = dead.plain_of_frame(number * 2 + 1);
        fixture.layer.fetch(plain.clone(), Priority::Background, |_| ());
        fixture.layer.fetch(plain, Priority::HotPack, |_| ());
    }
    fixture.source.wait_for_frame_requests(10).await;
    for priority in [Priority::Read, Priority::HotPack, Priority::Background] {
        let healthy = TestLayer::of_frames(3 + priority as usize, 10_000);
        let source = MemorySource::new(&healthy);
        let layer = fixture.cache.layer(&healthy.lazy, source, json!("healthy")).await.unwrap();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        layer.fetch(0..u64::MAX, priority, move |result| sender.send(result).unwrap());
        receiver.await.unwrap().unwrap();
    }
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    readers.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Wakes who waits at a gate.
#[derive(Debug, Default)]
struct Gate(std::sync::Mutex<bool>, std::sync::Condvar);

impl storage::disk::Observer for Gate {
    fn before(&self, operation: storage::disk::Operation<'_>) -> std::io::Result<()> {
        let mut is_shut = self.0.lock().unwrap();
        while matches!(operation, storage::disk::Operation::Sync { .. }) && *is_shut {
            is_shut = self.1.wait(is_shut).unwrap();
        }
        Ok(())
    }
}

impl Gate {
    fn set_shut(&self, is_shut: bool) {
        *self.0.lock().unwrap() = is_shut;
        self.1.notify_all();
    }
}

/// A read of an unrelated image took 18 s while one layer was made durable and another image named it.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_slow_to_make_durable_holds_up_no_read_and_no_announcement() {
    let test = TestLayer::of_frames(4, 10_000);
    let gate = Arc::new(Gate::default());
    let options = CacheOptions { disk: storage::disk::Disk::observed(gate.clone()), ..options() };
    let fixture = Fixture::with_options(&test, options).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    gate.set_shut(true);
    let layer = fixture.layer.clone();
    let flushing = tokio::task::spawn_blocking(move || layer.flush());
    for name in ["second", "third"] {
        fixture.cache.layer(&test.lazy, MemorySource::new(&test), json!(name)).await.unwrap();
    }
    check_read(&fixture.layer, &test, test.plain_of_frame(2)).await;
    assert_eq!(fixture.layer.descriptions(), ["third", "second", "test"].map(|name| json!(name)));
    assert!(!flushing.is_finished());
    gate.set_shut(false);
    flushing.await.unwrap().unwrap();
}
