//! A blob that arrives asynchronously, read by a thread that may block: decompressing and hashing do.

use bytes::Bytes;
use format_spec::Digest;
use futures_util::StreamExt;
use storage::ByteStream;
use tokio::sync::mpsc;

use crate::blob::reader::BlobReader;

/// Pieces that wait for the thread; registry and file pieces have up to 256 KiB.
const PIECES_WAITING_MAX: usize = 8;

/// The pieces of a blob, as the thread that works on it takes them.
#[derive(Debug)]
pub(crate) struct Pieces(mpsc::Receiver<Result<Bytes, String>>);

impl Iterator for Pieces {
    type Item = Result<Bytes, String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.blocking_recv()
    }
}

/// The thread has panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("reading it ended abnormally")]
pub struct Aborted;

/// Runs `work` on a thread of its own over a blob of `len` bytes that streams in.
///
/// # Errors
///
/// [`Aborted`] when `work` panics.
pub(crate) async fn read_blob<T: Send + 'static>(
    mut stream: ByteStream,
    digest: Digest,
    len: u64,
    work: impl FnOnce(BlobReader<Pieces>) -> T + Send + 'static,
) -> Result<T, Aborted> {
    let (sender, receiver) = mpsc::channel(PIECES_WAITING_MAX);
    let thread = tokio::task::spawn_blocking(move || work(BlobReader::new(Pieces(receiver), digest, len)));
    while let Some(piece) = stream.next().await {
        // The thread stops listening when it has seen enough; it says why.
        if sender.send(piece.map_err(|error| error.message)).await.is_err() {
            break;
        }
    }
    drop((sender, stream));
    thread.await.map_err(|_| Aborted)
}
