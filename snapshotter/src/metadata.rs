//! The record of all snapshots, in one redb file.
//!
//! A snapshot has a *key* (containerd's name for it), an *id* (its directory) and a *kind*; its *chain*
//! is itself, its parent, and so on down to the base. What may follow what is decided here, as in
//! containerd's own metadata store; directories and mounts are other modules' business.
//!
//! Everything here blocks.

mod tables;

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use control::RemoteLayer;
use format_spec::LayerId;
use redb::{ReadableTable, WriteTransaction};

use self::tables::*;
use crate::{
    database::Database,
    id_map::UID_MAPPING,
    names::{Labels, SnapshotId, SnapshotKey, Time},
    records::*,
    signers::Signers,
    trust::{Truth, Vouchers},
};

/// The store. Safe from many threads; changes run one after the other.
#[derive(Debug)]
pub struct Metadata {
    database: Database,
    next_id: AtomicU64,
}

impl Metadata {
    /// Opens the store at `path`, making an empty one when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is of another version.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_in(Database::open(path)?)
    }

    fn open_in(database: Database) -> Result<Self> {
        let is_ready = database.read(|state| match state.open_table(NUMBERS) {
            Ok(numbers) => match numbers.get(VERSION)?.map(|version| version.value()) {
                Some(STORE_VERSION) => Ok(have_users(state)? == Some(wanted_users(state)?)),
                None => Ok(false),
                Some(other) => Err(MetadataError::Version(other)),
            },
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(false),
            Err(error) => Err(error.into()),
        })?;
        // Without need nothing is written: the disk may be full.
        if !is_ready {
            database.change(make_tables)?;
        }
        let next_id = database.read(|state| Ok(state.open_table(NUMBERS)?.get(NEXT_ID)?.map_or(1, |id| id.value())))?;
        Ok(Self { database, next_id: next_id.into() })
    }

    /// One snapshot.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn snapshot(&self, key: &SnapshotKey) -> Result<Snapshot> {
        self.database.read(|state| existing(&state.open_table(SNAPSHOTS)?, key))
    }

    /// One snapshot and everything below it.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn chain(&self, key: &SnapshotKey) -> Result<Chain> {
        self.database.read(|state| {
            let snapshots = state.open_table(SNAPSHOTS)?;
            let top = existing(&snapshots, key)?;
            let parents = parents(&snapshots, &top)?;
            Ok(Chain { top, parents })
        })
    }

    /// Every snapshot whose record can be read, sorted by key.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn list(&self) -> Result<Listed> {
        self.database.read(|state| all(&state.open_table(SNAPSHOTS)?))
    }

    /// The parents of a new snapshot, nearest first, when it can be added.
    ///
    /// # Errors
    ///
    /// As [`Self::create`].
    pub fn parents_of(&self, new: &NewSnapshot) -> Result<Vec<Snapshot>> {
        self.database.read(|state| parents_of(&state.open_table(SNAPSHOTS)?, new))
    }

    /// An id for [`Self::create`], which nobody else gets.
    pub fn take_id(&self) -> SnapshotId {
        SnapshotId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Adds a view or an active snapshot, whose directory must lie on disk. That of an extraction need not, and a crash
    /// may undo it ([`NewSnapshot::is_extraction`]).
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`] for the parent, [`MetadataError::ParentNotCommitted`],
    /// [`MetadataError::AlreadyExists`].
    pub fn create(&self, new: &NewSnapshot, id: SnapshotId, now: Time) -> Result<Chain> {
        self.database.require_room()?;
        let create = |change: &WriteTransaction| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let parents = parents_of(&snapshots, new)?;
            let top = Snapshot {
                id,
                key: new.key.clone(),
                kind: new.kind,
                parent: new.parent.clone(),
                labels: without_empty(new.labels.clone()),
                created: now,
                updated: now,
                usage: Usage::default(),
                lazy: None,
            };
            never_again(&mut change.open_table(NUMBERS)?, id)?;
            put(&mut snapshots, &top)?;
            link(&mut change.open_table(CHILDREN)?, &top)?;
            Ok(Chain { top, parents })
        };
        if new.is_extraction() { self.database.change_for_now(create) } else { self.database.change(create) }
    }

    /// Turns an active snapshot into a committed one of another name; its id stays.
    ///
    /// # Errors
    ///
    /// [`MetadataError::AlreadyExists`] for the name, [`MetadataError::NotFound`] for the key or the
    /// parent, [`MetadataError::NotActive`], [`MetadataError::ParentChanged`],
    /// [`MetadataError::CommitOntoUncommitted`].
    pub fn commit(&self, new: &NewCommit, now: Time) -> Result<()> {
        self.database.change(|change| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut children = change.open_table(CHILDREN)?;
            if is_there(&snapshots, &new.name)? {
                return Err(MetadataError::AlreadyExists(new.name.clone()));
            }
            let active = existing(&snapshots, &new.key)?;
            if active.kind != Kind::Active {
                return Err(MetadataError::NotActive(new.key.clone()));
            }
            let parent = match (&active.parent, &new.parent) {
                (Some(has), Some(wants)) if has != wants => {
                    return Err(MetadataError::ParentChanged(new.key.clone(), wants.clone()));
                }
                (has, wants) => has.clone().or(wants.clone()),
            };
            if let Some(parent) = &parent
                && existing(&snapshots, parent)?.kind != Kind::Committed
            {
                return Err(MetadataError::CommitOntoUncommitted(new.key.clone(), parent.clone()));
            }
            unlink(&mut children, &active)?;
            snapshots.remove(active.key.as_str())?;
            if active.labels.contains_key(UID_MAPPING) {
                change.open_table(UNUSED)?.insert(Unused::Mounts(active.id).to_key().as_str(), ())?;
            }
            let committed = Snapshot {
                key: new.name.clone(),
                kind: Kind::Committed,
                parent,
                labels: without_empty(new.labels.clone()),
                created: now,
                updated: now,
                usage: new.usage,
                ..active
            };
            put(&mut snapshots, &committed)?;
            link(&mut children, &committed)
        })
    }

    /// Adds a committed snapshot for a lazy layer, which has no directory.
    ///
    /// `parent` must be lazy too, since one tree holds a whole chain of lazy layers. A chain that is recorded with
    /// another layer stays so if that is verified; one that is refused makes way when nothing is built on it. `signers`
    /// have signed this very layer for this very chain.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`] for the parent.
    pub fn insert_lazy(
        &self,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
        layer: &RemoteLayer,
        signers: &Signers,
        now: Time,
    ) -> Result<LazyInsert> {
        self.database.require_room()?;
        let id = self.take_id();
        self.database.change(|change| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let below = match parent.map(|parent| existing(&snapshots, parent)).transpose()? {
                None => None,
                Some(Snapshot { lazy: Some(lazy), .. }) => Some(lazy.tree),
                Some(_) => return Ok(LazyInsert::Ordinary),
            };
            if let Some(mut existing) = find(&snapshots, key)? {
                let is_below_same = existing.parent.as_ref() == parent;
                let Some(lazy) = existing.lazy.as_mut().filter(|_| is_below_same) else {
                    return Ok(LazyInsert::Ordinary);
                };
                if lazy.layer.layer.id() == layer.layer.id() {
                    let has_new_signer = !signers.is_subset(&lazy.signers);
                    lazy.signers.extend(signers.iter().cloned());
                    if lazy.add_voucher(&layer.image) | lazy.add_place(layer) || has_new_signer {
                        put(&mut snapshots, &existing)?;
                    }
                    return Ok(LazyInsert::There);
                }
                let makes_way =
                    matches!(lazy.truth, Truth::Refused { .. }) && !has_children(&change.open_table(CHILDREN)?, key)?;
                match lazy.truth {
                    Truth::Verified => return Ok(LazyInsert::There),
                    _ if makes_way => forget(change, &mut snapshots, &existing)?,
                    _ => return Ok(LazyInsert::Claimed(Box::new(existing))),
                }
            }
            let tree = tree_above(below, layer.layer.id());
            let snapshot = Snapshot {
                key: key.clone(),
                id,
                kind: Kind::Committed,
                parent: parent.cloned(),
                labels: without_empty(labels.clone()),
                created: now,
                updated: now,
                usage: Usage::default(),
                lazy: Some(LazySnapshot {
                    layer: layer.clone(),
                    tree,
                    truth: Truth::default(),
                    truth_since: None,
                    further_vouchers: Vouchers::new(),
                    signers: signers.clone(),
                    further_places: Vec::new(),
                }),
            };
            never_again(&mut change.open_table(NUMBERS)?, id)?;
            put(&mut snapshots, &snapshot)?;
            let mut users = change.open_table(USERS)?;
            for used in uses(&snapshot) {
                users.insert((used.to_key().as_str(), id.0), ())?;
            }
            link(&mut change.open_table(CHILDREN)?, &snapshot)?;
            Ok(LazyInsert::There)
        })
    }

    /// Notes whether a lazy snapshot is what its chain ID names; not of one that is gone or has another layer by now.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn set_truth(&self, key: &SnapshotKey, layer: LayerId, truth: &Truth, now: Time) -> Result<()> {
        self.database.change(|change| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let Some(mut snapshot) = find(&snapshots, key)? else { return Ok(()) };
            match &mut snapshot.lazy {
                Some(lazy) if lazy.layer.layer.id() == layer => {
                    (lazy.truth, lazy.truth_since) = (truth.clone(), Some(now));
                }
                _ => return Ok(()),
            }
            put(&mut snapshots, &snapshot)
        })
    }

    /// Forgets a snapshot; what it had is [`Self::unused`] from now on. A record that is damaged is forgotten too: its
    /// directory is found by who looks for directories without a record.
    ///
    /// A crash may undo it, until [`Self::deletable`] has returned or a later change is durable. The snapshot is there
    /// again then, with all it had; containerd, to which it is gone, removes it when it next collects garbage, since it
    /// compares what there is with what it knows.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`], [`MetadataError::HasChildren`].
    pub fn remove(&self, key: &SnapshotKey) -> Result<()> {
        self.database.change_for_now(|change| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut children = change.open_table(CHILDREN)?;
            let removed = match existing(&snapshots, key) {
                Err(MetadataError::Damaged(..)) => None,
                found => Some(found?),
            };
            if has_children(&children, key)? {
                return Err(MetadataError::HasChildren(key.clone()));
            }
            let Some(removed) = removed else {
                snapshots.remove(key.as_str())?;
                return Ok(children.retain(|(_, child), ()| child != key.as_str())?);
            };
            drop(children);
            forget(change, &mut snapshots, &removed)
        })
    }

    /// Changes the labels of a snapshot and returns it as it is now. A crash may undo it, as [`Self::remove`]:
    /// containerd keeps the labels too, and believes its own.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn update_labels(&self, key: &SnapshotKey, labels: &LabelChange, now: Time) -> Result<Snapshot> {
        self.database.change_for_now(|change| {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut updated = existing(&snapshots, key)?;
            match labels {
                LabelChange::All(labels) => updated.labels = labels.clone(),
                LabelChange::Some(labels) => updated.labels.extend(labels.clone()),
            }
            updated.labels = without_empty(updated.labels);
            updated.updated = now;
            put(&mut snapshots, &updated)?;
            Ok(updated)
        })
    }

    /// Everything that is to be deleted, and stays so whatever crashes: before that is sure, nothing is deleted.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn deletable(&self) -> Result<Vec<Unused>> {
        let unused = self.unused()?;
        self.make_durable()?;
        Ok(unused)
    }

    /// Returns when no crash undoes any longer what has changed.
    ///
    /// # Errors
    ///
    /// When the database fails; then the last changes are undone.
    pub fn make_durable(&self) -> Result<()> {
        self.database.make_durable()
    }

    /// Everything that is to be deleted, if no crash comes.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn unused(&self) -> Result<Vec<Unused>> {
        self.database.read(|state| {
            let mut found = Vec::new();
            for entry in state.open_table(UNUSED)?.iter()? {
                found.extend(Unused::from_key(entry?.0.value()));
            }
            Ok(found)
        })
    }

    /// Has something deleted later.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn add_unused(&self, unused: &[Unused]) -> Result<()> {
        self.database.change(|change| {
            let mut table = change.open_table(UNUSED)?;
            unused.iter().try_for_each(|unused| Ok(table.insert(unused.to_key().as_str(), ()).map(drop)?))
        })
    }

    /// It has been deleted, or is used again. Forgotten in a crash, it is deleted once more.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn forget_unused(&self, unused: Unused) -> Result<()> {
        self.database.change_for_now(|change| {
            change.open_table(UNUSED)?.remove(unused.to_key().as_str())?;
            Ok(())
        })
    }

    /// The first snapshot that uses a tree or a layer; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn first_user(&self, used: Unused) -> Result<Option<SnapshotId>> {
        let key = used.to_key();
        self.database.read(|state| {
            let users = state.open_table(USERS)?;
            let first = users.range((key.as_str(), 0)..=(key.as_str(), u64::MAX))?.next().transpose()?;
            Ok(first.map(|(user, _)| SnapshotId(user.value().1)))
        })
    }
}

#[cfg(test)]
#[path = "crash_tests.rs"]
mod crash_tests;
#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
