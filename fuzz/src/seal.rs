//! Puts checksums right, so that changed bytes get past them to what they protect.
//!
//! It knows where checksums stand and nothing else; bytes that are too short are left as they are.

use format_spec::table::{Header, SectionEntry};
use zerocopy::{FromBytes, IntoBytes};

/// An index in open form (SPEC.md 4): its length, the checksum of each section, that of header and table.
pub fn index(bytes: &mut [u8]) {
    let len = bytes.len() as u64;
    let Ok((header, _)) = Header::mut_from_prefix(bytes) else { return };
    header.index_len = len.into();
    let count = header.section_count.get() as usize;
    let table_start = size_of::<Header>();
    let Some(table_end) = count.checked_mul(size_of::<SectionEntry>()).and_then(|len| len.checked_add(table_start))
    else {
        return;
    };
    if table_end > bytes.len() {
        return;
    }
    let (front, _) = bytes.split_at(table_end);
    let mut entries = <[SectionEntry]>::ref_from_bytes(&front[table_start..]).map(<[_]>::to_vec).unwrap_or_default();
    for entry in &mut entries {
        let start = usize::try_from(entry.offset.get()).unwrap_or(usize::MAX);
        let end = usize::try_from(entry.len.get()).ok().and_then(|len| start.checked_add(len));
        if let Some(section) = end.and_then(|end| bytes.get(start..end)) {
            entry.crc32 = crc32fast::hash(section).into();
        }
    }
    bytes[table_start..table_end].copy_from_slice(entries.as_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..table_start - 4]);
    hasher.update(&bytes[table_start..table_end]);
    bytes[table_start - 4..table_start].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// A structure whose last four bytes are the CRC-32 of all before them.
pub fn crc_at_end(bytes: &mut [u8]) {
    if let Some((content, crc32)) = bytes.split_last_chunk_mut::<4>() {
        *crc32 = crc32fast::hash(content).to_le_bytes();
    }
}

/// A tar stream: the checksum of every block that stands where a header is expected.
pub fn tar(bytes: &mut [u8]) {
    const BLOCK_LEN: usize = 512;
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let mut at = 0;
    while let Some(block) = bytes.get_mut(at..at + BLOCK_LEN) {
        at += BLOCK_LEN;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = block[124..136].iter().skip_while(|byte| **byte == b' ').take_while(|byte| byte.is_ascii_digit());
        let size = digits.fold(0usize, |size, digit| size.saturating_mul(8).saturating_add((digit & 7).into()));
        if matches!(block[156], 0 | b'0' | b'7'..=b'9' | b'A'..=b'z') {
            at = at.saturating_add(size).saturating_add(BLOCK_LEN - 1) / BLOCK_LEN * BLOCK_LEN;
        }
    }
}
