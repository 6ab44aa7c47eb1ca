//! Random images against a model of what containerd unpacks and overlayfs shows.
//!
//! Thousands go through conversion and merge without a mount: bytes of tar streams in, the merged tree and
//! the content of its files out, both read as a node reads them. A few are also unpacked by containerd and
//! mounted. `LAZULI_MODEL_CASES` and `LAZULI_MODEL_IMAGES` say how many. What they found are cases of
//! `tar_features` and tests of the walker, the tree and the merge.

mod entries;
mod unpack;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use converter::{
    blob::{reader::BlobReader, spool::Spool},
    layer::{
        LayerError,
        compress::{Compressor, FrameOptions},
        spool_layer,
    },
};
use entries::{Entry, layers, to_tar};
use format_spec::{Digest, Index, Inode, records::mode};
use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, ImageBuilder, LazyMount, RawTar, Result, Scratch, compare_trees,
    containerd::OVERLAYFS,
    process::{command, run},
    programs::{MODES, lazuli_ok},
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use unpack::{Body, Layer, Path, Refusal, overlay};

fn count(variable: &str, default: u32) -> u32 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a tree shows under one path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    kind: u32,
    mode: u32,
    owner: (u32, u32),
    /// `None` where containerd's is the time of unpacking.
    mtime: Option<(i64, u32)>,
    link_count: u32,
    device: u32,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Content of a file, target of a link.
    content: Vec<u8>,
}

/// The layers that the model unpacks, and the refusal at which it stopped.
fn unpack(layers: &[Vec<Entry>]) -> (Vec<Layer>, Result<(), Refusal>) {
    let mut unpacked = Vec::new();
    for entries in layers {
        let mut layer = Layer::new();
        let done = entries.iter().try_for_each(|entry| layer.unpack(entry, &unpacked)).and_then(|()| layer.finish());
        if done.is_err() {
            return (unpacked, done);
        }
        unpacked.push(layer);
    }
    (unpacked, Ok(()))
}

/// Leaves out the entries that cannot be unpacked, and the layers that fail at their end.
fn only_what_unpacks(layers: Vec<Vec<Entry>>) -> Vec<Vec<Entry>> {
    let mut kept = Vec::new();
    let mut unpacked: Vec<Layer> = Vec::new();
    for entries in layers {
        let mut layer = Layer::new();
        let mut kept_entries = Vec::new();
        for entry in entries {
            let mut next = layer.clone();
            if next.unpack(&entry, &unpacked).is_ok() {
                layer = next;
                kept_entries.push(entry);
            }
        }
        if layer.finish().is_ok() {
            kept.push(kept_entries);
            unpacked.push(layer);
        }
    }
    kept
}

/// What the model shows.
fn expected(layers: &[Layer]) -> BTreeMap<Path, Shown> {
    let files = overlay(layers);
    let mut link_counts: BTreeMap<(usize, usize), u32> = BTreeMap::new();
    for (file, identity) in files.values() {
        if file.body != Body::Directory {
            *link_counts.entry(*identity).or_default() += 1;
        }
    }
    let is_directory = |path: &Path| files[path].0.body == Body::Directory;
    let show = |(path, (file, identity)): (&Path, &(unpack::File, (usize, usize)))| {
        let child_count = || {
            let children = files.keys().filter(|other| other.len() == path.len() + 1 && other.starts_with(path));
            u32::try_from(children.filter(|child| is_directory(child)).count()).expect("few")
        };
        let (kind, content, device) = match &file.body {
            Body::Regular(content) => (mode::REGULAR, content.clone(), 0),
            Body::Directory => (mode::DIRECTORY, Vec::new(), 0),
            Body::Symlink(target) => (mode::SYMLINK, target.clone().into_bytes(), 0),
            Body::Fifo => (mode::FIFO, Vec::new(), 0),
            Body::Device(true, numbers) => (mode::CHARACTER, Vec::new(), device_number(*numbers)),
            Body::Device(false, numbers) => (mode::BLOCK, Vec::new(), device_number(*numbers)),
        };
        let shown = Shown {
            kind,
            mode: file.mode,
            owner: file.owner,
            mtime: file.mtime.filter(|_| !path.is_empty()),
            link_count: if kind == mode::DIRECTORY { 2 + child_count() } else { link_counts[identity] },
            device,
            xattrs: file.xattrs.iter().map(|(name, value)| (name.clone().into_bytes(), value.clone())).collect(),
            content,
        };
        (path.clone(), shown)
    };
    files.iter().map(show).collect()
}

fn device_number((major, minor): (u32, u32)) -> u32 {
    u32::try_from(rustix::fs::makedev(major, minor)).expect("small numbers")
}

/// A converted layer as a node has it.
struct Converted {
    index: Index<Vec<u8>>,
    blob: Arc<File>,
}

fn convert(tar: Vec<u8>, compressor: &Compressor) -> Result<Converted, LayerError> {
    let (digest, len) = (Digest::of(&tar), tar.len() as u64);
    let blob = BlobReader::new([Ok(Bytes::from(tar))].into_iter(), digest, len);
    let converted = spool_layer(blob, Spool::new(tempfile()), compressor)?.finish(&[], compressor)?;
    let location = converted.layer.index;
    let mut index = vec![0; usize::try_from(location.compressed_len).expect("small")];
    converted.file.read_exact_at(&mut index, location.offset).expect("readable");
    let index = Index::from_compressed(&index, &location)?;
    index.check()?;
    Ok(Converted { index, blob: converted.file })
}

fn tempfile() -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    rustix::fs::memfd_create("layer", flags).expect("a file in memory").into()
}

/// The bytes of a file, by way of extents and frames.
fn read(layer: &Converted, inode: &Inode) -> Vec<u8> {
    let plain = inode.plain_range();
    let at = |offset: u64| usize::try_from(offset).expect("small");
    let mut content = vec![0; at(inode.size.get())];
    for extent in layer.index.extents_in_plain(&plain).map(|number| layer.index.extents()[number]) {
        for frame in layer.index.frames_in_tar(&extent.tar_range()).map(|number| layer.index.frames()[number]) {
            let mut compressed = vec![0; at(frame.compressed_len.get().into())];
            layer.blob.read_exact_at(&mut compressed, frame.blob_range().start).expect("readable");
            assert_eq!(Digest::of(&compressed), frame.digest());
            let mut bytes = Vec::new();
            zstd::Decoder::new(&compressed[..]).and_then(|mut frame| frame.read_to_end(&mut bytes)).expect("zstd");
            let start = frame.tar_range().start.max(extent.tar_range().start);
            let end = frame.tar_range().end.min(extent.tar_range().end);
            let target = at(extent.plain_offset.get() - plain.start + (start - extent.tar_offset.get()));
            let part = &bytes[at(start - frame.tar_offset.get())..at(end - frame.tar_offset.get())];
            content[target..target + part.len()].copy_from_slice(part);
        }
    }
    content
}

/// What the merged tree shows; times where `expected` has none are left out.
fn merged(layers: &[Converted], expected: &BTreeMap<Path, Shown>) -> BTreeMap<Path, Shown> {
    let named: Vec<_> = (0u8..).zip(layers).map(|(number, layer)| (Digest::of(&[number]), &layer.index)).collect();
    let tree = Index::open(tree::merge::merge(&named).expect("merges")).expect("a tree");
    tree.check().expect("a sound tree");
    let mut shown = BTreeMap::new();
    let mut pending = vec![(Path::new(), 0)];
    while let Some((path, number)) = pending.pop() {
        let inode = tree.inode(number).expect("a number of the tree");
        for (name, child) in tree.children(inode) {
            let name = String::from_utf8(name.to_vec()).expect("the names are UTF-8");
            pending.push((path.iter().cloned().chain([name]).collect(), child));
        }
        let has_time = expected.get(&path).is_none_or(|expected| expected.mtime.is_some());
        let entry = Shown {
            kind: inode.file_type(),
            mode: inode.mode.get() & 0o7777,
            owner: (inode.uid.get(), inode.gid.get()),
            mtime: has_time.then(|| (inode.mtime_seconds(), inode.mtime_nanoseconds.get())),
            link_count: inode.nlink.get(),
            device: if inode.is_device() { inode.payload.get() } else { 0 },
            xattrs: tree.xattrs(inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
            content: match inode.file_type() {
                mode::REGULAR => read(&layers[inode.layer.get() as usize], inode),
                mode::SYMLINK => tree.symlink_target(inode).to_vec(),
                _ => Vec::new(),
            },
        };
        shown.insert(path, entry);
    }
    shown
}

/// Whether conversion and merge make of these layers what the model makes of them.
fn check(layers: &[Vec<Entry>], compressor: &Compressor) -> Result<(), TestCaseError> {
    let (unpacked, done) = unpack(layers);
    let mut converted = Vec::new();
    for entries in &layers[..unpacked.len()] {
        let layer = convert(to_tar(entries), compressor);
        prop_assert!(layer.is_ok(), "refused: {}", layer.err().map_or(String::new(), |error| error.to_string()));
        converted.extend(layer);
    }
    match done {
        Err(Refusal::Refused) => {
            let refused = convert(to_tar(&layers[unpacked.len()]), compressor);
            prop_assert!(matches!(refused, Err(LayerError::Tree(_))), "not refused");
        }
        Err(Refusal::LooksBelow) => {}
        Ok(()) if converted.is_empty() => {}
        Ok(()) => {
            let expected = expected(&unpacked);
            prop_assert_eq!(merged(&converted, &expected), expected);
        }
    }
    Ok(())
}

#[test]
fn random_layers_show_what_the_model_shows() {
    let compressor = Compressor::new(&FrameOptions::default(), 1, 1).expect("threads");
    let config = ProptestConfig {
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..ProptestConfig::with_cases(count("LAZULI_MODEL_CASES", 1500))
    };
    let sound = || layers().prop_map(only_what_unpacks);
    TestRunner::new(config.clone())
        .run(&sound(), |layers| check(&layers, &compressor))
        .unwrap_or_else(|error| panic!("{error}"));
    TestRunner::new(config)
        .run(&layers(), |layers| check(&layers, &compressor))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// containerd judges model and mount: the same images each time, unless more are asked for.
#[test]
fn random_images_show_what_containerd_unpacks() -> Result<()> {
    let image_count = count("LAZULI_MODEL_IMAGES", 40);
    let mut runner = TestRunner::deterministic();
    let strategy = layers().prop_map(only_what_unpacks);
    let stacks: Vec<_> = std::iter::repeat_with(|| strategy.new_tree(&mut runner).expect("a value").current())
        .filter(|layers| layers.iter().map(Vec::len).sum::<usize>() > 8)
        .take(image_count as usize)
        .collect();
    let scratch = Scratch::new("model")?;
    let image = |layers: &Vec<Vec<Entry>>| {
        let base = ImageBuilder::new().layer(RawTar::new().finish(), Compression::None);
        layers.iter().fold(base, |image, entries| image.layer(to_tar(entries), Compression::None))
    };
    let images: Vec<_> =
        stacks.iter().enumerate().map(|(number, layers)| (number.to_string(), image(layers))).collect();
    let archive = ImageBuilder::write_all(&images, &scratch, "image")?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    containerd.import(&archive)?;
    for (number, layers) in stacks.iter().enumerate() {
        let truth = scratch.directory(format!("truth-{number}"))?;
        containerd.mount_image(&format!("image/{number}:latest"), OVERLAYFS, &truth)?;
        let lazy = format!("oci:{}:lazy", scratch.join(format!("lazy-{number}")).display());
        lazuli_ok(["convert", &format!("oci:{}:{number}", scratch.join("image").display()), &lazy])?;
        let shown = expected(&unpack(layers).0);
        let untimed: BTreeSet<PathBuf> =
            shown.iter().filter(|(_, shown)| shown.mtime.is_none()).map(|(path, _)| path.iter().collect()).collect();
        let mut differences = Vec::new();
        for mode in MODES {
            let mount = LazyMount::in_mode(mode, &scratch, &format!("lazy-{mode}"), &lazy)?;
            differences.extend(compare_trees(&truth, mount.path())?);
            if mode == "erofs" {
                mount.fsck()?;
            }
        }
        // Link counts of overlayfs are with the names that upper layers hide; times of unpacking are those of a clock.
        differences.retain(|difference| {
            let is_clock = difference.what.starts_with("modification time") && untimed.contains(&difference.path);
            !is_clock && !difference.what.starts_with("link count")
        });
        let differences: Vec<_> = differences.iter().map(ToString::to_string).collect();
        assert_eq!(differences, Vec::<String>::new(), "image {number}: {layers:#?}");
        run(&mut command("umount", [&truth]))?;
    }
    Ok(())
}
