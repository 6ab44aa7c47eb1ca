//! The plain tar stream on its way through the walker, cut into frames without copying what is in them.
//!
//! Bytes are read straight into the buffer that becomes the frame. Buffers come from a pool of fixed size, which
//! bounds the memory of a conversion: who needs one waits until a frame is written.

use std::{
    collections::VecDeque,
    io::{self, Read},
    ops::Range,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use bytes::Bytes;
use tar_index::walker::TarInput;

/// Most bytes asked of the source at once.
const READ_LEN: usize = 128 << 10;

/// Lends a fixed number of buffers. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct BufferPool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    /// Longest frame that a buffer holds, in bytes.
    frame_max: usize,
    /// Buffers at hand, and how many may still be allocated.
    state: Mutex<(Vec<Box<[u8]>>, usize)>,
    returned: Condvar,
}

impl BufferPool {
    /// Lends up to `buffer_count` buffers for frames of up to `frame_max` bytes.
    pub(crate) fn new(buffer_count: usize, frame_max: usize) -> Self {
        Self(Arc::new(Pool { frame_max, state: Mutex::new((Vec::new(), buffer_count)), returned: Condvar::new() }))
    }

    /// Waits for a buffer.
    fn take(&self) -> Buffer {
        let state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_empty = |state: &mut (Vec<Box<[u8]>>, usize)| state.0.is_empty() && state.1 == 0;
        let mut state = self.0.returned.wait_while(state, is_empty).unwrap_or_else(PoisonError::into_inner);
        let bytes = state.0.pop().unwrap_or_else(|| {
            state.1 -= 1;
            // What is consumed may exceed a frame by one read, and one more may lie behind that.
            vec![0; self.0.frame_max + 2 * READ_LEN].into()
        });
        Buffer { bytes, pool: self.clone() }
    }
}

/// A buffer that returns to its pool when dropped.
#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    pool: BufferPool,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let pool = &self.pool.0;
        pool.state.lock().unwrap_or_else(PoisonError::into_inner).0.push(std::mem::take(&mut self.bytes));
        pool.returned.notify_one();
    }
}

/// The plain bytes of one frame.
#[derive(Debug)]
pub(crate) struct PlainFrame {
    /// They return their buffer to its pool when nobody holds them any more.
    pub(crate) bytes: Bytes,
    /// Where in it content of files stands, each file by itself.
    pub(crate) contents: Vec<Range<usize>>,
}

/// A buffer of which the first bytes are a frame.
struct FilledBuffer {
    buffer: Buffer,
    len: usize,
}

impl AsRef<[u8]> for FilledBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.buffer.bytes[..self.len]
    }
}

/// A plain stream that is read and cut at the same time; `sink` takes the frames in order.
pub(crate) struct PlainStream<R, S> {
    source: R,
    sink: S,
    pool: BufferPool,
    /// Holds the stream from `frame_start` on.
    buffer: Buffer,
    frame_start: u64,
    /// Content of files from `frame_start` on, as positions of the stream.
    contents: VecDeque<Range<u64>>,
    /// How much of the buffer the walker has consumed, and how much is filled.
    consumed: usize,
    filled: usize,
    is_at_end: bool,
}

impl<R: Read, S: FnMut(PlainFrame) -> io::Result<()>> PlainStream<R, S> {
    pub(crate) fn new(source: R, pool: &BufferPool, sink: S) -> Self {
        let buffer = pool.take();
        Self {
            source,
            sink,
            pool: pool.clone(),
            buffer,
            frame_start: 0,
            contents: VecDeque::new(),
            consumed: 0,
            filled: 0,
            is_at_end: false,
        }
    }

    /// Says that `content` of the stream, which follows what was said before, is content of a file.
    pub(crate) fn mark_content(&mut self, content: Range<u64>) {
        if !content.is_empty() {
            self.contents.push_back(content);
        }
    }

    /// Takes the content that stands in the current frame when that ends at `end`.
    fn take_contents(&mut self, end: u64) -> Vec<Range<usize>> {
        let start = self.frame_start;
        let place = |position: u64| usize::try_from(position - start).expect("the buffer holds it");
        let mut taken = Vec::new();
        while let Some(content) = self.contents.front().filter(|content| content.start < end).cloned() {
            self.contents.pop_front();
            taken.push(place(content.start)..place(content.end.min(end)));
            if content.end > end {
                self.contents.push_front(end..content.end);
            }
        }
        taken
    }

    /// Ends the current frame at `position` of the stream, which lies in what it has consumed; an empty
    /// frame stays open.
    pub(crate) fn cut_at(&mut self, position: u64) -> io::Result<()> {
        let len = usize::try_from(position - self.frame_start).expect("the buffer holds it");
        debug_assert!(len <= self.consumed);
        if len == 0 {
            return Ok(());
        }
        let contents = self.take_contents(position);
        let mut next = self.pool.take();
        let rest = &self.buffer.bytes[len..self.filled];
        next.bytes[..rest.len()].copy_from_slice(rest);
        let buffer = std::mem::replace(&mut self.buffer, next);
        self.frame_start = position;
        self.consumed -= len;
        self.filled -= len;
        (self.sink)(PlainFrame { bytes: Bytes::from_owner(FilledBuffer { buffer, len }), contents })
    }

    /// Length of the current frame as far as it is consumed.
    pub(crate) fn frame_len(&self) -> u64 {
        self.consumed as u64
    }

    /// Consumes `len` bytes; returns how many there were before the stream ended.
    pub(crate) fn skip(&mut self, len: u64) -> io::Result<u64> {
        let mut skipped = 0;
        while skipped < len {
            let wanted = usize::try_from(len - skipped).map_or(READ_LEN, |wanted| wanted.min(READ_LEN));
            let found = self.peek(wanted)?.len();
            if found == 0 {
                break;
            }
            self.consume(found)?;
            skipped += found as u64;
        }
        Ok(skipped)
    }

    /// Consumes everything up to the end of the stream and ends the last frame there; returns the stream's length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.skip(u64::MAX)?;
        let end = self.position();
        self.cut_at(end)?;
        Ok(end)
    }
}

impl<R: Read, S: FnMut(PlainFrame) -> io::Result<()>> TarInput for PlainStream<R, S> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        debug_assert!(len <= READ_LEN || self.consumed == 0, "more can only be seen from the start of a frame");
        let buffer_len = self.buffer.bytes.len();
        let len = len.min(buffer_len - self.consumed);
        while self.filled - self.consumed < len && !self.is_at_end {
            let end = buffer_len.min(self.filled + READ_LEN);
            match self.source.read(&mut self.buffer.bytes[self.filled..end]) {
                Ok(0) => self.is_at_end = true,
                Ok(read_len) => self.filled += read_len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&self.buffer.bytes[self.consumed..self.filled.min(self.consumed + len)])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        debug_assert!(len <= self.filled - self.consumed);
        self.consumed += len;
        let frame_max = self.pool.0.frame_max;
        if self.consumed >= frame_max {
            self.cut_at(self.frame_start + frame_max as u64)?;
        }
        Ok(())
    }

    fn position(&self) -> u64 {
        self.frame_start + self.consumed as u64
    }
}
