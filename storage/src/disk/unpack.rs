//! Indexes on their way to the disk: received, verified, decompressed and checked in little memory, whatever they claim.
//!
//! Received bytes go to a file without a name, what they decompress to into another one, and from there in open form to
//! the file that becomes `index`. The first bytes say how many records of what length there are, and what does not fit
//! them ends the work there. Openings together use a budget of memory, which none of them holds while it waits for a
//! source.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use format_spec::{
    Digest, DigestHasher, FormatError, Index, IndexLocation,
    table::{HEAD_LEN_MAX, WINDOW_LOG_MAX, WireIndex},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::disk::{
    Disk,
    mapping::{LayerIndex, Map},
};

/// Bytes that are read or written at once.
const PART_LEN: usize = 128 << 10;
/// Memory of an opening beside the window of its index: zstd's tables, parts of sections, buffers.
const WORK_LEN: u64 = 2 << 20;
/// The budget is counted in units of this, so that its number fits a semaphore.
const UNIT_LEN: u64 = 1 << 10;

/// Where indexes are unpacked.
#[derive(Debug)]
pub(crate) struct Unpacker {
    directory: PathBuf,
    disk: Disk,
    next_number: AtomicU64,
    units: Arc<Semaphore>,
    unit_count: u64,
}

/// An index that was verified, and where it is until it gets its name.
#[derive(Debug)]
pub(crate) struct NewIndex {
    pub(crate) index: LayerIndex,
    pub(crate) file: NewFile,
}

/// A file that is deleted unless it was given another name.
#[derive(Debug)]
pub(crate) struct NewFile {
    pub(crate) path: PathBuf,
    disk: Disk,
    pub(crate) is_named: bool,
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_named
            && let Err(error) = self.disk.remove_if_there(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "file stays until the next start");
        }
    }
}

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error(transparent)]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl Unpacker {
    /// Unpacks in `directory`, and deletes what is there.
    pub(crate) fn open(directory: PathBuf, disk: Disk, budget: u64) -> io::Result<Self> {
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => disk.make_directory(&directory)?,
        }
        // One opening is always possible.
        let unit_count = (budget / UNIT_LEN).max(units_of(u64::MAX)).min(Semaphore::MAX_PERMITS as u64);
        let units = Arc::new(Semaphore::new(usize::try_from(unit_count).unwrap_or(Semaphore::MAX_PERMITS)));
        Ok(Self { directory, disk, next_number: AtomicU64::new(0), units, unit_count })
    }

    /// Waits for its part of the budget.
    pub(crate) async fn memory_for(&self, location: &IndexLocation) -> Option<OwnedSemaphorePermit> {
        let units = units_of(location.plain_len).min(self.unit_count);
        self.units.clone().acquire_many_owned(u32::try_from(units).ok()?).await.ok()
    }

    /// Where it unpacks.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file without a name.
    pub(crate) fn nameless(&self) -> io::Result<File> {
        let path = self.next_path();
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    }

    fn next_path(&self) -> PathBuf {
        self.directory.join(self.next_number.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// Makes an index of what was received, if it is what `location` names. Blocks.
    pub(crate) fn unpack(&self, compressed: &mut File, location: &IndexLocation) -> Result<NewIndex, UnpackError> {
        let found = digest_of(compressed)?;
        if found != location.digest {
            let expected = location.digest;
            return Err(FormatError::Digest { what: "compressed index", expected, found }.into());
        }
        let mut wire = self.nameless()?;
        let head = decompress(compressed, location.plain_len, &mut wire)?;
        let new = NewFile { path: self.next_path(), disk: self.disk.clone(), is_named: false };
        let file = self.disk.create(&new.path)?;
        let mut len = 0;
        head.to_open(
            |offset, buffer| Ok::<_, UnpackError>(wire.read_exact_at(buffer, offset)?),
            |bytes| {
                file.write_all_at(bytes, len)?;
                len += bytes.len() as u64;
                Ok(())
            },
        )?;
        file.sync_data()?;
        let file = file.try_clone()?;
        // The check reads every page; its map goes away with it, so that they do not count as ours afterwards.
        Index::open(Map::of(&file)?)?.check_rules()?;
        Ok(NewIndex { index: Index::open(Map::of(&file)?)?, file: new })
    }
}

/// Units of the budget that an index of this length needs.
fn units_of(plain_len: u64) -> u64 {
    (plain_len.min(1 << WINDOW_LOG_MAX) + WORK_LEN).div_ceil(UNIT_LEN)
}

fn digest_of(file: &File) -> io::Result<Digest> {
    let (mut hasher, mut buffer, mut position) = (DigestHasher::default(), vec![0; PART_LEN], 0);
    loop {
        let len = file.read_at(&mut buffer, position)?;
        if len == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..len]);
        position += len as u64;
    }
}

/// Decompresses into `wire` what should be an index of `plain_len` bytes.
fn decompress(compressed: &mut File, plain_len: u64, wire: &mut File) -> Result<WireIndex, UnpackError> {
    let failed = |error: io::Error| FormatError::Compression(error.to_string());
    io::Seek::rewind(compressed)?;
    let reader = BufReader::with_capacity(PART_LEN, compressed);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(reader).map_err(failed)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(failed)?;
    let (mut head, mut parsed, mut len) = (Vec::new(), None, 0);
    let mut buffer = vec![0; PART_LEN];
    loop {
        let read = decoder.read(&mut buffer).map_err(failed)?;
        let part = &buffer[..read];
        len += read as u64;
        if parsed.is_none() {
            head.extend_from_slice(&part[..part.len().min(HEAD_LEN_MAX - head.len())]);
            if head.len() == HEAD_LEN_MAX || read == 0 {
                parsed = Some(WireIndex::parse(&head, plain_len)?);
            }
        }
        if read == 0 || len > plain_len {
            break;
        }
        wire.write_all(part)?;
    }
    match parsed {
        Some(parsed) if len == plain_len => Ok(parsed),
        _ => Err(FormatError::Length { what: "index", expected: plain_len, found: len }.into()),
    }
}
