//! The threads that compress frames, shared by all layers of a conversion.
//!
//! Frames of one layer come back in any order; whoever sent them puts them in order again.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use format_spec::Digest;
use zstd::zstd_safe::CParameter;

use crate::layer::{
    framer::FrameSizes,
    plain::{BufferPool, PlainFrame},
};

/// Most compressor threads: the decompressors of all layers cannot keep more busy, and each holds up to three frames.
pub const JOBS_MAX: usize = 16;

/// Changes whenever equal options begin to make other frames: what was converted before is then converted again.
pub(crate) const FRAMES_GENERATION: u32 = 3;
/// Logarithm of the entries that zstd's table of long matches has at the default level: half of what it takes by
/// itself, so that both tables fit into a core's cache. An eighth faster for 0.7 % more bytes.
const HASH_LOG: u32 = 16;

/// How frames are made: all that the result depends on, beside the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameOptions {
    /// zstd level.
    pub level: i32,
    /// Where they end.
    pub sizes: FrameSizes,
}

impl FrameOptions {
    /// The level that `docs/MEASUREMENTS.md` found to be worth its time.
    pub const DEFAULT_LEVEL: i32 = 3;
}

impl Default for FrameOptions {
    fn default() -> Self {
        Self { level: Self::DEFAULT_LEVEL, sizes: FrameSizes::default() }
    }
}

/// A pool of compressor threads. Dropping it ends them.
#[derive(Debug)]
pub struct Compressor {
    options: FrameOptions,
    jobs: Sender<Job>,
    buffers: BufferPool,
}

struct Job {
    sequence: u64,
    plain: PlainFrame,
    done: Sender<CompressedFrame>,
}

/// A frame that comes back.
#[derive(Debug)]
pub(crate) struct CompressedFrame {
    /// Its place among the frames of its layer.
    pub(crate) sequence: u64,
    pub(crate) plain: PlainFrame,
    /// Digests of the content of files in it, as [`PlainFrame::contents`].
    pub(crate) contents: Vec<Digest>,
    /// The zstd frame and its digest.
    pub(crate) compressed: io::Result<(Vec<u8>, Digest)>,
}

impl Compressor {
    /// Starts `job_count` threads that make frames as `options` say, for at most `layer_count` layers at a time.
    ///
    /// # Errors
    ///
    /// When the level is unknown or the system has no threads left.
    pub fn new(options: &FrameOptions, job_count: usize, layer_count: usize) -> io::Result<Self> {
        let job_count = job_count.clamp(1, JOBS_MAX);
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..job_count {
            let mut compressor = new_context(options.level)?;
            let receiver = Arc::clone(&receiver);
            thread::Builder::new().name("compress".to_owned()).spawn(move || work(&mut compressor, &receiver))?;
        }
        // One is being filled in each layer; the others wait to be compressed, are compressed, or wait to be written.
        let buffers = BufferPool::new(layer_count + 2 * job_count + 2, options.sizes.frame_max());
        Ok(Self { options: *options, jobs, buffers })
    }

    /// A context of the caller's own, that compresses as the threads do.
    pub(crate) fn context(&self) -> io::Result<zstd::bulk::Compressor<'static>> {
        new_context(self.options.level)
    }

    pub(crate) fn sizes(&self) -> FrameSizes {
        self.options.sizes
    }

    pub(crate) fn buffers(&self) -> &BufferPool {
        &self.buffers
    }

    pub(crate) fn compress(&self, sequence: u64, plain: PlainFrame, done: Sender<CompressedFrame>) -> io::Result<()> {
        self.jobs.send(Job { sequence, plain, done }).map_err(|_| io::Error::other("the compressor threads are gone"))
    }
}

/// Content size yes, checksum no: the index has a better one. No dictionary.
fn new_context(level: i32) -> io::Result<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    if level == FrameOptions::DEFAULT_LEVEL {
        compressor.set_parameter(CParameter::HashLog(HASH_LOG))?;
    }
    compressor.include_checksum(false)?;
    compressor.include_contentsize(true)?;
    compressor.include_dictid(false)?;
    Ok(compressor)
}

fn work(compressor: &mut zstd::bulk::Compressor<'_>, receiver: &Mutex<Receiver<Job>>) {
    let mut scratch = Vec::new();
    loop {
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { sequence, plain, done }) = job else { return };
        scratch.clear();
        scratch.reserve(zstd::zstd_safe::compress_bound(plain.bytes.len()));
        let compressed = compressor.compress_to_buffer(&plain.bytes[..], &mut scratch).map(|_| {
            let digest = Digest::of(&scratch);
            (scratch.as_slice().to_vec(), digest)
        });
        let contents = plain.contents.iter().map(|content| Digest::of(&plain.bytes[content.clone()])).collect();
        // A layer that failed meanwhile no longer listens.
        let _ = done.send(CompressedFrame { sequence, plain, contents, compressed });
    }
}
