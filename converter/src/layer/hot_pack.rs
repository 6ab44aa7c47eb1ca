//! The hot pack of a layer: copies of what a start-up reads, in the order of first access (SPEC.md 5.7, 5.8).

use std::io;

use format_spec::{Digest, HotFrame, HotPiece};

use crate::layer::frame_reader::FrameReader;

/// Plain length of a frame but the last, in bytes: a node can use it when it has arrived, a longer one
/// compresses little better.
pub(crate) const HOT_FRAME_LEN: usize = 512 << 10;

/// A hot pack as it goes into the blob.
#[derive(Debug, Default)]
pub(crate) struct HotPack {
    /// The frames, one after the other.
    pub(crate) bytes: Vec<u8>,
    /// What the index says of them.
    pub(crate) frames: Vec<HotFrame>,
}

impl HotPack {
    /// Copies `pieces` out of the layer and compresses them.
    pub(crate) fn new<B: AsRef<[u8]>>(
        pieces: &[HotPiece],
        content: &mut FrameReader<'_, B>,
        compressor: &mut zstd::bulk::Compressor<'_>,
    ) -> io::Result<Self> {
        let mut pack = Self::default();
        let mut plain = Vec::with_capacity(HOT_FRAME_LEN);
        for piece in pieces {
            let range = piece.plain_range();
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start + (HOT_FRAME_LEN - plain.len()) as u64);
                plain.extend_from_slice(&content.read(start..end)?);
                start = end;
                if plain.len() == HOT_FRAME_LEN {
                    pack.push_frame(&plain, compressor)?;
                    plain.clear();
                }
            }
        }
        if !plain.is_empty() {
            pack.push_frame(&plain, compressor)?;
        }
        Ok(pack)
    }

    fn push_frame(&mut self, plain: &[u8], compressor: &mut zstd::bulk::Compressor<'_>) -> io::Result<()> {
        let compressed = compressor.compress(plain)?;
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
        self.frames.push(HotFrame {
            compressed_len: len(&compressed)?.into(),
            plain_len: len(plain)?.into(),
            digest: *Digest::of(&compressed).as_bytes(),
        });
        self.bytes.extend_from_slice(&compressed);
        Ok(())
    }
}
