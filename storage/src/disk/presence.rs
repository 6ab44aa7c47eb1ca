//! What of a layer's content is there: by page of the plain address space, and by frame.
//!
//! Content comes as frames, as pieces of the hot pack and as copies from other layers. A *page* (4 KiB of the plain
//! address space) is what a read asks about; its bit is set when all content of the page is there. Pages
//! without content have no bit and are always there: bits go by the numbers of [`PageMap`]. The bit of a *frame* is set
//! when all content of the frame is there, however it came: frames end in the middle of pages, and such a page is there
//! when all frames are that have bytes in it.
//!
//! Both are kept in the file `presence`, with the checksums of pages ([`crate::disk::health`]), bound to the layer's index by
//! its digest and closed by a CRC-32. Whatever does not fit is treated as "nothing there": the price is bytes fetched
//! again, never a wrong byte.

use std::{ops::Range, sync::Arc};

use format_spec::{Digest, records::PLAIN_ALIGN};

use crate::disk::{
    bitmap::{self, Bitmap},
    mapping::LayerIndex,
    page_map::{PageMap, pages_of},
};

/// First eight bytes of the file `presence`.
const MAGIC: [u8; 8] = *b"LAZULIP3";
/// Magic number, index digest, number of frames, number of pages with content.
const HEADER_LEN: usize = 8 + 32 + 8 + 8;
/// Bytes behind the header that mean nothing.
const RESERVED_LEN: usize = 8;
const CRC_LEN: usize = 4;

/// What is there. All methods may be called from many threads at once.
#[derive(Debug)]
pub(crate) struct Presence {
    map: Arc<PageMap>,
    pages: Bitmap,
    frames: Bitmap,
    counts: Counts,
}

/// Bits as a file keeps them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PresenceBits {
    pub(crate) frames: Vec<u64>,
    pub(crate) pages: Vec<u64>,
    /// One a page, 0 for those that are not there; or none at all.
    pub(crate) checksums: Vec<u32>,
}

/// How many frames and pages with content a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) frames: u64,
    pub(crate) pages: u64,
}

impl Counts {
    /// Those of a layer.
    pub(crate) fn of(index: &LayerIndex, map: &PageMap) -> Self {
        Self { frames: index.frames().len() as u64, pages: map.count() }
    }
}

impl Presence {
    /// The presence that `bits` of an earlier process say; `map` is that of the index.
    pub(crate) fn new(index: &LayerIndex, map: Arc<PageMap>, bits: PresenceBits) -> Self {
        let counts = Counts::of(index, &map);
        let presence = Self { map, pages: Bitmap::new(bits.pages), frames: Bitmap::new(bits.frames), counts };
        if !presence.is_complete() {
            // A frame's part of a page that is not there has no checksum, so nobody would see what became of it on
            // the disk meanwhile: it is written anew.
            for (frame, _) in (0..).zip(index.frames()).filter(|(frame, _)| presence.has_frame(*frame)) {
                if !frame_runs(index, frame).all(|run| presence.has_pages(&run)) {
                    presence.frames.clear(u64::from(frame)..u64::from(frame) + 1);
                }
            }
        }
        presence
    }

    /// Which pages have content.
    pub(crate) fn map(&self) -> &Arc<PageMap> {
        &self.map
    }

    /// How many bits there are.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// The numbers of the pages with content that a plain range touches.
    pub(crate) fn numbers(&self, plain: &Range<u64>) -> Range<u64> {
        self.map.numbers(&pages_of(plain))
    }

    /// The numbers of those that lie in it as a whole.
    pub(crate) fn numbers_inside(&self, plain: &Range<u64>) -> Range<u64> {
        let pages = whole_pages_of(plain);
        let start = self.map.first_number(pages.start);
        start..self.map.first_number(pages.end).max(start)
    }

    /// Whether all pages that a plain range touches are there: what a read of content that has arrived costs.
    pub(crate) fn has_pages(&self, plain: &Range<u64>) -> bool {
        self.pages.are_set(self.numbers(plain))
    }

    /// Whether the page with a number is there.
    pub(crate) fn has_number(&self, number: u64) -> bool {
        self.pages.is_set(number)
    }

    /// Whether a frame is.
    pub(crate) fn has_frame(&self, frame: u32) -> bool {
        self.frames.is_set(frame.into())
    }

    /// Whether all content of a plain range is there.
    pub(crate) fn has(&self, index: &LayerIndex, plain: &Range<u64>) -> bool {
        self.has_pages(plain) || self.missing_frames(index, plain).next().is_none()
    }

    /// Whether all content of the layer is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.pages.set_count() == self.counts.pages
    }

    /// Whether none of it is.
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.set_count() == 0
    }

    /// The parts of a plain range whose pages are not there, ascending. Frames may have brought their content yet.
    pub(crate) fn missing_runs(&self, plain: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let plain = plain.clone();
        let numbers = self.numbers(&plain);
        let mut next = numbers.start;
        std::iter::from_fn(move || {
            let start = self.pages.find(next..numbers.end, false)?;
            let pages = self.map.pages_from(start);
            // A hole is not missing: it ends the run.
            let end = numbers.end.min(start + (pages.end - pages.start));
            next = self.pages.find(start..end, true).unwrap_or(end);
            let pages = pages.start..pages.start + (next - start);
            Some((pages.start * PLAIN_ALIGN).max(plain.start)..(pages.end * PLAIN_ALIGN).min(plain.end))
        })
    }

    /// The frames that must come before a plain range can be read, ascending.
    pub(crate) fn missing_frames<'a>(
        &'a self,
        index: &'a LayerIndex,
        plain: &Range<u64>,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let frames = self.missing_runs(plain).flat_map(|run| needed_frames(index, run));
        let mut next_frame = 0;
        frames.filter(move |frame| {
            let is_first_time = *frame >= next_frame;
            next_frame = next_frame.max(frame.saturating_add(1));
            is_first_time && !self.has_frame(*frame)
        })
    }

    /// Whether all content of a frame is there, by its own bit or by its pages.
    pub(crate) fn has_content_of(&self, index: &LayerIndex, frame: u32) -> bool {
        self.has_frame(frame) || frame_runs(index, frame).all(|run| self.has_pages(&run))
    }

    /// All content of a frame has been written.
    pub(crate) fn note_frame(&self, index: &LayerIndex, frame: u32) {
        frame_runs(index, frame).for_each(|run| self.pages.set(self.map.numbers(&whole_pages_of(&run))));
        self.frames.set(frame.into()..u64::from(frame) + 1);
        // After the bit: of two threads that bring the two frames of a page, one sees both.
        for run in frame_runs(index, frame) {
            self.note_ends(&run, |page| needed_frames(index, page.clone()).all(|frame| self.has_frame(frame)));
        }
    }

    /// All content of the pages that a plain range touches has been written.
    pub(crate) fn note_pages(&self, plain: &Range<u64>) {
        self.pages.set(self.numbers(plain));
    }

    /// The bytes of a plain range have been written, which may start and end inside pages and frames.
    ///
    /// `written_until` says for an offset where the bytes end that were written there in the same way, by this call or
    /// others. So a page or frame that several of them brought is seen to be whole by the last of these calls.
    pub(crate) fn note_written(
        &self,
        index: &LayerIndex,
        plain: &Range<u64>,
        written_until: impl Fn(u64) -> Option<u64>,
    ) {
        self.pages.set(self.map.numbers(&whole_pages_of(plain)));
        let is_there = |frame: u32, within: &Range<u64>| {
            self.has_frame(frame)
                || frame_runs(index, frame)
                    .map(|run| run.start.max(within.start)..run.end.min(within.end))
                    .all(|run| self.is_covered(run, &written_until))
        };
        for frame in needed_frames(index, plain.clone()) {
            if !self.has_frame(frame) && is_there(frame, &(0..u64::MAX)) {
                self.note_frame(index, frame);
            }
        }
        self.note_ends(plain, |page| needed_frames(index, page.clone()).all(|frame| is_there(frame, page)));
    }

    fn is_covered(&self, run: Range<u64>, written_until: impl Fn(u64) -> Option<u64>) -> bool {
        let mut offset = run.start;
        while offset < run.end {
            let page = offset / PLAIN_ALIGN;
            let is_there = self.map.number(page).is_none_or(|number| self.has_number(number));
            let end = if is_there { Some((page + 1) * PLAIN_ALIGN) } else { written_until(offset) };
            match end {
                Some(end) if end > offset => offset = end,
                _ => return false,
            }
        }
        true
    }

    /// Sets the pages in which `plain` starts and ends if they are there.
    fn note_ends(&self, plain: &Range<u64>, is_there: impl Fn(&Range<u64>) -> bool) {
        let Some(last) = plain.end.checked_sub(1) else { return };
        for page in [plain.start, last].map(|offset| offset / PLAIN_ALIGN) {
            let Some(number) = self.map.number(page) else { continue };
            if !self.has_number(number) && is_there(&(page * PLAIN_ALIGN..(page + 1) * PLAIN_ALIGN)) {
                self.pages.set(number..number + 1);
            }
        }
    }

    /// The bits as they are now.
    pub(crate) fn snapshot(&self) -> PresenceBits {
        // Frames first: a page that only its frames tell of is found through them, whatever its own bit says.
        let frames = self.frames.snapshot();
        PresenceBits { frames, pages: self.pages.snapshot(), checksums: Vec::new() }
    }

    /// Clears what is set and not in `flushed`, and every frame of which a page is cleared.
    pub(crate) fn forget(&self, index: &LayerIndex, flushed: &PresenceBits) {
        let added = |bits: &[u64], before: &[u64]| -> Vec<u64> {
            bits.iter().zip(before).map(|(bits, before)| bits & !before).collect()
        };
        let now = self.snapshot();
        let pages = added(&now.pages, &flushed.pages);
        self.clear(index, &pages, added(&now.frames, &flushed.frames));
    }

    /// Clears pages by their numbers, and every frame that has content in them.
    pub(crate) fn clear_pages(&self, index: &LayerIndex, numbers: &[u64]) {
        let lost = Bitmap::new(bitmap::empty(self.counts.pages));
        numbers.iter().for_each(|number| lost.set(*number..number + 1));
        self.clear(index, &lost.snapshot(), bitmap::empty(self.counts.frames));
    }

    fn clear(&self, index: &LayerIndex, pages: &[u64], frames: Vec<u64>) {
        let (frames, lost) = (Bitmap::new(frames), Bitmap::new(pages.to_vec()));
        for (frame, _) in (0..).zip(index.frames()) {
            if frame_runs(index, frame).any(|run| lost.find(self.numbers(&run), true).is_some()) {
                frames.set(frame.into()..u64::from(frame) + 1);
            }
        }
        // Frames first: who sees a page missing asks for all of its frames.
        self.frames.clear_all(&frames.snapshot());
        self.pages.clear_all(pages);
    }
}

impl PresenceBits {
    /// Nothing is there.
    pub(crate) fn empty(counts: Counts) -> Self {
        Self { frames: bitmap::empty(counts.frames), pages: bitmap::empty(counts.pages), checksums: Vec::new() }
    }

    /// Clears pages by their numbers.
    pub(crate) fn clear_pages(&mut self, numbers: &[u64]) {
        for number in numbers {
            let word = usize::try_from(number / u64::from(u64::BITS)).ok().and_then(|word| self.pages.get_mut(word));
            word.into_iter().for_each(|word| *word &= !(1 << (number % u64::from(u64::BITS))));
        }
    }

    /// Number of pages that are there.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The content of the file `presence`.
    pub(crate) fn encode(&self, counts: Counts, index: &Digest) -> Vec<u8> {
        let page_count = usize::try_from(counts.pages).unwrap_or(usize::MAX);
        let words_len = (self.frames.len() + self.pages.len()) * 8 + page_count * 4;
        let mut bytes = Vec::with_capacity(HEADER_LEN + RESERVED_LEN + words_len + CRC_LEN);
        bytes.extend_from_slice(&header(counts, index));
        bytes.extend_from_slice(&[0; RESERVED_LEN]);
        self.frames.iter().chain(&self.pages).for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        let checksums = self.checksums.iter().copied().chain(std::iter::repeat(0)).take(page_count);
        checksums.for_each(|checksum| bytes.extend_from_slice(&checksum.to_le_bytes()));
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Where the checksums begin in the file.
    pub(crate) fn checksums_offset(counts: Counts) -> u64 {
        let word_count = |count: u64| count.div_ceil(u64::from(u64::BITS));
        (HEADER_LEN + RESERVED_LEN) as u64 + (word_count(counts.frames) + word_count(counts.pages)) * 8
    }

    /// Reads what [`Self::encode`] wrote for a layer with this index; `None` for anything else.
    pub(crate) fn decode(bytes: &[u8], counts: Counts, index: &Digest) -> Option<Self> {
        let (content, crc32) = bytes.split_at_checked(bytes.len().checked_sub(CRC_LEN)?)?;
        let (found, rest) = content.split_at_checked(HEADER_LEN)?;
        let (_, rest) = rest.split_at_checked(RESERVED_LEN)?;
        let word_count = |count: u64| usize::try_from(count.div_ceil(u64::BITS.into())).ok();
        let frame_word_count = word_count(counts.frames)?;
        let is_ours = crc32fast::hash(content).to_le_bytes() == crc32 && found == header(counts, index);
        let words_len = frame_word_count.checked_add(word_count(counts.pages)?)?.checked_mul(8)?;
        let (words, checksums) = rest.split_at_checked(words_len)?;
        if !is_ours || checksums.len() != usize::try_from(counts.pages).ok()?.checked_mul(4)? {
            return None;
        }
        let mut frames: Vec<u64> =
            words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight"))).collect();
        let pages = frames.split_off(frame_word_count);
        let is_whole =
            bitmap::has_no_spare_bits(&frames, counts.frames) && bitmap::has_no_spare_bits(&pages, counts.pages);
        let checksums =
            checksums.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")));
        is_whole.then(|| Self { frames, pages, checksums: checksums.collect() })
    }
}

fn header(counts: Counts, index: &Digest) -> Vec<u8> {
    [&MAGIC[..], index.as_bytes(), &counts.frames.to_le_bytes(), &counts.pages.to_le_bytes()].concat()
}

/// The pages that lie in a plain range.
fn whole_pages_of(plain: &Range<u64>) -> Range<u64> {
    plain.start.div_ceil(PLAIN_ALIGN)..plain.end / PLAIN_ALIGN
}

/// The frames that hold bytes of a plain range, ascending; none for holes and for what lies between files.
pub(crate) fn needed_frames(index: &LayerIndex, plain: Range<u64>) -> impl Iterator<Item = u32> {
    let numbers = if plain.is_empty() { 0..0 } else { index.extents_in_plain(&plain) };
    let mut next_frame = 0;
    numbers.filter_map(|number| index.extents().get(number)).flat_map(move |extent| {
        let extent_plain = extent.plain_range();
        let tar_start = extent.tar_offset.get();
        let start = plain.start.saturating_sub(extent_plain.start);
        let end = plain.end.min(extent_plain.end).saturating_sub(extent_plain.start);
        let frames = index.frames_in_tar(&(tar_start.saturating_add(start)..tar_start.saturating_add(end)));
        // Two files may share a frame: name it once.
        let frames = frames.start.max(next_frame)..frames.end;
        next_frame = frames.end.max(next_frame);
        frames.filter_map(|frame| u32::try_from(frame).ok())
    })
}

/// The runs of the plain address space whose content a frame holds, ascending.
pub(crate) fn frame_runs(index: &LayerIndex, frame: u32) -> impl Iterator<Item = Range<u64>> {
    let tar = index.frames().get(frame as usize).map_or(0..0, format_spec::Frame::tar_range);
    let numbers = if tar.is_empty() { 0..0 } else { index.extents_in_tar(&tar) };
    numbers.filter_map(|number| index.extents().get(number)).map(move |extent| {
        let extent_tar = extent.tar_range();
        let start = extent.plain_offset.get().saturating_add(tar.start.saturating_sub(extent_tar.start));
        let end = extent.plain_offset.get().saturating_add(tar.end.min(extent_tar.end) - extent_tar.start);
        start..end
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: Digest = Digest::from_bytes([7; 32]);

    fn sample(counts: Counts) -> PresenceBits {
        let [frames, pages] = [counts.frames, counts.pages].map(|count| {
            let bitmap = Bitmap::new(bitmap::empty(count));
            (0..count).step_by(3).for_each(|bit| bitmap.set(bit..bit + 1));
            bitmap.snapshot()
        });
        let checksums = (0..counts.pages).zip(0u32..).map(|(_, page)| page * 7).collect();
        PresenceBits { frames, pages, checksums }
    }

    #[test]
    fn file_form_is_reversible() {
        for counts in [(0, 0), (1, 64), (63, 65), (65, 1000)].map(|(frames, pages)| Counts { frames, pages }) {
            let bits = sample(counts);
            let bytes = bits.encode(counts, &INDEX);
            let checksums = usize::try_from(PresenceBits::checksums_offset(counts)).unwrap();
            let expected: Vec<u8> = bits.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
            assert_eq!(bytes[checksums..bytes.len() - CRC_LEN], expected, "{counts:?}");
            assert_eq!(PresenceBits::decode(&bytes, counts, &INDEX), Some(bits), "{counts:?}");
        }
    }

    #[test]
    fn refuses_any_changed_byte_other_length_and_other_index() {
        let counts = Counts { frames: 65, pages: 200 };
        let bytes = sample(counts).encode(counts, &INDEX);
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            assert_eq!(PresenceBits::decode(&changed, counts, &INDEX), None, "byte {position}");
            assert_eq!(PresenceBits::decode(&bytes[..position], counts, &INDEX), None, "length {position}");
        }
        for other in [Counts { frames: 66, ..counts }, Counts { pages: 199, ..counts }] {
            assert_eq!(PresenceBits::decode(&bytes, other, &INDEX), None);
        }
        assert_eq!(PresenceBits::decode(&bytes, counts, &Digest::from_bytes([8; 32])), None);
    }

    #[test]
    fn refuses_bits_past_the_count() {
        let counts = Counts { frames: 5, pages: 6 };
        for (frames, pages) in [(1 << 5, 0), (0, 1 << 6)] {
            let bits = PresenceBits { frames: vec![frames], pages: vec![pages], checksums: Vec::new() };
            assert_eq!(PresenceBits::decode(&bits.encode(counts, &INDEX), counts, &INDEX), None);
        }
    }
}
