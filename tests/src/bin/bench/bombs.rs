//! Converts small images that would like to take much: `bench bombs [PROGRAM]`.
//!
//! Prints for each the length of what a stranger sends, how the conversion by PROGRAM ended, processor seconds and peak
//! memory.

use std::path::PathBuf;

use lazuli_tests::{
    Compression, ImageBuilder, RawHeader, RawTar, Result, Scratch, image::layout_manifest, process::command,
    programs::program, raw_tar::BLOCK_LEN,
};
use serde_json::Value;

use crate::figures::used_by;

/// Words of a command, and directories of its PATH.
const WORD_COUNT: usize = 28_000;
/// Pieces of each sparse file.
const PIECE_COUNT: usize = 750_000;
/// Sparse files of a layer, and layers of them.
const SPARSE_FILE_COUNT: usize = 8;
/// Entries of the sparse map in one line.
const MAP_LINE_LEN: usize = 4 << 20;
/// Gems that are there, and lines that require one.
const GEM_COUNT: usize = 2_000;
const REQUIRE_COUNT: usize = 25_000;
const IMPORT_COUNT: usize = 6_000;

type Bomb = (&'static str, fn() -> ImageBuilder);

const BOMBS: [Bomb; 5] = [
    ("imports in one line", imports),
    ("a sparse map in one line", map_in_one_line),
    ("sparse maps of millions", sparse_maps),
    ("words of a command in PATH", words_in_path),
    ("required gems", gems),
];

pub(crate) fn bench(converter: Option<&str>) -> Result<()> {
    let converter = converter.map_or_else(|| program("lazuli"), |path| Ok(PathBuf::from(path)))?;
    let scratch = crate::scratch("bombs")?;
    for (name, build) in BOMBS {
        let own = Scratch::at(&scratch.join("bomb"), "bench-bombs")?;
        // Dropped before the conversion: it takes more memory than that.
        let source = build().write(&own, "source")?;
        let manifest = layout_manifest(&source)?;
        let len_of = |descriptor: &Value| descriptor["size"].as_u64().unwrap_or(0);
        let layers_len: u64 = manifest["layers"].as_array().into_iter().flatten().map(len_of).sum();
        let mut convert = command(&converter, ["convert", "--no-cache", &source]);
        convert.arg(format!("oci:{}", own.join("lazy").display()));
        let used = used_by(&convert, &own)?;
        println!(
            "{name:28} layers {layers_len:8} B, config {:7} B: exit {}, {:5.1} s, {:5} MiB",
            len_of(&manifest["config"]),
            used.finished.code.unwrap_or(-1),
            used.cpu,
            (used.memory_kib / 1024.0).floor(),
        );
    }
    Ok(())
}

fn imports() -> ImageBuilder {
    let source = [b"x:".to_vec(), b"import a:".repeat(IMPORT_COUNT)].concat();
    let files = RawTar::new()
        .entry(&executable("usr/bin/python3.11"), b"\x7fELF")
        .entry(&executable("usr/lib/python3.11/os.py"), b"")
        .entry(&executable("app.py"), &source);
    image(files).command(&["python3.11", "/app.py"])
}

fn map_in_one_line() -> ImageBuilder {
    image(sparse_file(RawTar::new(), "file", &vec![b'1'; MAP_LINE_LEN], 1))
}

/// Single bytes with a hole of one between any two.
fn sparse_maps() -> ImageBuilder {
    let map: String = (0..PIECE_COUNT).map(|number| format!("{}\n1\n", 2 * number)).collect();
    let mut content = format!("{PIECE_COUNT}\n{map}").into_bytes();
    content.resize(content.len().next_multiple_of(BLOCK_LEN), 0);
    content.resize(content.len() + PIECE_COUNT, b'a');
    (0..SPARSE_FILE_COUNT).fold(ImageBuilder::new().command(&[]), |image, layer| {
        let files = (0..SPARSE_FILE_COUNT).fold(RawTar::new(), |files, file| {
            sparse_file(files, &format!("{layer}-{file}"), &content, 2 * PIECE_COUNT)
        });
        image.layer(files.finish(), Compression::Gzip)
    })
}

fn words_in_path() -> ImageBuilder {
    let path = format!("PATH={}", "/a:".repeat(WORD_COUNT));
    image(RawTar::new().entry(&executable("a"), b"")).command(&["w"; WORD_COUNT]).environment(&[&path])
}

fn gems() -> ImageBuilder {
    let gems = "usr/lib/ruby/gems/3.2.0";
    let files = (0..GEM_COUNT).fold(RawTar::new(), |files, number| {
        files
            .entry(&executable(format!("{gems}/gems/g{number}-1/lib/b.rb")), b"")
            .entry(&executable(format!("{gems}/specifications/g{number}-1.gemspec")), b"")
    });
    let files = files
        .entry(&executable("usr/bin/ruby"), b"\x7fELF")
        .entry(&executable("a.rb"), &b"require 'a'\n".repeat(REQUIRE_COUNT));
    image(files).command(&["ruby", "/a.rb"])
}

/// An image of one layer that runs nothing.
fn image(files: RawTar) -> ImageBuilder {
    ImageBuilder::new().command(&[]).layer(files.finish(), Compression::Gzip)
}

fn executable(path: impl AsRef<[u8]>) -> RawHeader {
    RawHeader { mode: 0o755, ..RawHeader::file(path) }
}

/// A sparse file of GNU's format 1.0, whose map stands in front of the content.
fn sparse_file(files: RawTar, path: &str, content: &[u8], len: usize) -> RawTar {
    let len = len.to_string();
    let records = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", path),
        ("GNU.sparse.realsize", &len),
    ];
    files.pax(&records).entry(&executable(path), content)
}
