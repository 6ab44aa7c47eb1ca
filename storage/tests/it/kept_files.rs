//! Files that somebody may have mounted: what they hold never changes.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    sync::Arc,
    time::Duration,
};

use rustix::io::Errno;
use serde_json::json;
use storage::{Cache, Layer};

use crate::{
    power_cut::Change,
    support::{Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, open_cache},
    watched::{Kind, WatchedDisk},
};

fn content_of(file: &File, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

async fn wait_for_complete_file(layer: &Layer) -> File {
    loop {
        match layer.complete_file() {
            Some(path) => return File::open(path).unwrap(),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

/// A complete layer of a process that died before its first flush: the kernel may have had `data` mounted.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_knows_nothing_of_a_data_file_does_not_touch_it() {
    for presence in [None, Some("damaged")] {
        let test = TestLayer::of_frames(3, 10_000);
        let disk = Arc::new(WatchedDisk::default());
        let fixture = Fixture::with_options(&test, disk.options()).await;
        disk.hold(Kind::Sync, "/data");
        check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
        let root = fixture.crash();
        disk.release();
        let directory = root.path().join("layers").join(test.lazy.id().hex());
        let _ = fs::remove_file(directory.join("presence"));
        presence.inspect(|bytes| fs::write(directory.join("presence"), bytes).unwrap());
        let mounted = File::open(directory.join("data")).unwrap();

        let cache = open_cache(root.path());
        let source = MemorySource::new(&test);
        source.hold_at(test.frames[0].blob_offset.get());
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        assert!(content_of(&mounted, test.space.len()) == test.space, "presence {presence:?}: content is gone");
        source.release(test.frames[0].blob_offset.get());
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        assert!(content_of(&mounted, test.space.len()) == test.space, "presence {presence:?}: content has changed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_file_is_given_away_when_it_is_durable_and_not_before() {
    let test = TestLayer::of_frames(3, 10_000);
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    for (held, is_data) in [("/data", true), ("/presence", false)] {
        disk.hold(Kind::Sync, held);
        if is_data {
            check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
        }
        let watched = disk.clone();
        tokio::task::spawn_blocking(move || watched.wait_until_held()).await.unwrap();
        assert!(fixture.layer.is_complete());
        assert_eq!(fixture.layer.complete_file(), None, "{held} is not durable");
        // The other one is held before this one goes on.
        disk.hold(Kind::Sync, "/presence");
        disk.release_one(held);
    }
    let file = wait_for_complete_file(&fixture.layer).await;
    assert!(content_of(&file, test.space.len()) == test.space);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_file_that_cannot_be_made_durable_is_not_given_away_and_is_fetched_again() {
    let test = TestLayer::of_frames(3, 10_000);
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    fixture.layer.flush().unwrap();
    disk.fail(Kind::Sync, "/data", Errno::IO.raw_os_error());
    check_read(&fixture.layer, &test, test.plain_of_frame(1).start..test.space.len() as u64).await;
    while fixture.layer.is_complete() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(fixture.layer.complete_file(), None);
    disk.recover();
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    let file = wait_for_complete_file(&fixture.layer).await;
    assert!(content_of(&file, test.space.len()) == test.space);
    // The first frame shares a page with what was lost, so everything came twice.
    let fetched: u64 = fixture.source.frame_requests().iter().map(|range| range.end - range.start).sum();
    let all = test.request_for(0..3);
    assert_eq!(fetched, 2 * (all.end - all.start));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_takes_nothing_back_that_was_given_away() {
    let test = TestLayer::of_frames(3, 10_000);
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    let file = wait_for_complete_file(&fixture.layer).await;
    let changes = disk.changes();
    disk.fail(Kind::Sync, "", Errno::IO.raw_os_error());
    disk.fail(Kind::Write, "", Errno::IO.raw_os_error());
    fixture.layer.flush().unwrap();
    assert!(fixture.layer.complete_file().is_some());
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert!(content_of(&file, test.space.len()) == test.space);
    assert_eq!(disk.changes(), changes);
}

/// A hot pack may lie, in the limits of its own digests. A reader of a page must not see it change under its feet.
#[tokio::test(flavor = "multi_thread")]
async fn content_that_comes_late_never_replaces_what_is_there() {
    let lie = |_: usize, content: &[u8]| content.iter().map(|byte| !byte).collect();
    let test = LayerMaker {
        files: &[TestFile::of_len(60_000)],
        hot: &[8192..20_480],
        change_hot: &lie,
        ..LayerMaker::default()
    }
    .make();
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    let hot = fixture.layer.read_async(8192, 12_288).await.unwrap();
    assert!(hot == lie(0, test.expected(8192..20_480)), "the hot pack comes first");
    // The frames show the lie: the layer is refused. Whoever has the file open reads what was read before.
    let _ = fixture.layer.read_async(0, 60_000).await;
    let data = fixture.directory.path().join("layers").join(test.lazy.id().hex()).join("data");
    assert!(fs::read(data).unwrap()[8192..20_480] == hot, "a page changed after it was read");
    assert!(writes_to_data(&disk).len() > 1);

    let mut pages: Vec<u64> = Vec::new();
    for (file, offset, len) in writes_to_data(&disk) {
        let whole = offset.div_ceil(4096)..(offset + len) / 4096;
        pages.extend(whole.map(|page| page + (file << 32)));
    }
    let count = pages.len();
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages.len(), count, "a page was written twice");
}

fn writes_to_data(disk: &WatchedDisk) -> Vec<(u64, u64, u64)> {
    let changes = disk.changes();
    let is_data = |file: u64| {
        changes.iter().any(|change| {
            matches!(change, Change::Open { path, file: opened, .. } if *opened == file && path.ends_with("data"))
        })
    };
    let write = |change: &Change| match change {
        Change::Write { file, offset, bytes } if is_data(*file) => Some((*file, *offset, bytes.len() as u64)),
        _ => None,
    };
    changes.iter().filter_map(write).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_gives_away_the_same_file_when_it_has_compared_it() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    wait_for_complete_file(&fixture.layer).await;
    let Fixture { layer, cache, directory, .. } = fixture;
    drop((layer, cache));
    let inode = || {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(directory.path().join("layers").join(test.lazy.id().hex()).join("data")).unwrap().ino()
    };
    let before = inode();
    let disk = Arc::new(WatchedDisk::default());
    let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), disk.options()).unwrap();
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert_eq!(layer.complete_file(), None);
    assert!(layer.complete_file_within(Duration::from_secs(10)).is_some());
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert_eq!((inode(), writes_to_data(&disk)), (before, vec![]));
}
