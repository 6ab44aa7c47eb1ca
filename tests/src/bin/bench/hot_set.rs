//! How well the derived hot set tells what a start reads, in one run on this machine: `bench hot-set [IMAGE...]`.
//!
//! Each image is unpacked into an ext4 file system of its own and started from a cold page cache, once without
//! read-ahead (what is really touched) and once with the kernel's default of 128 KiB (what a disk would be asked for).
//! Prints megabytes touched and hot, the part of the touched bytes that is hot (recall), and the part of the hot bytes
//! that is touched (precision). The hot set is what the example `hot_set` of `converter` prints.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use lazuli_tests::{
    HarnessError, Result, Scratch,
    error::Context as _,
    page_cache::cached_files,
    process::{command, run},
    programs::program,
};

use crate::unpacked::RealImage;

/// Room for any image; the file is sparse.
const DISK_LEN: u64 = 4 << 30;
/// None, and the kernel's default.
const READ_AHEAD_KIB: [u64; 2] = [0, 128];
const PAGE_LEN: u64 = 4096;

/// The pages of files that are touched or hot, by their path in the image.
type Pages = HashMap<PathBuf, HashSet<u64>>;

pub(crate) fn bench(names: &[String]) -> Result<()> {
    let scratch = crate::scratch("hot-set")?;
    println!(
        "{:<8} {:>10} | {:>8} {:>8} {:>8} {:>8} {:>9}",
        "image", "read-ahead", "touched", "hot", "hot/tch", "recall", "precision"
    );
    for name in crate::images_or(names, &["debian", "python", "node", "jre"]) {
        let image = RealImage::open(name)?;
        let disk = Disk::create(&scratch, name)?;
        let hot = disk.derive(&image)?;
        for read_ahead_kib in READ_AHEAD_KIB {
            let touched = disk.start(&image, read_ahead_kib)?;
            print_row(name, read_ahead_kib, &hot, &touched);
        }
    }
    Ok(())
}

/// A file with an ext4 file system, and where it is mounted.
struct Disk {
    file: PathBuf,
    config: PathBuf,
    root: PathBuf,
}

impl Disk {
    fn create(scratch: &Scratch, name: &str) -> Result<Self> {
        let file = scratch.join(format!("{name}.disk"));
        File::create(&file).and_then(|disk| disk.set_len(DISK_LEN)).at("creating", &file)?;
        run(command("mkfs.ext4", ["-q"]).arg(&file))?;
        Ok(Self { file, config: scratch.join(format!("{name}.json")), root: scratch.directory("root")? })
    }

    /// Unpacks the image there, and returns its hot set.
    fn derive(&self, image: &RealImage) -> Result<Pages> {
        run(command("mount", ["-o", "loop"]).arg(&self.file).arg(&self.root))?;
        image.unpack(&self.root)?;
        fs::write(&self.config, image.config().to_string()).at("writing", &self.config)?;
        let printed = run(&mut command(program("examples/hot_set")?, [&self.root, &self.config]))?;
        self.unmount()?;
        let mut pages = Pages::new();
        for line in printed.lines() {
            let (path, ranges) =
                parse_line(line).ok_or_else(|| HarnessError::Unexpected(format!("not a hot file: {line}")))?;
            pages.entry(path).or_default().extend(ranges.into_iter().flat_map(pages_of));
        }
        Ok(pages)
    }

    /// Starts the image from a cold page cache; returns what is in it then.
    fn start(&self, image: &RealImage, read_ahead_kib: u64) -> Result<Pages> {
        self.mount_cold(read_ahead_kib)?;
        image.start(&self.root)?;
        let mut pages = Pages::new();
        for file in cached_files(&self.root)? {
            let path = Path::new("/").join(file.path.strip_prefix(&self.root).unwrap_or(&file.path));
            pages.insert(path, file.ranges()?.into_iter().flat_map(pages_of).collect());
        }
        self.unmount()?;
        Ok(pages)
    }

    fn mount_cold(&self, read_ahead_kib: u64) -> Result<()> {
        let find = ["--read-only", "--find", "--show", "--direct-io=on"];
        let device = run(command("losetup", find).arg(&self.file))?;
        let device = device.trim();
        let name = device.trim_start_matches("/dev/");
        let queue = PathBuf::from(format!("/sys/block/{name}/queue/read_ahead_kb"));
        let mounted = fs::write(&queue, read_ahead_kib.to_string())
            .at("writing", &queue)
            .and_then(|()| run(command("mount", ["-o", "ro,noload", device]).arg(&self.root)));
        // A device that is mounted goes when it is so no longer.
        run(&mut command("losetup", ["--detach", device]))?;
        mounted.map(drop)
    }

    fn unmount(&self) -> Result<()> {
        run(&mut command("umount", [&self.root])).map(drop)
    }
}

/// The path and the ranges in a line of the example: reason, path and pairs, with tabs between them.
fn parse_line(line: &str) -> Option<(PathBuf, Vec<Range<u64>>)> {
    let mut fields = line.split('\t').skip(1);
    let path = PathBuf::from(fields.next()?);
    let pairs = fields.next()?.split(' ').map(|pair| {
        let (start, end) = pair.split_once('-')?;
        Some(start.parse().ok()?..end.parse().ok()?)
    });
    Some((path, pairs.collect::<Option<_>>()?))
}

fn pages_of(range: Range<u64>) -> Range<u64> {
    range.start / PAGE_LEN..range.end.div_ceil(PAGE_LEN)
}

fn print_row(name: &str, read_ahead_kib: u64, hot: &Pages, touched: &Pages) {
    let count = |pages: &Pages| pages.values().map(HashSet::len).sum::<usize>() as f64;
    let in_both = touched.iter().filter_map(|(path, pages)| Some(pages.intersection(hot.get(path)?).count()));
    let in_both = in_both.sum::<usize>() as f64;
    let (touched, hot) = (count(touched), count(hot));
    let megabytes = |pages: f64| pages * PAGE_LEN as f64 / 1e6;
    println!(
        "{name:<8} {read_ahead_kib:>6} KiB | {:>5.1} MB {:>5.1} MB {:>8.2} {:>8.3} {:>9.3}",
        megabytes(touched),
        megabytes(hot),
        hot / touched,
        in_both / touched,
        in_both / hot,
    );
}
