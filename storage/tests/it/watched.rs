//! A disk that is watched: it remembers what was done, and waits or fails on demand.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
};

use storage::{
    CacheOptions,
    disk::{Disk, Observer, Operation},
};

use crate::{power_cut::Change, support::options};

/// Kinds of operations that can be made to wait or fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Read,
    Write,
    Sync,
}

#[derive(Debug, Default)]
pub(crate) struct WatchedDisk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    changes: Vec<Change>,
    read_count: usize,
    paths: HashMap<u64, PathBuf>,
    failing: Vec<(Kind, String, i32)>,
    held: Vec<(Kind, String)>,
    waiting: usize,
}

impl WatchedDisk {
    /// Options of a cache on a watched disk.
    pub(crate) fn options(self: &Arc<Self>) -> CacheOptions {
        CacheOptions { disk: Disk::observed(self.clone()), ..options() }
    }

    /// The changes so far.
    pub(crate) fn changes(&self) -> Vec<Change> {
        self.state.lock().unwrap().changes.clone()
    }

    /// How often files that are written in place were read.
    pub(crate) fn read_count(&self) -> usize {
        self.state.lock().unwrap().read_count
    }

    /// Something was changed that the cache did not do.
    pub(crate) fn note(&self, change: Change) {
        self.state.lock().unwrap().changes.push(change);
    }

    /// Operations on files whose path has this part, or this end before a `$`, when they are opened, fail with this error of the system.
    pub(crate) fn fail(&self, kind: Kind, path_part: &str, errno: i32) {
        self.state.lock().unwrap().failing.push((kind, path_part.to_owned(), errno));
    }

    /// Nothing fails any longer.
    pub(crate) fn recover(&self) {
        self.state.lock().unwrap().failing.clear();
    }

    /// Operations on such files wait.
    pub(crate) fn hold(&self, kind: Kind, path_part: &str) {
        self.state.lock().unwrap().held.push((kind, path_part.to_owned()));
    }

    /// Operations on such files wait no longer.
    pub(crate) fn release_one(&self, path_part: &str) {
        self.state.lock().unwrap().held.retain(|(_, part)| part != path_part);
        self.changed.notify_all();
    }

    /// Nothing waits any longer.
    pub(crate) fn release(&self) {
        self.state.lock().unwrap().held.clear();
        self.changed.notify_all();
    }

    /// Blocks until somebody waits.
    pub(crate) fn wait_until_held(&self) {
        drop(self.changed.wait_while(self.state.lock().unwrap(), |state| state.waiting == 0).unwrap());
    }
}

impl Observer for WatchedDisk {
    fn before(&self, operation: Operation<'_>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.read_count += usize::from(matches!(operation, Operation::ReadAt { .. }));
        let path_of = |file: u64| state.paths.get(&file).cloned();
        let (kind, path) = match operation {
            Operation::Read { path } => (Some(Kind::Read), Some(path.to_owned())),
            Operation::ReadAt { file, .. } => (Some(Kind::Read), path_of(file)),
            Operation::WriteAt { file, .. } => (Some(Kind::Write), path_of(file)),
            Operation::Sync { file } => (Some(Kind::Sync), path_of(file)),
            _ => (None, None),
        };
        let change = Change::of(operation);
        if let Some(Change::Open { path, file, .. }) = &change {
            state.paths.insert(*file, path.clone());
        }
        let is_meant = |wanted: Kind, part: &str| {
            let fits = |path: &Path| match part.strip_suffix('$') {
                Some(end) => path.to_string_lossy().ends_with(end),
                None => path.to_string_lossy().contains(part),
            };
            kind == Some(wanted) && path.as_deref().is_some_and(fits)
        };
        if state.held.iter().any(|(kind, part)| is_meant(*kind, part)) {
            state.waiting += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.held.iter().any(|(kind, part)| is_meant(*kind, part)))
                .unwrap();
            state.waiting -= 1;
        }
        if let Some((_, _, errno)) = state.failing.iter().find(|(kind, part, _)| is_meant(*kind, part)) {
            return Err(io::Error::from_raw_os_error(*errno));
        }
        state.changes.extend(change);
        Ok(())
    }
}
