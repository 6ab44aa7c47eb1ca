//! Id-mapped mounts: what a snapshot of a user namespace is built on, shown with other owners.
//!
//! ```text
//! <root>/id-mapped/<snapshot>/layers   <root>/snapshots, for its ordinary layers
//! <root>/id-mapped/<snapshot>/tree     the tree of its lazy layers
//! ```
//!
//! An overlay mount gets its lower directories from there. containerd can make such mounts itself when it is given
//! options for it (`uidmap`, `gidmap`; 2.0 and later), but of one directory that all lower directories have in common,
//! without what is mounted in it, which trees are. Mounts outlive this process and are made again when they are
//! asked for and show something else than they should: after a restart of the machine, or when a tree was mounted anew.
//! Only the upper directory of a container is written to, so these mounts are read-only.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use control::{
    id_mapped::{detach_all, remove_mounts},
    root::ID_MAPPED,
};
use rustix::{
    fs::{AtFlags, CWD, Statx, StatxAttributes, StatxFlags, statx},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};
use tracing::debug;

use crate::{
    host::make_private,
    id_map::IdMap,
    names::SnapshotId,
    system_calls,
    user_namespace::{NamespaceError, user_namespace},
};

/// What is shown of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All ordinary layers.
    Layers,
    /// Its lazy ones.
    Tree,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Tree => "tree",
        }
    }

    /// What there must be for it to be shown with other owners.
    fn needs(self) -> &'static str {
        match self {
            Self::Layers => {
                "the root directory must be on a file system with id-mapped mounts, such as ext4, xfs or btrfs"
            }
            Self::Tree => "lazy images in user namespaces need Linux 6.12 or later, where kernel mode is best",
        }
    }
}

/// The mounts of all snapshots under one root.
#[derive(Debug)]
pub struct IdMappedMounts {
    directory: PathBuf,
    /// Snapshots whose mounts are made or taken away. Making one may hang, where it shows a session that does not
    /// answer, and holds up nobody else.
    changing: Mutex<HashSet<SnapshotId>>,
    changed: Condvar,
}

/// The mounts of one snapshot, kept from others as long as this lives.
struct Changing<'a>(&'a IdMappedMounts, SnapshotId);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing().remove(&self.1);
        self.0.changed.notify_all();
    }
}

/// Something cannot be shown with other owners.
#[derive(Debug, thiserror::Error)]
pub enum IdMappedError {
    /// There is no user namespace to name the mapping by.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The file system or the kernel has no id-mapped mounts.
    #[error("{path} cannot be shown with other owners: {}: {error}", .part.needs())]
    Unsupported {
        /// What it is.
        part: Part,
        /// What was to be shown.
        path: PathBuf,
        /// What the kernel says.
        error: io::Error,
    },
    /// A mount cannot be made.
    #[error("id-mapped mount {0}: {1}")]
    Mount(PathBuf, #[source] io::Error),
}

type Result<T> = std::result::Result<T, IdMappedError>;

impl IdMappedMounts {
    /// Those under a root; touches nothing.
    pub fn new(root: &Path) -> Self {
        Self { directory: root.join(ID_MAPPED), changing: Mutex::default(), changed: Condvar::new() }
    }

    /// Where a part of a snapshot is shown.
    pub fn path(&self, id: SnapshotId, part: Part) -> PathBuf {
        self.of(id).join(part.name())
    }

    /// Shows directories with the owners that `id_map` says, as parts of a snapshot; what is shown already stays. Blocks.
    ///
    /// # Errors
    ///
    /// As [`IdMappedError`] says; then some may be shown.
    pub fn show(&self, id: SnapshotId, id_map: &IdMap, parts: &[(Part, &Path)]) -> Result<()> {
        let _changing = self.change(id);
        let is_missing = |(part, source): &&(Part, &Path)| !is_shown(source, &self.path(id, *part), id_map);
        let missing: Vec<_> = parts.iter().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let namespace = user_namespace(id_map)?;
        for (part, source) in missing {
            let place = self.path(id, *part);
            let failed = |error: io::Error| IdMappedError::Mount(place.clone(), error);
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let mount = open_tree(CWD, *source, flags).map_err(|error| failed(error.into()))?;
            system_calls::map_owners(mount.as_fd(), namespace.as_fd()).map_err(|error| {
                match Errno::from_io_error(&error) {
                    Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                        IdMappedError::Unsupported { part: *part, path: (*source).to_owned(), error }
                    }
                    _ => failed(error),
                }
            })?;
            make_private(&place).map_err(failed)?;
            attach(mount.as_fd(), &place).map_err(failed)?;
            debug!(snapshot = %id, source = %source.display(), "shown with other owners");
        }
        Ok(())
    }

    /// Takes the mounts of a snapshot away; who uses them keeps them.
    ///
    /// # Errors
    ///
    /// When one stays, also because it is being made.
    pub fn remove(&self, id: SnapshotId) -> io::Result<()> {
        let Some(_changing) = self.try_change(id) else {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "its mounts are being made"));
        };
        remove_mounts(&self.of(id))
    }

    /// The directories with mounts of snapshots, which may be gone.
    ///
    /// # Errors
    ///
    /// When they cannot be listed.
    pub fn listed(&self) -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
        }
    }

    fn change(&self, id: SnapshotId) -> Changing<'_> {
        let is_changing = |changing: &mut HashSet<SnapshotId>| changing.contains(&id);
        let free = self.changed.wait_while(self.changing(), is_changing);
        free.unwrap_or_else(PoisonError::into_inner).insert(id);
        Changing(self, id)
    }

    fn try_change(&self, id: SnapshotId) -> Option<Changing<'_>> {
        self.changing().insert(id).then_some(Changing(self, id))
    }

    fn changing(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, id: SnapshotId) -> PathBuf {
        self.directory.join(id.to_string())
    }
}

/// Whether `place` is a mount that shows `source` with the owners of `id_map`.
///
/// Asks nobody but the kernel: what is mounted there may belong to a session that has ended.
fn is_shown(source: &Path, place: &Path, id_map: &IdMap) -> bool {
    let look = |path: &Path| -> Option<Statx> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW;
        statx(CWD, path, flags, StatxFlags::BASIC_STATS).ok()
    };
    let (Some(source), Some(shown)) = (look(source), look(place)) else { return false };
    let file = |found: &Statx| (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
    let (user, group) = id_map.owner(source.stx_uid, source.stx_gid);
    // Whom nobody is mapped to is shown as an owner that the machine chooses.
    shown.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
        && file(&source) == file(&shown)
        && user.is_none_or(|user| shown.stx_uid == user)
        && group.is_none_or(|group| shown.stx_gid == group)
}

/// In the place of what may be mounted there; the directory never shows nothing then (Linux 6.5).
fn attach(mount: impl AsFd, place: &Path) -> io::Result<()> {
    let attach = |flags| move_mount(&mount, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | flags);
    if attach(MoveMountFlags::MOVE_MOUNT_BENEATH).is_ok() {
        return Ok(unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?);
    }
    detach_all(place)?;
    Ok(attach(MoveMountFlags::empty())?)
}
