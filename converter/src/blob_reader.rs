//! A source blob as it streams in: its digest and length are checked on the way, its compression is
//! detected by its first bytes.

use std::io::{self, BufRead, Read};

use bytes::{Buf, Bytes};
use format_spec::{Digest, DigestHasher};

pub(crate) const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
pub(crate) const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528u32.to_le_bytes();
/// Magic numbers of zstd's skippable frames, but for their last four bits.
const ZSTD_SKIPPABLE_MAGIC: u32 = 0x184D_2A50;
/// What the compression is told by.
const MAGIC_LEN: usize = 4;

/// A blob did not arrive as its descriptor says.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BlobError {
    /// The source gave up.
    #[error("{0}")]
    Source(String),
    /// Other content than named.
    #[error("its content has digest {0}: the source is damaged")]
    Digest(Digest),
    /// Too short.
    #[error("it ends after {found} of {expected} bytes: the source is damaged")]
    Truncated {
        /// Length by the descriptor.
        expected: u64,
        /// Length found.
        found: u64,
    },
    /// Too long.
    #[error("it is longer than the {0} bytes that its descriptor says")]
    TooLong(u64),
}

/// Reads a blob from pieces of any length.
#[derive(Debug)]
pub struct BlobReader<P> {
    pieces: P,
    piece: Bytes,
    digest: Digest,
    len: u64,
    hasher: DigestHasher,
    read_len: u64,
    is_at_end: bool,
    failure: Option<BlobError>,
}

impl<P: Iterator<Item = Result<Bytes, String>>> BlobReader<P> {
    /// A blob that shall have `len` bytes and hash to `digest`.
    pub fn new(pieces: P, digest: Digest, len: u64) -> Self {
        Self {
            pieces,
            piece: Bytes::new(),
            digest,
            len,
            hasher: DigestHasher::default(),
            read_len: 0,
            is_at_end: false,
            failure: None,
        }
    }

    /// The next piece of the blob, hashed; empty at the end.
    fn next_piece(&mut self) -> Result<Bytes, BlobError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        while !self.is_at_end {
            match self.pieces.next() {
                None => self.is_at_end = true,
                Some(Err(message)) => return self.fail(BlobError::Source(message)),
                Some(Ok(piece)) if piece.is_empty() => {}
                Some(Ok(piece)) => {
                    self.read_len += piece.len() as u64;
                    if self.read_len > self.len {
                        return self.fail(BlobError::TooLong(self.len));
                    }
                    self.hasher.update(&piece);
                    return Ok(piece);
                }
            }
        }
        Ok(Bytes::new())
    }

    fn fail<T>(&mut self, error: BlobError) -> Result<T, BlobError> {
        self.failure = Some(error.clone());
        Err(error)
    }

    /// Reads the rest of the blob and compares length and digest.
    ///
    /// # Errors
    ///
    /// When the blob is not what its descriptor says.
    pub fn finish(&mut self) -> Result<(), BlobError> {
        while !self.next_piece()?.is_empty() {}
        if self.read_len < self.len {
            return self.fail(BlobError::Truncated { expected: self.len, found: self.read_len });
        }
        let found = self.hasher.clone().finish();
        if found == self.digest { Ok(()) } else { self.fail(BlobError::Digest(found)) }
    }

    /// The plain stream in the blob: gzip of any number of members, zstd of any number of frames, or bare.
    ///
    /// # Errors
    ///
    /// When the first bytes cannot be read.
    pub fn decompress(&mut self) -> io::Result<Box<dyn Read + '_>> {
        while self.piece.len() < MAGIC_LEN {
            let next = self.next_piece().map_err(io::Error::other)?;
            if next.is_empty() {
                break;
            }
            self.piece = if self.piece.is_empty() { next } else { [&self.piece[..], &next[..]].concat().into() };
        }
        let start = self.piece.first_chunk::<MAGIC_LEN>().copied().unwrap_or_default();
        let is_skippable = u32::from_le_bytes(start) & !0xf == ZSTD_SKIPPABLE_MAGIC;
        Ok(if self.piece.starts_with(&GZIP_MAGIC) {
            Box::new(flate2::bufread::MultiGzDecoder::new(self))
        } else if start == ZSTD_MAGIC || is_skippable {
            Box::new(zstd::stream::read::Decoder::with_buffer(self)?)
        } else {
            Box::new(self)
        })
    }
}

impl<P: Iterator<Item = Result<Bytes, String>>> BufRead for BlobReader<P> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.piece.is_empty() {
            self.piece = self.next_piece().map_err(io::Error::other)?;
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, len: usize) {
        self.piece.advance(len);
    }
}

impl<P: Iterator<Item = Result<Bytes, String>>> Read for BlobReader<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.fill_buf()?.read(buffer)?;
        self.consume(len);
        Ok(len)
    }
}
