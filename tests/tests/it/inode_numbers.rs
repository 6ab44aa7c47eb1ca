//! Inode numbers of a container's root directory: each row of the table "Inode properties" in the kernel's
//! Documentation/filesystems/overlayfs.rst, as it is where all layers are on one file system.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
};

use lazuli_tests::{
    Compression, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry,
    containerd::LAZULI,
    error::{Context as _, HarnessError},
    process::{command, run},
    programs::{MODES, lazuli_ok},
};
use rustix::mount::{UnmountFlags, unmount};

/// Has the kernel forget directory entries and inodes that nobody uses.
fn drop_inodes() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("writing drop_caches")
}

/// Device and number of everything below a directory, by path; what `readdir` says must agree.
fn numbers(root: &Path) -> Result<BTreeMap<PathBuf, (u64, u64)>> {
    let of = |path: &Path| fs::symlink_metadata(path).at("looking at", path).map(|found| (found.dev(), found.ino()));
    let mut numbers = BTreeMap::from([(root.to_owned(), of(root)?)]);
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).at("listing", &directory)? {
            let entry = entry.at("listing", &directory)?;
            let path = entry.path();
            let number = of(&path)?;
            assert_eq!(entry.ino(), number.1, "d_ino of {}", path.display());
            numbers.insert(path.clone(), number);
            if entry.file_type().at("looking at", &path)?.is_dir() {
                waiting.push(path);
            }
        }
    }
    Ok(numbers)
}

/// A writable snapshot of an image, mounted; unmounted when dropped.
struct Root<'a> {
    node: &'a Node,
    path: PathBuf,
    key: &'static str,
}

impl<'a> Root<'a> {
    fn of(node: &'a Node, key: &'static str, chain: &str, path: PathBuf) -> Result<Self> {
        run(&mut node.containerd.ctr(["snapshots", "--snapshotter", LAZULI, "prepare", key, chain]))?;
        fs::create_dir_all(&path).at("creating", &path)?;
        let root = Self { node, path, key };
        root.mount()?;
        Ok(root)
    }

    /// As `ctr` says it is mounted.
    fn mount(&self) -> Result<()> {
        let path = self.path.display().to_string();
        let words = ["snapshots", "--snapshotter", LAZULI, "mounts", &path, self.key];
        let mount = run(&mut self.node.containerd.ctr(words))?;
        run(&mut command("sh", ["-c", mount.trim()])).map(drop)
    }

    fn unmount(&self) -> Result<()> {
        unmount(&self.path, UnmountFlags::empty()).map_err(std::io::Error::from).at("unmounting", &self.path)
    }
}

impl Drop for Root<'_> {
    fn drop(&mut self) {
        // It may be unmounted already.
        let _gone = unmount(&self.path, UnmountFlags::DETACH);
    }
}

#[test]
fn inode_numbers_are_those_of_one_file_system_in_both_modes() -> Result<()> {
    let scratch = Scratch::new("inode-numbers")?;
    let registry = TestRegistry::start(&scratch)?;
    let mut layer = TarLayer::new().directory("data").directory("data/below");
    for number in 0..50 {
        layer = layer.directory(&format!("data/{number}")).file(&format!("data/{number}/file"), number.to_string());
    }
    let image = ImageBuilder::new().layer(layer.finish()?, Compression::Gzip).command(&["/none"]);
    let original = registry.push(&image.write(&scratch, "image")?, "numbers:original")?;
    let lazy = registry.reference("numbers:lazy");
    lazuli_ok(["convert", &original, &lazy])?;
    for mode in MODES {
        let scratch = Scratch::new(&format!("inode-numbers-{mode}"))?;
        let node = Node::start_in(mode, &scratch)?;
        assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
        let listed = run(&mut node.containerd.ctr(["snapshots", "--snapshotter", LAZULI, "list"]))?;
        let chain =
            listed.lines().find_map(|line| line.split_whitespace().next().filter(|key| key.starts_with("sha256:")));
        let chain = chain.ok_or_else(|| HarnessError::Unexpected(format!("no snapshot: {listed}")))?;
        let root = Root::of(&node, "container", chain, scratch.join("mounted"))?;
        let path = &root.path;

        let before = numbers(path)?;
        drop_inodes()?;
        assert_eq!(numbers(path)?, before, "{mode}: after the kernel dropped what it remembers");
        let devices: std::collections::BTreeSet<_> = before.values().map(|(device, _)| device).collect();
        let distinct: std::collections::BTreeSet<_> = before.values().collect();
        assert_eq!((devices.len(), distinct.len()), (1, before.len()), "{mode}: one device, no number twice");

        for name in ["data/1/file", "data/2", "data"] {
            let name = path.join(name);
            fs::set_permissions(&name, fs::Permissions::from_mode(0o700)).at("changing", &name)?;
        }
        fs::write(path.join("data/3/new"), "x").context("writing")?;
        let mut changed = numbers(path)?;
        let new = changed.remove(&path.join("data/3/new"));
        assert_eq!(changed, before, "{mode}: after what was changed lies in the upper directory");
        assert_eq!(new.map(|(device, _)| device), devices.first().map(|device| **device), "{mode}");
        drop_inodes()?;
        root.unmount()?;
        root.mount()?;
        // The device is of the mount.
        let again: BTreeMap<_, _> = numbers(path)?.into_iter().map(|(path, (_, number))| (path, number)).collect();
        let expected: BTreeMap<_, _> = before.iter().map(|(path, (_, number))| (path.clone(), *number)).collect();
        assert_eq!(
            again.into_iter().filter(|(path, _)| expected.contains_key(path)).collect::<BTreeMap<_, _>>(),
            expected
        );
        unpack_while_inodes_go(path)?;
    }
    Ok(())
}

/// GNU tar looks back at directories that it made when an archive has absolute links, and compares their numbers.
fn unpack_while_inodes_go(root: &Path) -> Result<()> {
    let source = root.join("source");
    for name in ["a", "b"] {
        fs::create_dir_all(source.join(name)).context("creating directories")?;
        fs::write(source.join(name).join("file"), name).context("writing")?;
    }
    std::os::unix::fs::symlink("/etc/absolute", source.join("a/link")).context("linking")?;
    let (archive, target) = (root.join("archive.tar"), root.join("data/below"));
    run(command("tar", ["--sort=name", "-b1", "-cf"]).arg(&archive).arg("-C").arg(&source).arg("."))?;
    let bytes = fs::read(&archive).at("reading", &archive)?;
    let mut unpack = command("tar", ["-b1", "-xf", "-", "-C"]);
    let mut unpack = unpack.arg(&target).stdin(Stdio::piped()).spawn().context("starting tar")?;
    let mut input = unpack.stdin.take().ok_or_else(|| HarnessError::Unexpected("tar has no input".to_owned()))?;
    for part in bytes.chunks(bytes.len().div_ceil(4).next_multiple_of(512)) {
        std::io::Write::write_all(&mut input, part).context("writing to tar")?;
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop_inodes()?;
    }
    drop(input);
    assert!(unpack.wait().context("waiting for tar")?.success());
    assert_eq!(fs::read_to_string(target.join("b/file")).context("reading")?, "b");
    Ok(())
}
