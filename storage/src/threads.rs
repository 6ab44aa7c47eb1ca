//! Threads, and what they may do to each other: the protocols of this crate, driven by the model checker `shuttle`.
//!
//! `shuttle` runs its threads one at a time and chooses at each lock and each atomic who goes on, again and again: by
//! chance, and with few changes, which finds what takes a long stay at one place. A thread that waits for ever is a
//! failure too. It drives the very code: with the feature `shuttle`, `sync.rs`
//! gives the modules its locks and atomics. Files are real ones, in memory where the system has such a directory. Not
//! looked at is what processors reorder: to `shuttle` every atomic is sequentially consistent.
//!
//! `cargo test --release -p storage --features shuttle --lib threads`

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests, of a few pages")]

use std::{
    fs,
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex as StdMutex},
    time::Duration,
};

use bytes::Bytes;
use format_spec::{
    Digest, Extent, Frame, HotFrame, HotPiece, IndexBuilder, LayerData, LazyLayer,
    builder::{BlobTail, blank_inode, implicit_directory},
    records::{PLAIN_ALIGN, hot_reason, mode},
};
use serde_json::Value;
use shuttle::thread;
use tempfile::TempDir;
use tokio::sync::Notify;

use crate::{
    disk::{
        Disk, Observer, Operation,
        bitmap::{Bitmap, empty},
        directory::LayerDirectory,
        frame_store::{FrameStore, UnkeptFrames},
        page_map::PageMap,
        presence::{Counts, Presence, PresenceBits},
        unpack::Unpacker,
    },
    fetch::{
        places::{Place, Places},
        rate::BestRate,
        scheduler::{Fetch, Outcome, Priority, RequestOptions, Scheduler},
        source::{FetchFuture, FetchWideFuture, Source, SourceError, WideStream},
        wait::Wait,
    },
    layer::Layer,
    layer_core::LayerCore,
    sync::{Mutex, lock},
    warm::{Event, hot_pack::HotStream},
};

/// Schedules of each check and kind.
const SCHEDULES: usize = 600;
/// Changes of a schedule with few.
const CHANGES: usize = 3;
const PAGE: usize = PLAIN_ALIGN as usize;
/// Of the tar stream: frames end in the middle of pages.
const FRAME_LEN: usize = PAGE * 3 / 2;
const HEADER_LEN: usize = 512;
/// Fills three frames with the header.
const FILE_LEN: usize = 3 * FRAME_LEN - HEADER_LEN;

/// A layer of one file, with a hot pack of its first two pages.
struct Model {
    tar: Vec<u8>,
    space: Vec<u8>,
    index: Vec<u8>,
    lazy: LazyLayer,
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let content: Vec<u8> = (1..=u8::MAX).cycle().take(FILE_LEN).collect();
    let tar = [vec![0; HEADER_LEN], content.clone()].concat();
    let mut space = content;
    space.resize(FILE_LEN.next_multiple_of(PAGE), 0);
    let number = |len: usize| u32::try_from(len).unwrap();
    let frames: Vec<_> = (0..tar.len() / FRAME_LEN)
        .map(|frame| Frame {
            blob_offset: ((frame * FRAME_LEN) as u64).into(),
            tar_offset: ((frame * FRAME_LEN) as u64).into(),
            compressed_len: number(FRAME_LEN).into(),
            plain_len: number(FRAME_LEN).into(),
            digest: [0; 32],
        })
        .collect();
    let extent =
        Extent { tar_offset: (HEADER_LEN as u64).into(), plain_offset: 0.into(), len: (FILE_LEN as u64).into() };
    let hot_frame = HotFrame { compressed_len: number(PAGE).into(), plain_len: number(PAGE).into(), digest: [0; 32] };
    let hot_piece =
        HotPiece { plain_offset: 0.into(), len: number(2 * PAGE).into(), reason: hot_reason::PROFILE.into() };
    let mut builder = IndexBuilder::default();
    builder.add_inode(implicit_directory()).unwrap();
    let mut inode = blank_inode(mode::REGULAR | 0o644);
    inode.size = (FILE_LEN as u64).into();
    let file = builder.add_inode(inode).unwrap();
    builder.add_directory(0, vec![("file".to_owned(), file)]).unwrap();
    let index = builder
        .finish_layer(&LayerData {
            tar_len: tar.len() as u64,
            space_len: space.len() as u64,
            extents: &[extent],
            frames: &frames,
            tail: BlobTail { hot_frames: &[hot_frame; 2], hot_pieces: &[hot_piece], dedup: &[] },
        })
        .unwrap();
    let lazy = LazyLayer {
        blob: Digest::of(&tar),
        blob_len: tar.len() as u64,
        index: index.location(tar.len() as u64),
        hot_len: 2 * PAGE as u64,
    };
    Model { tar, space, index: index.bytes, lazy }
});

impl Model {
    fn frame(&self, frame: u32) -> &[u8] {
        &self.tar[frame as usize * FRAME_LEN..][..FRAME_LEN]
    }

    fn pages(&self) -> Range<u64> {
        0..self.space.len() as u64 / PLAIN_ALIGN
    }

    fn page(&self, page: u64) -> &[u8] {
        &self.space[page as usize * PAGE..][..PAGE]
    }
}

/// A disk on which some syncs fail, and what it has of the file `data` for sure.
#[derive(Debug, Default)]
struct ModelDisk {
    data: StdMutex<Option<(u64, PathBuf, Vec<u8>)>>,
    /// Syncs of `data` that fail and lose what was written since the last one.
    failing: StdMutex<u32>,
}

impl Observer for ModelDisk {
    fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let mut data = self.data.lock().unwrap();
        match operation {
            Operation::Open { path, file, is_new: true } if path.ends_with("data") => {
                *data = Some((file, path.to_owned(), vec![0; MODEL.space.len()]));
            }
            Operation::Sync { file } => {
                let Some((_, path, durable)) = data.as_mut().filter(|data| data.0 == file) else { return Ok(()) };
                // A check is over when its directory is gone.
                let Ok(written) = fs::read(&path) else { return Ok(()) };
                let mut failing = self.failing.lock().unwrap();
                if *failing > 0 {
                    *failing -= 1;
                    fs::write(path, durable).unwrap();
                    return Err(io::Error::other("disk has lost what was written"));
                }
                *durable = written;
            }
            Operation::Rename { from, to } if to.ends_with("presence") => {
                let counts = Counts { frames: (MODEL.tar.len() / FRAME_LEN) as u64, pages: MODEL.pages().end };
                let bits = PresenceBits::decode(&fs::read(from).unwrap(), counts, &MODEL.lazy.index.digest).unwrap();
                let (_, _, durable) = data.as_ref().unwrap();
                for page in MODEL.pages().filter(|page| bits.pages[0] >> page & 1 == 1) {
                    let page_at = page as usize * PAGE;
                    assert!(
                        durable[page_at..][..PAGE] == *MODEL.page(page),
                        "page {page} has a bit and is not durable"
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The store of a layer of which nothing is there.
struct TestStore {
    disk: Arc<ModelDisk>,
    store: FrameStore,
    /// Goes last.
    root: TempDir,
}

impl TestStore {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let root = if memory.exists() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let observer = Arc::new(ModelDisk::default());
        let disk = Disk::observed(observer.clone());
        let unpacker = Unpacker::open(root.path().join("incoming"), disk.clone(), 1 << 30).unwrap();
        let mut received = unpacker.nameless().unwrap();
        received.write_all(&MODEL.index).unwrap();
        let new = unpacker.unpack(&mut received, &MODEL.lazy.index).unwrap_or_else(|_| panic!("index is made here"));
        let directory = LayerDirectory::new(root.path().join(MODEL.lazy.id().hex()), disk);
        directory.create().unwrap();
        let record = crate::disk::directory::LayerRecord::new(MODEL.lazy, Vec::new());
        let index = directory.place_index(&record, new).unwrap();
        let digest = MODEL.lazy.index.digest;
        let store = FrameStore::open(directory, index, digest, Arc::new(Notify::new()), Arc::default()).unwrap();
        Self { disk: observer, store, root }
    }

    /// A page, if it is there.
    fn read(&self, page: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE];
        let read = self.store.read_present(page * PLAIN_ALIGN, &mut bytes, &UnkeptFrames::new()).unwrap();
        read.map(|_| bytes)
    }

    fn write_frame(&self, frame: u32) {
        self.store.write_frame(frame, MODEL.frame(frame)).unwrap();
    }

    /// Every page that is said to be there is.
    fn check_pages(&self) {
        for page in MODEL.pages() {
            assert!(
                self.read(page).is_none_or(|bytes| bytes == MODEL.page(page)),
                "page {page} has a bit and no bytes"
            );
        }
    }
}

/// Runs the steps as threads, and waits for them.
fn together(steps: Vec<Box<dyn FnOnce() + Send>>) {
    let threads: Vec<_> = steps.into_iter().map(|step| thread::spawn(step)).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn check(body: fn()) {
    shuttle::check_random(body, SCHEDULES);
    shuttle::check_pct(body, SCHEDULES, CHANGES);
}

#[test]
fn bits_are_counted_once_whoever_sets_and_clears_them() {
    check(|| {
        let bitmap = Arc::new(Bitmap::new(empty(70)));
        let at = |work: fn(&Bitmap)| {
            let bitmap = bitmap.clone();
            Box::new(move || work(&bitmap)) as Box<dyn FnOnce() + Send>
        };
        together(vec![
            at(|bitmap| bitmap.set(0..67)),
            at(|bitmap| bitmap.set(60..70)),
            at(|bitmap| bitmap.clear_all(&[1 << 61, 1])),
        ]);
        let set = bitmap.snapshot().iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        assert_eq!(bitmap.set_count(), set);
        assert!(set >= 68);
    });
}

#[test]
fn a_page_of_several_frames_is_there_when_the_last_of_them_came() {
    check(|| {
        let test = TestStore::new();
        let index = test.store.directory().open_index().unwrap().unwrap();
        let map = Arc::new(PageMap::of(&index));
        let bits = PresenceBits::empty(Counts::of(&index, &map));
        let presence = Presence::new(&index, map, bits);
        let shared = Arc::new((index, presence));
        let note = |frame| {
            let shared = shared.clone();
            Box::new(move || shared.1.note_frame(&shared.0, frame)) as Box<dyn FnOnce() + Send>
        };
        together(vec![note(0), note(1), note(2)]);
        assert!(shared.1.is_complete(), "{:?}", shared.1);
    });
}

#[test]
fn who_sees_the_bit_sees_the_bytes() {
    check(|| {
        let test = Arc::new(TestStore::new());
        let (first, second, reader) = (test.clone(), test.clone(), test.clone());
        together(vec![
            Box::new(move || first.write_frame(0)),
            Box::new(move || {
                second.store.write_pages(PLAIN_ALIGN, &MODEL.space[PAGE..2 * PAGE]).unwrap();
                second.write_frame(1);
                second.write_frame(2);
            }),
            Box::new(move || reader.check_pages()),
        ]);
        test.check_pages();
        assert!(test.store.is_complete());
    });
}

#[test]
fn a_flush_speaks_of_what_is_durable() {
    check(|| {
        let test = Arc::new(TestStore::new());
        let (writer, flusher) = (test.clone(), test.clone());
        together(vec![
            Box::new(move || (0..3).for_each(|frame| writer.write_frame(frame))),
            Box::new(move || (0..2).for_each(|_| flusher.store.flush().unwrap())),
        ]);
        test.store.flush().unwrap();
        assert!(test.store.is_sealed());
    });
}

#[test]
fn what_a_disk_has_lost_is_missing_also_when_it_is_being_said_to_be_there() {
    check(|| {
        let test = Arc::new(TestStore::new());
        *test.disk.failing.lock().unwrap() = 1;
        let (writer, copier, flusher) = (test.clone(), test.clone(), test.clone());
        together(vec![
            Box::new(move || writer.write_frame(2)),
            Box::new(move || {
                let epoch = copier.store.epoch();
                copier.store.write_bytes(0, &MODEL.space[..FRAME_LEN]).unwrap();
                let written_until = |offset| (offset < FRAME_LEN as u64).then_some(FRAME_LEN as u64);
                copier.store.note_written(epoch, &(0..FRAME_LEN as u64), written_until);
            }),
            Box::new(move || drop(flusher.store.flush())),
        ]);
        test.check_pages();
    });
}

#[test]
fn a_reader_of_a_file_that_is_replaced_sees_no_hole_where_content_was() {
    check(|| {
        let test = Arc::new(TestStore::new());
        (0..3).for_each(|frame| test.write_frame(frame));
        test.store.flush().unwrap();
        let data = fs::OpenOptions::new().write(true).open(test.store.directory().data_path()).unwrap();
        data.write_all_at(b"damage", 0).unwrap();
        let damaged = test.store.find_damaged(&(0..PLAIN_ALIGN)).unwrap();
        assert_eq!(damaged, [0]);
        let (healer, reader) = (test.clone(), test.clone());
        together(vec![
            Box::new(move || healer.store.heal(&damaged).unwrap()),
            Box::new(move || {
                for _ in 0..2 {
                    assert!(reader.read(0).is_none_or(|bytes| bytes[..6] == *b"damage"));
                    assert_eq!(reader.read(1).unwrap_or_else(|| MODEL.page(1).to_vec()), MODEL.page(1));
                }
            }),
        ]);
        assert_eq!(test.read(0), None);
        test.write_frame(0);
        test.check_pages();
        assert!(test.store.is_complete());
    });
}

/// Notes how often it was called back, and with what.
#[derive(Default)]
struct Answers(Mutex<Vec<Option<UnkeptFrames>>>);

fn wait_into(answers: &Arc<Answers>) -> Arc<Wait> {
    let answers = answers.clone();
    Wait::new(MODEL.lazy.blob, None, move |arrived| lock(&answers.0).push(arrived.ok()))
}

#[test]
fn a_wait_ends_once_and_with_everything_that_came() {
    check(|| {
        let answers = Arc::new(Answers::default());
        let wait = wait_into(&answers);
        let arrive = |frame: u32| {
            let wait = wait.clone();
            wait.add_part();
            Box::new(move || wait.frame_arrived(frame, Some(Bytes::new()))) as Box<dyn FnOnce() + Send>
        };
        let mut steps = vec![arrive(1), arrive(2)];
        steps.push(Box::new(move || wait.end_of_parts()));
        together(steps);
        let answers = lock(&answers.0);
        let mut frames: Vec<_> = answers.iter().flatten().flatten().map(|(frame, _)| *frame).collect();
        frames.sort_unstable();
        assert_eq!((answers.len(), frames), (1, vec![1, 2]));
    });
}

#[test]
fn nobody_waits_for_a_hot_pack_that_has_ended() {
    check(|| {
        let test = TestStore::new();
        let stream = HotStream::of_all(test.store.index()).unwrap();
        let answers = Arc::new(Answers::default());
        let (sender, reader, waiting) = (stream.clone(), stream, answers.clone());
        together(vec![
            Box::new(move || {
                sender.note_kept(1);
                sender.end().iter().for_each(|(_, wait)| wait.part_ended());
            }),
            Box::new(move || {
                let wait = wait_into(&waiting);
                (0..2).for_each(|frame| reader.join(frame, &wait));
                wait.end_of_parts();
            }),
        ]);
        assert_eq!(*lock(&answers.0), [Some(vec![])]);
    });
}

/// Answers nothing: requests are made up by [`bring_frames`].
struct NoSource;

impl Source for NoSource {
    fn origin(&self) -> Option<String> {
        None
    }

    fn fetch(&self, _: Range<u64>) -> FetchFuture<'_> {
        Box::pin(async { Err(SourceError::passing("no source")) })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        WideStream::exact(range.clone(), self.fetch(range))
    }
}

/// A request that brings its frames, as `transfer.rs` would.
fn bring_frames(scheduler: &Arc<Scheduler>, layer: Arc<LayerCore>, _: Arc<Place>, fetch: Fetch) {
    let scheduler = scheduler.clone();
    thread::spawn(move || {
        for frame in fetch.frames {
            if let Some(in_flight) = scheduler.receive(fetch.request, &layer, frame) {
                layer.store.write_frame(frame, MODEL.frame(frame)).unwrap();
                in_flight.arrived(None);
            }
        }
        scheduler.end(fetch.request, Outcome::Done);
    });
}

#[test]
fn a_read_is_answered_whatever_it_waits_for() {
    check(|| {
        // Nothing runs on it: callbacks come from the threads of the check.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let handle = runtime.handle().clone();
        let patience = Some(Duration::from_secs(3600));
        let scheduler = Scheduler::new(handle.clone(), RequestOptions::default(), patience, bring_frames);
        let TestStore { store, root, .. } = TestStore::new();
        let (source, description, owner) = (Arc::new(NoSource), Value::Null, String::new());
        let best_rate = BestRate::default();
        let place = Place { number: 0, layer: MODEL.lazy, source, description, owner, best_rate };
        let places = Places::new(place, false);
        scheduler.add_layer(1, MODEL.lazy.blob, &places);
        let layer = Layer::new(LayerCore::new(1, MODEL.lazy, store, places, handle, 0), scheduler);
        layer.inner().note_warm(Event::SearchBegins);
        let (sender, receiver) = shuttle::sync::mpsc::channel();
        let read = |plain: Range<u64>| {
            let (layer, sender) = (layer.clone(), sender.clone());
            Box::new(move || {
                let (core, wanted) = (layer.core().clone(), plain.clone());
                let done = move |arrived: Result<UnkeptFrames, _>| {
                    assert!(arrived.is_ok());
                    sender.send(core.store.has(&wanted)).unwrap();
                };
                layer.inner().bring(plain, Priority::Read, Box::new(done));
            }) as Box<dyn FnOnce() + Send>
        };
        let space_len = MODEL.space.len() as u64;
        let mut steps = vec![read(0..PLAIN_ALIGN), read(PLAIN_ALIGN..space_len)];
        let searching = layer.clone();
        steps.push(Box::new(move || {
            let waits = searching.inner().note_warm(Event::Found(None, None));
            waits.iter().for_each(|wait| wait.part_ended());
        }));
        together(steps);
        assert_eq!([receiver.recv(), receiver.recv()], [Ok(true), Ok(true)]);
        drop((layer, runtime, root));
    });
}
