//! Kernel mode: the EROFS mounts of a root directory, made when asked for and found again by the next process.
//!
//! ```text
//! <root>/erofs/<hex tree ID>        where the tree is mounted
//! <root>/erofs/<hex tree ID>.json   the record: which mount that is, and what it reads from
//! ```
//!
//! A mount reads each layer from a *device*: from the cache file if the layer was complete when it was mounted, then
//! it needs nobody; else from the file `/layers/<id>` of the session. Mounts outlive the process, and are *alive* as
//! long as the session is the one they were made over. A tree whose layers are all complete by now is mounted anew
//! over the cache files when it is asked for, in the place of the mount before; containers that run keep theirs.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use control::{TreeId, id_mapped::detach_all, root::KERNEL_MOUNTS};
use format_spec::LayerId;
use serde::{Deserialize, Serialize};
use storage::{Layer, create_private_directory};
use tracing::{debug, info, warn};

use crate::{
    erofs_mount::{DetachedMount, DeviceAccess, MountError},
    namespace::LAYERS,
    read_ahead::{self, window},
    tree::Tree,
};

const RECORD_SUFFIX: &str = ".json";
/// Longest that a mount waits for layers that have just become complete to be durable. A usual disk needs some
/// milliseconds; behind a slow one the session serves as well.
const SEAL_WAIT_MAX: Duration = Duration::from_millis(250);

/// The directory of mounts, and the session that they read from.
#[derive(Debug)]
pub(crate) struct KernelMounts {
    directory: PathBuf,
    /// The directory of the session's layers.
    layers: PathBuf,
    /// What `stat` shows as the device of the session's files.
    session: u64,
    read_ahead_kib: u32,
}

/// What is known of a mount besides the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// What `stat` shows as the device of its files. As long as it exists, no other mount has the same.
    device: u64,
    /// The same of the session that it was made over.
    session: u64,
    /// Layers that it reads from their cache files.
    direct_layers: Vec<LayerId>,
    /// The inode numbers of these files.
    #[serde(default)]
    files: Vec<u64>,
    /// Whether these are all.
    is_direct: bool,
    /// Devices that read ahead for it.
    #[serde(default)]
    read_ahead_devices: Vec<String>,
}

/// What to do about a tree that is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// What is mounted serves.
    Keep,
    /// Nothing is mounted.
    Mount,
    /// What is mounted is used no longer.
    Replace,
}

/// Decides from what is alive, and how many of the layers are complete.
///
/// A mount is replaced once only, when no layer is left that needs the session: the page cache of one mount serves
/// no other. But one over a file in which the disk has changed something is used no longer.
fn plan(alive: Option<&Record>, are_all_complete: bool, is_damaged: bool) -> Plan {
    match alive {
        None => Plan::Mount,
        Some(_) if is_damaged => Plan::Replace,
        Some(record) if are_all_complete && !record.is_direct => Plan::Replace,
        Some(_) => Plan::Keep,
    }
}

/// The devices of a mount.
///
/// The kernel needs every device to reach to the end of its last block; both kinds are as long as the layer's plain
/// address space, which ends with a block ([`format_spec::Index::check`]).
#[derive(Debug)]
pub(crate) struct Devices {
    /// Lowest layer first.
    paths: Vec<PathBuf>,
    /// Layers of which it is the cache file.
    direct_layers: Vec<LayerId>,
    /// The inode numbers of these files.
    files: Vec<u64>,
    /// Compressed length of all layers, and of those that are no cache files.
    len: u64,
    session_len: u64,
}

/// Where no more than this comes through the session, and less than this part of a tree, the kernel reads ahead as if
/// everything were there: a new version of an application must not have the base below it read from the disk in small
/// pieces.
const LITTLE_LEN: u64 = 64 << 20;
const LITTLE_PART: u64 = 8;

impl Devices {
    /// Of each layer its cache file if it is complete, else the file that the session has in `session_layers`.
    pub(crate) fn of(layers: &[Layer], session_layers: &Path) -> Self {
        let mut devices = Self {
            paths: Vec::with_capacity(layers.len()),
            direct_layers: Vec::new(),
            files: Vec::new(),
            len: 0,
            session_len: 0,
        };
        for layer in layers {
            // The frames end where the index begins.
            let (id, len) = (layer.lazy_layer().id(), layer.lazy_layer().index.offset);
            devices.len = devices.len.saturating_add(len);
            // The number first: it never names a newer file than the path.
            match (layer.file_number(), layer.complete_file()) {
                (Ok(number), Some(path)) => {
                    devices.direct_layers.push(id);
                    devices.files.push(number);
                    devices.paths.push(path);
                }
                _ => {
                    devices.session_len = devices.session_len.saturating_add(len);
                    devices.paths.push(session_layers.join(id.hex()));
                }
            }
        }
        devices
    }

    /// Of every layer the file that the session has in `session_layers`: it sees each read.
    pub(crate) fn seen(layers: &[Layer], session_layers: &Path) -> Self {
        let paths = layers.iter().map(|layer| session_layers.join(layer.lazy_layer().id().hex())).collect();
        Self { paths, direct_layers: Vec::new(), files: Vec::new(), len: 0, session_len: 0 }
    }

    /// Whether they need no session.
    fn are_direct(&self) -> bool {
        self.direct_layers.len() == self.paths.len()
    }

    /// Whether little or nothing of what they hold may have to be fetched.
    fn are_nearly_direct(&self) -> bool {
        self.are_direct() || self.session_len < LITTLE_LEN.min(self.len / LITTLE_PART)
    }

    /// Mounts an image over them; blocks, and needs the session to answer.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn mount(&self, image: &Path, read_ahead_kib: u32) -> Result<DetachedMount, MountError> {
        let access = if self.are_direct() { DeviceAccess::Cached } else { DeviceAccess::Direct };
        let mount = DetachedMount::open(image, &self.paths, access)?;
        // Only makes reading faster.
        if let Err(error) = mount.set_read_ahead(window(read_ahead_kib, self.are_nearly_direct())) {
            debug!(%error, "read-ahead stays as it is");
        }
        Ok(mount)
    }
}

/// Whether a mount reads a file in whose place another one is, because the disk has changed something in it.
fn is_damaged(record: &Record, layers: &[Layer]) -> bool {
    record.direct_layers.iter().zip(&record.files).any(|(id, number)| {
        let layer = layers.iter().find(|layer| layer.lazy_layer().id() == *id);
        layer.and_then(|layer| layer.file_number().ok()).is_some_and(|now| now != *number)
    })
}

impl KernelMounts {
    /// The mounts below `root` over the session that is mounted on `session`, which must answer.
    ///
    /// Detaches what is mounted there over another session.
    ///
    /// # Errors
    ///
    /// When the session or the directory cannot be used.
    pub(crate) fn open(root: &Path, session: &Path, read_ahead_kib: u32) -> io::Result<Self> {
        let directory = root.join(KERNEL_MOUNTS);
        // What is mounted there may have programs that run as root for whoever reaches them.
        create_private_directory(&directory)?;
        let device = fs::metadata(session)?.dev();
        let mounts = Self { directory, layers: session.join(LAYERS), session: device, read_ahead_kib };
        for id in mounts.known()? {
            if mounts.alive(id).is_none() {
                debug!(tree = %id, "detaching the EROFS mount of a session that has ended");
                mounts.unmount(id)?;
            }
        }
        Ok(mounts)
    }

    /// The device of the session, as `stat` shows it.
    pub(crate) fn session_device(&self) -> u64 {
        self.session
    }

    /// Where the mounts are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Trees that have a mount point.
    fn known(&self) -> io::Result<Vec<TreeId>> {
        let names = fs::read_dir(&self.directory)?.map(|entry| entry.map(|entry| entry.file_name()));
        let names: Vec<_> = names.collect::<Result<_, _>>()?;
        Ok(names.iter().filter_map(|name| format!("sha256:{}", name.to_str()?).parse().ok()).collect())
    }

    /// Mounts a tree with its image, unless a mount is there that serves; returns where. Blocks, and needs the session
    /// to answer.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; then what was mounted before still is.
    pub(crate) fn mount(&self, tree: &Tree, image: &Path) -> Result<PathBuf, MountError> {
        let mount_point = self.mount_point(tree.id);
        let until = Instant::now() + SEAL_WAIT_MAX;
        let is_complete =
            |layer: &Layer| layer.complete_file_within(until.saturating_duration_since(Instant::now())).is_some();
        let are_all_complete = tree.layers.iter().all(is_complete);
        let alive = self.alive(tree.id);
        let is_damaged = alive.as_ref().is_some_and(|record| is_damaged(record, &tree.layers));
        match plan(alive.as_ref(), are_all_complete, is_damaged) {
            Plan::Keep => return Ok(mount_point),
            Plan::Mount => {
                let prepared = self.unmount(tree.id).and_then(|()| fs::create_dir(&mount_point));
                prepared.map_err(|error| MountError::MountPoint { path: mount_point.clone(), error })?;
                self.prepare(tree, image)?.attach(&mount_point)?;
            }
            Plan::Replace => {
                // Recorded before it is there: a crash in between only has it made again.
                if let Err(error) = self.prepare(tree, image).and_then(|mount| mount.replace(&mount_point)) {
                    warn!(tree = %tree.id, %error, "tree is still read through the session");
                }
            }
        }
        let direct_layers = self.direct_layers(tree.id).len();
        info!(tree = %tree.id, layers = tree.layers.len(), direct_layers, "mounted by the kernel");
        Ok(mount_point)
    }

    /// Makes a mount and records it.
    fn prepare(&self, tree: &Tree, image: &Path) -> Result<DetachedMount, MountError> {
        let devices = Devices::of(&tree.layers, &self.layers);
        let mount = devices.mount(image, self.read_ahead_kib)?;
        let path = self.record_path(tree.id);
        let record = || -> io::Result<()> {
            let (device, is_direct) = (mount.device()?, devices.are_direct());
            let Devices { direct_layers, files, .. } = devices;
            let read_ahead_devices = mount.read_ahead_devices();
            let record = Record { device, session: self.session, direct_layers, files, is_direct, read_ahead_devices };
            // Durable it need not be: without the kernel that wrote it there is no mount.
            let temporary = path.with_extension("new");
            fs::write(&temporary, serde_json::to_vec(&record)?)?;
            fs::rename(&temporary, &path)
        };
        record().map_err(|error| MountError::File { path: path.clone(), error })?;
        Ok(mount)
    }

    /// Has the kernel read ahead as far as it helps: everything of the tree is there now.
    pub(crate) fn raise_read_ahead(&self, id: TreeId) {
        let devices = self.alive(id).map(|record| record.read_ahead_devices).unwrap_or_default();
        for device in devices {
            if let Err(error) = read_ahead::set_of(&device, window(self.read_ahead_kib, true)) {
                debug!(tree = %id, %error, "read-ahead stays as it is");
            }
        }
    }

    /// The layers that a tree's mount reads from their cache files, `None` if it has no mount that is alive.
    pub(crate) fn find(&self, id: TreeId) -> Option<Vec<LayerId>> {
        self.alive(id).map(|record| record.direct_layers)
    }

    fn direct_layers(&self, id: TreeId) -> Vec<LayerId> {
        self.find(id).unwrap_or_default()
    }

    /// The record of what is mounted, if it can be read from.
    fn alive(&self, id: TreeId) -> Option<Record> {
        let record: Record = serde_json::from_slice(&fs::read(self.record_path(id)).ok()?).ok()?;
        let device = fs::metadata(self.mount_point(id)).ok()?.dev();
        (device == record.device && (record.is_direct || record.session == self.session)).then_some(record)
    }

    /// Takes a tree's mount away; who uses it keeps it. Nothing happens where there is none.
    ///
    /// # Errors
    ///
    /// When the kernel or the disk refuses.
    pub(crate) fn unmount(&self, id: TreeId) -> io::Result<()> {
        let mount_point = self.mount_point(id);
        detach_all(&mount_point)?;
        let removed = [fs::remove_file(self.record_path(id)), fs::remove_dir(&mount_point)];
        removed.into_iter().try_for_each(|removed| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// Takes all mounts away.
    ///
    /// # Errors
    ///
    /// The first one's that stays.
    pub(crate) fn unmount_all(&self) -> io::Result<()> {
        self.known()?.into_iter().try_for_each(|id| self.unmount(id))
    }

    fn mount_point(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex())
    }

    fn record_path(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex() + RECORD_SUFFIX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_replaced_once_when_nothing_needs_the_session_any_longer() {
        let record = |is_direct| Record {
            device: 1,
            session: 2,
            direct_layers: Vec::new(),
            files: Vec::new(),
            is_direct,
            read_ahead_devices: Vec::new(),
        };
        assert_eq!(plan(None, false, false), Plan::Mount);
        assert_eq!(plan(None, true, false), Plan::Mount);
        assert_eq!(plan(Some(&record(false)), false, false), Plan::Keep);
        assert_eq!(plan(Some(&record(false)), true, false), Plan::Replace);
        assert_eq!(plan(Some(&record(true)), true, false), Plan::Keep);
        for are_all_complete in [false, true] {
            assert_eq!(plan(Some(&record(true)), are_all_complete, true), Plan::Replace);
        }
    }
}
