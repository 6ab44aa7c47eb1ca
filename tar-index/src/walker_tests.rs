//! Tests of the walker: one feature of tar each, in streams made here.

use std::io::Write as _;

use proptest::prelude::*;

use super::*;

/// A stream in memory.
struct Memory<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl TarInput for Memory<'_> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        let rest = &self.bytes[self.position..];
        Ok(&rest[..len.min(rest.len())])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.position += len;
        assert!(self.position <= self.bytes.len(), "only what was seen is consumed");
        Ok(())
    }

    fn position(&self) -> u64 {
        self.position as u64
    }
}

/// Walks to the end; every entry with its stored content.
fn walk(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut input = Memory { bytes, position: 0 };
    let mut entries = Vec::new();
    while let Some(entry) = next_entry(&mut input)? {
        let start = input.position;
        let end = start + usize::try_from(entry.stored_len).unwrap_or(usize::MAX / 2);
        let content = bytes.get(start..end).ok_or(TarError::Truncated(bytes.len() as u64))?;
        input.position = bytes.len().min(end + usize::try_from(entry.padding_len).unwrap());
        entries.push((entry, content.to_vec()));
    }
    Ok(entries)
}

fn header(type_flag: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().linkflag = [type_flag];
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(1_700_000_000);
    header
}

fn raw(header: &mut tar::Header, path: &[u8], content: &[u8]) -> Vec<u8> {
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK_LEN), 0);
    bytes
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| len.to_string().len() + rest == *len).unwrap();
        write!(content, "{len} {key}=").unwrap();
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    raw(&mut header(b'x', content.len() as u64), b"PaxHeaders/x", &content)
}

fn file(path: &[u8], content: &[u8]) -> Vec<u8> {
    raw(&mut header(b'0', content.len() as u64), path, content)
}

const END: [u8; 2 * BLOCK_LEN] = [0; 2 * BLOCK_LEN];

fn only_entry(parts: &[&[u8]]) -> (Entry, Vec<u8>) {
    let mut entries = walk(&[parts.concat(), END.to_vec()].concat()).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

#[test]
fn reads_what_a_common_writer_writes() {
    let long = format!("{}/file", "directory".repeat(20));
    let target = "target".repeat(30);
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |header: &mut tar::Header, path: &str, content: &[u8]| {
        builder.append_data(header, path, content).unwrap();
    };
    add(&mut header(b'5', 0), "directory/", b"");
    add(&mut header(b'0', 5), &long, b"hello");
    add(&mut header(b'0', 512), "block", &[7; 512]);
    builder.append_link(&mut header(b'2', 0), "symlink", &target).unwrap();
    builder.append_link(&mut header(b'1', 0), "hard-link", "block").unwrap();
    let mut device = header(b'3', 0);
    device.set_device_major(10).unwrap();
    device.set_device_minor(300).unwrap();
    builder.append_data(&mut device, "device", [].as_slice()).unwrap();
    let bytes = builder.into_inner().unwrap();
    let entries = walk(&bytes).unwrap();
    let shown: Vec<_> = entries
        .iter()
        .map(|(entry, content)| {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            (text(&entry.path), entry.kind, text(&entry.link_target), content.len())
        })
        .collect();
    let expected = [
        ("directory/".to_owned(), EntryKind::Directory, String::new(), 0),
        (long, EntryKind::Regular, String::new(), 5),
        ("block".to_owned(), EntryKind::Regular, String::new(), 512),
        ("symlink".to_owned(), EntryKind::Symlink, target, 0),
        ("hard-link".to_owned(), EntryKind::HardLink, "block".to_owned(), 0),
        ("device".to_owned(), EntryKind::Character, String::new(), 0),
    ];
    assert_eq!(shown, expected);
    assert_eq!(entries[5].0.device, (10, 300));
    assert_eq!((entries[1].0.mode, entries[1].0.mtime.seconds), (0o644, 1_700_000_000));
}

#[test]
fn an_entry_starts_at_its_first_header() {
    let first = file(b"first", b"1");
    let bytes = [first.clone(), pax(&[("path", b"second")]), file(b"x", b"22"), END.to_vec()].concat();
    let entries = walk(&bytes).unwrap();
    assert_eq!((entries[0].0.start, entries[1].0.start), (0, first.len() as u64));
    assert_eq!(entries[1].1, b"22");
}

#[test]
fn pax_records_replace_header_fields() {
    let records: [(&str, &[u8]); 6] = [
        ("path", b"long\xff"),
        ("size", b"3"),
        ("uid", b"70000000"),
        ("gid", b"5"),
        ("mtime", b"-1.25"),
        ("SCHILY.xattr.security.capability", b"\0\x01\n="),
    ];
    let mut wrong_size = header(b'0', 0);
    let (entry, content) = only_entry(&[&pax(&records), &raw(&mut wrong_size, b"short", b"abc")]);
    let found = (entry.path.as_slice(), entry.size, entry.uid, entry.gid, content.as_slice());
    assert_eq!(found, (&b"long\xff"[..], 3, 70_000_000, 5, &b"abc"[..]));
    assert_eq!(entry.mtime, Time { seconds: -2, nanoseconds: 750_000_000 });
    assert_eq!(entry.xattrs, [(b"security.capability".to_vec(), b"\0\x01\n=".to_vec())].into());
}

#[test]
fn global_pax_headers_are_entries_without_effect() {
    let mut global = pax(&[("path", b"global"), ("uid", b"9")]);
    global[156] = b'g';
    let mut block = tar::Header::from_byte_slice(&global[..BLOCK_LEN]).clone();
    block.set_cksum();
    global[..BLOCK_LEN].copy_from_slice(block.as_bytes());
    let entries = walk(&[global, file(b"file", b""), END.to_vec()].concat()).unwrap();
    let shown: Vec<_> = entries.iter().map(|(entry, _)| (entry.kind, entry.path.as_slice(), entry.uid)).collect();
    assert_eq!(shown, [(EntryKind::Global, &b"global"[..], 0), (EntryKind::Regular, b"file", 0)]);
}

#[test]
fn links_and_devices_have_no_content_whatever_their_size() {
    for flag in *b"123456" {
        let bytes = [raw(&mut header(flag, 999), b"first", b""), file(b"second", b""), END.to_vec()].concat();
        let entries = walk(&bytes).unwrap();
        assert_eq!(entries[1].0.path, b"second", "{}", char::from(flag));
        assert_eq!(entries[0].0.size, 0);
    }
}

#[test]
fn old_archives_mark_directories_with_a_slash() {
    let (entry, _) = only_entry(&[&raw(&mut header(0, 0), b"directory/", b"")]);
    assert_eq!(entry.kind, EntryKind::Directory);
    let (entry, _) = only_entry(&[&raw(&mut header(0, 0), b"file", b"")]);
    assert_eq!(entry.kind, EntryKind::Regular);
}

fn segments(entry: &Entry) -> Vec<(u64, u64)> {
    let segments = entry.segments.as_ref().expect("sparse");
    segments.iter().map(|segment| (segment.offset, segment.len)).collect()
}

#[test]
fn reads_the_three_pax_sparse_formats() {
    let old: [(&str, &[u8]); 6] = [
        ("GNU.sparse.size", b"1000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"100"),
        ("GNU.sparse.numbytes", b"4"),
        ("GNU.sparse.offset", b"1000"),
        ("GNU.sparse.numbytes", b"0"),
    ];
    let middle: [(&str, &[u8]); 4] = [
        ("GNU.sparse.size", b"1000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.map", b"100,4,1000,0"),
        ("GNU.sparse.name", b"name"),
    ];
    let new: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"name"),
        ("GNU.sparse.realsize", b"1000"),
    ];
    let mut with_map = b"2\n100\n4\n1000\n0\n".to_vec();
    with_map.resize(BLOCK_LEN, 0);
    with_map.extend_from_slice(b"data");
    for (records, content) in [(&old[..], &b"data"[..]), (&middle, b"data"), (&new, &with_map)] {
        let (entry, stored) = only_entry(&[&pax(records), &file(b"name", content)]);
        assert_eq!((entry.path.as_slice(), entry.size, stored.as_slice()), (&b"name"[..], 1000, &b"data"[..]));
        assert_eq!(segments(&entry), [(100, 4), (1000, 0)]);
    }
}

#[test]
fn a_sparse_map_may_need_several_blocks() {
    let count = 200;
    let mut map = format!("{count}\n");
    for number in 0..count {
        map.push_str(&format!("{}\n1\n", number * 4096));
    }
    let mut content = map.into_bytes();
    content.resize(content.len().next_multiple_of(BLOCK_LEN), 0);
    content.extend_from_slice(&vec![1; count]);
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"1000000")];
    let (entry, stored) = only_entry(&[&pax(&records), &file(b"name", &content)]);
    assert_eq!((segments(&entry).len(), stored.len()), (count, count));
}

#[test]
fn refuses_sparse_maps_that_lie() {
    for map in ["100,5", "100,4,99,0", "998,4", "5", "18446744073709551615,4", "100,4,1001,0"] {
        let count = map.split(',').count().div_ceil(2).to_string();
        let records: [(&str, &[u8]); 3] = [
            ("GNU.sparse.size", b"1000"),
            ("GNU.sparse.numblocks", count.as_bytes()),
            ("GNU.sparse.map", map.as_bytes()),
        ];
        let bytes = [pax(&records), file(b"name", b"data"), END.to_vec()].concat();
        assert!(matches!(walk(&bytes), Err(TarError::Malformed { .. })), "{map}");
    }
}

#[test]
fn an_archive_may_end_without_its_last_blocks() {
    let complete = file(b"a", b"1");
    for bytes in [&complete[..], &complete[..BLOCK_LEN + 1], &[complete.clone(), vec![0; BLOCK_LEN]].concat()] {
        assert_eq!(walk(bytes).unwrap().len(), 1, "{}", bytes.len());
    }
    assert_eq!(walk(&[]).unwrap().len(), 0);
}

#[test]
fn refuses_streams_that_end_within_an_entry() {
    let bytes = [pax(&[("path", b"p")]), file(b"a", b"1")].concat();
    for len in [1, BLOCK_LEN + 1, 2 * BLOCK_LEN + 100, 3 * BLOCK_LEN] {
        assert!(walk(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn refuses_what_is_no_tar() {
    let message = |bytes: &[u8]| walk(bytes).unwrap_err().to_string();
    let text = [b'x'; 1024];
    assert_eq!(message(&text), "tar entry at byte 0: its header has no checksum: this is no tar stream");
    let half_an_end = [vec![0; BLOCK_LEN], file(b"a", b"")].concat();
    assert_eq!(message(&half_an_end), "tar entry at byte 0: one block of zeros and something behind it");
    let mut negative = header(b'0', 0);
    negative.as_old_mut().size = [255; 12];
    assert_eq!(message(&raw(&mut negative, b"a", b"")), "tar entry at byte 0: its size is negative");
    let mut endless = header(b'L', 1 << 30);
    assert!(message(&raw(&mut endless, b"a", b"")).contains("longer than 1 MiB"));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let _ = walk(&bytes);
    }

    #[test]
    fn damaged_archives_never_panic(changes in proptest::collection::vec((0usize..8192, any::<u8>()), 1..20)) {
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"1000"), ("mtime", b"1.5"),
        ];
        let mut content = b"2\n100\n4\n1000\n0\n".to_vec();
        content.resize(BLOCK_LEN, 0);
        content.extend_from_slice(b"data");
        let mut bytes = [pax(&records), file(b"sparse", &content), file(b"file", b"abc"), END.to_vec()].concat();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        // So that changes get past the checksum.
        for block in bytes.chunks_exact_mut(BLOCK_LEN) {
            if &block[257..262] == b"ustar" {
                let mut header = tar::Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let _ = walk(&bytes);
    }
}
