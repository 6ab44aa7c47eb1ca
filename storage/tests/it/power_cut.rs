//! A machine that loses its power: changes of a disk as they are recorded, and what may be left of them.
//!
//! Any subset of what was not synced may be lost. `fusefs` has this file too, for its trees.

use std::{
    collections::{BTreeMap, HashMap, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use storage::disk::Operation;

/// Random choices of what is lost, beside all the simple ones.
const RANDOM_CHOICES: u64 = 4;

/// A change of the disk.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    MakeDirectory(PathBuf),
    Open { path: PathBuf, file: u64, is_new: bool },
    Write { file: u64, offset: u64, bytes: Vec<u8> },
    SetLen { file: u64, len: u64 },
    Sync(u64),
    Rename { from: PathBuf, to: PathBuf },
    Remove(PathBuf),
    SyncDirectory(PathBuf),
}

impl Change {
    /// The change that an operation makes.
    pub(crate) fn of(operation: Operation<'_>) -> Option<Self> {
        let change = match operation {
            Operation::Read { .. } | Operation::ReadAt { .. } => return None,
            Operation::MakeDirectory { path } => Self::MakeDirectory(path.to_owned()),
            Operation::Open { path, file, is_new } => Self::Open { path: path.to_owned(), file, is_new },
            Operation::WriteAt { file, offset, bytes } => Self::Write { file, offset, bytes: bytes.to_vec() },
            Operation::SetLen { file, len } => Self::SetLen { file, len },
            Operation::Sync { file } => Self::Sync(file),
            Operation::Rename { from, to } => Self::Rename { from: from.to_owned(), to: to.to_owned() },
            Operation::Remove { path } => Self::Remove(path.to_owned()),
            Operation::SyncDirectory { path } => Self::SyncDirectory(path.to_owned()),
        };
        Some(change)
    }

    pub(crate) fn is_sync(&self) -> bool {
        matches!(self, Self::Sync(_) | Self::SyncDirectory(_))
    }

    /// In words, without its bytes.
    pub(crate) fn shorten(&self) -> String {
        match self {
            Self::Write { file, offset, bytes } => format!("Write {{ {file}, {offset}, {} bytes }}", bytes.len()),
            change => format!("{change:?}"),
        }
    }
}

/// The content of a disk: every file with its content, and every directory without one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct State(BTreeMap<PathBuf, Option<Vec<u8>>>);

impl State {
    /// Makes it so in an empty directory.
    pub(crate) fn restore(&self, root: &Path) {
        for (path, content) in self.0.iter().filter(|(path, _)| !path.as_os_str().is_empty()) {
            match content {
                None => fs::create_dir(root.join(path)).unwrap(),
                Some(content) => fs::write(root.join(path), content).unwrap(),
            }
        }
    }
}

/// A file system in memory that knows what is durable.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    nodes: Vec<Node>,
    open: HashMap<u64, usize>,
    /// Changes of names that are not durable, oldest first.
    namings: Vec<Naming>,
}

#[derive(Debug, Clone)]
enum Node {
    Directory { now: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
    File { durable: Vec<u8>, pending: Vec<Write> },
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(usize, Vec<u8>),
    Len(usize),
}

/// Directory, name, and what has the name afterwards; all at once or not at all.
type Naming = Vec<(usize, String, Option<usize>)>;

impl Write {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Len(len) => content.resize(*len, 0),
            Self::Bytes(offset, bytes) => {
                content.resize(content.len().max(offset + bytes.len()), 0);
                content[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

impl Model {
    pub(crate) fn new() -> Self {
        Self { nodes: vec![Node::Directory { now: BTreeMap::new(), durable: BTreeMap::new() }], ..Self::default() }
    }

    fn entries(&mut self, directory: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[directory] {
            Node::Directory { now, .. } => now,
            Node::File { .. } => panic!("a file is no directory"),
        }
    }

    fn find(&mut self, path: &Path) -> Option<usize> {
        path.iter().try_fold(0, |node, name| self.entries(node).get(name.to_str().unwrap()).copied())
    }

    fn place(&mut self, path: &Path) -> Option<(usize, String)> {
        let name = path.file_name()?.to_str().unwrap().to_owned();
        Some((self.find(path.parent().unwrap())?, name))
    }

    fn name(&mut self, naming: Naming) {
        for (directory, name, node) in &naming {
            match node {
                Some(node) => self.entries(*directory).insert(name.clone(), *node),
                None => self.entries(*directory).remove(name),
            };
        }
        self.namings.push(naming);
    }

    fn write(&mut self, file: u64, write: Write) {
        let Some(node) = self.open.get(&file) else { return };
        match &mut self.nodes[*node] {
            Node::File { pending, .. } => pending.push(write),
            Node::Directory { .. } => panic!("a directory is not written"),
        }
    }

    pub(crate) fn apply(&mut self, change: &Change, root: &Path) {
        let inside = |path: &Path| path.strip_prefix(root).unwrap().to_owned();
        match change {
            Change::MakeDirectory(path) => {
                let path = inside(path);
                for ancestor in path.ancestors().collect::<Vec<_>>().into_iter().rev().skip(1) {
                    if self.find(ancestor).is_none() {
                        let (directory, name) = self.place(ancestor).unwrap();
                        self.nodes.push(Node::Directory { now: BTreeMap::new(), durable: BTreeMap::new() });
                        self.name(vec![(directory, name, Some(self.nodes.len() - 1))]);
                    }
                }
            }
            Change::Open { path, file, is_new } => {
                let path = inside(path);
                if *is_new {
                    let (directory, name) = self.place(&path).unwrap();
                    self.nodes.push(Node::File { durable: Vec::new(), pending: Vec::new() });
                    self.name(vec![(directory, name, Some(self.nodes.len() - 1))]);
                }
                let node = self.find(&path);
                node.and_then(|node| self.open.insert(*file, node));
            }
            Change::Write { file, offset, bytes } => self.write(*file, Write::Bytes(*offset as usize, bytes.clone())),
            Change::SetLen { file, len } => self.write(*file, Write::Len(*len as usize)),
            Change::Sync(file) => {
                if let Some(node) = self.open.get(file)
                    && let Node::File { durable, pending } = &mut self.nodes[*node]
                {
                    pending.drain(..).for_each(|write| write.apply(durable));
                }
            }
            Change::Rename { from, to } => {
                let (from, to) = (inside(from), inside(to));
                let Some(node) = self.find(&from) else { return };
                let ((old, old_name), (new, new_name)) = (self.place(&from).unwrap(), self.place(&to).unwrap());
                self.name(vec![(old, old_name, None), (new, new_name, Some(node))]);
            }
            Change::Remove(path) => {
                let path = inside(path);
                if self.find(&path).is_some() {
                    let (directory, name) = self.place(&path).unwrap();
                    self.name(vec![(directory, name, None)]);
                }
            }
            Change::SyncDirectory(path) => {
                let Some(synced) = self.find(&inside(path)) else { return };
                let namings = std::mem::take(&mut self.namings);
                for naming in namings {
                    if naming.iter().any(|(directory, ..)| *directory == synced) {
                        self.make_durable(&naming);
                    } else {
                        self.namings.push(naming);
                    }
                }
            }
        }
    }

    fn make_durable(&mut self, naming: &Naming) {
        for (directory, name, node) in naming {
            if let Node::Directory { durable, .. } = &mut self.nodes[*directory] {
                match node {
                    Some(node) => durable.insert(name.clone(), *node),
                    None => durable.remove(name),
                };
            }
        }
    }

    /// Number of changes that a crash may lose.
    pub(crate) fn pending_count(&self) -> usize {
        let pending = |node: &Node| if let Node::File { pending, .. } = node { pending.len() } else { 0 };
        self.namings.len() + self.nodes.iter().map(pending).sum::<usize>()
    }

    /// The content of the disk after a crash: every file with its content, and every directory without one.
    pub(crate) fn crash(&self, mut is_kept: impl FnMut(usize) -> bool) -> State {
        let mut model = self.clone();
        let mut numbers = 0..;
        for naming in self.namings.iter().filter(|_| is_kept(numbers.next().unwrap())) {
            model.make_durable(naming);
        }
        for node in &mut model.nodes {
            if let Node::File { durable, pending } = node {
                pending.drain(..).filter(|_| is_kept(numbers.next().unwrap())).for_each(|write| write.apply(durable));
            }
        }
        let mut found = State::default();
        model.collect(0, Path::new(""), &mut found);
        found
    }

    fn collect(&self, node: usize, path: &Path, found: &mut State) {
        match &self.nodes[node] {
            Node::File { durable, .. } => {
                found.0.insert(path.to_owned(), Some(durable.clone()));
            }
            Node::Directory { durable, .. } => {
                found.0.insert(path.to_owned(), None);
                durable.iter().for_each(|(name, node)| self.collect(*node, &path.join(name), found));
            }
        }
    }
}

/// Which of `count` pending changes survive a crash: none, all, all but one, one, and some at random.
pub(crate) fn choices(count: usize) -> impl Iterator<Item = Vec<bool>> {
    let simple = [vec![false; count], vec![true; count]].into_iter();
    let single = (0..count).flat_map(move |one| {
        [false, true].map(|others| (0..count).map(|number| (number == one) != others).collect::<Vec<_>>())
    });
    let random = (0..RANDOM_CHOICES).map(move |seed| {
        let byte = |number: usize| {
            let mut hasher = DefaultHasher::new();
            (seed, number, count).hash(&mut hasher);
            hasher.finish()
        };
        (0..count).map(|number| byte(number) & 1 == 1).collect()
    });
    simple.chain(single).chain(random)
}
