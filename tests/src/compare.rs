//! Compares two trees in everything that a program can see of them.
//!
//! Not compared, because they are of the mount and not of the image: inode and device numbers, access
//! and change times, block counts, sizes of directories, and the link counts of directories where a
//! file system does not count them (it says 1 then, as overlayfs does). Nor the time of the root itself:
//! containerd ignores a layer's entry for the root and leaves it the time of unpacking. Nor names that
//! cannot be looked up: overlayfs lists whiteouts of a directory that only one layer has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File, FileType, Metadata},
    io::Read as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use crate::{
    error::{Context as _, HarnessError, Result},
    process::{command, finish},
};

const BUFFER_LEN: usize = 256 << 10;

/// One thing in which two trees differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Path relative to the roots.
    pub path: PathBuf,
    /// What differs, and the two values.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}: {}", self.path.display(), self.what)
    }
}

/// What a tree shows of one name, except the content.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    /// 0 for directories.
    size: u64,
    link_count: u64,
    device: u64,
    modified: (i64, i64),
    target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names with the same inode are links to one file.
    inode: (u64, u64),
}

/// Walks both trees; returns every difference, sorted by path. Empty: they are the same.
///
/// # Errors
///
/// When one of the trees cannot be read.
pub fn compare_trees(original: &Path, lazy: &Path) -> Result<Vec<Difference>> {
    let (left, mut right) = (walk(original)?, walk(lazy)?);
    let root = Path::new("");
    if let (Some(left), Some(right)) = (left.get(root), right.get_mut(root)) {
        right.modified = left.modified;
    }
    let mut differences = Vec::new();
    let paths: BTreeSet<&PathBuf> = left.keys().chain(right.keys()).collect();
    for path in paths {
        let note = |what: String| Difference { path: path.clone(), what };
        match (left.get(path), right.get(path)) {
            (Some(left), Some(right)) => {
                differences.extend(left.differences(right).into_iter().map(note));
                if left.kind == "file" && right.kind == "file" && left.size == right.size {
                    let offset = first_difference(&original.join(path), &lazy.join(path))?;
                    differences.extend(offset.map(|offset| note(format!("content differs at byte {offset}"))));
                }
            }
            (Some(left), None) => differences.push(note(format!("missing, is a {} in the original", left.kind))),
            (None, Some(right)) => differences.push(note(format!("is a {}, not there in the original", right.kind))),
            (None, None) => {}
        }
    }
    let (left, right) = (link_sets(&left), link_sets(&right));
    for set in left.symmetric_difference(&right) {
        let origin = if left.contains(set) { "only in the original" } else { "not in the original" };
        let Some(path) = set.first() else { continue };
        differences.push(Difference { path: path.clone(), what: format!("links {set:?} are one file {origin}") });
    }
    Ok(differences)
}

/// What `diff -r --no-dereference` prints of two trees, line by line: a second opinion.
///
/// Without its lines on pairs of device nodes or pipes of the same kind, of which it only says that it
/// cannot compare them.
///
/// # Errors
///
/// When `diff` cannot read something.
pub fn diff_trees(original: &Path, lazy: &Path) -> Result<Vec<String>> {
    let mut diff = command("diff", ["-r", "--no-dereference"]);
    let finished = finish(diff.args([original, lazy]).env("LC_ALL", "C"))?;
    if !matches!(finished.code, Some(0 | 1)) || !finished.stderr.is_empty() {
        return Err(HarnessError::Unexpected(format!("diff: {}", finished.stderr)));
    }
    let is_difference = |line: &&str| {
        let kinds =
            line.split_once(" while file ").map(|sides| [sides.0, sides.1].map(|side| side.rsplit_once(" is a ")));
        !matches!(kinds, Some([Some((_, left)), Some((_, right))]) if left == right)
    };
    Ok(finished.stdout.lines().filter(is_difference).map(str::to_owned).collect())
}

impl Entry {
    /// `None` for what is not there.
    fn read(path: &Path) -> Result<Option<Self>> {
        let metadata = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.at("reading metadata of", path)?,
        };
        let kind = kind_of(metadata.file_type());
        let target = match kind {
            "symlink" => Some(fs::read_link(path).at("reading link", path)?),
            _ => None,
        };
        let mut xattrs = BTreeMap::new();
        for name in xattr::list(path).at("listing xattrs of", path)? {
            let value = xattr::get(path, &name).at("reading an xattr of", path)?;
            xattrs.insert(name.as_bytes().to_vec(), value.unwrap_or_default());
        }
        Ok(Some(Self::from_parts(kind, &metadata, target, xattrs)))
    }

    fn from_parts(
        kind: &'static str,
        metadata: &Metadata,
        target: Option<PathBuf>,
        xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Self {
        Self {
            kind,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            size: if metadata.is_dir() { 0 } else { metadata.size() },
            link_count: metadata.nlink(),
            device: metadata.rdev(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            target,
            xattrs,
            inode: (metadata.dev(), metadata.ino()),
        }
    }

    /// In what `lazy` differs from this, one sentence each.
    fn differences(&self, lazy: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |what: &str, original: &dyn fmt::Debug, lazy: &dyn fmt::Debug| {
            let (original, lazy) = (format!("{original:?}"), format!("{lazy:?}"));
            if original != lazy {
                found.push(format!("{what} is {lazy}, in the original {original}"));
            }
        };
        check("type", &self.kind, &lazy.kind);
        check("mode", &format_args!("{:o}", self.mode), &format_args!("{:o}", lazy.mode));
        check("owner and group", &self.owner, &lazy.owner);
        check("size", &self.size, &lazy.size);
        check("device number", &self.device, &lazy.device);
        check("modification time", &self.modified, &lazy.modified);
        check("link target", &self.target, &lazy.target);
        let name = |(name, value): (&Vec<u8>, &Vec<u8>)| (String::from_utf8_lossy(name).into_owned(), value.clone());
        let all = |entry: &Self| entry.xattrs.iter().map(name).collect::<BTreeMap<_, _>>();
        check("xattrs", &all(self), &all(lazy));
        let is_counted = self.kind != "directory" || (self.link_count != 1 && lazy.link_count != 1);
        if is_counted {
            check("link count", &self.link_count, &lazy.link_count);
        }
        found
    }
}

/// Reads the metadata of everything below `root`, by relative path; the root itself has an empty one.
fn walk(root: &Path) -> Result<BTreeMap<PathBuf, Entry>> {
    let mut entries = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let Some(entry) = Entry::read(&path)? else { continue };
        if entry.kind == "directory" {
            for child in fs::read_dir(&path).at("listing", &path)? {
                pending.push(relative.join(child.at("listing", &path)?.file_name()));
            }
        }
        entries.insert(relative, entry);
    }
    Ok(entries)
}

/// The sets of names that are one file, where there are several.
fn link_sets(entries: &BTreeMap<PathBuf, Entry>) -> BTreeSet<Vec<PathBuf>> {
    let mut names: BTreeMap<(u64, u64), Vec<PathBuf>> = BTreeMap::new();
    for (path, entry) in entries.iter().filter(|(_, entry)| entry.kind != "directory") {
        names.entry(entry.inode).or_default().push(path.clone());
    }
    names.into_values().filter(|set| set.len() > 1).collect()
}

/// Where two files of the same size first differ.
fn first_difference(left: &Path, right: &Path) -> Result<Option<u64>> {
    let mut files = [File::open(left).at("opening", left)?, File::open(right).at("opening", right)?];
    let mut buffers = [vec![0; BUFFER_LEN], vec![0; BUFFER_LEN]];
    let mut offset = 0;
    loop {
        let mut lengths = [0; 2];
        for (index, path) in [left, right].into_iter().enumerate() {
            lengths[index] = read_full(&mut files[index], &mut buffers[index]).at("reading", path)?;
        }
        let [left, right] = [&buffers[0][..lengths[0]], &buffers[1][..lengths[1]]];
        if left != right {
            let equal = left.iter().zip(right).take_while(|(left, right)| left == right).count();
            return Ok(Some(offset + equal as u64));
        }
        if left.is_empty() {
            return Ok(None);
        }
        offset += left.len() as u64;
    }
}

/// Fills `buffer` as far as the file goes.
fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            len => filled += len,
        }
    }
    Ok(filled)
}

fn kind_of(file_type: FileType) -> &'static str {
    match file_type {
        kind if kind.is_file() => "file",
        kind if kind.is_dir() => "directory",
        kind if kind.is_symlink() => "symlink",
        kind if kind.is_fifo() => "fifo",
        kind if kind.is_socket() => "socket",
        kind if kind.is_char_device() => "character device",
        _ => "block device",
    }
}
