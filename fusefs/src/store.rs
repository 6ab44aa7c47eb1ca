//! Merged trees on disk: made once, mapped ever after.
//!
//! For each tree a file `<hex ID>` with its bytes in open form and a file `<hex ID>.json` beside it, the
//! *record*: the tree's slot among the node numbers, and its layers. The record is written last, so a tree
//! without one does not exist. `next-slot` holds the slot for the next tree; it only grows. In kernel mode there is
//! a file `<hex ID>.erofs` too: the tree as an EROFS image, made from its bytes when it is first mounted.
//!
//! Bytes and image are read whole and compared with a checksum before they are used: that of the bytes is in the
//! record, that of the image in `<hex ID>.erofs-sum`. A file that the disk has changed or lost is made again, in a new
//! file and for the same slot, so that node numbers stay.
//!
//! Every file is durable before it gets its name, and the names are before anybody hears of tree or image
//! (`store_order_tests.rs`). A removal may be undone by a machine that goes down: then the tree goes as one that nobody
//! knows.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use ::tree::erofs;
use control::{RemoteLayer, TreeId};
use format_spec::{Extent, Index, LayerId};
use serde::{Deserialize, Serialize};
use storage::disk::{
    Disk, DiskFile,
    mapping::{FileChecksum, Map},
};
use tracing::warn;

use crate::{error::Error, number::Slot, sync::lock, tree};

const RECORD_SUFFIX: &str = ".json";
const IMAGE_SUFFIX: &str = ".erofs";
const IMAGE_CHECKSUM_SUFFIX: &str = ".erofs-sum";
const NEXT_SLOT: &str = "next-slot";
/// Of files that are not whole yet.
const TEMPORARY_SUFFIX: &str = ".new";

/// The directory of trees.
#[derive(Debug)]
pub(crate) struct TreeStore {
    directory: PathBuf,
    disk: Disk,
    next_slot: Mutex<u32>,
    /// Trees whose image this process has made or compared.
    known_images: Mutex<HashSet<TreeId>>,
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
    /// Of its bytes; an older version kept none, and the tree is made again.
    checksum: Option<FileChecksum>,
}

/// A tree from the store.
#[derive(Debug)]
pub(crate) struct StoredTree {
    pub(crate) slot: Slot,
    pub(crate) index: Index<Map>,
    pub(crate) block_count: u64,
}

impl TreeStore {
    /// Opens the store, making it if needed; files are changed through `disk`.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn open(directory: PathBuf, disk: Disk) -> Result<Self, Error> {
        disk.make_directory(&directory).map_err(Error::disk(&directory))?;
        let next_slot = Mutex::new(Slot::FIRST.number());
        let store = Self { directory, disk, next_slot, known_images: Mutex::default() };
        store.remove_temporary().map_err(Error::disk(&store.directory))?;
        let mut next_slot = store.read_next_slot();
        for (_, record) in store.records()? {
            next_slot = next_slot.max(record.slot.saturating_add(1));
        }
        Ok(Self { next_slot: Mutex::new(next_slot), ..store })
    }

    /// Removes the files that an earlier process did not bring to their names.
    fn remove_temporary(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(TEMPORARY_SUFFIX) {
                self.disk.remove_if_there(&path)?;
            }
        }
        Ok(())
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
    /// Compares all its bytes with their checksum; what they mean was checked when they were made.
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
        let opened = map_checked(&path, record.checksum).and_then(|bytes| {
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

    /// Keeps a tree (open form, checked) and gives it a slot: that of its record, if it was there before.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn create(&self, id: TreeId, layers: &[RemoteLayer], bytes: &[u8]) -> Result<StoredTree, Error> {
        let path = self.path(id);
        // Of what was there before.
        self.remove_image(id)?;
        let slot = match self.record(id).and_then(|record| Slot::new(record.slot)) {
            Some(slot) => slot,
            None => self.take_slot()?,
        };
        self.write(&path, |file| file.write_all_at(bytes, 0))?;
        let mapped = map(&path).map_err(Error::disk(&path))?;
        let checksum = Some(FileChecksum::of_bytes(bytes));
        let index = Index::open(mapped).map_err(|error| Error::Tree { path, error })?;
        let block_count = tree::block_count(&index);
        let record = TreeRecord { slot: slot.number(), layers: layers.to_vec(), block_count, checksum };
        let record = serde_json::to_vec(&record).expect("a record has text keys only");
        self.write(&self.record_path(id), |file| file.write_all_at(&record, 0))?;
        self.sync_names()?;
        Ok(StoredTree { slot, index, block_count })
    }

    /// The EROFS image of a tree that the store has: made before, or now; `extents` are those of its layers.
    ///
    /// # Errors
    ///
    /// When the tree cannot be an image, or the disk refuses.
    pub(crate) fn image(&self, id: TreeId, index: &Index<Map>, extents: &[&[Extent]]) -> Result<PathBuf, Error> {
        if let Some(path) = self.known_image(id, index) {
            return Ok(path);
        }
        let path = self.image_path(id);
        self.remove_image(id)?;
        let (mut refused, mut checksum) = (None, None);
        let written =
            self.write(&path, |file| match erofs::write_sparse_image(index, extents, Writer { file, len: 0 }) {
                Ok(_) => {
                    checksum = Some(FileChecksum::of(&file.try_clone()?)?);
                    Ok(())
                }
                Err(erofs::WriteError::Io(error)) => Err(error),
                Err(error) => {
                    refused = Some(error);
                    Err(io::ErrorKind::Unsupported.into())
                }
            });
        // After the image: who finds it finds an image.
        let written = written.and_then(|()| {
            let checksum = serde_json::to_vec(&checksum).expect("two numbers");
            self.write(&self.image_checksum_path(id), |file| file.write_all_at(&checksum, 0))?;
            self.sync_names()?;
            lock(&self.known_images).insert(id);
            Ok(())
        });
        match refused {
            Some(error) => Err(Error::Image(id, error)),
            None => written.map(|()| path),
        }
    }

    /// The EROFS image of a tree if it was made before.
    pub(crate) fn known_image(&self, id: TreeId, index: &Index<Map>) -> Option<PathBuf> {
        let layers: Vec<_> = index.layers().collect();
        self.is_image_whole(id, &layers).then(|| self.image_path(id))
    }

    /// Whether the image of a tree is there, of these layers, and what was written; one that cannot be read is not.
    fn is_image_whole(&self, id: TreeId, layers: &[LayerId]) -> bool {
        let path = self.image_path(id);
        let compare = || -> io::Result<bool> {
            let file = File::open(&path)?;
            if !erofs::is_image_of(&file, layers)? {
                return Ok(false);
            }
            if lock(&self.known_images).contains(&id) {
                return Ok(true);
            }
            let expected: Option<FileChecksum> =
                serde_json::from_slice(&fs::read(self.image_checksum_path(id))?).map_err(io::Error::other)?;
            Ok(expected == Some(FileChecksum::of(&file)?))
        };
        match compare() {
            Ok(true) => {
                lock(&self.known_images).insert(id);
                true
            }
            Ok(false) => {
                warn!(path = %path.display(), "image is made again: it is not what was written");
                false
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => {
                warn!(path = %path.display(), %error, "image is made again");
                false
            }
        }
    }

    fn remove_image(&self, id: TreeId) -> Result<(), Error> {
        lock(&self.known_images).remove(&id);
        self.remove_if_there(&self.image_checksum_path(id))?;
        self.remove_if_there(&self.image_path(id))
    }

    fn remove_if_there(&self, path: &Path) -> Result<(), Error> {
        self.disk.remove_if_there(path).map_err(Error::disk(path))
    }

    /// Deletes a tree; unknown ones are deleted already.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn remove(&self, id: TreeId) -> Result<(), Error> {
        self.remove_if_there(&self.record_path(id))?;
        self.remove_if_there(&self.path(id))?;
        self.remove_image(id)
    }

    /// The slot is taken on disk before anybody can see it: with the names of the tree that gets it.
    fn take_slot(&self) -> Result<Slot, Error> {
        let mut next_slot = lock(&self.next_slot);
        let path = self.directory.join(NEXT_SLOT);
        let exhausted = || Error::Disk { path: path.clone(), error: io::Error::other("no slots are left") };
        let slot = Slot::new(*next_slot).ok_or_else(exhausted)?;
        let after = slot.number().checked_add(1).ok_or_else(exhausted)?;
        self.write(&path, |file| file.write_all_at(after.to_string().as_bytes(), 0))?;
        *next_slot = after;
        Ok(slot)
    }

    /// All of it or nothing, and durable, but for the name: that takes [`Self::sync_names`].
    fn write(&self, path: &Path, content: impl FnOnce(&DiskFile) -> io::Result<()>) -> Result<(), Error> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(TEMPORARY_SUFFIX);
        let temporary = PathBuf::from(temporary);
        let write = || -> io::Result<()> {
            // Of an attempt that failed.
            self.disk.remove_if_there(&temporary)?;
            let file = self.disk.create(&temporary)?;
            content(&file)?;
            file.sync_data()?;
            self.disk.rename(&temporary, path)
        };
        write().map_err(|error| {
            // Best effort: the error that counts is there already.
            let _ = self.disk.remove_if_there(&temporary);
            Error::Disk { path: path.to_owned(), error }
        })
    }

    /// Files keep their names from now on.
    fn sync_names(&self) -> Result<(), Error> {
        self.disk.sync_directory(&self.directory).map_err(Error::disk(&self.directory))
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

    fn image_checksum_path(&self, id: TreeId) -> PathBuf {
        self.directory.join(id.hex() + IMAGE_CHECKSUM_SUFFIX)
    }
}

/// Appends to a file.
struct Writer<'a> {
    file: &'a DiskFile,
    len: u64,
}

impl io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.len)?;
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sound, as files here are never opened for writing again after they were renamed into place.
fn map(path: &Path) -> io::Result<Map> {
    Map::of(&File::open(path)?)
}

/// Maps a file whose bytes were compared with their checksum; else says why not.
fn map_checked(path: &Path, expected: Option<FileChecksum>) -> Result<Map, String> {
    let open = || -> io::Result<(File, FileChecksum)> {
        let file = File::open(path)?;
        let found = FileChecksum::of(&file)?;
        Ok((file, found))
    };
    let (file, found) = open().map_err(|error| error.to_string())?;
    if expected != Some(found) {
        return Err("its bytes are not those that were written".to_owned());
    }
    Map::of(&file).map_err(|error| error.to_string())
}

#[cfg(test)]
#[path = "store_order_tests.rs"]
mod order_tests;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use format_spec::{Digest, IndexBuilder, IndexLocation, LazyLayer, builder::implicit_directory};

    use super::*;

    pub(super) fn layers(blob: &[u8]) -> Vec<RemoteLayer> {
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 2, digest: Digest::of(b"index") };
        let layer = LazyLayer { blob: Digest::of(blob), blob_len: 1, index, hot_len: 0 };
        vec![RemoteLayer { layer, image: "host/repository:tag".to_owned() }]
    }

    pub(super) fn tree(layers: &[RemoteLayer]) -> Vec<u8> {
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
            let store = TreeStore::open(directory.path().join(control::root::TREES), Disk::default()).unwrap();
            assert!(store.load(id, &layers).unwrap().is_none());
            assert_eq!(store.create(id, &layers, &tree(&layers)).unwrap().slot.number(), expected);
            assert_eq!(store.load(id, &layers).unwrap().unwrap().slot.number(), expected);
            store.remove(id).unwrap();
        }
    }

    #[test]
    fn a_tree_of_other_layers_is_not_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let store = TreeStore::open(directory.path().join(control::root::TREES), Disk::default()).unwrap();
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

    /// Flips one bit of a file, as a disk does: in the same inode.
    fn flip(path: &Path, position: u64) {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, position).unwrap();
        file.write_all_at(&[byte[0] ^ 1], position).unwrap();
    }

    #[test]
    fn a_tree_with_a_flipped_bit_is_made_again_under_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let store = TreeStore::open(directory.path().to_owned(), Disk::default()).unwrap();
        let (id, layers) = (Digest::of(b"tree"), layers(b"blob"));
        let bytes = tree(&layers);
        let slot = store.create(id, &layers, &bytes).unwrap().slot.number();
        for position in (0..bytes.len() as u64).step_by(31) {
            flip(&store.path(id), position);
            assert!(store.load(id, &layers).unwrap().is_none(), "byte {position}");
            assert_eq!(store.create(id, &layers, &bytes).unwrap().slot.number(), slot);
            assert_eq!(store.load(id, &layers).unwrap().unwrap().slot.number(), slot);
        }
    }

    #[test]
    fn an_image_with_a_flipped_bit_is_made_again_in_a_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let (id, layers) = (Digest::of(b"tree"), layers(b"blob"));
        let image = || {
            // A new process: one that has made or compared an image does not do it again.
            let store = TreeStore::open(directory.path().to_owned(), Disk::default()).unwrap();
            let stored = match store.load(id, &layers).unwrap() {
                Some(stored) => stored,
                None => store.create(id, &layers, &tree(&layers)).unwrap(),
            };
            store.image(id, &stored.index, &[]).unwrap()
        };
        let path = image();
        let (right, inode) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().ino());
        assert_eq!(fs::metadata(image()).unwrap().ino(), inode, "nothing is wrong with it");
        for position in (0..right.len() as u64).step_by(997) {
            flip(&path, position);
            let mounted = File::open(&path).unwrap();
            let new = image();
            assert!(fs::read(new).unwrap() == right, "byte {position}");
            let mut old = vec![0; right.len()];
            mounted.read_exact_at(&mut old, 0).unwrap();
            assert!(old != right, "a file that may be mounted was written to");
        }
    }

    #[test]
    fn what_a_broken_off_write_leaves_is_no_tree() {
        let directory = tempfile::tempdir().unwrap();
        let store = TreeStore::open(directory.path().to_owned(), Disk::default()).unwrap();
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
