//! Whether a layer's content is still what was written: checksums of its pages, and what is done about those that
//! differ.
//!
//! Digests are of compressed frames, so what lies in `data` has checksums of its own: a CRC-32 a page, taken when the
//! page is there, kept in `presence`. A page that differs, or that the disk cannot read, counts as missing and is fetched
//! again. If the file is sealed, somebody may have it mounted: then the good pages are copied to a new one.
//!
//! Content of an earlier process is compared once before it is used ([`crate::unchecked`]), everything now and then by
//! the scrub (`cache/scrub.rs`).

use std::{io, ops::Range};

use format_spec::index::PLAIN_ALIGN;
use rustix::io::Errno;

use crate::{
    disk::{DiskFile, is_lost},
    frame_store::{FrameStore, Writing},
    presence::{Counts, PresenceBits, pages_of},
    sync::{atomic::Ordering, lock},
};

/// Pages that are read at once.
const BATCH_PAGES: u64 = 64;
const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PLAIN_ALIGN);

/// Of a page with content; 0 is left for those that have none.
fn checksum_of(page: &[u8]) -> u32 {
    crc32fast::hash(page).max(1)
}

fn start_of(page: u64) -> u64 {
    page * PLAIN_ALIGN
}

fn get(checksums: &[u32], page: u64) -> u32 {
    usize::try_from(page).ok().and_then(|page| checksums.get(page)).copied().unwrap_or(0)
}

/// Calls `each` with the batches of pages for which `is_meant` holds.
fn for_each_batch(
    pages: impl Iterator<Item = u64>,
    is_meant: impl Fn(u64) -> bool,
    mut each: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut batch = 0..0;
    for page in pages.filter(|page| is_meant(*page)) {
        if page == batch.end && batch.end - batch.start < BATCH_PAGES {
            batch.end += 1;
            continue;
        }
        if !batch.is_empty() {
            each(batch)?;
        }
        batch = page..page + 1;
    }
    if batch.is_empty() { Ok(()) } else { each(batch) }
}

/// Reads pages one by one where they cannot be read at once; `None` for those that the disk has lost.
fn read_pages(data: &DiskFile, pages: &Range<u64>) -> io::Result<Vec<(u64, Option<Vec<u8>>)>> {
    let mut bytes = vec![0; usize::try_from((pages.end - pages.start) * PLAIN_ALIGN).map_err(io::Error::other)?];
    match data.read_sparse(start_of(pages.start), &mut bytes) {
        Ok(()) => Ok(pages.clone().zip(bytes.chunks_exact(PAGE_LEN).map(|page| Some(page.to_vec()))).collect()),
        Err(error) if !is_lost(&error) => Err(error),
        Err(_) if pages.end - pages.start == 1 => Ok(vec![(pages.start, None)]),
        Err(_) => {
            let single = pages.clone().map(|page| read_pages(data, &(page..page + 1)));
            Ok(single.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
        }
    }
}

impl FrameStore {
    /// Takes the checksums of pages that have just become whole, among those that `runs` touch.
    pub(crate) fn take_checksums(&self, writing: &mut Writing, runs: impl Iterator<Item = Range<u64>>) {
        if writing.checksums.is_empty() {
            return;
        }
        let mut runs: Vec<_> = runs.map(|run| pages_of(&run)).collect();
        runs.sort_unstable_by_key(|pages| pages.start);
        let mut next = 0;
        let pages = runs.into_iter().flat_map(move |pages| {
            let pages = pages.start.max(next)..pages.end;
            next = pages.end.max(next);
            pages
        });
        let checksums = std::mem::take(&mut writing.checksums);
        let mut taken = Vec::new();
        let is_new = |page: u64| get(&checksums, page) == 0 && self.has_page(page) && !self.unchecked.has(page);
        let read = for_each_batch(pages, is_new, |batch| {
            for (page, content) in read_pages(&self.data(), &batch)? {
                taken.extend(content.map(|content| (page, checksum_of(&content))));
            }
            Ok(())
        });
        writing.checksums = checksums;
        for (page, checksum) in taken {
            if let Some(known) = usize::try_from(page).ok().and_then(|page| writing.checksums.get_mut(page)) {
                *known = checksum;
            }
        }
        if let Err(error) = read {
            // Nothing is known of them then.
            tracing::debug!(%error, "checksums cannot be taken");
        }
    }

    /// Compares what an earlier process left in the pages that a plain range touches, unless that was done. `data` is the
    /// file as it was when the caller began. Blocks where something is left to compare.
    ///
    /// # Errors
    ///
    /// One that [`is_lost`] where a page is not what was written, or cannot be read: [`Self::heal`] helps.
    pub(crate) fn check(&self, data: &DiskFile, plain: &Range<u64>) -> io::Result<()> {
        if self.unchecked.is_empty() {
            return Ok(());
        }
        for_each_batch(
            pages_of(plain),
            |page| self.unchecked.has(page),
            |batch| {
                let Some(checksums) = self.unchecked.checksums_of(&batch)? else { return Ok(()) };
                let mut bytes =
                    vec![0; usize::try_from((batch.end - batch.start) * PLAIN_ALIGN).map_err(io::Error::other)?];
                data.read_sparse(start_of(batch.start), &mut bytes)?;
                let mut pages = bytes.chunks_exact(PAGE_LEN).zip(checksums);
                if !pages.all(|(content, checksum)| checksum_of(content) == checksum) {
                    return Err(Errno::BADMSG.into());
                }
                self.unchecked.note_checked(batch);
                Ok(())
            },
        )
    }

    /// A part, of so many bytes at most, of what an earlier process left and nobody has compared.
    pub(crate) fn next_unchecked(&self, from: u64, len: u64) -> Option<Range<u64>> {
        let start = self.unchecked.next(from / PLAIN_ALIGN).map(start_of)?;
        Some(start..start.saturating_add(len).min(self.index().space_len()))
    }

    /// The pages that a plain range touches and whose content is not what was written. Reads all of it; blocks.
    ///
    /// # Errors
    ///
    /// When the disk refuses in another way than by having lost a page.
    pub(crate) fn find_damaged(&self, plain: &Range<u64>) -> io::Result<Vec<u64>> {
        let checksums = match lock(self.writing()).checksums.clone() {
            checksums if checksums.is_empty() => self.kept_checksums()?,
            checksums => checksums,
        };
        let (data, mut damaged) = (self.data(), Vec::new());
        // One to be compared whose checksum the disk has lost is damaged too.
        let is_known = |page: u64| (get(&checksums, page) != 0 || self.unchecked.has(page)) && self.has_page(page);
        for_each_batch(pages_of(plain), is_known, |batch| {
            for (page, content) in read_pages(&data, &batch)? {
                if content.is_some_and(|content| checksum_of(&content) == get(&checksums, page)) {
                    self.unchecked.note_checked(page..page + 1);
                } else {
                    damaged.push(page);
                }
            }
            Ok(())
        })?;
        // What was given up meanwhile was written anew perhaps.
        damaged.retain(|page| is_known(*page));
        Ok(damaged)
    }

    /// Those of the file `presence`.
    fn kept_checksums(&self) -> io::Result<Vec<u32>> {
        let counts = Counts::of(self.index());
        let kept = self.directory().read_presence(counts, self.index_digest())?;
        Ok(kept.map(|bits| bits.checksums).unwrap_or_default())
    }

    /// Gives damaged pages up, so that they are fetched again. Blocks.
    ///
    /// # Errors
    ///
    /// When a new file is needed and the disk refuses: then everything stays as it is.
    pub(crate) fn heal(&self, damaged: &[u64]) -> io::Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        // What is fetched in their place may come in another way than what was verified.
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

    fn give_up(&self, pages: &[u64], flushed: &mut PresenceBits, writing: &mut Writing) {
        self.next_epoch();
        self.clear_pages(pages);
        pages.iter().for_each(|page| self.unchecked.note_checked(*page..page + 1));
        flushed.clear_pages(pages);
        for page in pages {
            if let Some(known) = usize::try_from(*page).ok().and_then(|page| writing.checksums.get_mut(page)) {
                *known = 0;
            }
        }
        self.note_change();
    }

    /// Brings what is good into a new file, in the place of the one that somebody may have mounted.
    fn rebuild(&self, damaged: &[u64], flushed: &mut PresenceBits, writing: &mut Writing) -> io::Result<()> {
        let mut checksums = self.kept_checksums()?;
        checksums.resize(usize::try_from(Counts::of(self.index()).pages).map_err(io::Error::other)?, 0);
        let (old, new) = (self.data(), self.directory().new_data(self.index().space_len())?);
        let mut lost = damaged.to_vec();
        let is_known = |page: u64| get(&checksums, page) != 0;
        for_each_batch(0..Counts::of(self.index()).pages, is_known, |batch| {
            for (page, content) in read_pages(&old, &batch)? {
                match content.filter(|content| checksum_of(content) == get(&checksums, page)) {
                    // Also one that was damaged a moment ago: the page cache may have it whole.
                    Some(content) => {
                        new.file.write_all_at(&content, start_of(page))?;
                        lost.retain(|lost| *lost != page);
                    }
                    None => lost.push(page),
                }
            }
            Ok(())
        })?;
        // Without its checksum nothing is known of a page, and it was not copied.
        let with_content = self.index().extents().iter().flat_map(|extent| pages_of(&extent.plain_range()));
        lost.extend(with_content.filter(|page| !is_known(*page)));
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
        self.unchecked.note_checked(0..Counts::of(self.index()).pages);
        Ok(())
    }
}
