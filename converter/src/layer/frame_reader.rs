//! Reads content of a layer's files through its frames, a few of which it keeps.
//!
//! For who looks at some files of a layer during a conversion. A node reads through `storage`.

use std::{collections::VecDeque, fmt, io, ops::Range};

use format_spec::{Digest, Index};

/// Frames kept: enough that files next to each other are not decompressed again and again.
const FRAMES_KEPT_MAX: usize = 8;

/// Gives a range of the layer blob: all of it or an error.
pub type ReadBlob<'a> = Box<dyn FnMut(Range<u64>) -> io::Result<Vec<u8>> + Send + 'a>;

/// Reads the plain address space of one layer.
pub struct FrameReader<'a, B> {
    index: &'a Index<B>,
    read_blob: ReadBlob<'a>,
    /// Numbers and contents of the frames read last, the latest in front.
    frames: VecDeque<(usize, Vec<u8>)>,
}

impl<'a, B: AsRef<[u8]>> FrameReader<'a, B> {
    /// A reader of the layer that `index` describes.
    pub fn new(index: &'a Index<B>, read_blob: ReadBlob<'a>) -> Self {
        Self { index, read_blob, frames: VecDeque::new() }
    }

    /// The bytes of `plain`, a range of the plain address space. Frames are compared with their digests.
    ///
    /// # Errors
    ///
    /// When the blob cannot be read, or is not what its index says.
    pub fn read(&mut self, plain: Range<u64>) -> io::Result<Vec<u8>> {
        let len = usize::try_from(plain.end.saturating_sub(plain.start)).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        for extent in self.index.extents_in_plain(&plain).map(|number| self.index.extents()[number]) {
            let (extent_plain, extent_tar) = (extent.plain_range(), extent.tar_range());
            let wanted = overlap(&extent_plain, &plain);
            let tar_start = extent_tar.start + (wanted.start - extent_plain.start);
            let tar = tar_start..tar_start + (wanted.end - wanted.start);
            for number in self.index.frames_in_tar(&tar) {
                let frame_tar = self.index.frames()[number].tar_range();
                let part = overlap(&frame_tar, &tar);
                let target = wanted.start - plain.start + (part.start - tar.start);
                let content = self.frame(number)?;
                let source = content
                    .get(position(part.start - frame_tar.start)?..position(part.end - frame_tar.start)?)
                    .ok_or_else(|| invalid(format!("frame {number} is shorter than its index says")))?;
                bytes[position(target)?..][..source.len()].copy_from_slice(source);
            }
        }
        Ok(bytes)
    }

    /// The content of a frame.
    fn frame(&mut self, number: usize) -> io::Result<&[u8]> {
        let kept = self.frames.iter().position(|(kept, _)| *kept == number);
        let entry = match kept.and_then(|place| self.frames.remove(place)) {
            Some(entry) => entry,
            None => {
                self.frames.truncate(FRAMES_KEPT_MAX - 1);
                (number, self.decode(number)?)
            }
        };
        self.frames.push_front(entry);
        Ok(&self.frames[0].1)
    }

    fn decode(&mut self, number: usize) -> io::Result<Vec<u8>> {
        let frame = self.index.frames()[number];
        let compressed = (self.read_blob)(frame.blob_range())?;
        let (expected, found) = (frame.digest(), Digest::of(&compressed));
        if found != expected {
            return Err(invalid(format!("frame {number} has digest {found}, its index says {expected}")));
        }
        zstd::bulk::decompress(&compressed, frame.plain_len.get() as usize)
    }
}

impl<B> fmt::Debug for FrameReader<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader").field("frames", &self.frames.len()).finish_non_exhaustive()
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

fn position(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
