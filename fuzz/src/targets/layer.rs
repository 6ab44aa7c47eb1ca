//! A layer blob as a registry sends it, through a whole conversion.
//!
//! Whatever is converted decompresses to the same tar stream, has an index and a footer that hold, and does not
//! depend on how the blob arrives.

use std::{
    fs::File,
    io::{Read, Seek},
    ops::Range,
    sync::LazyLock,
};

use bytes::Bytes;
use converter::{
    blob::{reader::BlobReader, spool::Spool},
    layer::{
        LayerError, LayerFacts,
        compress::{Compressor, FrameOptions},
        spool_layer,
    },
};
use format_spec::{
    Digest, Footer, HotPiece, Index, Inode, LazyLayer, dedup,
    footer::{FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN},
    records::hot_reason,
};
use test_kit::gzip;

use super::one_line;
use crate::{seal, tree_rules::assert_tree};

/// Longest stream that is converted here: bombs have tests of their own.
const PLAIN_LEN_MAX: u64 = 4 << 20;

static COMPRESSOR: LazyLock<Compressor> = LazyLock::new(|| {
    Compressor::new(&FrameOptions { level: 1, ..FrameOptions::default() }, 1, 1).expect("a thread is to be had")
});

/// First byte: how the rest becomes a blob. Second byte: the length of the pieces that it arrives in.
pub(crate) fn run(data: &[u8]) {
    let [how, piece_len, rest @ ..] = data else { return };
    let blob = to_blob(*how, rest);
    let mut plain = Vec::new();
    let is_readable = reader(&blob, 1 << 20)
        .decompress()
        .and_then(|stream| stream.take(PLAIN_LEN_MAX + 1).read_to_end(&mut plain))
        .is_ok();
    if plain.len() as u64 > PLAIN_LEN_MAX {
        return;
    }
    match convert(&blob, usize::from(*piece_len) + 1) {
        Ok((facts, layer, output)) => {
            assert!(is_readable, "what cannot be read is not converted");
            assert_converted(&facts, &layer, &output, &plain);
            if how & 0x80 != 0 {
                let (.., again) = convert(&blob, blob.len()).expect("it was converted before");
                assert!(again == output, "the result does not depend on the pieces");
            }
        }
        Err(error) => one_line(&error),
    }
}

/// As it is, or a tar stream put right and compressed: in two gzip members, or two zstd frames.
fn to_blob(how: u8, rest: &[u8]) -> Vec<u8> {
    if how & 3 == 0 {
        return rest.to_vec();
    }
    let mut tar = rest.to_vec();
    seal::tar(&mut tar);
    let halves = tar.split_at(tar.len() / 2);
    let join = |compress: fn(&[u8]) -> Vec<u8>| [compress(halves.0), compress(halves.1)].concat();
    match how & 3 {
        1 => tar,
        2 => join(gzip),
        _ => join(|bytes| zstd::bulk::compress(bytes, 1).expect("in memory")),
    }
}

fn reader(blob: &[u8], piece_len: usize) -> BlobReader<impl Iterator<Item = Result<Bytes, String>>> {
    let pieces = blob.chunks(piece_len.max(1)).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    BlobReader::new(pieces, Digest::of(blob), blob.len() as u64)
}

/// Converts a blob that arrives in pieces of this length, with a hot pack of its first files.
pub(crate) fn convert(blob: &[u8], piece_len: usize) -> Result<(LayerFacts, LazyLayer, Vec<u8>), LayerError> {
    let memory = rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let spooled = spool_layer(reader(blob, piece_len), Spool::new(File::from(memory)), &COMPRESSOR)?;
    let facts = spooled.facts;
    let pieces = hot_pieces(&spooled.index);
    let converted = spooled.finish(&pieces, &COMPRESSOR)?;
    let mut output = Vec::new();
    let mut file = &*converted.file;
    file.rewind().and_then(|()| file.read_to_end(&mut output)).expect("it was just written");
    Ok((facts, converted.layer, output))
}

/// The first small files, the last of them first.
fn hot_pieces(index: &Index<Vec<u8>>) -> Vec<HotPiece> {
    const FILE_LEN_MAX: u64 = 64 << 10;
    let is_hot = |inode: &&Inode| inode.is_regular() && (1..=FILE_LEN_MAX).contains(&inode.size.get());
    let piece = |inode: &Inode| HotPiece {
        plain_offset: inode.plain_offset,
        len: u32::try_from(inode.size.get()).expect("small").into(),
        reason: hot_reason::PROFILE.into(),
    };
    let mut pieces: Vec<_> = index.inodes().iter().filter(is_hot).take(3).map(piece).collect();
    pieces.reverse();
    pieces
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("inside the blob")
}

fn assert_converted(facts: &LayerFacts, layer: &LazyLayer, output: &[u8], plain: &[u8]) {
    assert_eq!((layer.blob, layer.blob_len), (Digest::of(output), output.len() as u64));
    assert_eq!((facts.diff_id, facts.tar_len), (Digest::of(plain), plain.len() as u64));
    assert!(zstd::decode_all(output).expect("zstd frames") == plain, "the tar stream is the same");
    let footer = &output[output.len() - at(FOOTER_FRAME_LEN)..];
    assert_eq!(Footer::from_frame(footer, layer.blob_len), Ok(Some((layer.index, layer.hot_len))));
    let range = layer.index.range();
    let index = Index::from_compressed(&output[at(range.start)..at(range.end)], &layer.index).expect("an index");
    for frame in index.frames() {
        let blob = frame.blob_range();
        assert_eq!(Digest::of(&output[at(blob.start)..at(blob.end)]), frame.digest());
    }
    assert_tree(&index);
    let hot = layer.hot_range().map_or(Vec::new(), |hot| {
        zstd::decode_all(&output[at(hot.start)..at(hot.end)]).expect("frames of the hot pack")
    });
    let pieces = index.hot_pieces().iter().map(|piece| content(&index, &piece.plain_range(), plain));
    assert!(hot == pieces.collect::<Vec<_>>().concat(), "the hot pack holds what it says");
    assert_dedup(&index, layer, output, plain);
}

fn assert_dedup(index: &Index<Vec<u8>>, layer: &LazyLayer, output: &[u8], plain: &[u8]) {
    const PIECE_LEN_MAX: u64 = 1 << 20;
    let Some(location) = index.dedup() else { return };
    let start = layer.hot_range().map_or(layer.index.range().end, |hot| hot.end) + SKIPPABLE_HEADER_LEN;
    let section = &output[at(start)..at(start + location.compressed_len.get())];
    let pieces = dedup::decompress(section, location, index.space_len()).expect("a dedup section");
    for piece in pieces.iter().filter(|piece| piece.len.get() <= PIECE_LEN_MAX) {
        assert_eq!(Digest::of(&content(index, &piece.plain_range(), plain)), piece.digest());
    }
}

/// Bytes of the plain address space, out of the tar stream.
pub(super) fn content(index: &Index<Vec<u8>>, range: &Range<u64>, tar: &[u8]) -> Vec<u8> {
    let mut content = vec![0; at(range.end - range.start)];
    for extent in &index.extents()[index.extents_in_plain(range)] {
        let (start, end) = (extent.plain_range().start.max(range.start), extent.plain_range().end.min(range.end));
        let from = start - extent.plain_offset.get() + extent.tar_offset.get();
        content[at(start - range.start)..at(end - range.start)].copy_from_slice(&tar[at(from)..at(from + end - start)]);
    }
    content
}
