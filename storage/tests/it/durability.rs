//! What a later process finds.

use std::{fs, path::PathBuf, sync::Arc};

use serde_json::json;

use crate::{
    support::{Fixture, MemorySource, TestLayer, check_read, open_cache},
    watched::{Kind, WatchedDisk},
};

/// A layer of four frames of which the first two are durable and the third is not, as a crash leaves it.
async fn crashed() -> (TestLayer, tempfile::TempDir, PathBuf) {
    let test = TestLayer::of_frames(4, 10_000);
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(0).start..test.plain_of_frame(1).end).await;
    fixture.cache.flush().unwrap();
    // A layer is flushed as soon as it is complete.
    disk.hold(Kind::Sync, "/data");
    check_read(&fixture.layer, &test, test.plain_of_frame(2).start..test.plain_of_frame(2).start + 1).await;
    let root = fixture.crash();
    disk.release();
    let layer = root.path().join("layers").join(test.lazy.id().hex());
    (test, root, layer)
}

/// Reads everything in a new process; returns what it asks the source for: what was not flushed, and the frame before
/// it, which shares a page with it.
async fn requests_after_restart(test: &TestLayer, root: &tempfile::TempDir) -> Vec<std::ops::Range<u64>> {
    let cache = open_cache(root.path());
    let source = MemorySource::new(test);
    let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
    check_read(&layer, test, 0..test.space.len() as u64).await;
    assert!(layer.is_complete());
    source.requests()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_flushed_stays_and_the_rest_is_fetched_again() {
    let (test, root, _) = crashed().await;
    assert_eq!(requests_after_restart(&test, &root).await, [test.request_for(1..4)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_keeps_everything() {
    let test = TestLayer::of_frames(4, 10_000);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    let Fixture { layer, cache, directory, .. } = fixture;
    drop((layer, cache));
    assert_eq!(requests_after_restart(&test, &directory).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_bitmap_counts_as_empty() {
    for damage in
        [|bytes: &mut Vec<u8>| bytes[50] ^= 4, |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1), Vec::clear]
    {
        let (test, root, layer) = crashed().await;
        let mut bytes = fs::read(layer.join("presence")).unwrap();
        damage(&mut bytes);
        fs::write(layer.join("presence"), bytes).unwrap();
        assert_eq!(requests_after_restart(&test, &root).await, [test.request_for(0..4)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_is_fetched_again_and_the_frames_stay() {
    for damage in
        [|bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 4, |bytes: &mut Vec<u8>| bytes.truncate(100), Vec::clear]
    {
        let (test, root, layer) = crashed().await;
        let mut bytes = fs::read(layer.join("index")).unwrap();
        damage(&mut bytes);
        fs::write(layer.join("index"), bytes).unwrap();
        let expected = [test.index_request(), test.request_for(1..4)];
        assert_eq!(requests_after_restart(&test, &root).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_description_makes_the_layer_unknown_not_unusable() {
    let (test, root, layer) = crashed().await;
    fs::write(layer.join("layer.json"), "{").unwrap();
    assert_eq!(open_cache(root.path()).known_layers().unwrap(), []);
    assert_eq!(requests_after_restart(&test, &root).await, [test.index_request(), test.request_for(1..4)]);
    assert_eq!(open_cache(root.path()).known_layers().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_is_gone_or_of_another_length_holds_nothing() {
    for len in [None, Some(0), Some(50_000)] {
        let (test, root, layer) = crashed().await;
        fs::remove_file(layer.join("data")).unwrap();
        len.inspect(|len| fs::write(layer.join("data"), vec![1; *len]).unwrap());
        assert_eq!(requests_after_restart(&test, &root).await, [test.request_for(0..4)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_file_is_the_plain_space_and_sparse() {
    let test = TestLayer::new(
        &[crate::support::TestFile(vec![(0, 5000), (10 << 20, 5000)]), crate::support::TestFile::of_len(20_000)],
        &[3000],
    );
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    let data = fixture.directory.path().join("layers").join(test.lazy.id().hex()).join("data");
    assert!(fs::read(&data).unwrap() == test.space);
    let usage = fixture.cache.usage(test.lazy.id()).unwrap();
    assert!((30_000..200_000).contains(&usage), "{usage} bytes on disk");
}
