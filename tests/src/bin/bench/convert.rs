//! Conversion speed, size and memory against what a user would take instead, in one run on this machine.
//!
//! - `bench convert [IMAGE...]`: python, node and jre unless named
//! - `bench convert --large`: one layer of 4 GB plain, made from the python image
//!
//! Options behind `--` are further ones of `lazuli convert`, for instance `--level 6`. For each image, prints plain
//! MB/s, sizes as ratios to the gzip original, processor seconds and peak memory of
//!
//! - *lazuli*: `lazuli convert --no-hot-pack` from a registry on loopback to the same registry; the median of three
//!   runs. Fetching, checking, publishing are in it; the registry works on the same cores.
//! - *gzip|zstd*: `gzip -dc | zstd -3` over the same layers, one after the other, from file to file
//! - *ctr-remote*: `ctr-remote images convert --estargz --oci` within the content store of a containerd that has fetched
//!   the image before: no registry is in it. Left out with `--large` and where Debian's package stargz-snapshotter is
//!   not installed.

mod large;

use std::{fs, path::PathBuf};

use lazuli_tests::{
    Containerd, ContainerdOptions, HarnessError, Result, Scratch, TestRegistry,
    error::Context as _,
    image::layout_layers,
    process::{command, require_program, run},
    programs::program,
    real_images::real_image,
};
use serde_json::Value;

use crate::{
    figures::{Used, load, seconds, used_by},
    unpacked::plain_len,
};

/// Conversions of each image; of the large layer one.
const RUNS: usize = 3;
/// One layer after the other, as a user would without Lazuli.
const RECOMPRESS: &str =
    "to=$1; shift; for layer; do gzip -dc \"$layer\" | zstd -q -3 -T1 -o \"$to/${layer##*/}\"; done";

pub(crate) fn bench(words: &[String]) -> Result<()> {
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    let (is_large, names) = match &words[..end] {
        [first, names @ ..] if first == "--large" => (true, names),
        names => (false, names),
    };
    if names.iter().any(|name| name.starts_with('-')) || (is_large && !names.is_empty()) {
        return Err(crate::usage());
    }
    let scratch = crate::scratch("convert")?;
    let registry = TestRegistry::start(&scratch)?;
    let is_estargz = !is_large && require_program("ctr-remote").is_ok();
    let containerd = is_estargz.then(|| Containerd::start(&scratch, &ContainerdOptions::default())).transpose()?;
    let options = words.get(end + 1..).unwrap_or_default();
    let bench = Bench { scratch: &scratch, registry, containerd, options };
    print_head();
    if is_large {
        return bench.compare("large", &large::write(&scratch)?, 1);
    }
    for name in crate::images_or(names, &["python", "node", "jre"]) {
        bench.compare(name, &real_image(name)?, RUNS)?;
    }
    Ok(())
}

fn print_head() {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores, load before {:.2}; MB are 10^6 plain bytes, times are of the faster tool", load());
    println!(
        "                      |             lazuli             |   gzip|zstd -3   |    ctr-remote    |        size / gzip         |"
    );
    println!(
        "image    plain   gzip |   MB/s  wall s      cpu s    MiB |      MB/s times |       MB/s times | lazuli  zstd -3    estargz | load"
    );
}

struct Bench<'a> {
    scratch: &'a Scratch,
    registry: TestRegistry,
    /// For eStargz, where there is `ctr-remote`.
    containerd: Option<Containerd>,
    options: &'a [String],
}

/// Seconds that another way takes, and bytes of the layers that it makes.
type Other = (f64, u64);

impl Bench<'_> {
    fn compare(&self, name: &str, layout: &str, runs: usize) -> Result<()> {
        let layers = layout_layers(layout)?;
        let plain_len: u64 = layers.iter().map(|layer| plain_len(layer)).sum::<Result<_>>()?;
        let gzip_len = files_len(&layers)?;
        self.registry.push(layout, &format!("{name}:x"))?;
        let mut used = (0..runs).map(|run| self.convert(name, run)).collect::<Result<Vec<_>>>()?;
        used.sort_by(|one, other| one.wall.total_cmp(&other.wall));
        let lazy_len = layers_len(&self.registry.manifest(&format!("{name}-0:x"))?);
        let recompressed = self.recompress(&layers)?;
        let estargz = self.containerd.as_ref().map(|containerd| self.estargz(containerd, name)).transpose()?;
        print_row(name, (plain_len, gzip_len, lazy_len), &used, recompressed, estargz);
        Ok(())
    }

    /// Into a repository of its own each time, without the memory of earlier conversions.
    fn convert(&self, name: &str, run: usize) -> Result<Used> {
        let cache = self.scratch.directory("cache")?;
        let mut convert = command(program("lazuli")?, ["convert", "--no-hot-pack"]);
        convert.args(self.options).env("XDG_CACHE_HOME", &cache);
        convert.arg(self.registry.reference(&format!("{name}:x")));
        convert.arg(self.registry.reference(&format!("{name}-{run}:x")));
        let used = used_by(&convert, self.scratch)?;
        used.finished.clone().stdout_of("lazuli convert")?;
        fs::remove_dir_all(&cache).at("removing", &cache)?;
        Ok(used)
    }

    fn recompress(&self, layers: &[PathBuf]) -> Result<Other> {
        let directory = self.scratch.directory("recompressed")?;
        let mut recompress = command("bash", ["-euo", "pipefail", "-c", RECOMPRESS, "bash"]);
        recompress.arg(&directory).args(layers);
        let seconds = seconds(|| run(&mut recompress).map(drop))?;
        let made = fs::read_dir(&directory).at("listing", &directory)?.flatten().map(|entry| entry.path());
        let len = files_len(&made.collect::<Vec<_>>())?;
        fs::remove_dir_all(&directory).at("removing", &directory)?;
        Ok((seconds, len))
    }

    fn estargz(&self, containerd: &Containerd, name: &str) -> Result<Other> {
        let source = self.registry.reference(&format!("{name}:x"));
        run(&mut containerd.ctr(["content", "fetch", "--plain-http", &source]))?;
        let mut convert = command("ctr-remote", ["--address"]);
        convert.arg(containerd.socket()).args(["images", "convert", "--estargz", "--oci", &source]);
        convert.arg(format!("{name}:estargz"));
        let seconds = seconds(|| run(&mut convert).map(drop))?;
        let listed = run(&mut containerd.ctr(["images", "ls", &format!("name=={name}:estargz")]))?;
        // Below the head: name, media type, digest.
        let digest = listed.lines().nth(1).and_then(|line| line.split_whitespace().nth(2));
        let digest = digest.ok_or_else(|| HarnessError::Unexpected(format!("ctr images ls: {listed}")))?;
        let manifest = run(&mut containerd.ctr(["content", "get", digest]))?;
        let manifest = serde_json::from_str(&manifest).map_err(std::io::Error::from).context("parsing a manifest")?;
        Ok((seconds, layers_len(&manifest)))
    }
}

fn files_len(paths: &[PathBuf]) -> Result<u64> {
    paths.iter().map(|path| Ok(fs::metadata(path).at("looking at", path)?.len())).sum()
}

fn layers_len(manifest: &Value) -> u64 {
    manifest["layers"].as_array().into_iter().flatten().filter_map(|layer| layer["size"].as_u64()).sum()
}

/// `lens` are those of the plain, the gzip and the lazy layers, `used` is sorted by its seconds.
fn print_row(name: &str, lens: (u64, u64, u64), used: &[Used], recompressed: Other, estargz: Option<Other>) {
    let megabytes = |len: u64| len as f64 / 1e6;
    let (plain_len, gzip_len, lazy_len) = lens;
    let ratio = |len: u64| len as f64 / gzip_len as f64;
    let middle = &used[(used.len() - 1) / 2];
    let memory_kib = used.iter().map(|used| used.memory_kib).fold(0.0, f64::max);
    let speed = |seconds: f64| megabytes(plain_len) / seconds;
    print!("{name:<7} {:>6.0} {:>6.0} |", megabytes(plain_len), megabytes(gzip_len));
    print!(" {:>6.0} {:>5.2}-{:<5.2}", speed(middle.wall), used[0].wall, used[used.len() - 1].wall);
    print!(" {:>6.2} {:>6.0} |", middle.cpu, memory_kib / 1024.0);
    print!(" {:>9.0} {:>5.2} |", speed(recompressed.0), recompressed.0 / middle.wall);
    match estargz {
        Some((seconds, _)) => print!(" {:>10.1} {:>5.1} |", speed(seconds), seconds / middle.wall),
        None => print!(" {:>10} {:>5} |", "-", "-"),
    }
    let estargz = estargz.map_or("-".to_owned(), |(_, len)| format!("{:.3}", ratio(len)));
    println!(" {:>6.3} {:>8.3} {estargz:>10} | {:>4.1}", ratio(lazy_len), ratio(recompressed.1), load());
}
