//! The files of an image by path, as a process in the container would open them.
//!
//! Symbolic links are followed inside the image, `..` stops at its root. Everything that is read to find
//! out more counts against one budget, so that no image makes the search long.

use std::{cell::Cell, collections::VecDeque};

use format_spec::{Index, Inode, records::WHITEOUT};

use super::FileContent;

/// Symbolic links followed in one path before it is given up, as Linux does (`MAXSYMLINKS`).
const SYMLINK_COUNT_MAX: usize = 40;
/// Longest path, links put in (`PATH_MAX` of Linux).
const PATH_LEN_MAX: usize = 4096;
/// Most bytes that are read to learn what a start reads.
const READ_LEN_MAX: u64 = 512 << 20;
/// Most reads for it.
const READ_COUNT_MAX: u32 = 100_000;

/// Most steps of the search: look-ups of paths, each counted once for every so many bytes of the path, and names of
/// directories. Some seconds of a processor, whatever an image says.
const STEP_COUNT_MAX: u64 = 10_000_000;
const LOOK_UP_UNIT_LEN: u64 = 16;

/// The tree of an image and what can be read of its files.
pub(super) struct Files<'a> {
    tree: Index<&'a [u8]>,
    content: &'a mut dyn FileContent,
    read_len: u64,
    read_count: u32,
    step_count: Cell<u64>,
}

/// A file or directory, and its one path without links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Number in the tree.
    pub(super) inode: u32,
    /// Absolute, without `.`, `..`, doubled slashes and symbolic links.
    pub(super) path: Vec<u8>,
}

impl<'a> Files<'a> {
    pub(super) fn new(tree: Index<&'a [u8]>, content: &'a mut dyn FileContent) -> Self {
        Self { tree, content, read_len: 0, read_count: 0, step_count: Cell::new(0) }
    }

    pub(super) fn inode(&self, number: u32) -> Option<&Inode> {
        self.tree.inode(number)
    }

    /// What an absolute path names, links followed; relative ones start at the root.
    pub(super) fn find(&self, path: &[u8]) -> Option<Found> {
        self.count_steps(1 + path.len() as u64 / LOOK_UP_UNIT_LEN);
        if self.is_over() {
            return None;
        }
        find(&self.tree, path)
    }

    fn count_steps(&self, count: u64) {
        self.step_count.set(self.step_count.get().saturating_add(count));
    }

    /// Whether the search has taken all the steps that it may: loops end then, since nothing more is found.
    pub(super) fn is_over(&self) -> bool {
        self.step_count.get() > STEP_COUNT_MAX
    }

    /// Says how far the search went: aloud when it was ended, since hot packs may lack files then.
    pub(super) fn report(&self) {
        let steps = self.step_count.get();
        if self.is_over() {
            tracing::warn!(steps, "the search for what a start reads was ended: hot packs may lack files");
        } else {
            tracing::debug!(
                steps,
                reads = self.read_count,
                read_len = self.read_len,
                "searched for what a start reads"
            );
        }
    }

    /// The regular file under a path, links followed.
    pub(super) fn find_file(&self, path: &[u8]) -> Option<Found> {
        self.find(path).filter(|found| self.inode(found.inode).is_some_and(Inode::is_regular))
    }

    /// The directory under a path, links followed.
    pub(super) fn find_directory(&self, path: &[u8]) -> Option<Found> {
        self.find(path).filter(|found| self.inode(found.inode).is_some_and(Inode::is_directory))
    }

    /// Whether a path names a regular file that somebody may execute.
    pub(super) fn find_executable(&self, path: &[u8]) -> Option<Found> {
        self.find_file(path).filter(|found| self.inode(found.inode).is_some_and(|inode| inode.mode.get() & 0o111 != 0))
    }

    /// Names in the directory under a path, ascending; none if there is no such directory.
    pub(super) fn names(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let Some(directory) = self.find_directory(path) else { return Vec::new() };
        let Some(inode) = self.inode(directory.inode) else { return Vec::new() };
        self.count_steps(inode.size.get());
        let entries = self.tree.children(inode).filter(|(_, number)| *number != WHITEOUT);
        entries.map(|(name, _)| name.to_vec()).collect()
    }

    pub(super) fn size(&self, number: u32) -> u64 {
        self.inode(number).filter(|inode| inode.is_regular()).map_or(0, |inode| inode.size.get())
    }

    /// Bytes of a file: exactly `len` of them, or `None`.
    pub(super) fn read_at(&mut self, number: u32, offset: u64, len: usize) -> Option<Vec<u8>> {
        let end = offset.checked_add(len as u64)?;
        if end > self.size(number) || self.read_count >= READ_COUNT_MAX || self.read_len + len as u64 > READ_LEN_MAX {
            return None;
        }
        self.read_count += 1;
        self.read_len += len as u64;
        let inode = *self.inode(number)?;
        self.content.read_at(&inode, offset, len).ok().filter(|bytes| bytes.len() == len)
    }

    /// The first bytes of a file: `len` of them, or fewer at its end.
    pub(super) fn read_head(&mut self, number: u32, len: usize) -> Option<Vec<u8>> {
        let len = usize::try_from(self.size(number)).map_or(len, |size| size.min(len));
        self.read_at(number, 0, len)
    }

    /// A whole file, unless it is longer than `len_max`.
    pub(super) fn read_file(&mut self, number: u32, len_max: u64) -> Option<Vec<u8>> {
        let size = self.size(number);
        if size > len_max {
            return None;
        }
        self.read_at(number, 0, usize::try_from(size).ok()?)
    }
}

/// Walks a path from the root of the tree on.
pub(super) fn find<B: AsRef<[u8]>>(tree: &Index<B>, path: &[u8]) -> Option<Found> {
    // Directories walked down to here with the name of each, and components still to walk.
    let mut walked: Vec<(u32, Vec<u8>)> = Vec::new();
    let mut rest: VecDeque<Vec<u8>> = components(path)?;
    let mut symlink_count = 0;
    while let Some(name) = rest.pop_front() {
        let current = walked.last().map_or(0, |(number, _)| *number);
        let directory = tree.inode(current).filter(|inode| inode.is_directory())?;
        match name.as_slice() {
            b"." => continue,
            b".." => {
                walked.pop();
                continue;
            }
            _ => {}
        }
        let number = tree.lookup(directory, &name).filter(|number| *number != WHITEOUT)?;
        let inode = tree.inode(number)?;
        if !inode.is_symlink() {
            walked.push((number, name));
            continue;
        }
        symlink_count += 1;
        if symlink_count > SYMLINK_COUNT_MAX {
            return None;
        }
        let target = tree.symlink_target(inode);
        if target.first() == Some(&b'/') {
            walked.clear();
        }
        for component in components(target)?.into_iter().rev() {
            rest.push_front(component);
        }
        if rest.iter().map(|component| component.len() + 1).sum::<usize>() > PATH_LEN_MAX {
            return None;
        }
    }
    let inode = walked.last().map_or(0, |(number, _)| *number);
    let mut absolute = Vec::new();
    for (_, name) in &walked {
        absolute.push(b'/');
        absolute.extend_from_slice(name);
    }
    if absolute.is_empty() {
        absolute.push(b'/');
    }
    Some(Found { inode, path: absolute })
}

/// The names between the slashes of a path; a slash at the end asks for a directory.
fn components(path: &[u8]) -> Option<VecDeque<Vec<u8>>> {
    if path.is_empty() || path.len() > PATH_LEN_MAX || path.contains(&0) {
        return None;
    }
    let mut names: VecDeque<_> =
        path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect();
    if path.ends_with(b"/") {
        names.push_back(b".".to_vec());
    }
    Some(names)
}

/// `path` seen from `directory`: itself if it is absolute.
pub(super) fn join(directory: &[u8], path: &[u8]) -> Vec<u8> {
    if path.first() == Some(&b'/') {
        return path.to_vec();
    }
    [directory, b"/", path].concat()
}

/// What stands before the last slash.
pub(super) fn parent(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    if end == 0 { b"/" } else { &path[..end] }
}

/// What stands behind the last slash.
pub(super) fn base_name(path: &[u8]) -> &[u8] {
    let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    &path[start..]
}

#[cfg(test)]
mod tests {
    use super::{super::test_image::TestImage, *};

    /// Nothing is read.
    struct NoContent;

    impl FileContent for NoContent {
        fn read_at(&mut self, _: &Inode, _: u64, _: usize) -> std::io::Result<Vec<u8>> {
            Err(std::io::ErrorKind::NotFound.into())
        }
    }

    fn found(image: &TestImage, path: &str) -> Option<String> {
        find(&image.tree(), path.as_bytes()).map(|found| String::from_utf8(found.path).unwrap())
    }

    #[test]
    fn links_are_followed_inside_the_image() {
        let image = TestImage::new()
            .file("/usr/bin/tool", "x")
            .symlink("/bin", "usr/bin")
            .symlink("/usr/bin/absolute", "/bin/tool")
            .symlink("/usr/bin/above", "../../../../bin/./tool");
        for path in ["/bin/tool", "//usr//bin/tool", "/bin/absolute", "/usr/bin/above", "/bin/../bin/tool", "bin/tool"]
        {
            assert_eq!(found(&image, path).as_deref(), Some("/usr/bin/tool"), "{path}");
        }
        assert_eq!(found(&image, "/../..").as_deref(), Some("/"));
        assert_eq!(found(&image, "/bin/").as_deref(), Some("/usr/bin"));
    }

    /// Budgets made look-ups fail; loops over words of a config and directories of its PATH went on for minutes.
    #[test]
    fn a_search_that_has_taken_its_steps_is_over() {
        let image = TestImage::new().file("/bin/tool", "x").file("/lib/a", "").file("/lib/b", "");
        let tree = image.tree();
        let mut content = NoContent;
        let files = Files::new(Index::open(tree.as_bytes()).unwrap(), &mut content);
        assert!(files.find(b"/bin/tool").is_some());
        let before = files.step_count.get();
        assert_eq!(files.names(b"/lib").len(), 2);
        assert!(files.step_count.get() >= before + 3, "each name is a step");
        files.count_steps(STEP_COUNT_MAX);
        assert!(files.is_over() && files.find(b"/bin/tool").is_none() && files.names(b"/lib").is_empty());
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        let mut image = TestImage::new().file("/file", "x").symlink("/loop", "loop").symlink("/gone", "nowhere");
        for number in 0..50 {
            image = image.symlink(format!("/{number}"), format!("{}", number + 1));
        }
        image = image.file("/50", "x");
        for path in ["", "/loop", "/gone", "/file/", "/file/x", "/file/..", "/0", "/none", "/file\0"] {
            assert_eq!(found(&image, path), None, "{path}");
        }
        assert_eq!(found(&image, "/10").as_deref(), Some("/50"));
    }

    #[test]
    fn links_that_grow_end() {
        let target = "/a/".repeat(1000);
        let image = TestImage::new().symlink("/a", target);
        assert_eq!(found(&image, "/a"), None);
    }
}
