//! The record of all snapshots, in one redb file.
//!
//! A snapshot has a *key* (containerd's name for it), an *id* (its directory) and a *kind*; its *chain*
//! is itself, its parent, and so on down to the base. What may follow what is decided here, as in
//! containerd's own metadata store; directories and mounts are other modules' business.
//!
//! Everything here blocks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use control::{RemoteLayer, TreeId};
use format_spec::LayerId;
use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::{
    database::Database,
    id_map::UID_MAPPING,
    remote::{TARGET, is_extraction},
    signers::Signers,
    trust::{Truth, Vouchers},
};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// (parent, child): finds the children of a snapshot without reading all of them.
const CHILDREN: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("children");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// Things to be deleted, by [`Unused::to_key`].
const UNUSED: TableDefinition<'_, &str, ()> = TableDefinition::new("unused");
/// (tree or layer, id of a snapshot that needs it): follows from the records, and is made from them when the store is
/// opened.
const USERS: TableDefinition<'_, (&str, u64), ()> = TableDefinition::new("users");
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
    /// Whether it is what the chain ID names.
    #[serde(default)]
    pub truth: Truth,
    /// When that was found out; `None` while it is believed.
    #[serde(default)]
    pub truth_since: Option<Time>,
    /// Repositories of further images that name this layer for this chain.
    #[serde(default)]
    pub further_vouchers: Vouchers,
    /// Keys that have signed this layer for this chain, of those that were configured when it was pulled.
    #[serde(default)]
    pub signers: Signers,
    /// The layer as further images name it: with their own blob, which may be another one under the same index. One
    /// image a repository.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_places: Vec<RemoteLayer>,
}

/// The fate of a lazy layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LazyInsert {
    /// The snapshot shows this layer, or another one that is the same by its chain ID.
    There,
    /// The layer is an ordinary one: its parent is, or the name means something that is not lazy.
    Ordinary,
    /// The chain is recorded with another layer, and nobody knows yet which of them is right.
    Claimed(Box<Snapshot>),
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

impl NewSnapshot {
    /// Whether a layer is to be unpacked into it. Nobody misses it after a crash: who unpacks begins anew, with a
    /// snapshot of another name, and what the commit makes of it is durable.
    pub fn is_extraction(&self) -> bool {
        self.kind == Kind::Active && self.labels.contains_key(TARGET) && is_extraction(&self.key)
    }
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

/// A thing that belongs to no snapshot any longer and is to be deleted, unless a snapshot uses it again by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unused {
    /// The directory of a snapshot that was removed, and its mounts with other owners.
    Directory(SnapshotId),
    /// The mounts with other owners of a snapshot that is there.
    Mounts(SnapshotId),
    /// A tree of lazy layers.
    Tree(TreeId),
    /// The cache of a lazy layer.
    Layer(LayerId),
}

impl Unused {
    fn to_key(self) -> String {
        match self {
            Self::Directory(id) => format!("directory/{id}"),
            Self::Mounts(id) => format!("mounts/{id}"),
            Self::Tree(tree) => format!("tree/{tree}"),
            Self::Layer(layer) => format!("layer/{layer}"),
        }
    }

    fn from_key(key: &str) -> Option<Self> {
        let (kind, name) = key.split_once('/')?;
        match kind {
            "directory" => Some(Self::Directory(SnapshotId(name.parse().ok()?))),
            "mounts" => Some(Self::Mounts(SnapshotId(name.parse().ok()?))),
            "tree" => Some(Self::Tree(name.parse().ok()?)),
            "layer" => Some(Self::Layer(name.parse().ok()?)),
            _ => None,
        }
    }
}

/// All snapshots that can be read, and what is wrong with the others.
#[derive(Debug, Default)]
pub struct Listed {
    /// Sorted by key.
    pub snapshots: Vec<Snapshot>,
    /// Those whose record makes no sense: [`MetadataError::Damaged`].
    pub damaged: Vec<MetadataError>,
}

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

/// Makes the tables that are missing, and has [`USERS`] say what the records say.
fn make_tables(change: &WriteTransaction) -> Result<()> {
    change.open_table(CHILDREN)?;
    change.open_table(UNUSED)?;
    let mut numbers = change.open_table(NUMBERS)?;
    numbers.insert(VERSION, STORE_VERSION)?;
    let snapshots = change.open_table(SNAPSHOTS)?;
    change.delete_table(USERS)?;
    let mut users = change.open_table(USERS)?;
    for snapshot in all(&snapshots)?.snapshots {
        for used in uses(&snapshot) {
            users.insert((used.to_key().as_str(), snapshot.id.0), ())?;
        }
    }
    Ok(())
}

/// The entries of [`USERS`]; `None` when a table is missing: the file is new, or was written by an earlier version.
fn have_users(state: &ReadTransaction) -> Result<Option<BTreeSet<(String, u64)>>> {
    let tables = [state.open_table(CHILDREN).map(drop), state.open_table(UNUSED).map(drop)];
    if tables.iter().any(Result::is_err) {
        return Ok(None);
    }
    match state.open_table(USERS) {
        Ok(users) => {
            let users = users.iter()?.map(|entry| entry.map(|(user, _)| (user.value().0.to_owned(), user.value().1)));
            Ok(Some(users.collect::<Result<_, _>>()?))
        }
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn wanted_users(state: &ReadTransaction) -> Result<BTreeSet<(String, u64)>> {
    let snapshots = match state.open_table(SNAPSHOTS) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeSet::new()),
        snapshots => all(&snapshots?)?.snapshots,
    };
    let users = |snapshot: &Snapshot| uses(snapshot).map(|used| (used.to_key(), snapshot.id.0)).collect::<Vec<_>>();
    Ok(snapshots.iter().flat_map(users).collect())
}

/// The tree and the layer of a lazy snapshot.
fn uses(snapshot: &Snapshot) -> impl Iterator<Item = Unused> {
    let lazy = snapshot.lazy.iter();
    lazy.flat_map(|lazy| [Unused::Tree(lazy.tree), Unused::Layer(lazy.layer.layer.id())])
}

/// Removes a record; what it had is to be deleted.
fn forget(
    change: &WriteTransaction,
    snapshots: &mut redb::Table<'_, &'static str, &'static [u8]>,
    removed: &Snapshot,
) -> Result<()> {
    snapshots.remove(removed.key.as_str())?;
    unlink(&mut change.open_table(CHILDREN)?, removed)?;
    let mut unused = change.open_table(UNUSED)?;
    let mut users = change.open_table(USERS)?;
    for used in uses(removed) {
        users.remove((used.to_key().as_str(), removed.id.0))?;
        unused.insert(used.to_key().as_str(), ())?;
    }
    if removed.lazy.is_none() {
        unused.insert(Unused::Directory(removed.id).to_key().as_str(), ())?;
    }
    Ok(())
}

/// The parents of `new`, nearest first.
fn parents_of(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, new: &NewSnapshot) -> Result<Vec<Snapshot>> {
    let parents = match &new.parent {
        None => Vec::new(),
        Some(parent) => {
            let parent = existing(snapshots, parent)?;
            if parent.kind != Kind::Committed {
                return Err(MetadataError::ParentNotCommitted(parent.key));
            }
            let below = parents(snapshots, &parent)?;
            [vec![parent], below].concat()
        }
    };
    match is_there(snapshots, &new.key)? {
        true => Err(MetadataError::AlreadyExists(new.key.clone())),
        false => Ok(parents),
    }
}

fn has_children(children: &impl ReadableTable<(&'static str, &'static str), ()>, key: &SnapshotKey) -> Result<bool> {
    let first = children.range((key.as_str(), "")..)?.next().transpose()?;
    Ok(first.is_some_and(|(link, _)| link.value().0 == key.as_str()))
}

/// The tree of `blob` on top of the tree `below`.
fn tree_above(below: Option<TreeId>, layer: LayerId) -> TreeId {
    control::tree_id(below.into_iter().chain([layer])).expect("at least one layer")
}

fn find(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, key: &SnapshotKey) -> Result<Option<Snapshot>> {
    match snapshots.get(key.as_str())? {
        None => Ok(None),
        Some(bytes) => decode(key.as_str(), bytes.value()).map(Some),
    }
}

fn existing(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, key: &SnapshotKey) -> Result<Snapshot> {
    find(snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))
}

/// A damaged one is there too.
fn is_there(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, key: &SnapshotKey) -> Result<bool> {
    Ok(snapshots.get(key.as_str())?.is_some())
}

fn all(snapshots: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Listed> {
    let mut listed = Listed::default();
    for entry in snapshots.iter()? {
        let (key, bytes) = entry?;
        match decode(key.value(), bytes.value()) {
            Ok(snapshot) => listed.snapshots.push(snapshot),
            Err(damaged) => listed.damaged.push(damaged),
        }
    }
    Ok(listed)
}

fn parents(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, top: &Snapshot) -> Result<Vec<Snapshot>> {
    let mut parents: Vec<Snapshot> = Vec::new();
    while let Some(key) = &parents.last().unwrap_or(top).parent {
        if parents.len() == CHAIN_LEN_MAX {
            return Err(MetadataError::Damaged(top.key.to_string(), format!("more than {CHAIN_LEN_MAX} parents")));
        }
        let parent = existing(snapshots, key)?;
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

/// An id that is in a record is given to nobody else, also by a later process.
fn never_again(numbers: &mut redb::Table<'_, &'static str, u64>, id: SnapshotId) -> Result<()> {
    let next = numbers.get(NEXT_ID)?.map_or(1, |next| next.value());
    numbers.insert(NEXT_ID, next.max(id.0 + 1))?;
    Ok(())
}

/// containerd stores no label with an empty value: setting one so removes it.
fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}

#[cfg(test)]
#[path = "crash_tests.rs"]
mod crash_tests;
#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
