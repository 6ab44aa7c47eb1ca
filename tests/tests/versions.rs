//! The next version of an image costs what changed in it, however its layers were built anew.
//!
//! Not part of a plain `cargo test`: it takes some minutes. `make test-images` runs it.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use format_spec::Digest;
use lazuli_tests::{
    Containerd, ContainerdOptions, LazyMount, Result, Scratch, TestRegistry, compare_trees,
    containerd::OVERLAYFS,
    error::Context as _,
    process::{command, run, wait_for},
    programs::lazuli_ok,
    real_images::real_image,
};

/// What the compressed size of what changed is measured with: the converter's own level.
const LEVEL: i32 = 3;

/// Goal: a node that has read one version of an image fetches of the next one, in which all times are new and one
/// package is of another release, at most 1.5 times the compressed size of what changed; and reads it right.
/// Method: mount the first version and read all of it; with the same cache mount the second, compare it with what
/// containerd's overlayfs shows of the original, which reads all of it too, and count at the registry's side.
/// What changed: every content of a file of the second version that no file of the first has, in the order of paths,
/// compressed by zstd as one stream. Frames and indexes of the second version come on top of that.
#[test]
fn a_second_version_costs_what_changed() -> Result<()> {
    let scratch = Scratch::new("versions")?;
    let registry = TestRegistry::start(&scratch)?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    let mut lazy = Vec::new();
    let mut truth = Vec::new();
    for name in ["python", "python2"] {
        let original = registry.push(&real_image(name)?, &format!("{name}:original"))?;
        lazy.push(registry.reference(&format!("{name}:lazy")));
        lazuli_ok(["convert", &original, &lazy[lazy.len() - 1]])?;
        containerd.pull(&original, OVERLAYFS)?;
        truth.push(scratch.directory(format!("{name}.truth"))?);
        containerd.mount_image(&original, OVERLAYFS, &truth[truth.len() - 1])?;
    }
    let changed_len = compressed_len_of_changes(&truth[0], &truth[1])?;

    let mut first = LazyMount::new(&scratch, "lazy", &lazy[0])?;
    run(command("sh", ["-c", "find \"$0\" -xdev -type f -exec cat {} + >/dev/null"]).arg(first.path()))?;
    let layers = first.cache().join("cache/layers");
    wait_for("the layers have not told what they hold", || {
        let mut paths = fs::read_dir(&layers).at("listing", &layers)?.flatten().map(|entry| entry.path());
        Ok(paths.all(|path| path.join("dedup").is_file()).then_some(()))
    })?;
    assert!(first.stop());

    let before = registry.blob_bytes()?;
    let second = LazyMount::new(&scratch, "lazy", &lazy[1])?;
    let differences: Vec<_> = compare_trees(&truth[1], second.path())?.iter().map(ToString::to_string).collect();
    assert_eq!(differences, Vec::<String>::new());
    let fetched_len = registry.blob_bytes()? - before;
    println!(
        "the second version took {fetched_len} bytes, {changed_len} changed ({:.2} times)",
        fetched_len as f64 / changed_len as f64
    );
    assert!(fetched_len * 2 <= changed_len * 3, "{fetched_len} bytes for {changed_len} that changed");
    Ok(())
}

fn compressed_len_of_changes(first: &Path, second: &Path) -> Result<u64> {
    let mut known: HashSet<Digest> = contents(first)?.into_values().collect();
    let mut encoder = zstd::Encoder::new(Counted::default(), LEVEL).context("making an encoder")?;
    for (path, digest) in contents(second)? {
        if known.insert(digest) {
            encoder.write_all(&fs::read(&path).at("reading", &path)?).context("compressing")?;
        }
    }
    Ok(encoder.finish().context("compressing")?.0)
}

/// Every regular file below a directory and the digest of what it holds.
fn contents(root: &Path) -> Result<BTreeMap<PathBuf, Digest>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).at("listing", &directory)? {
            let entry = entry.at("listing", &directory)?;
            let kind = entry.file_type().at("looking at", &entry.path())?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                found.insert(entry.path(), Digest::of(&fs::read(entry.path()).at("reading", &entry.path())?));
            }
        }
    }
    Ok(found)
}

/// Counts what is written to it.
#[derive(Debug, Default)]
struct Counted(u64);

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
