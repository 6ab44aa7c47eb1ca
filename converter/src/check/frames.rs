//! The frames of a lazy blob as one plain stream, each compared with its digest before it is decompressed.

use std::io::{self, BufRead, Read};

use format_spec::{Digest, DigestHasher, Frame};
use tar_index::walker::TarInput;
use zstd::zstd_safe;

use super::{
    report::{Findings, Part},
    space::SpaceHasher,
};

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

/// Compares a compressed frame with its record, and decompresses it.
///
/// # Errors
///
/// What is wrong with it.
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

/// The tar stream in the frames of a blob. Ends early, and says so, at the first frame that is wrong.
pub(crate) struct FrameStream<'a, 'f, R> {
    pub(crate) blob: BlobCursor<R>,
    frames: &'a [Frame],
    next: usize,
    /// Decompressed, and consumed up to `consumed`.
    plain: Vec<u8>,
    consumed: usize,
    pub(crate) read_len: u64,
    pub(crate) tar_hasher: DigestHasher,
    pub(crate) space: SpaceHasher<'a>,
    pub(crate) findings: &'f mut Findings,
    /// The first frame that is wrong.
    pub(crate) broken: Option<usize>,
}

impl<'a, 'f, R: BufRead> FrameStream<'a, 'f, R> {
    pub(crate) fn new(blob: R, frames: &'a [Frame], space: SpaceHasher<'a>, findings: &'f mut Findings) -> Self {
        Self {
            blob: BlobCursor::new(blob),
            frames,
            next: 0,
            plain: Vec::new(),
            consumed: 0,
            read_len: 0,
            tar_hasher: DigestHasher::default(),
            space,
            findings,
            broken: None,
        }
    }

    /// Reads the next frame; `None` behind the last one.
    fn next_frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(frame) = self.frames.get(self.next) else { return Ok(None) };
        let compressed = self.blob.read(frame.compressed_len.get().into())?;
        let number = self.next;
        self.next += 1;
        match open_frame(&compressed, frame.digest(), frame.plain_len.get()) {
            Ok(plain) => Ok(Some(plain)),
            Err(problem) => {
                let range = frame.blob_range();
                let place = format!("frame {number}, bytes {}..{} of the blob", range.start, range.end);
                self.findings.add(Part::Frame, place, problem);
                self.broken.get_or_insert(number);
                Ok(Some(Vec::new()))
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

    fn note(&mut self, plain: &[u8]) {
        self.tar_hasher.update(plain);
        self.space.update(self.read_len, plain);
        self.read_len += plain.len() as u64;
    }

    /// Makes `len` bytes available, or as many as there are.
    fn fill(&mut self, len: usize) -> io::Result<()> {
        while self.plain.len() - self.consumed < len {
            let Some(plain) = self.next_frame()? else { break };
            if let Some(broken) = self.broken {
                return Err(io::Error::other(format!("frame {broken} is damaged")));
            }
            self.note(&plain);
            self.plain.drain(..self.consumed);
            self.consumed = 0;
            self.plain.extend(plain);
        }
        Ok(())
    }

    /// Consumes `len` bytes, or as many as there are.
    pub(crate) fn skip(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            self.fill(1)?;
            let available = self.plain.len() - self.consumed;
            let part = available.min(usize::try_from(left).unwrap_or(usize::MAX));
            if part == 0 {
                break;
            }
            self.consumed += part;
            left -= part as u64;
        }
        Ok(())
    }
}

impl<R: BufRead> TarInput for FrameStream<'_, '_, R> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill(len)?;
        let end = self.plain.len().min(self.consumed + len);
        Ok(&self.plain[self.consumed..end])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.consumed += len;
        Ok(())
    }

    fn position(&self) -> u64 {
        self.read_len - (self.plain.len() - self.consumed) as u64
    }
}
