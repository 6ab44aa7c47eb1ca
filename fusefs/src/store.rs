//! Merged trees on disk: made once, mapped ever after.
//!
//! For each tree a file `<hex ID>` with its bytes in open form and a file `<hex ID>.json` beside it, the
//! *record*: the tree's slot among the node numbers, and its layers. The record is written last, so a tree
//! without one does not exist. `next-slot` holds the slot for the next tree; it only grows. In kernel mode there is
//! a file `<hex ID>.erofs` too: the tree as an EROFS image, made from its bytes when it is first mounted.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use format_spec::Index;
use serde::{Deserialize, Serialize};
use storage::{create_private_directory, mapping::Map};
use tracing::warn;

use crate::{
    control::{RemoteLayer, TreeId},
    erofs,
    error::Error,
    number::Slot,
    tree,
};

const RECORD_SUFFIX: &str = ".json";
const IMAGE_SUFFIX: &str = ".erofs";
const NEXT_SLOT: &str = "next-slot";

/// The directory of trees.
#[derive(Debug)]
pub(crate) struct TreeStore {
    directory: PathBuf,
    next_slot: Mutex<u32>,
}

/// What is known about a tree besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeRecord {
    /// Its slot.
    slot: u32,
    /// Lowest first.
    pub(crate) layers: Vec<RemoteLayer>,
    /// Blocks of its regular files.
    block_count: u64,
}

/// A tree from the store.
#[derive(Debug)]
pub(crate) struct StoredTree {
    pub(crate) slot: Slot,
    pub(crate) index: Index<Map>,
    pub(crate) block_count: u64,
}

impl TreeStore {
    /// Opens the store, making it if needed.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn open(directory: PathBuf) -> Result<Self, Error> {
        create_private_directory(&directory).map_err(Error::disk(&directory))?;
        let store = Self { directory, next_slot: Mutex::new(Slot::FIRST.number()) };
        let mut next_slot = store.read_next_slot();
        for (_, record) in store.records()? {
            next_slot = next_slot.max(record.slot.saturating_add(1));
        }
        Ok(Self { next_slot: Mutex::new(next_slot), ..store })
    }

    fn read_next_slot(&self) -> u32 {
        let text = fs::read_to_string(self.directory.join(NEXT_SLOT));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(Slot::FIRST.number())
    }

    /// Every tree that the store knows; damaged records are left out.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed.
    pub(crate) fn records(&self) -> Result<Vec<(TreeId, TreeRecord)>, Error> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(Error::disk(&self.directory))? {
            let name = entry.map_err(Error::disk(&self.directory))?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(RECORD_SUFFIX));
            let Some(id) = hex.and_then(|hex| format!("sha256:{hex}").parse().ok()) else { continue };
            records.extend(self.record(id).map(|record| (id, record)));
        }
        records.sort_unstable_by_key(|(id, _)| *id);
        Ok(records)
    }

    fn record(&self, id: TreeId) -> Option<TreeRecord> {
        let path = self.record_path(id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(path = %path.display(), %error, "tree is made again");
                return None;
            }
        };
        serde_json::from_slice(&bytes).map_err(|error| warn!(path = %path.display(), %error, "tree is made again")).ok()
    }

    /// A tree that was made before; `None` if there is none, or if it is damaged.
    ///
    /// Takes constant time: the content was checked when it was made.
    ///
    /// # Errors
    ///
    /// [`Error::OtherLayers`] if its record names other layers.
    pub(crate) fn load(&self, id: TreeId, layers: &[RemoteLayer]) -> Result<Option<StoredTree>, Error> {
        let Some(record) = self.record(id) else { return Ok(None) };
        if !record.layers.iter().map(|layer| layer.layer.id()).eq(layers.iter().map(|layer| layer.layer.id())) {
            return Err(Error::OtherLayers(id));
        }
        let path = self.path(id);
        let opened = map(&path).map_err(|error| error.to_string()).and_then(|bytes| {
            let index = Index::open(bytes).map_err(|error| error.to_string())?;
            let slot = Slot::new(record.slot).ok_or("its slot is out of range")?;
            let is_ours = index.layers().eq(layers.iter().map(|layer| layer.layer.id()));
            if is_ours { Ok((index, slot)) } else { Err("it has other layers".to_owned()) }
        });
        match opened {
            Ok((index, slot)) => Ok(Some(StoredTree { slot, index, block_count: record.block_count })),
            Err(error) => {
                warn!(path = %path.display(), error, "tree is made again");
                Ok(None)
            }
        }
    }

    /// Keeps a new tree (open form, checked) and gives it a slot.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn create(&self, id: TreeId, layers: &[RemoteLayer], bytes: &[u8]) -> Result<StoredTree, Error> {
        let path = self.path(id);
        // Of what was there before.
        remove_if_there(&self.image_path(id))?;
        self.write(&path, |file| file.write_all(bytes))?;
        let mapped = map(&path).map_err(Error::disk(&path))?;
        let index = Index::open(mapped).map_err(|error| Error::Tree { path, error })?;
        let block_count = tree::block_count(&index);
        let slot = self.take_slot()?;
        let record = TreeRecord { slot: slot.number(), layers: layers.to_vec(), block_count };
        let record = serde_json::to_vec(&record).expect("a record has text keys only");
        self.write(&self.record_path(id), |file| file.write_all(&record))?;
        Ok(StoredTree { slot, index, block_count })
    }

    /// The EROFS image of a tree that the store has: made before, or now.
    ///
    /// # Errors
    ///
    /// When the tree cannot be an image, or the disk refuses.
    pub(crate) fn image(&self, id: TreeId, index: &Index<Map>) -> Result<PathBuf, Error> {
        let path = self.image_path(id);
        let layers: Vec<_> = index.layers().collect();
        match File::open(&path).and_then(|file| erofs::is_image_of(&file, &layers)) {
            Ok(true) => return Ok(path),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::Disk { path, error }),
            Ok(false) | Err(_) => {}
        }
        let mut refused = None;
        let written = self.write(&path, |file| match erofs::write_image(index, file) {
            Ok(_) => Ok(()),
            Err(erofs::WriteError::Io(error)) => Err(error),
            Err(error) => {
                refused = Some(error);
                Err(io::ErrorKind::Unsupported.into())
            }
        });
        match refused {
            Some(error) => Err(Error::Image(id, error)),
            None => written.map(|()| path),
        }
    }

    /// Deletes a tree; unknown ones are deleted already.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn remove(&self, id: TreeId) -> Result<(), Error> {
        [self.record_path(id), self.path(id), self.image_path(id)].iter().try_for_each(|path| remove_if_there(path))
    }

    /// The slot is taken on disk before anybody can see it.
    fn take_slot(&self) -> Result<Slot, Error> {
        let mut next_slot = self.next_slot.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.directory.join(NEXT_SLOT);
        let exhausted = || Error::Disk { path: path.clone(), error: io::Error::other("no slots are left") };
        let slot = Slot::new(*next_slot).ok_or_else(exhausted)?;
        let after = slot.number().checked_add(1).ok_or_else(exhausted)?;
        self.write(&path, |file| file.write_all(after.to_string().as_bytes()))?;
        *next_slot = after;
        Ok(slot)
    }

    /// All of it or nothing, and durable.
    fn write(&self, path: &Path, content: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            content(file.as_file_mut())?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(Error::disk(path))
    }

    fn path(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex())
    }

    fn record_path(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex() + RECORD_SUFFIX)
    }

    fn image_path(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex() + IMAGE_SUFFIX)
    }
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Disk { path: path.to_owned(), error }),
        _ => Ok(()),
    }
}

/// Sound, as files here are never opened for writing again after they were renamed into place.
fn map(path: &Path) -> io::Result<Map> {
    Map::of(&File::open(path)?)
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, IndexBuilder, IndexLocation, LazyLayer, builder::implicit_directory};

    use super::*;

    fn layers(blob: &[u8]) -> Vec<RemoteLayer> {
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 2, digest: Digest::of(b"index") };
        let layer = LazyLayer { blob: Digest::of(blob), blob_len: 1, index, hot_len: 0 };
        vec![RemoteLayer { layer, image: "host/repository:tag".to_owned() }]
    }

    fn tree(layers: &[RemoteLayer]) -> Vec<u8> {
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_directory(0, std::iter::empty::<(&[u8], u32)>()).unwrap();
        builder.finish_tree(&layers.iter().map(|layer| layer.layer.id()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn a_slot_is_never_given_again() {
        let directory = tempfile::tempdir().unwrap();
        let (id, layers) = (Digest::of(b"tree"), layers(b"blob"));
        for expected in 1..4 {
            let store = TreeStore::open(directory.path().join("trees")).unwrap();
            assert!(store.load(id, &layers).unwrap().is_none());
            assert_eq!(store.create(id, &layers, &tree(&layers)).unwrap().slot.number(), expected);
            assert_eq!(store.load(id, &layers).unwrap().unwrap().slot.number(), expected);
            store.remove(id).unwrap();
        }
    }

    #[test]
    fn a_tree_of_other_layers_is_not_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let store = TreeStore::open(directory.path().join("trees")).unwrap();
        let (id, layers) = (Digest::of(b"tree"), layers(b"blob"));
        store.create(id, &layers, &tree(&layers)).unwrap();
        let mut other = layers.clone();
        other[0].layer.index.digest = Digest::of(b"another index");
        assert!(matches!(store.load(id, &other), Err(Error::OtherLayers(_))));
        let elsewhere = vec![RemoteLayer { image: "mirror/repository:tag".to_owned(), ..layers[0].clone() }];
        assert!(store.load(id, &elsewhere).unwrap().is_some(), "the place to fetch from does not matter");
        let mut elsewhere = layers.clone();
        elsewhere[0].layer.blob = Digest::of(b"another blob with the same index");
        assert!(store.load(id, &elsewhere).unwrap().is_some(), "what counts is the index");
        assert_eq!(store.records().unwrap().len(), 1);
    }

    #[test]
    fn what_a_broken_off_write_leaves_is_no_tree() {
        let directory = tempfile::tempdir().unwrap();
        let store = TreeStore::open(directory.path().to_owned()).unwrap();
        let (id, layers) = (Digest::of(b"tree"), layers(b"blob"));
        store.create(id, &layers, &tree(&layers)).unwrap();
        let record = fs::read(store.record_path(id)).unwrap();
        for len in 0..record.len() {
            fs::write(store.record_path(id), &record[..len]).unwrap();
            assert!(store.load(id, &layers).unwrap().is_none(), "record of {len} bytes");
        }
        fs::write(store.record_path(id), &record).unwrap();
        fs::remove_file(store.path(id)).unwrap();
        assert!(store.load(id, &layers).unwrap().is_none());
    }
}
