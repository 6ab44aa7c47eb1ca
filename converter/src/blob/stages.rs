//! The stages of reading a stream that have threads of their own: its digest, and its decompression.
//!
//! A stage takes what the one before it has made from a queue of fixed length, so that a fast one waits for a slow
//! one and memory is bounded.

use std::{
    io::{self, Read},
    mem,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, JoinHandle},
};

use bytes::Bytes;
use format_spec::{Digest, DigestHasher};

/// Batches that wait to be hashed.
const BATCHES_WAITING_MAX: usize = 4;
/// Bytes that are decompressed at a time: few enough to stay in the processor's cache until they are taken.
const PART_LEN: usize = 128 << 10;
/// Parts that there are: a megabyte and a half, which is made while the cutting of a large file looks for its next border.
const PART_COUNT: usize = 12;

/// Hashes a stream on a thread of its own.
#[derive(Debug)]
pub(crate) struct DigestThread {
    batch_len_min: usize,
    batch: Vec<Bytes>,
    batch_len: usize,
    thread: Option<(SyncSender<Vec<Bytes>>, JoinHandle<DigestHasher>)>,
}

impl DigestThread {
    /// One whose thread gets pieces when they have `batch_len_min` bytes together: waking it for each small piece would
    /// cost more than hashing that. A stream that is shorter needs no thread.
    pub(crate) fn new(batch_len_min: usize) -> Self {
        Self { batch_len_min, batch: Vec::new(), batch_len: 0, thread: None }
    }

    /// Takes the next piece of the stream.
    pub(crate) fn update(&mut self, piece: Bytes) {
        self.batch_len += piece.len();
        self.batch.push(piece);
        if self.batch_len >= self.batch_len_min {
            let (batches, _) = self.thread.get_or_insert_with(start_hashing);
            batches.send(mem::take(&mut self.batch)).expect("the thread listens until the sender is gone");
            self.batch_len = 0;
        }
    }

    /// The digest of all pieces.
    pub(crate) fn finish(self) -> Digest {
        let mut hasher = match self.thread {
            None => DigestHasher::default(),
            Some((batches, thread)) => {
                drop(batches);
                thread.join().expect("hashing does not panic")
            }
        };
        self.batch.iter().for_each(|piece| hasher.update(piece));
        hasher.finish()
    }
}

fn start_hashing() -> (SyncSender<Vec<Bytes>>, JoinHandle<DigestHasher>) {
    let (batches, waiting) = sync_channel::<Vec<Bytes>>(BATCHES_WAITING_MAX);
    let thread = thread::spawn(move || {
        let mut hasher = DigestHasher::default();
        waiting.iter().flatten().for_each(|piece| hasher.update(&piece));
        hasher
    });
    (batches, thread)
}

/// A stream that another thread reads ahead of whoever reads it here.
pub(crate) struct ReadAhead {
    filled: Receiver<io::Result<Vec<u8>>>,
    spent: Sender<Vec<u8>>,
    part: Vec<u8>,
    position: usize,
}

impl ReadAhead {
    /// Starts reading what `open` opens, on a thread of `scope`. That ends with the stream, an error, or this reader.
    pub(crate) fn start<'scope, R: Read>(
        scope: &'scope thread::Scope<'scope, '_>,
        open: impl FnOnce() -> io::Result<R> + Send + 'scope,
    ) -> Self {
        let (filled_sender, filled) = sync_channel(PART_COUNT);
        let (spent, spent_receiver) = channel();
        for _ in 0..PART_COUNT {
            spent.send(Vec::new()).expect("its receiver is here");
        }
        scope.spawn(move || {
            if let Err(error) = open().and_then(|stream| read_ahead(stream, &filled_sender, &spent_receiver)) {
                // Nobody listens who has seen enough.
                let _ = filled_sender.send(Err(error));
            }
        });
        Self { filled, spent, part: Vec::new(), position: 0 }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.part.len() {
            let Ok(part) = self.filled.recv() else { return Ok(0) };
            // The other thread may be at the end.
            let _ = self.spent.send(mem::replace(&mut self.part, part?));
            self.position = 0;
        }
        let len = (&self.part[self.position..]).read(buffer)?;
        self.position += len;
        Ok(len)
    }
}

/// Reads a stream to its end, into parts that come back. Bytes in front of an error are passed on before it.
fn read_ahead(
    mut stream: impl Read,
    filled: &SyncSender<io::Result<Vec<u8>>>,
    spent: &Receiver<Vec<u8>>,
) -> io::Result<()> {
    // Both channels end with the reader.
    while let Ok(mut part) = spent.recv() {
        part.resize(PART_LEN, 0);
        let (len, result) = fill(&mut stream, &mut part);
        part.truncate(len);
        if (len > 0 && filled.send(Ok(part)).is_err()) || (len < PART_LEN && result.is_ok()) {
            break;
        }
        result?;
    }
    Ok(())
}

/// Fills a buffer, as far as the stream has bytes; what ended it earlier if that was no end.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> (usize, io::Result<()>) {
    let mut len = 0;
    while len < buffer.len() {
        match stream.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(read_len) => len += read_len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (len, Err(error)),
        }
    }
    (len, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives `lens` bytes at a time, then fails.
    struct Source {
        lens: Vec<usize>,
        fails: bool,
    }

    impl Read for Source {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.lens.pop() {
                Some(len) => {
                    buffer[..len].fill(u8::try_from(len % 251).unwrap());
                    Ok(len)
                }
                None if self.fails => Err(io::Error::other("it failed")),
                None => Ok(0),
            }
        }
    }

    fn read(lens: &[usize], fails: bool) -> (usize, Option<String>) {
        thread::scope(|scope| {
            let source = Source { lens: lens.to_vec(), fails };
            let mut reader = ReadAhead::start(scope, || Ok(source));
            let mut bytes = Vec::new();
            let error = reader.read_to_end(&mut bytes).err().map(|error| error.to_string());
            let expected: Vec<u8> =
                lens.iter().rev().flat_map(|len| vec![u8::try_from(len % 251).unwrap(); *len]).collect();
            assert!(bytes == expected);
            (bytes.len(), error)
        })
    }

    #[test]
    fn a_stream_is_the_same_when_it_is_read_ahead() {
        assert_eq!(read(&[], false), (0, None));
        // Less than a part, whole ones, and more than there are.
        for lens in [&[1][..], &[PART_LEN / 2; 3], &[PART_LEN / 4; 4], &[PART_LEN / 8; 8 * (2 * PART_COUNT + 1)]] {
            let len = lens.iter().sum();
            assert_eq!(read(lens, false), (len, None));
            assert_eq!(read(lens, true), (len, Some("it failed".to_owned())), "bytes in front of an error count");
        }
    }

    #[test]
    fn reading_ahead_ends_when_nobody_listens() {
        thread::scope(|scope| {
            let mut reader = ReadAhead::start(scope, || Ok(io::repeat(7)));
            reader.read_exact(&mut [0; 10]).unwrap();
        });
    }

    #[test]
    fn a_digest_is_that_of_the_pieces_in_their_order() {
        const BATCH_LEN: usize = 1000;
        let content: Vec<u8> = (0u8..=250).cycle().take(10 * BATCH_LEN + 1).collect();
        for (len, piece_len) in [(0, 1), (100, 7), (content.len(), 300), (content.len(), 2 * BATCH_LEN)] {
            let mut digest = DigestThread::new(BATCH_LEN);
            content[..len].chunks(piece_len).for_each(|piece| digest.update(Bytes::copy_from_slice(piece)));
            assert_eq!(digest.finish(), Digest::of(&content[..len]), "{len} bytes in pieces of {piece_len}");
        }
    }
}
