//! Prints the hot set that is derived from an unpacked image: for `bench hot-set`.
//!
//! `hot_set ROOT CONFIG` reads the root file system in directory ROOT and the image config in file CONFIG.
//! A line for each file: the reason, the path, and the hot bytes as `start-end` pairs; tabs between them.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
};

use converter::hot_set::{FileContent, StartConfig, derive};
use format_spec::{
    Digest, Index, IndexBuilder, Inode,
    builder::blank_inode,
    records::{PLAIN_ALIGN, mode},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The files of a directory; inodes are told apart by their offset in a plain address space.
#[derive(Default)]
struct Directory {
    builder: IndexBuilder,
    paths: Vec<PathBuf>,
    files: HashMap<u64, PathBuf>,
    hard_links: HashMap<u64, u32>,
    space_len: u64,
}

impl Directory {
    fn read(root: PathBuf) -> Result<(Vec<u8>, Self)> {
        let mut this = Self::default();
        this.builder.add_inode(blank_inode(mode::DIRECTORY | 0o755))?;
        this.paths.push(root.clone());
        let mut queue = VecDeque::from([(0, root)]);
        while let Some((number, path)) = queue.pop_front() {
            let mut entries = fs::read_dir(&path)?.collect::<io::Result<Vec<_>>>()?;
            entries.sort_by_key(|entry| entry.file_name());
            let mut children = Vec::new();
            for entry in entries {
                let child = this.add(&entry.path())?;
                if entry.file_type()?.is_dir() {
                    queue.push_back((child, entry.path()));
                }
                children.push((entry.file_name().into_vec(), child));
            }
            let children = children.iter().map(|(name, child)| (name.as_slice(), *child));
            this.builder.add_directory(number, children)?;
        }
        let tree = std::mem::take(&mut this.builder).finish_tree(&[Digest::of(b"")])?;
        Ok((tree, this))
    }

    fn add(&mut self, path: &PathBuf) -> Result<u32> {
        let metadata = fs::symlink_metadata(path)?;
        let shared = (metadata.nlink() > 1 && !metadata.is_dir()).then_some(metadata.ino());
        if let Some(number) = shared.and_then(|shared| self.hard_links.get(&shared)) {
            return Ok(*number);
        }
        let mut inode = blank_inode(metadata.mode());
        inode.mtime_seconds = metadata.mtime().cast_unsigned().into();
        if metadata.is_symlink() {
            let target = fs::read_link(path)?.into_os_string().into_vec();
            inode.payload = self.builder.add_string(&target)?.into();
            inode.size = (target.len() as u64).into();
        } else if metadata.is_file() {
            inode.plain_offset = self.space_len.into();
            inode.size = metadata.len().into();
            self.files.insert(self.space_len, path.clone());
            self.space_len += metadata.len().next_multiple_of(PLAIN_ALIGN).max(PLAIN_ALIGN);
        }
        let number = self.builder.add_inode(inode)?;
        self.paths.push(path.clone());
        if let Some(shared) = shared {
            self.hard_links.insert(shared, number);
        }
        Ok(number)
    }
}

impl FileContent for Directory {
    fn read_at(&mut self, inode: &Inode, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let path = self.files.get(&inode.plain_offset.get()).ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = vec![0; len];
        fs::File::open(path)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(root), Some(config)) = (arguments.next(), arguments.next()) else {
        return Err("usage: hot_set ROOT CONFIG".into());
    };
    let config = StartConfig::from_json(&fs::read(config)?)?;
    let (tree, mut directory) = Directory::read(root.clone().into())?;
    let tree = Index::open(tree)?;
    let hot = derive(&tree, &mut directory, &config);
    for file in hot.chunk_by(|one, other| one.inode == other.inode) {
        let path = &directory.paths[file[0].inode as usize];
        let path = path.as_os_str().as_bytes().strip_prefix(root.as_bytes()).unwrap_or_default();
        let ranges: Vec<_> = file.iter().map(|hot| format!("{}-{}", hot.range.start, hot.range.end)).collect();
        println!("{}\t{}\t{}", file[0].reason, String::from_utf8_lossy(path), ranges.join(" "));
    }
    Ok(())
}
