//! A blob in a file, readable by range like one in a registry.

use std::{
    io::{self, SeekFrom},
    ops::Range,
    path::PathBuf,
};

use futures_util::TryStreamExt;
use storage::{ByteStream, FetchFuture, Source, SourceError};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

/// Size of the pieces that the file is read in.
const PIECE_LEN: usize = 256 << 10;

/// A layer blob in a file.
#[derive(Debug, Clone)]
pub struct FileSource(PathBuf);

impl FileSource {
    /// The blob in the file at `path`, which is opened for every fetch.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    fn describe(&self, error: &io::Error) -> SourceError {
        SourceError(format!("{}: {error}", self.0.display()))
    }

    async fn open(&self, range: Range<u64>) -> io::Result<tokio::io::Take<tokio::fs::File>> {
        let mut file = tokio::fs::File::open(&self.0).await?;
        let len = file.metadata().await?.len();
        if range.start > range.end || range.end > len {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("bytes {range:?} of {len}")));
        }
        file.seek(SeekFrom::Start(range.start)).await?;
        Ok(file.take(range.end - range.start))
    }
}

impl Source for FileSource {
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        Box::pin(async move {
            let file = self.open(range).await.map_err(|error| self.describe(&error))?;
            let source = self.clone();
            let pieces = ReaderStream::with_capacity(file, PIECE_LEN);
            Ok(Box::pin(pieces.map_err(move |error| source.describe(&error))) as ByteStream)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn yields_exactly_the_range() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"0123456789").unwrap();
        let source = FileSource::new(file.path().to_owned());
        let pieces = source.fetch(3..7).await.unwrap().try_collect::<Vec<_>>().await.unwrap();
        assert_eq!(pieces.concat(), b"3456");
        assert!(source.fetch(3..11).await.is_err());
    }
}
