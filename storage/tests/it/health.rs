//! Disks that lose bits, blocks and writes: what they damage is fetched again, and no reader sees it.

use std::{
    fs::{self, File, OpenOptions},
    num::NonZeroU64,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::io::Errno;
use serde_json::json;
use storage::{Cache, CacheError, CacheOptions, Layer, disk::Disk};

use crate::{
    support::{Fixture, MemorySource, TestLayer, check_read, options},
    watched::{Kind, WatchedDisk},
};

fn cache(root: &Path, options: CacheOptions) -> Cache {
    Cache::open(root, tokio::runtime::Handle::current(), options).unwrap()
}

/// The machine goes down without warning and starts again.
fn other_boot() -> CacheOptions {
    CacheOptions { boot: Some("another boot".to_owned()), ..options() }
}

/// A directory in which the frames `0..count` of a layer arrived before the machine lost its power.
async fn left_behind(test: &TestLayer, count: usize) -> tempfile::TempDir {
    let fixture = Fixture::new(test).await;
    check_read(&fixture.layer, test, 0..test.plain_of_frame(count - 1).end).await;
    fixture.layer.flush().unwrap();
    while count == test.frames.len() && fixture.layer.complete_file().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    fixture.crash()
}

fn data_of(root: &Path, test: &TestLayer) -> std::path::PathBuf {
    root.join("layers").join(test.lazy.id().hex()).join("data")
}

/// Flips a bit as a disk does: in the file as it is.
fn flip(path: &Path, position: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, position).unwrap();
    file.write_all_at(&[byte[0] ^ 4], position).unwrap();
}

async fn healed(layer: &Layer, count: u64) {
    while layer.progress().healed_pages < count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_cut_flipped_bits_and_lost_writes_are_fetched_again() {
    let test = TestLayer::of_frames(4, 20_000);
    for count in [2, 4] {
        let root = left_behind(&test, count).await;
        let data = data_of(root.path(), &test);
        flip(&data, 5000);
        // A write that was lost: zeros.
        OpenOptions::new().write(true).open(&data).unwrap().write_all_at(&[0; 4096], 24_576).unwrap();
        let (before, inode) = (fs::read(&data).unwrap(), fs::metadata(&data).unwrap().ino());
        let mounted = File::open(&data).unwrap();

        let (cache, source) = (cache(root.path(), other_boot()), MemorySource::new(&test));
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        assert_eq!(layer.progress().healed_pages, 2);
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        assert!(!source.requests().is_empty());
        // What was complete may be mounted: it stays as it is, and a new file is healed.
        let is_new = fs::metadata(&data).unwrap().ino() != inode;
        assert_eq!(is_new, count == 4);
        let mut after = vec![0; before.len()];
        mounted.read_exact_at(&mut after, 0).unwrap();
        assert_eq!(after == before, is_new);
        assert!(fs::read(&data).unwrap() == test.space);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_of_content_is_found() {
    let test = TestLayer::of_frames(2, 9000);
    let root = left_behind(&test, 2).await;
    let data = data_of(root.path(), &test);
    for position in (0..test.files[0].end).step_by(501) {
        flip(&data, position);
        let cache = cache(root.path(), CacheOptions { boot: Some(position.to_string()), ..options() });
        let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
        assert_eq!(layer.progress().healed_pages, 1, "byte {position}");
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        layer.flush().unwrap();
        // As after a power cut: no orderly end.
        drop((layer, cache));
        fs::remove_file(root.path().join("boots")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_orderly_end_and_after_a_killed_process_nothing_is_read_again() {
    let test = TestLayer::of_frames(3, 10_000);
    let root = left_behind(&test, 3).await;
    let open = |boot: &str| {
        let disk = Arc::new(WatchedDisk::default());
        // Whoever reads the content fails.
        disk.fail(Kind::Read, "/data$", Errno::PERM.raw_os_error());
        let options = CacheOptions { boot: Some(boot.to_owned()), ..disk.options() };
        cache(root.path(), options)
    };
    let verified = cache(root.path(), CacheOptions { boot: Some("first".to_owned()), ..options() });
    drop(verified.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap());
    drop(verified);
    for boot in ["second", "second"] {
        let cache = open(boot);
        let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
        assert!(layer.is_complete(), "{boot}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_what_nobody_reads() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let data = data_of(root.path(), &test);
    flip(&data, 50_000);
    let mounted = File::open(&data).unwrap();
    let options = CacheOptions { scrub_rate: NonZeroU64::new(1 << 40), ..options() };
    let cache = cache(root.path(), options);
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert!(layer.is_complete());
    healed(&layer, 1).await;
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    while layer.complete_file().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(fs::read(layer.complete_file().unwrap()).unwrap() == test.space);
    let mut old = vec![0; test.space.len()];
    mounted.read_exact_at(&mut old, 0).unwrap();
    assert!(old != test.space, "a file that may be mounted was written to");
    assert_eq!(layer.progress().healed_pages, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_cannot_be_read_costs_its_bytes_and_no_reader() {
    let test = TestLayer::of_frames(4, 20_000);
    for count in [2, 4] {
        let root = left_behind(&test, count).await;
        let disk = Arc::new(WatchedDisk::default());
        let (cache, source) = (cache(root.path(), disk.options()), MemorySource::new(&test));
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        disk.fail(Kind::Read, "/data$", Errno::IO.raw_os_error());
        assert_eq!(layer.read_at_if_present(0, &mut [0; 4096]).unwrap(), None);
        let plain = test.plain_of_frame(0);
        if count == 4 {
            // The whole file is unreadable: another one takes its place.
            check_read(&layer, &test, plain.clone()).await;
            assert!(layer.progress().healed_pages > 0);
        }
        disk.recover();
        check_read(&layer, &test, 0..test.space.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_for_a_new_file_a_damaged_layer_waits_and_says_why() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let data = data_of(root.path(), &test);
    flip(&data, 50_000);
    let before = fs::read(&data).unwrap();
    let disk = Arc::new(WatchedDisk::default());
    disk.fail(Kind::Write, "/data.", Errno::NOSPC.raw_os_error());
    let cache = cache(root.path(), CacheOptions { disk: Disk::observed(disk.clone()), ..other_boot() });
    let open = || cache.layer(&test.lazy, MemorySource::new(&test), json!("test"));
    let error = open().await.unwrap_err();
    assert!(
        matches!(&error, CacheError::Disk { error, .. } if error.kind() == std::io::ErrorKind::StorageFull),
        "{error}"
    );
    assert!(fs::read(&data).unwrap() == before);
    disk.recover();
    let layer = open().await.unwrap();
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert_eq!(layer.progress().healed_pages, 1);
}
