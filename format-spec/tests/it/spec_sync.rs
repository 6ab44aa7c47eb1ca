//! SPEC.md and the code say the same: every structure table is compared with `offset_of!` and `size_of`,
//! and every number of SPEC.md 5, 8 and 9 with its constant.

use std::mem::offset_of;

use format_spec::{
    Dirent, Extent, Footer, Frame, HotFrame, HotPiece, Inode, annotation, dedup, dedup::DedupPiece, footer,
    footer::SkippableKind, limits, records, signature, table,
};
use format_spec::{
    records::{DedupLocation, Xattr, XattrSet, section},
    table::{Header, SectionEntry},
};

const SPEC: &str = include_str!("../../SPEC.md");

/// The rows of the first table after the heading that contains `heading`, as trimmed cells.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let start = SPEC.find(heading).unwrap_or_else(|| panic!("SPEC.md has no heading {heading:?}"));
    SPEC[start..]
        .lines()
        .skip(1)
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect())
        .collect()
}

/// Each field stands at the end of the one before it, and the fields fill the structure.
macro_rules! compare {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        let offsets = [$((offset_of!($type, $field), stringify!($field))),*];
        let ends = offsets.iter().skip(1).map(|(offset, _)| *offset).chain([size_of::<$type>()]);
        let code: Vec<_> = offsets.iter().zip(ends)
            .map(|((offset, name), end)| (offset.to_string(), (end - offset).to_string(), (*name).to_owned()))
            .collect();
        let spec: Vec<_> = rows(concat!(" `", stringify!($type), "`\n")).into_iter()
            .map(|cells| (cells[0].to_owned(), cells[1].to_owned(), cells[2].to_owned()))
            .collect();
        assert_eq!(spec, code, "SPEC.md and code differ on {}", stringify!($type));
    }};
}

#[test]
fn structures_are_those_of_the_specification() {
    compare!(Footer {
        magic,
        version,
        reserved,
        features_compatible,
        features_incompatible,
        index_offset,
        index_compressed_len,
        index_plain_len,
        index_digest,
        hot_offset,
        hot_len,
        dedup_offset,
        dedup_len,
        reserved2,
        crc32,
    });
    compare!(Header {
        magic,
        version,
        section_count,
        features_compatible,
        features_incompatible,
        tar_len,
        space_len,
        index_len,
        reserved,
        crc32,
    });
    compare!(SectionEntry { kind, record_len, offset, len, crc32, delta_words });
    compare!(Inode {
        mode,
        uid,
        gid,
        nlink,
        mtime_seconds,
        mtime_nanoseconds,
        payload,
        size,
        plain_offset,
        xattrs,
        flags,
        layer,
        parent,
    });
    compare!(Dirent { name_offset, inode });
    compare!(XattrSet { first, count });
    compare!(Xattr { name_offset, name_len, value_offset, value_len });
    compare!(Extent { tar_offset, plain_offset, len });
    compare!(Frame { blob_offset, tar_offset, compressed_len, plain_len, digest });
    compare!(HotFrame { compressed_len, plain_len, digest });
    compare!(HotPiece { plain_offset, len, reason });
    compare!(DedupLocation { compressed_len, plain_len, digest });
    compare!(DedupPiece { plain_offset, len, digest });
}

#[test]
fn sections_are_those_of_the_specification() {
    let code = [
        (section::INODES, size_of::<Inode>()),
        (section::DIRENTS, size_of::<Dirent>()),
        (section::NAMES, 1),
        (section::STRINGS, 1),
        (section::XATTR_SETS, size_of::<XattrSet>()),
        (section::XATTRS, size_of::<Xattr>()),
        (section::EXTENTS, size_of::<Extent>()),
        (section::FRAMES, size_of::<Frame>()),
        (section::LAYERS, 32),
        (section::HOT_FRAMES, size_of::<HotFrame>()),
        (section::HOT_PIECES, size_of::<HotPiece>()),
        (section::DEDUP, size_of::<DedupLocation>()),
    ]
    .map(|(kind, len)| (kind.to_string(), len.to_string()));
    let spec: Vec<_> = rows("## 5. Records").iter().map(|cells| (cells[0].to_owned(), cells[3].to_owned())).collect();
    assert_eq!(spec, code);
}

#[test]
fn words_of_the_text_are_those_of_the_code() {
    assert!(SPEC.contains(&format!("one section of kind {} that holds `DedupPiece`", dedup::PIECES)));
    let reasons = [
        (records::hot_reason::PROFILE, "profile"),
        (records::hot_reason::COMMAND, "command"),
        (records::hot_reason::INTERPRETER, "interpreter"),
        (records::hot_reason::LIBRARY, "library"),
        (records::hot_reason::SYSTEM, "system"),
        (records::hot_reason::RUNTIME, "runtime"),
    ];
    let text = reasons.map(|(number, name)| format!("{number} {name}")).join(", ");
    assert!(SPEC.contains(&text), "{text}");
}

#[test]
fn magic_numbers_are_those_of_the_specification() {
    let code = [SkippableKind::Index, SkippableKind::HotPack, SkippableKind::Dedup, SkippableKind::Footer]
        .map(|kind| format!("0x{:X}", kind as u32));
    let spec: Vec<_> = rows("## 2. Layer blob").iter().map(|cells| cells[0].to_owned()).collect();
    assert_eq!(spec, code);
    assert_eq!(rows("### 3.1 `Footer`")[0][3].as_bytes(), footer::FOOTER_MAGIC);
    assert_eq!(rows("### 4.1 `Header`")[0][3].as_bytes(), table::MAGIC);
}

#[test]
fn annotations_are_those_of_the_specification() {
    let spec: Vec<_> = rows("## 8. Annotations").iter().map(|cells| cells[0]).collect();
    assert_eq!(spec, annotation::ALL);
    for name in [annotation::SOURCE_DIGEST, annotation::SOURCE_DIFF_ID, annotation::SOURCE_OPTIONS] {
        assert!(SPEC.contains(&format!("`{name}` is ")), "{name}");
    }
}

#[test]
fn signatures_are_those_of_the_specification() {
    assert_eq!(rows("### 8.1 Signatures")[0][0], signature::SIGNATURE);
    assert!(SPEC.contains(&format!("each with a line feed: `{}`,", signature::CONTEXT)));
    assert!(SPEC.contains(&format!("1 to {} signatures of different keys", signature::SIGNATURES_MAX)));
}

#[test]
fn limits_are_those_of_the_specification() {
    let spec: Vec<_> = rows("## 9. Limits").iter().map(|cells| cells[1].to_owned()).collect();
    let code = [
        format!("{} GiB", limits::INDEX_LEN_MAX >> 30),
        (1 << table::WINDOW_LOG_MAX).to_string(),
        limits::FRAME_PLAIN_LEN_MAX.to_string(),
        limits::FRAME_COMPRESSED_LEN_MAX.to_string(),
        format!(
            "{} GiB and {} bytes for each compressed byte of the frames, together at most {} GiB",
            limits::SPACE_LEN_FREE >> 30,
            limits::SPACE_PER_FRAME_BYTE,
            limits::SPACE_LEN_MAX >> 30
        ),
        table::SECTION_COUNT_MAX.to_string(),
        limits::NAME_LEN_MAX.to_string(),
        limits::TARGET_LEN_MAX.to_string(),
        format!("{}, {}", limits::NAME_LEN_MAX, limits::XATTR_VALUE_LEN_MAX),
        limits::TEXTS_LEN_MAX.to_string(),
        limits::LAYER_COUNT_MAX.to_string(),
    ];
    assert_eq!(spec, code);
}
