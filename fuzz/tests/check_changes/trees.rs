//! Changes of the tree in an index, such that all rules of the format still hold.

use std::collections::{BTreeMap, VecDeque};

use format_spec::{
    Index, IndexBuilder, Inode, LayerData,
    builder::{Xattrs, blank_inode},
    records::{WHITEOUT, mode},
};

use crate::{container::Container, numbers::Numbers};

struct Entry {
    inode: Inode,
    target: Vec<u8>,
    xattrs: Xattrs,
}

type Names = BTreeMap<Vec<u8>, u32>;

/// The tree of an index.
struct Tree {
    entries: Vec<Entry>,
    /// By the number of the directory.
    directories: BTreeMap<u32, Names>,
}

/// Changes the tree; `None` where that would break a rule, so that no index could say it.
pub(crate) fn change(container: &mut Container, numbers: &mut Numbers) -> Option<String> {
    let index = container.to_index()?;
    let mut tree = Tree::of(&index);
    let words = tree.change(numbers)?;
    let data = LayerData {
        tar_len: index.tar_len(),
        space_len: index.space_len(),
        extents: index.extents(),
        frames: index.frames(),
        ..LayerData::default()
    };
    container.put_tree(&tree.builder()?.layer_bytes(&data).ok()?);
    Some(words)
}

impl Tree {
    fn of(index: &Index<Vec<u8>>) -> Self {
        let entry = |inode: &Inode| Entry {
            inode: *inode,
            target: index.symlink_target(inode).to_vec(),
            xattrs: index.xattrs(inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
        };
        let entries = index.inodes().iter().map(entry).collect();
        let directories = (0..).zip(index.inodes()).filter(|(_, inode)| inode.is_directory());
        let names = |inode: &Inode| index.children(inode).map(|(name, child)| (name.to_vec(), child)).collect();
        Self { entries, directories: directories.map(|(number, inode)| (number, names(inode))).collect() }
    }

    fn builder(&self) -> Option<IndexBuilder> {
        let mut builder = IndexBuilder::default();
        for Entry { inode, target, xattrs } in &self.entries {
            let mut inode = *inode;
            if inode.is_symlink() {
                inode.payload = builder.add_string(target).ok()?.into();
                inode.size = (target.len() as u64).into();
            }
            let mut xattrs = xattrs.clone();
            xattrs.sort();
            inode.xattrs = builder.add_xattrs(xattrs).ok()?.into();
            builder.add_inode(inode).ok()?;
        }
        let mut pending = VecDeque::from([0]);
        while let Some(number) = pending.pop_front() {
            let Some(names) = self.directories.get(&number) else { continue };
            pending.extend(names.values().copied().filter(|child| *child != WHITEOUT));
            builder.add_directory(number, names.iter().map(|(name, child)| (name, *child))).ok()?;
        }
        Some(builder)
    }

    /// A name somewhere.
    fn name(&self, numbers: &mut Numbers) -> (u32, Vec<u8>, u32) {
        let names = self
            .directories
            .iter()
            .flat_map(|(directory, names)| names.iter().map(|(name, child)| (*directory, name.clone(), *child)));
        let names: Vec<_> = names.collect();
        numbers.pick(&names).clone()
    }

    fn names(&mut self, numbers: &mut Numbers) -> &mut Names {
        let directories: Vec<u32> = self.directories.keys().copied().collect();
        self.directories.get_mut(numbers.pick(&directories)).unwrap()
    }

    fn change(&mut self, numbers: &mut Numbers) -> Option<String> {
        let (directory, name, child) = self.name(numbers);
        let place = format!("{directory}/{} ({child})", name.escape_ascii());
        let own = self.directories.get_mut(&directory)?;
        let what = match numbers.below(13) {
            0 => {
                let mut other = name.clone();
                numbers.change_bytes(&mut other)?;
                own.remove(&name);
                own.insert(other, child).is_none().then_some("renamed")?
            }
            1 => {
                own.remove(&name);
                if child != WHITEOUT {
                    self.forget(child)?;
                }
                "left out"
            }
            2 => {
                own.insert([&name, b"~".as_slice()].concat(), WHITEOUT);
                "a whiteout beside it"
            }
            3 => {
                (child != WHITEOUT && !self.directories.contains_key(&child)).then_some(())?;
                self.names(numbers).insert(b"link".to_vec(), child);
                "a hard link more"
            }
            4 => {
                own.remove(&name);
                self.names(numbers).insert(name, child).is_none().then_some("moved")?
            }
            5 => {
                let (other_directory, other_name, other) = self.name(numbers);
                self.directories.get_mut(&directory)?.insert(name, other);
                self.directories.get_mut(&other_directory)?.insert(other_name, child);
                "exchanged with another one"
            }
            6 => {
                self.entries.push(Entry {
                    inode: Inode { size: 1.into(), ..blank_inode(mode::SYMLINK | 0o777) },
                    target: b"x".to_vec(),
                    xattrs: Vec::new(),
                });
                let number = u32::try_from(self.entries.len() - 1).ok()?;
                self.names(numbers).insert(b"new".to_vec(), number);
                "a link more in a directory"
            }
            7 => {
                own.insert(name, WHITEOUT);
                if child != WHITEOUT {
                    self.forget(child)?;
                }
                "a whiteout in its place"
            }
            _ => return self.change_entry(numbers),
        };
        Some(format!("{place}: {what}"))
    }

    /// Drops an inode without a name; its content has to go too, so only those without any.
    fn forget(&mut self, number: u32) -> Option<()> {
        if self.directories.values().flat_map(Names::values).any(|child| *child == number) {
            return Some(());
        }
        let entry = self.entries.get(number as usize)?;
        let has_content = entry.inode.is_regular() && entry.inode.size != 0;
        let has_names = self.directories.get(&number).is_some_and(|names| !names.is_empty());
        (!has_content && !has_names).then_some(())?;
        self.entries.remove(number as usize);
        let less = |other: u32| if other > number && other != WHITEOUT { other - 1 } else { other };
        let directories = std::mem::take(&mut self.directories).into_iter().filter(|(other, _)| *other != number);
        let renumbered = directories.map(|(directory, names)| {
            (less(directory), names.into_iter().map(|(name, child)| (name, less(child))).collect())
        });
        self.directories = renumbered.collect();
        Some(())
    }

    /// Changes what an inode says of itself.
    fn change_entry(&mut self, numbers: &mut Numbers) -> Option<String> {
        let number = numbers.below(self.entries.len());
        let other = numbers.below(self.entries.len());
        let xattrs_of_other = self.entries[other].xattrs.clone();
        let entry = &mut self.entries[number];
        let what = match numbers.below(11) {
            0 => {
                entry.inode.mode = (entry.inode.mode.get() ^ (1 << numbers.below(12))).into();
                "permissions"
            }
            1 => {
                entry.inode.uid = u32::from(numbers.byte()).into();
                "owner"
            }
            2 => {
                entry.inode.gid = u32::from(numbers.byte()).into();
                "group"
            }
            3 => {
                entry.inode.mtime_seconds = (entry.inode.mtime_seconds.get() ^ (1 << numbers.below(64))).into();
                "time"
            }
            4 => {
                entry.inode.mtime_nanoseconds = u32::from(numbers.byte()).into();
                "nanoseconds"
            }
            5 => {
                entry.inode.flags = (entry.inode.flags.get() ^ (1 << numbers.below(2))).into();
                "flags"
            }
            6 => {
                numbers.change_bytes(&mut entry.target)?;
                "target"
            }
            7 => {
                let at = numbers.below(entry.xattrs.len());
                let (name, value) = entry.xattrs.get_mut(at)?;
                let text = if numbers.below(2) == 0 { name } else { value };
                numbers.change_bytes(text)?;
                "an attribute"
            }
            8 => {
                entry.xattrs = xattrs_of_other;
                "attributes of another one"
            }
            9 => {
                // An entry without content may say what it likes there, unless a check knows better.
                (!entry.inode.is_directory() && !entry.inode.is_symlink()).then_some(())?;
                match numbers.below(2) {
                    0 => entry.inode.payload = u32::from(numbers.byte()).into(),
                    _ if entry.inode.is_regular() => return None,
                    _ => entry.inode.size = u64::from(numbers.byte()).into(),
                }
                "a field without a meaning"
            }
            _ => {
                let kinds = [mode::FIFO, mode::SOCKET, mode::CHARACTER, mode::BLOCK];
                kinds.contains(&entry.inode.file_type()).then_some(())?;
                entry.inode.mode = (numbers.pick(&kinds) | (entry.inode.mode.get() & 0o7777)).into();
                "kind"
            }
        };
        Some(format!("inode {number}: {what}"))
    }
}
