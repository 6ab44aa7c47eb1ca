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
use storage::{Cache, CacheOptions, Layer, ReadError, Verdict};

use crate::{
    support::{
        Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, options, wait_for_dedup, wait_for_verdict,
    },
    watched::{Kind, WatchedDisk},
};

fn cache(root: &Path, options: CacheOptions) -> Cache {
    Cache::open(root, tokio::runtime::Handle::current(), options).unwrap()
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

        let (cache, source) = (cache(root.path(), options()), MemorySource::new(&test));
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        assert_eq!(layer.progress().healed_pages, 2);
        assert!(!source.requests().is_empty());
        // A complete file may be mounted: it stays as it is, and a new file is healed.
        let is_new = fs::metadata(&data).unwrap().ino() != inode;
        assert_eq!(is_new, count == 4);
        let mut after = vec![0; before.len()];
        mounted.read_exact_at(&mut after, 0).unwrap();
        assert_eq!(after == before, is_new);
        assert!(fs::read(&data).unwrap() == test.space);
    }
}

/// Pages behind holes are told apart, in files that may be mounted and in others.
#[tokio::test(flavor = "multi_thread")]
async fn between_holes_only_what_the_disk_has_changed_is_fetched_again() {
    let file = TestFile(vec![(0, 5000), (1 << 20, 9000), (300_000, 100), (700_000, 0)]);
    let test = TestLayer::new(&[file, TestFile(vec![(3 << 20, 0)]), TestFile::of_len(20_000)], &[6000]);
    let damaged = [1000, 5000 + (1 << 20) + 10, test.files[2].start + 9000];
    // The second frame ends behind the hole.
    for (arrived, damaged) in [(5000, &damaged[..2]), (test.space.len() as u64, &damaged[..])] {
        let fixture = Fixture::new(&test).await;
        check_read(&fixture.layer, &test, 0..arrived).await;
        fixture.layer.flush().unwrap();
        let is_whole = fixture.layer.is_complete();
        assert_eq!(fixture.layer.complete_file_within(Duration::from_secs(60)).is_some(), is_whole);
        let root = fixture.crash();
        let data = data_of(root.path(), &test);
        damaged.iter().for_each(|position| flip(&data, *position));
        let (cache, source) = (cache(root.path(), options()), MemorySource::new(&test));
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        assert_eq!(layer.progress().healed_pages, damaged.len() as u64);
        assert!(source.requests().iter().map(|range| range.end - range.start).sum::<u64>() < test.tar.len() as u64);
        let file = layer.complete_file_within(Duration::from_secs(60)).unwrap();
        assert!(fs::read(&file).unwrap() == test.space);
        let presence = fs::metadata(file.with_file_name("presence")).unwrap().len();
        // 5000 bytes, 9000 behind a hole, 100 behind another, 20,000: 2 + 3 + 1 + 5 pages.
        assert_eq!(presence, 8 + 32 + 8 + 8 + 8 + 8 + 8 + 11 * 4 + 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_of_content_is_found() {
    let test = TestLayer::of_frames(2, 9000);
    let root = left_behind(&test, 2).await;
    let data = data_of(root.path(), &test);
    for position in (0..test.files[0].end).step_by(501) {
        flip(&data, position);
        let cache = cache(root.path(), options());
        let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        assert_eq!(layer.progress().healed_pages, 1, "byte {position}");
        layer.flush().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_a_page_of_which_one_frame_is_missing_reaches_no_reader_and_condemns_no_layer() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 1).await;
    // The first frame ends in the fifth page.
    flip(&data_of(root.path(), &test), 17_000);
    let cache = cache(root.path(), options());
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    layer.verify();
    assert!(matches!(wait_for_verdict(&layer).await, Verdict::Verified { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_a_layer_reads_none_of_its_content() {
    let test = TestLayer::of_frames(3, 10_000);
    let root = left_behind(&test, 3).await;
    let disk = Arc::new(WatchedDisk::default());
    // Whoever reads the content fails.
    disk.fail(Kind::Read, "/data$", Errno::PERM.raw_os_error());
    let cache = cache(root.path(), disk.options());
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert!(layer.is_complete());
    assert_eq!(layer.progress().healed_pages, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flipped_while_no_process_ran_is_found_at_the_first_read() {
    let test = TestLayer::of_frames(4, 20_000);
    // The page is more than what is asked for, just that, the first, the last and the middle of it.
    let asked = [6000..6100, 4096..8192, 5000..9000, 100..5001, 4000..8200];
    for (count, asked) in [2, 4].into_iter().flat_map(|count| asked.clone().map(|asked| (count, asked))) {
        let root = left_behind(&test, count).await;
        let data = data_of(root.path(), &test);
        flip(&data, 5000);
        let mounted = File::open(&data).unwrap();
        let before = fs::read(&data).unwrap();
        let (cache, source) = (cache(root.path(), options()), MemorySource::new(&test));
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        let number = layer.file_number().unwrap();
        let mut buffer = vec![0; asked.end - asked.start];
        assert_eq!(
            layer.read_at_if_present(asked.start as u64, &mut buffer).unwrap(),
            None,
            "{count} frames, {asked:?}"
        );
        assert!(source.requests().is_empty());
        check_read(&layer, &test, 4000..6100).await;
        assert_eq!(layer.progress().healed_pages, 1);
        assert_eq!(source.requests(), [test.request_for(0..1)]);
        let is_new = layer.file_number().unwrap() != number;
        assert_eq!(is_new, count == 4, "what was complete may be mounted");
        let mut after = vec![0; before.len()];
        mounted.read_exact_at(&mut after, 0).unwrap();
        assert_eq!(after == before, is_new);
        check_read(&layer, &test, 0..test.space.len() as u64).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn content_is_compared_once_and_that_of_this_process_never() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 2).await;
    let disk = Arc::new(WatchedDisk::default());
    let (cache, source) = (cache(root.path(), disk.options()), MemorySource::new(&test));
    let layer = cache.layer(&test.lazy, source, json!("test")).await.unwrap();
    let reads_of = |offset| {
        let before = disk.read_count();
        assert_eq!(layer.read_at_if_present(offset, &mut [0; 2048]).unwrap(), Some(2048));
        disk.read_count() - before
    };
    // Of a part of a page the whole is read besides.
    assert_eq!([reads_of(8192), reads_of(8192), reads_of(12_288 + 2048)], [2, 1, 2]);
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert_eq!(reads_of(test.plain_of_frame(3).start / 4096 * 4096), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_pages_are_read_once_to_be_compared_and_answered() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let disk = Arc::new(WatchedDisk::default());
    let (cache, source) = (cache(root.path(), disk.options()), MemorySource::new(&test));
    let layer = cache.layer(&test.lazy, source, json!("test")).await.unwrap();
    let before = disk.read_count();
    let mut buffer = vec![0; 8 * 4096];
    assert_eq!(layer.read_at_if_present(4096, &mut buffer).unwrap(), Some(buffer.len()));
    assert_eq!(disk.read_count() - before, 1);
    assert_eq!(buffer, test.space[4096..9 * 4096]);
}

/// The checksums are in `presence`: where that cannot be read, content of an earlier process is fetched again.
#[tokio::test(flavor = "multi_thread")]
async fn without_their_checksums_pages_are_fetched_again() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let data = data_of(root.path(), &test);
    let (cache, source) = (cache(root.path(), options()), MemorySource::new(&test));
    let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
    flip(&data, 5000);
    fs::remove_file(data.with_file_name("presence")).unwrap();
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert!(layer.progress().healed_pages > 1);
    assert_eq!(source.requests(), [test.request_for(0..4)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn content_whose_checksums_were_never_written_is_fetched_again() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let presence = data_of(root.path(), &test).with_file_name("presence");
    let mut bytes = fs::read(&presence).unwrap();
    let end = bytes.len() - 4;
    bytes[end - test.space.len() / 4096 * 4..end].fill(0);
    let crc = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    fs::write(&presence, bytes).unwrap();
    flip(&data_of(root.path(), &test), 5000);
    let (cache, source) = (cache(root.path(), options()), MemorySource::new(&test));
    let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
    assert_eq!(layer.complete_file_within(Duration::from_secs(60)), None);
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    assert_eq!(source.requests(), [test.request_for(0..4)]);
}

/// A reader's late note that content has come, behind the flush that found everything there, cost all checksums.
#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_layer_keeps_its_checksums() {
    let test = TestLayer::of_frames(30, 500);
    for _ in 0..20 {
        let root = left_behind(&test, 30).await;
        let bytes = fs::read(data_of(root.path(), &test).with_file_name("presence")).unwrap();
        let end = bytes.len() - 4;
        let checksums = &bytes[end - test.space.len() / 4096 * 4..end];
        assert!(checksums.chunks(4).all(|checksum| checksum != [0; 4]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_gets_no_file_of_an_earlier_process_that_was_not_compared() {
    let test = TestLayer::of_frames(4, 20_000);
    for is_damaged in [false, true] {
        let root = left_behind(&test, 4).await;
        if is_damaged {
            flip(&data_of(root.path(), &test), 50_000);
        }
        let cache = cache(root.path(), options());
        let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
        assert!(layer.is_complete());
        assert_eq!(layer.complete_file(), None);
        let found = layer.complete_file_within(Duration::from_secs(60));
        assert_eq!(found.is_none(), is_damaged);
        check_read(&layer, &test, 0..test.space.len() as u64).await;
        let file = layer.complete_file_within(Duration::from_secs(60)).unwrap();
        assert!(fs::read(file).unwrap() == test.space);
        assert_eq!(layer.progress().healed_pages, u64::from(is_damaged));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_has_no_time_for_the_comparison_has_it_made_behind_it() {
    let test = TestLayer::of_frames(4, 2 << 20);
    let root = left_behind(&test, 4).await;
    flip(&data_of(root.path(), &test), 6 << 20);
    // There is no scrub of what nobody wants.
    let cache = cache(root.path(), CacheOptions { scrub_rate: None, ..options() });
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert_eq!(layer.complete_file_within(Duration::ZERO), None);
    healed(&layer, 1).await;
    check_read(&layer, &test, 0..test.space.len() as u64).await;
    while layer.complete_file().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A second layer is opened when the scrub has been through the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_opened_late_does_not_wait_for_the_next_scrub() {
    let first = TestLayer::of_frames(4, 20_000);
    let second = TestLayer::of_frames(3, 30_000);
    let root = left_behind(&first, 4).await;
    let options = CacheOptions { scrub_rate: NonZeroU64::new(1 << 40), ..options() };
    let open = |test: &TestLayer| (cache(root.path(), options.clone()), test.lazy, MemorySource::new(test));
    let (earlier, lazy, source) = open(&second);
    let layer = earlier.layer(&lazy, source, json!("test")).await.unwrap();
    check_read(&layer, &second, 0..second.space.len() as u64).await;
    layer.flush().unwrap();
    drop((layer, earlier));
    for test in [&first, &second] {
        flip(&data_of(root.path(), test), 50_000);
    }
    let (cache, lazy, source) = open(&first);
    let layer = cache.layer(&lazy, source, json!("test")).await.unwrap();
    healed(&layer, 1).await;
    let layer = cache.layer(&second.lazy, MemorySource::new(&second), json!("test")).await.unwrap();
    healed(&layer, 1).await;
}

/// Nobody waits for a copy that says nothing any longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_healed_while_content_is_copied() {
    let files = [TestFile::of_len(30_000), TestFile::of_len(30_000)];
    let make = |time| {
        LayerMaker { files: &files, changed_files: &[0], time, dedup: Some(&|_| {}), ..LayerMaker::default() }.make()
    };
    let (old, new) = (make(1), make(2));
    let root = {
        let fixture = Fixture::new(&new).await;
        check_read(&fixture.layer, &new, new.files[0].clone()).await;
        fixture.layer.flush().unwrap();
        fixture.crash()
    };
    // As if its dedup section had not come yet.
    let _ = fs::remove_file(data_of(root.path(), &new).with_file_name("dedup"));
    flip(&data_of(root.path(), &new), 5000);
    let cache = cache(root.path(), options());
    let peer = cache.layer(&old.lazy, MemorySource::new(&old), json!("test")).await.unwrap();
    check_read(&peer, &old, 0..old.space.len() as u64).await;
    wait_for_dedup(root.path(), &old).await;
    let source = MemorySource::new(&new);
    source.hold_at(new.section.start);
    let layer = cache.layer(&new.lazy, source.clone(), json!("test")).await.unwrap();
    let read = tokio::spawn({
        let layer = layer.clone();
        async move { layer.read_async(4096, 4096).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    source.release(new.section.start);
    assert!(read.await.unwrap().unwrap() == new.space[4096..8192]);
    check_read(&layer, &new, 0..new.space.len() as u64).await;
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
async fn without_room_for_a_new_file_reads_of_a_damaged_page_fail_until_there_is_some() {
    let test = TestLayer::of_frames(4, 20_000);
    let root = left_behind(&test, 4).await;
    let data = data_of(root.path(), &test);
    flip(&data, 50_000);
    let before = fs::read(&data).unwrap();
    let disk = Arc::new(WatchedDisk::default());
    disk.fail(Kind::Write, "/data.", Errno::NOSPC.raw_os_error());
    let cache = cache(root.path(), disk.options());
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    let read = || layer.read_async(0, test.space.len());
    let error = read().await.unwrap_err();
    assert!(
        matches!(&error, ReadError::Disk { error, .. } if error.kind() == std::io::ErrorKind::StorageFull),
        "{error}"
    );
    check_read(&layer, &test, 0..40_000).await;
    assert!(fs::read(&data).unwrap() == before);
    disk.recover();
    assert!(read().await.unwrap() == test.space);
    assert_eq!(layer.progress().healed_pages, 1);
}
