//! What the store allows, refuses and remembers.

use std::collections::BTreeSet;

use format_spec::{Digest, IndexLocation, LazyLayer};

use super::*;

const NOW: Time = Time { seconds: 1000, nanos: 5 };
const LATER: Time = Time { seconds: 2000, nanos: 6 };

struct Store {
    directory: tempfile::TempDir,
    metadata: Metadata,
}

impl Store {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let metadata = Metadata::open(&directory.path().join("db")).unwrap();
        Self { directory, metadata }
    }

    fn reopened(self) -> Self {
        drop(self.metadata);
        let metadata = Metadata::open(&self.directory.path().join("db")).unwrap();
        Self { directory: self.directory, metadata }
    }

    fn create(&self, name: &str, kind: Kind, parent: &str) -> Result<Chain> {
        let new = NewSnapshot { key: key(name), kind, parent: SnapshotKey::new(parent), labels: Labels::new() };
        self.metadata.create(&new, self.metadata.take_id(), NOW)
    }

    fn commit(&self, active: &str, name: &str, parent: &str) -> Result<()> {
        let (key, name, parent) = (key(active), key(name), SnapshotKey::new(parent));
        let usage = Usage { bytes: 4096, inodes: 1 };
        self.metadata.commit(&NewCommit { name, key, parent, labels: Labels::new(), usage }, LATER)
    }

    fn committed(&self, name: &str, parent: &str) {
        self.create("work", Kind::Active, parent).unwrap();
        self.commit("work", name, "").unwrap();
    }

    fn lazy(&self, name: &str, parent: &str) -> Result<bool> {
        let parent = SnapshotKey::new(parent);
        let inserted = self.metadata.insert_lazy(
            &key(name),
            parent.as_ref(),
            &Labels::new(),
            &remote(name),
            &Signers::new(),
            NOW,
        )?;
        Ok(inserted == LazyInsert::There)
    }
}

fn key(name: &str) -> SnapshotKey {
    SnapshotKey::new(name).unwrap()
}

fn remote(name: &str) -> RemoteLayer {
    let index = IndexLocation {
        offset: 0,
        compressed_len: 1,
        plain_len: 1,
        digest: Digest::of(format!("index of {name}").as_bytes()),
    };
    RemoteLayer {
        layer: LazyLayer { blob: Digest::of(name.as_bytes()), blob_len: 10, index, hot_len: 0 },
        image: "h/r:t".to_owned(),
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn keys(snapshots: &[Snapshot]) -> Vec<&str> {
    snapshots.iter().map(|snapshot| snapshot.key.as_str()).collect()
}

#[test]
fn chain_goes_down_to_the_base_and_survives_reopening() {
    let store = Store::new();
    store.committed("one", "");
    store.committed("two", "one");
    let created = store.create("top", Kind::View, "two").unwrap();
    let store = store.reopened();
    let chain = store.metadata.chain(&key("top")).unwrap();
    assert_eq!(chain, created);
    assert_eq!(keys(&chain.parents), ["two", "one"]);
    assert_eq!((chain.top.kind, chain.top.created), (Kind::View, NOW));
    assert_eq!(keys(&store.metadata.list().unwrap().snapshots), ["one", "top", "two"]);
}

#[test]
fn commit_keeps_the_id_and_replaces_the_rest() {
    let store = Store::new();
    let active = store.create("work", Kind::Active, "").unwrap().top;
    store.commit("work", "done", "").unwrap();
    let expected = Snapshot {
        key: key("done"),
        kind: Kind::Committed,
        created: LATER,
        updated: LATER,
        usage: Usage { bytes: 4096, inodes: 1 },
        ..active
    };
    assert_eq!(store.metadata.snapshot(&key("done")).unwrap(), expected);
    assert!(matches!(store.metadata.snapshot(&key("work")), Err(MetadataError::NotFound(_))));
}

#[test]
fn refuses_bad_parents_and_taken_keys() {
    let store = Store::new();
    store.committed("base", "");
    store.create("active", Kind::Active, "base").unwrap();
    assert!(matches!(store.create("x", Kind::Active, "missing"), Err(MetadataError::NotFound(_))));
    assert!(matches!(store.create("x", Kind::Active, "active"), Err(MetadataError::ParentNotCommitted(_))));
    assert!(matches!(store.create("active", Kind::View, ""), Err(MetadataError::AlreadyExists(_))));
    assert!(matches!(store.create("base", Kind::View, ""), Err(MetadataError::AlreadyExists(_))));
}

#[test]
fn refuses_to_commit_what_is_not_active_or_has_no_free_name() {
    let store = Store::new();
    store.committed("base", "");
    store.create("view", Kind::View, "base").unwrap();
    store.create("active", Kind::Active, "base").unwrap();
    assert!(matches!(store.commit("view", "x", ""), Err(MetadataError::NotActive(_))));
    assert!(matches!(store.commit("base", "x", ""), Err(MetadataError::NotActive(_))));
    assert!(matches!(store.commit("missing", "x", ""), Err(MetadataError::NotFound(_))));
    assert!(matches!(store.commit("active", "base", ""), Err(MetadataError::AlreadyExists(_))));
}

#[test]
fn commit_gives_a_parent_to_a_snapshot_without_one() {
    let store = Store::new();
    store.committed("base", "");
    store.create("alone", Kind::Active, "").unwrap();
    assert!(matches!(store.commit("alone", "x", "missing"), Err(MetadataError::NotFound(_))));
    assert!(matches!(store.commit("alone", "x", "alone"), Err(MetadataError::CommitOntoUncommitted(..))));
    store.commit("alone", "upper", "base").unwrap();
    assert_eq!(keys(&store.metadata.chain(&key("upper")).unwrap().parents), ["base"]);
    store.create("child", Kind::Active, "upper").unwrap();
    assert!(matches!(store.commit("child", "x", "base"), Err(MetadataError::ParentChanged(..))));
    store.commit("child", "x", "upper").unwrap();
}

#[test]
fn remove_refuses_while_there_are_children() {
    let store = Store::new();
    store.committed("a", "");
    store.committed("ab", "a");
    store.committed("b", "a");
    for (name, removable) in [("a", false), ("ab", true), ("a", false), ("b", true), ("a", true), ("a", false)] {
        assert_eq!(store.metadata.remove(&key(name)).is_ok(), removable, "{name}");
    }
}

#[test]
fn ids_are_never_used_twice_once_recorded() {
    let store = Store::new();
    let first = store.create("a", Kind::Active, "").unwrap().top.id;
    store.metadata.remove(&key("a")).unwrap();
    let given = store.metadata.take_id();
    assert!(given > first);
    let store = store.reopened();
    assert_eq!(store.create("a", Kind::Active, "").unwrap().top.id, SnapshotId(first.0 + 1));
}

#[test]
fn labels_are_set_replaced_and_removed() {
    let store = Store::new();
    let new =
        NewSnapshot { key: key("a"), kind: Kind::Active, parent: None, labels: labels(&[("x", "1"), ("empty", "")]) };
    store.metadata.create(&new, store.metadata.take_id(), NOW).unwrap();
    let update = |change| store.metadata.update_labels(&key("a"), &change, LATER).unwrap();
    let some = update(LabelChange::Some(labels(&[("y", "2")])));
    assert_eq!((some.labels, some.created, some.updated), (labels(&[("x", "1"), ("y", "2")]), NOW, LATER));
    assert_eq!(update(LabelChange::Some(labels(&[("x", "")]))).labels, labels(&[("y", "2")]));
    assert_eq!(update(LabelChange::All(labels(&[("z", "3")]))).labels, labels(&[("z", "3")]));
}

#[test]
fn lazy_layers_stack_only_on_lazy_layers() {
    let store = Store::new();
    store.committed("ordinary", "");
    assert!(store.lazy("one", "").unwrap());
    assert!(store.lazy("two", "one").unwrap());
    assert!(!store.lazy("three", "ordinary").unwrap());
    assert!(matches!(store.lazy("three", "missing"), Err(MetadataError::NotFound(_))));
    let chain = store.metadata.chain(&key("two")).unwrap();
    let layers = ["one", "two"].map(|name| remote(name).layer.id());
    assert_eq!(chain.top.lazy.unwrap().tree, control::tree_id(layers).unwrap());
    assert_eq!(keys(&chain.parents), ["one"]);
}

#[test]
fn a_lazy_layer_that_exists_is_there_unless_it_means_something_else() {
    let store = Store::new();
    store.committed("ordinary", "");
    assert!(store.lazy("one", "").unwrap());
    assert!(store.lazy("two", "one").unwrap());
    assert!(store.lazy("two", "one").unwrap());
    assert!(!store.lazy("two", "").unwrap());
    assert!(!store.lazy("ordinary", "").unwrap());
}

#[test]
fn refuses_a_store_of_another_version() {
    let store = Store::new();
    let change = |change: &WriteTransaction| Ok(change.open_table(NUMBERS)?.insert(VERSION, 99).map(drop)?);
    store.metadata.database.change(change).unwrap();
    drop(store.metadata);
    assert!(matches!(Metadata::open(&store.directory.path().join("db")), Err(MetadataError::Version(99))));
}

#[test]
fn what_a_removed_snapshot_had_is_unused_until_it_is_said_to_be_deleted() {
    let store = Store::new();
    let active = store.create("active", Kind::Active, "").unwrap().top.id;
    store.lazy("one", "").unwrap();
    store.lazy("two", "one").unwrap();
    let of = |name: &str| store.metadata.snapshot(&key(name)).unwrap();
    let (one, two) = (of("one"), of("two"));
    let tree = |snapshot: &Snapshot| Unused::Tree(snapshot.lazy.as_ref().unwrap().tree);
    let layer = |snapshot: &Snapshot| Unused::Layer(snapshot.lazy.as_ref().unwrap().layer.layer.id());
    assert_eq!(store.metadata.first_user(tree(&two)).unwrap(), Some(two.id));
    assert_eq!(store.metadata.first_user(layer(&one)).unwrap(), Some(one.id));
    store.metadata.remove(&key("active")).unwrap();
    store.metadata.remove(&key("two")).unwrap();
    let store = store.reopened();
    let unused: BTreeSet<_> = store.metadata.unused().unwrap().into_iter().map(Unused::to_key).collect();
    let expected = [Unused::Directory(active), tree(&two), layer(&two)];
    assert_eq!(unused, expected.map(Unused::to_key).into());
    assert_eq!(store.metadata.first_user(tree(&two)).unwrap(), None);
    assert_eq!(store.metadata.first_user(layer(&one)).unwrap(), Some(one.id));
    for unused in expected {
        store.metadata.forget_unused(unused).unwrap();
    }
    assert_eq!(store.metadata.unused().unwrap(), []);
}

/// The store that a version before this one left: no table of what is unused, none of who uses what.
#[test]
fn an_older_store_learns_who_uses_what() {
    let store = Store::new();
    store.lazy("one", "").unwrap();
    let old = |change: &WriteTransaction| {
        change.delete_table(USERS)?;
        change.delete_table(UNUSED)?;
        Ok(())
    };
    store.metadata.database.change(old).unwrap();
    let store = store.reopened();
    let layer = Unused::Layer(remote("one").layer.id());
    assert_eq!(store.metadata.first_user(layer).unwrap(), Some(store.metadata.snapshot(&key("one")).unwrap().id));
    assert_eq!(store.metadata.unused().unwrap(), []);
}

fn damage(store: &Store, name: &str) {
    let name = name.to_owned();
    let damage = |change: &WriteTransaction| {
        Ok(change.open_table(SNAPSHOTS)?.insert(name.as_str(), b"{no record".as_slice()).map(drop)?)
    };
    store.metadata.database.change(damage).unwrap();
}

#[test]
fn a_damaged_record_costs_itself_only_and_can_be_removed() {
    let store = Store::new();
    store.committed("base", "");
    for name in ["a", "b", "c"] {
        store.create(name, Kind::Active, "base").unwrap();
    }
    damage(&store, "b");
    let store = store.reopened();
    let listed = store.metadata.list().unwrap();
    assert_eq!((keys(&listed.snapshots), listed.damaged.len()), (vec!["a", "base", "c"], 1));
    assert!(listed.damaged[0].to_string().contains("record of b"), "{:?}", listed.damaged);
    assert!(matches!(store.metadata.snapshot(&key("b")), Err(MetadataError::Damaged(..))));
    assert!(matches!(store.create("b", Kind::Active, "base"), Err(MetadataError::AlreadyExists(_))));
    store.create("d", Kind::Active, "base").unwrap();
    for name in ["a", "c", "d"] {
        store.metadata.remove(&key(name)).unwrap();
    }
    assert!(matches!(store.metadata.remove(&key("base")), Err(MetadataError::HasChildren(_))));
    store.metadata.remove(&key("b")).unwrap();
    store.metadata.remove(&key("base")).unwrap();
    assert_eq!(store.metadata.list().unwrap().snapshots, []);
}
