//! Converts one layer: a stream of the original blob in, a lazy layer blob in a file out.
//!
//! The calling thread decompresses, walks the tar stream and cuts it; the compressor's threads make
//! frames; one more thread puts them in order, hashes and writes. Everything between them is bounded by
//! the compressor's buffers. The result depends on the input and the level only.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    sync::mpsc::{Receiver, channel},
    thread,
};

use bytes::Bytes;
use format_spec::{
    Digest, DigestHasher, FormatError, Frame, LayerData, LazyLayer,
    builder::BuildError,
    footer::{Footer, SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
};

use crate::{
    blob_reader::{BlobError, BlobReader},
    compress::{CompressedFrame, Compressor},
    framer::{EntryOutline, PIECE_LEN_MAX, piece_len},
    layer_index::build_index,
    plain::{PlainFrame, PlainStream},
    tree::{LayerTree, TreeError},
    walker::{Entry, TarError, TarInput, next_entry},
};

/// A converted layer.
#[derive(Debug)]
pub struct ConvertedLayer {
    /// What a descriptor's annotations say of it.
    pub layer: LazyLayer,
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

/// Converts the layer that `blob` delivers and writes it to `output`, from its start.
///
/// # Errors
///
/// When the blob is not what its descriptor says or no layer, or `output` cannot be written.
pub fn convert_layer<P: Iterator<Item = Result<Bytes, String>>>(
    mut blob: BlobReader<P>,
    output: &mut File,
    compressor: &Compressor,
) -> Result<ConvertedLayer, LayerError> {
    let (walked, written) = thread::scope(|scope| {
        let (done, frames) = channel();
        let writer = scope.spawn(|| write_frames(frames, output));
        let mut sequence = 0..;
        let sink = |plain: PlainFrame| {
            if writer.is_finished() {
                return Err(io::Error::other("the writer has failed"));
            }
            let sequence = sequence.next().expect("fewer frames than numbers");
            compressor.compress(sequence, plain, done.clone())
        };
        let walked = blob
            .decompress()
            .map_err(|error| TarError::Io(error).into())
            .and_then(|plain| walk(PlainStream::new(plain, compressor.buffers(), sink)));
        drop(done);
        (walked, writer.join().expect("the writer does not panic"))
    });
    let written = written.map_err(LayerError::Write)?;
    // Damage of the blob explains whatever else went wrong.
    if !matches!(walked, Err(LayerError::Tree(_))) {
        blob.finish()?;
    }
    let (tree, tar_len) = walked?;
    finish_blob(tree, tar_len, written, output)
}

/// Walks the whole stream; returns the tree and the length of the stream.
fn walk<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    mut stream: PlainStream<R, S>,
) -> Result<(LayerTree, u64), LayerError> {
    let mut tree = LayerTree::default();
    while let Some(entry) = next_entry(&mut stream)? {
        cut_entry(&mut stream, entry, &mut tree)?;
    }
    // What follows the archive's end belongs to the stream and its digest.
    let tar_len = stream.finish().map_err(TarError::Io)?;
    Ok((tree, tar_len))
}

fn cut_entry<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    entry: Entry,
    tree: &mut LayerTree,
) -> Result<(), LayerError> {
    let content_start = stream.position();
    let (stored_len, padding_len) = (entry.stored_len, entry.padding_len);
    let headers_len = content_start - entry.start;
    let outline = EntryOutline { path: &entry.path, headers_len, content_len: stored_len.saturating_add(padding_len) };
    // Overlong headers have been cut already.
    let grouped_len = stream.frame_len().saturating_sub(headers_len);
    if outline.starts_frame(grouped_len) {
        stream.cut_at(entry.start).map_err(TarError::Io)?;
    }
    let is_large = outline.is_large();
    tree.apply(entry, content_start)?;
    if is_large {
        cut_content(stream, stored_len)?;
        skip_padding(stream, padding_len)?;
        stream.cut_at(stream.position()).map_err(TarError::Io)?;
        return Ok(());
    }
    if stream.skip(stored_len).map_err(TarError::Io)? < stored_len {
        return Err(TarError::Truncated(stream.position()).into());
    }
    skip_padding(stream, padding_len)
}

/// Cuts a large file into pieces; the last one stays open for the padding.
fn cut_content<R: Read, S: FnMut(PlainFrame) -> io::Result<()>>(
    stream: &mut PlainStream<R, S>,
    stored_len: u64,
) -> Result<(), TarError> {
    let mut left_len = stored_len;
    while left_len > 0 {
        stream.cut_at(stream.position())?;
        let window_len = usize::try_from(left_len).map_or(PIECE_LEN_MAX, |left| left.min(PIECE_LEN_MAX));
        let start = stream.position();
        let window = stream.peek(window_len)?;
        if window.len() < window_len {
            return Err(TarError::Truncated(start + window.len() as u64));
        }
        let len = piece_len(window);
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
    tar_len: u64,
    tar_hasher: DigestHasher,
    blob_len: u64,
    blob_hasher: DigestHasher,
}

/// Writes frames in their order as they come back.
fn write_frames(frames: Receiver<CompressedFrame>, output: &mut File) -> io::Result<Written> {
    let mut written = Written::default();
    // Bounded by the number of buffers that frames hold.
    let mut early = BTreeMap::new();
    for frame in frames {
        early.insert(frame.sequence, frame);
        while let Some(frame) = early.remove(&(written.frames.len() as u64)) {
            let (compressed, digest) = frame.compressed?;
            output.write_all(&compressed)?;
            written.tar_hasher.update(&frame.plain);
            written.blob_hasher.update(&compressed);
            let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("frames are small");
            written.frames.push(Frame {
                blob_offset: written.blob_len.into(),
                tar_offset: written.tar_len.into(),
                compressed_len: len(&compressed).into(),
                plain_len: len(&frame.plain).into(),
                digest: *digest.as_bytes(),
            });
            written.tar_len += frame.plain.len() as u64;
            written.blob_len += compressed.len() as u64;
        }
    }
    Ok(written)
}

/// Appends index and footer.
fn finish_blob(
    tree: LayerTree,
    tar_len: u64,
    written: Written,
    output: &mut File,
) -> Result<ConvertedLayer, LayerError> {
    let Written { frames, mut blob_hasher, blob_len, tar_hasher, .. } = written;
    let built = build_index(tree)?;
    let index = built.builder.finish_layer(&LayerData {
        tar_len,
        space_len: built.space_len,
        extents: &built.extents,
        frames: &frames,
        ..LayerData::default()
    })?;
    let location = index.location(blob_len + SKIPPABLE_HEADER_LEN);
    let header = skippable_header(SkippableKind::Index, location.compressed_len)
        .ok_or(BuildError("an index of more than 4 GiB"))?;
    let footer = Footer::new(&location, 0, 0).to_frame();
    for bytes in [header.as_slice(), &index.bytes, &footer] {
        output.write_all(bytes).map_err(LayerError::Write)?;
        blob_hasher.update(bytes);
    }
    let blob_len = location.range().end + footer.len() as u64;
    Ok(ConvertedLayer {
        layer: LazyLayer { blob: blob_hasher.finish(), blob_len, index: location, hot_len: 0 },
        diff_id: tar_hasher.finish(),
        tar_len,
        frame_count: frames.len() as u64,
        inode_count: built.inode_count,
        content_len: built.content_len,
    })
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
