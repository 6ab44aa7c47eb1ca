//! Whether a layer's content is still what was written: checksums of its pages, and what is done about those that
//! differ.
//!
//! Pages go by their numbers here ([`PageMap`]): those without content have no checksum.
//!
//! Digests are of compressed frames, so what lies in `data` has checksums of its own: a CRC-32 a page, taken when the
//! page is there, kept in `presence`. A page that differs, or that the disk cannot read, counts as missing and is fetched
//! again. If the file is sealed, somebody may have it mounted: then the good pages are copied to a new one.
//!
//! Content of an earlier process is compared once before it is used ([`crate::disk::unchecked`]), everything now and then by
//! the scrub (`cache/scrub.rs`).

use std::{io, ops::Range};

use format_spec::records::PLAIN_ALIGN;
use rustix::io::Errno;

use crate::{
    disk::{
        DiskFile,
        frame_store::{FrameStore, Writing},
        is_lost,
        page_map::{PageMap, pages_of},
        presence::PresenceBits,
    },
    sync::{atomic::Ordering, lock},
};

/// Pages that are read at once.
const BATCH_PAGES: u64 = 64;
const PAGE_LEN: usize = 4096;
const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
const _: () = assert!(PAGE_LEN as u64 == PLAIN_ALIGN);

/// Of a page; 0 is left for those that are not there.
fn checksum_of(page: &[u8]) -> u32 {
    crc32fast::hash(page).max(1)
}

/// Where the page with a number starts, in the plain address space.
fn start_of(map: &PageMap, number: u64) -> u64 {
    map.pages_from(number).start * PLAIN_ALIGN
}

/// The number of a page and the checksum of its content.
pub(crate) type PageChecksum = (u64, u32);

fn get(checksums: &[u32], number: u64) -> u32 {
    usize::try_from(number).ok().and_then(|number| checksums.get(number)).copied().unwrap_or(0)
}

/// Calls `each` with the batches of pages for which `is_meant` holds: neighbours, between which no hole lies.
fn for_each_batch(
    map: &PageMap,
    numbers: impl Iterator<Item = u64>,
    is_meant: impl Fn(u64) -> bool,
    mut each: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let (mut batch, mut batch_max) = (0..0, 0);
    for number in numbers.filter(|number| is_meant(*number)) {
        if number == batch.end && number < batch_max {
            batch.end += 1;
            continue;
        }
        if !batch.is_empty() {
            each(batch)?;
        }
        batch = number..number + 1;
        let pages = map.pages_from(number);
        batch_max = number + BATCH_PAGES.min(pages.end - pages.start);
    }
    if batch.is_empty() { Ok(()) } else { each(batch) }
}

/// Calls `each` with the number and the content of every page of a batch, `None` for those that the disk has lost.
/// `bytes` is memory for them.
fn read_pages(
    data: &DiskFile,
    map: &PageMap,
    batch: &Range<u64>,
    bytes: &mut Vec<u8>,
    each: &mut impl FnMut(u64, Option<&[u8]>) -> io::Result<()>,
) -> io::Result<()> {
    bytes.resize(usize::try_from((batch.end - batch.start) * PLAIN_ALIGN).map_err(io::Error::other)?, 0);
    match data.read_sparse(start_of(map, batch.start), bytes) {
        Ok(()) => {
            batch.clone().zip(bytes.chunks_exact(PAGE_LEN)).try_for_each(|(number, page)| each(number, Some(page)))
        }
        Err(error) if !is_lost(&error) => Err(error),
        Err(_) if batch.end - batch.start == 1 => each(batch.start, None),
        // One by one.
        Err(_) => batch.clone().try_for_each(|number| read_pages(data, map, &(number..number + 1), bytes, each)),
    }
}

impl FrameStore {
    /// The checksums of the pages that lie wholly in a run of content without holes.
    pub(crate) fn checksums_of(&self, plain_offset: u64, content: &[u8]) -> impl Iterator<Item = PageChecksum> {
        let start = plain_offset.next_multiple_of(PLAIN_ALIGN);
        let skipped = usize::try_from(start - plain_offset).unwrap_or(usize::MAX);
        let pages = content.get(skipped..).unwrap_or_default().chunks_exact(PAGE_LEN);
        let first = self.presence().map().number(start / PLAIN_ALIGN);
        first.into_iter().flat_map(move |first| (first..).zip(pages.clone().map(checksum_of)))
    }

    /// The parts of `content` that are here already, and not with the checksums that it gives: those that must be read to
    /// be compared, ascending.
    ///
    /// Checksums are quick and no proof: somebody may have made other content with the same ones.
    pub(crate) fn unlike_runs(&self, plain_offset: u64, content: &[u8]) -> Vec<Range<u64>> {
        let plain = plain_offset..plain_offset + content.len() as u64;
        let (writing, mut unlike) = (lock(self.writing()), Vec::<Range<u64>>::new());
        for run in self.present_runs(plain) {
            let pages = pages_of(&run);
            let numbers = self.presence().map().numbers(&pages);
            for (page, number) in pages.zip(numbers) {
                let start = page * PLAIN_ALIGN;
                let found = start.checked_sub(plain_offset).and_then(|from| {
                    let rest = content.get(usize::try_from(from).ok()?..)?;
                    Some(match rest.first_chunk::<PAGE_LEN>() {
                        Some(page) => checksum_of(page),
                        // The end of a file, mostly: zeros up to the next one.
                        None => checksum_of(&[rest, &ZEROS[rest.len()..]].concat()),
                    })
                });
                if found == Some(get(&writing.checksums, number)) {
                    continue;
                }
                let part = start.max(run.start)..(start + PLAIN_ALIGN).min(run.end);
                match unlike.last_mut() {
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => unlike.push(part),
                }
            }
        }
        unlike
    }

    /// Keeps checksums of pages that are there by now.
    pub(crate) fn keep_checksums(&self, writing: &mut Writing, checksums: &[PageChecksum]) {
        for (number, checksum) in checksums {
            let known = usize::try_from(*number).ok().and_then(|number| writing.checksums.get_mut(number));
            if let Some(known) = known.filter(|known| **known == 0 && self.presence().has_number(*number)) {
                *known = *checksum;
            }
        }
    }

    /// Takes the checksums of pages that have just become whole, among those that `runs` touch. Those that are known
    /// already cost nothing; the others are read.
    pub(crate) fn take_checksums(&self, writing: &mut Writing, runs: impl Iterator<Item = Range<u64>>) {
        if writing.checksums.is_empty() {
            return;
        }
        let (map, presence) = (self.presence().map(), self.presence());
        let mut runs: Vec<_> = runs.map(|run| presence.numbers(&run)).collect();
        runs.sort_unstable_by_key(|numbers| numbers.start);
        let mut next = 0;
        let numbers = runs.into_iter().flat_map(move |numbers| {
            let numbers = numbers.start.max(next)..numbers.end;
            next = numbers.end.max(next);
            numbers
        });
        let checksums = std::mem::take(&mut writing.checksums);
        let (mut taken, mut bytes) = (Vec::new(), Vec::new());
        let is_new =
            |number: u64| get(&checksums, number) == 0 && presence.has_number(number) && !self.unchecked.has(number);
        let read = for_each_batch(map, numbers, is_new, |batch| {
            read_pages(&self.data(), map, &batch, &mut bytes, &mut |number, content| {
                taken.extend(content.map(|content| (number, checksum_of(content))));
                Ok(())
            })
        });
        writing.checksums = checksums;
        self.keep_checksums(writing, &taken);
        if let Err(error) = read {
            // Nothing is known of them then.
            tracing::debug!(%error, "checksums cannot be taken");
        }
    }

    /// Compares what an earlier process left in the pages that a plain range touches, unless that was done. `data` is the
    /// file as it was when the caller began, and `content` the bytes of the range where he has read them from it. Blocks
    /// where something is left to compare.
    ///
    /// # Errors
    ///
    /// One that [`is_lost`] where a page is not what was written, or cannot be read: [`Self::heal`] helps.
    pub(crate) fn check(&self, data: &DiskFile, plain: &Range<u64>, content: Option<&[u8]>) -> io::Result<()> {
        if self.unchecked.is_empty() {
            return Ok(());
        }
        let (map, mut read) = (self.presence().map(), Vec::new());
        let numbers = self.presence().numbers(plain);
        // At its ends the caller may have parts of pages.
        let inner = self.presence().numbers_inside(plain);
        let mut compare = |batch: Range<u64>| {
            let Some(checksums) = self.unchecked.checksums_of(&batch)? else { return Ok(()) };
            let start = start_of(map, batch.start);
            let len = usize::try_from((batch.end - batch.start) * PLAIN_ALIGN).map_err(io::Error::other)?;
            let known = content.and_then(|content| {
                let from = usize::try_from(start.checked_sub(plain.start)?).ok()?;
                content.get(from..from.checked_add(len)?)
            });
            let bytes = match known {
                Some(known) => known,
                None => {
                    read.resize(len, 0);
                    data.read_sparse(start, &mut read)?;
                    &read
                }
            };
            let mut pages = bytes.chunks_exact(PAGE_LEN).zip(checksums);
            if !pages.all(|(content, checksum)| checksum_of(content) == checksum) {
                return Err(Errno::BADMSG.into());
            }
            self.unchecked.note_checked(batch);
            Ok(())
        };
        for part in [numbers.start..inner.start, inner.start..inner.end, inner.end..numbers.end] {
            for_each_batch(map, part, |number| self.unchecked.has(number), &mut compare)?;
        }
        Ok(())
    }

    /// The next part of the plain address space that an earlier process left and nobody has compared; see
    /// [`Self::next_content`].
    pub(crate) fn next_unchecked(&self, from: u64, len: u64) -> Option<Range<u64>> {
        let number = self.presence().map().first_number(from / PLAIN_ALIGN);
        self.part_from(self.unchecked.next(number)?, len)
    }

    /// The next part of the plain address space that has content, from an offset on: pages that hold so many bytes at
    /// most, and the holes between them.
    pub(crate) fn next_content(&self, from: u64, len: u64) -> Option<Range<u64>> {
        self.part_from(self.presence().map().first_number(from / PLAIN_ALIGN), len)
    }

    fn part_from(&self, number: u64, len: u64) -> Option<Range<u64>> {
        let map = self.presence().map();
        let end = map.count().min(number.saturating_add(len / PLAIN_ALIGN));
        (number < end).then(|| start_of(map, number)..start_of(map, end - 1) + PLAIN_ALIGN)
    }

    /// The numbers of the pages that a plain range touches and whose content is not what was written. Reads all of it;
    /// blocks.
    ///
    /// # Errors
    ///
    /// When the disk refuses in another way than by having lost a page.
    pub(crate) fn find_damaged(&self, plain: &Range<u64>) -> io::Result<Vec<u64>> {
        let checksums = match lock(self.writing()).checksums.clone() {
            checksums if checksums.is_empty() => self.kept_checksums()?,
            checksums => checksums,
        };
        let (data, presence) = (self.data(), self.presence());
        let (mut damaged, mut bytes) = (Vec::new(), Vec::new());
        // One to be compared whose checksum the disk has lost is damaged too.
        let is_known =
            |number: u64| (get(&checksums, number) != 0 || self.unchecked.has(number)) && presence.has_number(number);
        for_each_batch(presence.map(), presence.numbers(plain), is_known, |batch| {
            read_pages(&data, presence.map(), &batch, &mut bytes, &mut |number, content| {
                if content.is_some_and(|content| checksum_of(content) == get(&checksums, number)) {
                    self.unchecked.note_checked(number..number + 1);
                } else {
                    damaged.push(number);
                }
                Ok(())
            })
        })?;
        // Pages that were given up meanwhile were written anew perhaps.
        damaged.retain(|number| is_known(*number));
        Ok(damaged)
    }

    /// Those of the file `presence`.
    fn kept_checksums(&self) -> io::Result<Vec<u32>> {
        let kept = self.directory().read_presence(self.presence().counts(), self.index_digest())?;
        Ok(kept.map(|bits| bits.checksums).unwrap_or_default())
    }

    /// Gives damaged pages up, named by their numbers, so that they are fetched again. Blocks.
    ///
    /// # Errors
    ///
    /// When a new file is needed and the disk refuses: then everything stays as it is.
    pub(crate) fn heal(&self, damaged: &[u64]) -> io::Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        // Content that is fetched in their place may come in another way than the verified content.
        self.doubt();
        let mut flushed = lock(self.flushed());
        let mut writing = lock(self.writing());
        let count = damaged.len();
        if self.is_sealed() {
            self.rebuild(damaged, &mut flushed, &mut writing)?;
        } else {
            self.give_up(damaged, &mut flushed, &mut writing);
        }
        drop((writing, flushed));
        self.healed_pages.fetch_add(count as u64, Ordering::AcqRel);
        // At once: until then a new file counts as empty.
        self.flush()?;
        let path = self.directory().path();
        tracing::warn!(layer = %path.display(), count, "pages of the cache were damaged: they are fetched again");
        Ok(())
    }

    fn give_up(&self, numbers: &[u64], flushed: &mut PresenceBits, writing: &mut Writing) {
        self.next_epoch();
        self.clear_pages(numbers);
        numbers.iter().for_each(|number| self.unchecked.note_checked(*number..number + 1));
        flushed.clear_pages(numbers);
        for number in numbers {
            if let Some(known) = usize::try_from(*number).ok().and_then(|number| writing.checksums.get_mut(number)) {
                *known = 0;
            }
        }
        self.note_change();
    }

    /// Brings what is good into a new file, in the place of the one that somebody may have mounted.
    fn rebuild(&self, damaged: &[u64], flushed: &mut PresenceBits, writing: &mut Writing) -> io::Result<()> {
        let (map, mut checksums) = (self.presence().map(), self.kept_checksums()?);
        checksums.resize(usize::try_from(map.count()).map_err(io::Error::other)?, 0);
        let (old, new) = (self.data(), self.directory().new_data(self.index().space_len())?);
        let (mut lost, mut bytes) = (damaged.to_vec(), Vec::new());
        let is_known = |number: u64| get(&checksums, number) != 0;
        for_each_batch(map, 0..map.count(), is_known, |batch| {
            read_pages(&old, map, &batch, &mut bytes, &mut |number, content| {
                match content.filter(|content| checksum_of(content) == get(&checksums, number)) {
                    // Also one that was damaged a moment ago: the page cache may have it whole.
                    Some(content) => {
                        new.file.write_all_at(content, start_of(map, number))?;
                        lost.retain(|lost| *lost != number);
                    }
                    None => lost.push(number),
                }
                Ok(())
            })
        })?;
        // Without its checksum nothing is known of a page, and it was not copied.
        lost.extend((0..map.count()).filter(|number| !is_known(*number)));
        lost.sort_unstable();
        lost.dedup();
        new.file.sync_data()?;
        let file = self.directory().replace_data(new)?;
        // Bits first: who takes the new file has seen them cleared.
        writing.checksums = checksums;
        self.unseal();
        self.give_up(&lost, flushed, writing);
        self.set_data(file);
        // All of it was compared on its way.
        self.unchecked.note_checked(0..map.count());
        Ok(())
    }
}
