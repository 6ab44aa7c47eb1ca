//! In which order requests are made.

use std::ops::Range;

use storage::Priority;

use crate::support::{Fixture, TestLayer, check_read, one_request_a_class};

/// Wants a range and tells when it is there.
fn fetch(fixture: &Fixture, plain: Range<u64>, priority: Priority) -> tokio::sync::oneshot::Receiver<()> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    fixture.layer.fetch(plain, priority, move |result| {
        result.unwrap();
        let _ = sender.send(());
    });
    receiver
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_overtakes_prefetches_that_are_queued_or_stuck() {
    let test = TestLayer::of_frames(20, 1 << 20);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    let held = test.frames[0].blob_offset.get();
    fixture.source.hold_at(held);
    let everything = fetch(&fixture, 0..u64::MAX, Priority::Background);
    fixture.source.wait_for_frame_requests(1).await;

    // It is queued behind a request that does not move.
    check_read(&fixture.layer, &test, test.plain_of_frame(15)).await;
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..3), test.request_for(15..16)]);
    fetch(&fixture, test.plain_of_frame(10), Priority::HotPack).await.unwrap();
    assert_eq!(fixture.source.frame_requests()[2..], [test.request_for(10..11)]);

    fixture.source.release(held);
    everything.await.unwrap();
    let requests = fixture.source.sorted_frame_requests();
    assert!(requests.windows(2).all(|pair| pair[0].end == pair[1].start), "{requests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_takes_a_frame_out_of_a_running_prefetch() {
    let test = TestLayer::of_frames(10, 400 << 10);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    let held = test.frames[0].blob_offset.get();
    fixture.source.hold_at(held);
    let everything = fetch(&fixture, 0..u64::MAX, Priority::Background);
    assert_eq!(fixture.source.wait_for_frame_requests(1).await, [test.request_for(0..10)]);

    check_read(&fixture.layer, &test, test.plain_of_frame(5)).await;
    assert_eq!(fixture.layer.progress().frames_present, 1);
    fixture.source.release(held);
    everything.await.unwrap();
    assert_eq!(
        fixture.source.frame_requests(),
        [test.request_for(0..10), test.request_for(5..6), test.request_for(6..10)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_a_frame_that_is_about_to_arrive() {
    let test = TestLayer::of_frames(10, 400 << 10);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    let held = test.frames[0].blob_offset.get();
    fixture.source.hold_at(held);
    let everything = fetch(&fixture, 0..u64::MAX, Priority::Background);
    fixture.source.wait_for_frame_requests(1).await;
    let read = fetch(&fixture, test.plain_of_frame(1), Priority::Read);
    fixture.source.release(held);
    read.await.unwrap();
    everything.await.unwrap();
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..10)]);
}

/// Found by `every_byte_reads_right_and_is_fetched_once`: a read that came after a prefetch had received a frame,
/// but before the frame was decoded, fetched it again.
#[test]
fn a_frame_that_is_being_decoded_is_not_fetched_again() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let test = TestLayer::of_frames(1, 10_000);
        let fixture = Fixture::new(&test).await;
        // Nothing is decoded as long as this thread is taken.
        let (unblock, blocked) = std::sync::mpsc::channel::<()>();
        let blocker = tokio::task::spawn_blocking(move || blocked.recv());
        let prefetch = fetch(&fixture, 0..1, Priority::Background);
        fixture.source.wait_for_ended(2).await;
        // The one worker runs this after the request has ended completely.
        tokio::spawn(async {}).await.unwrap();
        let read = fetch(&fixture, 0..1, Priority::Read);
        drop(unblock);
        read.await.unwrap();
        prefetch.await.unwrap();
        assert!(blocker.await.unwrap().is_err());
        assert_eq!(fixture.source.frame_requests(), [test.request_for(0..1)]);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn sequential_reads_are_read_ahead_in_growing_steps() {
    let test = TestLayer::of_frames(16, 10_000);
    let fixture = Fixture::new(&test).await;
    // Where requests end, and how many there are after each frame that is read: the frame itself if it is missing,
    // and what lies ahead.
    let ends = [0, 1, 2, 3, 5, 8, 13];
    for (frame, count) in [1, 3, 4, 5, 6].into_iter().enumerate() {
        check_read(&fixture.layer, &test, test.plain_of_frame(frame)).await;
        // What lies ahead arrives before the next step, so that this asks for nothing twice.
        fetch(&fixture, 0..test.plain_of_frame(ends[count] - 1).end, Priority::Background).await.unwrap();
        let expected: Vec<_> = ends[..=count].windows(2).map(|ends| test.request_for(ends[0]..ends[1])).collect();
        assert_eq!(fixture.source.sorted_frame_requests(), expected, "after frame {frame}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn read_ahead_ends_with_the_file() {
    let files = [16_000 - 512, 64_000].map(crate::support::TestFile::of_len);
    let test = TestLayer::new(&files, &[4000]);
    let fixture = Fixture::new(&test).await;
    for start in (0..16_000 - 512).step_by(500) {
        check_read(&fixture.layer, &test, start..start + 400).await;
    }
    fetch(&fixture, test.files[0].clone(), Priority::Background).await.unwrap();
    let end = fixture.source.frame_requests().iter().map(|range| range.end).max();
    assert_eq!(end, Some(test.request_for(3..4).end));
}

#[tokio::test(flavor = "multi_thread")]
async fn scattered_reads_are_not_read_ahead() {
    let test = TestLayer::of_frames(16, 10_000);
    let fixture = Fixture::new(&test).await;
    for frame in [9, 3, 12, 6, 0] {
        check_read(&fixture.layer, &test, test.plain_of_frame(frame)).await;
    }
    let expected = [9, 3, 12, 6, 0].map(|frame| test.request_for(frame..frame + 1));
    assert_eq!(fixture.source.frame_requests(), expected);
}
