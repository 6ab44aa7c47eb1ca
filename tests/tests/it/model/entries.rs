//! Random entries, and their bytes in one of the dialects that can say them.

use std::fmt::Write as _;

use lazuli_tests::{
    RawHeader, RawTar,
    raw_tar::{BLOCK_LEN, Magic},
    samples::noise,
};
use proptest::prelude::*;

/// An entry as its writer means it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: String,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: (i64, i64),
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
    pub(crate) dialect: Dialect,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular(Vec<u8>),
    Directory,
    Symlink(String),
    HardLink(String),
    Fifo,
    /// Character or block device.
    Device(bool, (u32, u32)),
    Global,
}

/// How a path, and for files the content, is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    Ustar,
    Gnu,
    GnuLongNames,
    Pax,
    Sparse00,
    Sparse01,
    Sparse10,
}

/// Few names, so that entries meet often; one is not ASCII, one is long.
const NAMES: [&str; 5] =
    ["a", "b", "c", "ä\u{7f}", "a-name-that-is-so-long-that-several-of-them-do-not-fit-into-one-header"];
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn name() -> impl Strategy<Value = &'static str> {
    prop_oneof![5 => Just(NAMES[0]), 4 => Just(NAMES[1]), 2 => Just(NAMES[2]), 1 => Just(NAMES[3]), 1 => Just(NAMES[4])]
}

/// A path of one to three names, sometimes not clean, sometimes a whiteout.
fn path() -> impl Strategy<Value = String> {
    let marker = prop_oneof![8 => Just(""), 2 => Just(".wh."), 1 => Just("opaque")];
    let start = prop_oneof![8 => Just(""), 1 => Just("./"), 1 => Just("/"), 1 => Just("../"), 1 => Just("a/../")];
    (start, proptest::collection::vec(name(), 1..4), marker).prop_map(|(start, mut names, marker)| {
        let last = names.pop().unwrap_or_default();
        let last = if marker == "opaque" { ".wh..wh..opq".to_owned() } else { format!("{marker}{last}") };
        let names: String = names.iter().map(|name| format!("{name}/")).collect();
        format!("{start}{names}{last}")
    })
}

fn target() -> impl Strategy<Value = String> {
    let start = prop_oneof![4 => Just(""), 1 => Just("/"), 1 => Just("../"), 1 => Just("./")];
    (start, proptest::collection::vec(name(), 1..3)).prop_map(|(start, names)| format!("{start}{}", names.join("/")))
}

/// Content with holes in it.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let len = prop_oneof![3 => Just(0usize), 3 => 1usize..600, 1 => Just(5000usize)];
    (any::<u64>(), len, 0usize..3000).prop_map(|(seed, len, hole)| {
        let mut content = noise(seed, len);
        if len > hole {
            content[hole..len - (len - hole) / 3].fill(0);
        }
        content
    })
}

fn kind() -> impl Strategy<Value = Kind> {
    let numbers = prop_oneof![1 => Just((0, 0)), 2 => (0u32..300, 0u32..300)];
    prop_oneof![
        5 => content().prop_map(Kind::Regular),
        4 => Just(Kind::Directory),
        2 => target().prop_map(Kind::Symlink),
        2 => target().prop_map(Kind::HardLink),
        1 => Just(Kind::Fifo),
        1 => (any::<bool>(), numbers).prop_map(|(is_character, numbers)| Kind::Device(is_character, numbers)),
        1 => Just(Kind::Global),
    ]
}

pub(crate) fn entry() -> impl Strategy<Value = Entry> {
    let mode = proptest::sample::select(vec![0o644, 0o755, 0, 0o4711, 0o2775, 0o1777]);
    let id = proptest::sample::select(vec![0, 1000, 70_000, 3_000_000_000, -1, -2, 1 << 32 | 5]);
    let seconds = proptest::sample::select(vec![0, 1, 1_700_000_000, -1, 1 << 33, 9_223_372_036, 1 << 50]);
    let nanoseconds = proptest::sample::select(vec![0, 0, 5, 999_999_999]);
    let xattr =
        proptest::sample::select(vec!["user.a", "user.b", "trusted.c", "security.d", "security.capability", "e.f"]);
    let xattr = (xattr, any::<[u8; 2]>()).prop_map(|(name, value)| {
        let value = if name == "security.capability" { CAPABILITY.to_vec() } else { value.to_vec() };
        (name.to_owned(), value)
    });
    let xattrs = prop_oneof![3 => Just(Vec::new()), 1 => proptest::collection::vec(xattr, 1..3)];
    let dialect = proptest::sample::select(vec![
        Dialect::Ustar,
        Dialect::Gnu,
        Dialect::GnuLongNames,
        Dialect::Pax,
        Dialect::Sparse00,
        Dialect::Sparse01,
        Dialect::Sparse10,
    ]);
    (path(), kind(), mode, (id.clone(), id), (seconds, nanoseconds), xattrs, dialect).prop_map(
        |(path, kind, mode, owner, mtime, xattrs, dialect)| {
            // Of several records for one attribute the last counts.
            let mut unique: Vec<(String, Vec<u8>)> = Vec::new();
            for xattr in xattrs {
                unique.retain(|other| other.0 != xattr.0);
                unique.push(xattr);
            }
            Entry { path, kind, mode, owner, mtime, xattrs: unique, dialect }
        },
    )
}

/// Layers of an image, lowest first.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Vec<Entry>>> {
    proptest::collection::vec(proptest::collection::vec(entry(), 0..9), 1..5)
}

/// The tar stream of a layer.
pub(crate) fn to_tar(entries: &[Entry]) -> Vec<u8> {
    entries.iter().fold(RawTar::new(), write).finish()
}

/// The runs of a file that are not zero.
fn segments(content: &[u8]) -> Vec<(usize, usize)> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < content.len() {
        let is_zero = content[at] == 0;
        let end = content[at..].iter().position(|byte| (*byte == 0) != is_zero).map_or(content.len(), |len| at + len);
        if !is_zero {
            segments.push((at, end - at));
        }
        at = end;
    }
    segments.push((content.len(), 0));
    segments
}

fn write(tar: RawTar, entry: &Entry) -> RawTar {
    let (path, dialect) = (entry.path.as_bytes(), entry.dialect);
    let (type_flag, target, content, device) = match &entry.kind {
        Kind::Regular(content) => (b'0', "", content.as_slice(), (0, 0)),
        Kind::Directory => (b'5', "", &[][..], (0, 0)),
        Kind::Symlink(target) => (b'2', target.as_str(), &[][..], (0, 0)),
        Kind::HardLink(target) => (b'1', target.as_str(), &[][..], (0, 0)),
        Kind::Fifo => (b'6', "", &[][..], (0, 0)),
        Kind::Device(true, device) => (b'3', "", &[][..], *device),
        Kind::Device(false, device) => (b'4', "", &[][..], *device),
        Kind::Global => return tar.global_pax("x", &[("path", path), ("uid", b"77")]),
    };
    let mut records: Vec<(String, Vec<u8>)> = Vec::new();
    let mut record = |key: &str, value: &[u8]| records.push((key.to_owned(), value.to_vec()));
    let is_old = matches!(dialect, Dialect::Ustar | Dialect::Gnu | Dialect::GnuLongNames);
    for (name, value) in &entry.xattrs {
        record(&format!("SCHILY.xattr.{name}"), value);
    }
    let (seconds, nanoseconds) = entry.mtime;
    let time = match (seconds, nanoseconds) {
        (seconds, 0) => seconds.to_string(),
        // Counted from the next second, and backwards.
        (-1, nanoseconds) => format!("-0.{:09}", 1_000_000_000 - nanoseconds),
        (seconds, nanoseconds) => format!("{seconds}.{nanoseconds:09}"),
    };
    if !is_old || nanoseconds != 0 {
        record("mtime", time.as_bytes());
    }
    if !is_old {
        record("uid", entry.owner.0.to_string().as_bytes());
        record("gid", entry.owner.1.to_string().as_bytes());
        record("linkpath", target.as_bytes());
    }
    let mut stored = content.to_vec();
    let is_sparse = type_flag == b'0' && matches!(dialect, Dialect::Sparse00 | Dialect::Sparse01 | Dialect::Sparse10);
    if is_sparse {
        stored = add_sparse_records(&mut records, entry, content);
    } else if !is_old {
        records.push(("path".to_owned(), path.to_vec()));
    }
    let needs_long_names = dialect == Dialect::GnuLongNames || (is_old && path.len().max(target.len()) > 100);
    let short = |bytes: &[u8]| bytes[..bytes.len().min(100)].to_vec();
    let header = RawHeader {
        kind: type_flag,
        path: if is_old { short(path) } else { b"short".to_vec() },
        mode: entry.mode.into(),
        uid: if is_old { entry.owner.0 } else { 1 },
        gid: if is_old { entry.owner.1 } else { 1 },
        mtime: if is_old { seconds } else { 1 },
        target: short(target.as_bytes()),
        device: (device.0.into(), device.1.into()),
        magic: if dialect == Dialect::Ustar { Magic::Ustar } else { Magic::Gnu },
        ..RawHeader::new(type_flag, "")
    };
    let tar = if needs_long_names { tar.gnu_long(b'K', target.as_bytes()).gnu_long(b'L', path) } else { tar };
    let tar = if records.is_empty() { tar } else { tar.pax(&records) };
    tar.entry(&header, &stored)
}

/// Adds the map of a sparse file; returns what is stored.
fn add_sparse_records(records: &mut Vec<(String, Vec<u8>)>, entry: &Entry, content: &[u8]) -> Vec<u8> {
    let segments = segments(content);
    let data = || segments.iter().flat_map(|(start, len)| content[*start..start + len].iter().copied());
    let mut record = |key: &str, value: String| records.push((format!("GNU.sparse.{key}"), value.into_bytes()));
    if entry.dialect == Dialect::Sparse10 {
        record("major", "1".to_owned());
        record("minor", "0".to_owned());
        record("name", entry.path.clone());
        record("realsize", content.len().to_string());
        let mut map = format!("{}\n", segments.len());
        for (start, len) in &segments {
            write!(map, "{start}\n{len}\n").expect("strings take everything");
        }
        let mut stored = map.into_bytes();
        stored.resize(stored.len().next_multiple_of(BLOCK_LEN), 0);
        stored.extend(data());
        return stored;
    }
    record("size", content.len().to_string());
    record("numblocks", segments.len().to_string());
    if entry.dialect == Dialect::Sparse00 {
        for (start, len) in &segments {
            record("offset", start.to_string());
            record("numbytes", len.to_string());
        }
    } else {
        let numbers: Vec<_> = segments.iter().flat_map(|(start, len)| [start.to_string(), len.to_string()]).collect();
        record("map", numbers.join(","));
    }
    records.push(("path".to_owned(), entry.path.clone().into_bytes()));
    data().collect()
}
