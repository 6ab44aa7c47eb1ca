//! The container of an index: a header, a section table and sections of fixed-size records (SPEC.md 4).
//!
//! It has two forms of the same length. The *open form* is what a program maps into memory. The *wire
//! form* holds the same bytes rearranged so that zstd finds what records have in common; it exists only
//! between a writer and a reader.
//!
//! This file knows bytes, lengths and checksums; what the records mean is `index.rs`.

use std::{
    io::{self, Read},
    ops::Range,
};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::{digest::Digest, limits::INDEX_LEN_MAX};

/// First eight bytes of an index.
pub const MAGIC: [u8; 8] = *b"LAZULIDX";
/// Version of the index that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Incompatible features that this crate understands: none yet.
pub const FEATURES_INCOMPATIBLE_KNOWN: u64 = 0;
/// Most sections an index may have.
pub const SECTION_COUNT_MAX: u32 = 64;
/// Longest header and section table.
pub const HEAD_LEN_MAX: usize = size_of::<Header>() + SECTION_COUNT_MAX as usize * size_of::<SectionEntry>();
/// Binary logarithm of the longest window that the zstd frame of an index or dedup section may have (SPEC.md 9): what
/// a reader needs to decompress it, however long it is.
pub const WINDOW_LOG_MAX: u32 = 23;
/// Bytes of records that are brought from one form to the other at once.
const PART_LEN: usize = 256 << 10;
/// Sections start at multiples of this.
const SECTION_ALIGN: usize = 8;

/// First bytes of an index (SPEC.md 4.1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// Number of sections.
    pub section_count: U32,
    /// Features a reader may ignore.
    pub features_compatible: U64,
    /// Features a reader must know.
    pub features_incompatible: U64,
    /// Length of the layer's tar stream, in bytes.
    pub tar_len: U64,
    /// Length of the layer's plain address space, in bytes.
    pub space_len: U64,
    /// Length of the whole index, in bytes.
    pub index_len: U64,
    /// Zero.
    pub reserved: U32,
    /// CRC-32 of the header up to here and of the section table.
    pub crc32: U32,
}
const _: () = assert!(size_of::<Header>() == 64);

/// One entry of the section table (SPEC.md 4.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SectionEntry {
    /// What the records are; ascending in the table, each kind at most once.
    pub kind: U32,
    /// Length of a record: 1 or a multiple of 4, in bytes.
    pub record_len: U32,
    /// Offset of the section in the index.
    pub offset: U64,
    /// Length of the section, a multiple of `record_len`, in bytes.
    pub len: U64,
    /// CRC-32 of the section in open form.
    pub crc32: U32,
    /// Bit n: the wire form holds word n of each record as a difference to the record before.
    pub delta_words: U32,
}
const _: () = assert!(size_of::<SectionEntry>() == 32);

/// Bytes are no index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end too early, or go on too long.
    #[error("{what} has {found} bytes, expected {expected}")]
    Length {
        /// Which structure.
        what: &'static str,
        /// Length by the structures before it.
        expected: u64,
        /// Length found.
        found: u64,
    },
    /// Other bytes than expected at the start.
    #[error("{0} does not start with its magic number")]
    Magic(&'static str),
    /// Written by another version.
    #[error(
        "{what} has format version {found}, this lazuli reads version {VERSION}: upgrade it or convert the image again"
    )]
    Version {
        /// Which structure.
        what: &'static str,
        /// Version found.
        found: u32,
    },
    /// Needs features that this version does not know.
    #[error("{what} needs unknown features {bits:#x}: upgrade lazuli or convert the image again")]
    Features {
        /// Which structure.
        what: &'static str,
        /// The unknown bits.
        bits: u64,
    },
    /// A checksum does not match.
    #[error("{what} has CRC-32 {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Which structure.
        what: &'static str,
        /// Checksum stored.
        expected: u32,
        /// Checksum computed.
        found: u32,
    },
    /// Other bytes than the digest names.
    #[error("{what} has digest {found}, expected {expected}")]
    Digest {
        /// Which structure.
        what: &'static str,
        /// Digest by the structure that names it.
        expected: Digest,
        /// Digest computed.
        found: Digest,
    },
    /// A rule of the specification is broken.
    #[error("{what} {number}: {rule}")]
    Rule {
        /// Kind of record.
        what: &'static str,
        /// Number of the record.
        number: u64,
        /// The rule.
        rule: &'static str,
    },
    /// The plain address space exceeds its limit (SPEC.md 9), as a sparse file with a large hole makes it.
    #[error(
        "files and their holes take {space_len} bytes of address space: frames of {frames_len} bytes allow {space_max}"
    )]
    Space {
        /// Length of the space, in bytes.
        space_len: u64,
        /// Longest that is allowed, in bytes.
        space_max: u64,
        /// Length of all frames, compressed, in bytes.
        frames_len: u64,
    },
    /// zstd refused the bytes.
    #[error("compressed index: {0}")]
    Compression(String),
}

/// A section to be written: its place in the table follows from the order given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewSection<'a> {
    pub(crate) kind: u32,
    pub(crate) record_len: usize,
    pub(crate) delta_words: u32,
    pub(crate) bytes: &'a [u8],
}

/// Lays sections out one after the other; returns the open form.
pub(crate) fn encode(tar_len: u64, space_len: u64, sections: &[NewSection<'_>]) -> Vec<u8> {
    let table_end = size_of::<Header>() + sections.len() * size_of::<SectionEntry>();
    let mut bytes = vec![0; table_end];
    let mut table = Vec::with_capacity(sections.len());
    for section in sections {
        bytes.resize(bytes.len().next_multiple_of(SECTION_ALIGN), 0);
        table.push(SectionEntry {
            kind: section.kind.into(),
            record_len: u32::try_from(section.record_len).expect("records are small").into(),
            offset: (bytes.len() as u64).into(),
            len: (section.bytes.len() as u64).into(),
            crc32: crc32fast::hash(section.bytes).into(),
            delta_words: section.delta_words.into(),
        });
        bytes.extend_from_slice(section.bytes);
    }
    let mut header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        section_count: u32::try_from(sections.len()).expect("a few sections").into(),
        features_compatible: 0.into(),
        features_incompatible: 0.into(),
        tar_len: tar_len.into(),
        space_len: space_len.into(),
        index_len: (bytes.len() as u64).into(),
        reserved: 0.into(),
        crc32: 0.into(),
    };
    header.crc32 = header_checksum(&header, &table).into();
    let head = header.as_bytes().iter().chain(table.as_bytes());
    bytes.iter_mut().zip(head).for_each(|(place, byte)| *place = *byte);
    bytes
}

/// The bytes that a CRC-32 at the end of a structure is of.
pub(crate) fn before_checksum(structure: &[u8]) -> &[u8] {
    structure.split_last_chunk::<{ size_of::<U32>() }>().map_or(structure, |(covered, _)| covered)
}

fn header_checksum(header: &Header, table: &[SectionEntry]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(before_checksum(header.as_bytes()));
    hasher.update(table.as_bytes());
    hasher.finalize()
}

/// Reads header and section table and checks them, not the sections.
pub(crate) fn parse(bytes: &[u8]) -> Result<(&Header, &[SectionEntry]), FormatError> {
    parse_head(bytes, bytes.len() as u64)
}

/// The same of the first bytes of an index that has so many in all.
fn parse_head(bytes: &[u8], index_len: u64) -> Result<(&Header, &[SectionEntry]), FormatError> {
    let short =
        |expected: usize| FormatError::Length { what: "index", expected: expected as u64, found: bytes.len() as u64 };
    let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| short(size_of::<Header>()))?;
    if header.magic != MAGIC {
        return Err(FormatError::Magic("index"));
    }
    if header.version != VERSION {
        return Err(FormatError::Version { what: "index", found: header.version.get() });
    }
    let unknown = header.features_incompatible.get() & !FEATURES_INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(FormatError::Features { what: "index", bits: unknown });
    }
    let section_count = header.section_count.get();
    if section_count > SECTION_COUNT_MAX {
        return Err(rule(0, "more sections than allowed"));
    }
    let table_len = section_count as usize * size_of::<SectionEntry>();
    let (table, _) = <[SectionEntry]>::ref_from_prefix_with_elems(rest, section_count as usize)
        .map_err(|_| short(size_of::<Header>() + table_len))?;
    let found = header_checksum(header, table);
    if found != header.crc32.get() {
        return Err(FormatError::Checksum { what: "index header", expected: header.crc32.get(), found });
    }
    if header.index_len.get() != index_len {
        return Err(FormatError::Length { what: "index", expected: header.index_len.get(), found: index_len });
    }
    let mut end = size_of::<Header>() + table_len;
    let mut previous_kind = None;
    for (number, entry) in (0..).zip(table) {
        let record_len = entry.record_len.get();
        if record_len != 1 && (record_len == 0 || record_len % 4 != 0 || record_len > 128) {
            return Err(rule(number, "record length is neither 1 nor a multiple of 4 up to 128"));
        }
        if entry.len.get() % u64::from(record_len) != 0 {
            return Err(rule(number, "length is no multiple of the record length"));
        }
        let range = section_range(entry).ok_or_else(|| rule(number, "lies outside the index"))?;
        if range.start % SECTION_ALIGN != 0 || range.start < end || range.end as u64 > index_len {
            return Err(rule(number, "overlaps another, is not aligned or lies outside the index"));
        }
        if previous_kind >= Some(entry.kind.get()) {
            return Err(rule(number, "kinds do not ascend"));
        }
        previous_kind = Some(entry.kind.get());
        end = range.end;
    }
    Ok((header, table))
}

fn rule(number: u64, rule: &'static str) -> FormatError {
    FormatError::Rule { what: "section", number, rule }
}

/// The bytes of a section in the index; `None` if the numbers overflow.
pub(crate) fn section_range(entry: &SectionEntry) -> Option<Range<usize>> {
    let start = usize::try_from(entry.offset.get()).ok()?;
    let end = start.checked_add(usize::try_from(entry.len.get()).ok()?)?;
    Some(start..end)
}

/// The parts that a reader passes over, and a check does not (SPEC.md 4.2, 11).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unread {
    /// Features that a reader may ignore: bits of later versions.
    pub features: u64,
    /// Kinds of sections that this version does not know.
    pub kinds: Vec<u32>,
    /// Whether bytes that must be 0 are not: reserved fields, and what stands between sections.
    pub has_stray_bytes: bool,
}

impl Unread {
    /// The parts of a container beside the sections of `known` kinds.
    ///
    /// # Errors
    ///
    /// When header or section table are damaged.
    pub fn of(bytes: &[u8], known: &[u32]) -> Result<Self, FormatError> {
        let (header, entries) = parse(bytes)?;
        let mut unread = Self { features: header.features_compatible.get(), ..Self::default() };
        unread.has_stray_bytes = header.reserved != 0;
        let mut end = size_of::<Header>() + size_of_val(entries);
        let is_zero = |range: Range<usize>| bytes.get(range).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
        for entry in entries {
            let range = section_range(entry).expect("checked by parse");
            unread.has_stray_bytes |= !is_zero(end..range.start);
            end = range.end;
            if !known.contains(&entry.kind.get()) {
                unread.kinds.push(entry.kind.get());
            }
        }
        unread.has_stray_bytes |= !is_zero(end..bytes.len());
        Ok(unread)
    }
}

/// Compares every section with its checksum: bytes in open form.
pub(crate) fn check_sections(bytes: &[u8], table: &[SectionEntry]) -> Result<(), FormatError> {
    for entry in table {
        let section = section_range(entry).and_then(|range| bytes.get(range)).unwrap_or_default();
        let found = crc32fast::hash(section);
        if found != entry.crc32.get() {
            return Err(FormatError::Checksum { what: "index section", expected: entry.crc32.get(), found });
        }
    }
    Ok(())
}

/// Decompresses a container of `plain_len` bytes and turns it into the open form.
pub(crate) fn decompress(compressed: &[u8], plain_len: u64) -> Result<Vec<u8>, FormatError> {
    let length = |expected, found| FormatError::Length { what: "index", expected, found };
    if plain_len > INDEX_LEN_MAX {
        return Err(length(INDEX_LEN_MAX, plain_len));
    }
    // Grows with what arrives: a length that lies allocates nothing.
    let failed = |error: io::Error| FormatError::Compression(error.to_string());
    let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed).map_err(failed)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(failed)?;
    let mut bytes = Vec::new();
    decoder.take(plain_len + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 != plain_len {
        return Err(length(plain_len, bytes.len() as u64));
    }
    from_wire(&mut bytes)?;
    Ok(bytes)
}

/// Turns the open form into the wire form, in place (SPEC.md 4.3).
#[expect(clippy::indexing_slicing, reason = "a section of `count` records has a column of `count` for each byte")]
pub(crate) fn to_wire(open: &mut [u8]) -> Result<(), FormatError> {
    rearrange(open, |section, record_len, delta_words| {
        let plain = section.to_vec();
        let count = plain.len() / record_len;
        for word in 0..record_len / 4 {
            let mut previous = 0;
            let is_delta = delta_words >> word & 1 == 1;
            for (number, record) in plain.chunks_exact(record_len).enumerate() {
                let value = word_at(record, word);
                let stored = if is_delta { value.wrapping_sub(previous) } else { value };
                previous = value;
                for (byte, stored) in stored.to_le_bytes().into_iter().enumerate() {
                    section[(word * 4 + byte) * count + number] = stored;
                }
            }
        }
    })
}

/// Turns the wire form into the open form, in place (SPEC.md 4.3).
#[expect(clippy::indexing_slicing, reason = "a section of `count` records has a column of `count` for each byte")]
pub(crate) fn from_wire(wire: &mut [u8]) -> Result<(), FormatError> {
    rearrange(wire, |section, record_len, delta_words| {
        let stored = section.to_vec();
        let count = stored.len() / record_len;
        for word in 0..record_len / 4 {
            let mut previous = 0u32;
            let is_delta = delta_words >> word & 1 == 1;
            for (number, record) in section.chunks_exact_mut(record_len).enumerate() {
                let column = |byte: usize| stored[(word * 4 + byte) * count + number];
                let mut value = u32::from_le_bytes([column(0), column(1), column(2), column(3)]);
                if is_delta {
                    value = value.wrapping_add(previous);
                }
                previous = value;
                record[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    })
}

/// An index in wire form that is too long to be in memory: header and section table, which are the same in both forms.
#[derive(Debug)]
pub struct WireIndex {
    table: Vec<SectionEntry>,
    len: u64,
}

impl WireIndex {
    /// Looks at the first bytes of an index: [`HEAD_LEN_MAX`], or all of a shorter one. `len` is its length.
    ///
    /// # Errors
    ///
    /// When they do not begin an index of this length.
    pub fn parse(head: &[u8], len: u64) -> Result<Self, FormatError> {
        if len > INDEX_LEN_MAX {
            return Err(FormatError::Length { what: "index", expected: INDEX_LEN_MAX, found: len });
        }
        let (_, table) = parse_head(head, len)?;
        Ok(Self { table: table.to_vec(), len })
    }

    /// Writes the open form front to back, in a memory that does not grow with it. `read_at` fills a buffer from an
    /// offset of the wire form.
    ///
    /// # Errors
    ///
    /// The errors of reading and writing, and [`FormatError::Checksum`] when a section is not what the table says.
    pub fn to_open<E: From<FormatError>>(
        &self,
        mut read_at: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
        mut write: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut position = 0;
        for entry in &self.table {
            let (start, len) = (entry.offset.get(), entry.len.get());
            copy(position..start, &mut read_at, &mut write)?;
            let mut hasher = crc32fast::Hasher::new();
            let mut hash_and_write = |bytes: &[u8]| {
                hasher.update(bytes);
                write(bytes)
            };
            match entry.record_len.get() as usize {
                1 => copy(start..start + len, &mut read_at, &mut hash_and_write)?,
                _ => records_to_open(entry, &mut read_at, &mut hash_and_write)?,
            }
            let (expected, found) = (entry.crc32.get(), hasher.finalize());
            if found != expected {
                return Err(FormatError::Checksum { what: "index section", expected, found }.into());
            }
            position = start + len;
        }
        copy(position..self.len, &mut read_at, &mut write)
    }
}

/// Copies what is the same in both forms.
fn copy<E>(
    range: Range<u64>,
    read_at: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    write: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut position = range.start;
    while position < range.end {
        let len = usize::try_from(range.end - position).map_or(PART_LEN, |left| left.min(PART_LEN));
        let mut bytes = vec![0; len];
        read_at(position, &mut bytes)?;
        write(&bytes)?;
        position += len as u64;
    }
    Ok(())
}

/// Brings the records of a section, which stand in columns of single bytes, into rows.
#[expect(clippy::indexing_slicing, reason = "a part of `part_count` records has a column of so many for each byte")]
fn records_to_open<E>(
    entry: &SectionEntry,
    read_at: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    write: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let record_len = entry.record_len.get() as usize;
    let count = entry.len.get() / record_len as u64;
    let mut previous = vec![0u32; record_len / 4];
    let mut first = 0;
    while first < count {
        let part_count = usize::try_from(count - first).map_or(PART_LEN, |left| left.min(PART_LEN / record_len));
        let mut columns = vec![0; part_count * record_len];
        for (number, column) in (0u64..).zip(columns.chunks_exact_mut(part_count)) {
            read_at(entry.offset.get() + number * count + first, column)?;
        }
        let mut records = vec![0; part_count * record_len];
        for (number, record) in records.chunks_exact_mut(record_len).enumerate() {
            for (word, previous) in previous.iter_mut().enumerate() {
                let column = |byte: usize| columns[(word * 4 + byte) * part_count + number];
                let stored = u32::from_le_bytes([column(0), column(1), column(2), column(3)]);
                let is_delta = entry.delta_words.get() >> word & 1 == 1;
                *previous = if is_delta { stored.wrapping_add(*previous) } else { stored };
                record[word * 4..word * 4 + 4].copy_from_slice(&previous.to_le_bytes());
            }
        }
        write(&records)?;
        first += part_count as u64;
    }
    Ok(())
}

fn word_at(record: &[u8], word: usize) -> u32 {
    record.as_chunks().0.get(word).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn rearrange(bytes: &mut [u8], section: impl Fn(&mut [u8], usize, u32)) -> Result<(), FormatError> {
    let table = parse(bytes)?.1.to_vec();
    for entry in &table {
        let record_len = entry.record_len.get() as usize;
        if record_len > 1 {
            let range = section_range(entry).expect("checked by parse");
            section(bytes.get_mut(range).expect("checked by parse"), record_len, entry.delta_words.get());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(records: &[u8], text: &[u8], delta_words: u32) -> Vec<u8> {
        encode(
            7,
            8,
            &[
                NewSection { kind: 1, record_len: 12, delta_words, bytes: records },
                NewSection { kind: 2, record_len: 1, delta_words: 0, bytes: text },
            ],
        )
    }

    fn to_open(wire: &[u8]) -> Result<Vec<u8>, FormatError> {
        let index = WireIndex::parse(&wire[..wire.len().min(HEAD_LEN_MAX)], wire.len() as u64)?;
        let mut open = Vec::new();
        let read_at = |offset: u64, buffer: &mut [u8]| {
            let start = usize::try_from(offset).expect("in memory");
            buffer.copy_from_slice(&wire[start..start + buffer.len()]);
            Ok(())
        };
        index.to_open(read_at, |bytes| {
            open.extend_from_slice(bytes);
            Ok::<_, FormatError>(())
        })?;
        Ok(open)
    }

    #[test]
    fn an_index_of_many_parts_is_opened_as_one_in_memory() {
        let records: Vec<u8> =
            (0u32..).take(3 * PART_LEN).flat_map(|number| number.wrapping_mul(number).to_le_bytes()).collect();
        let open = sample(&records[..records.len() / 12 * 12], &records[..PART_LEN + 7], 5);
        let mut wire = open.clone();
        to_wire(&mut wire).expect("an index");
        assert!(to_open(&wire) == Ok(open));
    }

    #[test]
    fn a_section_that_is_not_what_its_table_says_is_refused_while_it_is_opened() {
        let mut wire = sample(&[3; 36], b"text", 1);
        to_wire(&mut wire).expect("an index");
        *wire.last_mut().expect("not empty") ^= 1;
        assert!(matches!(to_open(&wire), Err(FormatError::Checksum { what: "index section", .. })));
    }

    proptest! {
        #[test]
        fn wire_form_is_opened_in_parts_as_in_memory(
            records in proptest::collection::vec(any::<[u8; 12]>(), 0..50),
            text in proptest::collection::vec(any::<u8>(), 0..50),
            delta_words in 0u32..8,
        ) {
            let open = sample(&records.concat(), &text, delta_words);
            let mut wire = open.clone();
            to_wire(&mut wire)?;
            prop_assert_eq!(to_open(&wire), Ok(open));
        }

        #[test]
        fn wire_form_is_reversible(
            records in proptest::collection::vec(any::<[u8; 12]>(), 0..50),
            text in proptest::collection::vec(any::<u8>(), 0..50),
            delta_words in 0u32..8,
        ) {
            let open = sample(&records.concat(), &text, delta_words);
            let mut wire = open.clone();
            to_wire(&mut wire)?;
            from_wire(&mut wire)?;
            prop_assert_eq!(wire, open);
        }

        #[test]
        fn changed_bytes_never_panic(position in 0usize..200, value: u8) {
            let mut bytes = sample(&[3; 36], b"text", 1);
            let position = position % bytes.len();
            bytes[position] = value;
            if let Ok((_, table)) = parse(&bytes) {
                let _ = check_sections(&bytes, table);
            }
            let _ = from_wire(&mut bytes);
        }
    }

    #[test]
    fn every_length_but_the_right_one_is_refused() {
        let bytes = sample(&[3; 36], b"text", 1);
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "{len}");
        }
        assert!(parse(&[bytes.as_slice(), &[0]].concat()).is_err());
        assert!(parse(&bytes).is_ok());
    }

    #[test]
    fn a_flipped_bit_in_a_section_fails_its_checksum() {
        let mut bytes = sample(&[3; 36], b"text", 1);
        *bytes.last_mut().expect("not empty") ^= 1;
        let table = parse(&bytes).expect("the header is fine").1;
        assert!(matches!(check_sections(&bytes, table), Err(FormatError::Checksum { .. })));
    }
}
