//! Layers at the edge: bounded work and memory, and still the same tree.
//!
//! Not part of a plain `cargo test`: `make test-large` runs it, one test at a time, as each looks at the
//! memory of the whole process. It takes minutes and some 10 GB of disk.

use std::{fs, time::Instant};

use bytes::Bytes;
use converter::{
    blob::{reader::BlobReader, spool::Spool},
    layer::{
        ConvertedLayer, LayerError,
        compress::{Compressor, FrameOptions},
        spool_layer,
    },
};
use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, ImageBuilder, LazyMount, RawHeader, RawTar, Result, Scratch,
    compare_trees,
    containerd::OVERLAYFS,
    process::{command, run},
    programs::lazuli_ok,
    raw_tar::BLOCK_LEN,
};

/// What a conversion may take, whatever the layer.
const MEMORY_LEN_MAX: u64 = 512 << 20;

/// Converts a stream that is made on the way, `len` bytes long; returns the peak of the memory, in bytes.
fn convert(pieces: impl Iterator<Item = Vec<u8>> + Clone) -> (Result<ConvertedLayer, LayerError>, u64) {
    let mut hasher = format_spec::DigestHasher::default();
    let mut len = 0;
    for piece in pieces.clone() {
        hasher.update(&piece);
        len += piece.len() as u64;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let spool = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(directory.path().join("spool"))
        .expect("a spool file");
    let compressor = Compressor::new(&FrameOptions::default(), 2, 1).expect("threads");
    fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
    let started = Instant::now();
    let blob = BlobReader::new(pieces.map(|piece| Ok(Bytes::from(piece))), hasher.finish(), len);
    let converted =
        spool_layer(blob, Spool::new(spool), &compressor).and_then(|spooled| spooled.finish(&[], &compressor));
    let peak = memory_peak();
    println!("{} MB of tar in {:?}, {} MiB at the peak", len / 1_000_000, started.elapsed(), peak >> 20);
    (converted, peak)
}

fn memory_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line for the peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Empty files, a thousand a directory, in pieces of a directory.
fn many_files(count: usize) -> impl Iterator<Item = Vec<u8>> + Clone {
    let directory = move |number: usize| {
        let files = number * 1000..count.min(number * 1000 + 1000);
        let path = format!("directory-{number:06}");
        files
            .fold(RawTar::new().directory(&path), |tar, file| tar.file(&format!("{path}/file-{file:09}"), b""))
            .unfinished()
    };
    (0..count.div_ceil(1000)).map(directory).chain([vec![0; 2 * BLOCK_LEN]])
}

#[test]
fn a_million_files_take_bounded_memory() {
    let (converted, peak) = convert(many_files(1_000_000));
    let layer = converted.expect("converts").layer;
    println!("index of {} bytes, {} compressed", layer.index.plain_len, layer.index.compressed_len);
    assert!(peak < MEMORY_LEN_MAX, "{peak}");
}

#[test]
fn ten_million_files_are_refused_in_bounded_memory() {
    let (converted, peak) = convert(many_files(10_000_000));
    let message = converted.expect_err("too many").to_string();
    assert!(message.ends_with("split it into several layers"), "{message}");
    assert!(peak < MEMORY_LEN_MAX, "{peak}");
}

/// Entries that leave nothing behind take no memory: ten million of them for the root.
#[test]
fn ten_million_entries_without_effect_take_bounded_memory() {
    let block = RawTar::new().directory("./").unfinished().repeat(1000);
    let pieces = std::iter::repeat_n(block, 10_000).chain([vec![0; 2 * BLOCK_LEN]]);
    let (converted, peak) = convert(pieces);
    assert!(converted.is_ok());
    assert!(peak < MEMORY_LEN_MAX, "{peak}");
}

#[test]
fn a_file_of_eight_gigabytes_takes_bounded_memory() {
    const LEN: i64 = 8 << 30;
    let header = RawTar::new().header(&RawHeader { size: Some(LEN), ..RawHeader::file("file") }).unfinished();
    let content = std::iter::repeat_n(vec![7; 1 << 20], 8 << 10);
    let (converted, peak) = convert([header].into_iter().chain(content).chain([vec![0; 2 * BLOCK_LEN]]));
    assert!(converted.is_ok());
    assert!(peak < MEMORY_LEN_MAX, "{peak}");
}

/// Whether containerd and a lazy mount show the same of this layer.
fn check_same_tree(name: &str, tar: Vec<u8>) -> Result<()> {
    let scratch = Scratch::new(name)?;
    let base = RawTar::new().file("base", b"").finish();
    let image = ImageBuilder::new().layer(base, Compression::None).layer(tar, Compression::Zstd);
    let archive = ImageBuilder::write_all(&[("large".to_owned(), image)], &scratch, "image")?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    containerd.import(&archive)?;
    let truth = scratch.directory("truth")?;
    containerd.mount_image("image/large:latest", OVERLAYFS, &truth)?;
    let lazy = format!("oci:{}:lazy", scratch.join("lazy-layout").display());
    lazuli_ok(["convert", &format!("oci:{}:large", scratch.join("image").display()), &lazy])?;
    let mount = LazyMount::new(&scratch, "lazy", &lazy)?;
    let differences: Vec<_> = compare_trees(&truth, mount.path())?.iter().map(ToString::to_string).collect();
    assert_eq!(differences, Vec::<String>::new());
    drop(mount);
    run(&mut command("umount", [&truth])).map(drop)
}

#[test]
fn two_hundred_thousand_files_in_one_directory_are_those_of_the_original() -> Result<()> {
    let files = (0..200_000).fold(RawTar::new().directory("d"), |tar, number| tar.file(&format!("d/{number:x}"), b""));
    check_same_tree("many-files", files.directory("d").finish())
}

#[test]
fn a_sparse_file_of_eight_gigabytes_is_that_of_the_original() -> Result<()> {
    let map = format!("2\n4096\n5\n{}\n5\n", 8u64 << 30);
    let mut content = map.into_bytes();
    content.resize(BLOCK_LEN, 0);
    content.extend_from_slice(b"startofit!");
    let size = ((8u64 << 30) + 5).to_string();
    let records = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "file"),
        ("GNU.sparse.realsize", &size),
    ];
    check_same_tree("large-file", RawTar::new().pax(&records).entry(&RawHeader::file("x"), &content).finish())
}
