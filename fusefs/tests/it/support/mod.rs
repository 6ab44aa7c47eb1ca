//! Small layers made in memory, and a source that serves them and can be made to lie.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "only tests use it")]

pub mod daemon;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use control::{RemoteLayer, TreeId, tree_id};
use format_spec::{
    Digest, Extent, IndexBuilder, Inode, LayerData, LazyLayer,
    builder::{blank_inode, implicit_directory},
    records::{PLAIN_ALIGN, WHITEOUT, flag, mode},
};
use fusefs::SourceFactory;
use storage::{FetchFuture, FetchWideFuture, Source, SourceError, WideStream};
pub use test_kit::noise;
use test_kit::{BlobParts, Frames};
use tokio::sync::watch;

/// Frames are this long, so that files have several.
const FRAME_LEN: usize = 16 << 10;
/// Blocks of a tar stream.
const TAR_BLOCK_LEN: usize = 512;
/// What every layer is said to come from.
pub const IMAGE: &str = "registry.example.com/image:tag";

/// What stands under a path.
#[derive(Debug, Clone)]
pub enum Kind {
    Directory,
    Opaque,
    File(Vec<u8>),
    /// A file of this length with content at these offsets, which are multiples of 4096, ascending.
    Sparse(u64, Vec<(u64, Vec<u8>)>),
    Symlink(&'static str),
    /// Another name of a path of this layer.
    HardLink(&'static str),
    Character(u32, u32),
    Fifo,
    Whiteout,
}

/// An entry of a layer.
#[derive(Debug, Clone)]
pub struct Entry {
    pub kind: Kind,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub xattrs: Vec<(&'static str, Vec<u8>)>,
}

impl Entry {
    pub fn new(kind: Kind) -> Self {
        let mode = if matches!(kind, Kind::Directory | Kind::Opaque) { 0o755 } else { 0o644 };
        Self { kind, mode, owner: (0, 0), mtime: (1_600_000_000, 123_456_789), xattrs: Vec::new() }
    }

    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub fn owner(self, uid: u32, gid: u32) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    pub fn mtime(self, seconds: i64, nanoseconds: u32) -> Self {
        Self { mtime: (seconds, nanoseconds), ..self }
    }

    pub fn xattr(mut self, name: &'static str, value: &[u8]) -> Self {
        self.xattrs.push((name, value.to_vec()));
        self.xattrs.sort();
        self
    }
}

pub fn file(content: impl AsRef<[u8]>) -> Entry {
    Entry::new(Kind::File(content.as_ref().to_vec()))
}

pub fn directory() -> Entry {
    Entry::new(Kind::Directory)
}

/// Entries by path without leading slash; directories that are missing are implicit.
pub type Layer = BTreeMap<String, Entry>;

pub fn layer<const N: usize>(entries: [(&str, Entry); N]) -> Layer {
    entries.into_iter().map(|(path, entry)| (path.to_owned(), entry)).collect()
}

/// A layer blob.
#[derive(Debug)]
pub struct Blob {
    pub bytes: Vec<u8>,
    pub layer: LazyLayer,
}

/// Makes the blob of a layer.
pub fn build(layer: &Layer) -> Blob {
    let mut tree: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::from([("", Vec::new())]);
    let mut parents: Vec<&str> = layer.keys().map(String::as_str).filter(|path| !path.is_empty()).collect();
    for path in parents.clone() {
        parents.extend(path.match_indices('/').map(|(at, _)| &path[..at]));
    }
    parents.sort_unstable();
    parents.dedup();
    for path in parents {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        tree.entry(parent).or_default().push((name, path));
        if !matches!(layer.get(path).map(|entry| &entry.kind), Some(kind) if !matches!(kind, Kind::Directory | Kind::Opaque))
        {
            tree.entry(path).or_default();
        }
    }
    let mut writer = Writer::default();
    let root = writer.add("", layer);
    let mut queue = VecDeque::from([("", root)]);
    while let Some((path, number)) = queue.pop_front() {
        let mut children = tree[path].clone();
        children.sort_unstable();
        let mut numbers = Vec::new();
        for (name, path) in children {
            let number = writer.add(path, layer);
            numbers.push((name, number));
            if tree.contains_key(path) {
                queue.push_back((path, number));
            }
        }
        writer.builder.add_directory(number, numbers).unwrap();
    }
    writer.finish()
}

#[derive(Default)]
struct Writer {
    builder: IndexBuilder,
    tar: Vec<u8>,
    space_len: u64,
    extents: Vec<Extent>,
    numbers: HashMap<String, u32>,
}

impl Writer {
    fn add(&mut self, path: &str, layer: &Layer) -> u32 {
        let Some(entry) = layer.get(path) else {
            return self
                .builder
                .add_inode(Inode { plain_offset: self.space_len.into(), ..implicit_directory() })
                .unwrap();
        };
        if let Kind::HardLink(target) = &entry.kind {
            return self.add(target, layer);
        }
        if matches!(entry.kind, Kind::Whiteout) {
            return WHITEOUT;
        }
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        let inode = self.inode(entry);
        let number = self.builder.add_inode(inode).unwrap();
        self.numbers.insert(path.to_owned(), number);
        number
    }

    fn inode(&mut self, entry: &Entry) -> Inode {
        let xattrs = entry.xattrs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.clone())).collect();
        let base = Inode {
            uid: entry.owner.0.into(),
            gid: entry.owner.1.into(),
            mtime_seconds: entry.mtime.0.cast_unsigned().into(),
            mtime_nanoseconds: entry.mtime.1.into(),
            xattrs: self.builder.add_xattrs(xattrs).unwrap().into(),
            ..blank_inode(entry.mode)
        };
        let with_type = |kind: u32| (entry.mode | kind).into();
        match &entry.kind {
            Kind::Directory => Inode { mode: with_type(mode::DIRECTORY), ..base },
            Kind::Opaque => Inode { mode: with_type(mode::DIRECTORY), flags: flag::OPAQUE.into(), ..base },
            Kind::Symlink(target) => Inode {
                mode: with_type(mode::SYMLINK | 0o777),
                payload: self.builder.add_string(target.as_bytes()).unwrap().into(),
                size: (target.len() as u64).into(),
                ..base
            },
            Kind::Character(major, minor) => {
                let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
                Inode { mode: with_type(mode::CHARACTER), payload: device.into(), ..base }
            }
            Kind::Fifo => Inode { mode: with_type(mode::FIFO), ..base },
            Kind::File(content) => {
                let plain_offset = self.add_content(content);
                Inode {
                    mode: with_type(mode::REGULAR),
                    size: (content.len() as u64).into(),
                    plain_offset: plain_offset.into(),
                    ..base
                }
            }
            Kind::Sparse(len, pieces) => {
                let plain_offset = self.add_pieces(*len, pieces);
                Inode { mode: with_type(mode::REGULAR), size: (*len).into(), plain_offset: plain_offset.into(), ..base }
            }
            Kind::HardLink(_) | Kind::Whiteout => unreachable!("they are no inodes"),
        }
    }

    /// Runs of zeros as long as a page are holes, as of a sparse file.
    fn add_content(&mut self, content: &[u8]) -> u64 {
        self.tar.resize(self.tar.len() + TAR_BLOCK_LEN, b'H');
        let plain_offset = self.space_len;
        let page = usize::try_from(PLAIN_ALIGN).unwrap();
        for (number, piece) in (0u64..).zip(content.chunks(page)) {
            if piece.iter().all(|byte| *byte == 0) {
                continue;
            }
            self.extents.push(Extent {
                tar_offset: (self.tar.len() as u64).into(),
                plain_offset: (plain_offset + number * PLAIN_ALIGN).into(),
                len: (piece.len() as u64).into(),
            });
            self.tar.extend_from_slice(piece);
        }
        self.tar.resize(self.tar.len().next_multiple_of(TAR_BLOCK_LEN), 0);
        self.space_len += (content.len() as u64).next_multiple_of(PLAIN_ALIGN);
        plain_offset
    }

    fn add_pieces(&mut self, len: u64, pieces: &[(u64, Vec<u8>)]) -> u64 {
        self.tar.resize(self.tar.len() + TAR_BLOCK_LEN, b'H');
        let plain_offset = self.space_len;
        for (offset, piece) in pieces {
            self.extents.push(Extent {
                tar_offset: (self.tar.len() as u64).into(),
                plain_offset: (plain_offset + offset).into(),
                len: (piece.len() as u64).into(),
            });
            self.tar.extend_from_slice(piece);
        }
        self.tar.resize(self.tar.len().next_multiple_of(TAR_BLOCK_LEN), 0);
        self.space_len += len.next_multiple_of(PLAIN_ALIGN);
        plain_offset
    }

    fn finish(mut self) -> Blob {
        self.tar.resize(self.tar.len() + 2 * TAR_BLOCK_LEN, 0);
        let frames = Frames::of(&self.tar, FRAME_LEN);
        let index = self
            .builder
            .finish_layer(&LayerData {
                tar_len: self.tar.len() as u64,
                space_len: self.space_len,
                extents: &self.extents,
                frames: &frames.records,
                ..LayerData::default()
            })
            .unwrap();
        let parts = BlobParts { frames: &frames.bytes, index: &index, hot_pack: &[], dedup: &[] };
        let (bytes, layer) = parts.assemble();
        Blob { bytes, layer }
    }
}

/// Serves blobs from memory.
#[derive(Debug, Default, Clone)]
pub struct Registry(Arc<RegistryInner>);

#[derive(Debug, Default)]
struct RegistryInner {
    blobs: Mutex<HashMap<Digest, Bytes>>,
    requests: AtomicUsize,
    is_down: AtomicBool,
    is_held: watch::Sender<bool>,
}

impl Registry {
    /// Serves another blob; returns what a client says about it.
    pub fn push(&self, layer: &Layer) -> RemoteLayer {
        let blob = build(layer);
        self.0.blobs.lock().unwrap().insert(blob.layer.blob, blob.bytes.into());
        RemoteLayer { layer: blob.layer, image: IMAGE.to_owned() }
    }

    /// Changes a byte of every frame of a blob, not of its index.
    pub fn damage(&self, layer: &RemoteLayer) {
        let mut blobs = self.0.blobs.lock().unwrap();
        let blob = blobs.get_mut(&layer.layer.blob).unwrap();
        let mut bytes = blob.to_vec();
        let index_start = usize::try_from(layer.layer.index.offset).unwrap();
        bytes[..index_start].iter_mut().for_each(|byte| *byte ^= 1);
        *blob = bytes.into();
    }

    /// Fails every request from now on, or does not.
    pub fn set_down(&self, is_down: bool) {
        self.0.is_down.store(is_down, Ordering::Relaxed);
    }

    /// Keeps every answer back from now on, or lets them go.
    pub fn set_held(&self, is_held: bool) {
        self.0.is_held.send_replace(is_held);
    }

    /// Requests so far.
    pub fn requests(&self) -> usize {
        self.0.requests.load(Ordering::Relaxed)
    }

    /// As the library wants it.
    pub fn sources(&self) -> Arc<dyn SourceFactory> {
        let registry = self.clone();
        Arc::new(move |layer: &RemoteLayer| -> Result<Arc<dyn Source>, SourceError> {
            assert!(layer.image.contains(".example.com/image:"), "{}", layer.image);
            Ok(Arc::new(BlobSource { registry: registry.clone(), blob: layer.layer.blob }))
        })
    }
}

struct BlobSource {
    registry: Registry,
    blob: Digest,
}

impl Source for BlobSource {
    fn origin(&self) -> Option<String> {
        None
    }

    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        let inner = &self.registry.0;
        inner.requests.fetch_add(1, Ordering::Relaxed);
        let blob = inner.blobs.lock().unwrap().get(&self.blob).cloned();
        let is_down = inner.is_down.load(Ordering::Relaxed);
        let mut is_held = inner.is_held.subscribe();
        Box::pin(async move {
            is_held.wait_for(|is_held| !is_held).await.expect("the registry lives");
            let blob = blob.filter(|_| !is_down).ok_or_else(|| SourceError::passing("registry is down"))?;
            let bytes = blob.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
            let stream: storage::ByteStream = Box::pin(futures_util::stream::iter([Ok(bytes)]));
            Ok(stream)
        })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        WideStream::exact(range.clone(), self.fetch(range))
    }
}

/// The ID of the tree of `layers`.
pub fn id_of(layers: &[RemoteLayer]) -> TreeId {
    tree_id(layers.iter().map(|layer| layer.layer.id())).unwrap()
}

/// Whether something is mounted on `path`.
pub fn is_mounted(path: &Path) -> bool {
    let path = path.to_str().unwrap();
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().any(|line| line.split(' ').nth(4) == Some(path))
}
