//! Sources that lie or break off, and disks that refuse.

use std::{path::Path, sync::Arc};

use format_spec::Digest;
use serde_json::json;
use storage::{Cache, CacheError, ReadError};

use crate::{
    support::{Fault, Fixture, MemorySource, TestFile, TestLayer, check_read, open_cache, options},
    watched::{Kind, WatchedDisk},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_frame_is_never_returned_or_kept() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    let plain = test.plain_of_frame(1);
    let flipped = test.frames[1].blob_offset.get() + 20;
    fixture.source.fail_next([Fault::FlipAt(flipped); 3]);

    let error = fixture.layer.read_async(plain.start, 100).await.unwrap_err();
    let mut blob = test.blob.clone();
    blob[flipped as usize] ^= 1;
    let found = Digest::of(&blob[test.request_for(1..2).start as usize..test.request_for(1..2).end as usize]);
    let expected = test.frames[1].digest();
    let expected_text = format!("frame 1 of {} has digest {found}, expected {expected}", test.lazy.blob);
    assert!(matches!(error, ReadError::Corrupt { frame: 1, .. }), "{error}");
    assert_eq!(error.to_string(), expected_text);
    assert_eq!(fixture.source.frame_requests(), vec![test.request_for(1..2); 3]);
    assert_eq!(fixture.layer.progress().frames_present, 0);
    assert_eq!(fixture.layer.read_at_if_present(plain.start, &mut [0; 100]).unwrap(), None);

    tokio::time::sleep(options().requests.failure_memory * 2).await;
    check_read(&fixture.layer, &test, plain).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_was_corrupt_twice_is_asked_for_once_more() {
    let test = TestLayer::of_frames(1, 10_000);
    let fixture = Fixture::new(&test).await;
    fixture.source.fail_next([Fault::FlipAt(20), Fault::FlipAt(30)]);
    check_read(&fixture.layer, &test, 0..9000).await;
    assert_eq!(fixture.source.frame_requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_frame_does_not_harm_its_neighbours() {
    let test = TestLayer::of_frames(3, 10_000);
    let fixture = Fixture::new(&test).await;
    let flipped = test.frames[1].blob_offset.get();
    fixture.source.fail_next([Fault::FlipAt(flipped)]);
    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..3), test.request_for(1..2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_of_another_length_than_promised_is_refused_at_once() {
    type Change = fn(&[u8]) -> Vec<u8>;
    let changes: [Change; 3] =
        [|content| content[1..].to_vec(), |content| [content, b"x"].concat(), |_| vec![0; 256 << 20]];
    for change in changes {
        let test = TestLayer::with_frames(&[TestFile::of_len(9000)], &[4096], |number, content| {
            if number == 1 { change(content) } else { content.to_vec() }
        });
        let fixture = Fixture::new(&test).await;
        let plain = test.plain_of_frame(1);
        let error = fixture.layer.read_async(plain.start, 10).await.unwrap_err();
        assert!(matches!(error, ReadError::Undecodable { frame: 1, plain_len: 4096, .. }), "{error}");
        assert_eq!(fixture.source.frame_requests(), [test.request_for(1..2)]);
        check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_continued() {
    for fault in [Fault::BreakAt as fn(u64) -> Fault, Fault::EndAt] {
        let test = TestLayer::of_frames(4, 10_000);
        let fixture = Fixture::new(&test).await;
        fixture.source.fail_next([fault(test.frames[2].blob_offset.get() + 5)]);
        check_read(&fixture.layer, &test, 0..test.files[0].end).await;
        assert_eq!(fixture.source.frame_requests(), [test.request_for(0..4), test.request_for(2..4)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_gives_up_fails_the_read_and_a_later_one_tries_again() {
    let test = TestLayer::of_frames(2, 10_000);
    let fixture = Fixture::new(&test).await;
    fixture.source.fail_next([Fault::Refuse]);
    let error = fixture.layer.read_async(0, 20_000).await.unwrap_err();
    assert!(matches!(&error, ReadError::Source { error, .. } if error.message == "refused"), "{error}");
    assert_eq!(fixture.source.frame_requests().len(), 1);

    fixture.source.fail_next([Fault::EndAt(5)]);
    let error = fixture.layer.read_async(0, 10).await.unwrap_err();
    assert!(matches!(&error, ReadError::Source { .. }), "{error}");
    assert_eq!(fixture.source.frame_requests().len(), 2);

    check_read(&fixture.layer, &test, 0..test.files[0].end).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_index_is_refused_and_leaves_nothing_behind() {
    let test = TestLayer::of_frames(1, 1000);
    let directory = tempfile::tempdir().unwrap();
    let cache = open_cache(directory.path());
    let source = MemorySource::new(&test);
    source.fail_next([Fault::FlipAt(test.lazy.index.offset); 3]);
    let error = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap_err();
    assert!(matches!(error, CacheError::Index { .. }), "{error}");
    assert_eq!(source.requests(), vec![test.index_request(); 3]);
    assert_eq!(cache.known_layers().unwrap(), []);
    assert_eq!(std::fs::read_dir(directory.path().join("layers")).unwrap().count(), 0);

    source.fail_next([Fault::Refuse]);
    let error = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap_err();
    assert!(matches!(error, CacheError::Source { .. }), "{error}");

    source.fail_next([Fault::EndAt(test.lazy.index.offset + 3)]);
    let layer = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &test, 0..100).await;
}

/// A mount that goes away with the test.
pub(crate) struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    pub(crate) fn new(kind: &str, options: &str, at: &'a Path) -> Self {
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount(kind, at, kind, rustix::mount::MountFlags::empty(), options.as_c_str()).unwrap();
        Self(at)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_no_read() {
    let test = TestLayer::of_frames(8, 100_000);
    let directory = tempfile::tempdir().unwrap();
    let _mount = Mount::new("tmpfs", "size=300k", directory.path());
    let cache = open_cache(directory.path());
    let source = MemorySource::new(&test);
    let layer = cache.layer(&test.lazy, source.clone(), json!(null)).await.unwrap();
    check_read(&layer, &test, 0..test.files[0].end).await;
    for frame in 0..8 {
        check_read(&layer, &test, test.plain_of_frame(frame)).await;
    }
    let present = layer.progress().frames_present;
    assert!(present < 3, "{present} frames fit on the disk");
    assert_eq!(source.frame_requests(), [test.request_for(0..8)]);
}

/// A disk that was full takes what comes again as soon as it has room, and says until then what it is.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_full_disk_everything_is_kept_again() {
    let test = TestLayer::of_frames(4, 20_000);
    let disk = Arc::new(WatchedDisk::default());
    let fixture = Fixture::with_options(&test, disk.options()).await;
    let full = rustix::io::Errno::NOSPC.raw_os_error();
    disk.fail(Kind::Write, "/data", full);
    check_read(&fixture.layer, &test, test.plain_of_frame(0)).await;
    assert_eq!(fixture.layer.progress().frames_present, 0);
    disk.recover();
    check_read(&fixture.layer, &test, test.plain_of_frame(1)).await;
    disk.fail(Kind::Write, "/presence", full);
    let error = fixture.layer.flush().unwrap_err();
    assert!(matches!(&error, ReadError::Disk { error, .. } if error.raw_os_error() == Some(full)), "{error}");
    disk.recover();
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    fixture.layer.flush().unwrap();
    assert!(fixture.layer.complete_file().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_overlayfs() {
    let directory = tempfile::tempdir().unwrap();
    let [lower, lowest, merged] = ["lower", "lowest", "merged"].map(|name| directory.path().join(name));
    [&lower, &lowest, &merged].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
    let _mount = Mount::new("overlay", &format!("lowerdir={}:{}", lower.display(), lowest.display()), &merged);
    let error = Cache::open(&merged, tokio::runtime::Handle::current(), options()).unwrap_err();
    assert!(matches!(&error, CacheError::OnOverlay(path) if *path == merged), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_ignores_ranges_sends_a_blob_once_for_the_index_and_once_for_all_frames() {
    let test = TestLayer::of_frames(28, 100 << 10);
    let source = MemorySource::sending_whole(&test);
    let fixture = Fixture::with_source(&test, source, options()).await;
    // Backwards: what comes first in the blob has passed by when it is read.
    for frame in (0..28).rev() {
        check_read(&fixture.layer, &test, test.plain_of_frame(frame)).await;
    }
    let whole = 0..test.blob.len() as u64;
    assert_eq!(fixture.source.requests(), [whole.clone(), whole]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_did_not_pass_by_of_a_whole_blob_is_asked_for_again() {
    let test = TestLayer::of_frames(28, 100 << 10);
    let fixture = Fixture::with_source(&test, MemorySource::sending_whole(&test), options()).await;
    fixture.source.fail_next([Fault::BreakAt(test.frames[10].blob_offset.get() + 5)]);
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert_eq!(fixture.source.requests(), vec![0..test.blob.len() as u64; 3]);
}
