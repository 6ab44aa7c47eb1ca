//! Small images for tests: a tree, and the content of its files.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
};

use format_spec::{
    Digest, Index, IndexBuilder, Inode,
    builder::blank_inode,
    records::{PLAIN_ALIGN, mode},
};

use super::{FileContent, HotRange, StartConfig, derive};

/// What stands under a path.
#[derive(Debug, Clone)]
enum Entry {
    Directory,
    File(u32, Vec<u8>, u64),
    Symlink(Vec<u8>),
}

/// An image, built path by path.
#[derive(Debug, Clone)]
pub(super) struct TestImage {
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl TestImage {
    pub(super) fn new() -> Self {
        Self { entries: BTreeMap::from([(b"/".to_vec(), Entry::Directory)]) }
    }

    pub(super) fn file(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.add(path.as_ref(), Entry::File(0o644, content.as_ref().to_vec(), 0))
    }

    pub(super) fn program(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.add(path.as_ref(), Entry::File(0o755, content.as_ref().to_vec(), 0))
    }

    pub(super) fn file_of_time(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>, seconds: u64) -> Self {
        self.add(path.as_ref(), Entry::File(0o644, content.as_ref().to_vec(), seconds))
    }

    pub(super) fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.add(path.as_ref(), Entry::Symlink(target.as_ref().to_vec()))
    }

    /// A file of the machine that runs the test, under its own path, links followed.
    pub(super) fn host_file(self, path: &str) -> Self {
        let content = std::fs::read(path).unwrap();
        self.program(path, content)
    }

    fn add(mut self, path: &[u8], entry: Entry) -> Self {
        let mut directory = path;
        while let Some(slash) = directory.iter().rposition(|byte| *byte == b'/').filter(|slash| *slash > 0) {
            directory = &directory[..slash];
            self.entries.entry(directory.to_vec()).or_insert(Entry::Directory);
        }
        self.entries.insert(path.to_vec(), entry);
        self
    }

    /// Paths of the children of a directory, ascending.
    fn children<'a>(&'a self, directory: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let start = if directory == b"/" { b"".as_slice() } else { directory };
        self.entries.keys().filter_map(move |path| {
            let name = path.strip_prefix(start)?.strip_prefix(b"/")?;
            (!name.is_empty() && !name.contains(&b'/')).then_some((name, path.as_slice()))
        })
    }

    /// Paths in the order of their inode numbers, and the tree.
    fn build(&self) -> (Vec<Vec<u8>>, Vec<u8>) {
        let mut builder = IndexBuilder::default();
        let mut paths = vec![b"/".to_vec()];
        let mut space_len = 0;
        builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
        let mut queue = VecDeque::from([(0, b"/".to_vec())]);
        while let Some((number, directory)) = queue.pop_front() {
            let mut children = Vec::new();
            for (name, path) in self.children(&directory) {
                let mut inode = match &self.entries[path] {
                    Entry::Directory => blank_inode(mode::DIRECTORY | 0o755),
                    Entry::File(permissions, ..) => blank_inode(mode::REGULAR | permissions),
                    Entry::Symlink(_) => blank_inode(mode::SYMLINK | 0o777),
                };
                match &self.entries[path] {
                    Entry::Directory => {}
                    Entry::File(_, content, seconds) => {
                        inode.mtime_seconds = (*seconds).into();
                        inode.size = (content.len() as u64).into();
                        inode.plain_offset = u64::into(space_len);
                        space_len += (content.len() as u64).next_multiple_of(PLAIN_ALIGN);
                    }
                    Entry::Symlink(target) => {
                        inode.payload = builder.add_string(target).unwrap().into();
                        inode.size = (target.len() as u64).into();
                    }
                }
                let child = builder.add_inode(inode).unwrap();
                paths.push(path.to_vec());
                if inode.is_directory() {
                    queue.push_back((child, path.to_vec()));
                }
                children.push((name, child));
            }
            builder.add_directory(number, children).unwrap();
        }
        (paths, builder.finish_tree(&[Digest::of(b"layer")]).unwrap())
    }

    pub(super) fn tree(&self) -> Index<Vec<u8>> {
        Index::open(self.build().1).unwrap()
    }

    pub(super) fn path(&self, number: u32) -> String {
        String::from_utf8_lossy(&self.build().0[number as usize]).into_owned()
    }

    /// The hot set of a command in `/`, with an environment of `NAME=value`.
    pub(super) fn derive(&self, argv: &[&str], env: &[&str]) -> Vec<HotRange> {
        let document = serde_json::json!({"config": {"Cmd": argv, "Env": env}}).to_string();
        let config = StartConfig::from_json(document.as_bytes()).unwrap();
        let (paths, tree) = self.build();
        let tree = Index::open(tree).unwrap();
        derive(&tree, &mut Content { image: self, paths, tree: &tree }, &config)
    }

    /// Paths of the files in the hot set of a command.
    pub(super) fn hot_paths(&self, argv: &[&str], env: &[&str]) -> Vec<String> {
        let paths = self.build().0;
        let path = |hot: &HotRange| String::from_utf8_lossy(&paths[hot.inode as usize]).into_owned();
        let mut hot: Vec<_> = self.derive(argv, env).iter().map(path).collect();
        hot.dedup();
        hot
    }
}

struct Content<'a> {
    image: &'a TestImage,
    paths: Vec<Vec<u8>>,
    tree: &'a Index<Vec<u8>>,
}

impl FileContent for Content<'_> {
    fn read_at(&mut self, inode: &Inode, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let number = self.tree.inodes().iter().position(|other| other == inode).unwrap();
        let Entry::File(_, content, _) = &self.image.entries[&self.paths[number]] else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let start = usize::try_from(offset).unwrap();
        Ok(content[start..start + len].to_vec())
    }
}

/// A program that the search takes for a static one of 64 bits, without sections and segments.
pub(super) fn elf_program() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64, 0);
    // Version and length of the header (ELF-64 object file format, 3).
    bytes[20] = 1;
    bytes[52] = 64;
    bytes
}
