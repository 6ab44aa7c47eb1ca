//! One lazy layer: its blob read once from the first byte to the last, and compared with its index.

use std::{io, sync::Arc, thread};

use bytes::Bytes;
use format_spec::{
    Digest, Footer, Index, LazyLayer, Unread,
    dedup::{self, DedupPiece},
    footer::{EMPTY_FRAME, FOOTER_FRAME_LEN, SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
    limits::FRAME_PLAIN_LEN_MAX,
    paths::Paths,
};
use tar_index::{
    compare::{TarSide, UnfitStream, compare, read_tree},
    tree::LayerTree,
};

use super::{
    frames::{BlobCursor, FrameStream},
    notes::note_unread,
    opening::{Openers, SpaceThread, open_frame},
    report::{Counts, Findings, Part},
    space::SpaceHasher,
};
use crate::blob::reader::BlobReader;

/// A lazy layer whose index and dedup section were fetched and can be read.
#[derive(Debug, Clone)]
pub(crate) struct OpenLayer {
    pub(crate) lazy: LazyLayer,
    pub(crate) index: Arc<Index<Vec<u8>>>,
    /// Pieces of the dedup section; empty without one, or when it is damaged.
    pub(crate) pieces: Arc<[DedupPiece]>,
}

/// What one pass over a blob has shown.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    pub(crate) tar: Option<(Digest, u64)>,
    pub(crate) counts: Counts,
    pub(crate) findings: Findings,
}

/// Reads a dedup section and looks at what only a check needs to know.
pub(crate) fn open_pieces(compressed: &[u8], index: &Index<Vec<u8>>, findings: &mut Findings) -> Vec<DedupPiece> {
    let Some(location) = index.dedup() else { return Vec::new() };
    let opened = dedup::open(compressed, location);
    if let Ok(opened) = &opened {
        note_unread("dedup section", Part::Dedup, dedup::unread(opened), findings);
    }
    let pieces = match opened.and_then(|opened| dedup::pieces(&opened, index.space_len())) {
        Ok(pieces) => pieces,
        Err(error) => {
            findings.add(Part::Dedup, "dedup section", error);
            return Vec::new();
        }
    };
    let is_short = |piece: &DedupPiece| piece.len.get() <= FRAME_PLAIN_LEN_MAX.into();
    match pieces.iter().position(|piece| !is_short(piece)) {
        None => pieces,
        Some(number) => {
            let len = pieces[number].len;
            let problem = format!("it has {len} bytes, a frame at most {FRAME_PLAIN_LEN_MAX}");
            findings.add(Part::Dedup, format!("dedup piece {number}"), problem);
            Vec::new()
        }
    }
}

/// Reads the blob and compares everything in it. What it was compared with is in the result.
pub(crate) fn check_blob<P: Iterator<Item = Result<Bytes, String>>>(
    blob: &mut BlobReader<P>,
    layer: &OpenLayer,
) -> Passed {
    let mut passed = Passed::default();
    let result = pass(blob, layer, &mut passed);
    let finished = blob.finish();
    match (result, finished) {
        // What the blob itself says explains why it could not be read on.
        (_, Err(error)) => passed.findings.add(Part::Blob, "blob", error),
        (Err(error), Ok(())) => passed.findings.add(Part::Layout, "blob", format!("it cannot be read on: {error}")),
        (Ok(()), Ok(())) => {}
    }
    passed
}

fn pass<P: Iterator<Item = Result<Bytes, String>>>(
    blob: &mut BlobReader<P>,
    layer: &OpenLayer,
    passed: &mut Passed,
) -> io::Result<()> {
    let index = &*layer.index;
    let Passed { tar, counts, findings } = passed;
    let hot = index.hot_pieces().iter().map(|piece| piece.plain_range());
    let ranges = hot.chain(layer.pieces.iter().map(DedupPiece::plain_range));
    let space = SpaceHasher::new(index.extents(), ranges);
    thread::scope(|scope| {
        let space = SpaceThread::start(scope, space);
        let mut stream = FrameStream::new(blob, index.frames(), Openers::start(scope), space, findings);
        let walked = read_tree(&mut stream, FrameStream::skip);
        stream.finish()?;
        let FrameStream { blob: mut cursor, read_len, tar_digest, space, broken, .. } = stream;
        counts.checked_frame_count = index.frames().len() as u64;
        let digests = if let Some(number) = broken {
            let what = "diff ID, files, hot pack and dedup section against the tar stream";
            findings.skip(format!("{what}, since frame {number} is damaged"));
            None
        } else {
            *tar = Some((tar_digest.finish(), read_len));
            compare_tree(walked, read_len, layer, counts, findings);
            Some(space.into_hasher().finish())
        };
        let (hot_digests, piece_digests) = match &digests {
            Some(digests) => digests.split_at(index.hot_pieces().len()),
            None => (&[][..], &[][..]),
        };
        if digests.is_some() {
            compare_pieces(layer, piece_digests, counts, findings);
        }
        check_tail(&mut cursor, layer, hot_digests, counts, findings)
    })
}

fn compare_tree(
    walked: Result<LayerTree, UnfitStream>,
    tar_len: u64,
    layer: &OpenLayer,
    counts: &mut Counts,
    findings: &mut Findings,
) {
    let index = &*layer.index;
    match walked.and_then(|tree| TarSide::new(tree, tar_len, index.frames())) {
        Ok(side) => {
            counts.checked_inode_count =
                compare(index, &side, &mut |path, problem| findings.add(Part::File, path, problem));
        }
        Err(error) => findings.add(Part::Tar, "tar stream", error),
    }
}

fn compare_pieces(layer: &OpenLayer, digests: &[Digest], counts: &mut Counts, findings: &mut Findings) {
    let paths = Paths::new(&layer.index);
    for (number, (piece, found)) in layer.pieces.iter().zip(digests).enumerate() {
        if piece.digest() != *found {
            let place = format!("dedup piece {number}, {}", describe_range(&paths, &piece.plain_range()));
            findings.add(
                Part::Dedup,
                place,
                format!("its digest is {}, that of the tar stream {found}", piece.digest()),
            );
        }
    }
    counts.checked_dedup_piece_count = digests.len() as u64;
}

/// Bytes of the plain address space in the words of files.
fn describe_range(paths: &Paths<'_, Vec<u8>>, plain: &std::ops::Range<u64>) -> String {
    match paths.file_at(plain.start) {
        Some((inode, start)) => {
            format!("bytes {start}..{} of {}", start + (plain.end - plain.start), paths.path(inode))
        }
        None => format!("bytes {}..{} of the plain address space", plain.start, plain.end),
    }
}

/// Everything behind the frames: index, hot pack, dedup section, footer.
fn check_tail<R: io::BufRead>(
    cursor: &mut BlobCursor<R>,
    layer: &OpenLayer,
    hot_digests: &[Digest],
    counts: &mut Counts,
    findings: &mut Findings,
) -> io::Result<()> {
    let OpenLayer { lazy, index, .. } = layer;
    // The one frame that no record describes.
    if index.frames().is_empty() && cursor.read(EMPTY_FRAME.len() as u64)? != EMPTY_FRAME {
        let problem = "it does not begin with a frame: other programs take it for a bare tar; convert the image again";
        findings.add(Part::Layout, "blob", problem);
        findings.skip("what stands behind the frames, since there is none");
        return Ok(());
    }
    let expected_offset = cursor.position + SKIPPABLE_HEADER_LEN;
    if lazy.index.offset != expected_offset {
        let problem = format!("it stands at {}, the frames end for one at {expected_offset}", lazy.index.offset);
        findings.add(Part::Layout, "index", problem);
        findings.skip("what stands behind the frames, since the index is not where they end");
        return Ok(());
    }
    check_header(cursor, SkippableKind::Index, lazy.index.compressed_len, "index", findings)?;
    let found = cursor.digest(lazy.index.compressed_len)?;
    if found != lazy.index.digest {
        findings.add(Part::Index, "index", format!("its digest is {found}, expected {}", lazy.index.digest));
    }
    let hot_len = index.hot_len();
    if hot_len > 0 {
        check_header(cursor, SkippableKind::HotPack, hot_len, "hot pack", findings)?;
        check_hot_pack(cursor, index, hot_digests, counts, findings)?;
    }
    let dedup_len = index.dedup().map_or(0, |location| location.compressed_len.get());
    if dedup_len > 0 {
        check_header(cursor, SkippableKind::Dedup, dedup_len, "dedup section", findings)?;
        // Its digest was compared when it was opened; both readings must be the same.
        let (found, expected) = (cursor.digest(dedup_len)?, index.dedup().map(|location| location.digest));
        if Some(found.as_bytes()) != expected.as_ref() && findings.list.iter().all(|other| other.part != Part::Dedup) {
            findings.add(Part::Dedup, "dedup section", format!("its digest is {found}, the index says another"));
        }
    }
    check_footer(cursor, layer, hot_len, dedup_len, findings)
}

fn check_header<R: io::BufRead>(
    cursor: &mut BlobCursor<R>,
    kind: SkippableKind,
    len: u64,
    what: &str,
    findings: &mut Findings,
) -> io::Result<()> {
    let at = cursor.position;
    let found = cursor.read(SKIPPABLE_HEADER_LEN)?;
    if skippable_header(kind, len).is_none_or(|expected| found != expected) {
        let problem = format!("the skippable frame at {at} does not announce its {len} bytes");
        findings.add(Part::Layout, what, problem);
    }
    Ok(())
}

fn check_hot_pack<R: io::BufRead>(
    cursor: &mut BlobCursor<R>,
    index: &Index<Vec<u8>>,
    digests: &[Digest],
    counts: &mut Counts,
    findings: &mut Findings,
) -> io::Result<()> {
    let mut pieces = HotPieces::new(index, digests);
    let mut is_readable = true;
    for (number, frame) in index.hot_frames().iter().enumerate() {
        let compressed = cursor.read(frame.compressed_len.get().into())?;
        match open_frame(&compressed, frame.digest(), frame.plain_len.get()) {
            Ok(plain) if is_readable => pieces.take(&plain, findings),
            Ok(_) => {}
            Err(problem) => {
                findings.add(Part::HotPack, format!("hot frame {number}"), problem);
                is_readable = false;
            }
        }
    }
    counts.checked_hot_piece_count = pieces.compared;
    if !is_readable {
        findings.skip("hot pieces behind a damaged hot frame");
    }
    Ok(())
}

/// The pieces of a hot pack, whose bytes come one after the other.
struct HotPieces<'a> {
    index: &'a Index<Vec<u8>>,
    /// What the tar stream holds in their places.
    digests: &'a [Digest],
    number: usize,
    hasher: format_spec::DigestHasher,
    hashed: u32,
    compared: u64,
}

impl<'a> HotPieces<'a> {
    fn new(index: &'a Index<Vec<u8>>, digests: &'a [Digest]) -> Self {
        Self { index, digests, number: 0, hasher: Default::default(), hashed: 0, compared: 0 }
    }

    fn take(&mut self, mut plain: &[u8], findings: &mut Findings) {
        while let Some(piece) = self.index.hot_pieces().get(self.number).filter(|_| !plain.is_empty()) {
            let missing = (piece.len.get() - self.hashed) as usize;
            let (part, rest) = plain.split_at(missing.min(plain.len()));
            self.hasher.update(part);
            self.hashed += u32::try_from(part.len()).expect("at most what is missing");
            plain = rest;
            if self.hashed == piece.len.get() {
                let found = std::mem::take(&mut self.hasher).finish();
                if let Some(expected) = self.digests.get(self.number) {
                    self.compared += 1;
                    if found != *expected {
                        let range = describe_range(&Paths::new(self.index), &piece.plain_range());
                        let place = format!("hot piece {}, {range}", self.number);
                        findings.add(Part::HotPack, place, "its bytes are not those of the tar stream");
                    }
                }
                self.number += 1;
                self.hashed = 0;
            }
        }
    }
}

fn check_footer<R: io::BufRead>(
    cursor: &mut BlobCursor<R>,
    layer: &OpenLayer,
    hot_len: u64,
    dedup_len: u64,
    findings: &mut Findings,
) -> io::Result<()> {
    let lazy = &layer.lazy;
    let frame = cursor.read(FOOTER_FRAME_LEN)?;
    match Footer::from_frame(&frame, lazy.blob_len) {
        Err(error) => findings.add(Part::Footer, "footer", error),
        Ok(None) => findings.add(Part::Footer, "footer", "there is none behind the last section"),
        Ok(Some(_)) => {
            // Compatible features are the only thing that may differ, and the checksum because of them.
            let expected = Footer { crc32: 0.into(), ..Footer::new(&lazy.index, hot_len, dedup_len) };
            let found = Footer::in_frame(&frame).unwrap_or(expected);
            if (Footer { features_compatible: 0.into(), crc32: 0.into(), ..found }) != expected {
                findings.add(Part::Footer, "footer", "it says other positions, lengths or digests than the index");
            }
            let unread = Unread { features: found.features_compatible.get(), ..Unread::default() };
            note_unread("footer", Part::Footer, Ok(unread), findings);
        }
    }
    if cursor.position < lazy.blob_len {
        let problem = format!("{} bytes behind the footer belong to nothing", lazy.blob_len - cursor.position);
        findings.add(Part::Layout, "blob", problem);
    }
    Ok(())
}
