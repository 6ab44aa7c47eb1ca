//! The page cache: emptied, and what of a directory's files is in it.
//!
//! mincore(2) tells, through `fincore` for whole files and `xfs_io`, which works on any file system, for parts of them.

use std::{
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use rustix::fs::{Advice, fadvise};

use crate::{
    error::{Context as _, HarnessError, Result},
    process::{command, require_program, run},
};

/// Files that one `fincore` is asked about: their paths fit a command line.
const FILES_ASKED_MAX: usize = 1000;
/// Mappings end at a multiple of every length of a page.
const PAGE_LEN_MAX: u64 = 64 << 10;

/// A regular file that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length, in bytes.
    pub len: u64,
    /// Bytes of it in the page cache, in whole pages.
    pub cached_len: u64,
}

impl CachedFile {
    /// The parts that are in the page cache, in whole pages but for the end of the file.
    ///
    /// # Errors
    ///
    /// When `xfs_io` is not installed or fails.
    pub fn ranges(&self) -> Result<Vec<Range<u64>>> {
        match self.cached_len {
            0 => Ok(Vec::new()),
            cached if cached >= self.len => Ok(std::iter::once(0..self.len).collect()),
            _ => self.mapped_ranges(),
        }
    }

    fn mapped_ranges(&self) -> Result<Vec<Range<u64>>> {
        require_program("xfs_io")?;
        let map = format!("mmap -r 0 {}", self.len.next_multiple_of(PAGE_LEN_MAX));
        let printed = run(command("xfs_io", ["-r", "-c", &map, "-c", "mincore"]).arg(&self.path))?;
        let ranges = printed.lines().map(|line| {
            let range = parse_range(line).filter(|range| range.start < self.len);
            range.map(|range| range.start..range.end.min(self.len))
        });
        let ranges: Option<Vec<_>> = ranges.collect();
        ranges.ok_or_else(|| HarnessError::Unexpected(format!("xfs_io {}: {printed}", self.path.display())))
    }
}

/// The range in a line such as `0x7fc0b5200000 - 0x7fc0b65c1000  5057 pages (0 : 20713472)`: offset and length.
fn parse_range(line: &str) -> Option<Range<u64>> {
    let (_, range) = line.split_once('(')?;
    let (offset, len) = range.strip_suffix(')')?.split_once(" : ")?;
    let offset: u64 = offset.parse().ok()?;
    Some(offset..offset + len.parse::<u64>().ok()?)
}

/// Drops all of the page cache of the machine that is not dirty, after having written what is.
///
/// # Errors
///
/// Without root.
pub fn drop_page_cache() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")
}

/// Drops from the page cache what belongs to files below `root`, and nothing else.
///
/// # Errors
///
/// When a file cannot be opened.
pub fn forget_files(root: &Path) -> Result<()> {
    rustix::fs::sync();
    for (path, _) in regular_files(root)? {
        let file = File::open(&path).at("opening", &path)?;
        fadvise(&file, 0, None, Advice::DontNeed).at("dropping from the page cache", &path)?;
    }
    Ok(())
}

/// The files below `root`, on its file system, of which something is in the page cache, sorted by path.
///
/// # Errors
///
/// When the directory cannot be read, or `fincore` fails.
pub fn cached_files(root: &Path) -> Result<Vec<CachedFile>> {
    let mut found = Vec::new();
    for asked in regular_files(root)?.chunks(FILES_ASKED_MAX) {
        let words = ["--bytes", "--noheadings", "--raw", "--output", "RES"];
        let printed = run(command("fincore", words).args(asked.iter().map(|(path, _)| path)))?;
        let answers: Vec<u64> = printed.lines().filter_map(|line| line.trim().parse().ok()).collect();
        if answers.len() != asked.len() {
            let counts = format!("{} answers for {} files", answers.len(), asked.len());
            return Err(HarnessError::Unexpected(format!("fincore below {}: {counts}", root.display())));
        }
        let cached = asked.iter().zip(answers).filter(|(_, cached_len)| *cached_len > 0);
        found.extend(cached.map(|((path, len), cached_len)| CachedFile { path: path.clone(), len: *len, cached_len }));
    }
    Ok(found)
}

/// Paths and lengths of the regular files below `root`, on its file system, that are not empty; sorted.
fn regular_files(root: &Path) -> Result<Vec<(PathBuf, u64)>> {
    use std::os::unix::fs::MetadataExt as _;
    let device = fs::symlink_metadata(root).at("looking at", root)?.dev();
    let mut files = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).at("listing", &directory)? {
            let entry = entry.at("listing", &directory)?;
            let metadata = entry.metadata().at("looking at", &entry.path())?;
            if metadata.is_dir() && metadata.dev() == device {
                pending.push(entry.path());
            } else if metadata.is_file() && metadata.len() > 0 {
                files.push((entry.path(), metadata.len()));
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_xfs_io_are_understood() {
        assert_eq!(parse_range("0x7f00b5200000 - 0x7f00b5203000  3 pages (8192 : 12288)"), Some(8192..20480));
        assert_eq!(parse_range("no range"), None);
    }
}
