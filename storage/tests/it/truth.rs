//! A layer is shown as long as it is what its tar stream says: the stream is put together, hashed and walked.

use std::{fs, num::NonZeroU64, path::PathBuf, time::Duration};

use format_spec::{Digest, dedup::DedupPiece};
use serde_json::{Value, json};
use storage::{Cache, CacheOptions, Layer, ReadError, RestOptions, Verdict};

use crate::support::{
    Fault, Fixture, LayerMaker, MemorySource, TestFile, TestLayer, check_read, name_and_mode, options, wait_for_dedup,
    wait_for_verdict,
};

/// Everything is fetched and verified at once.
fn in_background() -> CacheOptions {
    let rest = RestOptions {
        quiet: Duration::from_millis(20),
        failure_pause: Duration::from_millis(50),
        ..RestOptions::new(NonZeroU64::new(1 << 40).unwrap())
    };
    CacheOptions { rest: Some(rest), ..options() }
}

/// Small files that share frames, a large one, one with holes.
fn files() -> Vec<TestFile> {
    let mut files = [3000, 100, 95_000, 0, 4096].map(TestFile::of_len).to_vec();
    files.push(TestFile(vec![(9000, 5000), (100_000, 700), (3000, 0)]));
    files
}

fn maker(files: &[TestFile]) -> LayerMaker<'_> {
    LayerMaker { files, time: 1, ..LayerMaker::default() }
}

fn verified(test: &TestLayer) -> Verdict {
    Verdict::Verified { tar: Digest::of(&test.tar) }
}

fn refusal(verdict: Verdict) -> String {
    match verdict {
        Verdict::Refused { reason } => reason,
        Verdict::Verified { tar } => panic!("verified as {tar}"),
    }
}

/// One reader of a registry that does not answer kept every other layer of the node from its verdict.
#[tokio::test(flavor = "multi_thread")]
async fn one_read_that_is_not_answered_kept_all_other_layers_from_their_verdicts() {
    let rest = RestOptions { start_up_max: Duration::from_secs(1), ..in_background().rest.unwrap() };
    let options = CacheOptions { rest: Some(rest), ..options() };
    let dead = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::with_options(&dead, options).await;
    fixture.source.hold_at(0);
    let (layer, plain) = (fixture.layer.clone(), dead.plain_of_frame(0));
    let reader = tokio::spawn(async move { layer.read_async(plain.start, 100).await });
    fixture.source.wait_for_frame_requests(1).await;
    let test = maker(&files()).make();
    let layer = fixture.cache.layer(&test.lazy, MemorySource::new(&test), json!("other")).await.unwrap();
    assert_eq!(wait_for_verdict(&layer).await, verified(&test));
    assert!(!reader.is_finished());
    reader.abort();
}

/// Eight layers whose registry stands still had all that there was for awaited verdicts, for 20 s and more each.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_do_not_come_kept_an_awaited_verdict_from_everybody() {
    let first = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::new(&first).await;
    fixture.source.hold_at(0);
    fixture.layer.verify();
    let mut held = Vec::new();
    for count in 6..26 {
        let test = TestLayer::of_frames(count, 10_000);
        let source = MemorySource::new(&test);
        source.hold_at(0);
        let layer = fixture.cache.layer(&test.lazy, source, json!(count)).await.unwrap();
        layer.verify();
        held.push(layer);
    }
    let test = maker(&files()).make();
    let layer = fixture.cache.layer(&test.lazy, MemorySource::new(&test), json!("other")).await.unwrap();
    let started = std::time::Instant::now();
    layer.verify();
    assert_eq!(wait_for_verdict(&layer).await, verified(&test));
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert!(held.iter().all(|layer| layer.verdict().is_none()));
}

/// A layer that was complete, and had lost what a proof needs, kept the background of all others.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_proof_does_not_come_kept_all_others_from_theirs() {
    let first = TestLayer::of_frames(5, 10_000);
    let fixture = Fixture::new(&first).await;
    check_read(&fixture.layer, &first, 0..first.files[0].end).await;
    fixture.layer.flush().unwrap();
    let crashed = fixture.crash();
    fs::remove_file(crashed.path().join("layers").join(first.lazy.id().hex()).join("gaps")).unwrap();
    let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), in_background()).unwrap();
    let source = MemorySource::new(&first);
    source.hold_at(0);
    let incomplete = cache.layer(&first.lazy, source.clone(), json!("test")).await.unwrap();
    source.wait_for_frame_requests(0).await;
    let test = maker(&files()).make();
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("other")).await.unwrap();
    let started = std::time::Instant::now();
    assert_eq!(wait_for_verdict(&layer).await, verified(&test));
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert_eq!((incomplete.is_complete(), incomplete.verdict()), (true, None));
}

/// Nothing is read any more, from memory neither, and no file is given away.
async fn assert_shows_nothing(layer: &Layer) {
    let error = layer.read_async(0, 10).await.unwrap_err();
    assert!(matches!(error, ReadError::Refused { .. }), "{error}");
    layer.read_at_if_present(0, &mut [0; 10]).unwrap_err();
    assert_eq!(layer.complete_file(), None);
}

async fn verdict_in_background(test: &TestLayer) -> (Fixture, Verdict) {
    let fixture = Fixture::with_options(test, in_background()).await;
    let verdict = wait_for_verdict(&fixture.layer).await;
    (fixture, verdict)
}

fn directory_of(fixture: &Fixture, test: &TestLayer) -> PathBuf {
    fixture.directory.path().join("layers").join(test.lazy.id().hex())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_what_its_tar_stream_says_is_verified_by_itself() {
    let files = files();
    let test = maker(&files).make();
    let (fixture, verdict) = verdict_in_background(&test).await;
    assert_eq!(verdict, verified(&test));
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert!(fixture.layer.complete_file().is_some());
    assert!(!directory_of(&fixture, &test).join("gaps").exists(), "nobody needs it any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_is_given_to_the_kernel_before_the_verdict() {
    let test = TestLayer::of_frames(5, 10_000);
    let slow = RestOptions { quiet: Duration::from_secs(3600), ..RestOptions::new(NonZeroU64::MAX) };
    let fixture = Fixture::with_options(&test, CacheOptions { rest: Some(slow), ..options() }).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    assert!(fixture.layer.is_complete());
    assert_eq!(fixture.layer.complete_file(), None);
    fixture.layer.verify();
    assert_eq!(wait_for_verdict(&fixture.layer).await, verified(&test));
    assert!(fixture.layer.complete_file().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_the_index_exchanges_are_refused() {
    let files = [3000, 3000].map(TestFile::of_len);
    let exchanged = |number: usize| name_and_mode(1 - number);
    let test = LayerMaker { index_says: &exchanged, ..maker(&files) }.make();
    let (fixture, verdict) = verdict_in_background(&test).await;
    let reason = refusal(verdict);
    assert!(reason.starts_with("/00000"), "{reason}");
    assert_shows_nothing(&fixture.layer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_user_id_bit_that_only_the_index_has_is_refused() {
    let files = [3000].map(TestFile::of_len);
    let set_user_id = |number: usize| (name_and_mode(number).0, 0o4755);
    let test = LayerMaker { index_says: &set_user_id, ..maker(&files) }.make();
    let (fixture, verdict) = verdict_in_background(&test).await;
    assert_eq!(refusal(verdict), "/000000: mode is 4755 by the index, 0644 by the tar stream");
    assert_shows_nothing(&fixture.layer).await;
}

/// The frame comes for its other content, or for the tar header in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hot_pack_with_other_bytes_than_the_frames_is_refused() {
    for hot_len in [4096, 8192] {
        let files = [8192].map(TestFile::of_len);
        let hot = [0..hot_len];
        let change_hot = |_, content: &[u8]| vec![7; content.len()];
        let test = LayerMaker { hot: &hot, change_hot: &change_hot, ..maker(&files) }.make();
        let (fixture, verdict) = verdict_in_background(&test).await;
        assert_eq!(refusal(verdict), "content at 0 of the plain address space is not that of frame 0", "{hot_len}");
        assert_shows_nothing(&fixture.layer).await;
    }
}

/// Frames that hold nothing but content are not fetched a second time: what is shown is hashed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_hashed_is_what_is_shown() {
    let files = [40_000].map(TestFile::of_len);
    let hot = [0..40_000];
    let change_hot = |number, content: &[u8]| if number == 2 { vec![7; content.len()] } else { content.to_vec() };
    let honest = LayerMaker { hot: &hot, ..maker(&files) }.make();
    let test = LayerMaker { hot: &hot, hot_frame_len: 8192, change_hot: &change_hot, ..maker(&files) }.make();
    assert_eq!(test.tar, honest.tar);
    let (_fixture, verdict) = verdict_in_background(&test).await;
    assert_ne!(verdict, verified(&honest));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_of_a_hot_pack_in_a_hole_is_refused() {
    let files = [TestFile(vec![(5000, 100)])];
    let hot = [4096..5100];
    let change_hot = |_, content: &[u8]| [&[7], &content[1..]].concat();
    let test = LayerMaker { hot: &hot, change_hot: &change_hot, ..maker(&files) }.make();
    let (_fixture, verdict) = verdict_in_background(&test).await;
    assert_eq!(refusal(verdict), "there is content at 4096 of the plain address space, where no file has any");
}

/// Its dedup section names content of another layer as that of its own file.
#[tokio::test(flavor = "multi_thread")]
async fn copies_with_other_bytes_than_the_frames_are_refused() {
    let (others, own) = ([5000].map(TestFile::of_len), [5000, 5000].map(TestFile::of_len));
    let keep = |_: &mut Vec<DedupPiece>| {};
    let first = LayerMaker { dedup: Some(&keep), ..maker(&others) }.make();
    let claimed = Digest::of(&first.space[..5000]);
    let lie = |pieces: &mut Vec<DedupPiece>| pieces[1].digest = *claimed.as_bytes();
    let second = LayerMaker { dedup: Some(&lie), changed_files: &[1], frame_lens: &[20_000], ..maker(&own) }.make();
    let fixture = Fixture::with_options(&first, in_background()).await;
    assert_eq!(wait_for_verdict(&fixture.layer).await, verified(&first));
    wait_for_dedup(fixture.directory.path(), &first).await;
    let layer = fixture.cache.layer(&second.lazy, MemorySource::new(&second), json!("test")).await.unwrap();
    let reason = refusal(wait_for_verdict(&layer).await);
    assert!(reason.starts_with("content at 8192 of the plain address space is not that of frame"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_is_found_again_without_any_request() {
    let files = files();
    let exchanged = |number: usize| name_and_mode(if number < 2 { 1 - number } else { number });
    for is_honest in [true, false] {
        let says: &dyn Fn(usize) -> (String, u32) = if is_honest { &name_and_mode } else { &exchanged };
        let test = LayerMaker { index_says: says, ..maker(&files) }.make();
        let (fixture, verdict) = verdict_in_background(&test).await;
        assert_eq!(verdict == verified(&test), is_honest);
        let crashed = fixture.crash();
        let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), in_background()).unwrap();
        let source = MemorySource::new(&test);
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        assert_eq!(layer.verdict(), Some(verdict));
        assert_eq!(source.requests(), []);
        match is_honest {
            true => check_read(&layer, &test, 0..test.space.len() as u64).await,
            false => assert_shows_nothing(&layer).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_verdict_does_not_speak_of_content_that_is_gone() {
    let files = files();
    let test = maker(&files).make();
    let (fixture, _) = verdict_in_background(&test).await;
    let crashed = fixture.crash();
    fs::remove_file(crashed.path().join("layers").join(test.lazy.id().hex()).join("presence")).unwrap();
    let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), options()).unwrap();
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert_eq!(layer.verdict(), None);
    layer.verify();
    assert_eq!(wait_for_verdict(&layer).await, verified(&test));
}

/// Content that was verified came as frames; after it is lost, a hot pack with other bytes takes its place.
#[tokio::test(flavor = "multi_thread")]
async fn content_that_comes_again_is_held_to_the_verdict_before() {
    let files = [40_000].map(TestFile::of_len);
    let hot = [8192..32_768];
    let change_hot = |_, content: &[u8]| vec![7; content.len()];
    // One frame of nothing but content between two others: it is not needed again when its content is there.
    let test = LayerMaker { hot: &hot, frame_lens: &[8704, 24_576], change_hot: &change_hot, ..maker(&files) }.make();
    let fixture = Fixture::with_options(&test, options()).await;
    let honest = Digest::of(&test.tar);
    let path = directory_of(&fixture, &test).join("verdict");
    let record = json!({ "index": test.lazy.id(), "verdict": "verified", "tar": honest });
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    let crashed = fixture.crash();
    let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), options()).unwrap();
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    assert_eq!(layer.verdict(), None);
    check_hot(&layer, hot[0].clone()).await;
    layer.verify();
    let reason = refusal(wait_for_verdict(&layer).await);
    assert!(reason.ends_with("and had another one before"), "{reason}");
}

/// A bit that the disk has changed is fetched again; the layer is as honest as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_changes_content_condemns_no_layer() {
    let files = files();
    let test = maker(&files).make();
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    fixture.layer.flush().unwrap();
    let crashed = fixture.crash();
    let path = crashed.path().join("layers").join(test.lazy.id().hex()).join("data");
    let data = fs::OpenOptions::new().write(true).open(path).unwrap();
    let at = test.files[2].start + 100;
    let changed = test.space[usize::try_from(at).unwrap()] ^ 1;
    std::os::unix::fs::FileExt::write_all_at(&data, &[changed], at).unwrap();
    let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), options()).unwrap();
    let layer = cache.layer(&test.lazy, MemorySource::new(&test), json!("test")).await.unwrap();
    // The first proof finds the damage; what is healed by it is there for the next.
    let verdict = loop {
        layer.verify();
        if let Some(verdict) = layer.verdict() {
            break verdict;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(verdict, verified(&test));
    check_read(&layer, &test, 0..test.space.len() as u64).await;
}

/// Waits until the false hot pack is there.
async fn check_hot(layer: &Layer, plain: std::ops::Range<u64>) {
    let len = usize::try_from(plain.end - plain.start).unwrap();
    let read = layer.read_async(plain.start, len).await.unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
}

/// Bytes that had arrived are not asked for again: neither content nor what lies between.
#[tokio::test(flavor = "multi_thread")]
async fn a_proof_goes_on_after_a_crash_and_damage_costs_only_what_is_damaged() {
    let files = files();
    let test = maker(&files).make();
    let fixture = Fixture::new(&test).await;
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
    fixture.layer.flush().unwrap();
    for damage in [false, true] {
        let crashed = fixture.crash();
        let gaps = crashed.path().join("layers").join(test.lazy.id().hex()).join("gaps");
        if damage {
            let mut bytes = fs::read(&gaps).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&gaps, bytes).unwrap();
        }
        let cache = Cache::open(crashed.path(), tokio::runtime::Handle::current(), options()).unwrap();
        let source = MemorySource::new(&test);
        let layer = cache.layer(&test.lazy, source.clone(), json!("test")).await.unwrap();
        layer.verify();
        assert_eq!(wait_for_verdict(&layer).await, verified(&test));
        assert_eq!(source.requests().len(), usize::from(damage), "{:?}", source.requests());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_verdict_gets_it_without_a_reader_and_without_a_second_request_for_anything() {
    let files = files();
    let test = maker(&files).make();
    let fixture = Fixture::new(&test).await;
    fixture.layer.verify();
    assert_eq!(wait_for_verdict(&fixture.layer).await, verified(&test));
    assert!(fixture.layer.is_complete());
    assert_eq!(fixture.source.frame_requests(), [test.request_for(0..test.frames.len())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_sends_other_bytes_is_no_verdict() {
    let files = files();
    let test = maker(&files).make();
    let fixture = Fixture::with_options(&test, in_background()).await;
    fixture.source.fail_next([Fault::FlipAt(10), Fault::Refuse, Fault::BreakAt(20)]);
    fixture.layer.verify();
    assert_eq!(wait_for_verdict(&fixture.layer).await, verified(&test));
    check_read(&fixture.layer, &test, 0..test.space.len() as u64).await;
}

/// The readers of a layer, as its description says it.
fn domain(description: &Value) -> String {
    description.as_str().unwrap_or_default().to_owned()
}

/// An image that claims pieces by their digests alone does not get what others have.
#[tokio::test(flavor = "multi_thread")]
async fn content_for_its_digest_is_given_within_a_domain_only() {
    let (others, own) = ([5000].map(TestFile::of_len), [5000, 5000].map(TestFile::of_len));
    let keep = |_: &mut Vec<DedupPiece>| {};
    let victim = LayerMaker { dedup: Some(&keep), ..maker(&others) }.make();
    let claimed = Digest::of(&victim.space[..5000]);
    let claim = |pieces: &mut Vec<DedupPiece>| pieces[1].digest = *claimed.as_bytes();
    let oracle = LayerMaker { dedup: Some(&claim), changed_files: &[1], frame_lens: &[20_000], ..maker(&own) }.make();
    // A caller that names a place of the victim's layer has not shown that he may read it.
    for (whose, also_named_by, is_given) in
        [("test", None, true), ("theirs", None, false), ("theirs", Some("theirs"), false)]
    {
        let fixture = Fixture::with_options(&victim, CacheOptions { domain, ..options() }).await;
        let mine = fixture.layer.clone();
        if let Some(name) = also_named_by {
            fixture.cache.layer(&victim.lazy, MemorySource::new(&victim), json!(name)).await.unwrap();
            while fixture.cache.known_layers().unwrap()[0].description != json!(name) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        check_read(&mine, &victim, 0..victim.space.len() as u64).await;
        wait_for_dedup(fixture.directory.path(), &victim).await;
        mine.flush().unwrap();
        let layer = fixture.cache.layer(&oracle.lazy, MemorySource::new(&oracle), json!(whose)).await.unwrap();
        wait_for_dedup(fixture.directory.path(), &oracle).await;
        assert_eq!(layer.progress().copied_bytes, if is_given { 10_000 } else { 0 }, "{whose}");
        let shown = layer.read_async(8192, 5000).await.unwrap();
        assert_eq!(shown == victim.space[..5000], is_given, "{whose}");
    }
}
