//! A source blob as it streams in: its digest and length are checked on the way, its compression is
//! detected by its first bytes. The digest is made on a thread of its own.

use std::{
    io::{self, BufRead, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Buf, Bytes};
use format_spec::Digest;

use crate::blob::stages::DigestThread;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528u32.to_le_bytes();
/// Magic numbers of zstd's skippable frames, but for their last four bits.
const ZSTD_SKIPPABLE_MAGIC: u32 = 0x184D_2A50;
/// What the compression is told by.
pub(crate) const MAGIC_LEN: usize = 4;
/// The largest window of a zstd frame that is decoded, as a power of two: 512 MiB, as containerd's library has it.
/// libzstd by itself stops at 128 MiB. It is a bound: memory is used as far as there is content.
const WINDOW_LOG_MAX: u32 = 29;

/// Plain bytes that any layer may have, and how many more for each of its compressed bytes. A disk image of 60 GiB that
/// compresses to one has room; zstd makes 30,000 bytes of zeros out of one, and a blob of 100 MB three terabytes.
const PLAIN_LEN_MAX: u64 = 32 << 30;
const PLAIN_RATIO_MAX: u64 = 64;

/// Most plain bytes that a blob of this length may have.
pub(crate) fn plain_len_max(blob_len: u64) -> u64 {
    blob_len.saturating_mul(PLAIN_RATIO_MAX).saturating_add(PLAIN_LEN_MAX)
}

/// Ends with an error where a stream goes on too long for what has arrived of the blob: its length is a stranger's
/// number until then.
struct Bounded<R> {
    stream: R,
    read_len: u64,
    arrived_len: Arc<AtomicU64>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.read_len += read as u64;
        if self.read_len > plain_len_max(self.arrived_len.load(Ordering::Relaxed)) {
            let reason = format!(
                "it has more than {} GiB and {PLAIN_RATIO_MAX} plain bytes for each compressed one, as no layer has",
                PLAIN_LEN_MAX >> 30
            );
            return Err(io::Error::other(reason));
        }
        Ok(read)
    }
}

/// Pieces are hashed when they have this length together: those of a network may be short.
const HASHED_LEN_MIN: usize = 256 << 10;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// gzip of any number of members.
    Gzip,
    /// zstd of any number of frames, skippable ones among them.
    Zstd,
    /// Not at all, or in a way that nobody knows.
    None,
}

impl Compression {
    /// Tells it by the first bytes.
    pub(crate) fn of(start: &[u8]) -> Self {
        let word = start.first_chunk::<MAGIC_LEN>().copied().unwrap_or_default();
        let is_skippable = u32::from_le_bytes(word) & !0xf == ZSTD_SKIPPABLE_MAGIC;
        match start {
            _ if start.starts_with(&GZIP_MAGIC) => Self::Gzip,
            _ if word == ZSTD_MAGIC || is_skippable => Self::Zstd,
            _ => Self::None,
        }
    }

    /// The plain stream in `stream`.
    ///
    /// # Errors
    ///
    /// When there is no memory for a decoder.
    pub(crate) fn reader<'a>(self, stream: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
                decoder.window_log_max(WINDOW_LOG_MAX)?;
                Box::new(ZstdReader(decoder))
            }
            Self::None => Box::new(stream),
        })
    }
}

/// Says in words of people what keeps a zstd stream from being decoded.
struct ZstdReader<R: BufRead>(zstd::stream::read::Decoder<'static, R>);

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            // libzstd's words for a window above the bound; the error has no number.
            if !error.to_string().contains("requires too much memory") {
                return error;
            }
            let limit = (1u64 << WINDOW_LOG_MAX) >> 20;
            io::Error::other(format!(
                "a zstd frame of it declares a window of more than {limit} MiB, the most that containerd reads: \
                 compress it with zstd --long={WINDOW_LOG_MAX} or less"
            ))
        })
    }
}

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
    /// Gone when its digest was compared.
    hasher: Option<DigestThread>,
    read_len: u64,
    /// The same for who has lent the reader.
    arrived_len: Arc<AtomicU64>,
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
            hasher: Some(DigestThread::new(HASHED_LEN_MIN)),
            read_len: 0,
            arrived_len: Arc::default(),
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
                    self.arrived_len.store(self.read_len, Ordering::Relaxed);
                    if self.read_len > self.len {
                        return self.fail(BlobError::TooLong(self.len));
                    }
                    self.hasher.iter_mut().for_each(|hasher| hasher.update(piece.clone()));
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
        match self.hasher.take().map(DigestThread::finish) {
            Some(found) if found != self.digest => self.fail(BlobError::Digest(found)),
            // Or it was compared before, as failures are kept.
            _ => Ok(()),
        }
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
        let (start, arrived_len) = (self.piece.clone(), Arc::clone(&self.arrived_len));
        Ok(Box::new(Bounded { stream: Compression::of(&start).reader(self)?, read_len: 0, arrived_len }))
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

#[cfg(test)]
mod tests {
    /// Nobody waits until 32 GiB of zeros have been decompressed: the bound itself is tried with a stream.
    #[test]
    fn a_stream_that_is_longer_than_any_layer_ends_with_an_error() {
        let read_len = plain_len_max(10) - 1000;
        let mut stream = Bounded { stream: io::repeat(0), read_len, arrived_len: Arc::new(10.into()) };
        let error = io::copy(&mut stream, &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("more than 32 GiB and 64 plain bytes"), "{error}");
        assert_eq!(plain_len_max(100 << 20), (32 << 30) + (6400 << 20));
        assert_eq!(plain_len_max(u64::MAX), u64::MAX);
    }

    use std::io::Write;

    use super::*;

    /// The output of `zstd --long=LOG` through a pipe, where it does not know the length of its input.
    fn with_window(log: u32, content: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(log).unwrap();
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn decompress(blob: Vec<u8>) -> io::Result<Vec<u8>> {
        let (digest, len) = (Digest::of(&blob), blob.len() as u64);
        let pieces = blob.chunks(3).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>();
        let mut reader = BlobReader::new(pieces.into_iter(), digest, len);
        let mut plain = Vec::new();
        reader.decompress()?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn windows_are_read_as_far_as_containerd_reads_them() {
        for log in [20, 27, 28, 29] {
            assert_eq!(decompress(with_window(log, b"content")).unwrap(), b"content", "{log}");
        }
        for log in [30, 31] {
            let error = decompress(with_window(log, b"content")).unwrap_err().to_string();
            assert!(error.contains("a window of more than 512 MiB"), "{error}");
        }
    }

    #[test]
    fn a_stream_may_begin_with_a_skippable_frame() {
        let skippable = [&0x184D_2A5Eu32.to_le_bytes()[..], &3u32.to_le_bytes(), b"any"].concat();
        let blob = [skippable, with_window(20, b"content")].concat();
        assert_eq!(Compression::of(&blob), Compression::Zstd);
        assert_eq!(decompress(blob).unwrap(), b"content");
        for plain in [&b""[..], b"x", b"PK\x03\x04"] {
            assert_eq!(
                (Compression::of(plain), decompress(plain.to_vec()).unwrap()),
                (Compression::None, plain.to_vec())
            );
        }
    }
}
