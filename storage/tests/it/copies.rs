//! What another layer of the cache has is copied, not fetched; and nothing that is said about it is believed.

use std::{fs, ops::Range, os::unix::fs::FileExt, path::Path, slice::from_ref, sync::Arc};

use format_spec::{Digest, LazyLayer, dedup::DedupPiece};
use proptest::prelude::*;
use serde_json::json;
use storage::{Cache, Layer, Priority};

use crate::support::{
    Fault, Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, open_cache, wait_for_dedup,
};

const FRAME_LEN: usize = 10_000;

/// A large file that ends somewhere in a frame, between small ones.
fn files() -> Vec<TestFile> {
    [3000, 100, 95_000, 12_000, 4096, 9000].map(TestFile::of_len).to_vec()
}

/// A version of an image: at another `time` all frames differ, but only the content of `changed_files`.
fn version(files: &[TestFile], time: u64, changed_files: &[usize]) -> TestLayer {
    let dedup = |_: &mut Vec<DedupPiece>| {};
    LayerMaker { files, frame_lens: &[FRAME_LEN], time, changed_files, dedup: Some(&dedup), ..LayerMaker::default() }
        .make()
}

/// Opens a layer and has all of it arrive.
async fn fill(cache: &Cache, test: &TestLayer) -> Layer {
    let layer = cache.layer(&test.lazy, MemorySource::new(test), json!(null)).await.unwrap();
    check_read(&layer, test, 0..test.space.len() as u64).await;
    layer
}

/// A cache with a layer that is complete and has told what it holds.
async fn with_first(test: &TestLayer) -> (Cache, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let cache = open_cache(directory.path());
    let layer = fill(&cache, test).await;
    wait_for_dedup(directory.path(), test).await;
    layer.flush().unwrap();
    (cache, directory)
}

/// Reads all of a second layer; returns what it asks its source for behind the index.
async fn requests_of(cache: &Cache, test: &TestLayer) -> Vec<Range<u64>> {
    let source = MemorySource::new(test);
    let layer = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, test, 0..test.space.len() as u64).await;
    assert!(layer.is_complete());
    source.frame_requests()
}

/// The same bytes in as few ranges as possible: what a copy in the background gives up first is asked for first.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

fn data_path(root: &Path, test: &TestLayer) -> std::path::PathBuf {
    root.join("layers").join(test.lazy.id().hex()).join("data")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_content_in_other_frames_is_not_fetched() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    assert_ne!(first.frames, second.frames);
    let (cache, directory) = with_first(&first).await;
    assert_eq!(requests_of(&cache, &second).await, from_ref(&second.section));
    wait_for_dedup(directory.path(), &second).await;
    let layer = cache.open_layers().into_iter().find(|layer| *layer.lazy_layer() == second.lazy).unwrap();
    let content_len: u64 = second.files.iter().map(|file| file.end - file.start).sum();
    assert_eq!(layer.progress().copied_bytes, content_len);
    assert_eq!(layer.progress().frames_present, layer.progress().frames_total);
    assert!(fs::read(data_path(directory.path(), &second)).unwrap() == second.space);
}

#[tokio::test(flavor = "multi_thread")]
async fn copying_needs_no_reader() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    wait_for_dedup(directory.path(), &second).await;
    assert!(layer.is_complete());
    assert_eq!(source.frame_requests(), from_ref(&second.section));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_frames_of_what_changed_are_fetched() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[3]));
    let (cache, _directory) = with_first(&first).await;
    let fetched = requests_of(&cache, &second).await;
    let frames: Vec<usize> = (0..second.frames.len())
        .filter(|frame| {
            let request = second.request_for(*frame..frame + 1);
            fetched.iter().any(|range| range.start <= request.start && request.end <= range.end)
        })
        .collect();
    // The first three files with their headers end at byte 100,352 of the tar stream; a header and 12,000 bytes follow.
    assert_eq!(frames, [10, 11]);
}

/// The pieces of a large file end in the middle of pages: a changed one must not cost its neighbours.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_piece_of_a_large_file_costs_its_own_frame_only() {
    let files = [TestFile::of_len(10 * FRAME_LEN - 512)];
    let first = version(&files, 0, &[]);
    let hide = |pieces: &mut Vec<DedupPiece>| pieces[4].digest = [7; 32];
    let maker = LayerMaker { files: &files, frame_lens: &[FRAME_LEN], time: 1, ..LayerMaker::default() };
    let second = LayerMaker { dedup: Some(&hide), ..maker }.make();
    let (cache, directory) = with_first(&first).await;
    assert_eq!(requests_of(&cache, &second).await, [second.section.clone(), second.request_for(4..5)]);

    wait_for_dedup(directory.path(), &second).await;
    cache.flush().unwrap();
    drop(cache);
    let source = MemorySource::new(&second);
    let layer = open_cache(directory.path()).layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    assert_eq!(source.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_not_open_are_copied_from_too() {
    let files = [vec![TestFile(vec![(1 << 20, 5000), (50_000, 9000)])], files()].concat();
    let (first, second) = (version(&files, 0, &[]), version(&files, 1, &[]));
    let (cache, directory) = with_first(&first).await;
    drop(cache);
    let cache = open_cache(directory.path());
    assert_eq!(requests_of(&cache, &second).await, from_ref(&second.section));
    assert_eq!(cache.open_layers().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_has_not_itself_is_fetched() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let directory = tempfile::tempdir().unwrap();
    let cache = open_cache(directory.path());
    let layer = cache.layer(&first.lazy, MemorySource::new(&first), json!(null)).await.unwrap();
    check_read(&layer, &first, first.files[5].clone()).await;
    wait_for_dedup(directory.path(), &first).await;
    let requests = requests_of(&cache, &second).await;
    assert!(requests.len() > 1, "{requests:?}");
    let last = second.frames.len();
    assert!(requests[1..].iter().all(|range| range.end < second.request_for(last - 1..last).end), "{requests:?}");
}

/// A layer can say of its content what it likes: nobody else reads it for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lies_about_its_content_is_not_believed() {
    let files = files();
    let second = version(&files, 1, &[0, 1, 2, 3, 4, 5]);
    let wanted = std::sync::Mutex::new(Vec::new());
    let note = |pieces: &mut Vec<DedupPiece>| wanted.lock().unwrap().clone_from(pieces);
    let maker = LayerMaker { files: &files, frame_lens: &[FRAME_LEN], ..LayerMaker::default() };
    LayerMaker { time: 1, changed_files: &[0, 1, 2, 3, 4, 5], dedup: Some(&note), ..maker }.make();
    let lie = |pieces: &mut Vec<DedupPiece>| {
        for (piece, wanted) in pieces.iter_mut().zip(wanted.lock().unwrap().iter()) {
            piece.digest = wanted.digest;
        }
    };
    let maker = LayerMaker { files: &files, frame_lens: &[FRAME_LEN], ..LayerMaker::default() };
    let first = LayerMaker { dedup: Some(&lie), ..maker }.make();
    let (cache, _directory) = with_first(&first).await;
    let requests = requests_of(&cache, &second).await;
    assert_eq!(joined(requests[1..].to_vec()), [second.request_for(0..second.frames.len())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_changed_on_disk_is_not_copied() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let (cache, directory) = with_first(&first).await;
    let data = fs::File::options().write(true).open(data_path(directory.path(), &first)).unwrap();
    data.write_all_at(b"x", first.files[0].start + 7).unwrap();
    assert_eq!(requests_of(&cache, &second).await, [second.section.clone(), second.request_for(0..1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_of_digests_is_no_help_and_no_harm() {
    for damage in [&b""[..], b"LAZULIDD", b"LAZULIDDandsomethingelse", &[0; 8 + 48 * 3]] {
        let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
        let (cache, directory) = with_first(&first).await;
        fs::write(data_path(directory.path(), &first).with_file_name("dedup"), damage).unwrap();
        let requests = requests_of(&cache, &second).await;
        assert_eq!(joined(requests[1..].to_vec()), [second.request_for(0..second.frames.len())]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_or_missing_section_is_ignored() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let at = second.section.start + 5;
    for fault in [Fault::FlipAt(at), Fault::EndAt(at), Fault::BreakAt(at), Fault::Refuse] {
        let (cache, _directory) = with_first(&first).await;
        let source = MemorySource::new(&second);
        source.fail_at(&second.section, fault);
        let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
        check_read(&layer, &second, 0..second.space.len() as u64).await;
        let expected = [second.section.clone(), second.request_for(0..second.frames.len())];
        assert_eq!(source.frame_requests(), expected, "{fault:?}");
        assert_eq!(layer.progress().copied_bytes, 0);
    }
}

/// A section that says of a gap between files, or of a hole, that it has content, gets none there.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_copied_between_files() {
    let files = [100, 4096].map(TestFile::of_len);
    let first = version(&[TestFile::of_len(8192)], 0, &[]);
    let content = Digest::of(&first.space[..8192]);
    let lie = |pieces: &mut Vec<DedupPiece>| {
        *pieces = vec![DedupPiece { plain_offset: 0.into(), len: 8192.into(), digest: *content.as_bytes() }];
    };
    let second = LayerMaker { files: &files, time: 1, dedup: Some(&lie), ..LayerMaker::default() }.make();
    let (cache, _directory) = with_first(&first).await;
    assert_eq!(requests_of(&cache, &second).await, [second.section.clone(), second.request_for(0..1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_may_be_removed_meanwhile() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let (cache, _directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    source.hold_at(second.section.start);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    cache.remove(first.lazy.id()).await.unwrap();
    source.release(second.section.start);
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    let expected = [second.section.clone(), second.request_for(0..second.frames.len())];
    assert_eq!(source.frame_requests(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_for_the_section_and_fetch_nothing_twice() {
    let (first, second) = (version(&files(), 0, &[]), Arc::new(version(&files(), 1, &[3])));
    let (cache, _directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    source.hold_at(second.section.start);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    let readers: Vec<_> = (0..50)
        .map(|number| {
            let (layer, second) = (layer.clone(), second.clone());
            let file = second.files[number % second.files.len()].clone();
            tokio::spawn(async move { check_read(&layer, &second, file).await })
        })
        .collect();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    layer.fetch(0..u64::MAX, Priority::Background, move |result| sender.send(result.is_ok()).unwrap());
    source.release(second.section.start);
    for reader in readers {
        reader.await.unwrap();
    }
    assert!(receiver.await.unwrap());
    assert!(layer.is_complete());
    let mut requests = source.requests();
    requests.sort_by_key(|range| range.start);
    assert!(requests.windows(2).all(|pair| pair[0].end <= pair[1].start), "{requests:?}");
    let fetched: u64 = source.frame_requests()[1..].iter().map(|range| range.end - range.start).sum();
    assert!(fetched < 35_000, "{fetched} bytes for a file of 12,000 in frames of {FRAME_LEN}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_the_copies_loses_nothing_but_time() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    source.hold_at(second.section.start);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    source.wait_for_frame_requests(1).await;
    let fixture = Fixture { layer, cache, source, directory };
    let crashed = fixture.crash();

    let source = MemorySource::new(&second);
    let cache = open_cache(crashed.path());
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    assert_eq!(source.requests(), from_ref(&second.section));
}

/// What the file `dedup` speaks of is durable: a crash right after it was written loses no copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_the_copies_loses_none() {
    let (first, second) = (version(&files(), 0, &[]), version(&files(), 1, &[]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    wait_for_dedup(directory.path(), &second).await;
    let fixture = Fixture { layer, cache, source, directory };
    let crashed = fixture.crash();

    let source = MemorySource::new(&second);
    let layer = open_cache(crashed.path()).layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    assert!(layer.is_complete());
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    assert_eq!(source.requests(), []);
}

/// Four files whose larger part is hot, each in a hot frame of its own, longer than a gap that is worth receiving.
fn hot_version(time: u64, changed_files: &[usize]) -> (TestLayer, Vec<Range<u64>>) {
    let files = [200_000, 200_000, 200_000, 200_000].map(TestFile::of_len);
    let hot: Vec<Range<u64>> = (0..4).map(|file| file * 200_704..file * 200_704 + 163_840).collect();
    let maker = LayerMaker { files: &files, time, changed_files, hot: &hot, ..LayerMaker::default() };
    (LayerMaker { hot_frame_len: 163_840, dedup: Some(&|_| {}), ..maker }.make(), hot)
}

#[tokio::test(flavor = "multi_thread")]
async fn index_pack_and_section_of_the_first_layer_come_in_one_answer() {
    let ((test, hot), directory) = (hot_version(0, &[]), tempfile::tempdir().unwrap());
    let source = MemorySource::new(&test);
    let layer = open_cache(directory.path()).layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    wait_for_dedup(directory.path(), &test).await;
    check_read(&layer, &test, hot[3].clone()).await;
    assert_eq!(source.requests(), from_ref(&test.lazy.behind_frames()));
}

/// An image that has nothing in common with the cache is not asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_pack_that_nobody_has_goes_on_in_the_answer_that_brings_the_index() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[0, 1, 2, 3]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &second, hot[3].clone()).await;
    wait_for_dedup(directory.path(), &second).await;
    let mut requests = source.requests();
    requests.sort_by_key(|range| range.start);
    assert_eq!(requests, [second.opening_request(), second.section.clone()]);
}

/// A section that is late keeps a slot and a connection no longer, and is not asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_is_given_up_for_a_section_that_is_late() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[0, 1, 2, 3]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    source.hold_at(second.section.start);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    // The answer with the index ends before anything else is asked for.
    source.wait_for_ended(1).await;
    assert_eq!(source.requests(), [second.opening_request(), second.section.clone()]);
    source.release(second.section.start);
    check_read(&layer, &second, hot[3].clone()).await;
    wait_for_dedup(directory.path(), &second).await;
    let all = second.hot_range(0..4);
    assert_eq!(source.requests(), [second.opening_request(), second.section.clone(), all]);
}

/// Such a source has one connection: a section beside the index waited behind the whole blob, and failed the place.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_sends_whole_blobs_is_asked_once() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[0, 1, 2, 3]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::sending_whole(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &second, hot[3].clone()).await;
    wait_for_dedup(directory.path(), &second).await;
    assert_eq!(source.requests(), from_ref(&(0..second.lazy.blob_len)));
}

/// Where the annotations say that the section is longer than readers wait for, the pack comes behind it.
#[tokio::test(flavor = "multi_thread")]
async fn before_a_section_too_long_to_be_waited_for_no_pack_is_asked_for() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let lazy = LazyLayer { blob_len: second.lazy.blob_len + (3 << 20), ..second.lazy };
    let layer = cache.layer(&lazy, source.clone(), json!(null)).await.unwrap();
    wait_for_dedup(directory.path(), &second).await;
    check_read(&layer, &second, hot[3].clone()).await;
    assert_eq!(source.requests(), [second.index_request(), second.section.clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_hot_pack_only_what_nobody_has_is_asked_for() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[0, 2]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    for plain in &hot {
        check_read(&layer, &second, plain.clone()).await;
    }
    wait_for_dedup(directory.path(), &second).await;
    // The answer that brings the index is given up behind it.
    let expected = [second.opening_request(), second.hot_range(0..1), second.hot_range(2..3), second.section.clone()];
    let mut requests = source.requests();
    requests.sort_by_key(|range| range.start);
    assert_eq!(requests, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_of_a_hot_pack_that_others_mostly_have_comes_as_frames() {
    let ((first, _), (second, hot)) = (hot_version(0, &[]), hot_version(1, &[2]));
    let (cache, directory) = with_first(&first).await;
    let source = MemorySource::new(&second);
    let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
    // No reader is needed.
    while layer.read_at_if_present(hot[2].start, &mut vec![0; 163_840]).unwrap().is_none() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    wait_for_dedup(directory.path(), &second).await;
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    let mut requests = source.requests();
    requests.sort_by_key(|range| range.start);
    assert!(requests.windows(2).all(|pair| pair[0].end <= pair[1].start), "{requests:?}");
    assert_eq!(requests.pop().as_ref(), Some(&second.section));
    assert_eq!(requests.pop(), Some(second.opening_request()));
    let fetched: u64 = requests.iter().map(|range| range.end - range.start).sum();
    assert!(fetched < 230_000, "{fetched} bytes for a file of 200,000");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

    /// Two versions of any files, cut anywhere, read in any order: every byte of the second reads right.
    #[test]
    fn every_byte_of_a_second_version_reads_right(
        file_lens in proptest::collection::vec(prop_oneof![0usize..6000, 6000usize..60_000], 1..12),
        hole_len in prop_oneof![Just(0), 1usize..9000],
        changed in proptest::collection::vec(0usize..12, 0..4),
        frame_lens in proptest::collection::vec(300usize..20_000, 1..4),
        reads in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..70_000), 0..8),
    ) {
        let mut files: Vec<_> = file_lens.into_iter().map(TestFile::of_len).collect();
        files.push(TestFile(vec![(hole_len, 5000), (hole_len, 700)]));
        let keep = |_: &mut Vec<DedupPiece>| {};
        let maker = |time, changed_files| {
            LayerMaker { files: &files, frame_lens: &frame_lens, time, changed_files, dedup: Some(&keep), ..LayerMaker::default() }
        };
        let (first, second) = (maker(0, &[]).make(), maker(1, &changed).make());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let (cache, directory) = with_first(&first).await;
            let source = MemorySource::new(&second);
            let layer = cache.layer(&second.lazy, source.clone(), json!(null)).await.unwrap();
            let space_len = second.space.len() as u64;
            for (start, len) in reads {
                let start = start.index(second.space.len() + 1) as u64;
                check_read(&layer, &second, start..(start + len as u64).min(space_len)).await;
            }
            check_read(&layer, &second, 0..space_len).await;
            assert!(layer.is_complete());
            wait_for_dedup(directory.path(), &second).await;
            assert!(fs::read(data_path(directory.path(), &second)).unwrap() == second.space);
            let mut requests = source.requests();
            requests.sort_by_key(|range| range.start);
            assert!(requests.windows(2).all(|pair| pair[0].end <= pair[1].start), "{requests:?}");
        });
    }
}
