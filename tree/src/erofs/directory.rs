//! Directory blocks.
//!
//! The entries of a directory, `.` and `..` among them, ascend by name as bytes and are cut into blocks. All
//! blocks but the last are filled up with zeros.

use std::iter::Peekable;

use format_spec::{Index, Inode, records::mode};
use zerocopy::IntoBytes;

use super::layout::{BLOCK, Dirent};

/// Names and inode numbers of the entries that a directory of the image has.
pub(super) fn entries<'a, B: AsRef<[u8]>>(
    tree: &'a Index<B>,
    number: u32,
    directory: &'a Inode,
) -> impl Iterator<Item = (&'a [u8], u32)> {
    let mut dots = [(&b"."[..], number), (&b".."[..], directory.parent.get())].into_iter().peekable();
    let mut children = tree.children(directory).peekable();
    std::iter::from_fn(move || {
        let child_name = children.peek().map(|(name, _)| *name);
        dots.next_if(|(name, _)| child_name.is_none_or(|child| *name < child)).or_else(|| children.next())
    })
}

/// The `d_type` of EROFS.
pub(super) fn file_type_of(inode: &Inode) -> u8 {
    match inode.file_type() {
        mode::REGULAR => 1,
        mode::DIRECTORY => 2,
        mode::CHARACTER => 3,
        mode::BLOCK => 4,
        mode::FIFO => 5,
        mode::SOCKET => 6,
        mode::SYMLINK => 7,
        _ => 0,
    }
}

/// An entry ready to be stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Cuts entries into blocks.
pub(super) struct Blocks<I: Iterator> {
    entries: Peekable<I>,
}

impl<'a, I: Iterator<Item = Entry<'a>>> Blocks<I> {
    /// Names must be 1 to 255 bytes long.
    pub(super) fn new(entries: I) -> Self {
        Self { entries: entries.peekable() }
    }

    /// Replaces `block` by the next block, the last one without the zeros after it; empty after the last.
    pub(super) fn next_block(&mut self, block: &mut Vec<u8>) {
        block.clear();
        let mut names: Vec<u8> = Vec::new();
        while let Some(entry) =
            self.entries.next_if(|entry| block.len() + size_of::<Dirent>() + names.len() + entry.name.len() <= BLOCK)
        {
            let dirent = Dirent {
                nid: entry.nid.into(),
                name_offset: u16::try_from(names.len()).expect("shorter than a block").into(),
                file_type: entry.file_type,
                reserved: 0,
            };
            block.extend_from_slice(dirent.as_bytes());
            names.extend_from_slice(entry.name);
        }
        let names_start = u16::try_from(block.len()).expect("shorter than a block");
        for dirent in block.chunks_exact_mut(size_of::<Dirent>()) {
            let offset = u16::from_le_bytes([dirent[NAME_OFFSET_AT], dirent[NAME_OFFSET_AT + 1]]) + names_start;
            dirent[NAME_OFFSET_AT..NAME_OFFSET_AT + 2].copy_from_slice(&offset.to_le_bytes());
        }
        block.extend_from_slice(&names);
        if self.entries.peek().is_some() {
            block.resize(BLOCK, 0);
        }
    }
}

const NAME_OFFSET_AT: usize = std::mem::offset_of!(Dirent, name_offset);
