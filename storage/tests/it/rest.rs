//! What nobody asks for is fetched when nobody waits, at a rate, and of no layer that is gone.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

use storage::{CacheOptions, Layer};

use crate::support::{Fault, Fixture, MemorySource, TestFile, TestLayer, check_read, options};

/// As fast as it can.
const FAST: u64 = 1 << 40;
/// Longer than a pause between two readers that keeps the rest back.
const LONGER_THAN_QUIET: Duration = Duration::from_secs(2);

fn with_rate(bytes_per_second: u64) -> CacheOptions {
    CacheOptions { background_rate: NonZeroU64::new(bytes_per_second), ..options() }
}

async fn wait_until_complete(layer: &Layer) {
    let give_up_at = Instant::now() + Duration::from_secs(60);
    while !layer.is_complete() {
        assert!(Instant::now() < give_up_at, "{:?}", layer.progress());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_layer_comes_once_without_a_reader() {
    let test = TestLayer::of_frames(50, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(20)).await;
    wait_until_complete(&fixture.layer).await;
    let requests = fixture.source.sorted_frame_requests();
    assert_eq!(requests, [test.request_for(0..20), test.request_for(20..21), test.request_for(21..50)]);
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_frames_of_a_hole_do_not_bring_is_not_waited_for() {
    const HOLE_LEN: usize = 20 << 20;
    let files = [TestFile(vec![(0, 5000), (HOLE_LEN, 5000)]), TestFile::of_len(9000)];
    let test = TestLayer::new(&files, &[4096]);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    wait_until_complete(&fixture.layer).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_as_long_as_a_reader_does() {
    let test = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    let held = test.request_for(3..4).start;
    fixture.source.hold_at(held);
    let reader = {
        let (layer, plain) = (fixture.layer.clone(), test.plain_of_frame(3));
        tokio::spawn(async move { layer.read_async(plain.start, 100).await })
    };
    tokio::time::sleep(LONGER_THAN_QUIET).await;
    assert_eq!(fixture.source.frame_requests(), [test.request_for(3..4)]);
    fixture.source.release(held);
    reader.await.unwrap().unwrap();
    wait_until_complete(&fixture.layer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept() {
    let test = TestLayer::of_frames(12, 2 << 20);
    let fixture = Fixture::with_options(&test, with_rate(8 << 20)).await;
    let started = Instant::now();
    wait_until_complete(&fixture.layer).await;
    // 24 MiB, the last step of 8 MiB being not waited for.
    assert!(started.elapsed() > Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_more_comes_of_a_removed_layer() {
    let test = TestLayer::of_frames(12, 2 << 20);
    let fixture = Fixture::with_options(&test, with_rate(4 << 20)).await;
    fixture.source.wait_for_frame_requests(1).await;
    fixture.cache.remove(test.lazy.id()).await.unwrap();
    let at_removal = fixture.source.frame_requests().len();
    assert!(at_removal < test.frames.len() / 2, "{at_removal} requests of two frames at most");
    tokio::time::sleep(2 * LONGER_THAN_QUIET).await;
    assert_eq!(fixture.source.frame_requests().len(), at_removal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_is_left_alone_and_holds_up_no_other_layer() {
    let test = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    fixture.source.fail_next([Fault::Refuse; 100]);
    let other_test = TestLayer::of_frames(6, 10_000);
    let other_source = MemorySource::new(&other_test);
    let other = fixture.cache.layer(&other_test.lazy, other_source, serde_json::json!("other")).await.unwrap();
    wait_until_complete(&other).await;
    let requests = fixture.source.frame_requests().len();
    assert!(requests > 0);
    tokio::time::sleep(LONGER_THAN_QUIET).await;
    assert_eq!(fixture.source.frame_requests().len(), requests);
    assert!(!fixture.layer.is_complete());
}
