//! Whole layers, converted in memory and read back by what a reader uses: zstd and the index.

use std::io::{Read as _, Seek as _};

use format_spec::{Extent, Footer, Inode, footer::FOOTER_FRAME_LEN};
use proptest::prelude::*;
use test_kit::gzip;

use super::*;
use crate::layer::compress::FrameOptions;

#[derive(Debug)]
struct Converted {
    facts: LayerFacts,
    layer: LazyLayer,
}

/// Converts a source blob that arrives in pieces of `piece_len`.
fn convert(source: &[u8], piece_len: usize, jobs: usize) -> Result<(Converted, Vec<u8>), LayerError> {
    let pieces = source.chunks(piece_len).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    convert_blob(BlobReader::new(pieces, Digest::of(source), source.len() as u64), jobs)
}

fn convert_blob(
    blob: BlobReader<impl Iterator<Item = Result<Bytes, String>> + Send>,
    jobs: usize,
) -> Result<(Converted, Vec<u8>), LayerError> {
    let compressor = Compressor::new(&FrameOptions::default(), jobs, 1).unwrap();
    let spooled = spool_layer(blob, Spool::new(tempfile::tempfile().unwrap()), &compressor)?;
    let facts = spooled.facts;
    let (layer, bytes) = blob_of(spooled.finish(&[], &compressor)?);
    Ok((Converted { facts, layer }, bytes))
}

fn blob_of(converted: ConvertedLayer) -> (LazyLayer, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut file = &*converted.file;
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    (converted.layer, bytes)
}

/// Half of it repeats, so that it compresses.
fn content(seed: u64, len: usize) -> Vec<u8> {
    test_kit::noise(seed, len).into_iter().map(|byte| if byte & 1 == 0 { b'a' } else { byte }).collect()
}

/// A tar stream with a file of each length, in one directory.
fn archive(lens: &[usize]) -> Vec<u8> {
    let file = |(number, len): (usize, &usize)| (format!("directory/{number}"), 0o644, content(number as u64, *len));
    test_kit::tar(lens.iter().enumerate().map(file))
}

fn open_index(layer: &LazyLayer, blob: &[u8]) -> Index<Vec<u8>> {
    let range = layer.index.range();
    let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    Index::from_compressed(&blob[range], &layer.index).unwrap()
}

/// What a reader of the layer sees in a file: frames found through the index, checked, decompressed.
fn read_file(index: &Index<Vec<u8>>, blob: &[u8], inode: &Inode) -> Vec<u8> {
    let plain = inode.plain_range();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let mut content = vec![0; at(inode.size.get())];
    for extent in index.extents_in_plain(&plain).map(|number| index.extents()[number]) {
        for frame in index.frames_in_tar(&extent.tar_range()).map(|number| index.frames()[number]) {
            let compressed = &blob[at(frame.blob_range().start)..at(frame.blob_range().end)];
            assert_eq!(Digest::of(compressed), frame.digest());
            let bytes = zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).unwrap();
            assert_eq!(bytes.len() as u64, u64::from(frame.plain_len.get()));
            let start = frame.tar_range().start.max(extent.tar_range().start);
            let end = frame.tar_range().end.min(extent.tar_range().end);
            let target = at(extent.plain_offset.get() - plain.start + (start - extent.tar_offset.get()));
            let part = &bytes[at(start - frame.tar_offset.get())..at(end - frame.tar_offset.get())];
            content[target..target + part.len()].copy_from_slice(part);
        }
    }
    content
}

/// Everything a reader relies on, for a plain archive with files of these lengths.
fn check(lens: &[usize]) {
    let tar = archive(lens);
    let (converted, blob) = convert(&gzip(&tar), 1000, 2).unwrap();
    assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), tar);
    assert_eq!((converted.facts.diff_id, converted.facts.tar_len), (Digest::of(&tar), tar.len() as u64));
    assert_eq!((converted.layer.blob, converted.layer.blob_len), (Digest::of(&blob), blob.len() as u64));
    let footer = &blob[blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()..];
    assert_eq!(Footer::from_frame(footer, blob.len() as u64), Ok(Some((converted.layer.index, 0))));
    let index = open_index(&converted.layer, &blob);
    assert_eq!(index.frames().len() as u64, converted.facts.frame_count);
    assert_eq!(index.tar_len(), tar.len() as u64);
    check_dedup_section(&index, &blob, &converted.layer);
    if lens.is_empty() {
        return;
    }
    let directory = index.inode(index.lookup(&index.inodes()[0], b"directory").unwrap()).unwrap();
    for (number, len) in lens.iter().enumerate() {
        let inode = index.inode(index.lookup(directory, number.to_string().as_bytes()).unwrap()).unwrap();
        assert!(read_file(&index, &blob, inode) == content(number as u64, *len), "file {number}");
    }
}

/// Its pieces are the extents cut where frames end, each with the digest of its content.
fn check_dedup_section(index: &Index<Vec<u8>>, blob: &[u8], layer: &LazyLayer) {
    let Some(location) = index.dedup() else { return assert!(index.extents().is_empty()) };
    let end = layer.hot_range().map_or(layer.index.range().end, |range| range.end);
    let start = end + SKIPPABLE_HEADER_LEN;
    let range = usize::try_from(start).unwrap()..usize::try_from(start + location.compressed_len.get()).unwrap();
    let pieces = dedup::decompress(&blob[range], location, index.space_len()).unwrap();
    let read = |bytes: Range<u64>| {
        Ok(blob[usize::try_from(bytes.start).unwrap()..][..usize::try_from(bytes.end - bytes.start).unwrap()].to_vec())
    };
    let mut reader = FrameReader::new(index, Box::new(read));
    for piece in &pieces {
        assert_eq!(Digest::of(&reader.read(piece.plain_range()).unwrap()), piece.digest());
    }
    let cuts = |extent: &Extent| index.frames_in_tar(&extent.tar_range()).len();
    assert_eq!(pieces.len(), index.extents().iter().map(cuts).sum::<usize>());
    let len: u64 = pieces.iter().map(|piece| piece.len.get()).sum();
    assert_eq!(len, index.extents().iter().map(|extent| extent.len.get()).sum::<u64>());
}

#[test]
fn the_hot_pack_holds_copies_in_its_order() {
    let tar = archive(&[10, 3_000_000, 700_000, 0]);
    let blob = BlobReader::new([Ok(Bytes::from(tar.clone()))].into_iter(), Digest::of(&tar), tar.len() as u64);
    let compressor = Compressor::new(&FrameOptions::default(), 2, 1).unwrap();
    let spooled = spool_layer(blob, Spool::new(tempfile::tempfile().unwrap()), &compressor).unwrap();
    let extents: Vec<_> = spooled.index.extents().iter().map(|extent| extent.plain_range()).collect();
    let piece = |range: Range<u64>| HotPiece {
        plain_offset: range.start.into(),
        len: u32::try_from(range.end - range.start).unwrap().into(),
        reason: format_spec::records::hot_reason::COMMAND.into(),
    };
    let pieces = [
        piece(extents[2].clone()),
        piece(extents[1].start + 8192..extents[1].start + 16_384),
        piece(extents[0].clone()),
        piece(extents[1].start + 4096..extents[1].start + 8192),
    ];
    let expected: Vec<u8> =
        pieces.iter().flat_map(|piece| spooled.reader().read(piece.plain_range()).unwrap()).collect();
    let (layer, blob) = blob_of(spooled.finish(&pieces, &compressor).unwrap());
    assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), tar);
    let index = open_index(&layer, &blob);
    assert_eq!(index.hot_pieces(), pieces);
    let hot = layer.hot_range().unwrap();
    let mut start = usize::try_from(hot.start).unwrap();
    let mut found = Vec::new();
    for frame in index.hot_frames() {
        let compressed = &blob[start..start + frame.compressed_len.get() as usize];
        assert_eq!(Digest::of(compressed), frame.digest());
        found.extend(zstd::bulk::decompress(compressed, frame.plain_len.get() as usize).unwrap());
        start += compressed.len();
    }
    assert_eq!(start as u64, hot.end);
    assert!(found == expected);
    check_dedup_section(&index, &blob, &layer);
}

#[test]
fn hot_pieces_outside_files_are_refused() {
    let tar = archive(&[5000]);
    let blob = BlobReader::new([Ok(Bytes::from(tar.clone()))].into_iter(), Digest::of(&tar), tar.len() as u64);
    let compressor = Compressor::new(&FrameOptions::default(), 1, 1).unwrap();
    let spooled = spool_layer(blob, Spool::new(tempfile::tempfile().unwrap()), &compressor).unwrap();
    let piece = HotPiece { plain_offset: 4096.into(), len: 4096.into(), reason: 1.into() };
    let error = spooled.finish(&[piece], &compressor).unwrap_err();
    assert_eq!(error.to_string(), "hot piece 0: it lies outside its file");
}

#[test]
fn every_file_is_reached_through_the_index() {
    let sizes = FrameSizes::default();
    let large = usize::try_from(sizes.large_file_min).unwrap();
    check(&[]);
    check(&[0, 1, 511, 512, 513, 4096]);
    check(&[large - 1, large, large + 1, 10, 3 * sizes.piece.max + 7, 0, sizes.piece.max, 20]);
    check(&[30_000; 300]);
}

#[test]
fn a_large_file_starts_a_frame() {
    let (converted, blob) = convert(&archive(&[100, 2_000_000, 100]), 1 << 20, 1).unwrap();
    let index = open_index(&converted.layer, &blob);
    let starts = |offset: u64| index.frames().iter().any(|frame| frame.tar_offset == offset);
    let extents: Vec<_> = index.extents().iter().map(|extent| extent.tar_offset.get()).collect();
    assert_eq!(extents.iter().map(|start| starts(*start)).collect::<Vec<_>>(), [false, true, false]);
    // The small file behind it starts a frame with its header.
    assert!(starts(extents[2] - 512));
    assert!(
        index.frames().iter().all(|frame| u64::from(frame.plain_len.get()) <= FrameSizes::default().frame_max() as u64)
    );
}

#[test]
fn the_result_depends_on_the_content_only() {
    let tar = archive(&[0, 300_000, 5_000, 5_000_000, 40_000, 900_000, 1]);
    let (_, expected) = convert(&tar, 1 << 20, 1).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for (source, piece_len, jobs) in [(gzip(&tar), 777, 4), (zstd, 10, 3), (tar, 1, 2), (expected.clone(), 4096, 1)] {
        let (_, blob) = convert(&source, piece_len, jobs).unwrap();
        assert!(blob == expected, "{piece_len} {jobs}");
    }
}

#[test]
fn gzip_may_have_many_members() {
    let tar = archive(&[1000, 2000, 3000]);
    let members = tar.chunks(700).flat_map(gzip).collect::<Vec<_>>();
    let (converted, _) = convert(&members, 100, 1).unwrap();
    assert_eq!(converted.facts.diff_id, Digest::of(&tar));
}

#[test]
fn what_follows_the_archive_is_kept() {
    let tar = [archive(&[10]), vec![0; 5000], b"something".to_vec(), content(1, 3_000_000)].concat();
    let (converted, blob) = convert(&gzip(&tar), 1 << 16, 2).unwrap();
    assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), tar);
    assert_eq!(converted.facts.inode_count, 3);
}

#[test]
fn empty_streams_are_layers_too() {
    for tar in [Vec::new(), vec![0; 1024]] {
        let (converted, blob) = convert(&gzip(&tar), 10, 1).unwrap();
        assert_eq!(zstd::decode_all(blob.as_slice()).unwrap(), tar);
        assert_eq!((converted.facts.inode_count, converted.facts.frame_count), (1, u64::from(!tar.is_empty())));
    }
}

#[test]
fn a_damaged_source_is_named_before_what_it_leads_to() {
    let tar = archive(&[100_000]);
    let source = gzip(&tar);
    let (digest, len) = (Digest::of(&source), source.len() as u64);
    let message = |bytes: Vec<u8>| {
        let pieces = bytes.chunks(500).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>();
        convert_blob(BlobReader::new(pieces.into_iter(), digest, len), 1).unwrap_err().to_string()
    };
    for at in [0, 3, source.len() / 2, source.len() - 1] {
        let mut damaged = source.clone();
        damaged[at] ^= 1;
        let found = Digest::of(&damaged);
        assert_eq!(message(damaged), format!("its content has digest {found}: the source is damaged"), "{at}");
    }
    let truncated = source[..source.len() - 9].to_vec();
    assert_eq!(message(truncated), format!("it ends after {} of {len} bytes: the source is damaged", len - 9));
    let longer = [source.as_slice(), b"x"].concat();
    assert_eq!(message(longer), format!("it is longer than the {len} bytes that its descriptor says"));
}

#[test]
fn a_source_that_gives_up_says_why() {
    let pieces = [Ok(Bytes::from_static(&[0; 700])), Err("the host went away".to_owned())];
    let error = convert_blob(BlobReader::new(pieces.into_iter(), Digest::of(b""), 10_000), 1).unwrap_err();
    assert_eq!(error.to_string(), "the host went away");
}

#[test]
fn refuses_compressed_streams_that_end_early_although_the_blob_is_whole() {
    let source = gzip(&archive(&[100_000]));
    let error = convert(&source[..source.len() - 9], 500, 1).unwrap_err();
    assert!(matches!(error, LayerError::Tar(TarError::Io(_))), "{error}");
    let zstd = zstd::encode_all(archive(&[100_000]).as_slice(), 1).unwrap();
    let error = convert(&zstd[..zstd.len() - 9], 500, 1).unwrap_err();
    assert!(matches!(error, LayerError::Tar(TarError::Io(_))), "{error}");
}

#[test]
fn refuses_a_stream_that_ends_within_a_file() {
    for lens in [&[100_000][..], &[1_000_000]] {
        let tar = archive(lens);
        let error = convert(&gzip(&tar[..50_000]), 500, 1).unwrap_err();
        assert_eq!(error.to_string(), "the tar stream ends at byte 50000, within an entry");
    }
}

#[test]
fn a_full_disk_ends_the_conversion() {
    let tar = archive(&[3_000_000; 5]);
    let spool = File::options().write(true).open("/dev/full").unwrap();
    let pieces = tar.chunks(1 << 16).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    let blob = BlobReader::new(pieces, Digest::of(&tar), tar.len() as u64);
    let compressor = Compressor::new(&FrameOptions::default(), 2, 1).unwrap();
    let error = spool_layer(blob, Spool::new(spool), &compressor).unwrap_err();
    assert!(matches!(error, LayerError::Write(_)), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_is_refused_or_kept_byte_for_byte(bytes in proptest::collection::vec(any::<u8>(), 0..3000), magic: bool) {
        let source = if magic { [&[0x1f, 0x8b, 8], bytes.as_slice()].concat() } else { bytes };
        if let Ok((converted, blob)) = convert(&source, 100, 1) {
            let plain = zstd::decode_all(blob.as_slice()).unwrap();
            prop_assert_eq!(Digest::of(&plain), converted.facts.diff_id);
        }
    }
}

#[test]
fn a_hole_beyond_the_limit_of_the_address_space_is_refused() {
    let sparse = |size: u64| {
        let mut builder = tar::Builder::new(Vec::new());
        let size_text = size.to_string();
        let records = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "hole"),
            ("GNU.sparse.realsize", &size_text),
        ];
        builder.append_pax_extensions(records.map(|(key, value)| (key, value.as_bytes()))).unwrap();
        let mut content = b"1\n0\n512\n".to_vec();
        content.resize(1024, 0);
        let mut header = tar::Header::new_ustar();
        header.set_size(1024);
        header.set_mode(0o644);
        builder.append_data(&mut header, "x", &content[..]).unwrap();
        let source = builder.into_inner().unwrap();
        convert(&source, source.len(), 1)
    };
    assert!(sparse(16 << 30).is_ok());
    for size in [(16 << 30) + (1 << 20), 8 << 40] {
        let message = sparse(size).unwrap_err().to_string();
        assert!(message.starts_with(&format!("files and their holes take {size} bytes of address space")), "{message}");
    }
}
