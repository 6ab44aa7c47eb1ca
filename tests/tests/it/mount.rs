//! `lazuli mount`: the tree of the original, read by range, verified, and gone afterwards.

use std::{fs, os::unix::fs::FileExt as _, path::Path};

use format_spec::Digest;
use lazuli_tests::{
    Compression, Containerd, ContainerdOptions, HarnessError, ImageBuilder, LazyMount, Result, Scratch, TestRegistry,
    compare_trees,
    containerd::OVERLAYFS,
    diff_trees,
    error::Context as _,
    process::{command, run, wait_for},
    programs::{FROM_NOTHING_TO_COMPLETE, lazuli_ok},
    real_images::real_image,
    registry_server::digest_in,
    samples::{LARGE_FILE_COUNT, LARGE_FILE_LEN, eventful_layers, large_file, readable_layers},
};

/// Pushes an image and its converted form; returns both references.
fn publish(registry: &TestRegistry, layout: &str) -> Result<(String, String)> {
    let original = registry.push(layout, "sample:original")?;
    let lazy = registry.reference("sample:lazy");
    lazuli_ok(["convert", &original, &lazy])?;
    Ok((original, lazy))
}

fn image_of(layers: Vec<Vec<u8>>) -> ImageBuilder {
    layers.into_iter().fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip))
}

/// An empty tree is a tree: containerd mounts one, and so does this.
#[test]
fn an_image_without_layers_shows_an_empty_root() -> Result<()> {
    let scratch = Scratch::new("without-layers")?;
    let lazy = format!("oci:{}:lazy", scratch.join("converted").display());
    lazuli_ok(["convert", &image_of(Vec::new()).write(&scratch, "image")?, &lazy])?;
    for mode in FROM_NOTHING_TO_COMPLETE {
        let mount = LazyMount::in_mode(mode, &scratch, "lazy", &lazy)?;
        assert_eq!(fs::read_dir(mount.path()).context("reading the root")?.count(), 0, "{mode}");
        mount.fsck()?;
    }
    Ok(())
}

/// Whether the lazy tree shows what containerd's overlayfs shows of the original.
fn check_same_tree(scratch: &Scratch, registry: &TestRegistry, layout: &str) -> Result<()> {
    let (original, lazy) = publish(registry, layout)?;
    let containerd = Containerd::start(scratch, &ContainerdOptions::default())?;
    containerd.pull(&original, OVERLAYFS)?;
    let truth = scratch.directory("truth")?;
    containerd.mount_image(&original, OVERLAYFS, &truth)?;
    for mode in FROM_NOTHING_TO_COMPLETE {
        let mount = LazyMount::in_mode(mode, scratch, "lazy", &lazy)?;
        let differences: Vec<_> = compare_trees(&truth, mount.path())?.iter().map(ToString::to_string).collect();
        assert_eq!(differences, Vec::<String>::new(), "{mode}");
        assert_eq!(diff_trees(&truth, mount.path())?, Vec::<String>::new(), "{mode}");
        mount.fsck()?;
    }
    Ok(())
}

#[test]
fn tree_with_every_kind_of_entry_is_that_of_the_original() -> Result<()> {
    let scratch = Scratch::new("every-kind-of-entry")?;
    let registry = TestRegistry::start(&scratch)?;
    let layout = image_of(eventful_layers()?).write(&scratch, "image")?;
    check_same_tree(&scratch, &registry, &layout)
}

#[test]
fn tree_of_debian_is_that_of_the_original() -> Result<()> {
    let scratch = Scratch::new("tree-of-debian")?;
    let registry = TestRegistry::start(&scratch)?;
    check_same_tree(&scratch, &registry, &real_image("debian")?)
}

#[test]
fn layout_can_be_mounted_without_a_registry() -> Result<()> {
    let scratch = Scratch::new("mount-of-a-layout")?;
    let source = image_of(readable_layers()?).write(&scratch, "image")?;
    let layout = format!("oci:{}:lazy", scratch.join("converted").display());
    lazuli_ok(["convert", &source, &layout])?;
    let mount = LazyMount::new(&scratch, "lazy", &layout)?;
    assert_eq!(fs::read(mount.path().join("large/2")).context("reading lazily")?, large_file(2));
    Ok(())
}

/// Mounts an image of 12 MB: the mount fetches little, one file about its own size, and a second read
/// nothing; a second mount over the same cache fetches no data at all.
#[test]
fn only_what_is_read_is_fetched_and_only_once() -> Result<()> {
    let scratch = Scratch::new("only-what-is-read")?;
    let registry = TestRegistry::start(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    // Without hot packs, which a mount brings along.
    lazuli_ok(["convert", "--no-hot-pack", &image_of(readable_layers()?).write(&scratch, "image")?, &lazy])?;
    let whole = (LARGE_FILE_LEN * LARGE_FILE_COUNT) as u64;
    let before = registry.blob_bytes()?;

    let mut mount = LazyMount::new(&scratch, "lazy", &lazy)?;
    let mounted = registry.blob_bytes()? - before;
    assert!(mounted < whole / 20, "{mounted} bytes for mounting");
    assert_eq!(fs::read(mount.path().join("large/4")).context("reading lazily")?, large_file(4));
    let read = registry.blob_bytes()? - before - mounted;
    assert!(read < whole / 3, "{read} bytes for one file of {LARGE_FILE_LEN}");
    assert_eq!(fs::read(mount.path().join("large/4")).context("reading lazily")?, large_file(4));
    assert_eq!(registry.blob_bytes()? - before - mounted, read);
    assert!(mount.stop());

    let mount = LazyMount::new(&scratch, "lazy", &lazy)?;
    let before = registry.blob_bytes()?;
    assert_eq!(fs::read(mount.path().join("large/4")).context("reading lazily")?, large_file(4));
    assert_eq!(registry.blob_bytes()?, before);
    Ok(())
}

/// Changes one byte in the middle of the blob that the registry keeps. Reading every file then fails
/// with EIO for those in that frame, and gives the right bytes for all others; the log names the blob,
/// the frame and both digests.
#[test]
fn wrong_byte_from_the_registry_is_never_returned() -> Result<()> {
    let scratch = Scratch::new("wrong-byte")?;
    let registry = TestRegistry::start(&scratch)?;
    let (_, lazy) = publish(&registry, &image_of(readable_layers()?).write(&scratch, "image")?)?;
    let manifest = registry.manifest("sample:lazy")?;
    let blob = digest_in(&manifest["layers"][2])?;
    flip_byte(&registry.blob_file(blob), 5 << 20)?;

    let mount = LazyMount::new(&scratch, "lazy", &lazy)?;
    let mut failed = 0;
    for index in 0..LARGE_FILE_COUNT {
        match fs::read(mount.path().join("large").join(index.to_string())) {
            Ok(content) => assert!(content == large_file(index), "wrong bytes in file {index}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
                failed += 1;
            }
        }
    }
    assert!((1..=2).contains(&failed), "{failed} files failed");
    let blob = blob.to_string();
    let is_told = |line: &str| line.contains(&blob) && line.contains("frame") && digests_in(line) >= 3;
    assert!(mount.printed().lines().any(is_told), "{}", mount.printed());
    Ok(())
}

#[test]
fn index_that_does_not_match_its_digest_is_not_mounted() -> Result<()> {
    let scratch = Scratch::new("wrong-index")?;
    let registry = TestRegistry::start(&scratch)?;
    let (_, lazy) = publish(&registry, &image_of(readable_layers()?).write(&scratch, "image")?)?;
    let layer = &registry.manifest("sample:lazy")?["layers"][2];
    let annotation = &layer["annotations"]["containerd.io/snapshot/lazuli/index.offset"];
    let offset: u64 = annotation.as_str().and_then(|text| text.parse().ok()).expect("the index has an offset");
    flip_byte(&registry.blob_file(digest_in(layer)?), offset + 20)?;
    let Err(HarnessError::Unexpected(message)) = LazyMount::new(&scratch, "lazy", &lazy) else {
        panic!("mounted in spite of a wrong index");
    };
    assert!(message.contains("sha256:"), "{message}");
    assert_eq!(scratch.mounts(), [] as [std::path::PathBuf; 0]);
    Ok(())
}

#[test]
fn mount_ends_with_the_command_and_the_command_with_the_mount() -> Result<()> {
    let scratch = Scratch::new("mount-ends")?;
    let registry = TestRegistry::start(&scratch)?;
    let (_, lazy) = publish(&registry, &image_of(readable_layers()?).write(&scratch, "image")?)?;
    for (name, signal) in [("by-sigterm", rustix::process::Signal::TERM), ("by-sigint", rustix::process::Signal::INT)] {
        let mut mount = LazyMount::new(&scratch, name, &lazy)?;
        assert_eq!(mount.printed().lines().count(), 1, "{}", mount.printed());
        mount.service().signal(signal);
        assert_eq!(exit_code(&mut mount)?, Some(0), "{}", mount.printed());
        assert_eq!(scratch.mounts(), [] as [std::path::PathBuf; 0]);
    }
    let mut mount = LazyMount::new(&scratch, "by-umount", &lazy)?;
    run(command("umount", [mount.path()]).env("LC_ALL", "C"))?;
    assert_eq!(exit_code(&mut mount)?, Some(0), "{}", mount.printed());
    Ok(())
}

fn exit_code(mount: &mut LazyMount) -> Result<Option<i32>> {
    let status = wait_for("lazuli mount did not end", || mount.service().exit_status())?;
    Ok(status.code())
}

fn flip_byte(path: &Path, offset: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(path).at("opening", path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).at("reading", path)?;
    byte[0] ^= 1;
    file.write_all_at(&byte, offset).at("writing", path)
}

/// How many different digests a line names.
fn digests_in(line: &str) -> usize {
    let starts = line.match_indices("sha256:").map(|(index, _)| &line[index..]);
    let digests = starts.filter_map(|rest| rest.get(..71)?.parse::<Digest>().ok());
    digests.collect::<std::collections::BTreeSet<_>>().len()
}
