//! What nobody asks for is fetched when nobody waits, at a rate, and of no layer that is gone.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

use serde_json::json;
use storage::{Cache, CacheOptions, Layer, RestOptions};

use crate::support::{Fault, Fixture, MemorySource, TestFile, TestLayer, check_read, options};

/// As fast as it can.
const FAST: u64 = 1 << 40;
const QUIET: Duration = Duration::from_millis(100);
const START_UP_MAX: Duration = Duration::from_secs(4);
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// The same at other times, so that nobody waits for a minute.
fn with_rate(bytes_per_second: u64) -> CacheOptions {
    let rest = RestOptions {
        quiet: QUIET,
        start_up_max: START_UP_MAX,
        step_max: Duration::from_secs(1),
        failure_pause: FAILURE_PAUSE,
        ..RestOptions::new(NonZeroU64::new(bytes_per_second).unwrap())
    };
    CacheOptions { rest: Some(rest), ..options() }
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
    let mut options = with_rate(FAST);
    // A busy machine is late with the reader.
    options.rest.as_mut().unwrap().quiet = QUIET * 10;
    let fixture = Fixture::with_options(&test, options).await;
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
    tokio::time::sleep(QUIET * 8).await;
    assert_eq!(fixture.source.frame_requests(), [test.request_for(3..4)]);
    fixture.source.release(held);
    reader.await.unwrap().unwrap();
    wait_until_complete(&fixture.layer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept() {
    let test = TestLayer::of_frames(12, 2 << 20);
    let fixture = Fixture::with_options(&test, with_rate(32 << 20)).await;
    let started = Instant::now();
    wait_until_complete(&fixture.layer).await;
    // 24 MiB, the last step of 8 MiB being not waited for.
    assert!(started.elapsed() > Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_more_comes_of_a_removed_layer() {
    let test = TestLayer::of_frames(12, 2 << 20);
    let fixture = Fixture::with_options(&test, with_rate(32 << 20)).await;
    fixture.source.wait_for_frame_requests(1).await;
    fixture.cache.remove(test.lazy.id()).await.unwrap();
    let at_removal = fixture.source.frame_requests().len();
    assert!(at_removal < test.frames.len() / 2, "{at_removal} requests of two frames at most");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fixture.source.frame_requests().len(), at_removal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_is_asked_less_and_less_and_holds_up_no_other_layer() {
    let test = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    fixture.source.fail_next([Fault::Refuse; 3]);
    let started = Instant::now();
    let other_test = TestLayer::of_frames(6, 10_000);
    let other = fixture.cache.layer(&other_test.lazy, MemorySource::new(&other_test), json!("other")).await.unwrap();
    wait_until_complete(&other).await;
    assert!(!fixture.layer.is_complete());
    wait_until_complete(&fixture.layer).await;
    // Three steps that fail, and the pauses after them.
    assert!(started.elapsed() > FAILURE_PAUSE * (1 + 2 + 4), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_always_wrong_keeps_nothing_else_away() {
    let test = TestLayer::of_frames(30, 1 << 20);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    let wrong = test.request_for(4..5);
    for frame in 0..=4 {
        // Whatever request brings it.
        for end in 5..=9 {
            fixture.source.fail_at(&test.request_for(frame..end), Fault::FlipAt(wrong.start + 10));
        }
    }
    let give_up_at = Instant::now() + Duration::from_secs(60);
    while fixture.layer.progress().frames_present < 29 {
        assert!(Instant::now() < give_up_at, "{:?}", fixture.layer.progress());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!fixture.layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_waits_for_ever_holds_up_the_rest_for_a_bounded_time() {
    let test = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    fixture.source.hold_at(test.request_for(3..4).start);
    let started = Instant::now();
    let (layer, plain) = (fixture.layer.clone(), test.plain_of_frame(3));
    let reader = tokio::spawn(async move { layer.read_async(plain.start, 100).await });
    let other_test = TestLayer::of_frames(6, 10_000);
    let other = fixture.cache.layer(&other_test.lazy, MemorySource::new(&other_test), json!("other")).await.unwrap();
    wait_until_complete(&other).await;
    assert!(started.elapsed() >= START_UP_MAX, "{:?}", started.elapsed());
    reader.abort();
}

/// Two steps that stalled stopped the fetching of the rest of all layers.
#[tokio::test(flavor = "multi_thread")]
async fn layers_whose_sources_hang_hold_up_no_other_and_steps_that_are_given_up_end_their_requests() {
    let test = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&test, with_rate(FAST)).await;
    fixture.source.hold_at(0);
    let hanging: Vec<_> = (7..9).map(|count| TestLayer::of_frames(count, 10_000)).collect();
    for (number, test) in hanging.iter().enumerate() {
        let source = MemorySource::new(test);
        source.hold_at(0);
        fixture.cache.layer(&test.lazy, source, json!(number)).await.unwrap();
    }
    fixture.source.wait_for_frame_requests(1).await;
    let other_test = TestLayer::of_frames(6, 10_000);
    let other = fixture.cache.layer(&other_test.lazy, MemorySource::new(&other_test), json!("other")).await.unwrap();
    wait_until_complete(&other).await;
    // That of the index, and that of the step.
    fixture.source.wait_for_ended(2).await;
    assert_eq!(fixture.layer.progress().frames_present, 0);
}

/// Layers that were opened earlier, and came slowly, kept all steps: of one that was opened later nothing came.
#[tokio::test(flavor = "multi_thread")]
async fn old_layers_of_slow_sources_kept_the_rest_of_a_new_one_away() {
    /// A step is as long as a hole.
    const HOLE_LEN: usize = 8 << 20;
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), with_rate(FAST)).unwrap();
    let mut slow = Vec::new();
    for count in 30..34 {
        let test = TestLayer::new(&[TestFile(vec![(HOLE_LEN, 5000); count])], &[5000]);
        let source = MemorySource::new(&test);
        let frames: Vec<u64> = test.frames.iter().map(|frame| frame.blob_offset.get()).collect();
        frames.iter().for_each(|frame| source.hold_at(*frame));
        slow.push(cache.layer(&test.lazy, source.clone(), json!(count)).await.unwrap());
        tokio::spawn(async move {
            for frame in frames {
                tokio::time::sleep(Duration::from_millis(300)).await;
                source.release(frame);
            }
        });
    }
    tokio::time::sleep(QUIET * 4).await;
    let test = TestLayer::of_frames(6, 10_000);
    let new = cache.layer(&test.lazy, MemorySource::new(&test), json!("new")).await.unwrap();
    wait_until_complete(&new).await;
    assert!(slow.iter().all(|layer| !layer.is_complete()), "it had to wait for one of them");
}

/// A program that read all of its image waited for a round trip and a decompression with every frame.
#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_layer_that_is_read_whole_waits_for_no_quiet() {
    const LONG: Duration = Duration::from_secs(600);
    let test = TestLayer::of_frames(40, 1 << 20);
    let mut options = with_rate(1);
    options.rest.as_mut().unwrap().quiet = Duration::from_secs(2);
    options.rest.as_mut().unwrap().start_up_max = LONG;
    let fixture = Fixture::with_options(&test, options).await;
    let read = async |frame: usize| check_read(&fixture.layer, &test, test.plain_of_frame(frame)).await;
    // As much as a start reads beside its hot pack: nothing else comes.
    for frame in (10..40).rev().step_by(2) {
        read(frame).await;
    }
    tokio::time::sleep(QUIET).await;
    assert_eq!(fixture.source.frame_requests().len(), 15);
    read(1).await;
    // A byte a second is the rate of what nobody is in a hurry for.
    wait_until_complete(&fixture.layer).await;
    let requests = fixture.source.frame_requests();
    assert_eq!(requests.iter().map(|range| range.end - range.start).sum::<u64>(), test.request_for(0..40).end);
    // It begins where the reader is: two requests for a step, and one or two of the next step beside them.
    assert!(requests[16..20].iter().any(|range| range.start == test.request_for(2..3).start), "{requests:?}");
}

/// The thread that chooses steps ran for ever: the end of a step lay inside a frame, which was found again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_ends_inside_a_frame_is_followed_by_the_next_one() {
    let test = TestLayer::of_frames(16, 3 << 20);
    // A byte a second is the rate of what nobody is in a hurry for.
    let fixture = Fixture::with_options(&test, with_rate(1)).await;
    for frame in (0..14).step_by(2) {
        check_read(&fixture.layer, &test, test.plain_of_frame(frame)).await;
    }
    wait_until_complete(&fixture.layer).await;
}
