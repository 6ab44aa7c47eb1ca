//! Bad input: one clear line, exit code 1, nothing half-written, no mount left.

use std::{fs, path::Path};

use format_spec::Digest;
use lazuli_tests::{
    Compression, Finished, ImageBuilder, LazyMount, Result, Scratch, TarLayer, TestRegistry,
    error::Context as _,
    image::own_architecture,
    lazuli,
    process::{command, finish},
    programs::{lazuli_ok, program},
    registry_server::{digest_in, free_address},
    samples::noise,
};

/// A registry with `sample:latest`, two layers of which the second is large enough to be damaged.
struct Given {
    scratch: Scratch,
    registry: TestRegistry,
    source: String,
    layer: Digest,
}

impl Given {
    fn new(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let registry = TestRegistry::start(&scratch)?;
        let image = ImageBuilder::new()
            .layer(TarLayer::new().file("hello", "hello").finish()?, Compression::Gzip)
            .layer(TarLayer::new().file("noise", noise(1, 1 << 20)).finish()?, Compression::Gzip);
        let source = registry.push(&image.write(&scratch, "image")?, "sample:latest")?;
        let layer = digest_in(&registry.manifest("sample:latest")?["layers"][1])?;
        Ok(Self { scratch, registry, source, layer })
    }

    /// Converts `source` to the registry and to a layout, and expects the same failure twice.
    fn check_convert(&self, source: &str, words: &[&str]) -> Result<()> {
        self.check_convert_with(source, &[], words)
    }

    fn check_convert_with(&self, source: &str, options: &[&str], words: &[&str]) -> Result<()> {
        let layout = self.scratch.join("never-written");
        let destinations = [self.registry.reference("broken:lazy"), format!("oci:{}:lazy", layout.display())];
        for destination in &destinations {
            let finished = lazuli(["convert", source, destination].iter().chain(options))?;
            check_failure(&finished, words);
        }
        assert_eq!(self.registry.tags("broken"), [] as [String; 0]);
        assert!(!layout.exists(), "{} was left behind", layout.display());
        Ok(())
    }
}

/// One line that says what is wrong, with `words` in it, after nothing but lines about layers that were
/// right; nothing on standard output; exit code 1.
fn check_failure(finished: &Finished, words: &[&str]) {
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""), "{finished:?}");
    let lines: Vec<_> = finished.stderr.lines().filter(|line| !line.starts_with("layer ")).collect();
    let [line] = lines.as_slice() else { panic!("not one line: {finished:?}") };
    for word in words {
        assert!(line.contains(word), "{word:?} is missing: {line}");
    }
}

fn check_no_mount(scratch: &Scratch) {
    assert_eq!(scratch.mounts(), [] as [std::path::PathBuf; 0]);
}

#[test]
fn unknown_repository_and_tag_are_refused() -> Result<()> {
    let given = Given::new("unknown-names")?;
    for name in ["nowhere:latest", "sample:missing"] {
        let reference = given.registry.reference(name);
        given.check_convert(&reference, &[&reference])?;
        let point = given.scratch.directory("point")?;
        check_failure(&lazuli(["mount".as_ref(), reference.as_ref(), point.as_os_str()])?, &[&reference]);
        check_no_mount(&given.scratch);
    }
    let layout = format!("oci:{}:latest", given.scratch.join("no-such-layout").display());
    given.check_convert(&layout, &["no-such-layout"])
}

#[test]
fn unreachable_host_is_named() -> Result<()> {
    let given = Given::new("unreachable-host")?;
    let nobody = free_address()?;
    given.check_convert(&format!("{nobody}/sample:latest"), &[&nobody])?;
    let layout = given.scratch.join("never-written");
    let finished = lazuli(["convert", &given.source, &format!("{nobody}/sample:lazy")])?;
    check_failure(&finished, &[&nobody]);
    assert!(!layout.exists());
    Ok(())
}

#[test]
fn registry_without_permission_is_named() -> Result<()> {
    let given = Given::new("no-permission")?;
    let scratch = Scratch::new("no-permission-registry")?;
    let closed = TestRegistry::start_closed(&scratch)?;
    let reference = closed.reference("sample:latest");
    given.check_convert(&reference, &[closed.address()])?;
    let finished = lazuli(["convert", &given.source, &reference])?;
    check_failure(&finished, &[closed.address()]);
    Ok(())
}

#[test]
fn layer_that_does_not_match_its_digest_is_refused() -> Result<()> {
    let given = Given::new("wrong-digest")?;
    let file = given.registry.blob_file(given.layer);
    let mut blob = fs::read(&file).at("reading", &file)?;
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    fs::write(&file, blob).at("writing", &file)?;
    given.check_convert(&given.source, &[&given.layer.to_string()])
}

#[test]
fn truncated_layer_is_refused() -> Result<()> {
    let given = Given::new("truncated-layer")?;
    let path = given.registry.blob_file(given.layer);
    let file = fs::File::options().write(true).open(&path).at("opening", &path)?;
    file.set_len(file.metadata().at("measuring", &path)?.len() / 2).at("cutting", &path)?;
    given.check_convert(&given.source, &[&given.layer.to_string()])
}

#[test]
fn image_for_another_platform_is_refused() -> Result<()> {
    let given = Given::new("other-platform")?;
    let own = format!("linux/{}", own_architecture());
    given.check_convert_with(&given.source, &["--platform", "linux/s390x"], &["linux/s390x", &own])?;
    let image = ImageBuilder::new().layer(TarLayer::new().file("a", "a").finish()?, Compression::Gzip);
    let index = image.architecture("s390x").write_index(&given.scratch, "index")?;
    given.check_convert(&index, &["linux/s390x", &own])
}

#[test]
fn mount_point_that_is_no_directory_is_refused() -> Result<()> {
    let given = Given::new("no-mount-point")?;
    let lazy = given.registry.reference("sample:lazy");
    lazuli_ok(["convert", &given.source, &lazy])?;
    let file = given.scratch.join("a-file");
    fs::write(&file, "").at("writing", &file)?;
    for point in [given.scratch.join("not-there"), file] {
        let words = [point.to_str().expect("a name of ASCII")];
        check_failure(&lazuli(["mount".as_ref(), lazy.as_ref(), point.as_os_str()])?, &words);
    }
    check_no_mount(&given.scratch);
    Ok(())
}

#[test]
fn image_that_was_not_converted_is_not_mounted() -> Result<()> {
    let given = Given::new("not-converted")?;
    let point = given.scratch.directory("point")?;
    let finished = lazuli(["mount".as_ref(), given.source.as_ref(), point.as_os_str()])?;
    check_failure(&finished, &[&given.source, "convert"]);
    check_no_mount(&given.scratch);
    Ok(())
}

/// Takes `/dev` away from `lazuli mount` in a mount namespace of its own.
#[test]
fn machine_without_fuse_is_told_so() -> Result<()> {
    let given = Given::new("no-fuse")?;
    let lazy = given.registry.reference("sample:lazy");
    lazuli_ok(["convert", &given.source, &lazy])?;
    let point = given.scratch.directory("point")?;
    let hide = "mount -t tmpfs none /dev && exec \"$@\"";
    let mut hidden = command("unshare", ["--mount", "sh", "-c", hide, "sh"]);
    hidden.arg(program("lazuli")?).arg("mount").arg(lazy).arg(&point);
    check_failure(&finish(&mut hidden)?, &["/dev/fuse"]);
    check_no_mount(&given.scratch);
    Ok(())
}

#[test]
fn wrong_usage_has_its_own_exit_code() -> Result<()> {
    for arguments in [&["convert"] as &[&str], &["convert", "oci:", "oci:a"], &["no-such-command"]] {
        assert_eq!(lazuli(arguments)?.code, Some(2), "{arguments:?}");
    }
    Ok(())
}

/// A registry that goes away under a mount: the read fails or waits, nothing else is lost.
#[test]
fn mount_of_a_vanished_registry_still_ends() -> Result<()> {
    let Given { scratch, registry, source, .. } = Given::new("vanished-registry")?;
    let lazy = registry.reference("sample:lazy");
    lazuli_ok(["convert", &source, &lazy])?;
    let mut mount = LazyMount::new(&scratch, "lazy", &lazy)?;
    assert_eq!(fs::read(mount.path().join("hello")).context("reading lazily")?, b"hello");
    drop(registry);
    assert_eq!(fs::metadata(mount.path().join("noise")).context("asking lazily")?.len(), 1 << 20);
    assert_eq!(fs::read(mount.path().join("hello")).context("reading again")?, b"hello");
    assert!(mount.stop());
    check_no_mount_below(mount.path());
    Ok(())
}

fn check_no_mount_below(path: &Path) {
    assert_eq!(lazuli_tests::scratch::mounts_below(path), [] as [std::path::PathBuf; 0]);
}
