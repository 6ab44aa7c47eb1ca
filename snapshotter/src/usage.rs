//! What a directory takes on disk.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::records::Usage;

/// Unit of `st_blocks` (POSIX leaves it open, Linux fixes it).
const BLOCK_BYTES: u64 = 512;

/// Adds up the blocks of everything below `root`, itself included; hard links count once.
///
/// What disappears during the walk is left out. Blocks.
///
/// # Errors
///
/// When a directory cannot be read.
pub fn disk_usage(root: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut waiting: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let Some(metadata) = unless_gone(fs::symlink_metadata(&path))? else { continue };
        if metadata.is_dir() {
            let Some(entries) = unless_gone(fs::read_dir(&path))? else { continue };
            for entry in entries {
                waiting.push(entry?.path());
            }
        } else if metadata.nlink() > 1 && !linked.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * BLOCK_BYTES;
    }
    Ok(usage)
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_blocks_and_every_inode_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/file"), vec![1; 10_000]).unwrap();
        fs::hard_link(path("sub/file"), path("link")).unwrap();
        std::os::unix::fs::symlink("target", path("symlink")).unwrap();
        let names = ["", "sub", "sub/file", "symlink"];
        let blocks: u64 = names.iter().map(|name| fs::symlink_metadata(path(name)).unwrap().blocks()).sum();
        assert_eq!(disk_usage(directory.path()).unwrap(), Usage { bytes: blocks * 512, inodes: 4 });
    }

    #[test]
    fn a_sparse_file_counts_what_it_holds() {
        let directory = tempfile::tempdir().unwrap();
        fs::File::create(directory.path().join("sparse")).unwrap().set_len(1 << 30).unwrap();
        assert!(disk_usage(directory.path()).unwrap().bytes < 1 << 20);
    }

    #[test]
    fn a_missing_directory_takes_nothing() {
        assert_eq!(disk_usage(Path::new("/nonexistent")).unwrap(), Usage::default());
    }
}
