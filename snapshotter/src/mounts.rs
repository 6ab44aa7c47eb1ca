//! Which mounts show a snapshot: from its chain to what containerd passes to `mount(2)`.
//!
//! The *upper* directory of a snapshot holds its own changes, its *lower* directories what it is built
//! on, topmost first. Lazy layers stand at the bottom of a chain and appear as one lower directory, the
//! merged tree. Pure; the same mounts as containerd's overlayfs snapshotter gives for the same chain.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use containerd_client::types::Mount;
use control::{
    RemoteLayer,
    root::{LAYER_CACHES, SNAPSHOTS},
};
use format_spec::LayerId;

use crate::{
    names::SnapshotId,
    records::{Kind, Snapshot},
};

/// Further images that a container's layers are looked for at.
const IMAGES_MAX: usize = 16;

/// Where snapshots lie on disk: `<root>/snapshots/<id>/{fs,work}`, and the caches of lazy layers.
#[derive(Debug, Clone)]
pub struct Directories {
    snapshots: PathBuf,
    caches: PathBuf,
}

impl Directories {
    /// The directories under a root.
    pub fn new(root: &Path) -> Self {
        Self { snapshots: root.join(SNAPSHOTS), caches: root.join(LAYER_CACHES) }
    }

    /// The same directories, shown in another place.
    pub fn shown_at(self, snapshots: PathBuf) -> Self {
        Self { snapshots, ..self }
    }

    /// The directories that are there, of snapshots or not.
    ///
    /// # Errors
    ///
    /// When they cannot be listed.
    pub fn listed(&self) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(&self.snapshots)?.map(|entry| entry.map(|entry| entry.path())).collect()
    }

    /// Where `lazuli-fused` keeps a lazy layer.
    pub fn layer_cache(&self, layer: LayerId) -> PathBuf {
        self.caches.join(layer.hex())
    }

    /// Holds all snapshots.
    pub fn all(&self) -> &Path {
        &self.snapshots
    }

    /// Holds one snapshot.
    pub fn of(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.to_string())
    }

    /// The changes of a snapshot.
    pub fn upper(&self, id: SnapshotId) -> PathBuf {
        self.of(id).join("fs")
    }

    /// overlayfs's work directory of an active snapshot.
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.of(id).join("work")
    }
}

/// What a snapshot is built on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lower {
    /// Unpacked layers, topmost first.
    pub ordinary: Vec<SnapshotId>,
    /// Lazy layers below them, lowest first.
    pub lazy: Vec<RemoteLayer>,
}

impl Lower {
    /// Sorts the parents of a snapshot, nearest first.
    pub fn new(parents: &[Snapshot]) -> Self {
        let ordinary = parents.iter().take_while(|parent| parent.lazy.is_none()).map(|parent| parent.id);
        let lazy = parents.iter().rev().map_while(|parent| parent.lazy.as_ref()).map(|lazy| lazy.layer.clone());
        Self { ordinary: ordinary.collect(), lazy: lazy.collect() }
    }

    /// The lazy layers below a snapshot as further images name them, lowest first; where an image has not named a layer,
    /// it stands as the first one did.
    pub fn named_by_others(parents: &[Snapshot]) -> Vec<Vec<RemoteLayer>> {
        let lazy: Vec<_> = parents.iter().rev().map_while(|parent| parent.lazy.as_ref()).collect();
        let images: BTreeSet<_> = lazy.iter().flat_map(|lazy| &lazy.further_places).map(|place| &place.image).collect();
        let named_by = |image: &String| -> Vec<RemoteLayer> {
            lazy.iter().map(|lazy| lazy.named_by(image).unwrap_or(&lazy.layer).clone()).collect()
        };
        images.into_iter().take(IMAGES_MAX).map(named_by).collect()
    }

    /// The lower directories, topmost first; `tree` shows the lazy layers when there are any.
    pub fn paths(&self, directories: &Directories, tree: Option<PathBuf>) -> Vec<PathBuf> {
        self.ordinary.iter().map(|id| directories.upper(*id)).chain(tree).collect()
    }
}

/// The mounts of a view or an active snapshot.
///
/// `lower` is topmost first; `overlay_options` are added to those of an overlay mount.
pub fn mounts(
    kind: Kind,
    id: SnapshotId,
    lower: &[PathBuf],
    directories: &Directories,
    overlay_options: &[String],
) -> Mount {
    let read_only = kind != Kind::Active;
    match lower {
        [] => bind(&directories.upper(id), read_only),
        [only] if read_only => bind(only, true),
        _ => {
            let mut options = Vec::new();
            if !read_only {
                options.push(format!("workdir={}", directories.work(id).display()));
                options.push(format!("upperdir={}", directories.upper(id).display()));
            }
            let lower: Vec<_> = lower.iter().map(|path| path.display().to_string()).collect();
            options.push(format!("lowerdir={}", lower.join(":")));
            options.extend_from_slice(overlay_options);
            Mount { r#type: "overlay".to_owned(), source: "overlay".to_owned(), target: String::new(), options }
        }
    }
}

fn bind(source: &Path, read_only: bool) -> Mount {
    Mount {
        r#type: "bind".to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec![if read_only { "ro" } else { "rw" }.to_owned(), "rbind".to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, IndexLocation, LazyLayer};

    use super::*;
    use crate::{
        names::{Labels, SnapshotKey, Time},
        records::{LazySnapshot, Usage},
    };

    fn id(number: u64) -> SnapshotId {
        serde_json::from_value(number.into()).unwrap()
    }

    fn snapshot(number: u64, lazy: bool) -> Snapshot {
        let now = Time { seconds: 0, nanos: 0 };
        let blob = Digest::of(&number.to_le_bytes());
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest: blob };
        let layer =
            RemoteLayer { layer: LazyLayer { blob, blob_len: 9, index, hot_len: 0 }, image: "h/r:t".to_owned() };
        Snapshot {
            key: SnapshotKey::new(number.to_string()).unwrap(),
            id: id(number),
            kind: Kind::Committed,
            parent: None,
            labels: Labels::new(),
            created: now,
            updated: now,
            usage: Usage::default(),
            lazy: lazy.then_some(LazySnapshot {
                layer,
                tree: blob,
                truth: Default::default(),
                truth_since: None,
                further_vouchers: Default::default(),
                signers: Default::default(),
                further_places: Vec::new(),
            }),
        }
    }

    fn check(kind: Kind, parents: &[(u64, bool)], expected_type: &str, expected_source: &str, expected: &[&str]) {
        let parents: Vec<_> = parents.iter().map(|(number, lazy)| snapshot(*number, *lazy)).collect();
        let directories = Directories::new(Path::new("/r"));
        let lower = Lower::new(&parents);
        let tree = (!lower.lazy.is_empty()).then(|| PathBuf::from("/r/tree"));
        let mount = mounts(kind, id(9), &lower.paths(&directories, tree), &directories, &["index=off".to_owned()]);
        let found = (mount.r#type.as_str(), mount.source.as_str());
        assert_eq!(found, (expected_type, expected_source), "{kind:?} {parents:?}");
        assert_eq!(mount.options, expected, "{kind:?} {parents:?}");
    }

    #[test]
    fn ordinary_layers_are_mounted_as_by_the_overlayfs_snapshotter() {
        let upper = ["workdir=/r/snapshots/9/work", "upperdir=/r/snapshots/9/fs"];
        let (one, two) = ("lowerdir=/r/snapshots/1/fs", "lowerdir=/r/snapshots/2/fs:/r/snapshots/1/fs");
        let parents = [(2, false), (1, false)];
        check(Kind::Active, &[], "bind", "/r/snapshots/9/fs", &["rw", "rbind"]);
        check(Kind::View, &[], "bind", "/r/snapshots/9/fs", &["ro", "rbind"]);
        check(Kind::Active, &parents[1..], "overlay", "overlay", &[upper[0], upper[1], one, "index=off"]);
        check(Kind::View, &parents[1..], "bind", "/r/snapshots/1/fs", &["ro", "rbind"]);
        check(Kind::Active, &parents, "overlay", "overlay", &[upper[0], upper[1], two, "index=off"]);
        check(Kind::View, &parents, "overlay", "overlay", &[two, "index=off"]);
    }

    #[test]
    fn lazy_layers_are_one_lower_directory_at_the_bottom() {
        let upper = ["workdir=/r/snapshots/9/work", "upperdir=/r/snapshots/9/fs"];
        let parents = [(4, false), (3, false), (2, true), (1, true)];
        let mixed = "lowerdir=/r/snapshots/4/fs:/r/snapshots/3/fs:/r/tree";
        check(
            Kind::Active,
            &parents[2..],
            "overlay",
            "overlay",
            &[upper[0], upper[1], "lowerdir=/r/tree", "index=off"],
        );
        check(Kind::View, &parents[2..], "bind", "/r/tree", &["ro", "rbind"]);
        check(Kind::Active, &parents, "overlay", "overlay", &[upper[0], upper[1], mixed, "index=off"]);
        check(Kind::View, &parents, "overlay", "overlay", &[mixed, "index=off"]);
    }

    #[test]
    fn lazy_layers_are_handed_over_lowest_first() {
        let lower = Lower::new(&[snapshot(3, false), snapshot(2, true), snapshot(1, true)]);
        let layers = [1, 2].map(|number| snapshot(number, true).lazy.unwrap().layer);
        assert_eq!(lower, Lower { ordinary: vec![id(3)], lazy: layers.into() });
    }
}
