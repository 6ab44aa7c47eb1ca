//! The images that `tests/images/build` makes: real programs, real trees, no registry needed.

use std::path::{Path, PathBuf};

use crate::{
    error::{Context as _, Result},
    process::{command, run},
    programs::target_directory,
};

/// The layout of image `name`, as `oci:DIR:latest`; built now if it is not there yet.
///
/// # Errors
///
/// When it cannot be built.
pub fn real_image(name: &str) -> Result<String> {
    let images = target_directory()?.join("images");
    if !images.join(name).join("index.json").is_file() {
        run(command(script(), [name]).env("LAZULI_IMAGES", &images))?;
    }
    Ok(format!("oci:{}:latest", images.join(name).display()))
}

/// The names of all images that there can be.
///
/// # Errors
///
/// When the script cannot be run.
pub fn names() -> Result<Vec<String>> {
    let printed = run(&mut command(script(), ["--list"]))?;
    Ok(printed.lines().map(str::to_owned).collect())
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build")
}

/// A static program that is a shell and all the usual commands, for images made in memory.
///
/// # Errors
///
/// When it cannot be had.
pub fn busybox() -> Result<Vec<u8>> {
    real_image("busybox")?;
    let path = target_directory()?.join("images/.busybox/busybox");
    std::fs::read(&path).at("reading", &path)
}
