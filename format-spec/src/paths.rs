//! From inodes of an index to the names that people know.

use std::collections::VecDeque;

use crate::{index::Index, records::WHITEOUT};

/// The first name of every inode of an index.
#[derive(Debug)]
pub struct Paths<'a, B> {
    index: &'a Index<B>,
    /// For every inode the number of a dirent and the directory that it stands in.
    names: Vec<Option<(usize, u32)>>,
    /// Where regular files with content start in the plain address space, and their inodes; ascending.
    files: Vec<(u64, u32)>,
}

impl<'a, B: AsRef<[u8]>> Paths<'a, B> {
    /// Reads all directories of an index that passed [`Index::check`].
    pub fn new(index: &'a Index<B>) -> Self {
        let mut names = vec![None; index.inodes().len()];
        let mut pending = VecDeque::from([0]);
        while let Some(directory) = pending.pop_front() {
            let Some(inode) = index.inode(directory) else { continue };
            for number in inode.dirent_range() {
                let child = index.dirents().get(number).map_or(WHITEOUT, |dirent| dirent.inode.get());
                if let Some(name @ None) = names.get_mut(child as usize) {
                    *name = Some((number, directory));
                    if index.inode(child).is_some_and(|inode| inode.is_directory()) {
                        pending.push_back(child);
                    }
                }
            }
        }
        let files = (0..).zip(index.inodes()).filter(|(_, inode)| inode.is_regular() && inode.size != 0);
        let files = files.map(|(number, inode)| (inode.plain_offset.get(), number)).collect();
        Self { index, names, files }
    }

    /// The path of an inode, `/` for the root, as it can be shown.
    pub fn path(&self, inode: u32) -> String {
        shown(&self.path_bytes(inode))
    }

    /// The path of an inode, `/` for the root.
    pub fn path_bytes(&self, inode: u32) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut at = inode;
        while let Some((dirent, directory)) = self.names.get(at as usize).copied().flatten() {
            parts.push(self.index.name(dirent));
            at = directory;
        }
        parts.reverse();
        [b"/".as_slice(), &parts.join(&b'/')].concat()
    }

    /// The file that has its content at `plain_offset` of the plain address space, and the offset in it.
    pub fn file_at(&self, plain_offset: u64) -> Option<(u32, u64)> {
        let number = self.files.partition_point(|(start, _)| *start <= plain_offset).checked_sub(1)?;
        let (start, inode) = *self.files.get(number)?;
        let range = self.index.inode(inode)?.plain_range();
        range.contains(&plain_offset).then_some((inode, plain_offset - start))
    }
}

/// A path as it can be shown on one line.
pub fn shown(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}
