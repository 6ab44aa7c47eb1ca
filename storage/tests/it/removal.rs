//! Layers that are removed while something is slow: a source, or the disk.

use std::{fs, sync::Arc};

use futures_util::FutureExt;
use serde_json::json;
use storage::{Cache, CacheError};

use crate::{
    support::{Fixture, MemorySource, TestLayer, check_read, open_cache},
    watched::{Kind, WatchedDisk},
};

fn directories(root: &std::path::Path) -> usize {
    let count = |name: &str| fs::read_dir(root.join(name)).unwrap().count();
    count("layers") + count("removed")
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_ends_an_opening_whose_index_does_not_come() {
    let test = Arc::new(TestLayer::of_frames(1, 1000));
    let directory = tempfile::tempdir().unwrap();
    let cache = open_cache(directory.path());
    let source = MemorySource::new(&test);
    source.hold_at(test.lazy.index.offset);
    let mut waiting = [(); 2].map(|()| cache.layer(&test.lazy, source.clone(), json!(null)).boxed());
    for waiting in &mut waiting {
        // Both have asked before the removal begins.
        assert!(waiting.now_or_never().is_none());
    }
    source.wait_for_frame_requests(0).await;
    cache.remove(test.lazy.id()).await.unwrap();
    for waiting in waiting {
        let error = waiting.await.map(drop).unwrap_err();
        assert!(matches!(error, CacheError::Stopped(_)), "{error}");
    }
    // The request went with the opening.
    source.wait_for_ended(1).await;
    assert_eq!((cache.open_layers().len(), directories(directory.path())), (0, 0));

    source.release(test.lazy.index.offset);
    let layer = cache.layer(&test.lazy, source, json!(null)).await.unwrap();
    check_read(&layer, &test, 0..400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_removed_while_it_is_written_leaves_nothing() {
    for held in ["/layer.json", "/incoming/"] {
        let test = Arc::new(TestLayer::of_frames(1, 1000));
        let directory = tempfile::tempdir().unwrap();
        let disk = Arc::new(WatchedDisk::default());
        disk.hold(Kind::Sync, held);
        let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), disk.options()).unwrap();
        let opening = {
            let (cache, test) = (cache.clone(), test.clone());
            tokio::spawn(async move { cache.layer(&test.lazy, MemorySource::new(&test), json!(null)).await.map(drop) })
        };
        let watched = disk.clone();
        tokio::task::spawn_blocking(move || watched.wait_until_held()).await.unwrap();
        let removal = {
            let (cache, id) = (cache.clone(), test.lazy.id());
            tokio::spawn(async move { cache.remove(id).await })
        };
        assert!(matches!(opening.await.unwrap(), Err(CacheError::Stopped(_))));
        disk.release();
        removal.await.unwrap().unwrap();
        assert_eq!(directories(directory.path()), 0, "{held} was held");
        let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!(null)).await.unwrap();
        check_read(&layer, &test, 0..400).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_sync_of_one_layer_delays_nothing_else() {
    let [slow, other] = [3, 4].map(|frames| TestLayer::of_frames(frames, 10_000));
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&slow, disk.options()).await;
    check_read(&fixture.layer, &slow, slow.plain_of_frame(0)).await;
    disk.hold(Kind::Sync, "/data");
    let flushing = {
        let layer = fixture.layer.clone();
        tokio::task::spawn_blocking(move || layer.flush())
    };
    let watched = disk.clone();
    tokio::task::spawn_blocking(move || watched.wait_until_held()).await.unwrap();

    check_read(&fixture.layer, &slow, slow.plain_of_frame(1)).await;
    let again = fixture.cache.layer(&slow.lazy, fixture.source.clone(), json!("another place")).await.unwrap();
    assert_eq!(again.description(), json!("another place"));
    let layer = fixture.cache.layer(&other.lazy, MemorySource::new(&other), json!("test")).await.unwrap();
    check_read(&layer, &other, other.plain_of_frame(2)).await;
    assert_eq!(fixture.cache.known_layers().unwrap().len(), 2);
    fixture.cache.remove(slow.lazy.id()).await.unwrap();
    assert_eq!(fixture.cache.known_layers().unwrap().len(), 1);
    // Content that is flushed late does not come back under the name of a removed layer.
    let anew = fixture.cache.layer(&slow.lazy, MemorySource::new(&slow), json!("anew")).await.unwrap();
    disk.release();
    flushing.await.unwrap().unwrap();
    assert_eq!(anew.progress().frames_present, 0);
    check_read(&anew, &slow, 0..slow.space.len() as u64).await;
    drop((fixture, anew));
}
