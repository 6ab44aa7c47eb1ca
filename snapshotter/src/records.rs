//! The records of snapshots, and what can be asked of them.

use control::{RemoteLayer, TreeId};
use format_spec::LayerId;
use serde::{Deserialize, Serialize};

use crate::{
    names::{Labels, SnapshotId, SnapshotKey, Time},
    remote::{TARGET, is_extraction},
    signers::Signers,
    trust::{Truth, Vouchers},
};

/// The version of the store.
pub(crate) const STORE_VERSION: u64 = 1;

/// The use of a snapshot.
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

/// The room that a snapshot takes on disk, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Files of any type.
    pub inodes: u64,
}

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
    /// The room that it takes on disk.
    pub usage: Usage,
}

/// A change to the labels.
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
    pub(crate) fn to_key(self) -> String {
        match self {
            Self::Directory(id) => format!("directory/{id}"),
            Self::Mounts(id) => format!("mounts/{id}"),
            Self::Tree(tree) => format!("tree/{tree}"),
            Self::Layer(layer) => format!("layer/{layer}"),
        }
    }

    pub(crate) fn from_key(key: &str) -> Option<Self> {
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
