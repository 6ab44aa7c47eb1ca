//! What a start of an image reads: from a recorded profile, or derived from the image alone.
//!
//! [`derive`] does by hand what the kernel, the loader and the language runtimes do: it finds the program
//! of the image's config, its interpreter and libraries, and for Python, Node, Java and Ruby what their start
//! loads, down to the modules that the application imports. It reads files of the image, never runs them.
//! What it cannot know it leaves out: a hot pack is a hint, and everything else is fetched when it is read.
//!
//! The search is a function of the image and its config, and bounded whatever these say.

mod config;
mod elf;
mod files;
mod java;
mod javascript;
mod ld_cache;
mod libraries;
mod node;
mod profile;
mod program;
mod python;
mod python_imports;
mod python_installation;
mod ruby;
mod shell;
mod system;
#[cfg(test)]
mod test_image;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, io, iter, ops::Range};

use format_spec::{Index, Inode, records::PLAIN_ALIGN};

pub use self::{
    config::{ConfigError, StartConfig},
    profile::{hot_set_of, unknown_count},
};
use self::{
    files::{Files, Found},
    libraries::LoaderCaches,
};

/// Most files of a hot set.
const FILE_COUNT_MAX: usize = 50_000;
/// Most bytes of a hot set: more than a node fetches in the time that people call a start. A hot pack is
/// compressed in memory.
const LEN_MAX: u64 = 256 << 20;
/// Ranges of a file that are closer to each other are one.
const GAP_LEN_MAX: u64 = 16 << 10;

/// Reads content of an image's files.
///
/// An error means that the bytes are not to be had, for example because the layer is no lazy one; then
/// less is known and the hot set is smaller.
pub trait FileContent {
    /// The `len` bytes at `offset` of a regular file of the merged tree.
    ///
    /// # Errors
    ///
    /// When they cannot be had.
    fn read_at(&mut self, inode: &Inode, offset: u64, len: usize) -> io::Result<Vec<u8>>;
}

/// A run of a file that a start reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotRange {
    /// Number of the file in the merged tree.
    pub inode: u32,
    /// Bytes of the file: starts at a multiple of 4096, ends at one or with the file.
    pub range: Range<u64>,
    /// Why: a value of [`format_spec::records::hot_reason`].
    pub reason: u32,
}

/// What a start of the image reads, in the order of first access; ranges of one file follow each other.
pub fn derive<B: AsRef<[u8]>>(tree: &Index<B>, content: &mut dyn FileContent, config: &StartConfig) -> Vec<HotRange> {
    let Ok(tree) = Index::open(tree.as_bytes()) else { return Vec::new() };
    let mut search = Search {
        files: Files::new(tree, content),
        hot: HotSet::default(),
        config,
        loader_caches: LoaderCaches::default(),
        program_count: 0,
    };
    program::start(&mut search);
    search.files.report();
    search.hot.finish()
}

/// Everything that the parts of the search work on.
struct Search<'a> {
    files: Files<'a>,
    hot: HotSet,
    config: &'a StartConfig,
    loader_caches: LoaderCaches,
    /// Programs run so far.
    program_count: u32,
}

impl Search<'_> {
    /// A whole file becomes hot.
    fn add_file(&mut self, found: &Found, reason: u32) {
        let size = self.files.size(found.inode);
        self.hot.add(found.inode, size, iter::once(0..size), reason);
    }

    /// Runs of a file become hot.
    fn add_ranges(&mut self, found: &Found, ranges: impl IntoIterator<Item = Range<u64>>, reason: u32) {
        let size = self.files.size(found.inode);
        self.hot.add(found.inode, size, ranges, reason);
    }

    /// The file under a path becomes hot if there is one, unless it is longer than `len_max`.
    fn add_path(&mut self, path: &[u8], len_max: u64, reason: u32) -> Option<Found> {
        let found = self.files.find_file(path)?;
        if self.files.size(found.inode) > len_max {
            return None;
        }
        self.add_file(&found, reason);
        Some(found)
    }

    /// As [`Self::add_path`], and its content.
    fn add_and_read(&mut self, path: &[u8], len_max: u64, reason: u32) -> Option<Vec<u8>> {
        let found = self.add_path(path, len_max, reason)?;
        self.files.read_file(found.inode, len_max)
    }
}

/// Files and their hot runs, in the order in which they were added first.
#[derive(Debug, Default)]
struct HotSet {
    files: Vec<HotFile>,
    places: HashMap<u32, usize>,
    len: u64,
}

#[derive(Debug)]
struct HotFile {
    inode: u32,
    size: u64,
    reason: u32,
    /// Aligned, ascending, not touching each other.
    ranges: Vec<Range<u64>>,
}

impl HotSet {
    /// Adds runs of a file of `size` bytes; what exceeds the limits of a hot set is left out.
    fn add(&mut self, inode: u32, size: u64, ranges: impl IntoIterator<Item = Range<u64>>, reason: u32) {
        let place = self.places.get(&inode).copied();
        if place.is_none() && self.files.len() >= FILE_COUNT_MAX {
            return;
        }
        let known = place.map(|place| self.files[place].ranges.as_slice()).unwrap_or_default();
        let known_len = ranges_len(known);
        let ranges = join_ranges(known.iter().cloned().chain(ranges), size);
        let len = self.len - known_len + ranges_len(&ranges);
        if len > LEN_MAX || ranges.is_empty() {
            return;
        }
        self.len = len;
        match place {
            Some(place) => self.files[place].ranges = ranges,
            None => {
                self.places.insert(inode, self.files.len());
                self.files.push(HotFile { inode, size, reason, ranges });
            }
        }
    }

    fn finish(self) -> Vec<HotRange> {
        let ranges = self.files.into_iter().flat_map(|file| {
            file.ranges.into_iter().map(move |range| HotRange {
                inode: file.inode,
                range: range.start..range.end.min(file.size),
                reason: file.reason,
            })
        });
        ranges.collect()
    }
}

/// Rounds ranges to whole blocks of a file of `size` bytes and joins what is close.
fn join_ranges(ranges: impl Iterator<Item = Range<u64>>, size: u64) -> Vec<Range<u64>> {
    let blocks = |range: Range<u64>| {
        let start = range.start / PLAIN_ALIGN * PLAIN_ALIGN;
        start..range.end.min(size).checked_next_multiple_of(PLAIN_ALIGN).unwrap_or(u64::MAX)
    };
    let mut ranges: Vec<_> = ranges.filter(|range| range.start < range.end.min(size)).map(blocks).collect();
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP_LEN_MAX) => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

fn ranges_len(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
