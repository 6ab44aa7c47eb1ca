//! The directory of one layer: its files, their names and how they are written.
//!
//! - `layer.json`: what names the layer and where it comes from.
//! - `index`: the index in open form.
//! - `data`: a sparse file that is the layer's plain address space.
//! - `presence`: what `data` holds ([`crate::disk::presence`]).
//! - `gaps`: the bytes of the tar stream that are no file content, until they were compared ([`crate::disk::gaps`]).
//! - `verdict`: whether the layer is what its tar stream says ([`crate::disk::proof`]).
//! - `dedup`: digests of what `data` holds or will, for other layers that have the same ([`crate::warm::dedup`]).
//!
//! All but `data` and `gaps` are replaced by rename, so a crash leaves the old or the new one. The directory is
//! made after the index was verified: whoever names a blob wrongly leaves nothing behind.
//!
//! The kernel may have a complete `data` mounted, also one that an earlier process gave away. So `data` is written in
//! place only as long as `presence` has never called it complete, and never shortened: content from the beginning
//! means a new file in its place.

use std::{
    fs,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use format_spec::{Digest, Index, LayerId, LazyLayer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    disk::{
        Disk, DiskFile,
        bitmap::Bitmap,
        is_lost,
        mapping::{FileChecksum, LayerIndex, Map},
        page_map::{PageMap, pages_of},
        presence::{Counts, PresenceBits},
        unpack::NewIndex,
        verdict::VerdictRecord,
    },
    fetch::places::PlaceRecord,
    sync::{Mutex, lock},
};

/// Extension of files that are not whole yet.
const TEMPORARY: &str = "new";

/// Content of `layer.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// The layer as the newest of its places has it.
    pub(crate) layer: LazyLayer,
    /// Where it comes from, in the words of the caller: the newest of its places.
    pub(crate) description: Value,
    /// Its other places, newest first. Files written before there were several do not have it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    older: Vec<Value>,
    /// The layer as each of `older` has it; nothing where all have it as the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    older_layers: Vec<LazyLayer>,
    /// Which of all places are held; 0 is the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    held: Vec<usize>,
}

impl LayerRecord {
    /// The record of a layer with these places, newest first; `layer` is what names it where there is none.
    pub(crate) fn new(layer: LazyLayer, places: Vec<PlaceRecord>) -> Self {
        let held = (0..).zip(&places).filter(|(_, place)| place.is_held).map(|(number, _)| number).collect();
        let mut places = places.into_iter().map(|place| (place.layer, place.description));
        let (layer, description) = places.next().unwrap_or((layer, Value::Null));
        let (mut older_layers, older): (Vec<_>, Vec<_>) = places.unzip();
        if older_layers.iter().all(|older| *older == layer) {
            older_layers.clear();
        }
        Self { layer, description, older, older_layers, held }
    }

    /// Its places in the words of the caller, newest first.
    pub(crate) fn descriptions(&self) -> impl Iterator<Item = &Value> {
        std::iter::once(&self.description).chain(&self.older)
    }

    /// All places, newest first.
    pub(crate) fn places(&self) -> impl Iterator<Item = PlaceRecord> {
        let is_same = |older: &&LazyLayer| older.id() == self.layer.id();
        let layer = move |number: usize| match number.checked_sub(1).and_then(|older| self.older_layers.get(older)) {
            Some(older) if is_same(&older) => *older,
            _ => self.layer,
        };
        (0..).zip(self.descriptions()).map(move |(number, description)| PlaceRecord {
            layer: layer(number),
            description: description.clone(),
            is_held: self.held.contains(&number),
        })
    }
}

/// A file with content from another one. The remains of one after an error go with the next opening.
#[derive(Debug)]
pub(crate) struct NewData {
    pub(crate) file: DiskFile,
    path: PathBuf,
}

/// The data of a layer to copy from. It stays readable when the layer is removed.
#[derive(Debug)]
pub(crate) struct CopySource {
    pub(crate) data: File,
    map: Arc<PageMap>,
    /// Those that are there.
    pages: Bitmap,
}

impl CopySource {
    /// Of a layer that has this map; `pages` are the words of the pages that are there.
    pub(crate) fn new(data: File, map: Arc<PageMap>, pages: Vec<u64>) -> Self {
        Self { data, map, pages: Bitmap::new(pages) }
    }

    /// Whether all content of the pages that a plain range touches is there.
    pub(crate) fn has(&self, plain: &Range<u64>) -> bool {
        self.pages.are_set(self.map.numbers(&pages_of(plain)))
    }
}

/// The directory of one layer. Clones know of each other's [`Self::bury`].
#[derive(Debug, Clone)]
pub(crate) struct LayerDirectory {
    path: PathBuf,
    disk: Disk,
    /// Whether the directory was moved away: then its name belongs to another one. Held while files get their names,
    /// not while content becomes durable.
    is_buried: Arc<Mutex<bool>>,
}

impl LayerDirectory {
    /// The directory at `path`, which need not exist.
    pub(crate) fn new(path: PathBuf, disk: Disk) -> Self {
        Self { path, disk, is_buried: Arc::default() }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the directory of this layer.
    pub(crate) fn is_of(&self, id: LayerId) -> bool {
        self.path.file_name().is_some_and(|name| *name == *id.hex())
    }

    /// Where `data` is.
    pub(crate) fn data_path(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Opens `gaps`; `None` if there is none.
    pub(crate) fn open_gaps(&self) -> io::Result<Option<DiskFile>> {
        self.open_writable("gaps")
    }

    /// Makes `gaps`, which is not there.
    pub(crate) fn create_gaps(&self) -> io::Result<DiskFile> {
        let is_buried = lock(&self.is_buried);
        if *is_buried {
            return Err(io::Error::other("layer was removed"));
        }
        self.disk.create(&self.path.join("gaps"))
    }

    /// Removes `gaps`, unless the directory was moved away.
    pub(crate) fn remove_gaps(&self) -> io::Result<()> {
        let is_buried = lock(&self.is_buried);
        if *is_buried { Ok(()) } else { self.disk.remove_if_there(&self.path.join("gaps")) }
    }

    /// Reads `verdict`; `None` if it is missing or damaged.
    pub(crate) fn read_verdict(&self) -> io::Result<Option<VerdictRecord>> {
        let bytes = self.read("verdict")?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Whether a `verdict` refuses the layer.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.read_verdict(), Ok(Some(record)) if record.is_refusal())
    }

    /// Writes `verdict`; the content that it speaks of is durable.
    pub(crate) fn write_verdict(&self, record: &VerdictRecord) -> io::Result<()> {
        self.replace(&[("verdict", &serde_json::to_vec(record)?)])
    }

    /// Makes the directory if it is not there.
    pub(crate) fn create(&self) -> io::Result<()> {
        if self.path.exists() {
            return Ok(());
        }
        self.disk.make_directory(&self.path)?;
        self.path.parent().map_or(Ok(()), |parent| self.disk.sync_directory(parent))
    }

    /// Reads `layer.json`; `None` if it is missing or damaged.
    pub(crate) fn read_record(&self) -> io::Result<Option<LayerRecord>> {
        let bytes = self.read("layer.json")?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Writes `layer.json`, unless that is what it says.
    pub(crate) fn write_record(&self, record: &LayerRecord) -> io::Result<()> {
        if self.read_record()?.as_ref() == Some(record) {
            return Ok(());
        }
        self.replace(&[("layer.json", &serde_json::to_vec(record)?)])
    }

    /// Maps `index`; `None` if it is missing or damaged.
    pub(crate) fn open_index(&self) -> io::Result<Option<LayerIndex>> {
        let Some(file) = self.open_index_file()? else { return Ok(None) };
        // The check reads every page; its map goes away with it, so that they do not count as ours afterwards.
        let is_whole = Index::open(Map::of(&file)?).is_ok_and(|index| index.check().is_ok());
        if !is_whole {
            return Ok(None);
        }
        Ok(Index::open(Map::of(&file)?).ok())
    }

    /// Opens `index`, every byte of which can be read; `None` if it is missing or lost.
    fn open_index_file(&self) -> io::Result<Option<File>> {
        let path = self.path.join("index");
        let opened = self.disk.open_if_there(&path).and_then(|file| match file {
            Some(file) if file.metadata()?.len() > 0 => {
                // Through a map an unreadable block would end the process.
                FileChecksum::of(&file)?;
                Ok(Some(file))
            }
            _ => Ok(None),
        });
        unless_lost(&path, opened)
    }

    /// Writes `layer.json`, and gives `index` its name: it was verified to be the index that the record names.
    pub(crate) fn place_index(&self, record: &LayerRecord, index: NewIndex) -> io::Result<LayerIndex> {
        let NewIndex { index, mut file } = index;
        self.replace_and_move(&[("layer.json", &serde_json::to_vec(record)?)], &[(&file.path, "index")])?;
        file.is_named = true;
        Ok(index)
    }

    /// Opens `data` with this length, and what `presence` says is in it.
    ///
    /// Where `presence` does not fit, nothing is known of `data`, and a new file takes its place.
    pub(crate) fn open_data(
        &self,
        space_len: u64,
        counts: Counts,
        index: &Digest,
    ) -> io::Result<(DiskFile, PresenceBits)> {
        self.remove_temporary()?;
        let bits = self.read_presence(counts, index)?;
        if let Some(bits) = bits
            && let Some(data) = self.open_writable("data")?
            && data.len()? == space_len
        {
            return Ok((data, bits));
        }
        // Should the machine go down in between, checksums tell that `presence` speaks of another file.
        self.disk.remove_if_there(&self.path.join("presence"))?;
        self.disk.remove_if_there(&self.data_path())?;
        let data = self.disk.create(&self.data_path())?;
        data.set_len(space_len)?;
        Ok((data, PresenceBits::empty(counts)))
    }

    /// The bits in `presence`; `None` where it does not fit.
    pub(crate) fn read_presence(&self, counts: Counts, index: &Digest) -> io::Result<Option<PresenceBits>> {
        Ok(self.read("presence")?.and_then(|bytes| PresenceBits::decode(&bytes, counts, index)))
    }

    /// The file `presence`, whose bytes [`Self::read_presence`] has compared.
    pub(crate) fn open_presence(&self) -> io::Result<Option<File>> {
        self.disk.open_if_there(&self.path.join("presence"))
    }

    /// A file that may become `data`.
    pub(crate) fn new_data(&self, space_len: u64) -> io::Result<NewData> {
        let path = self.temporary("data");
        let file = self.disk.create(&path)?;
        let new = NewData { file, path };
        new.file.set_len(space_len)?;
        Ok(new)
    }

    /// Puts a file whose content is durable in the place of `data`. The record of that in `presence` goes first.
    pub(crate) fn replace_data(&self, new: NewData) -> io::Result<DiskFile> {
        let is_buried = lock(&self.is_buried);
        if *is_buried {
            return Err(io::Error::other("layer was removed"));
        }
        self.disk.remove_if_there(&self.path.join("presence"))?;
        self.disk.rename(&new.path, &self.data_path())?;
        Ok(new.file)
    }

    fn open_writable(&self, name: &str) -> io::Result<Option<DiskFile>> {
        match self.disk.open_writable(&self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        }
    }

    /// Writes `presence`; the data of every set bit is durable.
    pub(crate) fn write_presence(&self, bits: &PresenceBits, counts: Counts, index: &Digest) -> io::Result<()> {
        self.replace(&[("presence", &bits.encode(counts, index))])
    }

    /// Opens `data` and `presence` of a layer that is not open, to copy from; `None` where they are missing or damaged.
    pub(crate) fn copy_source(&self) -> io::Result<Option<CopySource>> {
        let Some(record) = self.read_record()? else { return Ok(None) };
        // Not checked, which would take long: a damaged one points at other bytes, and those are not copied.
        let Some(index) = self.open_index_file()? else { return Ok(None) };
        let Ok(index) = Index::open(Map::of(&index)?) else { return Ok(None) };
        let map = Arc::new(PageMap::of(&index));
        let bits = self.read_presence(Counts::of(&index, &map), &record.layer.index.digest)?;
        let (Some(bits), Some(data)) = (bits, self.disk.open_if_there(&self.data_path())?) else { return Ok(None) };
        Ok(Some(CopySource::new(data, map, bits.pages)))
    }

    /// Opens `dedup`, if it is there.
    pub(crate) fn open_dedup(&self) -> io::Result<Option<File>> {
        self.disk.open_if_there(&self.path.join("dedup"))
    }

    /// Writes `dedup`.
    pub(crate) fn write_dedup(&self, content: &[u8]) -> io::Result<()> {
        self.replace(&[("dedup", content)])
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let path = self.path.join(name);
        unless_lost(&path, self.disk.read_if_there(&path))
    }

    /// Replaces files, each so that a crash leaves the old or the new content; all are durable on return. Nothing happens
    /// where the directory was moved away.
    fn replace(&self, files: &[(&str, &[u8])]) -> io::Result<()> {
        self.replace_and_move(files, &[])
    }

    /// The same, and moves files here whose content is durable.
    fn replace_and_move(&self, files: &[(&str, &[u8])], moved: &[(&Path, &str)]) -> io::Result<()> {
        let files: Vec<_> = files.iter().map(|(name, bytes)| (self.temporary(name), *name, *bytes)).collect();
        let write = |(temporary, _, bytes): &(PathBuf, &str, &[u8])| {
            let file = self.disk.create(temporary)?;
            file.write_all_at(bytes, 0)?;
            file.sync_data()
        };
        let replaced = files.iter().try_for_each(write).and_then(|()| {
            let is_buried = lock(&self.is_buried);
            if *is_buried {
                return Err(io::ErrorKind::NotFound.into());
            }
            let renamed = files.iter().map(|(temporary, name, _)| (temporary.as_path(), *name));
            let mut renamed = renamed.chain(moved.iter().copied());
            renamed.try_for_each(|(from, name)| self.disk.rename(from, &self.path.join(name)))?;
            drop(is_buried);
            self.disk.sync_directory(&self.path)
        });
        if replaced.is_err() {
            for (temporary, ..) in &files {
                // Best effort: the error that counts is there already, and the next opening tries again.
                let _ = self.disk.remove_if_there(temporary);
            }
        }
        match replaced {
            // Moved away, and deleted perhaps.
            Err(error) if error.kind() == io::ErrorKind::NotFound && *lock(&self.is_buried) => Ok(()),
            replaced => replaced,
        }
    }

    /// Removes what an earlier process did not bring to its name.
    fn remove_temporary(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == TEMPORARY) {
                self.disk.remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    /// A name that no other file has, not of an earlier process either.
    fn temporary(&self, name: &str) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed))
            .map(|number| self.path.join(format!("{name}.{number}.{TEMPORARY}")))
            .find(|path| !path.exists())
            .expect("numbers do not end")
    }

    /// Bytes that the files take on disk; 0 without a directory.
    pub(crate) fn usage_bytes(&self) -> io::Result<u64> {
        /// Unit of `st_blocks` (`stat(2)`).
        const BLOCK_LEN: u64 = 512;
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries?,
        };
        let mut blocks = 0;
        for entry in entries {
            match entry?.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                metadata => blocks += metadata?.blocks(),
            }
        }
        Ok(blocks * BLOCK_LEN)
    }

    /// Moves the directory to `graveyard` in one step, to be deleted there; `None` if there is none. Nothing is written
    /// under its name afterwards.
    ///
    /// Deleted in place, a crash in between could leave a `presence` that speaks of a `data` that is gone.
    pub(crate) fn bury(&self, graveyard: &Path) -> io::Result<Option<PathBuf>> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let grave = (0u64..).map(|number| graveyard.join(format!("{name}.{number}"))).find(|path| !path.exists());
        let grave = grave.expect("there is always a free number");
        let mut is_buried = lock(&self.is_buried);
        match self.disk.rename(&self.path, &grave) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                *is_buried = true;
                Ok(None)
            }
            Err(error) => Err(error),
            Ok(()) => {
                *is_buried = true;
                drop(is_buried);
                self.path.parent().map_or(Ok(()), |parent| self.disk.sync_directory(parent))?;
                Ok(Some(grave))
            }
        }
    }
}

/// A file that the disk has lost counts as missing.
fn unless_lost<T>(path: &Path, read: io::Result<Option<T>>) -> io::Result<Option<T>> {
    match read {
        Err(error) if is_lost(&error) => {
            tracing::warn!(path = %path.display(), %error, "file cannot be read: made again");
            Ok(None)
        }
        read => read,
    }
}
