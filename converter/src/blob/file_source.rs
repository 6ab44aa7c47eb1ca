//! A blob in a file, or in a part of one, readable by range like one in a registry.

use std::{
    fs::File,
    io::{self, SeekFrom},
    ops::Range,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::Arc,
};

use futures_util::TryStreamExt;
use storage::{ByteStream, FetchFuture, FetchWideFuture, Source, SourceError, WideStream};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

/// Size of the pieces that the file is read in.
const PIECE_LEN: usize = 256 << 10;

/// A blob in a file.
#[derive(Debug, Clone)]
pub struct FileSource {
    path: PathBuf,
    /// Where in the file the blob is; `None`: it is the whole file.
    part: Option<Range<u64>>,
    /// Keeps a file without a name there for as long as its path is used.
    _unnamed: Option<Arc<File>>,
}

impl FileSource {
    /// The blob in the file at `path`, which is opened for every fetch.
    pub fn new(path: PathBuf) -> Self {
        Self { path, part: None, _unnamed: None }
    }

    /// The blob in a file that has no name.
    pub fn unnamed(file: Arc<File>) -> Self {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Self { path, part: None, _unnamed: Some(file) }
    }

    /// The blob that is the bytes `part` of this one.
    #[must_use]
    pub fn part(&self, part: Range<u64>) -> Self {
        Self { part: Some(part), ..self.clone() }
    }

    /// The path to open for reading it.
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// All its bytes.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or is too short; later failures come through the stream.
    pub async fn stream(&self) -> io::Result<ByteStream> {
        Ok(self.to_stream(self.open(None).await?))
    }

    fn to_stream(&self, file: tokio::io::Take<tokio::fs::File>) -> ByteStream {
        let source = self.clone();
        let pieces = ReaderStream::with_capacity(file, PIECE_LEN);
        Box::pin(pieces.map_err(move |error| source.describe(&error)))
    }

    fn describe(&self, error: &io::Error) -> SourceError {
        SourceError::refused(format!("{}: {error}", self.path.display()))
    }

    /// The file at the start of `range` of the blob; `None` for all of it.
    async fn open(&self, range: Option<Range<u64>>) -> io::Result<tokio::io::Take<tokio::fs::File>> {
        let mut file = tokio::fs::File::open(&self.path).await?;
        let (part, range) = match (&self.part, range) {
            // A whole file may be one that has no length, like a pipe.
            (None, None) => return Ok(file.take(u64::MAX)),
            (None, Some(range)) => (0..u64::MAX, range),
            (Some(part), range) => (part.clone(), range.unwrap_or(0..part.end - part.start)),
        };
        let file_len = file.metadata().await?.len();
        let end = part.start.checked_add(range.end).filter(|end| *end <= part.end && *end <= file_len);
        let (Some(end), true) = (end, range.start <= range.end) else {
            let reason = format!("bytes {range:?} of {}", part.end.min(file_len).saturating_sub(part.start));
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
        };
        let start = part.start + range.start;
        file.seek(SeekFrom::Start(start)).await?;
        Ok(file.take(end - start))
    }
}

impl Source for FileSource {
    fn origin(&self) -> Option<String> {
        None
    }

    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        Box::pin(async move {
            let file = self.open(Some(range)).await.map_err(|error| self.describe(&error))?;
            Ok(self.to_stream(file))
        })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        WideStream::exact(range.clone(), self.fetch(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(stream: ByteStream) -> Vec<u8> {
        stream.try_collect::<Vec<_>>().await.unwrap().concat()
    }

    #[tokio::test]
    async fn yields_exactly_the_range() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"0123456789").unwrap();
        let source = FileSource::new(file.path().to_owned());
        assert_eq!(read(source.fetch(3..7).await.unwrap()).await, b"3456");
        assert_eq!(read(source.stream().await.unwrap()).await, b"0123456789");
        assert!(source.fetch(3..11).await.is_err());
        let part = source.part(2..8);
        assert_eq!(read(part.stream().await.unwrap()).await, b"234567");
        assert_eq!(read(part.fetch(1..6).await.unwrap()).await, b"34567");
        assert!(part.fetch(1..7).await.is_err());
        assert!(source.part(2..11).stream().await.is_err());
    }

    #[tokio::test]
    async fn a_file_without_a_name_is_read_like_any_other() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"0123456789").unwrap();
        let source = FileSource::unnamed(Arc::new(file)).part(4..6);
        assert_eq!(read(source.stream().await.unwrap()).await, b"45");
    }
}
