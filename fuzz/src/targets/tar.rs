//! A tar stream as converter reads it: walker, headers, PAX, sparse maps; its tree; its index.

use std::io;

use format_spec::{Digest, FormatError, Frame, Index, LayerData};
use tar_index::{
    layer_index::build_index,
    tree::LayerTree,
    walker::{Entry, TarError, TarInput, next_entry},
};

use super::choose;
use crate::{seal, tree_rules::assert_tree};

/// The stream in memory, behind a peek of limited length.
struct Stream<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl TarInput for Stream<'_> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        assert!(len <= 1024, "the walker looks at two blocks ahead at most");
        let rest = &self.bytes[self.position..];
        Ok(&rest[..len.min(rest.len())])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.position += len;
        assert!(self.position <= self.bytes.len(), "only what was shown is consumed");
        Ok(())
    }

    fn position(&self) -> u64 {
        self.position as u64
    }
}

/// First byte: whether checksums are put right. The rest: the stream.
pub(crate) fn run(data: &[u8]) {
    let Some((how, rest)) = choose(data, 4) else { return };
    let mut bytes = rest.to_vec();
    if how > 0 {
        seal::tar(&mut bytes);
    }
    let Ok(tree) = walk(&bytes) else { return };
    let Ok(built) = build_index(tree) else { return };
    let tar_len = bytes.len() as u64;
    let frame = Frame {
        blob_offset: 0.into(),
        tar_offset: 0.into(),
        compressed_len: 1.into(),
        plain_len: u32::try_from(tar_len).expect("inputs are small").into(),
        digest: *Digest::of(b"").as_bytes(),
    };
    let data = LayerData {
        tar_len,
        space_len: built.space_len,
        extents: &built.extents,
        frames: if tar_len == 0 { &[] } else { std::slice::from_ref(&frame) },
        ..LayerData::default()
    };
    let compressed = match built.builder.finish_layer(&data) {
        // A sparse map may say anything.
        Err(FormatError::Space { .. }) => return,
        compressed => compressed.expect("a tree that was built keeps all other rules"),
    };
    let index = Index::from_compressed(&compressed.bytes, &compressed.location(0)).expect("and comes back");
    assert_eq!(index.inodes().len() as u64, built.inode_count);
    assert_tree(&index);
}

/// Walks to the end as a conversion does.
fn walk(bytes: &[u8]) -> Result<LayerTree, TarError> {
    let mut stream = Stream { bytes, position: 0 };
    let mut tree = LayerTree::default();
    let mut start = 0;
    while let Some(entry) = next_entry(&mut stream)? {
        assert!(entry.start >= start && stream.position as u64 > entry.start, "every entry goes on");
        start = entry.start + 1;
        assert_entry(&entry);
        let content_start = stream.position();
        let left = (bytes.len() - stream.position) as u64;
        if entry.stored_len > left {
            return Err(TarError::Truncated(bytes.len() as u64));
        }
        let skipped = entry.stored_len.saturating_add(entry.padding_len).min(left);
        // What containerd would refuse ends a conversion; here the walk goes on.
        let _ = tree.apply(entry, content_start);
        stream.position += usize::try_from(skipped).expect("at most what is left");
    }
    Ok(tree)
}

fn assert_entry(entry: &Entry) {
    assert!(entry.padding_len < 512);
    assert!(entry.mode <= 0o7777 && entry.mtime.nanoseconds < 1_000_000_000);
    if let Some(segments) = &entry.segments {
        let mut end = 0;
        for segment in segments {
            assert!(segment.offset >= end, "segments ascend");
            end = segment.offset + segment.len;
        }
        assert!(end <= entry.size);
        assert_eq!(segments.iter().map(|segment| segment.len).sum::<u64>(), entry.stored_len);
    } else {
        assert_eq!(entry.size, entry.stored_len);
    }
}
