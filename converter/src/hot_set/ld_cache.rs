//! `/etc/ld.so.cache`: which file a library name means to glibc's loader (glibc `dl-cache.h`).
//!
//! The cache is two formats that may stand behind each other: the old one, and behind it or alone the
//! new one, "1.1". Damaged bytes give fewer libraries.

use std::collections::BTreeMap;

const OLD_MAGIC: &[u8] = b"ld.so-1.7.0";
/// Length of the old header: magic, one byte of padding, number of entries.
const OLD_HEADER_LEN: usize = 16;
const OLD_ENTRY_LEN: usize = 12;
const NEW_MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const NEW_HEADER_LEN: usize = 48;
const NEW_ENTRY_LEN: usize = 24;
/// Offset of the flags in the new header, and their value for big-endian numbers.
const NEW_FLAGS_OFFSET: usize = 28;
const BIG_ENDIAN_FLAG: u8 = 3;
/// Longest name or path that is taken.
const STRING_LEN_MAX: usize = 4096;
/// Most bytes of names and paths: entries may share strings, so a short file could say gigabytes.
const STRINGS_LEN_MAX: usize = 16 << 20;

/// Paths of libraries by name, those for any processor first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LdCache {
    paths: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    strings_len: usize,
}

impl LdCache {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let new = match old_len(bytes) {
            Some(old_len) => bytes.get(old_len.next_multiple_of(8)..).unwrap_or_default(),
            None => bytes,
        };
        let mut cache = Self::default();
        if new.starts_with(NEW_MAGIC) {
            cache.add_new(new);
        } else {
            cache.add_old(bytes);
        }
        cache
    }

    /// Where a library may be: several entries are for several kinds of processor.
    pub(super) fn paths(&self, name: &[u8]) -> &[Vec<u8>] {
        self.paths.get(name).map_or(&[], Vec::as_slice)
    }

    fn add_new(&mut self, bytes: &[u8]) {
        let is_big = bytes.get(NEW_FLAGS_OFFSET) == Some(&BIG_ENDIAN_FLAG);
        let Some(count) = number(bytes, NEW_MAGIC.len(), is_big) else { return };
        let entries = bytes.get(NEW_HEADER_LEN..).unwrap_or_default().chunks_exact(NEW_ENTRY_LEN).take(count);
        // Strings stand behind the entries, their offsets count from the header.
        let mut for_some_processors = Vec::new();
        for entry in entries {
            let string_at = |at| number(entry, at, is_big).and_then(|offset| string(bytes, offset));
            let (Some(name), Some(path)) = (string_at(4), string_at(8)) else { continue };
            if entry[16..].iter().any(|byte| *byte != 0) {
                for_some_processors.push((name, path));
            } else {
                self.add(name, path);
            }
        }
        for (name, path) in for_some_processors {
            self.add(name, path);
        }
    }

    fn add_old(&mut self, bytes: &[u8]) {
        let Some(strings) = old_len(bytes).and_then(|len| bytes.get(len..)) else { return };
        let Some(entries) = bytes.get(OLD_HEADER_LEN..bytes.len() - strings.len()) else { return };
        for entry in entries.chunks_exact(OLD_ENTRY_LEN) {
            let string_at = |at| number(entry, at, false).and_then(|offset| string(strings, offset));
            if let (Some(name), Some(path)) = (string_at(4), string_at(8)) {
                self.add(name, path);
            }
        }
    }

    fn add(&mut self, name: &[u8], path: &[u8]) {
        self.strings_len += name.len() + path.len();
        if self.strings_len > STRINGS_LEN_MAX {
            return;
        }
        self.paths.entry(name.to_vec()).or_default().push(path.to_vec());
    }
}

/// Length of header and entries in the old format, if the bytes start with it.
fn old_len(bytes: &[u8]) -> Option<usize> {
    if !bytes.starts_with(OLD_MAGIC) {
        return None;
    }
    let count = number(bytes, 12, false)?;
    count.checked_mul(OLD_ENTRY_LEN)?.checked_add(OLD_HEADER_LEN).filter(|len| *len <= bytes.len())
}

fn number(bytes: &[u8], offset: usize, is_big: bool) -> Option<usize> {
    let bytes: [u8; 4] = bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?;
    usize::try_from(if is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }).ok()
}

/// The bytes up to the next zero.
fn string(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let bytes = bytes.get(offset..)?;
    let len = bytes.iter().take(STRING_LEN_MAX).position(|byte| *byte == 0)?;
    (len > 0).then(|| &bytes[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache in the new format.
    fn new_format(entries: &[(&str, &str, u64)], big: bool) -> Vec<u8> {
        let number = |number: usize| {
            let number = u32::try_from(number).unwrap();
            if big { number.to_be_bytes() } else { number.to_le_bytes() }
        };
        let mut bytes = [NEW_MAGIC, &number(entries.len())].concat();
        bytes.resize(NEW_HEADER_LEN, 0);
        bytes[NEW_FLAGS_OFFSET] = if big { BIG_ENDIAN_FLAG } else { 2 };
        let strings_start = NEW_HEADER_LEN + entries.len() * NEW_ENTRY_LEN;
        let mut strings = Vec::new();
        for (name, path, hwcap) in entries {
            let name_offset = strings_start + strings.len();
            strings.extend_from_slice(format!("{name}\0{path}\0").as_bytes());
            let path_offset = name_offset + name.len() + 1;
            for field in [3, name_offset, path_offset, 0] {
                bytes.extend_from_slice(&number(field));
            }
            bytes.extend_from_slice(&hwcap.to_le_bytes());
        }
        [bytes, strings].concat()
    }

    fn old_format(entries: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = [OLD_MAGIC, b"\0"].concat();
        bytes.extend_from_slice(&u32::try_from(entries.len()).unwrap().to_le_bytes());
        let mut strings = Vec::new();
        for (name, path) in entries {
            let offset = u32::try_from(strings.len()).unwrap();
            let path_offset = offset + u32::try_from(name.len()).unwrap() + 1;
            for field in [3, offset, path_offset] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
            strings.extend_from_slice(format!("{name}\0{path}\0").as_bytes());
        }
        [bytes, strings].concat()
    }

    #[test]
    fn entries_for_any_processor_come_first() {
        for big in [false, true] {
            let entries = [("liba.so", "/lib/v3/liba.so", 2), ("liba.so", "/lib/liba.so", 0), ("b", "/b", 0)];
            let cache = LdCache::parse(&new_format(&entries, big));
            assert_eq!(cache.paths(b"liba.so"), [b"/lib/liba.so".to_vec(), b"/lib/v3/liba.so".to_vec()]);
            assert_eq!(cache.paths(b"b"), [b"/b".to_vec()]);
            assert_eq!(cache.paths(b"none"), [] as [Vec<u8>; 0]);
        }
    }

    #[test]
    fn the_old_format_is_read_alone_and_skipped_before_the_new() {
        let old = old_format(&[("liba.so", "/old/liba.so")]);
        assert_eq!(LdCache::parse(&old).paths(b"liba.so"), [b"/old/liba.so".to_vec()]);
        // Before the new format the old one has no strings of its own.
        let mut both = old_format(&[("x", "y"), ("x", "y"), ("x", "y")]);
        both.truncate(OLD_HEADER_LEN + 3 * OLD_ENTRY_LEN);
        both.resize(both.len().next_multiple_of(8), 0);
        both.extend(new_format(&[("liba.so", "/new/liba.so", 0)], false));
        assert_eq!(LdCache::parse(&both).paths(b"liba.so"), [b"/new/liba.so".to_vec()]);
    }

    #[test]
    fn long_strings_that_entries_share_are_not_copied_without_end() {
        let mut bytes = new_format(&[("liba.so", &"x".repeat(4000), 0)], false);
        let entry = bytes[NEW_HEADER_LEN..NEW_HEADER_LEN + NEW_ENTRY_LEN].to_vec();
        let strings = bytes.split_off(NEW_HEADER_LEN + NEW_ENTRY_LEN);
        let count = 20_000;
        let moved = u32::try_from((count - 1) * NEW_ENTRY_LEN).unwrap();
        let shifted = |at: usize| (u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()) + moved).to_le_bytes();
        let entry = [&entry[..4], &shifted(4), &shifted(8), &entry[12..]].concat();
        bytes.truncate(NEW_HEADER_LEN);
        bytes[NEW_MAGIC.len()..NEW_MAGIC.len() + 4].copy_from_slice(&u32::try_from(count).unwrap().to_le_bytes());
        bytes.extend(entry.repeat(count));
        bytes.extend(strings);
        let cache = LdCache::parse(&bytes);
        assert_eq!(cache.paths(b"liba.so").len(), STRINGS_LEN_MAX / 4007);
    }

    #[test]
    fn agrees_with_ldconfig_about_the_c_library() {
        let Ok(bytes) = std::fs::read("/etc/ld.so.cache") else { return };
        let listed = std::process::Command::new("/sbin/ldconfig").arg("-p").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let cache = LdCache::parse(&bytes);
        let mut count = 0;
        for line in listed.lines() {
            let Some((name, path)) = line.split_once(" => ") else { continue };
            let name = name.trim().split(' ').next().unwrap();
            assert!(cache.paths(name.as_bytes()).contains(&path.as_bytes().to_vec()), "{line}");
            count += 1;
        }
        assert!(count > 10, "{listed}");
    }

    #[test]
    fn damaged_bytes_never_panic() {
        let whole = new_format(&[("liba.so", "/lib/liba.so", 0), ("libb.so", "/lib/libb.so", 7)], false);
        let old = old_format(&[("liba.so", "/old/liba.so")]);
        for bytes in [whole, old] {
            for len in 0..bytes.len() {
                LdCache::parse(&bytes[..len]);
                for value in [0, 1, 0x7f, 0xff] {
                    let mut damaged = bytes.clone();
                    damaged[len] = value;
                    LdCache::parse(&damaged);
                }
            }
        }
    }
}
