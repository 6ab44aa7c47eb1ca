//! Hot packs: one request with the index, readers that wait for it, and everything that may be wrong with one.

use std::{ops::Range, sync::Arc};

use format_spec::{LazyLayer, records::hot_reason};
use proptest::prelude::*;
use serde_json::json;
use storage::{Cache, Layer};

use crate::support::{Fault, Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, open_cache, options};

const FRAME_LEN: usize = 100 << 10;

/// One file of ten frames; a hot pack of four pieces of 40 KiB from all over it, each in a frame of its own.
fn maker<'a>(files: &'a [TestFile], hot: &'a [Range<u64>]) -> LayerMaker<'a> {
    LayerMaker { files, frame_lens: &[FRAME_LEN], hot, hot_frame_len: 40 << 10, ..LayerMaker::default() }
}

fn files() -> [TestFile; 1] {
    [TestFile::of_len(10 * FRAME_LEN - 512)]
}

fn hot() -> [Range<u64>; 4] {
    [600u64, 80, 300, 920].map(|start| start << 10..(start + 40) << 10)
}

async fn check_hot_reads(layer: &Layer, test: &TestLayer) {
    for plain in hot() {
        check_read(layer, test, plain).await;
    }
}

/// Until nothing is received any longer.
async fn wait_for_end(fixture: &Fixture) {
    fixture.source.wait_for_ended(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_brings_index_and_hot_pack() {
    let test = maker(&files(), &hot()).make();
    let fixture = Fixture::new(&test).await;
    check_hot_reads(&fixture.layer, &test).await;
    assert_eq!(fixture.source.requests(), [test.opening_request()]);
    assert_eq!(fixture.layer.progress().hot_bytes, test.lazy.hot_len);
    assert_eq!(fixture.layer.progress().fetched_bytes, test.lazy.index.compressed_len + 8 + test.lazy.hot_len);
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert!(fixture.layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_open_before_its_hot_pack_has_arrived_and_readers_wait_for_that() {
    let test = Arc::new(maker(&files(), &hot()).make());
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    source.hold_at(test.hot_range(1..2).start);
    let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &test, hot()[0].clone()).await;
    let readers: Vec<_> = (0..50)
        .map(|number| {
            let (layer, test, hot) = (layer.clone(), test.clone(), hot()[1 + number % 3].clone());
            let plain = hot.start + number as u64 * 500..hot.end;
            tokio::spawn(async move { check_read(&layer, &test, plain).await })
        })
        .collect();
    source.release(test.hot_range(1..2).start);
    for reader in readers {
        reader.await.unwrap();
    }
    assert_eq!(source.requests(), [test.opening_request()]);
}

/// Of a derived pack a start may read any part first. A recorded one is read as it stands, and a request beside it moved
/// half as much again.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_what_is_far_away_in_a_recorded_pack_only() {
    let files = [TestFile::of_len(4 << 20)];
    let hot = [0..1 << 20, 2 << 20..(2 << 20) + 4096];
    for (hot_reason, requests) in [(hot_reason::RUNTIME, 1), (hot_reason::PROFILE, 0)] {
        let test = LayerMaker { hot_frame_len: 1 << 18, hot_reason, ..maker(&files, &hot) }.make();
        let directory = tempfile::tempdir().unwrap();
        let source = MemorySource::new(&test);
        let held = test.hot_range(0..1).start;
        source.hold_at(held);
        let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        layer.read_then(hot[1].start, 4096, move |bytes| sender.send(bytes.unwrap()).unwrap());
        if requests > 0 {
            source.wait_for_frame_requests(requests).await;
        }
        source.release(held);
        assert!(receiver.await.unwrap() == test.expected(hot[1].clone()));
        check_read(&layer, &test, hot[0].clone()).await;
        assert_eq!(source.frame_requests().len(), requests);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hot_pack_lacks_is_fetched_while_it_arrives() {
    let test = maker(&files(), &hot()).make();
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    let held = test.hot_range(0..1).start;
    source.hold_at(held);
    let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &test, 0..5000).await;
    assert_eq!(source.frame_requests(), [test.request_for(0..1)]);
    // Half of it comes with the pack.
    let (sender, receiver) = tokio::sync::oneshot::channel();
    layer.read_then(630 << 10, 20 << 10, move |bytes| sender.send(bytes.unwrap()).unwrap());
    source.wait_for_frame_requests(2).await;
    source.release(held);
    assert!(receiver.await.unwrap() == test.expected(630 << 10..650 << 10));
    assert_eq!(source.frame_requests()[1..], [test.request_for(6..7)]);
}

/// Reads everything of a layer whose second hot frame is refused; returns what was asked for besides index and pack.
async fn requests_after_bad_hot_pack(test: &TestLayer, fault: Option<Fault>) -> Vec<Range<u64>> {
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(test);
    source.fail_next(fault);
    let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_hot_reads(&layer, test).await;
    let first = u64::from(test.hot_frames[0].compressed_len.get());
    assert_eq!(layer.progress().hot_bytes, first, "the first frame was right, the others are not used");
    source.frame_requests()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_pack_with_a_wrong_byte_or_a_missing_end_is_given_up() {
    let test = maker(&files(), &hot()).make();
    let second = test.hot_range(1..2);
    for fault in [Fault::FlipAt(second.start + 9), Fault::EndAt(second.start + 9), Fault::BreakAt(second.end - 1)] {
        let requests = requests_after_bad_hot_pack(&test, Some(fault)).await;
        assert_eq!(requests, [0..2, 3..4, 9..10].map(|frames| test.request_for(frames)), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_frame_of_another_length_than_promised_is_refused() {
    type Change = fn(&[u8]) -> Vec<u8>;
    let changes: [Change; 3] =
        [|content| content[1..].to_vec(), |content| [content, b"x"].concat(), |_| vec![0; 256 << 20]];
    for change in changes {
        let change_hot = |number: usize, content: &[u8]| if number == 1 { change(content) } else { content.to_vec() };
        let test = LayerMaker { change_hot: &change_hot, ..maker(&files(), &hot()) }.make();
        assert_eq!(requests_after_bad_hot_pack(&test, None).await.len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_pack_of_another_length_than_its_index_says_is_ignored() {
    let test = maker(&files(), &hot()).make();
    for hot_len in [1, test.lazy.hot_len - 1, test.lazy.hot_len + 1] {
        let lie = LazyLayer { hot_len, ..test.lazy };
        let directory = tempfile::tempdir().unwrap();
        let source = MemorySource::new(&test);
        let layer = open_cache(directory.path()).layer(&lie, source.clone(), json!(null)).await.unwrap();
        check_hot_reads(&layer, &test).await;
        assert_eq!(layer.progress().hot_bytes, 0);
        assert_eq!(source.frame_requests().len(), 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_asks_only_for_what_is_missing_of_the_hot_pack() {
    // Frames longer than a gap that is worth leaving out of a request.
    let hot = [0u64, 200, 400, 600].map(|start| start << 10..(start + 200) << 10);
    let test = LayerMaker { hot_frame_len: 200 << 10, ..maker(&files(), &hot) }.make();
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    let held = test.hot_range(2..3).start;
    source.hold_at(held);
    let cache = open_cache(directory.path());
    let layer = cache.layer(&test.lazy, source, json!(null)).await.unwrap();
    check_read(&layer, &test, hot[1].clone()).await;
    cache.flush().unwrap();
    let fixture = Fixture { layer, cache, source: MemorySource::new(&test), directory };
    let crashed = fixture.crash();

    let source = MemorySource::new(&test);
    let again = open_cache(crashed.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&again, &test, 0..800 << 10).await;
    assert_eq!(source.requests(), [test.hot_range(2..4)]);
    again.flush().unwrap();
    drop(again);

    let source = MemorySource::new(&test);
    let last = open_cache(crashed.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&last, &test, 0..800 << 10).await;
    assert_eq!(source.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_pack_that_the_disk_does_not_take_fails_no_read() {
    let test = maker(&files(), &hot()).make();
    let directory = tempfile::tempdir().unwrap();
    let mount = crate::faults::Mount::new("tmpfs", "size=120k", directory.path());
    let cache = open_cache(directory.path());
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!(null)).await.unwrap();
    check_hot_reads(&layer, &test).await;
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert!(!layer.is_complete());
    drop((layer, cache, mount));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_layer_receives_no_hot_pack() {
    let test = maker(&files(), &hot()).make();
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    let held = test.hot_range(1..2).start;
    source.hold_at(held);
    let cache = open_cache(directory.path());
    let layer = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    layer.read_then(hot()[2].start, 10, move |bytes| sender.send(bytes).unwrap());
    cache.remove(test.lazy.id()).await.unwrap();
    source.release(held);
    assert!(receiver.await.unwrap().is_err());
    assert_eq!(source.frame_requests(), []);
    assert_eq!(cache.usage(test.lazy.id()).unwrap(), 0);
}

#[test]
fn readers_of_a_hot_pack_hear_of_it_when_the_runtime_ends() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let test = maker(&files(), &hot()).make();
    let directory = tempfile::tempdir().unwrap();
    let source = MemorySource::new(&test);
    source.hold_at(test.hot_range(0..1).start);
    let cache = Cache::open(directory.path(), runtime.handle().clone(), options()).unwrap();
    let layer = runtime.block_on(cache.layer(&test.lazy, source, json!(null))).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    layer.read_then(hot()[0].start, 1, move |result| sender.send(result.is_err()).unwrap());
    drop(runtime);
    assert!(receiver.recv().unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

    /// Pieces of any files in any order, cut into frames anywhere, also in the middle of a page: every byte reads right.
    #[test]
    fn every_byte_reads_right_whatever_is_hot(
        file_lens in proptest::collection::vec(prop_oneof![1usize..6000, 6000usize..60_000], 1..12),
        picks in proptest::collection::vec((any::<proptest::sample::Index>(), 0u64..8, 1u64..6), 1..12),
        hot_frame_len in 1000usize..40_000,
        reads in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..70_000), 0..8),
    ) {
        let files: Vec<_> = file_lens.into_iter().map(TestFile::of_len).collect();
        let plain = TestLayer::new(&files, &[7000]);
        let hot: Vec<Range<u64>> = picks
            .into_iter()
            .filter_map(|(file, page, count)| {
                let file = file.get(&plain.files);
                let start = file.start + page * 4096;
                (start < file.end).then(|| start..(start + count * 4096).min(file.end))
            })
            .collect();
        let test = LayerMaker { files: &files, frame_lens: &[7000], hot: &hot, hot_frame_len, ..LayerMaker::default() };
        let test = test.make();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let fixture = Fixture::new(&test).await;
            let space_len = test.space.len() as u64;
            for (start, len) in reads {
                let start = start.index(test.space.len() + 1) as u64;
                check_read(&fixture.layer, &test, start..(start + len as u64).min(space_len)).await;
            }
            wait_for_end(&fixture).await;
            for plain in &hot {
                check_read(&fixture.layer, &test, plain.clone()).await;
            }
            check_read(&fixture.layer, &test, 0..space_len).await;
            assert!(fixture.layer.is_complete());
        });
    }
}
