//! Where the tar stream is cut into frames: a pure decision, from what stands in the stream alone.
//!
//! Small files share frames. A *group* of them ends before an entry that says so itself: a hash of its
//! path and size decides, with a chance in proportion to its length. So an inserted, removed or changed
//! file moves the borders next to it and no others. Large files start a frame of their own and are cut by
//! their content (FastCDC) into *pieces*, most of which the next version of the file has too.

use fastcdc::v2020::{FastCDC, Normalization};
use format_spec::Digest;

/// A group goes on until it has this length: smaller frames compress badly and cost index space.
pub const GROUP_LEN_MIN: u64 = 128 << 10;
/// Mean distance of the borders that entries choose, beyond the minimum.
pub const GROUP_LEN_AVERAGE: u64 = 192 << 10;
/// A group ends before an entry that would make it longer than this: whoever reads one small file fetches it all.
pub const GROUP_LEN_MAX: u64 = 512 << 10;
/// Files of at least this length start a frame of their own.
pub const LARGE_FILE_LEN_MIN: u64 = 256 << 10;
/// Shortest piece of a large file but its last, in bytes.
pub const PIECE_LEN_MIN: usize = 256 << 10;
/// The length that FastCDC makes for.
pub const PIECE_LEN_AVERAGE: usize = 512 << 10;
/// Longest piece of a large file.
pub const PIECE_LEN_MAX: usize = 1 << 20;
/// Longest frame of all, where headers or the end of the stream have no border in them: a piece and its padding fit.
pub const FRAME_LEN_MAX: usize = PIECE_LEN_MAX + 4096;

/// What the cutting needs to know of an entry.
#[derive(Debug, Clone, Copy)]
pub struct EntryOutline<'a> {
    /// Path as it stands in the stream.
    pub path: &'a [u8],
    /// Length of all its headers, in bytes.
    pub headers_len: u64,
    /// Length of its stored content with padding, in bytes.
    pub content_len: u64,
}

impl EntryOutline<'_> {
    /// Whether the content gets frames of its own.
    pub fn is_large(&self) -> bool {
        self.content_len >= LARGE_FILE_LEN_MIN
    }

    /// Whether a frame that has `frame_len` bytes so far ends before this entry.
    pub fn starts_frame(&self, frame_len: u64) -> bool {
        let grouped_len = self.headers_len + if self.is_large() { 0 } else { self.content_len };
        if frame_len == 0 || frame_len + grouped_len > GROUP_LEN_MAX {
            return frame_len > 0;
        }
        frame_len >= GROUP_LEN_MIN && self.hash() < grouped_len.saturating_mul(u64::MAX / GROUP_LEN_AVERAGE)
    }

    fn hash(&self) -> u64 {
        let digest = Digest::of(&[self.path, &self.content_len.to_le_bytes()].concat());
        u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
    }
}

/// Length of the first piece of a large file whose content goes on with `content`.
///
/// `content` has at least [`PIECE_LEN_MAX`] bytes unless the file ends there.
pub fn piece_len(content: &[u8]) -> usize {
    let window = &content[..content.len().min(PIECE_LEN_MAX)];
    let chunker = FastCDC::with_level(window, PIECE_LEN_MIN, PIECE_LEN_AVERAGE, PIECE_LEN_MAX, Normalization::Level1);
    let (_, cut) = chunker.cut(0, window.len());
    cut.clamp(1, window.len().max(1))
}
