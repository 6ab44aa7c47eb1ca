//! Both modes of a mount beside what a container has without Lazuli: `bench mounts [--rounds N] [--no-images]
//! [IMAGE...]`, python, node and jre unless named.
//!
//! For each image, everything of it being on the node already, prints the median seconds of
//!
//! - *first read*: reading every file once with a cold page cache
//! - *read*: reading every file from the page cache
//! - *stat*: stat of every file, again
//!
//! and their ratios to the native ext4 directory (first read) or to overlayfs on it (the others), of the ways in which
//! an image can be seen. Layers stay incomplete by one file each, the largest, which no mode is asked for before the
//! last. At the end mounts a tree of 100,000 files ([`tree`]); with `--no-images` does nothing else.

mod tree;

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use lazuli_tests::{
    LazyMount, Result, Scratch,
    error::Context as _,
    page_cache::drop_page_cache,
    process::{command, run},
    programs::lazuli_ok,
};
use rustix::mount::{UnmountFlags, unmount};

use crate::{
    figures::{median, seconds},
    unpacked::RealImage,
};

/// Rounds unless said.
const ROUNDS: usize = 5;

pub(crate) fn bench(words: &[String]) -> Result<()> {
    let (mut rounds, mut has_images, mut names) = (ROUNDS, true, Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--rounds" => rounds = words.next().and_then(|word| word.parse().ok()).ok_or_else(crate::usage)?,
            "--no-images" => has_images = false,
            word if word.starts_with('-') => return Err(crate::usage()),
            _ => names.push(word.clone()),
        }
    }
    let scratch = crate::scratch("mounts")?;
    if has_images {
        for name in crate::images_or(&names, &["python", "node", "jre"]) {
            let own = Scratch::at(&scratch.join(name), &format!("bench-mounts-{name}"))?;
            compare(name, rounds, &own)?;
            println!();
        }
    }
    tree::bench(&scratch)
}

/// A way in which an image can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// The unpacked image.
    Ext4,
    /// An overlayfs mount on it, as a container sees an image without Lazuli.
    Overlayfs,
    /// overlayfs on the image in portable mode.
    Fuse,
    /// The same in kernel mode, as long as layers are incomplete: content comes from the session.
    Erofs,
    /// The same with the cache files themselves as devices.
    Complete,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Overlayfs => "overlayfs",
            Self::Fuse => "fuse",
            Self::Erofs => "erofs",
            Self::Complete => "complete",
        }
    }
}

fn compare(name: &str, rounds: usize, scratch: &Scratch) -> Result<()> {
    let image = RealImage::open(name)?;
    let lazy = format!("oci:{}:lazy", scratch.join("image").display());
    lazuli_ok(["convert", "--no-hot-pack", &image.layout, &lazy])?;
    let native = scratch.directory("native")?;
    image.unpack(&native)?;
    let files = scratch.join("files");
    let count = list_files(&native, &image.largest_files()?, &files)?;
    let megabytes = run(command("du", ["-sm", "--apparent-size"]).arg(&native))?;
    println!("{name}: {count} files, {} MB", megabytes.split('\t').next().unwrap_or_default());
    let image = Compared { name, scratch, lazy, native, files };
    {
        let mount = image.mount_lazily("fuse")?;
        image.read_all(mount.path())?;
    }
    image.compare_ways(rounds, &[Way::Ext4, Way::Overlayfs, Way::Fuse, Way::Erofs])?;
    {
        let mount = image.mount_lazily("fuse")?;
        let read = "find \"$1\" -type f -exec cat {} + >/dev/null";
        run(command("sh", ["-ec", read, "sh"]).arg(mount.path()))?;
    }
    image.compare_ways(rounds, &[Way::Ext4, Way::Overlayfs, Way::Complete])
}

/// Writes the paths of all files of a directory but some into the file `to`, a NUL behind each; returns how many.
fn list_files(root: &Path, left_out: &BTreeSet<PathBuf>, to: &Path) -> Result<usize> {
    let list = "cd \"$1\" && find . -type f -print0 | sort -z >\"$2\"";
    run(command("sh", ["-ec", list, "sh"]).arg(root).arg(to))?;
    let listed = fs::read(to).at("reading", to)?;
    let is_kept = |path: &&[u8]| !left_out.contains(Path::new(OsStr::from_bytes(path.get(2..).unwrap_or_default())));
    let paths = listed.split(|byte| *byte == 0).filter(|path| !path.is_empty());
    let kept: Vec<&[u8]> = paths.filter(is_kept).collect();
    let text: Vec<u8> = kept.iter().flat_map(|path| [path, &b"\0"[..]].concat()).collect();
    fs::write(to, text).at("writing", to)?;
    Ok(kept.len())
}

/// An image, unpacked and converted.
struct Compared<'a> {
    name: &'a str,
    scratch: &'a Scratch,
    /// `oci:DIR:tag`.
    lazy: String,
    /// Its root directory.
    native: PathBuf,
    /// Paths of the files that are read, a NUL behind each.
    files: PathBuf,
}

/// An image that is visible until this is dropped, the overlay first.
struct Shown {
    root: PathBuf,
    _overlay: Option<Overlay>,
    _lazy: Option<LazyMount>,
}

/// Seconds of one round, or medians of several.
struct Figures {
    first: f64,
    read: f64,
    stat: f64,
}

impl Compared<'_> {
    /// In turn, so that what else the machine does falls on all of them.
    fn compare_ways(&self, rounds: usize, ways: &[Way]) -> Result<()> {
        let mut measured: HashMap<Way, Vec<Figures>> = HashMap::new();
        for _ in 0..rounds {
            for way in ways {
                measured.entry(*way).or_default().push(self.measure(*way)?);
            }
        }
        let medians = |way: Way| {
            let middle = |figure: fn(&Figures) -> f64| median(measured.get(&way).into_iter().flatten().map(figure));
            Figures { first: middle(|one| one.first), read: middle(|one| one.read), stat: middle(|one| one.stat) }
        };
        let (ext4, overlayfs) = (medians(Way::Ext4), medians(Way::Overlayfs));
        print!("{:<10} {:>11} {:>8}", self.name, "first read", "ratio");
        println!(" {:>8} {:>8} {:>8} {:>8}", "read", "ratio", "stat", "ratio");
        for way in ways {
            let Figures { first, read, stat } = medians(*way);
            let ratios = (first / ext4.first, overlayfs.read / read, overlayfs.stat / stat);
            print!("{:<10} {first:>9.2} s {:>8.2}", way.name(), ratios.0);
            println!(" {read:>6.3} s {:>8.2} {stat:>6.3} s {:>8.2}", ratios.1, ratios.2);
        }
        Ok(())
    }

    fn measure(&self, way: Way) -> Result<Figures> {
        let shown = self.show(way)?;
        drop_page_cache()?;
        let first = seconds(|| self.read_all(&shown.root))?;
        stat_all(&shown.root)?;
        let read = seconds(|| self.read_all(&shown.root))?;
        let stat = seconds(|| stat_all(&shown.root))?;
        Ok(Figures { first, read, stat })
    }

    fn show(&self, way: Way) -> Result<Shown> {
        let lazy = match way {
            Way::Ext4 => return Ok(Shown { root: self.native.clone(), _overlay: None, _lazy: None }),
            Way::Overlayfs => None,
            Way::Fuse => Some(self.mount_lazily("fuse")?),
            Way::Erofs | Way::Complete => Some(self.mount_lazily("erofs")?),
        };
        let lower = lazy.as_ref().map_or(self.native.as_path(), LazyMount::path);
        let overlay = Overlay::mount(self.scratch, lower)?;
        Ok(Shown { root: overlay.root.clone(), _overlay: Some(overlay), _lazy: lazy })
    }

    fn mount_lazily(&self, mode: &str) -> Result<LazyMount> {
        LazyMount::in_mode(mode, self.scratch, "lazy", &self.lazy)
    }

    fn read_all(&self, root: &Path) -> Result<()> {
        let read = "cd \"$1\" && xargs -0 cat <\"$2\" >/dev/null";
        run(command("sh", ["-ec", read, "sh"]).arg(root).arg(&self.files)).map(drop)
    }
}

fn stat_all(root: &Path) -> Result<()> {
    let look = "cd \"$1\" && find . -printf '%s %m %T@ %U\\n' >/dev/null";
    run(command("sh", ["-ec", look, "sh"]).arg(root)).map(drop)
}

/// A directory as a container's root; unmounted when dropped.
struct Overlay {
    root: PathBuf,
}

impl Overlay {
    fn mount(scratch: &Scratch, lower: &Path) -> Result<Self> {
        let (root, upper, work) = (scratch.directory("root")?, scratch.directory("upper")?, scratch.directory("work")?);
        let [lower, upper, work] = [lower, &upper, &work].map(Path::display);
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        run(command("mount", ["-t", "overlay", "overlay", "-o", &options]).arg(&root))?;
        Ok(Self { root })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // An error leaves it to the scratch directory.
        let _ = unmount(&self.root, UnmountFlags::DETACH);
    }
}
