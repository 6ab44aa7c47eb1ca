//! The programs under test, as cargo built them beside the tests.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::{Context as _, HarnessError, Result},
    process::{Finished, Service, command, finish},
    scratch::{Scratch, mounts_below},
};

/// The path of one of the project's programs.
///
/// # Errors
///
/// [`HarnessError::Missing`] when it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = profile_directory()?.join(name);
    match path.is_file() {
        true => Ok(path),
        false => Err(HarnessError::Missing(format!(
            "{} is not there: run `make build`, or `make test` that does it first",
            path.display()
        ))),
    }
}

/// Cargo's `target` directory.
///
/// # Errors
///
/// When this program does not lie in one.
pub fn target_directory() -> Result<PathBuf> {
    let profile = profile_directory()?;
    let parent = profile.parent().map(Path::to_owned);
    parent.ok_or_else(|| HarnessError::Missing(format!("{} is not in cargo's target directory", profile.display())))
}

/// `target/release`, whatever the profile of this program or test: programs are tested as people run them.
fn profile_directory() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let profile = own.ancestors().skip(1).find(|ancestor| !ancestor.ends_with("deps"));
    let target = profile.and_then(Path::parent);
    let target = target.ok_or_else(|| HarnessError::Missing(format!("{} has no directory", own.display())))?;
    Ok(target.join("release"))
}

/// Runs `lazuli` to its end.
///
/// # Errors
///
/// When it has not been built; not when it fails.
pub fn lazuli<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
    finish(&mut lazuli_command(arguments)?)
}

/// `lazuli` without the cache of whoever runs the tests: what one test converts is nothing to another.
fn lazuli_command<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<Command> {
    let mut lazuli = command(program("lazuli")?, arguments);
    lazuli.env("XDG_CACHE_HOME", "/dev/null");
    Ok(lazuli)
}

/// Runs `lazuli` and expects exit code 0; returns its standard output.
///
/// # Errors
///
/// When it has not been built, or fails.
pub fn lazuli_ok<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    crate::process::run(&mut lazuli_command(arguments)?)
}

/// Every mode that images and trees can be mounted in.
pub const MODES: [&str; 2] = ["erofs", "fuse"];
/// Modes to mount one image in that is read as a whole each time: the kernel reads it through the session, then the
/// session serves it, and at last the kernel reads the cache files themselves.
pub const FROM_NOTHING_TO_COMPLETE: [&str; 3] = ["erofs", "fuse", "erofs"];

/// An image mounted by `lazuli mount`; dropping it unmounts.
#[derive(Debug)]
pub struct LazyMount {
    path: PathBuf,
    cache: PathBuf,
    service: Service,
}

impl LazyMount {
    /// Mounts `image` at `<scratch>/<name>`, with its cache beside, and waits until it is there.
    ///
    /// # Errors
    ///
    /// When `lazuli mount` ends before the mount is there, with the last line it printed.
    pub fn new(scratch: &Scratch, name: &str, image: &str) -> Result<Self> {
        Self::in_mode("auto", scratch, name, image)
    }

    /// The same in a mode.
    ///
    /// # Errors
    ///
    /// Those of [`Self::new`].
    pub fn in_mode(mode: &str, scratch: &Scratch, name: &str, image: &str) -> Result<Self> {
        let path = scratch.directory(name)?;
        let cache = scratch.directory(format!("{name}.cache"))?;
        let mut mount = command(program("lazuli")?, ["mount", image]);
        mount.arg(&path).arg("--cache").arg(&cache).args(["--mode", mode]);
        let log = scratch.log(name);
        // A test may mount twice under one name: the line that says so must be of this time.
        std::fs::write(&log, "").at("emptying", &log)?;
        let says_so = || std::fs::read_to_string(&log).is_ok_and(|printed| printed.ends_with('\n'));
        let is_mounted = || !mounts_below(&path).is_empty() && says_so();
        let service = Service::start("lazuli mount", &mut mount, &log, is_mounted)?;
        Ok(Self { path, cache, service })
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cache directory.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Has `fsck.erofs` look at the EROFS images in the cache and read all their files, with the cache files of the
    /// layers as devices: in kernel mode there is one, which must be read completely before.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Unexpected`] with what it says against one; when there is none.
    pub fn fsck(&self) -> Result<()> {
        let trees = self.cache.join("trees");
        let entries = std::fs::read_dir(&trees).at("listing", &trees)?;
        let is_image = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "erofs");
        let images: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_image).collect();
        for image in &images {
            let record_path = image.with_extension("json");
            let record = std::fs::read(&record_path).at("reading", &record_path)?;
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let ids = record["layers"].as_array().into_iter().flatten().map(|layer| &layer["layer"]["index"]["digest"]);
            let data = |id: &str| self.cache.join("cache/layers").join(id.trim_start_matches("sha256:")).join("data");
            let devices = ids.filter_map(|id| id.as_str()).map(|id| format!("--device={}", data(id).display()));
            let finished = finish(command("fsck.erofs", devices).args(["-d3", "--extract"]).arg(image))?;
            let printed = finished.stdout.clone() + &finished.stderr;
            if finished.code != Some(0) || printed.contains("<E>") || !printed.contains("No errors found") {
                return Err(HarnessError::Unexpected(format!("fsck.erofs of {}: {finished:?}", image.display())));
            }
        }
        match images.len() {
            0 => Err(HarnessError::Unexpected(format!("no EROFS image in {}", trees.display()))),
            _ => Ok(()),
        }
    }

    /// What `lazuli mount` has printed so far.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(self.service.log()).unwrap_or_default()
    }

    /// The process `lazuli mount`.
    pub fn service(&mut self) -> &mut Service {
        &mut self.service
    }

    /// Ends `lazuli mount` by SIGTERM; returns whether the mount is gone.
    pub fn stop(&mut self) -> bool {
        self.service.stop();
        mounts_below(&self.path).is_empty()
    }
}
