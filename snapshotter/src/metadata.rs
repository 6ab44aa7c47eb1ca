//! The record of all snapshots, in one redb file.
//!
//! A snapshot has a *key* (containerd's name for it), an *id* (its directory) and a *kind*; its *chain*
//! is itself, its parent, and so on down to the base. What may follow what is decided here, as in
//! containerd's own metadata store; directories and mounts are other modules' business.
//!
//! Everything here blocks.

use std::{collections::BTreeMap, fmt, io, path::Path};

use format_spec::LayerId;
use fusefs::control::{RemoteLayer, TreeId};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// (parent, child): finds the children of a snapshot without reading all of them.
const CHILDREN: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("children");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const VERSION: &str = "version";
const NEXT_ID: &str = "next id";

/// What stands under [`VERSION`].
const STORE_VERSION: u64 = 1;
/// Longest chain that is followed: overlayfs stacks 500 lower directories (Linux fs/overlayfs/params.h).
const CHAIN_LEN_MAX: usize = 512;

/// containerd's name of a snapshot; never empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotKey(String);

impl SnapshotKey {
    /// `None` when `key` is empty: containerd's way to say that there is none.
    pub fn new(key: impl Into<String>) -> Option<Self> {
        Some(key.into()).filter(|key| !key.is_empty()).map(Self)
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a snapshot's directory; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What a snapshot can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Read only, to be mounted.
    View,
    /// Writable, to be mounted.
    Active,
    /// Finished: a parent for others.
    Committed,
}

impl Kind {
    /// The word that filters use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A point in time, as protobuf's `Timestamp` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970, UTC.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanos: i32,
}

/// What a snapshot takes on disk, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Files of any type.
    pub inodes: u64,
}

/// Labels, sorted by key.
pub type Labels = BTreeMap<String, String>;

/// All that is known about one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub key: SnapshotKey,
    /// Its directory.
    pub id: SnapshotId,
    /// Its kind.
    pub kind: Kind,
    /// Key of a committed snapshot, `None` for a base.
    pub parent: Option<SnapshotKey>,
    /// Labels, none of them with an empty value.
    pub labels: Labels,
    /// When it was prepared, or committed.
    pub created: Time,
    /// When its labels last changed.
    pub updated: Time,
    /// Computed by commit; zero for others.
    pub usage: Usage,
    /// For a lazy layer: what to fetch. It has no directory.
    pub lazy: Option<LazySnapshot>,
}

/// The lazy part of a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazySnapshot {
    /// The layer.
    pub layer: RemoteLayer,
    /// The merged tree of this layer on top of its parents, which are all lazy.
    pub tree: TreeId,
}

/// A snapshot with everything below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The snapshot.
    pub top: Snapshot,
    /// Its parent, that one's parent, down to the base; empty for a base.
    pub parents: Vec<Snapshot>,
}

/// A snapshot to be mounted, as it is asked for.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its name.
    pub key: SnapshotKey,
    /// [`Kind::View`] or [`Kind::Active`].
    pub kind: Kind,
    /// A committed snapshot.
    pub parent: Option<SnapshotKey>,
    /// Labels; those with an empty value are left out.
    pub labels: Labels,
}

/// A commit, as it is asked for.
#[derive(Debug, Clone)]
pub struct NewCommit {
    /// The name of the committed snapshot.
    pub name: SnapshotKey,
    /// The active snapshot, gone afterwards.
    pub key: SnapshotKey,
    /// The parent, for a snapshot that was prepared without one.
    pub parent: Option<SnapshotKey>,
    /// Labels of the committed snapshot; those of the active one are not inherited.
    pub labels: Labels,
    /// What it takes on disk.
    pub usage: Usage,
}

/// What a change to the labels is.
#[derive(Debug, Clone)]
pub enum LabelChange {
    /// These and no others.
    All(Labels),
    /// Only these; one with an empty value is removed.
    Some(Labels),
}

/// The store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// There is no such snapshot.
    #[error("snapshot {0} does not exist")]
    NotFound(SnapshotKey),
    /// The key is taken.
    #[error("snapshot {0} already exists")]
    AlreadyExists(SnapshotKey),
    /// A new snapshot's parent is not committed.
    #[error("parent {0} is not a committed snapshot")]
    ParentNotCommitted(SnapshotKey),
    /// A commit names a parent that is not committed.
    #[error("snapshot {0} cannot be committed onto {1}, which is not a committed snapshot")]
    CommitOntoUncommitted(SnapshotKey, SnapshotKey),
    /// A commit names another parent than the snapshot has.
    #[error("snapshot {0} has a parent already, it cannot be committed onto {1}")]
    ParentChanged(SnapshotKey, SnapshotKey),
    /// Only active snapshots can be committed.
    #[error("snapshot {0} is not active")]
    NotActive(SnapshotKey),
    /// A snapshot with children stays.
    #[error("cannot remove snapshot {0}, it has children")]
    HasChildren(SnapshotKey),
    /// The directory of a new snapshot could not be made.
    #[error("directory of snapshot {0}: {1}")]
    Directory(SnapshotKey, #[source] io::Error),
    /// The file holds what this program never wrote.
    #[error("record of {0} is damaged: {1}")]
    Damaged(String, String),
    /// The file was written by another version.
    #[error("store version {0}, this program reads version {STORE_VERSION}")]
    Version(u64),
    /// The database failed.
    #[error("database: {0}")]
    Database(#[source] Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for MetadataError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

type Result<T, E = MetadataError> = std::result::Result<T, E>;

/// The store. Safe from many threads; changes run one after the other.
#[derive(Debug)]
pub struct Metadata {
    database: Database,
}

impl Metadata {
    /// Opens the store at `path`, making an empty one when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read, is open in another process, or is of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let database = Database::create(path)?;
        let change = database.begin_write()?;
        {
            change.open_table(SNAPSHOTS)?;
            change.open_table(CHILDREN)?;
            let mut numbers = change.open_table(NUMBERS)?;
            let version = numbers.get(VERSION)?.map(|version| version.value());
            match version {
                None => _ = numbers.insert(VERSION, STORE_VERSION)?,
                Some(STORE_VERSION) => {}
                Some(other) => return Err(MetadataError::Version(other)),
            }
        }
        change.commit()?;
        Ok(Self { database })
    }

    /// One snapshot.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn snapshot(&self, key: &SnapshotKey) -> Result<Snapshot> {
        let snapshots = self.database.begin_read()?.open_table(SNAPSHOTS)?;
        find(&snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))
    }

    /// One snapshot and everything below it.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn chain(&self, key: &SnapshotKey) -> Result<Chain> {
        let snapshots = self.database.begin_read()?.open_table(SNAPSHOTS)?;
        let top = find(&snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))?;
        let parents = parents(&snapshots, &top)?;
        Ok(Chain { top, parents })
    }

    /// Every snapshot, sorted by key.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        all(&self.database.begin_read()?.open_table(SNAPSHOTS)?)
    }

    /// Adds a view or an active snapshot.
    ///
    /// `make_directory` is called with the new id; when it fails nothing is recorded. When it succeeded
    /// and the record fails, the directory is an orphan for the caller to remove.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`] for the parent, [`MetadataError::ParentNotCommitted`],
    /// [`MetadataError::AlreadyExists`], [`MetadataError::Directory`].
    pub fn create(
        &self,
        new: NewSnapshot,
        now: Time,
        make_directory: impl FnOnce(SnapshotId) -> io::Result<()>,
    ) -> Result<Chain> {
        let change = self.database.begin_write()?;
        let chain = {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            if let Some(parent) = &new.parent {
                let found = find(&snapshots, parent)?.ok_or_else(|| MetadataError::NotFound(parent.clone()))?;
                if found.kind != Kind::Committed {
                    return Err(MetadataError::ParentNotCommitted(parent.clone()));
                }
            }
            if find(&snapshots, &new.key)?.is_some() {
                return Err(MetadataError::AlreadyExists(new.key));
            }
            let top = Snapshot {
                id: take_id(&mut change.open_table(NUMBERS)?)?,
                key: new.key,
                kind: new.kind,
                parent: new.parent,
                labels: without_empty(new.labels),
                created: now,
                updated: now,
                usage: Usage::default(),
                lazy: None,
            };
            let parents = parents(&snapshots, &top)?;
            put(&mut snapshots, &top)?;
            link(&mut change.open_table(CHILDREN)?, &top)?;
            make_directory(top.id).map_err(|error| MetadataError::Directory(top.key.clone(), error))?;
            Chain { top, parents }
        };
        change.commit()?;
        Ok(chain)
    }

    /// Turns an active snapshot into a committed one of another name; its id stays.
    ///
    /// # Errors
    ///
    /// [`MetadataError::AlreadyExists`] for the name, [`MetadataError::NotFound`] for the key or the
    /// parent, [`MetadataError::NotActive`], [`MetadataError::ParentChanged`],
    /// [`MetadataError::CommitOntoUncommitted`].
    pub fn commit(&self, new: NewCommit, now: Time) -> Result<()> {
        let change = self.database.begin_write()?;
        {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut children = change.open_table(CHILDREN)?;
            if find(&snapshots, &new.name)?.is_some() {
                return Err(MetadataError::AlreadyExists(new.name));
            }
            let active = find(&snapshots, &new.key)?.ok_or_else(|| MetadataError::NotFound(new.key.clone()))?;
            if active.kind != Kind::Active {
                return Err(MetadataError::NotActive(new.key));
            }
            let parent = match (&active.parent, new.parent) {
                (Some(has), Some(wants)) if *has != wants => {
                    return Err(MetadataError::ParentChanged(new.key, wants));
                }
                (has, wants) => has.clone().or(wants),
            };
            if let Some(parent) = &parent {
                let found = find(&snapshots, parent)?.ok_or_else(|| MetadataError::NotFound(parent.clone()))?;
                if found.kind != Kind::Committed {
                    return Err(MetadataError::CommitOntoUncommitted(new.key, parent.clone()));
                }
            }
            unlink(&mut children, &active)?;
            snapshots.remove(active.key.as_str())?;
            let committed = Snapshot {
                key: new.name,
                kind: Kind::Committed,
                parent,
                labels: without_empty(new.labels),
                created: now,
                updated: now,
                usage: new.usage,
                ..active
            };
            put(&mut snapshots, &committed)?;
            link(&mut children, &committed)?;
        }
        change.commit()?;
        Ok(())
    }

    /// Adds a committed snapshot for a lazy layer, which has no directory.
    ///
    /// `parent` must be lazy too, since one tree holds a whole chain of lazy layers; `Ok(false)` when it
    /// is not, or when `key` exists and means something else. `Ok(true)` also when it existed already.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`] for the parent.
    pub fn insert_lazy(
        &self,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: Labels,
        layer: RemoteLayer,
        now: Time,
    ) -> Result<bool> {
        let change = self.database.begin_write()?;
        {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let below = match parent {
                None => None,
                Some(parent) => match find(&snapshots, parent)? {
                    None => return Err(MetadataError::NotFound(parent.clone())),
                    Some(Snapshot { lazy: Some(lazy), .. }) => Some(lazy.tree),
                    Some(_) => return Ok(false),
                },
            };
            if let Some(existing) = find(&snapshots, key)? {
                return Ok(existing.lazy.is_some() && existing.parent.as_ref() == parent);
            }
            let tree = tree_above(below, layer.layer.id());
            let snapshot = Snapshot {
                key: key.clone(),
                id: take_id(&mut change.open_table(NUMBERS)?)?,
                kind: Kind::Committed,
                parent: parent.cloned(),
                labels: without_empty(labels),
                created: now,
                updated: now,
                usage: Usage::default(),
                lazy: Some(LazySnapshot { layer, tree }),
            };
            put(&mut snapshots, &snapshot)?;
            link(&mut change.open_table(CHILDREN)?, &snapshot)?;
        }
        change.commit()?;
        Ok(true)
    }

    /// Forgets a snapshot and returns what it was; its directory is now an orphan.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`], [`MetadataError::HasChildren`].
    pub fn remove(&self, key: &SnapshotKey) -> Result<Snapshot> {
        let change = self.database.begin_write()?;
        let removed = {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut children = change.open_table(CHILDREN)?;
            let removed = find(&snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))?;
            if children
                .range((key.as_str(), "")..)?
                .next()
                .transpose()?
                .is_some_and(|(link, _)| link.value().0 == key.as_str())
            {
                return Err(MetadataError::HasChildren(key.clone()));
            }
            unlink(&mut children, &removed)?;
            snapshots.remove(key.as_str())?;
            removed
        };
        change.commit()?;
        Ok(removed)
    }

    /// Changes the labels of a snapshot and returns it as it is now.
    ///
    /// # Errors
    ///
    /// [`MetadataError::NotFound`].
    pub fn update_labels(&self, key: &SnapshotKey, labels: LabelChange, now: Time) -> Result<Snapshot> {
        let change = self.database.begin_write()?;
        let updated = {
            let mut snapshots = change.open_table(SNAPSHOTS)?;
            let mut updated = find(&snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))?;
            match labels {
                LabelChange::All(labels) => updated.labels = labels,
                LabelChange::Some(labels) => updated.labels.extend(labels),
            }
            updated.labels = without_empty(updated.labels);
            updated.updated = now;
            put(&mut snapshots, &updated)?;
            updated
        };
        change.commit()?;
        Ok(updated)
    }

    /// Calls `look` with every snapshot while none can be added.
    ///
    /// # Errors
    ///
    /// When the database fails.
    pub fn while_unchanged<T>(&self, look: impl FnOnce(Vec<Snapshot>) -> T) -> Result<T> {
        let change = self.database.begin_write()?;
        let snapshots = all(&change.open_table(SNAPSHOTS)?)?;
        let seen = look(snapshots);
        change.abort()?;
        Ok(seen)
    }
}

/// The tree of `blob` on top of the tree `below`.
fn tree_above(below: Option<TreeId>, layer: LayerId) -> TreeId {
    fusefs::control::tree_id(below.into_iter().chain([layer])).expect("at least one layer")
}

fn find(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, key: &SnapshotKey) -> Result<Option<Snapshot>> {
    match snapshots.get(key.as_str())? {
        None => Ok(None),
        Some(bytes) => decode(key.as_str(), bytes.value()).map(Some),
    }
}

fn all(snapshots: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<Snapshot>> {
    snapshots
        .iter()?
        .map(|entry| entry.map_err(MetadataError::from).and_then(|(key, bytes)| decode(key.value(), bytes.value())))
        .collect()
}

fn parents(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, top: &Snapshot) -> Result<Vec<Snapshot>> {
    let mut parents: Vec<Snapshot> = Vec::new();
    while let Some(key) = &parents.last().unwrap_or(top).parent {
        if parents.len() == CHAIN_LEN_MAX {
            return Err(MetadataError::Damaged(top.key.to_string(), format!("more than {CHAIN_LEN_MAX} parents")));
        }
        let parent = find(snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))?;
        parents.push(parent);
    }
    Ok(parents)
}

fn decode(key: &str, bytes: &[u8]) -> Result<Snapshot> {
    serde_json::from_slice(bytes).map_err(|error| MetadataError::Damaged(key.to_owned(), error.to_string()))
}

fn put(snapshots: &mut redb::Table<'_, &'static str, &'static [u8]>, snapshot: &Snapshot) -> Result<()> {
    let bytes = serde_json::to_vec(snapshot).expect("a record has text keys only");
    snapshots.insert(snapshot.key.as_str(), bytes.as_slice())?;
    Ok(())
}

fn link(children: &mut redb::Table<'_, (&'static str, &'static str), ()>, child: &Snapshot) -> Result<()> {
    if let Some(parent) = &child.parent {
        children.insert((parent.as_str(), child.key.as_str()), ())?;
    }
    Ok(())
}

fn unlink(children: &mut redb::Table<'_, (&'static str, &'static str), ()>, child: &Snapshot) -> Result<()> {
    if let Some(parent) = &child.parent {
        children.remove((parent.as_str(), child.key.as_str()))?;
    }
    Ok(())
}

fn take_id(numbers: &mut redb::Table<'_, &'static str, u64>) -> Result<SnapshotId> {
    let id = numbers.get(NEXT_ID)?.map_or(1, |id| id.value());
    numbers.insert(NEXT_ID, id + 1)?;
    Ok(SnapshotId(id))
}

/// containerd stores no label with an empty value: setting one so removes it.
fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
