//! Walks the entries of a tar stream, with their exact positions in it.
//!
//! The walker reads headers and whatever stands in front of an entry's content; the content is the
//! caller's. It reads what containerd's tar reader reads, as that is the judge of what a layer means:
//! global PAX headers are entries and have no effect on others, links and devices have no content whatever
//! their size says.
//! What entries mean for a file system is `tree.rs`.

use std::{collections::BTreeMap, io};

use crate::{
    header::{BLOCK_LEN, Header, text},
    pax::{Records, SparseMap, Time, unsigned},
};

/// Longest extended header or long name, as in containerd's tar reader: they are kept in memory.
const EXTENSION_LEN_MAX: u64 = 1 << 20;
/// Longest sparse map of format 1.0, for the same reason; it has room for hundreds of thousands of segments.
const SPARSE_MAP_LEN_MAX: u64 = 8 << 20;

/// A tar stream to walk over.
pub trait TarInput {
    /// The next bytes without consuming them: `len` of them, at most 1024, fewer only at the end.
    ///
    /// # Errors
    ///
    /// When the stream cannot be read on.
    fn peek(&mut self, len: usize) -> io::Result<&[u8]>;

    /// Consumes bytes that a peek has shown.
    ///
    /// # Errors
    ///
    /// When whoever takes the bytes failed.
    fn consume(&mut self, len: usize) -> io::Result<()>;

    /// Number of bytes consumed so far.
    fn position(&self) -> u64;
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Regular file.
    Regular,
    /// Another name of a file that is there already.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Directory.
    Directory,
    /// Character device.
    Character,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Global PAX header: stands for no file.
    Global,
    /// Anything else: its type flag.
    Other(u8),
}

/// A run of a sparse file's content that is not a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length in bytes; may be 0.
    pub len: u64,
}

/// One entry: all its headers taken together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Offset of its first header in the tar stream.
    pub start: u64,
    /// Path as it stands there.
    pub path: Vec<u8>,
    /// Type.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Modification time.
    pub mtime: Time,
    /// Target of a symbolic or hard link.
    pub link_target: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (i64, i64),
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Length of the file, holes included; 0 for everything without content.
    pub size: u64,
    /// Where the stored bytes belong in a sparse file, ascending; `None` for files without holes.
    pub segments: Option<Vec<Segment>>,
    /// Number of bytes stored in the stream, which follow now.
    pub stored_len: u64,
    /// Number of bytes up to the next block after that.
    pub padding_len: u64,
}

/// A tar stream cannot be walked on.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The stream ends within an entry.
    #[error("the tar stream ends at byte {0}, within an entry")]
    Truncated(u64),
    /// The bytes are no entry.
    #[error("tar entry at byte {start}: {reason}")]
    Malformed {
        /// Offset of the entry in the tar stream.
        start: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Headers that stand in front of an entry.
#[derive(Default)]
struct Extensions {
    records: Records,
    long_path: Option<Vec<u8>>,
    long_link_target: Option<Vec<u8>>,
}

/// Reads up to the content of the next entry; `None` at the end of the archive.
///
/// The input stands behind the content and padding of the entry before. What follows the archive's end
/// is not consumed.
///
/// # Errors
///
/// When the input fails or is no tar stream.
pub fn next_entry(input: &mut impl TarInput) -> Result<Option<Entry>, TarError> {
    let start = input.position();
    let malformed = |reason| TarError::Malformed { start, reason };
    let mut extensions = Extensions::default();
    loop {
        let Some(block) = next_header(input).map_err(|error| error.at(start))? else { return Ok(None) };
        let header = Header::decode(&block).map_err(malformed)?;
        input.consume(BLOCK_LEN)?;
        if !matches!(header.type_flag, b'x' | b'g' | b'L' | b'K') {
            return to_entry(input, start, header, extensions).map(Some);
        }
        let content = read_extension(input, header.size, start)?;
        match header.type_flag {
            b'x' => extensions.records = Records::parse(&content).map_err(malformed)?,
            b'L' => extensions.long_path = long_text(&content),
            b'K' => extensions.long_link_target = long_text(&content),
            _ => {
                let path = Records::parse(&content).map_err(malformed)?.text("path").map(<[u8]>::to_vec);
                let header = Header { size: 0, path: path.unwrap_or(header.path), ..header };
                return to_entry(input, start, header, Extensions::default()).map(Some);
            }
        }
    }
}

/// A GNU long name; an empty one says nothing.
fn long_text(content: &[u8]) -> Option<Vec<u8>> {
    Some(text(content).to_vec()).filter(|text| !text.is_empty())
}

enum HeaderError {
    Io(io::Error),
    Malformed(&'static str),
}

impl HeaderError {
    fn at(self, start: u64) -> TarError {
        match self {
            Self::Io(error) => error.into(),
            Self::Malformed(reason) => TarError::Malformed { start, reason },
        }
    }
}

/// The next header block, not consumed; `None` at the end: no bytes, or two blocks of zeros.
fn next_header(input: &mut impl TarInput) -> Result<Option<[u8; BLOCK_LEN]>, HeaderError> {
    const SHORT: HeaderError = HeaderError::Malformed("the stream ends within a header");
    let bytes = input.peek(BLOCK_LEN).map_err(HeaderError::Io)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let block: [u8; BLOCK_LEN] = bytes.try_into().map_err(|_| SHORT)?;
    if block != [0; BLOCK_LEN] {
        return Ok(Some(block));
    }
    match input.peek(2 * BLOCK_LEN).map_err(HeaderError::Io)?.get(BLOCK_LEN..).unwrap_or_default() {
        second if second.iter().any(|byte| *byte != 0) => {
            Err(HeaderError::Malformed("one block of zeros and something behind it"))
        }
        second if second.is_empty() || second.len() == BLOCK_LEN => Ok(None),
        _ => Err(SHORT),
    }
}

/// Reads the content of an extension header, and its padding.
fn read_extension(input: &mut impl TarInput, len: i64, start: u64) -> Result<Vec<u8>, TarError> {
    let reason = "its extended header is longer than 1 MiB";
    let len = usize::try_from(len).ok().filter(|len| *len as u64 <= EXTENSION_LEN_MAX);
    let len = len.ok_or(TarError::Malformed { start, reason })?;
    let mut content = Vec::with_capacity(len);
    while content.len() < len {
        let piece = input.peek(BLOCK_LEN)?;
        if piece.is_empty() {
            return Err(TarError::Truncated(input.position()));
        }
        content.extend_from_slice(piece);
        let piece_len = piece.len();
        input.consume(piece_len)?;
    }
    content.truncate(len);
    Ok(content)
}

fn to_entry(input: &mut impl TarInput, start: u64, header: Header, extensions: Extensions) -> Result<Entry, TarError> {
    let malformed = |reason| TarError::Malformed { start, reason };
    let Extensions { records, long_path, long_link_target } = extensions;
    let text = |key| records.text(key).map(<[u8]>::to_vec);
    let path = long_path.or_else(|| text("path")).unwrap_or(header.path);
    let kind = match header.type_flag {
        0 if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' => EntryKind::Regular,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::Character,
        b'4' => EntryKind::Block,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        b'g' => EntryKind::Global,
        other => EntryKind::Other(other),
    };
    let integer = |key| records.integer(key).map_err(malformed);
    let time = |key| records.time(key).map_err(malformed);
    // Nobody asks for these, but containerd does not unpack an entry with a malformed one.
    time("atime")?;
    time("ctime")?;
    let size = integer("size")?.unwrap_or(header.size);
    let has_content = matches!(kind, EntryKind::Regular | EntryKind::Other(_));
    let stored_len = if has_content { size } else { 0 };
    let stored_len = u64::try_from(stored_len).map_err(|_| malformed("its size is negative"))?;
    let mut entry = Entry {
        start,
        path,
        kind,
        mode: u32::try_from(header.mode & 0o7777).expect("12 bits"),
        uid: integer("uid")?.unwrap_or(header.uid),
        gid: integer("gid")?.unwrap_or(header.gid),
        mtime: time("mtime")?.unwrap_or(Time { seconds: header.mtime_seconds, nanoseconds: 0 }),
        link_target: long_link_target.or_else(|| text("linkpath")).unwrap_or(header.link_target),
        device: (header.device_major, header.device_minor),
        xattrs: records.xattrs(),
        size: stored_len,
        segments: None,
        stored_len,
        padding_len: stored_len.wrapping_neg() % BLOCK_LEN as u64,
    };
    let Some(sparse) = records.sparse().map_err(malformed)? else { return Ok(entry) };
    if !has_content {
        return Err(malformed("it has a sparse map and no content"));
    }
    if let Some(name) = sparse.name {
        entry.path = name;
    }
    if let Some(size) = sparse.real_size {
        entry.size = u64::try_from(size).map_err(|_| malformed("its size is negative"))?;
    }
    let map = match sparse.map {
        SparseMap::Known(map) => map,
        SparseMap::InContent => read_sparse_map(input, &mut entry)?,
    };
    let (pairs, rest) = map.as_chunks::<2>();
    let segments: Vec<_> = pairs.iter().map(|[offset, len]| Segment { offset: *offset, len: *len }).collect();
    if !rest.is_empty() || !is_map_of(&segments, entry.size, entry.stored_len) {
        return Err(malformed("its sparse map is malformed"));
    }
    entry.segments = Some(segments);
    Ok(entry)
}

/// Whether segments ascend inside a file of `size` bytes and take up all stored bytes.
fn is_map_of(segments: &[Segment], size: u64, stored_len: u64) -> bool {
    let end = segments
        .iter()
        .try_fold(0u64, |end, segment| segment.offset.checked_add(segment.len).filter(|_| segment.offset >= end));
    let total = segments.iter().try_fold(0u64, |total, segment| total.checked_add(segment.len));
    end.is_some_and(|end| end <= size) && total == Some(stored_len)
}

/// Reads the map of sparse format 1.0: decimal lines in front of the content, padded to a block.
///
/// The first line is the number of segments, then come offset and length of each.
fn read_sparse_map(input: &mut impl TarInput, entry: &mut Entry) -> Result<Vec<u64>, TarError> {
    let malformed = |reason| TarError::Malformed { start: entry.start, reason };
    let mut text = Vec::new();
    let mut line_start = 0;
    // A line may be long: what was searched for its end is not searched again.
    let mut searched_len = 0;
    let mut expected_len = None;
    let mut map = Vec::new();
    let mut read_len = 0;
    while expected_len.is_none_or(|expected| map.len() < expected) {
        read_len += BLOCK_LEN as u64;
        if read_len > SPARSE_MAP_LEN_MAX {
            return Err(malformed("its sparse map is longer than 8 MiB"));
        }
        if read_len > entry.stored_len {
            return Err(malformed("its sparse map does not end"));
        }
        let block = input.peek(BLOCK_LEN)?;
        if block.len() < BLOCK_LEN {
            return Err(TarError::Truncated(input.position()));
        }
        text.extend_from_slice(block);
        input.consume(BLOCK_LEN)?;
        while expected_len.is_none_or(|expected| map.len() < expected) {
            let rest = text.get(searched_len..).unwrap_or_default();
            let Some(found) = rest.iter().position(|byte| *byte == b'\n') else {
                searched_len = text.len();
                break;
            };
            let line_end = searched_len + found;
            let value = unsigned(text.get(line_start..line_end).unwrap_or_default()).map_err(malformed)?;
            line_start = line_end + 1;
            searched_len = line_start;
            match expected_len {
                None => expected_len = Some(usize::try_from(value).unwrap_or(usize::MAX).saturating_mul(2)),
                Some(_) => map.push(value),
            }
        }
    }
    entry.stored_len -= read_len;
    Ok(map)
}

#[cfg(test)]
#[path = "walker_tests.rs"]
mod tests;
