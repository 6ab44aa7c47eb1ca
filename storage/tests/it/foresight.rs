//! Content that somebody expects to be read: fetched in his order, unless it comes by itself.

use std::ops::Range;

use serde_json::json;
use storage::Foresight;

use crate::support::{
    Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, one_request_a_class, open_cache,
};

const FRAME_LEN: usize = 100 << 10;

/// Ranges that lie in these frames alone.
fn inside(test: &TestLayer, frames: &[usize]) -> Vec<Range<u64>> {
    frames.iter().map(|frame| test.plain_of_frame(*frame)).map(|plain| plain.start + 5000..plain.end - 5000).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_expected_comes_in_that_order_and_neighbours_come_together() {
    let test = TestLayer::of_frames(10, FRAME_LEN);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    check_read(&fixture.layer, &test, inside(&test, &[5])[0].clone()).await;
    let len_of = |frame: usize| {
        let blob = test.request_for(frame..frame + 1);
        blob.end - blob.start
    };
    let mut foresight = Foresight::new(u64::MAX);
    let wanted = foresight.want(&fixture.layer, &inside(&test, &[7, 2, 3, 5, 2]));
    assert_eq!(wanted, [7, 2, 3].map(len_of).iter().sum::<u64>());
    let requests = fixture.source.wait_for_frame_requests(3).await;
    assert_eq!(requests[1..], [test.request_for(7..8), test.request_for(2..4)]);
    assert_eq!(foresight.want(&fixture.layer, &inside(&test, &[7, 2])), 0, "once is enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_fetched_ahead_than_was_allowed() {
    let test = TestLayer::of_frames(10, FRAME_LEN);
    let fixture = Fixture::with_options(&test, one_request_a_class()).await;
    let first = test.request_for(7..8);
    let mut foresight = Foresight::new(first.end - first.start);
    assert_eq!(foresight.want(&fixture.layer, &inside(&test, &[7, 2])), first.end - first.start);
    assert_eq!(foresight.want(&fixture.layer, &inside(&test, &[3])), 0);
    fixture.source.wait_for_frame_requests(1).await;
    check_read(&fixture.layer, &test, inside(&test, &[7])[0].clone()).await;
    assert_eq!(fixture.source.frame_requests(), [first]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hot_pack_brings_is_not_fetched_as_well() {
    let (files, hot) = ([TestFile::of_len(10 * FRAME_LEN - 512)], [600_u64 << 10..640 << 10, 80 << 10..120 << 10]);
    let test = LayerMaker {
        files: &files,
        frame_lens: &[FRAME_LEN],
        hot: &hot,
        hot_frame_len: 40 << 10,
        ..LayerMaker::default()
    }
    .make();
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    source.hold_at(test.hot_range(1..2).start);
    let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    assert!(layer.is_hot_pack_coming());
    assert!(layer.is_fresh());
    let wanted =
        Foresight::new(u64::MAX).want(&layer, &[82 << 10..90 << 10, 600 << 10..640 << 10, 910 << 10..920 << 10]);
    let frame = test.request_for(9..10);
    assert_eq!(wanted, frame.end - frame.start);
    assert_eq!(source.wait_for_frame_requests(1).await, [frame]);
    source.release(test.hot_range(1..2).start);
    check_read(&layer, &test, hot[1].clone()).await;
    assert!(!layer.is_fresh());
    while layer.is_hot_pack_coming() {
        tokio::task::yield_now().await;
    }
    assert_eq!(source.frame_requests().len(), 1);
}
