//! Layers from a few bytes, merged and written as EROFS: deeper than changed bytes of an index get.
//!
//! The bytes are read as operations over a small set of names, so that entries meet: whiteouts, hard links,
//! symbolic links on the way, replaced directories.

use std::collections::BTreeMap;

use arbitrary::{Arbitrary, Unstructured};
use format_spec::{Digest, Frame, Index, LayerData, limits::FRAME_PLAIN_LEN_MAX};
use tar_index::{
    Time,
    layer_index::build_index,
    tree::LayerTree,
    walker::{Entry, EntryKind, Segment},
};
use tree::{erofs::write_image, merge::merge};

use super::one_line;
use crate::tree_rules::assert_tree;

/// One entry of a layer.
#[derive(Debug, Arbitrary)]
struct Operation {
    kind: u8,
    /// Which of a few names the path is made of, four bits each.
    path: u16,
    target: u16,
    mode: u16,
    owner: u8,
    mtime: i32,
    len: u16,
    xattr: u8,
}

const NAMES: [&[u8]; 16] = [
    b"",
    b"a",
    b"b",
    b"c",
    b"d",
    b"..",
    b".",
    b".wh.a",
    b".wh.b",
    b".wh..wh..opq",
    b".wh..wh.x",
    b"\xff\xfe",
    b"long-name-long-name-long-name-long-name-long-name-long-name-long-name-long-name-long-name",
    b".wh.",
    b"a.wh.b",
    b"e",
];

/// All bytes: up to three layers of operations.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(layer_count) = input.int_in_range(1..=3u8) else { return };
    let mut layers = Vec::new();
    for _ in 0..layer_count {
        let count = usize::from(u8::arbitrary(&mut input).unwrap_or(0));
        let operations = (0..count).map_while(|_| if input.is_empty() { None } else { input.arbitrary().ok() });
        layers.push(layer(operations));
    }
    let layers: Vec<_> =
        layers.iter().enumerate().map(|(number, index)| (Digest::of(&[number.to_le_bytes()[0]]), index)).collect();
    let bytes = merge(&layers).expect("indexes of conversions merge");
    let tree = Index::open(bytes.as_slice()).expect("a tree");
    assert_eq!(tree.check(), Ok(()));
    assert_tree(&tree);
    let mut image = Vec::new();
    match write_image(&tree, &mut image) {
        Ok(summary) => assert_eq!(summary.image_len, image.len() as u64),
        Err(error) => one_line(&error),
    }
}

/// The index of a layer with these entries; what a conversion would refuse is left out.
fn layer(operations: impl Iterator<Item = Operation>) -> Index<Vec<u8>> {
    const HEADER_LEN: u64 = 512;
    let mut tree = LayerTree::default();
    let mut position = 0;
    for operation in operations {
        let content_start = position + HEADER_LEN;
        let entry = entry(&operation, position);
        position = content_start + entry.stored_len + entry.padding_len;
        let _ = tree.apply(entry, content_start);
    }
    let built = build_index(tree).expect("small trees break no limit");
    let frames = frames(position);
    let data = LayerData {
        tar_len: position,
        space_len: built.space_len,
        extents: &built.extents,
        frames: &frames,
        ..LayerData::default()
    };
    let compressed = built.builder.finish_layer(&data).expect("a tree that was built keeps all rules");
    let index = Index::from_compressed(&compressed.bytes, &compressed.location(0)).expect("and comes back");
    assert_tree(&index);
    index
}

fn entry(operation: &Operation, start: u64) -> Entry {
    let path =
        |bits: u16| (0..4).map(|part| NAMES[usize::from(bits >> (part * 4) & 15)]).collect::<Vec<_>>().join(&b'/');
    let kind = match operation.kind % 8 {
        0 | 1 => EntryKind::Regular,
        2 => EntryKind::HardLink,
        3 => EntryKind::Symlink,
        4 | 5 => EntryKind::Directory,
        6 => EntryKind::Character,
        _ => EntryKind::Fifo,
    };
    let len = if kind == EntryKind::Regular { u64::from(operation.len) } else { 0 };
    let is_sparse = operation.kind & 0x80 != 0 && len > 0;
    let segments = is_sparse.then(|| {
        let half = len / 2;
        vec![Segment { offset: half, len: half }, Segment { offset: len * 2, len: len - half }]
    });
    let value = vec![operation.xattr; usize::from(operation.xattr)];
    let xattrs: &[(&[u8], &[u8])] = match operation.xattr % 4 {
        0 => &[],
        1 => &[(b"user.a", &value)],
        2 => &[(b"security.capability", &value), (b"user.b", b"")],
        _ => &[(b"trusted.overlay.opaque", b"y"), (b"user.a", &value)],
    };
    Entry {
        start,
        path: path(operation.path),
        kind,
        mode: u32::from(operation.mode & 0o7777),
        uid: operation.owner.into(),
        gid: i64::from(operation.owner) << 12,
        mtime: Time { seconds: operation.mtime.into(), nanoseconds: u32::from(operation.mode) },
        link_target: path(operation.target),
        device: (i64::from(operation.owner) % 2, i64::from(operation.mode) % 3),
        xattrs: xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect::<BTreeMap<_, _>>(),
        size: if is_sparse { len * 3 } else { len },
        segments,
        stored_len: len,
        padding_len: len.wrapping_neg() % 512,
    }
}

fn frames(tar_len: u64) -> Vec<Frame> {
    let starts = (0..tar_len).step_by(FRAME_PLAIN_LEN_MAX as usize);
    starts
        .zip(0u64..)
        .map(|(start, number)| Frame {
            blob_offset: number.into(),
            tar_offset: start.into(),
            compressed_len: 1.into(),
            plain_len: u32::try_from((tar_len - start).min(FRAME_PLAIN_LEN_MAX.into()))
                .expect("at most a frame")
                .into(),
            digest: [0; 32],
        })
        .collect()
}
