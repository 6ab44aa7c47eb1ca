//! The image that is changed: taken apart once, and put together again for each change, all digests right.

use std::{
    collections::BTreeMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use converter::{
    blob::{reader::BlobReader, spool::Spool},
    convert::{ConvertOptions, Platforms, convert, report::NoObserver},
    image::{ImageDestination, ImageSource, location::Location},
    layer::{
        compress::{Compressor, FrameOptions},
        framer::{FrameSizes, Lengths},
        spool_layer,
        start_up::HotPackChoice,
    },
};
use format_spec::{
    CompressedIndex, Digest, Footer, HotPiece, Index, LazyLayer, annotation, dedup,
    footer::{FOOTER_FRAME_LEN, FOOTER_LEN, SKIPPABLE_HEADER_LEN},
    records::{hot_reason, section},
};
use lazuli_fuzz::seal;
use lazuli_tests::{
    image::{Compression, ImageBuilder, Layout},
    raw_tar::{RawHeader, RawTar},
};
use registry::{Client, ClientOptions};
use serde_json::{Value, json};
use tempfile::TempDir;
use test_kit::{BlobParts, Frames, dedup_location, hot_frame, noise};
use zerocopy::IntoBytes;

use crate::container::Container;

/// A place where an image that is put together may be changed.
pub(crate) enum Stage<'a> {
    /// The frames of a layer, compressed.
    Frames(usize, &'a mut Vec<Vec<u8>>),
    /// The pieces of its hot pack, and what it holds of them.
    HotPack(usize, &'a mut Vec<(HotPiece, Vec<u8>)>),
    /// The same, compressed.
    HotFrames(usize, &'a mut Vec<Vec<u8>>),
    DedupRecords(usize, &'a mut Container),
    DedupBytes(usize, &'a mut Vec<u8>),
    /// Its index, for changes of the tree.
    Tree(usize, &'a mut Container),
    /// The same with everything in it, for changes of records.
    Records(usize, &'a mut Container),
    IndexBytes(usize, &'a mut Vec<u8>),
    Footer(usize, &'a mut [u8]),
    Blob(usize, &'a mut Vec<u8>),
    /// A document of this name.
    Document(&'static str, &'a mut Value),
    /// Its text.
    Text(&'static str, &'a mut Vec<u8>),
    /// The files of the layout.
    Files(&'a mut BTreeMap<Digest, Vec<u8>>),
}

type Hook<'a> = &'a mut dyn FnMut(Stage<'_>);

/// An image as a layout holds it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Built {
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    pub(crate) root: Digest,
    pub(crate) root_len: usize,
    pub(crate) root_type: String,
}

/// The image in parts.
pub(crate) struct Image {
    _directory: TempDir,
    /// The layout with the original.
    pub(crate) original: PathBuf,
    /// Layers of the first image, and that of the second.
    layers: Vec<Layer>,
    images: [Parts; 2],
    attestation: Vec<u8>,
    /// Config and statement of the attestation.
    statements: [Vec<u8>; 2],
    list: Vec<u8>,
    /// Without any change.
    pub(crate) built: Built,
}

struct Parts {
    config: Vec<u8>,
    manifest: Vec<u8>,
    /// Which of [`Image::layers`] are its own.
    layers: std::ops::Range<usize>,
}

struct Layer {
    frames: Vec<Vec<u8>>,
    hot: Vec<(HotPiece, Vec<u8>)>,
    dedup: Option<Container>,
    index: Container,
}

/// In memory, where there is such a place.
pub(crate) fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

pub(crate) async fn open(layout: &Path) -> ImageSource {
    let location: Location = format!("oci:{}:@0", layout.display()).parse().unwrap();
    ImageSource::open(location, &Client::new(ClientOptions::default()), layout).await.unwrap()
}

fn at(range: std::ops::Range<u64>) -> std::ops::Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// Every kind of entry that has something to lie about.
fn tars() -> [Vec<u8>; 3] {
    let special = |kind: u8, path: &str| RawHeader { device: (5, 17), ..RawHeader::new(kind, path) };
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0".as_slice();
    let map = [b"2\n0\n5\n12000\n5\n".as_slice(), &[0; 498], b"firstlast."].concat();
    let lowest = RawTar::new()
        .directory("etc")
        .pax(&[("SCHILY.xattr.user.a", b"1".as_slice()), ("SCHILY.xattr.user.b", b"2"), ("mtime", b"1700000000.5")])
        .file("etc/marked", b"marked")
        .pax(&[("SCHILY.xattr.security.capability", capability)])
        .file("etc/capable", &noise(7, 3000))
        .entry(&RawHeader { uid: 1000, gid: 7, mode: 0o4755, ..RawHeader::file("etc/owned") }, b"owned")
        .file("etc/empty", b"")
        .file("etc/twin", b"marked")
        .file("etc/.wh.gone", b"")
        .file("bin/sh", &noise(1, 20_000))
        .file("lib/small", b"small")
        .header(&RawHeader::symlink("lib/link", "small"))
        .header(&RawHeader::symlink("lib/far", "../etc/marked"))
        .header(&RawHeader::hard_link("lib/hard", "lib/small"))
        .header(&special(b'6', "lib/pipe"))
        .header(&special(b'3', "lib/null"))
        .header(&special(b'4', "lib/disk"))
        .directory("lib/nothing")
        .file("lib/large", &noise(2, 30_000))
        .pax(&[
            ("GNU.sparse.major", b"1".as_slice()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"lib/sparse"),
            ("GNU.sparse.realsize", b"20000"),
        ])
        .file("sparse", &map)
        .finish();
    let upper = RawTar::new()
        .directory("etc")
        .file("etc/.wh..wh..opq", b"")
        .file("etc/new", &noise(3, 700))
        .file("lib/.wh.small", b"")
        .header(&RawHeader::symlink("lib/link", "hard"))
        .finish();
    [lowest, upper, RawTar::new().file("etc/only", b"of the other platform").finish()]
}

/// The original: an index of two images and an attestation. Returns the tars.
fn write_original(directory: &Path) -> [Vec<u8>; 3] {
    let tars = tars();
    let layout = Layout::create(directory.to_owned()).unwrap();
    let first = ImageBuilder::new().architecture("amd64").layer(tars[0].clone(), Compression::Gzip);
    let mut first = first.layer(tars[1].clone(), Compression::Zstd).add_to(&layout).unwrap();
    let second = ImageBuilder::new().architecture("arm64").layer(tars[2].clone(), Compression::None);
    let mut second = second.add_to(&layout).unwrap();
    // Annotations and other fields in all places that may have them.
    annotate_manifest(&layout, directory, &mut first);
    let config = layout.add("application/vnd.oci.image.config.v1+json", b"{}").unwrap();
    let statement = layout.add("application/vnd.in-toto+json", br#"{"_type":"statement","subject":[]}"#).unwrap();
    let mut attestation = layout.add_manifest(&config, &[statement]).unwrap();
    attestation["annotations"] = json!({
        "vnd.docker.reference.digest": first["digest"],
        "vnd.docker.reference.type": "attestation-manifest",
    });
    attestation["platform"] = json!({"architecture": "unknown", "os": "unknown"});
    first["platform"] = json!({"architecture": "amd64", "os": "linux"});
    second["platform"] = json!({"architecture": "arm64", "os": "linux", "variant": "v8"});
    first["annotations"] = json!({"of": "an entry", "com.amazon.soci.index-digest": "of the old layers"});
    let list = json!({
        "schemaVersion": 2,
        "mediaType": lazuli_tests::image::INDEX,
        "manifests": [first, second, attestation],
        "annotations": {"of": "the index"},
    });
    layout.tag(layout.add(lazuli_tests::image::INDEX, list.to_string().as_bytes()).unwrap()).unwrap();
    tars
}

fn annotate_manifest(layout: &Layout, directory: &Path, descriptor: &mut Value) {
    let mut manifest = read_json(directory, &descriptor["digest"]);
    manifest["annotations"] = json!({"of": "the image", "com.amazon.soci.other": "of the old layers"});
    manifest["layers"][0]["annotations"] = json!({"of": "a layer", "containerd.io/snapshot/stargz/toc.digest": "old"});
    manifest["config"]["annotations"] = json!({"of": "the config"});
    *descriptor = layout.add(lazuli_tests::image::MANIFEST, manifest.to_string().as_bytes()).unwrap();
}

fn read(directory: &Path, digest: &Value) -> Vec<u8> {
    let digest: Digest = digest.as_str().unwrap().parse().unwrap();
    fs::read(directory.join("blobs/sha256").join(digest.hex())).unwrap()
}

fn read_json(directory: &Path, digest: &Value) -> Value {
    serde_json::from_slice(&read(directory, digest)).unwrap()
}

impl Image {
    pub(crate) fn new() -> Self {
        let directory = scratch();
        let (original, converted) = (directory.path().join("original"), directory.path().join("converted"));
        let tars = write_original(&original);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let client = Client::new(ClientOptions::default());
            let location: Location = format!("oci:{}:latest", converted.display()).parse().unwrap();
            let destination = ImageDestination::open(&location, &client, directory.path()).unwrap();
            let options = ConvertOptions {
                platforms: Platforms::All,
                referrers: false,
                cache: None,
                sign: Arc::from([]),
                level: 3,
                jobs: NonZeroUsize::MIN,
                hot_pack: HotPackChoice::Derived,
            };
            convert(&open(&original).await, &destination, &options, Arc::new(NoObserver)).await.unwrap();
        });
        let tags: Value = serde_json::from_slice(&fs::read(converted.join("index.json")).unwrap()).unwrap();
        let list = read(&converted, &tags["manifests"][0]["digest"]);
        let entries: Value = serde_json::from_slice(&list).unwrap();
        let manifests = [0, 1, 2].map(|number| read(&converted, &entries["manifests"][number]["digest"]));
        let [first, second, attestation] = manifests;
        let value = |text: &[u8]| -> Value { serde_json::from_slice(text).unwrap() };
        let blob = |text: &[u8], number: usize| read(&converted, &value(text)["layers"][number]["digest"]);
        let config = |text: &[u8]| read(&converted, &value(text)["config"]["digest"]);
        let layers =
            vec![Layer::parse(&many_frames(&tars[0])), Layer::parse(&blob(&first, 1)), Layer::parse(&blob(&second, 0))];
        let statements = [config(&attestation), blob(&attestation, 0)];
        let images = [(first, 0..2), (second, 2..3)].map(|(manifest, layers)| Parts {
            config: config(&manifest),
            manifest,
            layers,
        });
        let built = Built { blobs: BTreeMap::new(), root: Digest::of(b""), root_len: 0, root_type: String::new() };
        let mut image = Self { _directory: directory, original, layers, images, attestation, statements, list, built };
        image.built = image.build(&mut |_| {});
        image
    }

    /// Puts the image together; `hook` may change it wherever it comes by.
    pub(crate) fn build(&self, hook: Hook<'_>) -> Built {
        let mut blobs = BTreeMap::new();
        let mut put = |content: Vec<u8>| {
            let (digest, len) = (Digest::of(&content), content.len());
            blobs.insert(digest, content);
            (digest, len)
        };
        let mut layers = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let (blob, lazy) = layer.build(number, hook);
            put(blob);
            layers.push(lazy);
        }
        let mut entries = Vec::new();
        for (parts, names) in self.images.iter().zip([["config", "manifest"], ["other config", "other manifest"]]) {
            let config = put(document(names[0], &parts.config, |_| {}, hook));
            let manifest = document(
                names[1],
                &parts.manifest,
                |manifest| {
                    point(&mut manifest["config"], config);
                    for (number, lazy) in layers[parts.layers.clone()].iter().enumerate() {
                        let layer = &mut manifest["layers"][number];
                        point(layer, (lazy.blob, usize::try_from(lazy.blob_len).unwrap()));
                        let notes = layer["annotations"].as_object_mut().unwrap();
                        annotation::ALL.iter().for_each(|key| drop(notes.remove(*key)));
                        notes.extend(lazy.to_annotations().into_iter().map(|(key, value)| (key, value.into())));
                    }
                },
                hook,
            );
            entries.push(put(manifest));
        }
        let [config, statement] = &self.statements;
        let config = put(document("config of the attestation", config, |_| {}, hook));
        let statement = put(document("statement", statement, |_| {}, hook));
        let fill = |manifest: &mut Value| {
            point(&mut manifest["config"], config);
            point(&mut manifest["layers"][0], statement);
        };
        entries.push(put(document("attestation", &self.attestation, fill, hook)));
        let fill = |list: &mut Value| {
            for (number, entry) in entries.iter().enumerate() {
                point(&mut list["manifests"][number], *entry);
            }
            list["manifests"][2]["annotations"]["vnd.docker.reference.digest"] = entries[0].0.to_string().into();
        };
        let list = document("list", &self.list, fill, hook);
        let (root, root_len) = put(list);
        hook(Stage::Files(&mut blobs));
        Built { blobs, root, root_len, root_type: lazuli_tests::image::INDEX.to_owned() }
    }
}

fn point(descriptor: &mut Value, (digest, len): (Digest, usize)) {
    descriptor["digest"] = digest.to_string().into();
    descriptor["size"] = len.into();
}

/// A document with what `fill` writes into it, the text as it was where that is nothing new.
fn document(name: &'static str, text: &[u8], fill: impl FnOnce(&mut Value), hook: Hook<'_>) -> Vec<u8> {
    let before: Value = serde_json::from_slice(text).unwrap();
    let mut value = before.clone();
    fill(&mut value);
    hook(Stage::Document(name, &mut value));
    let mut text = if value == before { text.to_vec() } else { serde_json::to_vec(&value).unwrap() };
    hook(Stage::Text(name, &mut text));
    text
}

/// A layer in frames of a few kilobytes, with a hot pack.
fn many_frames(tar: &[u8]) -> Vec<u8> {
    let lengths = Lengths { min: 2048, average: 4096, max: 16384 };
    let sizes = FrameSizes { group: lengths, large_file_min: 8192, piece: lengths };
    let compressor = Compressor::new(&FrameOptions { level: 3, sizes }, 1, 1).unwrap();
    let pieces = [Ok::<_, String>(tar.to_vec().into())].into_iter();
    let blob = BlobReader::new(pieces, Digest::of(tar), tar.len() as u64);
    let spooled = spool_layer(blob, Spool::new(tempfile::tempfile().unwrap()), &compressor).unwrap();
    let files = spooled.index.inodes().iter().filter(|inode| inode.is_regular() && inode.size != 0);
    let piece = |inode: &format_spec::Inode| HotPiece {
        plain_offset: inode.plain_offset,
        len: u32::try_from(inode.size.get().min(8192)).unwrap().into(),
        reason: hot_reason::LIBRARY.into(),
    };
    let mut hot: Vec<HotPiece> = files.map(piece).collect();
    hot.reverse();
    let converted = spooled.finish(&hot, &compressor).unwrap();
    fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*converted.file))).unwrap()
}

impl Layer {
    fn parse(blob: &[u8]) -> Self {
        let footer = &blob[blob.len() - usize::try_from(FOOTER_FRAME_LEN).unwrap()..];
        let (location, hot_len) = Footer::from_frame(footer, blob.len() as u64).unwrap().unwrap();
        let index = Index::from_compressed(&blob[at(location.range())], &location).unwrap();
        let frames = index.frames().iter().map(|frame| blob[at(frame.blob_range())].to_vec()).collect();
        let mut start = location.range().end;
        let mut hot = Vec::new();
        if hot_len > 0 {
            start += SKIPPABLE_HEADER_LEN;
            let plain = zstd::decode_all(&blob[at(start..start + hot_len)]).unwrap();
            start += hot_len;
            let mut rest = plain.as_slice();
            for piece in index.hot_pieces() {
                let (content, behind) = rest.split_at(piece.len.get() as usize);
                hot.push((*piece, content.to_vec()));
                rest = behind;
            }
        }
        let dedup = index.dedup().map(|section| {
            let start = start + SKIPPABLE_HEADER_LEN;
            let compressed = &blob[at(start..start + section.compressed_len.get())];
            Container::parse(&dedup::open(compressed, section).unwrap())
        });
        Self { frames, hot, dedup, index: Container::parse(index.as_bytes()) }
    }

    fn build(&self, number: usize, hook: Hook<'_>) -> (Vec<u8>, LazyLayer) {
        let mut index = self.index.clone();
        let mut frames = self.frames.clone();
        hook(Stage::Frames(number, &mut frames));
        let mut joined = Frames::default();
        frames.iter().for_each(|frame| joined.push_compressed(frame, plain_len(frame)));
        *index.section(section::FRAMES) = joined.records.as_bytes().to_vec();

        let mut hot = self.hot.clone();
        hook(Stage::HotPack(number, &mut hot));
        let compress = |(_, content): &(HotPiece, Vec<u8>)| zstd::bulk::compress(content, 3).unwrap();
        let mut hot_frames: Vec<Vec<u8>> = hot.iter().map(compress).collect();
        hook(Stage::HotFrames(number, &mut hot_frames));
        let records = hot_frames.iter().map(|frame| hot_frame(frame, plain_len(frame)));
        *index.section(section::HOT_FRAMES) = records.collect::<Vec<_>>().as_bytes().to_vec();
        *index.section(section::HOT_PIECES) = hot.iter().flat_map(|(piece, _)| piece.as_bytes().to_vec()).collect();

        let mut dedup_section = None;
        if let Some(mut dedup) = self.dedup.clone() {
            hook(Stage::DedupRecords(number, &mut dedup));
            let mut open = dedup.to_open();
            hook(Stage::DedupBytes(number, &mut open));
            seal::index(&mut open);
            let compressed = compressed(open);
            *index.section(section::DEDUP) = dedup_location(&compressed).as_bytes().to_vec();
            dedup_section = Some(compressed.bytes);
        }
        hook(Stage::Tree(number, &mut index));
        hook(Stage::Records(number, &mut index));
        let mut open = index.to_open();
        hook(Stage::IndexBytes(number, &mut open));
        seal::index(&mut open);
        assemble(number, &joined, compressed(open), &hot_frames.concat(), dedup_section.unwrap_or_default(), hook)
    }
}

fn assemble(
    number: usize,
    frames: &Frames,
    index: CompressedIndex,
    hot_pack: &[u8],
    dedup: Vec<u8>,
    hook: Hook<'_>,
) -> (Vec<u8>, LazyLayer) {
    let parts = BlobParts { frames: &frames.bytes, index: &index, hot_pack, dedup: &dedup };
    let (mut blob, lazy) = parts.assemble();
    let footer_start = blob.len() - usize::try_from(FOOTER_LEN).unwrap();
    hook(Stage::Footer(number, &mut blob[footer_start..]));
    seal::crc_at_end(&mut blob[footer_start..]);
    hook(Stage::Blob(number, &mut blob));
    let lazy = LazyLayer { blob: Digest::of(&blob), blob_len: blob.len() as u64, ..lazy };
    (blob, lazy)
}

/// Also of what is no container: a check has to find that.
fn compressed(open: Vec<u8>) -> CompressedIndex {
    CompressedIndex::of(open.clone()).unwrap_or_else(|_| {
        let bytes = zstd::bulk::compress(&open, 3).unwrap();
        CompressedIndex { digest: Digest::of(&bytes), plain_len: open.len() as u64, bytes }
    })
}

fn plain_len(frame: &[u8]) -> usize {
    let len = zstd::zstd_safe::get_frame_content_size(frame).ok().flatten();
    len.and_then(|len| u32::try_from(len).ok()).map_or(1, |len| len as usize)
}
