//! The file `gaps`: the bytes of a layer's tar stream that are no file content, kept until the stream was hashed.
//!
//! Headers, padding and the archive's end stand in frames, and no reader of files wants them. So that the whole stream
//! can be put together again without fetching anything twice, they are kept beside `data` when a frame arrives.
//!
//! ```text
//! gaps   = magic index-digest record*
//! record = frame plain-len compressed-len crc32 zstd-frame      numbers of 4 bytes, little-endian
//! ```
//!
//! The CRC-32 covers the three numbers and the compressed bytes. The file only grows, and nothing of it is synced: what
//! does not fit any more, as after a crash, ends it. The price is a frame fetched again. A frame without such bytes has
//! no record.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    ops::Range,
    sync::Arc,
};

use format_spec::{
    Digest,
    limits::{FRAME_COMPRESSED_LEN_MAX, FRAME_PLAIN_LEN_MAX},
};

use crate::{
    disk::{DiskFile, directory::LayerDirectory, is_lost, mapping::LayerIndex},
    sync::{Mutex, lock},
};

/// First eight bytes of the file.
const MAGIC: [u8; 8] = *b"LAZULIGP";
const FILE_HEADER_LEN: usize = 8 + 32;
const RECORD_HEADER_LEN: usize = 16;
/// Headers compress to a tenth at any level: the fastest one.
const LEVEL: i32 = 1;

/// The records of one layer. Safe from many threads.
#[derive(Debug)]
pub(crate) struct Gaps {
    directory: LayerDirectory,
    index_digest: Digest,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Made with the first record.
    file: Option<Arc<DiskFile>>,
    /// The record of each frame that has one: an index may name many frames of which none ever comes.
    places: BTreeMap<u32, Place>,
    /// Where the next record goes.
    end: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    plain_len: u32,
    compressed_len: u32,
}

/// The parts of a frame's content that are no file content, as ranges of it, ascending.
pub(crate) fn gap_ranges(index: &LayerIndex, frame: u32) -> Vec<Range<usize>> {
    let Some(record) = index.frames().get(frame as usize) else { return Vec::new() };
    let tar = record.tar_range();
    let position = |offset: u64| usize::try_from(offset.saturating_sub(tar.start)).unwrap_or(usize::MAX);
    let (mut gaps, mut next) = (Vec::new(), tar.start);
    let extents = index.extents_in_tar(&tar).filter_map(|number| index.extents().get(number));
    for extent in extents.map(|extent| extent.tar_range()) {
        if extent.start > next {
            gaps.push(position(next)..position(extent.start));
        }
        next = extent.end.max(next);
    }
    if next < tar.end {
        gaps.push(position(next)..position(tar.end));
    }
    gaps
}

impl Gaps {
    /// Reads which records the file in `directory` has.
    pub(crate) fn open(directory: &LayerDirectory, index: &LayerIndex, index_digest: Digest) -> io::Result<Self> {
        let mut state = State::default();
        if let Some(file) = directory.open_gaps()? {
            match file.try_clone().and_then(|file| state.scan(&file, &index_digest, index.frames().len())) {
                Ok(()) => state.file = Some(Arc::new(file)),
                Err(error) if is_lost(&error) => {
                    tracing::warn!(layer = %directory.path().display(), %error, "gaps cannot be read: kept anew");
                    directory.remove_gaps()?;
                    state = State::default();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self { directory: directory.clone(), index_digest, state: Mutex::new(state) })
    }

    /// Whether a frame has a record.
    pub(crate) fn has(&self, frame: u32) -> bool {
        lock(&self.state).places.contains_key(&frame)
    }

    /// Keeps what a frame's content holds beside file content, unless that was done.
    pub(crate) fn keep(&self, index: &LayerIndex, frame: u32, content: &[u8]) -> io::Result<()> {
        let ranges = gap_ranges(index, frame);
        if ranges.is_empty() || self.has(frame) {
            return Ok(());
        }
        let parts: Option<Vec<&[u8]>> = ranges.into_iter().map(|range| content.get(range)).collect();
        let plain = parts.ok_or_else(|| io::Error::other("frame is shorter than its index says"))?.concat();
        let compressed = zstd::bulk::compress(&plain, LEVEL)?;
        let number = |len: usize| u32::try_from(len).map_err(io::Error::other);
        let place = Place { offset: 0, plain_len: number(plain.len())?, compressed_len: number(compressed.len())? };
        let record = [&place.header(frame, &compressed)[..], &compressed].concat();
        let mut state = lock(&self.state);
        let file = match &state.file {
            Some(file) => file.clone(),
            None => state.file.insert(Arc::new(self.directory.create_gaps()?)).clone(),
        };
        if state.end == 0 {
            file.write_all_at(&[&MAGIC[..], self.index_digest.as_bytes()].concat(), 0)?;
            state.end = FILE_HEADER_LEN as u64;
        }
        file.write_all_at(&record, state.end)?;
        let offset = state.end + RECORD_HEADER_LEN as u64;
        state.end += record.len() as u64;
        state.places.insert(frame, Place { offset, ..place });
        Ok(())
    }

    /// The kept bytes of a frame; `None` without a record, also from now on if it is damaged.
    pub(crate) fn read(&self, frame: u32) -> io::Result<Option<Vec<u8>>> {
        let (place, file) = {
            let state = lock(&self.state);
            (state.places.get(&frame).copied(), state.file.clone())
        };
        let (Some(place), Some(file)) = (place, file) else { return Ok(None) };
        let mut record = vec![0; RECORD_HEADER_LEN + place.compressed_len as usize];
        file.read_sparse(place.offset - RECORD_HEADER_LEN as u64, &mut record)?;
        let (header, compressed) = record.split_at(RECORD_HEADER_LEN);
        let is_whole = header == place.header(frame, compressed);
        let plain = is_whole.then(|| zstd::bulk::decompress(compressed, place.plain_len as usize));
        match plain {
            Some(Ok(plain)) if plain.len() == place.plain_len as usize => Ok(Some(plain)),
            _ => {
                lock(&self.state).places.remove(&frame);
                Ok(None)
            }
        }
    }

    /// Deletes everything: nobody will ask again.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.places.clear();
        state.end = 0;
        state.file = None;
        self.directory.remove_gaps()
    }
}

impl State {
    /// Notes the records of a file, up to the first that is none.
    fn scan(&mut self, file: &File, index_digest: &Digest, frame_count: usize) -> io::Result<()> {
        let len = file.metadata()?.len();
        let mut reader = BufReader::with_capacity(1 << 16, file);
        reader.seek(SeekFrom::Start(0))?;
        let mut header = [0; FILE_HEADER_LEN];
        if !fill(&mut reader, &mut header)? || header[..8] != MAGIC || header[8..] != *index_digest.as_bytes() {
            return Ok(());
        }
        self.end = FILE_HEADER_LEN as u64;
        let mut compressed = Vec::new();
        loop {
            let mut header = [0; RECORD_HEADER_LEN];
            if !fill(&mut reader, &mut header)? {
                return Ok(());
            }
            let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let (frame, plain_len, compressed_len) = (number(0), number(4), number(8));
            let place = Place { offset: self.end + RECORD_HEADER_LEN as u64, plain_len, compressed_len };
            let is_in_bounds = plain_len <= FRAME_PLAIN_LEN_MAX
                && compressed_len <= FRAME_COMPRESSED_LEN_MAX
                && place.offset + u64::from(compressed_len) <= len;
            if !is_in_bounds || (frame as usize) >= frame_count {
                return Ok(());
            }
            compressed.resize(compressed_len as usize, 0);
            if !fill(&mut reader, &mut compressed)? || header != place.header(frame, &compressed) {
                return Ok(());
            }
            self.places.insert(frame, place);
            self.end = place.offset + u64::from(compressed_len);
        }
    }
}

impl Place {
    fn header(&self, frame: u32, compressed: &[u8]) -> [u8; RECORD_HEADER_LEN] {
        let mut header = [0; RECORD_HEADER_LEN];
        for (number, at) in [frame, self.plain_len, self.compressed_len].into_iter().zip([0, 4, 8]) {
            header[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..12]);
        crc.update(compressed);
        header[12..].copy_from_slice(&crc.finalize().to_le_bytes());
        header
    }
}

/// Fills a buffer; whether there were enough bytes.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true),
    }
}
