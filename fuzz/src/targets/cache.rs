//! The cache directory of a layer after something damaged its files: what is read is right, or nothing is read.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Duration,
};

use bytes::Bytes;
use format_spec::{Index, LazyLayer};
use serde_json::json;
use storage::{Cache, CacheOptions, Layer};
use test_kit::HonestSource;
use tokio::runtime::Runtime;

use super::{choose, layer::convert};

/// Files of a layer's directory that changed bytes replace.
pub(crate) const FILES: [&str; 4] = ["layer.json", "index", "presence", "dedup"];

/// A layer, and its cache directory when all of it has arrived.
struct Pristine {
    blob: Bytes,
    layer: LazyLayer,
    space: Vec<u8>,
    files: Vec<(String, Vec<u8>)>,
    runtime: Runtime,
}

static PRISTINE: LazyLock<Pristine> = LazyLock::new(|| {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, len) in [("a", 5000), ("b", 1), ("c", 0), ("d", 300_000)] {
        let mut header = tar::Header::new_ustar();
        header.set_size(len);
        header.set_mode(0o644);
        let content: Vec<u8> = (0..len).map(|at| (at * at % 251).to_le_bytes()[0]).collect();
        builder.append_data(&mut header, path, content.as_slice()).expect("in memory");
    }
    let (_, layer, blob) = convert(&builder.into_inner().expect("in memory"), 1 << 20).expect("a tar stream");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(2)
        .enable_all()
        .build()
        .expect("threads are to be had");
    let mut pristine = Pristine { blob: blob.into(), layer, space: Vec::new(), files: Vec::new(), runtime };
    let root = directory();
    let cache = pristine.open(root.path());
    let layer = pristine.layer(&cache);
    pristine.space = read_all(&layer);
    cache.flush().expect("a disk");
    drop((layer, cache));
    let path = layer_directory(root.path(), &pristine.layer);
    pristine.files = fs::read_dir(path)
        .expect("the layer's directory")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file")))
        .collect();
    pristine
});

/// First byte: which file the rest replaces, or that `data` gets as long as the rest.
pub(crate) fn run(data: &[u8]) {
    let Some((which, rest)) = choose(data, 5) else { return };
    let pristine = &*PRISTINE;
    let root = directory();
    let path = layer_directory(root.path(), &pristine.layer);
    fs::create_dir_all(&path).expect("a disk");
    for (name, content) in &pristine.files {
        let is_damaged = FILES.get(usize::from(which)).is_some_and(|damaged| damaged == name);
        let cut = if which == 4 && name == "data" { rest.len().min(content.len()) } else { content.len() };
        fs::write(path.join(name), if is_damaged { rest } else { &content[..cut] }).expect("a disk");
    }
    let cache = pristine.open(root.path());
    cache.known_layers().expect("a directory");
    let layer = pristine.layer(&cache);
    if !passes_for_whole(which, rest, pristine) {
        assert!(
            read_all(&layer) == pristine.space,
            "{} is damaged and believed",
            FILES.get(usize::from(which)).unwrap_or(&"data")
        );
    }
}

/// Whether the bytes carry the right checksum of something else: no check of a local file tells.
fn passes_for_whole(which: u8, bytes: &[u8], pristine: &Pristine) -> bool {
    let is_original = pristine
        .files
        .iter()
        .any(|(name, content)| FILES.get(usize::from(which)) == Some(&name.as_str()) && content == bytes);
    !is_original
        && match which {
            1 => Index::open(bytes).is_ok_and(|index| index.check().is_ok()),
            2 => bytes
                .split_last_chunk::<4>()
                .is_some_and(|(content, crc32)| crc32fast::hash(content).to_le_bytes() == *crc32),
            _ => false,
        }
}

/// What stands in a file of the directory when all is well.
pub(crate) fn pristine_file(name: &str) -> Option<&'static [u8]> {
    PRISTINE.files.iter().find(|(file, _)| file == name).map(|(_, content)| content.as_slice())
}

impl Pristine {
    fn open(&self, root: &Path) -> Cache {
        let options = CacheOptions { flush_interval: Duration::from_secs(3600), ..CacheOptions::default() };
        Cache::open(root, self.runtime.handle().clone(), options).expect("a cache opens whatever is in it")
    }

    fn layer(&self, cache: &Cache) -> Layer {
        let source = HonestSource::new(self.blob.clone());
        self.runtime.block_on(cache.layer(&self.layer, source, json!("seed"))).expect("the source has everything")
    }
}

fn read_all(layer: &Layer) -> Vec<u8> {
    let len = usize::try_from(layer.index().space_len()).expect("small");
    layer.read(0, len).expect("the source has everything")
}

fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a temporary directory")
}

fn layer_directory(root: &Path, layer: &LazyLayer) -> PathBuf {
    root.join("layers").join(layer.id().hex())
}
