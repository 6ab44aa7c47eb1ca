//! Layers made from a few numbers, a source over memory, a cache in a directory of its own.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use format_spec::{
    Digest, Extent, Frame, HotFrame, HotPiece, IndexBuilder, LayerData, LazyLayer,
    builder::{BlobTail, blank_inode, implicit_directory},
    dedup::DedupPiece,
    footer::FOOTER_FRAME_LEN,
    records::{PLAIN_ALIGN, hot_reason, mode},
};
use futures_util::{FutureExt, StreamExt, stream};
use serde_json::json;
use storage::{
    ByteStream, Cache, CacheOptions, FetchFuture, FetchWideFuture, Layer, RequestLimits, RequestOptions, Source,
    SourceError, Verdict, WideStream,
};
use test_kit::{BlobParts, Frames, dedup_location, hot_frame, noise};
use tokio::sync::watch;

/// A file as pieces of a hole and the bytes after it.
#[derive(Debug, Clone)]
pub(crate) struct TestFile(pub(crate) Vec<(usize, usize)>);

impl TestFile {
    pub(crate) fn of_len(len: usize) -> Self {
        Self(vec![(0, len)])
    }
}

/// A layer blob and what must be read from it.
#[derive(Debug, Clone)]
pub(crate) struct TestLayer {
    pub(crate) lazy: LazyLayer,
    pub(crate) blob: Vec<u8>,
    /// The tar stream.
    pub(crate) tar: Vec<u8>,
    /// The whole plain address space.
    pub(crate) space: Vec<u8>,
    pub(crate) files: Vec<Range<u64>>,
    pub(crate) frames: Vec<Frame>,
    pub(crate) hot_frames: Vec<HotFrame>,
    /// Where the dedup section lies in the blob.
    pub(crate) section: Range<u64>,
}

/// Alters the pieces of a dedup section.
pub(crate) type ChangePieces<'a> = &'a dyn Fn(&mut Vec<DedupPiece>);

/// How a layer is made.
pub(crate) struct LayerMaker<'a> {
    pub(crate) files: &'a [TestFile],
    /// Frames end after each of these; the last one repeats.
    pub(crate) frame_lens: &'a [usize],
    /// Alters what of a frame is compressed; the index promises the original.
    pub(crate) change: &'a dyn Fn(usize, &[u8]) -> Vec<u8>,
    /// Files whose content another version has otherwise.
    pub(crate) changed_files: &'a [usize],
    /// What stands in the tar headers, as another time of build does.
    pub(crate) time: u64,
    /// Pieces of the hot pack.
    pub(crate) hot: &'a [Range<u64>],
    pub(crate) hot_frame_len: usize,
    /// Why they are hot (SPEC.md 5.8).
    pub(crate) hot_reason: u32,
    /// Alters what of a hot frame is compressed.
    pub(crate) change_hot: &'a dyn Fn(usize, &[u8]) -> Vec<u8>,
    /// Alters the pieces of the dedup section; without it there is no section.
    pub(crate) dedup: Option<ChangePieces<'a>>,
    /// The index's words about each file, whatever its tar header says: a name and a mode.
    pub(crate) index_says: &'a dyn Fn(usize) -> (String, u32),
}

/// Name and mode of a file, by its number.
pub(crate) fn name_and_mode(number: usize) -> (String, u32) {
    (format!("{number:06}"), 0o644)
}

impl Default for LayerMaker<'_> {
    fn default() -> Self {
        Self {
            files: &[],
            frame_lens: &[10_000],
            change: &|_, content| content.to_vec(),
            changed_files: &[],
            time: 0,
            hot: &[],
            hot_frame_len: 10_000,
            hot_reason: hot_reason::PROFILE,
            change_hot: &|_, content| content.to_vec(),
            dedup: None,
            index_says: &name_and_mode,
        }
    }
}

impl LayerMaker<'_> {
    pub(crate) fn make(&self) -> TestLayer {
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        let (mut tar, mut space, mut extents, mut ranges, mut children) = (vec![], vec![], vec![], vec![], vec![]);
        for (number, file) in self.files.iter().enumerate() {
            tar.extend(tar_headers(number, file, self.time));
            space.resize(space.len().next_multiple_of(PLAIN_ALIGN as usize), 0);
            let start = space.len() as u64;
            for (piece, (hole_len, len)) in file.0.iter().enumerate() {
                space.resize(space.len() + hole_len, 0);
                if *len > 0 {
                    extents.push(Extent {
                        tar_offset: (tar.len() as u64).into(),
                        plain_offset: (space.len() as u64).into(),
                        len: (*len as u64).into(),
                    });
                }
                let version = if self.changed_files.contains(&number) { self.time << 32 } else { 0 };
                let content = noise((number * 1000 + piece) as u64 + version, *len);
                tar.extend_from_slice(&content);
                space.extend_from_slice(&content);
            }
            tar.resize(tar.len().next_multiple_of(512), 0);
            ranges.push(start..space.len() as u64);
            let (name, permissions) = (self.index_says)(number);
            let mut inode = blank_inode(mode::REGULAR | permissions);
            inode.mtime_seconds = self.time.into();
            inode.size = (space.len() as u64 - start).into();
            inode.plain_offset = start.into();
            children.push((name, builder.add_inode(inode).unwrap()));
        }
        space.resize(space.len().next_multiple_of(PLAIN_ALIGN as usize), 0);
        children.sort();
        builder.add_directory(0, children).unwrap();

        let (mut frames, mut rest) = (Frames::default(), tar.as_slice());
        while !rest.is_empty() {
            let number = frames.records.len();
            let len = self.frame_lens.get(number).or(self.frame_lens.last()).copied().unwrap();
            let (content, behind) = rest.split_at(len.min(rest.len()));
            frames.push(&(self.change)(number, content), content.len());
            rest = behind;
        }
        let (hot_frames, hot_pieces, hot_pack) = self.hot_pack(&space);
        let section = self.dedup.map(|change| {
            let mut pieces = dedup_pieces(&ranges, &extents, &frames.records, &space);
            change(&mut pieces);
            format_spec::dedup::compress(&pieces).unwrap()
        });
        let locations: Vec<_> = section.iter().map(dedup_location).collect();
        let index = builder
            .finish_layer(&LayerData {
                tar_len: tar.len() as u64,
                space_len: space.len() as u64,
                extents: &extents,
                frames: &frames.records,
                tail: BlobTail { hot_frames: &hot_frames, hot_pieces: &hot_pieces, dedup: &locations },
            })
            .unwrap();
        let dedup = section.map_or(Vec::new(), |section| section.bytes);
        let parts = BlobParts { frames: &frames.bytes, index: &index, hot_pack: &hot_pack, dedup: &dedup };
        let (blob, lazy) = parts.assemble();
        let section_end = lazy.blob_len - FOOTER_FRAME_LEN;
        let section = section_end - dedup.len() as u64..section_end;
        TestLayer { lazy, blob, tar, space, files: ranges, frames: frames.records, hot_frames, section }
    }

    fn hot_pack(&self, space: &[u8]) -> (Vec<HotFrame>, Vec<HotPiece>, Vec<u8>) {
        let piece = |plain: &Range<u64>| HotPiece {
            plain_offset: plain.start.into(),
            len: ((plain.end - plain.start) as u32).into(),
            reason: self.hot_reason.into(),
        };
        let content: Vec<u8> =
            self.hot.iter().flat_map(|plain| &space[plain.start as usize..plain.end as usize]).copied().collect();
        let (mut frames, mut pack) = (vec![], vec![]);
        for (number, content) in content.chunks(self.hot_frame_len).enumerate() {
            let compressed = zstd::bulk::compress(&(self.change_hot)(number, content), 1).unwrap();
            frames.push(hot_frame(&compressed, content.len()));
            pack.extend(compressed);
        }
        (frames, self.hot.iter().map(piece).collect(), pack)
    }
}

/// The bytes in front of a file's content: one header, and, where it has holes, their map before it.
fn tar_headers(number: usize, file: &TestFile, time: u64) -> Vec<u8> {
    let header = |kind, path: &str, len: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_path(path).unwrap();
        header.set_mode(0o644);
        header.set_mtime(time);
        header.set_size(len as u64);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let stored_len = file.0.iter().map(|(_, len)| len).sum();
    let main = header(tar::EntryType::Regular, &format!("{number:06}"), stored_len);
    if matches!(file.0[..], [] | [(0, _)]) {
        return main;
    }
    let (mut map, mut at) = (Vec::new(), 0);
    for (hole_len, len) in &file.0 {
        at += hole_len;
        if *len > 0 {
            map.extend([at.to_string(), len.to_string()]);
        }
        at += len;
    }
    let records = [
        ("GNU.sparse.size", at.to_string()),
        ("GNU.sparse.numblocks", (map.len() / 2).to_string()),
        ("GNU.sparse.map", map.join(",")),
    ];
    let mut extension = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| len.to_string().len() + rest == *len).unwrap();
        extension.extend(format!("{len} {key}={value}\n").into_bytes());
    }
    let before = header(tar::EntryType::XHeader, "sparse", extension.len());
    extension.resize(extension.len().next_multiple_of(512), 0);
    [before, extension, main].concat()
}

/// What frames hold of each file: its content, or pieces of it.
fn dedup_pieces(files: &[Range<u64>], extents: &[Extent], frames: &[Frame], space: &[u8]) -> Vec<DedupPiece> {
    let mut pieces = Vec::new();
    for file in files.iter().filter(|file| !file.is_empty()) {
        let mut cuts = vec![file.start, file.end];
        for extent in extents.iter().filter(|extent| file.contains(&extent.plain_offset.get())) {
            let tar = extent.tar_range();
            let inside = frames.iter().map(|frame| frame.tar_offset.get()).filter(|cut| tar.contains(cut));
            cuts.extend(inside.map(|cut| extent.plain_offset.get() + cut - tar.start));
        }
        cuts.sort_unstable();
        cuts.dedup();
        pieces.extend(cuts.windows(2).map(|cut| DedupPiece {
            plain_offset: cut[0].into(),
            len: (cut[1] - cut[0]).into(),
            digest: *Digest::of(&space[cut[0] as usize..cut[1] as usize]).as_bytes(),
        }));
    }
    pieces
}

impl TestLayer {
    /// A layer with these files, cut into frames after each of `frame_lens` (the last one repeats).
    pub(crate) fn new(files: &[TestFile], frame_lens: &[usize]) -> Self {
        LayerMaker { files, frame_lens, ..LayerMaker::default() }.make()
    }

    /// One file that fills `count` frames of `len` bytes, headers aside.
    pub(crate) fn of_frames(count: usize, len: usize) -> Self {
        Self::new(&[TestFile::of_len(count * len - 512)], &[len])
    }

    /// Like [`Self::new`], with `change` to alter what is compressed; the index promises the original.
    pub(crate) fn with_frames(
        files: &[TestFile],
        frame_lens: &[usize],
        change: impl Fn(usize, &[u8]) -> Vec<u8>,
    ) -> Self {
        LayerMaker { files, frame_lens, change: &change, ..LayerMaker::default() }.make()
    }

    /// Where a hot frame lies in the blob.
    pub(crate) fn hot_range(&self, frames: Range<usize>) -> Range<u64> {
        let start = self.lazy.index.range().end + 8;
        let len = |frames: &[HotFrame]| frames.iter().map(|frame| u64::from(frame.compressed_len.get())).sum::<u64>();
        start + len(&self.hot_frames[..frames.start])..start + len(&self.hot_frames[..frames.end])
    }

    /// The request that brings index and hot pack.
    pub(crate) fn opening_request(&self) -> Range<u64> {
        self.lazy.index.offset..self.lazy.hot_range().unwrap().end
    }

    /// The bytes that a read must return.
    pub(crate) fn expected(&self, plain: Range<u64>) -> &[u8] {
        &self.space[plain.start as usize..plain.end as usize]
    }

    /// The range of the plain space that frame `number` alone holds, of a layer with one file.
    pub(crate) fn plain_of_frame(&self, number: usize) -> Range<u64> {
        let tar = self.frames[number].tar_range();
        tar.start.saturating_sub(512)..(tar.end - 512).min(self.files[0].end)
    }

    /// The range of the blob that a request for these frames asks for.
    pub(crate) fn request_for(&self, frames: Range<usize>) -> Range<u64> {
        self.frames[frames.start].blob_offset.get()..self.frames[frames.end - 1].blob_range().end
    }

    pub(crate) fn index_request(&self) -> Range<u64> {
        self.lazy.index.range()
    }
}

/// What a source does to the next request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Refuses it.
    Refuse,
    /// Ends the answer with an error at this offset of the blob.
    BreakAt(u64),
    /// Ends the answer without an error at this offset of the blob.
    EndAt(u64),
    /// Changes the byte at this offset of the blob.
    FlipAt(u64),
}

/// A blob in memory.
#[derive(Debug)]
pub(crate) struct MemorySource {
    blob: Bytes,
    faults: Mutex<Vec<Fault>>,
    /// The error that answers every request.
    outage: Mutex<Option<SourceError>>,
    range_faults: Mutex<Vec<(Range<u64>, Fault)>>,
    requests: watch::Sender<Vec<Range<u64>>>,
    ended_count: watch::Sender<usize>,
    holds: watch::Sender<BTreeSet<u64>>,
    sends_whole: AtomicBool,
}

impl MemorySource {
    pub(crate) fn new(layer: &TestLayer) -> Arc<Self> {
        Arc::new(Self {
            blob: layer.blob.clone().into(),
            faults: Mutex::default(),
            outage: Mutex::default(),
            range_faults: Mutex::default(),
            requests: watch::Sender::default(),
            ended_count: watch::Sender::default(),
            holds: watch::Sender::default(),
            sends_whole: AtomicBool::new(false),
        })
    }

    /// One that sends all of its blob, whatever is asked for.
    pub(crate) fn sending_whole(layer: &TestLayer) -> Arc<Self> {
        let source = Self::new(layer);
        source.sends_whole.store(true, Ordering::Relaxed);
        source
    }

    /// The requests so far.
    pub(crate) fn requests(&self) -> Vec<Range<u64>> {
        self.requests.borrow().clone()
    }

    /// The requests for frames: all but the first one, which brings the index.
    pub(crate) fn frame_requests(&self) -> Vec<Range<u64>> {
        self.requests().split_off(1)
    }

    /// Like [`Self::frame_requests`], in blob order: for requests that are made at the same time.
    pub(crate) fn sorted_frame_requests(&self) -> Vec<Range<u64>> {
        let mut requests = self.frame_requests();
        requests.sort_by_key(|range| range.start);
        requests
    }

    /// The requests for frames when there are at least `count`.
    pub(crate) async fn wait_for_frame_requests(&self, count: usize) -> Vec<Range<u64>> {
        let mut receiver = self.requests.subscribe();
        let requests = receiver.wait_for(|requests| requests.len() > count).await.unwrap();
        requests[1..].to_vec()
    }

    /// Waits until the answers of `count` requests were dropped, whole or not.
    pub(crate) async fn wait_for_ended(&self, count: usize) {
        self.ended_count.subscribe().wait_for(|ended| *ended >= count).await.unwrap();
    }

    /// Each of the next requests meets one of `faults`.
    pub(crate) fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
    }

    /// Every request fails from now on, or none.
    pub(crate) fn set_outage(&self, error: Option<SourceError>) {
        *self.outage.lock().unwrap() = error;
    }

    /// The request for exactly this range meets a fault.
    pub(crate) fn fail_at(&self, range: &Range<u64>, fault: Fault) {
        self.range_faults.lock().unwrap().push((range.clone(), fault));
    }

    /// No answer passes this offset of the blob until [`Self::release`].
    pub(crate) fn hold_at(&self, offset: u64) {
        self.holds.send_modify(|holds| {
            holds.insert(offset);
        });
    }

    pub(crate) fn release(&self, offset: u64) {
        self.holds.send_modify(|holds| {
            holds.remove(&offset);
        });
    }
}

impl Source for MemorySource {
    fn origin(&self) -> Option<String> {
        None
    }

    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        /// Odd on purpose: pieces end nowhere near the frames.
        const PIECE_LEN: u64 = 7919;
        self.requests.send_modify(|requests| requests.push(range.clone()));
        if let Some(error) = self.outage.lock().unwrap().clone() {
            return async { Err(error) }.boxed();
        }
        let mut faults = self.faults.lock().unwrap();
        let fault = if faults.is_empty() { None } else { Some(faults.remove(0)) };
        drop(faults);
        let range_faults = self.range_faults.lock().unwrap();
        let fault = fault.or_else(|| range_faults.iter().find(|(faulty, _)| *faulty == range).map(|(_, fault)| *fault));
        drop(range_faults);
        let mut blob = self.blob.clone();
        let mut end = range.end;
        match fault {
            Some(Fault::Refuse) => return async { Err(SourceError::refused("refused")) }.boxed(),
            Some(Fault::FlipAt(offset)) => {
                let mut changed = blob.to_vec();
                changed[offset as usize] ^= 1;
                blob = changed.into();
            }
            Some(Fault::BreakAt(offset) | Fault::EndAt(offset)) => end = end.min(offset),
            None => {}
        }
        let holds = self.holds.subscribe();
        let ended = Ended(self.ended_count.clone());
        let answer = stream::unfold((range.start, holds, blob), move |(start, mut holds, blob)| async move {
            if start >= end {
                let is_broken = matches!(fault, Some(Fault::BreakAt(_))) && start == end;
                let error = is_broken.then(|| Err(SourceError::passing("broke off")));
                return error.map(|error| (error, (u64::MAX, holds, blob)));
            }
            holds.wait_for(|holds| !holds.contains(&start)).await.ok()?;
            let hold = holds.borrow().range(start..).next().copied().unwrap_or(u64::MAX);
            let piece_end = (start + PIECE_LEN).min(end).min(hold);
            let piece = blob.slice(start as usize..piece_end as usize);
            Some((Ok(piece), (piece_end, holds, blob)))
        });
        async { Ok(Box::pin(answer.inspect(move |_| ended.note_open())) as ByteStream) }.boxed()
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        let range = if self.sends_whole.load(Ordering::Relaxed) { 0..self.blob.len() as u64 } else { range };
        async move { Ok(WideStream { range: range.clone(), stream: self.fetch(range).await? }) }.boxed()
    }
}

/// Counts when it is dropped.
struct Ended(watch::Sender<usize>);

impl Ended {
    fn note_open(&self) {}
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count += 1);
    }
}

/// Options under which nothing is flushed by itself, failures come from the source at once, and are soon forgotten.
pub(crate) fn options() -> CacheOptions {
    let (pause_min, failure_memory) = (Duration::from_millis(10), Duration::from_millis(10));
    let requests = RequestOptions { pause_min, failure_memory, ..RequestOptions::default() };
    CacheOptions { requests, patience: None, flush_interval: Duration::from_secs(3600), ..CacheOptions::default() }
}

/// Options under which requests of one class wait for each other.
pub(crate) fn one_request_a_class() -> CacheOptions {
    let one = RequestLimits { node: 1, source: 1, layer: 1 };
    let requests = RequestOptions { read: one, hot: one, background: one, ..options().requests };
    CacheOptions { requests, ..options() }
}

/// Opens a cache on the runtime of the calling test.
pub(crate) fn open_cache(root: &Path) -> Cache {
    Cache::open(root, tokio::runtime::Handle::current(), options()).unwrap()
}

/// A layer in a fresh cache.
pub(crate) struct Fixture {
    pub(crate) layer: Layer,
    pub(crate) cache: Cache,
    pub(crate) source: Arc<MemorySource>,
    pub(crate) directory: tempfile::TempDir,
}

impl Fixture {
    pub(crate) async fn new(layer: &TestLayer) -> Self {
        Self::with_options(layer, options()).await
    }

    pub(crate) async fn with_options(layer: &TestLayer, options: CacheOptions) -> Self {
        Self::with_source(layer, MemorySource::new(layer), options).await
    }

    pub(crate) async fn with_source(layer: &TestLayer, source: Arc<MemorySource>, options: CacheOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), options).unwrap();
        let open = cache.layer(&layer.lazy, source.clone(), json!("test")).await.unwrap();
        Self { layer: open, cache, source, directory }
    }

    /// What a second process finds after a crash right now: a copy of the files as they are.
    pub(crate) fn crash(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        let copied = || {
            let mut cp = std::process::Command::new("cp");
            cp.args(["-a", "--sparse=always"]).arg(self.directory.path().join("layers")).arg(copy.path());
            cp.status().unwrap().success()
        };
        // A file that is renamed meanwhile ends a copy.
        let is_copied = (0..20).any(|_| copied());
        assert!(is_copied);
        copy
    }
}

/// Waits until a layer's start-up work has ended: its dedup section is kept then.
pub(crate) async fn wait_for_dedup(root: &Path, test: &TestLayer) {
    let dedup = root.join("layers").join(test.lazy.id().hex()).join("dedup");
    while !dedup.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The verdict on a layer when there is one.
pub(crate) async fn wait_for_verdict(layer: &Layer) -> Verdict {
    let give_up_at = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(verdict) = layer.verdict() {
            return verdict;
        }
        assert!(std::time::Instant::now() < give_up_at, "{:?}", layer.progress());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Reads a range and compares it.
pub(crate) async fn check_read(layer: &Layer, test: &TestLayer, plain: Range<u64>) {
    let bytes = layer.read_async(plain.start, (plain.end - plain.start) as usize).await.unwrap();
    assert!(bytes == test.expected(plain.clone()), "{plain:?} differs");
}
