//! The directory of one layer: its files, their names and how they are written.
//!
//! - `layer.json`: what names the layer and where it comes from.
//! - `index`: the index in open form.
//! - `data`: a sparse file that is the layer's plain address space.
//! - `presence`: what `data` holds ([`crate::presence`]).
//! - `gaps`: the bytes of the tar stream that are no file content, until they were compared ([`crate::gaps`]).
//! - `verdict`: whether the layer is what its tar stream says ([`crate::proof`]).
//! - `dedup`: digests of what `data` holds or will, for other layers that have the same ([`crate::dedup`]).
//!
//! All but `data` and `gaps` are replaced by rename, so a crash leaves the old or the new one. The directory is
//! made after the index was verified: whoever names a blob wrongly leaves nothing behind.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use format_spec::{Digest, Index, LazyLayer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    dedup::CopySource,
    layer::LayerIndex,
    mapping::Map,
    presence::{Counts, PresenceBits},
    proof::VerdictRecord,
};

/// Only the daemon's user reads the cache.
const DIRECTORY_MODE: u32 = 0o700;

/// Content of `layer.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// What names the layer.
    pub(crate) layer: LazyLayer,
    /// Where it comes from, in the words of the caller.
    pub(crate) description: Value,
}

/// The directory of one layer.
#[derive(Debug, Clone)]
pub(crate) struct LayerDirectory {
    path: PathBuf,
}

impl LayerDirectory {
    /// The directory at `path`, which need not exist.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where `data` is.
    pub(crate) fn data_path(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Where `gaps` is.
    pub(crate) fn gaps_path(&self) -> PathBuf {
        self.path.join("gaps")
    }

    /// Reads `verdict`; `None` if it is missing or damaged.
    pub(crate) fn read_verdict(&self) -> io::Result<Option<VerdictRecord>> {
        let bytes = read_if_there(&self.path.join("verdict"))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Whether a `verdict` refuses the layer.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.read_verdict(), Ok(Some(record)) if record.is_refusal())
    }

    /// Writes `verdict`; the content that it speaks of is durable.
    pub(crate) fn write_verdict(&self, record: &VerdictRecord) -> io::Result<()> {
        write_atomically(&self.path.join("verdict"), &serde_json::to_vec(record)?)
    }

    /// Makes the directory if it is not there.
    pub(crate) fn create(&self) -> io::Result<()> {
        create_private_directory(&self.path)
    }

    /// Reads `layer.json`; `None` if it is missing or damaged.
    pub(crate) fn read_record(&self) -> io::Result<Option<LayerRecord>> {
        let bytes = read_if_there(&self.path.join("layer.json"))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Writes `layer.json`.
    pub(crate) fn write_record(&self, record: &LayerRecord) -> io::Result<()> {
        write_atomically(&self.path.join("layer.json"), &serde_json::to_vec(record)?)
    }

    /// Maps `index`; `None` if it is missing or damaged.
    pub(crate) fn open_index(&self) -> io::Result<Option<LayerIndex>> {
        let file = match File::open(self.path.join("index")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        if file.metadata()?.len() == 0 {
            return Ok(None);
        }
        // The check reads every page; its map goes away with it, so that they do not count as ours afterwards.
        let is_whole = Index::open(Map::of(&file)?).is_ok_and(|index| index.check().is_ok());
        if !is_whole {
            return Ok(None);
        }
        Ok(Index::open(Map::of(&file)?).ok())
    }

    /// Writes `layer.json` and `index`; `open_form` was verified to be the index that the record names.
    ///
    /// An older `index` goes first: at no moment stands one beside a record that names another.
    pub(crate) fn write_index(&self, record: &LayerRecord, open_form: &[u8]) -> io::Result<()> {
        remove_if_there(&self.path.join("index"))?;
        sync_directory(&self.path)?;
        self.write_record(record)?;
        write_atomically(&self.path.join("index"), open_form)
    }

    /// Opens `data` with this length, and what `presence` says is in it.
    ///
    /// A `data` that is new or has another length holds nothing, whatever `presence` says.
    pub(crate) fn open_data(&self, space_len: u64, counts: Counts, index: &Digest) -> io::Result<(File, PresenceBits)> {
        let presence_path = self.path.join("presence");
        let data = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.data_path())?;
        let bits = read_if_there(&presence_path)?.and_then(|bytes| PresenceBits::decode(&bytes, counts, index));
        if let Some(bits) = bits.filter(|_| data.metadata().is_ok_and(|metadata| metadata.len() == space_len)) {
            return Ok((data, bits));
        }
        remove_if_there(&presence_path)?;
        sync_directory(&self.path)?;
        data.set_len(0)?;
        data.set_len(space_len)?;
        Ok((data, PresenceBits::empty(counts)))
    }

    /// Writes `presence`; the data of every set bit is durable.
    pub(crate) fn write_presence(&self, bits: &PresenceBits, counts: Counts, index: &Digest) -> io::Result<()> {
        write_atomically(&self.path.join("presence"), &bits.encode(counts, index))
    }

    /// Opens `data` and `presence` of a layer that is not open, to copy from; `None` where they are missing or damaged.
    pub(crate) fn copy_source(&self) -> io::Result<Option<CopySource>> {
        let Some(record) = self.read_record()? else { return Ok(None) };
        let (Some(bytes), Some(data)) = (read_if_there(&self.path.join("presence"))?, self.open_if_there("data")?)
        else {
            return Ok(None);
        };
        let bits = PresenceBits::decode_any(&bytes, &record.layer.index.digest);
        Ok(bits.map(|(_, bits)| CopySource { data, pages: bits.pages }))
    }

    /// Opens `dedup`, if it is there.
    pub(crate) fn open_dedup(&self) -> io::Result<Option<File>> {
        self.open_if_there("dedup")
    }

    /// Writes `dedup`.
    pub(crate) fn write_dedup(&self, content: &[u8]) -> io::Result<()> {
        write_atomically(&self.path.join("dedup"), content)
    }

    fn open_if_there(&self, name: &str) -> io::Result<Option<File>> {
        match File::open(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        }
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

    /// Moves the directory to `graveyard` in one step, to be deleted there; `None` if there is none.
    ///
    /// Deleted in place, a crash in between could leave a `presence` that speaks of a `data` that is gone.
    pub(crate) fn bury(&self, graveyard: &Path) -> io::Result<Option<PathBuf>> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let grave = (0u64..).map(|number| graveyard.join(format!("{name}.{number}"))).find(|path| !path.exists());
        let grave = grave.expect("there is always a free number");
        match fs::rename(&self.path, &grave) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            renamed => renamed.map(|()| Some(grave)),
        }
    }
}

/// Makes a directory and its parents, for the daemon's user only. One that is there stays as it is.
///
/// # Errors
///
/// When the disk refuses.
pub fn create_private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)
}

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        bytes => bytes.map(Some),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Replaces a file so that a crash leaves the old or the new content, and this one is durable on return.
fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
