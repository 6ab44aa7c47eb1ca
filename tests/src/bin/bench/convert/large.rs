//! An image of one large layer.

use std::fs;

use lazuli_tests::{
    Result, Scratch,
    error::Context as _,
    image::{Layout, digest_of, own_architecture},
    process::{command, run},
};
use serde_json::json;

use crate::unpacked::RealImage;

/// How often the python image is in it: 4 GB plain.
const COPY_COUNT: usize = 8;

/// Writes it into a layout: the root file system of the python image several times, each under a directory of its own.
/// Returns `oci:DIR:tag`.
pub(super) fn write(scratch: &Scratch) -> Result<String> {
    let root = scratch.directory("tree")?;
    RealImage::open("python")?.unpack(&root)?;
    let tar = scratch.join("large.tar");
    for number in 0..COPY_COUNT {
        // Names and hard links begin with the directory, symbolic links lead where they led.
        let rename = format!("--transform=s#^\\.#copy{number}#S");
        run(command("tar", ["--append", "--sort=name", &rename, "-f"]).arg(&tar).arg("-C").arg(&root).arg("."))?;
    }
    fs::remove_dir_all(&root).at("removing", &root)?;
    let diff_id = digest_of(&tar)?.to_string();
    run(command("gzip", ["-1"]).arg(&tar))?;
    let layout = Layout::create(scratch.join("large"))?;
    let layer = layout.add_layer_file(&tar.with_extension("tar.gz"))?;
    let config = json!({
        "architecture": own_architecture(),
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let config = layout.add("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    layout.tag(layout.add_manifest(&config, &[layer])?)?;
    Ok(layout.reference())
}
