//! Where the tar stream is cut into frames: a pure decision, from what stands in the stream alone.
//!
//! Small files share frames. A *group* of them ends before an entry that says so itself: a hash of its
//! path and size decides, with a chance in proportion to its length. So an inserted, removed or changed
//! file moves the borders next to it and no others. Large files start a frame of their own and are cut by
//! their content (FastCDC) into *pieces*, most of which the next version of the file has too.

use fastcdc::v2020::{FastCDC, Normalization};
use format_spec::Digest;

/// Longest padding of a file, which stays with its last piece.
const PADDING_LEN_MAX: usize = 511;

/// Lengths of what is cut by content, in plain bytes: no shorter, made for, no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Shortest, but for what stands before a border that is there anyway.
    pub min: usize,
    /// What the cutting makes for; more than `min`.
    pub average: usize,
    /// Longest.
    pub max: usize,
}

/// Where frames end. `docs/MEASUREMENTS.md` says how the default was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameSizes {
    /// A group of small files. Whoever reads one of them fetches the whole group.
    pub group: Lengths,
    /// Files of at least this length, with their padding, start a frame of their own.
    pub large_file_min: u64,
    /// A piece of a large file.
    pub piece: Lengths,
}

impl Default for FrameSizes {
    fn default() -> Self {
        // A little less than the 4 MiB that the format allows, so that padding fits.
        let lengths = Lengths { min: 1 << 20, average: 2 << 20, max: (4 << 20) - 4096 };
        Self { group: lengths, large_file_min: 1 << 20, piece: lengths }
    }
}

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

impl FrameSizes {
    /// Longest frame of all, where headers or the end of the stream have no border in them.
    pub fn frame_max(&self) -> usize {
        self.group.max.max(self.piece.max + PADDING_LEN_MAX)
    }

    /// Whether the content of a file gets frames of its own.
    pub fn is_large(&self, entry: &EntryOutline<'_>) -> bool {
        entry.content_len >= self.large_file_min
    }

    /// Whether a frame that has `frame_len` bytes so far ends before `entry`.
    pub fn starts_frame(&self, frame_len: u64, entry: &EntryOutline<'_>) -> bool {
        let Lengths { min, average, max } = self.group;
        let grouped_len = entry.headers_len + if self.is_large(entry) { 0 } else { entry.content_len };
        if frame_len == 0 || frame_len + grouped_len > max as u64 {
            return frame_len > 0;
        }
        let chance_per_byte = u64::MAX / (average - min) as u64;
        frame_len >= min as u64 && entry.hash() < grouped_len.saturating_mul(chance_per_byte)
    }

    /// Length of the first piece of a large file whose content goes on with `content`.
    ///
    /// `content` has at least as many bytes as the longest piece, unless the file ends there.
    pub fn piece_len(&self, content: &[u8]) -> usize {
        let Lengths { min, average, max } = self.piece;
        let window = &content[..content.len().min(max)];
        let chunker = FastCDC::with_level(window, min, average, max, Normalization::Level1);
        let (_, cut) = chunker.cut(0, window.len());
        cut.clamp(1, window.len().max(1))
    }
}

impl EntryOutline<'_> {
    fn hash(&self) -> u64 {
        let digest = Digest::of(&[self.path, &self.content_len.to_le_bytes()].concat());
        u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("a digest has 32 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use test_kit::noise;

    use super::*;

    const SIZES: FrameSizes = FrameSizes {
        group: Lengths { min: 128 << 10, average: 320 << 10, max: 512 << 10 },
        large_file_min: 256 << 10,
        piece: Lengths { min: 256 << 10, average: 512 << 10, max: 1 << 20 },
    };

    /// Cuts small entries into groups; returns the path that each group starts with.
    fn groups(entries: &[(String, u64)]) -> Vec<String> {
        let mut frame_len = 0;
        let mut starts = Vec::new();
        for (path, content_len) in entries {
            let entry = EntryOutline { path: path.as_bytes(), headers_len: 512, content_len: *content_len };
            if frame_len == 0 || SIZES.starts_frame(frame_len, &entry) {
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

    fn pieces(content: &[u8]) -> Vec<&[u8]> {
        let mut rest = content;
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (piece, next) = rest.split_at(SIZES.piece_len(rest));
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
        assert!((SIZES.group.min as u64..SIZES.group.max as u64).contains(&average), "{average}");
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
        let (min, max) = (SIZES.group.min as u64, SIZES.group.max as u64);
        let len = SIZES.large_file_min - 512;
        assert!(!SIZES.starts_frame(0, &entry(len)));
        assert!(!SIZES.starts_frame(min - 1, &entry(len)));
        assert!(SIZES.starts_frame(max - len, &entry(len)));
        // The content of a large file does not go into the group.
        assert!(!SIZES.starts_frame(min - 1, &entry(SIZES.large_file_min)));
    }

    #[test]
    fn pieces_have_the_wanted_lengths() {
        for content in [noise(1, 8 << 20), vec![0; 8 << 20], noise(1, SIZES.piece.min), noise(1, 1)] {
            let pieces = pieces(&content);
            assert_eq!(pieces.concat(), content);
            let (last, others) = pieces.split_last().unwrap();
            assert!(others.iter().all(|piece| (SIZES.piece.min..=SIZES.piece.max).contains(&piece.len())));
            assert!(last.len() <= SIZES.piece.max);
        }
    }

    #[test]
    fn bytes_inserted_into_a_large_file_change_the_pieces_around_them_only() {
        let before = noise(1, 16 << 20);
        let mut after = before.clone();
        after.splice(4_000_000..4_000_000, *b"inserted");
        let (before, after) = (pieces(&before), pieces(&after));
        let changed = after.iter().filter(|piece| !before.contains(piece)).count();
        assert!(changed <= 2, "{changed} of {} pieces changed", after.len());
    }

    #[test]
    fn frames_of_the_default_are_within_the_limit_of_the_format() {
        assert!(FrameSizes::default().frame_max() <= format_spec::limits::FRAME_PLAIN_LEN_MAX as usize);
    }
}
