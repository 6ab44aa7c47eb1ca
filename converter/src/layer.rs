//! Converts one layer: a stream of the original blob in, a lazy layer blob in a file out.
//!
//! First the frames are written, in stages that each have a thread of their own, so that a layer takes as long as the
//! slowest of them, which is decompressing it: the blob's digest, decompression, walking the tar stream and cutting it
//! (the calling thread), the digest of the tar stream, making frames (all threads of the compressor), and putting them
//! in order, hashing and writing them. Everything between them is bounded, by queues or by the compressor's buffers.
//! The parts behind the frames wait until it is known what of the layer a start-up reads, for which all layers of the
//! image are needed.
//!
//! The result depends on the input, the level and the hot pieces only.

pub mod compress;
mod contents;
pub mod frame_reader;
pub mod framer;
mod hot_pack;
pub mod lazy;
mod plain;
pub mod sign;
pub mod start_up;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    ops::Range,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
};

use bytes::Bytes;
use format_spec::{
    BlobTail, CompressedIndex, Digest, FormatError, Frame, HotPiece, Index, LayerData, LazyLayer,
    builder::BuildError,
    dedup,
    footer::{EMPTY_FRAME, Footer, SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
    records::DedupLocation,
};

use tar_index::{
    layer_index::build_index,
    tree::{LayerTree, TreeError},
    walker::{Entry, TarError, TarInput, next_entry},
};

use crate::{
    blob::{
        reader::{BlobError, BlobReader},
        spool::Spool,
        stages::{DigestThread, ReadAhead},
    },
    layer::{
        compress::{CompressedFrame, Compressor, FrameOptions},
        contents::{ContentPiece, dedup_pieces},
        frame_reader::FrameReader,
        framer::{EntryOutline, FrameSizes},
        hot_pack::HotPack,
        plain::{PlainFrame, PlainStream},
    },
};

/// What conversion found in a layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerFacts {
    /// Digest of the tar stream.
    pub diff_id: Digest,
    /// Length of the tar stream, in bytes.
    pub tar_len: u64,
    /// Number of frames.
    pub frame_count: u64,
    /// Number of inodes.
    pub inode_count: u64,
    /// Total length of its regular files, in bytes.
    pub content_len: u64,
}

/// A layer whose frames are written. Its hot pack is still to be chosen.
#[derive(Debug)]
pub struct SpooledLayer {
    /// What is in it.
    pub facts: LayerFacts,
    /// The index as it is so far.
    pub index: Index<Vec<u8>>,
    spool: Spool,
    pieces: Vec<dedup::DedupPiece>,
}

/// A layer blob that is complete.
#[derive(Debug)]
pub struct ConvertedLayer {
    /// What a descriptor's annotations say of it.
    pub layer: LazyLayer,
    /// The blob.
    pub file: Arc<File>,
    /// Length of the dedup section, in bytes; 0 without one.
    pub dedup_len: u64,
}

/// A layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob is not what it should be.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The blob holds no tar stream.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The tar stream holds something that cannot be unpacked.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The hot pack cannot be made.
    #[error("making the hot pack: {0}")]
    HotPack(io::Error),
    /// The converted layer cannot be written.
    #[error("writing the converted layer: {0}")]
    Write(io::Error),
    /// The layer exceeds a limit of the format.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The layer exceeds a limit of the format.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Writes the frames of the layer that `blob` delivers to `spool`, which is empty.
///
/// # Errors
///
/// When the blob is not what its descriptor says or no layer, or `spool` cannot be written.
pub fn spool_layer<P: Iterator<Item = Result<Bytes, String>> + Send>(
    mut blob: BlobReader<P>,
    mut spool: Spool,
    compressor: &Compressor,
) -> Result<SpooledLayer, LayerError> {
    let (source, output) = (&mut blob, &mut spool);
    // No frame waits for others there: it holds a buffer.
    let mut tar_digest = DigestThread::new(0);
    let (walked, written) = thread::scope(|scope| {
        let (done, frames) = channel();
        let writer = scope.spawn(|| write_frames(frames, output));
        let mut sequence = 0..;
        let sink = |plain: PlainFrame| {
            if writer.is_finished() {
                return Err(io::Error::other("the writer has failed"));
            }
            tar_digest.update(plain.bytes.clone());
            let sequence = sequence.next().expect("fewer frames than numbers");
            compressor.compress(sequence, plain, done.clone())
        };
        let plain = ReadAhead::start(scope, || source.decompress());
        let walked = walk(PlainStream::new(plain, compressor.buffers(), sink), compressor.sizes());
        drop(done);
        (walked, writer.join().expect("the writer does not panic"))
    });
    let written = written.map_err(LayerError::Write)?;
    // Damage of the blob explains whatever else went wrong.
    if !matches!(walked, Err(LayerError::Tree(_))) {
        blob.finish()?;
    }
    let (tree, tar_len) = walked?;
    let Written { frames, pieces, .. } = written;
    if frames.is_empty() {
        spool.write(&EMPTY_FRAME).map_err(LayerError::Write)?;
    }
    let built = build_index(tree)?;
    let data = LayerData {
        tar_len,
        space_len: built.space_len,
        extents: &built.extents,
        frames: &frames,
        ..LayerData::default()
    };
    let facts = LayerFacts {
        diff_id: tar_digest.finish(),
        tar_len,
        frame_count: frames.len() as u64,
        inode_count: built.inode_count,
        content_len: built.content_len,
    };
    let index = Index::open(built.builder.layer_bytes(&data)?)?;
    let pieces = dedup_pieces(index.extents(), &pieces);
    Ok(SpooledLayer { facts, index, spool, pieces })
}

/// A layer with nothing in it. An image without layers shows what one with this layer shows: an empty root.
///
/// # Errors
///
/// When a temporary file cannot be had or written.
pub fn empty_layer() -> Result<ConvertedLayer, LayerError> {
    let compressor = Compressor::new(&FrameOptions::default(), 1, 1).map_err(LayerError::Write)?;
    let nothing = BlobReader::new(std::iter::empty(), Digest::of(b""), 0);
    let spool = Spool::new(tempfile::tempfile().map_err(LayerError::Write)?);
    spool_layer(nothing, spool, &compressor)?.finish(&[], &compressor)
}

/// Walks the whole stream; returns the tree and the length of the stream.
fn walk<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    mut stream: PlainStream<R, S>,
    sizes: FrameSizes,
) -> Result<(LayerTree, u64), LayerError> {
    let mut tree = LayerTree::default();
    while let Some(entry) = next_entry(&mut stream)? {
        cut_entry(&mut stream, sizes, entry, &mut tree)?;
    }
    tree.finish()?;
    // What follows the archive's end belongs to the stream and its digest.
    let tar_len = stream.finish().map_err(TarError::Io)?;
    Ok((tree, tar_len))
}

fn cut_entry<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    sizes: FrameSizes,
    entry: Entry,
    tree: &mut LayerTree,
) -> Result<(), LayerError> {
    let content_start = stream.position();
    let (stored_len, padding_len) = (entry.stored_len, entry.padding_len);
    let headers_len = content_start - entry.start;
    let outline = EntryOutline { path: &entry.path, headers_len, content_len: stored_len.saturating_add(padding_len) };
    // Overlong headers have been cut already.
    let grouped_len = stream.frame_len().saturating_sub(headers_len);
    if sizes.starts_frame(grouped_len, &outline) {
        stream.cut_at(entry.start).map_err(TarError::Io)?;
    }
    let is_large = sizes.is_large(&outline);
    mark_content(stream, &entry, content_start);
    tree.apply(entry, content_start)?;
    if is_large {
        cut_content(stream, sizes, stored_len)?;
        skip_padding(stream, padding_len)?;
        stream.cut_at(stream.position()).map_err(TarError::Io)?;
        return Ok(());
    }
    if stream.skip(stored_len).map_err(TarError::Io)? < stored_len {
        return Err(TarError::Truncated(stream.position()).into());
    }
    skip_padding(stream, padding_len)
}

/// Tells the stream where the content of a file stands; each run of a sparse file is by itself.
fn mark_content<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    entry: &Entry,
    content_start: u64,
) {
    match &entry.segments {
        None => stream.mark_content(content_start..content_start.saturating_add(entry.stored_len)),
        Some(segments) => {
            let mut start = content_start;
            for segment in segments {
                let end = start.saturating_add(segment.len);
                stream.mark_content(start..end);
                start = end;
            }
        }
    }
}

/// Cuts a large file into pieces; the last one stays open for the padding.
fn cut_content<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    sizes: FrameSizes,
    stored_len: u64,
) -> Result<(), TarError> {
    let mut left_len = stored_len;
    while left_len > 0 {
        stream.cut_at(stream.position())?;
        let window_len = usize::try_from(left_len).map_or(sizes.piece.max, |left| left.min(sizes.piece.max));
        let start = stream.position();
        let window = stream.peek(window_len)?;
        if window.len() < window_len {
            return Err(TarError::Truncated(start + window.len() as u64));
        }
        let len = sizes.piece_len(window);
        stream.consume(len)?;
        left_len -= len as u64;
    }
    Ok(())
}

/// An archive may end within the padding of its last entry.
fn skip_padding<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    padding_len: u64,
) -> Result<(), LayerError> {
    stream.skip(padding_len).map_err(TarError::Io)?;
    Ok(())
}

/// What the writer knows when all frames are written.
#[derive(Default)]
struct Written {
    frames: Vec<Frame>,
    pieces: Vec<ContentPiece>,
    tar_len: u64,
}

/// Writes frames in their order as they come back.
fn write_frames(frames: Receiver<CompressedFrame>, output: &mut Spool) -> io::Result<Written> {
    let mut written = Written::default();
    // Bounded by the number of buffers that frames hold.
    let mut early = BTreeMap::new();
    for frame in frames {
        early.insert(frame.sequence, frame);
        while let Some(frame) = early.remove(&(written.frames.len() as u64)) {
            let (compressed, digest) = frame.compressed?;
            let blob_offset = output.len();
            output.write(&compressed)?;
            let tar_position = |position: usize| written.tar_len + position as u64;
            let tar = |content: &Range<usize>| tar_position(content.start)..tar_position(content.end);
            let pieces = frame.plain.contents.iter().zip(&frame.contents);
            written.pieces.extend(pieces.map(|(content, digest)| ContentPiece { tar: tar(content), digest: *digest }));
            let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("frames are small");
            written.frames.push(Frame {
                blob_offset: blob_offset.into(),
                tar_offset: written.tar_len.into(),
                compressed_len: len(&compressed).into(),
                plain_len: len(&frame.plain.bytes).into(),
                digest: *digest.as_bytes(),
            });
            written.tar_len += frame.plain.bytes.len() as u64;
        }
    }
    Ok(written)
}

impl SpooledLayer {
    /// Reads content of the layer's files.
    pub fn reader(&self) -> FrameReader<'_, Vec<u8>> {
        FrameReader::new(&self.index, Box::new(|blob| self.spool.read(blob)))
    }

    /// Completes the blob with a hot pack of these pieces, which [`Index::check`] has to accept.
    ///
    /// # Errors
    ///
    /// When the pieces break a rule of the format or the spool cannot be read or written.
    pub fn finish(mut self, hot_pieces: &[HotPiece], compressor: &Compressor) -> Result<ConvertedLayer, LayerError> {
        let mut context = compressor.context().map_err(LayerError::Write)?;
        let hot = HotPack::new(hot_pieces, &mut self.reader(), &mut context).map_err(LayerError::HotPack)?;
        let dedup = if self.pieces.is_empty() { None } else { Some(dedup::compress(&self.pieces)?) };
        let location = dedup.as_ref().map(|section| DedupLocation {
            compressed_len: (section.bytes.len() as u64).into(),
            plain_len: section.plain_len.into(),
            digest: *section.digest.as_bytes(),
        });
        let tail = BlobTail { hot_frames: &hot.frames, hot_pieces, dedup: location.as_slice() };
        let index = CompressedIndex::with_tail(self.index.as_bytes(), &tail)?;
        let location = index.location(self.spool.len() + SKIPPABLE_HEADER_LEN);
        let dedup = dedup.map_or(Vec::new(), |section| section.bytes);
        let (hot_len, dedup_len) = (hot.bytes.len() as u64, dedup.len() as u64);
        self.append(SkippableKind::Index, &index.bytes)?;
        self.append(SkippableKind::HotPack, &hot.bytes)?;
        self.append(SkippableKind::Dedup, &dedup)?;
        self.write(&Footer::new(&location, hot_len, dedup_len).to_frame())?;
        let blob_len = self.spool.len();
        let (file, blob) = self.spool.finish();
        Ok(ConvertedLayer { layer: LazyLayer { blob, blob_len, index: location, hot_len }, file, dedup_len })
    }

    /// Appends a skippable frame, unless it would be empty.
    fn append(&mut self, kind: SkippableKind, content: &[u8]) -> Result<(), LayerError> {
        if content.is_empty() {
            return Ok(());
        }
        let header = skippable_header(kind, content.len() as u64);
        self.write(&header.ok_or(BuildError("an index, hot pack or dedup section of more than 4 GiB"))?)?;
        self.write(content)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.spool.write(bytes).map_err(LayerError::Write)
    }
}

#[cfg(test)]
mod tests;
