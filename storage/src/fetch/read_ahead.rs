//! Decides how far to read ahead of sequential readers.
//!
//! A reader is known by the file it reads. Each time its reads reach a new frame without a gap, the
//! number of frames fetched ahead doubles; a jump ends it. Nothing is fetched here.

use std::{collections::VecDeque, ops::Range};

/// Files whose readers are remembered; the one that was quiet longest gives way.
const READERS_MAX: usize = 32;
/// Most frames ahead of a reader: at usual frame sizes a few megabytes, enough to keep a fast link busy.
const FRAMES_AHEAD_MAX: u32 = 16;

/// Frames that a read may lie behind the furthest one: several threads read for one reader, out of order.
const FRAMES_BEHIND_MAX: u32 = 4;

/// The readers of one layer.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    readers: VecDeque<Reader>,
}

#[derive(Debug)]
struct Reader {
    /// Where the file starts in the plain address space.
    file: u64,
    /// The frame after the last one read.
    next_frame: u32,
    frames_ahead: u32,
}

impl ReadAhead {
    /// A read of `frames` in the file that starts at `file`; returns how many frames after them to fetch now.
    pub(crate) fn note_read(&mut self, file: u64, frames: Range<u32>) -> u32 {
        let known = self.readers.iter().position(|reader| reader.file == file);
        let Some(mut reader) = known.and_then(|position| self.readers.remove(position)) else {
            self.readers.truncate(READERS_MAX - 1);
            self.readers.push_front(Reader { file, next_frame: frames.end, frames_ahead: 0 });
            return 0;
        };
        let is_behind = frames.end.saturating_add(FRAMES_BEHIND_MAX) < reader.next_frame;
        let has_jumped = frames.start > reader.next_frame || is_behind;
        let has_advanced = !has_jumped && frames.end > reader.next_frame;
        if has_jumped {
            reader = Reader { file, next_frame: frames.end, frames_ahead: 0 };
        } else if has_advanced {
            reader.frames_ahead = (reader.frames_ahead * 2).clamp(1, FRAMES_AHEAD_MAX);
            reader.next_frame = frames.end;
        }
        let frames_ahead = if has_advanced { reader.frames_ahead } else { 0 };
        self.readers.push_front(reader);
        frames_ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(reads: impl IntoIterator<Item = Range<u32>>) -> Vec<u32> {
        let mut read_ahead = ReadAhead::default();
        reads.into_iter().map(|frames| read_ahead.note_read(0, frames)).collect()
    }

    #[test]
    fn grows_with_every_frame_reached() {
        assert_eq!(steps((0..8).map(|frame| frame..frame + 1)), [0, 1, 2, 4, 8, 16, 16, 16]);
    }

    #[test]
    fn reads_inside_a_frame_neither_grow_nor_end_it() {
        assert_eq!(steps([0..1, 0..1, 0..2, 1..2, 1..2, 1..3, 2..4]), [0, 0, 1, 0, 0, 2, 4]);
    }

    #[test]
    fn reads_out_of_order_do_not_end_it() {
        assert_eq!(steps([0..1, 1..2, 2..3, 1..2, 3..4]), [0, 1, 2, 0, 4]);
    }

    #[test]
    fn a_jump_starts_again() {
        assert_eq!(steps([0..1, 1..2, 2..3, 10..11, 11..12, 3..4, 4..5]), [0, 1, 2, 0, 1, 0, 1]);
    }

    #[test]
    fn files_do_not_disturb_each_other_and_old_ones_are_forgotten() {
        let mut read_ahead = ReadAhead::default();
        assert_eq!(read_ahead.note_read(7, 0..1), 0);
        assert_eq!(read_ahead.note_read(8, 5..6), 0);
        assert_eq!(read_ahead.note_read(7, 1..2), 1);
        (0..READERS_MAX as u64).for_each(|file| assert_eq!(read_ahead.note_read(100 + file, 0..1), 0));
        assert_eq!(read_ahead.note_read(7, 2..3), 0);
        assert_eq!(read_ahead.readers.len(), READERS_MAX);
    }
}
