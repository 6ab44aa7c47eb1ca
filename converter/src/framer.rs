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

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts small entries into groups; returns the path that each group starts with.
    fn groups(entries: &[(String, u64)]) -> Vec<String> {
        let mut frame_len = 0;
        let mut starts = Vec::new();
        for (path, content_len) in entries {
            let entry = EntryOutline { path: path.as_bytes(), headers_len: 512, content_len: *content_len };
            if frame_len == 0 || entry.starts_frame(frame_len) {
                starts.push(path.clone());
                frame_len = 0;
            }
            frame_len += 512 + content_len;
        }
        starts
    }

    fn entries(count: usize) -> Vec<(String, u64)> {
        (0..count).map(|number| (format!("usr/lib/{number}"), (number * 7919 % 64 * 512) as u64)).collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        let bytes = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        bytes.flatten().take(len).collect()
    }

    fn pieces(content: &[u8]) -> Vec<&[u8]> {
        let mut rest = content;
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (piece, next) = rest.split_at(piece_len(rest));
            pieces.push(piece);
            rest = next;
        }
        pieces
    }

    #[test]
    fn groups_have_the_wanted_lengths() {
        let entries = entries(4000);
        let total: u64 = entries.iter().map(|(_, len)| len + 512).sum();
        let average = total / groups(&entries).len() as u64;
        assert!((GROUP_LEN_MIN..GROUP_LEN_MAX).contains(&average), "{average}");
    }

    #[test]
    fn an_inserted_file_moves_the_next_border_only() {
        let before = entries(4000);
        let mut after = before.clone();
        after.insert(2000, ("usr/lib/new".to_owned(), 50_000));
        let (before, after) = (groups(&before), groups(&after));
        let moved = after.iter().filter(|start| !before.contains(start)).count();
        assert!(moved <= 3, "{moved} of {} groups start elsewhere", after.len());
    }

    #[test]
    fn an_entry_that_does_not_fit_starts_a_group() {
        let entry = |content_len| EntryOutline { path: b"a", headers_len: 512, content_len };
        let len = LARGE_FILE_LEN_MIN - 512;
        assert!(!entry(len).starts_frame(0));
        assert!(!entry(len).starts_frame(GROUP_LEN_MIN - 1));
        assert!(entry(len).starts_frame(GROUP_LEN_MAX - len));
        // The content of a large file does not go into the group.
        assert!(!entry(LARGE_FILE_LEN_MIN).starts_frame(GROUP_LEN_MIN - 1));
    }

    #[test]
    fn pieces_have_the_wanted_lengths() {
        for content in [noise(8 << 20), vec![0; 8 << 20], noise(PIECE_LEN_MIN), noise(1)] {
            let pieces = pieces(&content);
            assert_eq!(pieces.concat(), content);
            let (last, others) = pieces.split_last().unwrap();
            assert!(others.iter().all(|piece| (PIECE_LEN_MIN..=PIECE_LEN_MAX).contains(&piece.len())));
            assert!(last.len() <= PIECE_LEN_MAX);
        }
    }

    #[test]
    fn bytes_inserted_into_a_large_file_change_the_pieces_around_them_only() {
        let before = noise(16 << 20);
        let mut after = before.clone();
        after.splice(4_000_000..4_000_000, *b"inserted");
        let (before, after) = (pieces(&before), pieces(&after));
        let changed = after.iter().filter(|piece| !before.contains(piece)).count();
        assert!(changed <= 2, "{changed} of {} pieces changed", after.len());
    }
}
