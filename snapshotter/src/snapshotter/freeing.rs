//! Deleting what no snapshot has any longer, behind everybody's back.
//!
//! Removing a snapshot changes records only, and leaves a record of what is to be deleted. Two tasks delete it: one
//! what lies in our own directories, one what `lazuli-fused` holds, since that may be slow. They first make durable what
//! calls have changed without waiting for the disk, so that nothing is deleted that is there again after a crash. A
//! crash later loses nothing: the records are there at the next start. Then, and when containerd asks for a cleanup, the
//! tasks also look for what no record knows.

use std::{
    collections::HashSet,
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};
use tracing::{debug, error, info, warn};

use crate::{
    records::{Listed, Unused},
    snapshotter::{Inner, Result, Snapshotter, remove_all},
};

/// After something could not be deleted: how long until it is tried again, unless there is more to delete before.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// Tells the two tasks that there is something to do.
#[derive(Debug)]
pub(crate) struct Work {
    directories: Notify,
    lazy: Notify,
    /// Whether each has to look for what no record knows; at the start both have.
    search_directories: AtomicBool,
    search_lazy: AtomicBool,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            directories: Notify::new(),
            lazy: Notify::new(),
            search_directories: AtomicBool::new(true),
            search_lazy: AtomicBool::new(false),
        }
    }
}

impl Work {
    /// Records have changed: there is something to delete, or only to make durable.
    pub(crate) fn begin(&self) {
        self.directories.notify_one();
        self.lazy.notify_one();
    }

    /// Look for more than the records say.
    pub(crate) fn search(&self) {
        self.search_directories.store(true, Ordering::Relaxed);
        self.search_lazy();
        self.directories.notify_one();
    }

    /// Look for what `lazuli-fused` holds in vain.
    pub(crate) fn search_lazy(&self) {
        self.search_lazy.store(true, Ordering::Relaxed);
        self.lazy.notify_one();
    }
}

impl Snapshotter {
    /// Deletes directories that belong to no snapshot, whenever there are some. Never returns.
    pub async fn free_directories(&self) {
        let work = &self.inner.work;
        loop {
            let search = work.search_directories.swap(false, Ordering::Relaxed);
            let done = self.blocking(move |inner| inner.free_directories(search)).await;
            pause(&work.directories, done.unwrap_or_else(|error| failed(&error))).await;
        }
    }

    /// Has `lazuli-fused` delete what belongs to no snapshot, whenever there is something. Never returns.
    pub async fn free_lazy(&self) {
        let work = &self.inner.work;
        loop {
            let search = work.search_lazy.swap(false, Ordering::Relaxed);
            let done = self.free_lazy_once(search).await;
            if search && !matches!(done, Ok(true)) {
                work.search_lazy.store(true, Ordering::Relaxed);
            }
            pause(&work.lazy, done.unwrap_or_else(|error| failed(&error))).await;
        }
    }

    /// False when something stays.
    async fn free_lazy_once(&self, search: bool) -> Result<bool> {
        let recorded = self.blocking(|inner| Ok(inner.metadata.deletable()?)).await?;
        let mut is_all = self.free_in_daemon(recorded.into_iter().filter(is_lazy).collect()).await?;
        if search {
            let Listed { snapshots, damaged } = self.blocking(|inner| inner.list()).await?;
            if !damaged.is_empty() {
                warn!("what lazuli-fused holds for no snapshot stays: a record is damaged and may need it");
            } else if snapshots.iter().any(|snapshot| snapshot.lazy.is_some()) {
                match self.inner.fused.status().await {
                    Ok((layers, trees)) => {
                        let layers = layers.into_iter().map(|held| Unused::Layer(held.layer.layer.id()));
                        is_all &=
                            self.free_in_daemon(trees.into_iter().map(Unused::Tree).chain(layers).collect()).await?;
                    }
                    Err(error) => {
                        warn!(%error, "what is unused cannot be found out");
                        is_all = false;
                    }
                }
            }
        }
        Ok(is_all)
    }

    /// False when something stays. Trees come first: layers are used by them.
    async fn free_in_daemon(&self, mut unused: Vec<Unused>) -> Result<bool> {
        unused.sort_by_key(|unused| matches!(unused, Unused::Layer(_)));
        let mut is_all = true;
        for unused in unused {
            let _releasing = match unused {
                Unused::Tree(tree) => Some(self.inner.trees.releasing(tree)),
                _ => None,
            };
            if self.blocking(move |inner| Ok(inner.metadata.first_user(unused)?)).await?.is_none() {
                let freed = match unused {
                    Unused::Tree(tree) => self.inner.fused.release_tree(tree).await,
                    Unused::Layer(layer) => self.inner.fused.remove_layer(layer).await,
                    Unused::Directory(_) | Unused::Mounts(_) => continue,
                };
                if let Err(error) = freed {
                    warn!(?unused, %error, "not deleted yet");
                    is_all = false;
                    continue;
                }
                debug!(?unused, "deleted");
            }
            self.blocking(move |inner| Ok(inner.metadata.forget_unused(unused)?)).await?;
        }
        Ok(is_all)
    }
}

impl Inner {
    /// False when something stays.
    fn free_directories(&self, search: bool) -> Result<bool> {
        let mut is_all = true;
        for unused in self.metadata.deletable()?.into_iter().filter(|unused| !is_lazy(unused)) {
            let freed = match unused {
                Unused::Directory(id) => self.remove_snapshot(id),
                Unused::Mounts(id) => self.id_mapped.remove(id),
                Unused::Tree(_) | Unused::Layer(_) => continue,
            };
            match freed {
                Ok(()) => self.metadata.forget_unused(unused)?,
                Err(error) => {
                    warn!(?unused, %error, "not deleted yet");
                    is_all = false;
                }
            }
        }
        if search {
            self.remove_orphans()?;
        }
        Ok(is_all)
    }

    /// Directories and mounts without a record: a crash left them, or their record was damaged.
    fn remove_orphans(&self) -> Result<()> {
        // In this order: what is made after the look is not seen by it, and what was made before has its record or is
        // being made.
        let found = self.directories.listed().map_err(|error| self.failed(error))?;
        let shown = self.id_mapped.listed().map_err(|error| self.failed(error))?;
        let being_made: Vec<_> = self.being_made().iter().map(ToString::to_string).collect();
        let Listed { snapshots, damaged } = self.list()?;
        self.metadata.make_durable()?;
        if !damaged.is_empty() {
            warn!("directories without a record stay: a record is damaged and may be theirs");
            return Ok(());
        }
        let known: HashSet<_> = snapshots.iter().map(|snapshot| snapshot.id.to_string()).chain(being_made).collect();
        let is_orphan = |path: &std::path::PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_none_or(|name| !known.contains(name))
        };
        for path in shown.into_iter().filter(is_orphan) {
            tell(&path, control::id_mapped::remove_mounts(&path));
        }
        for path in found.into_iter().filter(is_orphan) {
            tell(&path, remove_all(&path));
        }
        Ok(())
    }
}

fn tell(path: &std::path::Path, removed: io::Result<()>) {
    match removed {
        Ok(()) => info!(path = %path.display(), "orphan removed"),
        Err(error) => warn!(path = %path.display(), %error, "orphan stays"),
    }
}

fn is_lazy(unused: &Unused) -> bool {
    matches!(unused, Unused::Tree(_) | Unused::Layer(_))
}

fn failed(error: &crate::snapshotter::Error) -> bool {
    error!(%error, "what is unused cannot be deleted now");
    false
}

/// Until there is more to do, or, where something stayed, for a while.
async fn pause(more: &Notify, is_all: bool) {
    if is_all {
        more.notified().await;
    } else {
        // Either is a reason to try again.
        let _more = timeout(RETRY_AFTER, more.notified()).await;
    }
}
