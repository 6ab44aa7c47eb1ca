//! What a read returns, and what it costs.

use std::sync::Arc;

use proptest::prelude::*;
use storage::{Priority, ReadError};

use crate::support::{Fixture, TestFile, TestLayer, check_read};

fn files() -> impl Strategy<Value = Vec<TestFile>> {
    let piece = (prop_oneof![3 => Just(0), 1 => 1usize..20_000], prop_oneof![1 => Just(0), 4 => 0usize..9000]);
    let file = prop_oneof![
        4 => (0usize..6000).prop_map(TestFile::of_len),
        1 => (6000usize..60_000).prop_map(TestFile::of_len),
        1 => proptest::collection::vec(piece, 0..5).prop_map(TestFile),
    ];
    proptest::collection::vec(file, 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// Files of all sizes, holes, frames that cut files and files that share frames: reads in any order return
    /// the content, and no byte is fetched twice.
    #[test]
    fn every_byte_reads_right_and_is_fetched_once(
        files in files(),
        frame_lens in proptest::collection::vec(300usize..20_000, 1..6),
        reads in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..70_000), 0..12),
    ) {
        let test = TestLayer::new(&files, &frame_lens);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let fixture = Fixture::new(&test).await;
            let space_len = test.space.len() as u64;
            for (start, len) in reads {
                let start = start.index(test.space.len() + 1) as u64;
                check_read(&fixture.layer, &test, start..(start + len as u64).min(space_len)).await;
            }
            for file in &test.files {
                check_read(&fixture.layer, &test, file.clone()).await;
            }
            check_read(&fixture.layer, &test, 0..space_len).await;
            assert!(fixture.layer.is_complete());

            let mut requests = fixture.source.requests();
            requests.sort_by_key(|range| range.start);
            assert!(requests.windows(2).all(|pair| pair[0].end <= pair[1].start), "{requests:?}");

            let mut buffer = vec![1; test.space.len() + 10];
            let len = fixture.layer.read_at_if_present(0, &mut buffer).unwrap();
            assert_eq!(len, Some(test.space.len()));
            assert!(buffer[..test.space.len()] == test.space);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_end_where_the_space_ends() {
    let test = TestLayer::of_frames(1, 5000);
    let fixture = Fixture::new(&test).await;
    let end = test.space.len() as u64;
    assert_eq!(fixture.layer.read_async(end - 10, 100).await.unwrap(), [0; 10]);
    assert_eq!(fixture.layer.read_async(end, 100).await.unwrap(), [0; 0]);
    assert_eq!(fixture.layer.read_async(u64::MAX, usize::MAX).await.unwrap(), [0; 0]);
    assert_eq!(fixture.layer.read_at_if_present(u64::MAX, &mut [0; 10]).unwrap(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_and_gaps_need_no_frame() {
    let test = TestLayer::new(&[TestFile(vec![(100_000, 10), (50_000, 0)]), TestFile::of_len(1)], &[512]);
    let fixture = Fixture::new(&test).await;
    for plain in [0..100_000, 100_010..150_010, 150_010..151_552] {
        check_read(&fixture.layer, &test, plain).await;
    }
    assert_eq!(fixture.source.frame_requests(), []);
    assert_eq!(fixture.layer.read_at_if_present(99_999, &mut [0; 2]).unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_without_file_content_are_never_fetched() {
    let test = TestLayer::new(&[TestFile::of_len(0), TestFile::of_len(512), TestFile::of_len(0)], &[512]);
    assert_eq!(test.frames.len(), 4);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert_eq!(fixture.source.frame_requests(), [test.request_for(2..3)]);
    assert!(fixture.layer.is_complete());
    assert_eq!(fixture.layer.progress().frames_total, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_readers_make_one_request() {
    let test = Arc::new(TestLayer::of_frames(1, 100_000));
    let fixture = Fixture::new(&test).await;
    fixture.source.hold_at(0);
    let readers: Vec<_> = (0..50)
        .map(|number| {
            let (layer, test) = (fixture.layer.clone(), test.clone());
            tokio::spawn(async move { check_read(&layer, &test, number * 1000..number * 1000 + 5000).await })
        })
        .collect();
    fixture.source.wait_for_frame_requests(1).await;
    fixture.source.release(0);
    for reader in readers {
        reader.await.unwrap();
    }
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..1)]);
    assert_eq!(
        fixture.layer.progress().fetched_bytes,
        test.lazy.index.compressed_len + u64::from(test.frames[0].compressed_len.get())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbouring_frames_share_a_request() {
    let test = TestLayer::of_frames(6, 10_000);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(2)).await;
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    assert_eq!(fixture.source.sorted_frame_requests(), [0..2, 2..3, 3..6].map(|frames| test.request_for(frames)));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_at_most_four_mebibytes_long() {
    let test = TestLayer::of_frames(10, 1 << 20);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    // Noise grows a little when compressed, so three frames fit.
    assert_eq!(
        fixture.source.sorted_frame_requests(),
        [0..3, 3..6, 6..9, 9..10].map(|frames| test.request_for(frames))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_is_readable_while_its_request_goes_on() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    let third = test.frames[2].blob_offset.get();
    fixture.source.hold_at(third);
    let (sender, receiver) = tokio::sync::oneshot::channel();
    fixture.layer.fetch(0..test.files[0].end, Priority::Read, move |result| sender.send(result.is_ok()).unwrap());
    check_read(&fixture.layer, &test, 0..test.plain_of_frame(1).end).await;
    assert_eq!(fixture.layer.progress().frames_present, 2);
    fixture.source.release(third);
    assert!(receiver.await.unwrap());
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..3)]);
}

#[test]
fn threads_outside_the_runtime_read_too() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = runtime.block_on(Fixture::new(&test));
    let file = test.files[0].clone();
    assert!(fixture.layer.read(0, file.end as usize).unwrap() == test.expected(file));
}

#[test]
fn readers_hear_of_it_when_the_runtime_ends() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = runtime.block_on(Fixture::new(&test));
    fixture.source.hold_at(0);
    let (sender, receiver) = std::sync::mpsc::channel();
    fixture.layer.read_then(0, 1, move |result| sender.send(result).unwrap());
    runtime.block_on(fixture.source.wait_for_frame_requests(1));
    drop(runtime);
    assert!(matches!(receiver.recv().unwrap(), Err(ReadError::Stopped(blob)) if blob == test.lazy.blob));
    assert!(matches!(fixture.layer.read(0, 1), Err(ReadError::Stopped(_))));
}

/// A node that writes a record down as soon as a container has read and ended lost the read: it was noted behind the
/// answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_is_answered_is_in_the_recording_already() {
    const FRAMES: usize = 300;
    let test = TestLayer::of_frames(FRAMES, 4096);
    let fixture = Fixture::new(&test).await;
    fixture.layer.begin_recording(FRAMES);
    for frame in (0..FRAMES).step_by(2) {
        let plain = test.plain_of_frame(frame);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let layer = fixture.layer.clone();
        let offset = plain.start;
        fixture.layer.read_then(offset, 1, move |read| {
            let is_noted = layer.touches().iter().any(|touch| touch.plain.contains(&offset));
            sender.send(read.is_ok() && is_noted).unwrap();
        });
        assert!(receiver.await.unwrap(), "frame {frame}");
    }
}
