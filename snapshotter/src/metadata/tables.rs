//! The tables of the store, and steps of its transactions.

use std::collections::BTreeSet;

use control::TreeId;
use format_spec::LayerId;
use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use crate::{
    names::{Labels, SnapshotId, SnapshotKey},
    records::{Kind, Listed, MetadataError, NewSnapshot, STORE_VERSION, Snapshot, Unused},
};

pub(super) type Result<T, E = MetadataError> = std::result::Result<T, E>;

pub(super) const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");

/// (parent, child): finds the children of a snapshot without reading all of them.
pub(super) const CHILDREN: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("children");

pub(super) const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

/// Things to be deleted, by [`Unused::to_key`].
pub(super) const UNUSED: TableDefinition<'_, &str, ()> = TableDefinition::new("unused");

/// (tree or layer, id of a snapshot that needs it): follows from the records, and is made from them when the store is
/// opened.
pub(super) const USERS: TableDefinition<'_, (&str, u64), ()> = TableDefinition::new("users");

pub(super) const VERSION: &str = "version";

pub(super) const NEXT_ID: &str = "next id";

/// Longest chain that is followed: overlayfs stacks 500 lower directories (Linux fs/overlayfs/params.h).
pub(super) const CHAIN_LEN_MAX: usize = 512;

/// Makes the tables that are missing, and has [`USERS`] say what the records say.
pub(super) fn make_tables(change: &WriteTransaction) -> Result<()> {
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
pub(super) fn have_users(state: &ReadTransaction) -> Result<Option<BTreeSet<(String, u64)>>> {
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

pub(super) fn wanted_users(state: &ReadTransaction) -> Result<BTreeSet<(String, u64)>> {
    let snapshots = match state.open_table(SNAPSHOTS) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(BTreeSet::new()),
        snapshots => all(&snapshots?)?.snapshots,
    };
    let users = |snapshot: &Snapshot| uses(snapshot).map(|used| (used.to_key(), snapshot.id.0)).collect::<Vec<_>>();
    Ok(snapshots.iter().flat_map(users).collect())
}

/// The tree and the layer of a lazy snapshot.
pub(super) fn uses(snapshot: &Snapshot) -> impl Iterator<Item = Unused> {
    let lazy = snapshot.lazy.iter();
    lazy.flat_map(|lazy| [Unused::Tree(lazy.tree), Unused::Layer(lazy.layer.layer.id())])
}

/// Removes a record; what it had is to be deleted.
pub(super) fn forget(
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
pub(super) fn parents_of(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    new: &NewSnapshot,
) -> Result<Vec<Snapshot>> {
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

pub(super) fn has_children(
    children: &impl ReadableTable<(&'static str, &'static str), ()>,
    key: &SnapshotKey,
) -> Result<bool> {
    let first = children.range((key.as_str(), "")..)?.next().transpose()?;
    Ok(first.is_some_and(|(link, _)| link.value().0 == key.as_str()))
}

/// The tree of `blob` on top of the tree `below`.
pub(super) fn tree_above(below: Option<TreeId>, layer: LayerId) -> TreeId {
    control::tree_id(below.into_iter().chain([layer])).expect("at least one layer")
}

pub(super) fn find(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &SnapshotKey,
) -> Result<Option<Snapshot>> {
    match snapshots.get(key.as_str())? {
        None => Ok(None),
        Some(bytes) => decode(key.as_str(), bytes.value()).map(Some),
    }
}

pub(super) fn existing(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &SnapshotKey,
) -> Result<Snapshot> {
    find(snapshots, key)?.ok_or_else(|| MetadataError::NotFound(key.clone()))
}

/// A damaged one is there too.
pub(super) fn is_there(snapshots: &impl ReadableTable<&'static str, &'static [u8]>, key: &SnapshotKey) -> Result<bool> {
    Ok(snapshots.get(key.as_str())?.is_some())
}

pub(super) fn all(snapshots: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Listed> {
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

pub(super) fn parents(
    snapshots: &impl ReadableTable<&'static str, &'static [u8]>,
    top: &Snapshot,
) -> Result<Vec<Snapshot>> {
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

pub(super) fn decode(key: &str, bytes: &[u8]) -> Result<Snapshot> {
    serde_json::from_slice(bytes).map_err(|error| MetadataError::Damaged(key.to_owned(), error.to_string()))
}

pub(super) fn put(snapshots: &mut redb::Table<'_, &'static str, &'static [u8]>, snapshot: &Snapshot) -> Result<()> {
    let bytes = serde_json::to_vec(snapshot).expect("a record has text keys only");
    snapshots.insert(snapshot.key.as_str(), bytes.as_slice())?;
    Ok(())
}

pub(super) fn link(children: &mut redb::Table<'_, (&'static str, &'static str), ()>, child: &Snapshot) -> Result<()> {
    if let Some(parent) = &child.parent {
        children.insert((parent.as_str(), child.key.as_str()), ())?;
    }
    Ok(())
}

pub(super) fn unlink(children: &mut redb::Table<'_, (&'static str, &'static str), ()>, child: &Snapshot) -> Result<()> {
    if let Some(parent) = &child.parent {
        children.remove((parent.as_str(), child.key.as_str()))?;
    }
    Ok(())
}

/// An id that is in a record is given to nobody else, also by a later process.
pub(super) fn never_again(numbers: &mut redb::Table<'_, &'static str, u64>, id: SnapshotId) -> Result<()> {
    let next = numbers.get(NEXT_ID)?.map_or(1, |next| next.value());
    numbers.insert(NEXT_ID, next.max(id.0 + 1))?;
    Ok(())
}

/// containerd stores no label with an empty value: setting one so removes it.
pub(super) fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}
