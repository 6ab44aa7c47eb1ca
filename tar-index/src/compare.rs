//! An index against the tar stream, name by name and field by field.
//!
//! Both sides are seen as any reader sees an index: paths, and what they show. The side of the tar stream
//! is made by the walker and the tree of a conversion, so their errors are not found here; what a tar
//! entry means is held by the tests that compare with a real unpack.

use std::{fmt, io};

use format_spec::{
    Extent, Frame, Index, Inode, LayerData,
    paths::{Paths, shown},
    records::{NO_XATTRS, WHITEOUT, flag, mode},
};

use crate::{
    layer_index::build_index,
    tree::LayerTree,
    walker::{TarError, TarInput, next_entry},
};

/// Why a tar stream says no tree: one line.
#[derive(Debug)]
pub enum UnfitStream {
    /// It could not be read to its end, which says nothing of it.
    Unreadable(io::Error),
    /// It is none that containerd unpacks, or exceeds a limit of the format.
    Refused(String),
}

impl fmt::Display for UnfitStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(error) => error.fmt(f),
            Self::Refused(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for UnfitStream {}

impl UnfitStream {
    fn refused(reason: impl fmt::Display) -> Self {
        Self::Refused(reason.to_string())
    }
}

impl From<TarError> for UnfitStream {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Io(error) => Self::Unreadable(error),
            error => Self::refused(error),
        }
    }
}

/// The tree that a tar stream describes; `skip` consumes bytes, or as many as there are.
///
/// # Errors
///
/// When the stream cannot be read, or is none that containerd unpacks.
pub fn read_tree<I: TarInput>(
    input: &mut I,
    mut skip: impl FnMut(&mut I, u64) -> io::Result<()>,
) -> Result<LayerTree, UnfitStream> {
    let mut tree = LayerTree::default();
    while let Some(entry) = next_entry(input)? {
        let content_start = input.position();
        let len = entry.stored_len.saturating_add(entry.padding_len);
        tree.apply(entry, content_start).map_err(UnfitStream::refused)?;
        skip(input, len).map_err(UnfitStream::Unreadable)?;
    }
    tree.finish().map_err(UnfitStream::refused)?;
    Ok(tree)
}

/// What the tar stream says: a tree in the form of an index, and where its files lie.
#[derive(Debug)]
pub struct TarSide {
    tree: Index<Vec<u8>>,
    extents: Vec<Extent>,
    space_len: u64,
}

impl TarSide {
    /// The side of a stream of `tar_len` bytes that has this tree; `frames` are where its layer is cut.
    ///
    /// # Errors
    ///
    /// When a limit of the format is exceeded, or content lies behind the end of the stream.
    pub fn new(tree: LayerTree, tar_len: u64, frames: &[Frame]) -> Result<Self, UnfitStream> {
        let built = build_index(tree).map_err(UnfitStream::refused)?;
        let data =
            LayerData { tar_len, space_len: built.space_len, extents: &built.extents, frames, ..LayerData::default() };
        let bytes = built.builder.layer_bytes(&data).map_err(UnfitStream::refused)?;
        let tree = Index::open(bytes).map_err(UnfitStream::refused)?;
        Ok(Self { tree, extents: built.extents, space_len: built.space_len })
    }
}

/// Gets a path of the tar stream and what is wrong with it by the index.
pub type OnDifference<'a> = &'a mut dyn FnMut(String, String);

/// Tells of every name and field in which `index` differs; returns how many inodes were compared.
pub fn compare<B: AsRef<[u8]>>(index: &Index<B>, tar: &TarSide, findings: OnDifference<'_>) -> u64 {
    let mut comparison = Comparison {
        index,
        tar,
        // The paths of the tar stream: those of the index may be what is wrong.
        paths: Paths::new(&tar.tree),
        partners: vec![None; tar.tree.inodes().len()],
        findings,
        has_differences: false,
    };
    comparison.compare_trees();
    // Whatever shifts one file shifts all behind it: said only where nothing else is.
    if !comparison.has_differences {
        comparison.compare_order();
    }
    comparison.partners.iter().flatten().count() as u64
}

/// A name in a directory of the tar stream; none for the root.
#[derive(Clone, Copy)]
struct Place<'a> {
    directory: u32,
    name: Option<&'a [u8]>,
}

struct Comparison<'a, B> {
    index: &'a Index<B>,
    tar: &'a TarSide,
    paths: Paths<'a, Vec<u8>>,
    /// For every inode of the tar stream the one of the index that it was compared with.
    partners: Vec<Option<u32>>,
    findings: OnDifference<'a>,
    has_differences: bool,
}

impl<'a, B: AsRef<[u8]>> Comparison<'a, B> {
    fn add(&mut self, place: Place<'_>, problem: String) {
        let directory = self.paths.path(place.directory);
        let path = match place.name {
            None => directory,
            Some(name) => format!("{}/{}", directory.trim_end_matches('/'), shown(name)),
        };
        self.has_differences = true;
        (self.findings)(path, problem);
    }

    fn compare_trees(&mut self) {
        let mut pending = vec![(0, 0)];
        self.compare_inodes(0, 0, Place { directory: 0, name: None });
        while let Some((ours, theirs)) = pending.pop() {
            let subdirectories = self.compare_directories(ours, theirs);
            pending.extend(subdirectories.into_iter().rev());
        }
    }

    /// Compares the names of two directories and what they show; returns the directories among them.
    fn compare_directories(&mut self, ours: u32, theirs: u32) -> Vec<(u32, u32)> {
        let (index, tree) = (self.index, &self.tar.tree);
        let directory = theirs;
        let (Some(ours), Some(theirs)) = (index.inode(ours), tree.inode(theirs)) else { return Vec::new() };
        let (mut left, mut right) = (index.children(ours).peekable(), tree.children(theirs).peekable());
        let mut subdirectories = Vec::new();
        loop {
            let names = [left.peek().map(|(name, _)| *name), right.peek().map(|(name, _)| *name)];
            let Some(name) = names.into_iter().flatten().min() else { return subdirectories };
            let ours = left.next_if(|(other, _)| *other == name).map(|(_, inode)| inode);
            let theirs = right.next_if(|(other, _)| *other == name).map(|(_, inode)| inode);
            let place = Place { directory, name: Some(name) };
            match (ours, theirs) {
                (Some(WHITEOUT), Some(WHITEOUT)) => {}
                (Some(ours), Some(theirs)) if ours != WHITEOUT && theirs != WHITEOUT => {
                    if self.compare_inodes(ours, theirs, place) {
                        subdirectories.push((ours, theirs));
                    }
                }
                (ours, theirs) => {
                    let (ours, theirs) = (describe(index, ours), describe(tree, theirs));
                    self.add(place, format!("the index has {ours}, the tar stream {theirs}"));
                }
            }
        }
    }

    /// Compares two inodes; returns whether both are directories.
    fn compare_inodes(&mut self, ours: u32, theirs: u32, place: Place<'_>) -> bool {
        let (index, tree) = (self.index, &self.tar.tree);
        let (Some(left), Some(right)) = (index.inode(ours), tree.inode(theirs)) else { return false };
        let Some(partner) = self.partners.get_mut(theirs as usize) else { return false };
        match partner.replace(ours) {
            // A further name of a file that was compared.
            Some(other) if other == ours => return false,
            Some(_) => self.add(place, "the index has a file of its own, the tar stream a hard link".to_owned()),
            None => {}
        }
        for problem in differences((index, left), (tree, right)) {
            self.add(place, problem);
        }
        if left.is_regular() && right.is_regular() {
            let (left, right) = (extents_of(index.extents(), left), extents_of(&self.tar.extents, right));
            if let Some(number) = first_difference(&left, &right) {
                let of = |extents: &[(u64, u64, u64)]| match extents.get(number) {
                    Some((offset, tar, len)) => {
                        format!("{len} bytes at {offset} that stand at {tar} of the tar stream")
                    }
                    None => "none".to_owned(),
                };
                let (left, right) = (of(&left), of(&right));
                self.add(place, format!("extent {number} is {left} by the index, {right} by the tar stream"));
            }
        }
        left.is_directory() && right.is_directory()
    }

    /// What holds for the tree as a whole: numbers in the order of the tar stream, and nothing left over.
    fn compare_order(&mut self) {
        let (index, root) = (self.index, Place { directory: 0, name: None });
        for (theirs, ours) in (0..).zip(self.partners.clone()) {
            if ours.is_some_and(|ours| ours != theirs) {
                let problem = format!("it is inode {}, by its place in the tar stream {theirs}", ours.unwrap_or(0));
                return self.add(Place { directory: theirs, name: None }, problem);
            }
        }
        let counts = [
            ("inodes", index.inodes().len() as u64, self.tar.tree.inodes().len() as u64),
            ("extents", index.extents().len() as u64, self.tar.extents.len() as u64),
            ("bytes of plain address space", index.space_len(), self.tar.space_len),
        ];
        for (what, ours, theirs) in counts.into_iter().filter(|(_, ours, theirs)| ours != theirs) {
            self.add(root, format!("the index has {ours} {what}, the tar stream {theirs}"));
        }
    }
}

fn describe<B: AsRef<[u8]>>(index: &Index<B>, inode: Option<u32>) -> &'static str {
    match inode {
        None => "nothing",
        Some(WHITEOUT) => "a whiteout",
        Some(number) => index.inode(number).map_or("nothing", kind),
    }
}

fn kind(inode: &Inode) -> &'static str {
    match inode.file_type() {
        mode::REGULAR => "a file",
        mode::DIRECTORY => "a directory",
        mode::SYMLINK => "a symbolic link",
        mode::CHARACTER => "a character device",
        mode::BLOCK => "a block device",
        mode::FIFO => "a pipe",
        _ => "a socket",
    }
}

/// In what an inode of the index (left) differs from that of the tar stream, one sentence each.
fn differences<L: AsRef<[u8]>, R: AsRef<[u8]>>(
    (left_index, left): (&Index<L>, &Inode),
    (right_index, right): (&Index<R>, &Inode),
) -> Vec<String> {
    if left.file_type() != right.file_type() {
        return vec![format!("it is {} by the index, {} by the tar stream", kind(left), kind(right))];
    }
    let mut found = Vec::new();
    let mut check = |what: &str, left: String, right: String| {
        if left != right {
            found.push(format!("{what} is {left} by the index, {right} by the tar stream"));
        }
    };
    let mut check_number = |what, left: u64, right: u64| check(what, left.to_string(), right.to_string());
    check_number("owner", left.uid.get().into(), right.uid.get().into());
    check_number("group", left.gid.get().into(), right.gid.get().into());
    check_number("link count", left.nlink.get().into(), right.nlink.get().into());
    if left.is_regular() {
        check_number("size", left.size.get(), right.size.get());
        check_number("plain offset", left.plain_offset.get(), right.plain_offset.get());
    }
    if left.is_device() {
        check_number("device number", left.payload.get().into(), right.payload.get().into());
    }
    // Where these fields mean nothing they are 0: no reader may come to another opinion.
    let has_neither = !left.is_directory() && !left.is_symlink();
    if has_neither && !left.is_regular() {
        check_number("length field", left.size.get(), right.size.get());
    }
    if has_neither && !left.is_device() {
        check_number("payload field", left.payload.get().into(), right.payload.get().into());
    }
    let permissions = |inode: &Inode| format!("{:04o}", inode.mode.get() & 0o7777);
    check("mode", permissions(left), permissions(right));
    let time = |inode: &Inode| format!("{}.{:09}", inode.mtime_seconds(), inode.mtime_nanoseconds.get());
    check("modification time", time(left), time(right));
    check("flags", flags(left), flags(right));
    let (left_target, right_target) = (left_index.symlink_target(left), right_index.symlink_target(right));
    // Bytes are compared, not what is shown of them: four letters may look like one byte, two attributes like one.
    if left_target != right_target {
        let exact = || [left_target, right_target].map(|bytes| bytes.escape_ascii().to_string());
        let [left, right] = told_apart([left_target, right_target].map(shown), exact);
        check("target", left, right);
    }
    let (left_pairs, right_pairs) = (xattrs(left_index, left), xattrs(right_index, right));
    if left_pairs != right_pairs {
        let exact = || [&left_pairs, &right_pairs].map(exact_list);
        let [left, right] = told_apart([&left_pairs, &right_pairs].map(|pairs| list(pairs, shown, "=")), exact);
        check("xattrs", left, right);
    }
    found
}

/// The `short` form of two values that differ, or the exact one where the short ones look the same.
fn told_apart(short: [String; 2], exact: impl FnOnce() -> [String; 2]) -> [String; 2] {
    if short[0] == short[1] { exact() } else { short }
}

fn flags(inode: &Inode) -> String {
    let set = [(flag::IMPLICIT, "implicit"), (flag::OPAQUE, "opaque")];
    let names = set.into_iter().filter(|(bit, _)| inode.flags.get() & bit != 0).map(|(_, name)| name);
    let names = names.collect::<Vec<_>>().join(" and ");
    if names.is_empty() { "none".to_owned() } else { names }
}

/// The attributes of an inode as they are stored.
fn xattrs<'a, B: AsRef<[u8]>>(index: &'a Index<B>, inode: &Inode) -> Xattrs<'a> {
    (inode.xattrs != NO_XATTRS).then(|| index.xattrs(inode).collect())
}

/// Names and values; `None` where an inode has none.
type Xattrs<'a> = Option<Vec<(&'a [u8], &'a [u8])>>;

fn list(xattrs: &Xattrs<'_>, show: fn(&[u8]) -> String, between: &str) -> String {
    let Some(pairs) = xattrs else { return "none".to_owned() };
    let texts = pairs.iter().map(|(name, value)| format!("{}{between}{}", show(name), value.escape_ascii()));
    texts.collect::<Vec<_>>().join(", ")
}

/// The same, so that no other list looks like it.
fn exact_list(xattrs: &Xattrs<'_>) -> String {
    list(xattrs, |name| format!("\"{}\"", name.escape_ascii()), " with the value ")
}

/// Offset in the file, offset in the tar stream and length of each extent of a file.
fn extents_of(extents: &[Extent], inode: &Inode) -> Vec<(u64, u64, u64)> {
    let plain = inode.plain_range();
    let start = extents.partition_point(|extent| extent.plain_range().end <= plain.start);
    let inside = extents.iter().skip(start).take_while(|extent| extent.plain_offset.get() < plain.end);
    let relative = |offset: u64| offset.saturating_sub(plain.start);
    inside.map(|extent| (relative(extent.plain_offset.get()), extent.tar_offset.get(), extent.len.get())).collect()
}

fn first_difference<T: PartialEq>(left: &[T], right: &[T]) -> Option<usize> {
    let len = left.len().max(right.len());
    (0..len).find(|number| left.get(*number) != right.get(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream in memory.
    struct Memory {
        bytes: Vec<u8>,
        position: usize,
    }

    impl TarInput for Memory {
        fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
            let rest = &self.bytes[self.position..];
            Ok(&rest[..len.min(rest.len())])
        }

        fn consume(&mut self, len: usize) -> io::Result<()> {
            self.position += len;
            Ok(())
        }

        fn position(&self) -> u64 {
            self.position as u64
        }
    }

    /// The side of the stream of a symbolic link with these attributes.
    fn side(target: &[u8], xattrs: &[(&str, &str)]) -> TarSide {
        let mut builder = tar::Builder::new(Vec::new());
        let keys: Vec<_> = xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value)).collect();
        builder.append_pax_extensions(keys.iter().map(|(key, value)| (key.as_str(), value.as_bytes()))).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.as_old_mut().name[..4].copy_from_slice(b"link");
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
        header.set_size(0);
        header.set_mode(0o777);
        header.set_mtime(1);
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
        let bytes = builder.into_inner().unwrap();
        let mut input = Memory { bytes, position: 0 };
        let skip = |input: &mut Memory, len: u64| {
            input.position += usize::try_from(len).unwrap();
            Ok(())
        };
        // Without content there is nothing that frames would have to cover.
        TarSide::new(read_tree(&mut input, skip).unwrap(), 0, &[]).unwrap()
    }

    fn problems(index: &TarSide, tar: &TarSide) -> Vec<String> {
        let mut problems = Vec::new();
        compare(&index.tree, tar, &mut |path, problem| problems.push(format!("{path}: {problem}")));
        problems
    }

    /// Four letters may look like one byte, two attributes like one with a comma in its value.
    #[test]
    fn values_that_look_the_same_are_told_apart() {
        let byte = side(b"a\x01", &[]);
        let letters = side(br"a\x01", &[]);
        assert_eq!(problems(&byte, &byte), [] as [String; 0]);
        assert_eq!(problems(&byte, &letters), [r"/link: target is a\x01 by the index, a\\x01 by the tar stream"]);

        let one = side(b"a", &[("security.a", "1, security.b=evil")]);
        let two = side(b"a", &[("security.a", "1"), ("security.b", "evil")]);
        assert_eq!(problems(&two, &two), [] as [String; 0]);
        let expected =
            r#"/link: xattrs is "security.a" with the value 1, "security.b" with the value evil by the index, "#;
        let found = problems(&two, &one);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
    }
}
