//! The frames of a lazy blob as one plain stream, each compared with its digest before it is decompressed.

use std::{
    collections::VecDeque,
    io::{self, BufRead, Read},
    sync::mpsc::Receiver,
};

use bytes::{Buf as _, Bytes};
use format_spec::{Digest, DigestHasher, Frame};
use tar_index::walker::TarInput;

use super::{
    opening::{Opened, Openers, SpaceThread},
    report::{Findings, Part},
};
use crate::blob::stages::DigestThread;

/// Bytes that are hashed together at least.
const HASHED_LEN_MIN: usize = 256 << 10;

/// Reads a blob and knows where it is.
#[derive(Debug)]
pub(crate) struct BlobCursor<R> {
    blob: R,
    pub(crate) position: u64,
}

impl<R: BufRead> BlobCursor<R> {
    pub(crate) fn new(blob: R) -> Self {
        Self { blob, position: 0 }
    }

    /// The next `len` bytes; `len` is bounded by a limit of the format.
    pub(crate) fn read(&mut self, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.blob.by_ref().take(len).read_to_end(&mut bytes)?;
        self.position += bytes.len() as u64;
        if bytes.len() as u64 == len { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The digest of the next `len` bytes.
    pub(crate) fn digest(&mut self, len: u64) -> io::Result<Digest> {
        let mut hasher = DigestHasher::default();
        let mut left = len;
        while left > 0 {
            let piece = self.blob.fill_buf()?;
            let piece_len = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if piece_len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hasher.update(&piece[..piece_len]);
            self.blob.consume(piece_len);
            left -= piece_len as u64;
            self.position += piece_len as u64;
        }
        Ok(hasher.finish())
    }
}

/// The tar stream in the frames of a blob. Ends early, and says so, at the first frame that is wrong.
///
/// Frames are read ahead of who walks the stream, opened and hashed by other threads.
pub(crate) struct FrameStream<'scope, 'a, 'f, R> {
    pub(crate) blob: BlobCursor<R>,
    frames: &'a [Frame],
    openers: Openers,
    /// Frames that were read, and the number of the first of them.
    opening: VecDeque<Receiver<Opened>>,
    number: usize,
    /// Decompressed and not consumed.
    plain: Bytes,
    pub(crate) read_len: u64,
    pub(crate) tar_digest: DigestThread,
    pub(crate) space: SpaceThread<'scope, 'a>,
    pub(crate) findings: &'f mut Findings,
    /// The first frame that is wrong.
    pub(crate) broken: Option<usize>,
}

impl<'scope, 'a: 'scope, 'f, R: BufRead> FrameStream<'scope, 'a, 'f, R> {
    pub(crate) fn new(
        blob: R,
        frames: &'a [Frame],
        openers: Openers,
        space: SpaceThread<'scope, 'a>,
        findings: &'f mut Findings,
    ) -> Self {
        Self {
            blob: BlobCursor::new(blob),
            frames,
            openers,
            opening: VecDeque::new(),
            number: 0,
            plain: Bytes::new(),
            read_len: 0,
            tar_digest: DigestThread::new(HASHED_LEN_MIN),
            space,
            findings,
            broken: None,
        }
    }

    /// Reads on until enough frames are being opened; an error counts when those in front of it have been walked.
    fn read_ahead(&mut self) -> io::Result<()> {
        while self.opening.len() < self.openers.ahead_max {
            let Some(frame) = self.frames.get(self.number + self.opening.len()) else { break };
            match self.blob.read(frame.compressed_len.get().into()) {
                Ok(compressed) => self.opening.push_back(self.openers.open(compressed, frame)),
                Err(error) if self.opening.is_empty() => return Err(error),
                // The blob fails again.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// The next frame; empty where it is wrong, `None` behind the last one.
    fn next_frame(&mut self) -> io::Result<Option<Bytes>> {
        self.read_ahead()?;
        let Some(opened) = self.opening.pop_front() else { return Ok(None) };
        let number = self.number;
        self.number += 1;
        match opened.recv().map_err(|_| io::Error::other("a thread that opens frames ended abnormally"))? {
            Ok(plain) => Ok(Some(plain)),
            Err(problem) => {
                let range = self.frames[number].blob_range();
                let place = format!("frame {number}, bytes {}..{} of the blob", range.start, range.end);
                self.findings.add(Part::Frame, place, problem);
                self.broken.get_or_insert(number);
                Ok(Some(Bytes::new()))
            }
        }
    }

    /// Compares what is left of the frames with their digests.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        while let Some(plain) = self.next_frame()? {
            if self.broken.is_none() {
                self.note(&plain);
            }
        }
        Ok(())
    }

    fn note(&mut self, plain: &Bytes) {
        self.tar_digest.update(plain.clone());
        self.space.update(self.read_len, plain.clone());
        self.read_len += plain.len() as u64;
    }

    /// Makes `len` bytes available, or as many as there are.
    fn fill(&mut self, len: usize) -> io::Result<()> {
        while self.plain.len() < len {
            let Some(plain) = self.next_frame()? else { break };
            if let Some(broken) = self.broken {
                return Err(io::Error::other(format!("frame {broken} is damaged")));
            }
            self.note(&plain);
            self.plain = if self.plain.is_empty() { plain } else { [&self.plain[..], &plain[..]].concat().into() };
        }
        Ok(())
    }

    /// Consumes `len` bytes, or as many as there are.
    pub(crate) fn skip(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            self.fill(1)?;
            let part = self.plain.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if part == 0 {
                break;
            }
            self.plain.advance(part);
            left -= part as u64;
        }
        Ok(())
    }
}

impl<'scope, 'a: 'scope, R: BufRead> TarInput for FrameStream<'scope, 'a, '_, R> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill(len)?;
        Ok(&self.plain[..self.plain.len().min(len)])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.plain.advance(len);
        Ok(())
    }

    fn position(&self) -> u64 {
        self.read_len - self.plain.len() as u64
    }
}
