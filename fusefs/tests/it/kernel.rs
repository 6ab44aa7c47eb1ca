//! Kernel mode of the daemon: what is mounted where, from what it is read, and what a restart finds.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use control::{Mode, RemoteLayer, Request, Response, TreeMode, TreeStatus};

use crate::support::{
    daemon::{Running, options},
    *,
};
use fusefs::{DaemonOptions, SessionOptions};

/// Two layers with a file of several frames in each.
fn two_layers(registry: &Registry) -> Vec<RemoteLayer> {
    let lower = layer([("lower", file(noise(1, 200_000))), ("both", file("old"))]);
    let upper = layer([("upper", file(noise(2, 200_000))), ("both", file("new"))]);
    vec![registry.push(&lower), registry.push(&upper)]
}

fn file_system_of(path: &Path) -> u32 {
    u32::try_from(rustix::fs::statfs(path).unwrap().f_type).unwrap()
}

/// `f_type` of EROFS (Linux include/uapi/linux/magic.h).
const EROFS: u32 = 0xE0F5_E1E2;

fn tree_status(daemon: &Running) -> TreeStatus {
    match daemon.ask(&Request::Status) {
        Response::Status { trees, .. } => trees.into_iter().next().unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Content as it is read anew, not from the page cache.
fn read_anew(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    content
}

fn image_of(root: &Path, layers: &[RemoteLayer]) -> PathBuf {
    root.join("root/trees").join(id_of(layers).hex() + ".erofs")
}

#[test]
fn a_tree_is_an_erofs_mount_whose_image_is_kept_and_sound() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    let path = daemon.mount(&layers);
    assert_eq!(path, daemon.root.join("erofs").join(id_of(&layers).hex()));
    assert_eq!(file_system_of(&path), EROFS);
    assert_eq!(fs::read(path.join("lower")).unwrap(), noise(1, 200_000));
    assert_eq!(fs::read(path.join("both")).unwrap(), b"new");
    assert_eq!(daemon.mount(&layers), path, "asked for twice, mounted once");
    let expected = TreeStatus {
        tree: id_of(&layers),
        layers: layers.iter().map(|layer| layer.layer.id()).collect(),
        mode: TreeMode::Erofs,
        direct_layers: Vec::new(),
    };
    assert_eq!(tree_status(&daemon), expected);
    fsck(&image_of(root.path(), &layers), &daemon, &layers);
    for part in ["", "erofs", "trees", "cache", "mnt"] {
        let mode = fs::metadata(daemon.root.join(part)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700, "{part}: programs of an image run for nobody else");
    }

    let image = fs::metadata(image_of(root.path(), &layers)).unwrap().ino();
    drop(daemon);
    assert!(!path.exists());
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    assert_eq!(daemon.mount(&layers), path);
    assert_eq!(fs::metadata(image_of(root.path(), &layers)).unwrap().ino(), image, "the image is used again");
}

/// The oracle reads all files too: devices are those of the session.
fn fsck(image: &Path, daemon: &Running, layers: &[RemoteLayer]) {
    let devices = layers.iter().map(|layer| daemon.root.join("mnt/layers").join(layer.layer.id().hex()));
    let mut fsck = Command::new("fsck.erofs");
    fsck.args(devices.map(|path| format!("--device={}", path.display())));
    let output = fsck.args(["-d3", "--extract"]).arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("<E>") && text.contains("No errors found"), "{text}");
}

#[test]
fn a_tree_of_complete_layers_is_read_without_the_daemon() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let ids: Vec<_> = layers.iter().map(|layer| layer.layer.id()).collect();
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    let path = daemon.mount(&layers);
    let first = fs::metadata(&path).unwrap().dev();
    let in_use = File::open(path.join("lower")).unwrap();
    for name in ["lower", "upper", "both"] {
        fs::read(path.join(name)).unwrap();
    }
    assert_eq!(tree_status(&daemon).direct_layers, [], "what is mounted stays as it is");
    assert_eq!(fs::metadata(&path).unwrap().dev(), first);

    // "old" is hidden in the tree, but part of its layer.
    daemon.complete(&layers);
    assert_eq!(daemon.mount(&layers), path);
    assert_ne!(fs::metadata(&path).unwrap().dev(), first);
    assert_eq!(tree_status(&daemon).direct_layers, ids);
    assert_eq!(read_anew(&path.join("lower")), noise(1, 200_000));
    let mut piece = [0; 100];
    in_use.read_exact_at(&mut piece, 150_000).unwrap();
    assert_eq!(piece[..], noise(1, 200_000)[150_000..150_100], "who used the first mount keeps it");
    drop(in_use);

    // What is open outlives the daemon itself.
    let file = File::open(path.join("upper")).unwrap();
    drop(daemon);
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    file.read_exact_at(&mut piece, 100_000).unwrap();
    assert_eq!(piece[..], noise(2, 200_000)[100_000..100_100]);
}

#[test]
fn a_released_tree_leaves_neither_mount_nor_image() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    let path = daemon.mount(&layers);
    for _ in 0..2 {
        assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(&layers) }), Response::Done);
        assert!(!path.exists());
        assert!(!image_of(root.path(), &layers).exists());
        assert_eq!(fs::read_dir(daemon.root.join("erofs")).unwrap().count(), 0);
    }
    assert_eq!(daemon.mount(&layers), path);
    assert_eq!(fs::read(path.join("both")).unwrap(), b"new");
}

#[test]
fn a_damaged_image_is_made_again() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    drop(Running::start_in(Mode::Erofs, root.path(), &registry).mount(&layers));
    let image = image_of(root.path(), &layers);
    let whole = fs::read(&image).unwrap();
    fs::write(&image, &whole[..whole.len() - 4096]).unwrap();
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    assert_eq!(fs::read(daemon.mount(&layers).join("both")).unwrap(), b"new");
    assert!(fs::read(&image).unwrap() == whole);
}

#[test]
fn many_threads_that_ask_for_one_tree_get_one_mount() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start_in(Mode::Erofs, root.path(), &registry);
    let devices: Vec<u64> = std::thread::scope(|scope| {
        let ask = || {
            let path = daemon.mount(&layers);
            assert_eq!(fs::read(path.join("lower")).unwrap(), noise(1, 200_000));
            fs::metadata(path).unwrap().dev()
        };
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(devices.iter().all(|device| *device == devices[0]), "{devices:?}");
}

/// Whether some EROFS mount of this machine is read ahead so far, in KiB.
fn is_window_of_a_mount(wanted: &str) -> bool {
    let names = fs::read_dir("/sys/class/bdi").unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("erofs-"));
    // Mounts of other tests come and go.
    let kib = |name: String| fs::read_to_string(format!("/sys/class/bdi/{name}/read_ahead_kb")).unwrap_or_default();
    names.map(kib).any(|kib| kib.trim() == wanted)
}

/// The next version of an application started slower than after a full pull: its base, which was here, came from the disk
/// in pieces of 16 KiB.
#[test]
fn a_base_that_is_here_is_read_ahead_below_a_small_layer_that_is_not() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let base = registry.push(&layer([("base", file(noise(1, 900_000)))]));
    let [small, large] = [20_000, 400_000].map(|len| registry.push(&layer([("own", file(noise(2, len)))])));
    // A value that no other mount of this machine has.
    let session = SessionOptions { read_ahead_kib: 316 };
    let daemon = Running::start_with(DaemonOptions { mode: Mode::Erofs, session, ..options(root.path()) }, &registry);
    let base = [base];
    fs::read(daemon.mount(&base).join("base")).unwrap();
    daemon.complete(&base);
    assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(&base) }), Response::Done);
    assert!(!is_window_of_a_mount("316"));
    let mount = |own: RemoteLayer| daemon.mount(&[base[0].clone(), own]);
    mount(large.clone());
    assert!(!is_window_of_a_mount("316"), "what has to be fetched is hardly read ahead");
    assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(&[base[0].clone(), large]) }), Response::Done);
    mount(small);
    assert!(is_window_of_a_mount("316"));
}

#[test]
fn read_ahead_is_short_until_everything_is_there_and_then_what_is_asked_for() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    // A value that no other mount of this machine has.
    let session = SessionOptions { read_ahead_kib: 308 };
    let daemon = Running::start_with(DaemonOptions { mode: Mode::Erofs, session, ..options(root.path()) }, &registry);
    let path = daemon.mount(&layers);
    let kib = |bdi: &str| fs::read_to_string(format!("/sys/class/bdi/{bdi}/read_ahead_kb")).unwrap();
    let device = fs::metadata(daemon.root.join("mnt")).unwrap().dev();
    let session = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    assert_eq!(kib(&session).trim(), "16");
    assert_eq!(file_system_of(&path), EROFS);
    assert!(!is_window_of_a_mount("308"));
    for name in ["lower", "upper"] {
        _ = fs::read(path.join(name));
    }
    daemon.complete(&layers);
    for _ in 0..200 {
        if is_window_of_a_mount("308") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(is_window_of_a_mount("308"));
    assert_eq!(kib(&session).trim(), "308");
}

#[test]
fn where_the_kernel_mounts_no_erofs_it_is_said_why() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for name in ["memory", "lower", "upper", "work", "merged"] {
        fs::create_dir(at(name)).unwrap();
    }
    let _memory = Mounted::new("tmpfs", at("memory"), "");
    let options = ["lowerdir", "upperdir", "workdir"]
        .map(|key| format!("{key}={}", at(key.strip_suffix("dir").unwrap()).display()));
    let _merged = Mounted::new("overlay", at("merged"), &options.join(","));
    for (name, expected) in [("memory", "tmpfs"), ("merged", "overlayfs")] {
        let refusal = fusefs::erofs_mount::probe(&at(name)).unwrap_err().to_string();
        assert!(refusal.contains(expected) && refusal.contains("kernel mode is not to be had"), "{refusal}");
        assert_eq!(fs::read_dir(at(name)).unwrap().count(), 0);
    }
    fusefs::erofs_mount::probe(root.path()).unwrap();
}

/// Detached when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(kind: &str, path: PathBuf, options: &str) -> Self {
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount(kind, &path, kind, flags, Some(options.as_c_str())).unwrap();
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
