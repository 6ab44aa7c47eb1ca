//! The threads beside a pass over a lazy layer: they open its frames, and hash what ranges of its content hold.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{Scope, ScopedJoinHandle, available_parallelism},
};

use bytes::Bytes;
use format_spec::{Digest, Frame};
use zstd::zstd_safe;

use super::space::SpaceHasher;

/// Most threads that open frames of one layer: together they are faster than one thread hashes a tar stream.
const OPENERS_MAX: usize = 2;
/// Runs of the tar stream that wait to be hashed.
const RUNS_WAITING_MAX: usize = 2;

/// A frame's plain bytes, or what is wrong with it.
pub(crate) type Opened = Result<Bytes, String>;

/// Compares a compressed frame with its record, and decompresses it.
///
/// # Errors
///
/// Says how it differs from its record.
pub(crate) fn open_frame(compressed: &[u8], digest: Digest, plain_len: u32) -> Result<Vec<u8>, String> {
    let found = Digest::of(compressed);
    if found != digest {
        return Err(format!("its digest is {found}, the index says {digest}"));
    }
    if zstd_safe::find_frame_compressed_size(compressed) != Ok(compressed.len()) {
        return Err("it is not one complete zstd frame".to_owned());
    }
    if zstd_safe::get_dict_id_from_frame(compressed).is_some() {
        return Err("it needs a dictionary".to_owned());
    }
    match zstd_safe::get_frame_content_size(compressed) {
        Ok(Some(len)) if len == u64::from(plain_len) => {}
        Ok(Some(len)) => return Err(format!("its header says {len} plain bytes, the index says {plain_len}")),
        Ok(None) | Err(_) => return Err("its header does not say how long its content is".to_owned()),
    }
    // A frame of no bytes would be one of unknown length to zstd's bulk interface; records forbid it.
    let plain = zstd::bulk::decompress(compressed, plain_len as usize).map_err(|error| format!("zstd: {error}"))?;
    let is_complete = plain.len() == plain_len as usize;
    if is_complete { Ok(plain) } else { Err(format!("it has {} plain bytes, the index says {plain_len}", plain.len())) }
}

/// Opens frames side by side.
#[derive(Debug)]
pub(crate) struct Openers {
    jobs: Sender<Job>,
    /// Frames that are read ahead: one for each thread, and one that is walked.
    pub(crate) ahead_max: usize,
}

#[derive(Debug)]
struct Job {
    compressed: Vec<u8>,
    digest: Digest,
    plain_len: u32,
    opened: SyncSender<Opened>,
}

impl Openers {
    /// Starts threads of `scope`, which end when this is dropped.
    pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>) -> Self {
        let count = available_parallelism().map_or(1, |count| count.get().min(OPENERS_MAX));
        let (jobs, waiting) = channel();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..count {
            let waiting = Arc::clone(&waiting);
            scope.spawn(move || open_frames(&waiting));
        }
        Self { jobs, ahead_max: count + 1 }
    }

    /// Has a frame opened; what comes of it can be waited for.
    pub(crate) fn open(&self, compressed: Vec<u8>, frame: &Frame) -> Receiver<Opened> {
        let (opened, receiver) = sync_channel(1);
        let job = Job { compressed, digest: frame.digest(), plain_len: frame.plain_len.get(), opened };
        self.jobs.send(job).expect("the threads listen until this is dropped");
        receiver
    }
}

fn open_frames(waiting: &Mutex<Receiver<Job>>) {
    loop {
        let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { compressed, digest, plain_len, opened }) = job else { return };
        // Nobody waits where the blob could not be read on.
        let _ = opened.send(open_frame(&compressed, digest, plain_len).map(Bytes::from));
    }
}

/// A [`SpaceHasher`] on a thread of its own.
pub(crate) struct SpaceThread<'scope, 'a> {
    runs: SyncSender<(u64, Bytes)>,
    thread: ScopedJoinHandle<'scope, SpaceHasher<'a>>,
}

impl<'scope, 'a: 'scope> SpaceThread<'scope, 'a> {
    /// Goes on with `hasher` on a thread of `scope`.
    pub(crate) fn start(scope: &'scope Scope<'scope, '_>, mut hasher: SpaceHasher<'a>) -> Self {
        let (runs, waiting) = sync_channel::<(u64, Bytes)>(RUNS_WAITING_MAX);
        let thread = scope.spawn(move || {
            waiting.iter().for_each(|(tar_offset, bytes)| hasher.update(tar_offset, &bytes));
            hasher
        });
        Self { runs, thread }
    }

    /// As [`SpaceHasher::update`].
    pub(crate) fn update(&self, tar_offset: u64, bytes: Bytes) {
        self.runs.send((tar_offset, bytes)).expect("the thread listens until this is dropped");
    }

    /// The hasher that has seen everything.
    pub(crate) fn into_hasher(self) -> SpaceHasher<'a> {
        drop(self.runs);
        self.thread.join().expect("hashing does not panic")
    }
}
