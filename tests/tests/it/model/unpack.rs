//! The model: what containerd 1.6 unpacks of layers, one path after the other, and what overlayfs shows of
//! the result. It knows entries, not their bytes, and shares no code with the converter.

use std::collections::BTreeMap;

use super::entries::{Entry, Kind};

pub(crate) type Path = Vec<String>;

/// What stands under a path of one unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) body: Body,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    /// `None`: the time of unpacking.
    pub(crate) mtime: Option<(i64, u32)>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    is_opaque: bool,
    /// Whether the layer has no entry for this directory, so that its metadata are those of a lower one.
    is_copied: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Regular(Vec<u8>),
    Directory,
    Symlink(String),
    Fifo,
    /// Character or block device.
    Device(bool, (u32, u32)),
}

/// One unpacked layer: paths to files, which hard links share.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    paths: BTreeMap<Path, usize>,
    files: Vec<File>,
    directory_times: Vec<(String, (i64, u32))>,
}

/// Why an entry is not unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// containerd fails.
    Refused,
    /// What containerd does depends on lower layers, in a way that is documented not to be followed.
    LooksBelow,
}
use Refusal::{LooksBelow, Refused};

const WHITEOUT: Body = Body::Device(true, (0, 0));

impl File {
    fn new(body: Body, mode: u32) -> Self {
        let none = (0, 0);
        Self { body, mode, owner: none, mtime: None, xattrs: BTreeMap::new(), is_opaque: false, is_copied: false }
    }
}

impl Layer {
    pub(crate) fn new() -> Self {
        let root = File::new(Body::Directory, 0o755);
        Self { paths: [(Path::new(), 0)].into(), files: vec![root], directory_times: Vec::new() }
    }

    fn get(&self, path: &[String]) -> Option<&File> {
        self.paths.get(path).map(|number| &self.files[*number])
    }

    fn body(&self, path: &[String]) -> Option<&Body> {
        self.get(path).map(|file| &file.body)
    }

    fn put(&mut self, path: &[String], file: File) {
        self.files.push(file);
        self.paths.insert(path.to_vec(), self.files.len() - 1);
    }

    fn file(&mut self, path: &[String]) -> &mut File {
        let number = self.paths[path];
        &mut self.files[number]
    }

    /// lstat(2): what is below something else than a directory cannot be asked for.
    fn lstat(&self, path: &[String]) -> Result<Option<&Body>, Refusal> {
        let parent_body = path.split_last().and_then(|(_, parent)| self.body(parent));
        match parent_body {
            Some(body) if *body != Body::Directory => Err(Refused),
            _ => Ok(self.body(path)),
        }
    }

    /// A path with every symbolic link followed, inside the root.
    fn follow(&self, path: &[String]) -> Result<Path, Refusal> {
        let mut path = path.to_vec();
        for _ in 0..=255 {
            let prefixes = (1..=path.len()).map(|len| &path[..len]);
            let mut link = None;
            for prefix in prefixes {
                if let Some(Body::Symlink(target)) = self.lstat(prefix)? {
                    link = Some((prefix.len(), target.clone()));
                    break;
                }
            }
            let Some((len, target)) = link else { return Ok(path) };
            let start = if target.starts_with('/') { String::new() } else { path[..len - 1].join("/") };
            path = clean(&format!("{start}/{target}")).into_iter().chain(path[len..].iter().cloned()).collect();
        }
        Err(Refused)
    }

    /// Unpacks an entry over lower layers, uppermost last.
    pub(crate) fn unpack(&mut self, entry: &Entry, below: &[Self]) -> Result<(), Refusal> {
        let mut parent = clean(&entry.path);
        let Some(name) = parent.pop() else { return Ok(()) };
        let parent = self.follow(&parent)?;
        for len in 1..=parent.len() {
            self.make_parent(&parent[..len], below)?;
        }
        let path = [parent.clone(), vec![name.clone()]].concat();
        if name == ".wh..wh..opq" {
            self.file(&parent).is_opaque = true;
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(".wh.") {
            let hidden = [parent, vec![hidden.to_owned()]].concat();
            if self.body(&hidden).is_some() {
                return Err(Refused);
            }
            self.put(&hidden, File::new(WHITEOUT, 0));
            return Ok(());
        }
        let is_merging = self.body(&path) == Some(&Body::Directory) && entry.kind == Kind::Directory;
        if !is_merging {
            self.paths.retain(|other, _| !other.starts_with(&path));
        }
        let group = self.inherited_group(&parent)?;
        let body = match &entry.kind {
            Kind::Global => return Ok(()),
            Kind::HardLink(target) => return self.link(&path, target, entry),
            Kind::Directory if is_merging => return self.set_metadata(&path, entry, true),
            Kind::Directory => Body::Directory,
            Kind::Regular(content) => Body::Regular(content.clone()),
            Kind::Symlink(target) => Body::Symlink(target.clone()),
            Kind::Fifo => Body::Fifo,
            Kind::Device(is_character, numbers) => Body::Device(*is_character, *numbers),
        };
        self.put(&path, File { owner: (0, group), ..File::new(body, 0) });
        self.set_metadata(&path, entry, entry.kind == Kind::Directory)
    }

    fn link(&mut self, path: &[String], target: &str, entry: &Entry) -> Result<(), Refusal> {
        let mut parent = clean(target);
        let name = parent.pop().ok_or(Refused)?;
        let target = [self.follow(&parent)?, vec![name]].concat();
        let number = *self.paths.get(&target).ok_or(Refused)?;
        if self.files[number].body == Body::Directory {
            return Err(Refused);
        }
        self.paths.insert(path.to_vec(), number);
        self.files[number].xattrs.remove("security.capability");
        self.set_metadata(path, entry, false)
    }

    /// A file created in a directory with set-group-ID gets its group.
    fn inherited_group(&self, parent: &[String]) -> Result<u32, Refusal> {
        match self.get(parent) {
            Some(directory) if directory.mode & 0o2000 == 0 => Ok(0),
            Some(directory) if directory.is_copied => Err(LooksBelow),
            Some(directory) => Ok(directory.owner.1),
            None => Err(Refused),
        }
    }

    fn make_parent(&mut self, path: &[String], below: &[Self]) -> Result<(), Refusal> {
        match self.lstat(path)? {
            Some(Body::Directory) => return Ok(()),
            Some(_) => return Err(Refused),
            None => {}
        }
        let group = self.inherited_group(&path[..path.len() - 1])?;
        let made = File { owner: (0, group), is_copied: true, ..File::new(Body::Directory, 0o755) };
        self.put(path, made);
        for layer in below.iter().rev() {
            let followed = layer.follow(path).map_err(|_| LooksBelow)?;
            if followed != path {
                return Err(LooksBelow);
            }
            match layer.lstat(path).map_err(|_| LooksBelow)? {
                None => continue,
                Some(Body::Directory) => {
                    let copy = File {
                        is_opaque: false,
                        is_copied: true,
                        mtime: None,
                        ..layer.get(path).expect("seen").clone()
                    };
                    *self.file(path) = copy;
                }
                Some(_) => {}
            }
            break;
        }
        Ok(())
    }

    fn set_metadata(&mut self, path: &[String], entry: &Entry, is_directory: bool) -> Result<(), Refusal> {
        let (seconds, nanoseconds) = entry.mtime;
        let is_kept = seconds >= 0 && (seconds, nanoseconds) <= (9_223_372_036, 854_775_807);
        let mtime = if is_kept { entry.mtime } else { (0, 0) };
        if is_directory {
            self.directory_times.push((entry.path.clone(), mtime));
        }
        let file = self.file(path);
        let owner = |current, id: i64| match u32::try_from(id.rem_euclid(1 << 32)) {
            Ok(u32::MAX) | Err(_) => current,
            Ok(id) => id,
        };
        let new_owner = (owner(file.owner.0, entry.owner.0), owner(file.owner.1, entry.owner.1));
        let keeps_owner = [entry.owner.0, entry.owner.1].iter().any(|id| id.rem_euclid(1 << 32) == i64::from(u32::MAX));
        if file.is_copied && (keeps_owner || !file.xattrs.is_empty()) {
            return Err(LooksBelow);
        }
        file.owner = new_owner;
        let has_user_xattrs = matches!(file.body, Body::Regular(_) | Body::Directory);
        let is_set = |name: &str| name.starts_with("security.") || (name.starts_with("user.") && has_user_xattrs);
        file.xattrs.extend(
            entry.xattrs.iter().filter(|(name, _)| is_set(name)).map(|(name, value)| (name.clone(), value.clone())),
        );
        file.mode = if matches!(file.body, Body::Symlink(_)) { 0o777 } else { entry.mode };
        file.mtime = Some(mtime);
        file.is_copied = false;
        Ok(())
    }

    /// Directories get their times when all is there.
    pub(crate) fn finish(&mut self) -> Result<(), Refusal> {
        for (path, mtime) in std::mem::take(&mut self.directory_times) {
            let path = self.follow(&clean(&path))?;
            self.lstat(&path)?.ok_or(Refused)?;
            if self.file(&path).is_copied {
                return Err(LooksBelow);
            }
            self.file(&path).mtime = Some(mtime);
        }
        Ok(())
    }
}

/// The names of a path, `.` and `..` taken away.
fn clean(path: &str) -> Path {
    path.split('/').fold(Path::new(), |mut names, name| {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name.to_owned()),
        }
        names
    })
}

/// What a container sees: paths, the file there, and which file of which layer it is.
pub(crate) fn overlay(layers: &[Layer]) -> BTreeMap<Path, (File, (usize, usize))> {
    let mut shown = BTreeMap::new();
    let mut pending = vec![(Path::new(), (0..layers.len()).rev().collect::<Vec<_>>())];
    while let Some((directory, stack)) = pending.pop() {
        let uppermost = stack[0];
        shown.insert(
            directory.clone(),
            (layers[uppermost].get(&directory).expect("in the stack").clone(), (uppermost, 0)),
        );
        let is_child = |path: &&Path| path.len() == directory.len() + 1 && path.starts_with(&directory);
        let mut names: Vec<&Path> =
            stack.iter().flat_map(|layer| layers[*layer].paths.keys().filter(is_child)).collect();
        names.sort();
        names.dedup();
        for path in names {
            let mut below = Vec::new();
            for layer in &stack {
                let Some(file) = layers[*layer].get(path) else { continue };
                if file.body != Body::Directory {
                    if below.is_empty() && file.body != WHITEOUT {
                        shown.insert(path.clone(), (file.clone(), (*layer, layers[*layer].paths[path])));
                    }
                    break;
                }
                below.push(*layer);
                if file.is_opaque {
                    break;
                }
            }
            if !below.is_empty() {
                pending.push((path.clone(), below));
            }
        }
    }
    shown
}
