//! An image as an ordinary directory: unpacked, and started from there without containerd.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;
use lazuli_tests::{
    Result,
    error::Context as _,
    image::{layout_config, layout_layers},
    process::{command, run},
    real_images::real_image,
};
use serde_json::Value;
use tar::Archive;

/// Where an image without PATH has its programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// In a mount namespace of its own, which ends with the command.
const IN_ROOT: &str =
    "mount -t proc proc \"$0/proc\" && mount --bind /dev \"$0/dev\" && exec /usr/sbin/chroot \"$0\" \"$@\"";

/// An image of `tests/images`.
pub(crate) struct RealImage {
    /// `oci:DIR:tag`.
    pub(crate) layout: String,
    /// The files of its gzip layers, the lowest first.
    pub(crate) layers: Vec<PathBuf>,
    config: Value,
}

impl RealImage {
    /// Builds it if it is not there yet.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let layout = real_image(name)?;
        Ok(Self { layers: layout_layers(&layout)?, config: layout_config(&layout)?, layout })
    }

    /// Its configuration as its layout has it.
    pub(crate) fn config(&self) -> &Value {
        &self.config
    }

    /// Unpacks it into the directory `root`, which is empty.
    pub(crate) fn unpack(&self, root: &Path) -> Result<()> {
        for layer in &self.layers {
            hide(layer, root)?;
            let words = ["-xz", "--numeric-owner", "--exclude=.wh.*", "-f"];
            run(command("tar", words).arg(layer).arg("-C").arg(root))?;
        }
        Ok(())
    }

    /// The largest file of each layer, by its path below the root.
    pub(crate) fn largest_files(&self) -> Result<BTreeSet<PathBuf>> {
        let mut largest = BTreeSet::new();
        for layer in &self.layers {
            let mut found = (0, None);
            for_each_entry(layer, |entry| {
                let len = entry.header().size()?;
                if entry.header().entry_type().is_file() && len > found.0 {
                    found = (len, Some(path_below_root(&entry.path()?)));
                }
                Ok(())
            })?;
            largest.extend(found.1);
        }
        Ok(largest)
    }

    /// Runs its command with `root` as root directory until it has ended.
    pub(crate) fn start(&self, root: &Path) -> Result<()> {
        let words_of = |name: &str| {
            let words = self.config["config"][name].as_array().into_iter().flatten();
            words.filter_map(|word| word.as_str().map(str::to_owned)).collect::<Vec<_>>()
        };
        let mut start = command("unshare", ["--mount", "sh", "-c", IN_ROOT]);
        start.arg(root).args(words_of("Entrypoint")).args(words_of("Cmd")).env_clear().env("PATH", PATH);
        start.envs(words_of("Env").iter().filter_map(|entry| entry.split_once('=')));
        run(&mut start).map(drop)
    }
}

/// Removes from `root` what a layer hides of those below it.
fn hide(layer: &Path, root: &Path) -> Result<()> {
    let root = root.canonicalize().at("looking at", root)?;
    for_each_entry(layer, |entry| {
        let path = entry.path()?.into_owned();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(".wh."));
        let (Some(name), Some(parent)) = (name, path.parent()) else { return Ok(()) };
        let Ok(directory) = root.join(parent).canonicalize() else { return Ok(()) };
        if !directory.starts_with(&root) {
            return Err(io::Error::other(format!("{} leads out of the image", path.display())));
        }
        match name {
            ".wh..opq" => fs::read_dir(&directory)?.try_for_each(|child| remove(&child?.path())),
            name => remove(&directory.join(name)),
        }
    })
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

type Entry<'a> = tar::Entry<'a, MultiGzDecoder<BufReader<File>>>;

fn for_each_entry(layer: &Path, mut look: impl FnMut(&Entry<'_>) -> io::Result<()>) -> Result<()> {
    let mut archive = Archive::new(plain(layer)?);
    for entry in archive.entries().at("reading", layer)? {
        entry.and_then(|entry| look(&entry)).at("reading", layer)?;
    }
    Ok(())
}

/// The tar stream of a layer.
fn plain(layer: &Path) -> Result<MultiGzDecoder<BufReader<File>>> {
    Ok(MultiGzDecoder::new(BufReader::new(File::open(layer).at("opening", layer)?)))
}

/// Length of the tar stream of a layer.
pub(crate) fn plain_len(layer: &Path) -> Result<u64> {
    io::copy(&mut plain(layer)?, &mut io::sink()).at("reading", layer)
}

/// Without the `./` or `/` that paths in a tar stream may begin with.
fn path_below_root(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, std::path::Component::Normal(_))).collect()
}
