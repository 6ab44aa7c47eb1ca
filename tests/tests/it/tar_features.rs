//! Every feature of tar: a converted image shows, in every field, what containerd unpacks of the original,
//! and what containerd refuses is refused.
//!
//! One containerd takes in all images at once; each is then unpacked onto overlayfs, converted, mounted
//! and compared. `docs/SEMANTICS.md` names the cases.

mod archive;
mod metadata;
mod paths;
mod whiteouts;

use std::path::Path;

use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, ImageBuilder, LazyMount, RawTar, Result, Scratch, compare_trees,
    containerd::OVERLAYFS,
    lazuli,
    process::{command, run},
    programs::MODES,
};

/// An image and what is expected of it.
struct Case {
    name: &'static str,
    layers: Vec<Vec<u8>>,
    expected: Expected,
}

enum Expected {
    /// Both show the same, but for the times of these directories: they have no entry in their uppermost
    /// layer, and containerd gives them the time of unpacking.
    Same { without_entry: &'static [&'static str] },
    /// Both show the same, but for link counts: overlayfs counts names that upper layers hide.
    SameButLinkCounts,
    /// containerd does not unpack it, and the converter says why in one line with these words.
    Refused(&'static [&'static str]),
}

/// An image that both show alike.
fn same(name: &'static str, layers: impl IntoIterator<Item = RawTar>) -> Case {
    same_without_entry(name, &[], layers)
}

fn same_without_entry(
    name: &'static str,
    without_entry: &'static [&'static str],
    layers: impl IntoIterator<Item = RawTar>,
) -> Case {
    let layers = layers.into_iter().map(RawTar::finish).collect();
    Case { name, layers, expected: Expected::Same { without_entry } }
}

/// An image that both refuse.
fn refused(name: &'static str, words: &'static [&'static str], layers: impl IntoIterator<Item = RawTar>) -> Case {
    let layers = layers.into_iter().map(RawTar::finish).collect();
    Case { name, layers, expected: Expected::Refused(words) }
}

fn cases() -> Vec<Case> {
    [archive::cases(), paths::cases(), metadata::cases(), whiteouts::cases()].into_iter().flatten().collect()
}

#[test]
fn each_image_shows_what_containerd_unpacks() -> Result<()> {
    let scratch = Scratch::new("tar-features")?;
    let cases = cases();
    let images: Vec<_> = cases.iter().map(|case| (case.name.to_owned(), image_of(&case.layers))).collect();
    let archive = ImageBuilder::write_all(&images, &scratch, "case")?;
    let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
    containerd.import(&archive)?;
    let mut failures = Vec::new();
    for case in &cases {
        let found = check(&scratch, &containerd, case)?;
        failures.extend(found.into_iter().map(|failure| format!("{}: {failure}", case.name)));
    }
    assert!(failures.is_empty(), "{} cases, wrong:\n{}", cases.len(), failures.join("\n"));
    Ok(())
}

/// Above a layer of its own: containerd mounts an image of one layer without overlayfs.
fn image_of(layers: &[Vec<u8>]) -> ImageBuilder {
    let base = RawTar::new().directory("base").file("base/file", b"below everything").finish();
    let image = ImageBuilder::new().layer(base, Compression::None);
    layers.iter().fold(image, |image, tar| image.layer(tar.clone(), Compression::Gzip))
}

/// What is not as expected.
fn check(scratch: &Scratch, containerd: &Containerd, case: &Case) -> Result<Vec<String>> {
    let name = case.name;
    // containerd keeps the mount under the name of its directory.
    let truth = scratch.directory(format!("truth-{name}"))?;
    let source = format!("oci:{}:{name}", scratch.join("case").display());
    let lazy = format!("oci:{}:lazy", scratch.join(format!("lazy-{name}")).display());
    let unpacked = containerd.mount_image(&format!("case/{name}:latest"), OVERLAYFS, &truth);
    let converted = lazuli(["convert", &source, &lazy])?;
    let line = converted.stderr.lines().filter(|line| !line.starts_with("layer ")).collect::<Vec<_>>();
    if let Expected::Refused(words) = case.expected {
        let is_told = matches!(*line, [line] if words.iter().all(|word| line.contains(word)));
        let mut failures = Vec::new();
        if unpacked.is_ok() {
            unmount(&truth)?;
            failures.push("containerd unpacks it".to_owned());
        }
        if converted.code != Some(1) || !is_told {
            failures.push(format!("converted with {:?} and {line:?}", converted.code));
        }
        return Ok(failures);
    }
    if let Err(error) = unpacked {
        return Ok(vec![format!("containerd refuses it: {error}; converted with {:?}", converted.code)]);
    }
    if converted.code != Some(0) {
        unmount(&truth)?;
        return Ok(vec![format!("the converter refuses it: {line:?}")]);
    }
    let mut differences = Vec::new();
    for mode in MODES {
        let mount = LazyMount::in_mode(mode, scratch, &format!("lazy-{mode}"), &lazy)?;
        differences.extend(compare_trees(&truth, mount.path())?);
        if mode == "erofs" {
            mount.fsck()?;
        }
    }
    unmount(&truth)?;
    match case.expected {
        Expected::Same { without_entry } => differences.retain(|difference| {
            let is_unnamed = without_entry.iter().any(|path| Path::new(path) == difference.path);
            !(is_unnamed && difference.what.starts_with("modification time"))
        }),
        Expected::SameButLinkCounts => differences.retain(|difference| !difference.what.starts_with("link count")),
        Expected::Refused(_) => {}
    }
    Ok(differences.iter().map(ToString::to_string).collect())
}

fn unmount(directory: &Path) -> Result<()> {
    run(&mut command("umount", [directory])).map(drop)
}

#[test]
fn the_semantics_name_every_case() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/SEMANTICS.md");
    let text = std::fs::read_to_string(path).expect("readable");
    let missing: Vec<_> =
        cases().iter().map(|case| case.name).filter(|name| !text.contains(&format!("`{name}`"))).collect();
    assert_eq!(missing, [] as [&str; 0]);
}
