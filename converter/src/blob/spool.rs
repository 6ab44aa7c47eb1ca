//! The file that a blob is written to before it is stored: hashed, counted, and announced to who sends it meanwhile.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt as _, sync::Arc};

use format_spec::{Digest, DigestHasher};
use registry::{GrowingFile, Growth};
use tokio::sync::watch;

/// A blob that is being written to a file.
#[derive(Debug)]
pub struct Spool {
    file: Arc<File>,
    len: u64,
    hasher: DigestHasher,
    growth: watch::Sender<Growth>,
}

impl Spool {
    /// A blob in `file`, which is empty.
    pub fn new(file: File) -> Self {
        Self { file: Arc::new(file), len: 0, hasher: DigestHasher::default(), growth: watch::Sender::default() }
    }

    /// Length so far, in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.len)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        self.growth.send_replace(Growth { len: self.len, is_complete: false });
        Ok(())
    }

    /// Exactly these bytes, which were written before.
    pub(crate) fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// The file as it grows.
    pub(crate) fn growing(&self) -> GrowingFile {
        GrowingFile { file: Arc::clone(&self.file), growth: self.growth.subscribe() }
    }

    /// Says that the blob is complete; returns its file and digest.
    pub(crate) fn finish(self) -> (Arc<File>, Digest) {
        self.growth.send_replace(Growth { len: self.len, is_complete: true });
        (self.file, self.hasher.finish())
    }
}
