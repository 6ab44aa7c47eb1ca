//! A disk without room: what gives room back works, the rest is refused with the right code, and all goes on by itself.

use std::{fs, io::Write, path::Path, process::Command};

use crate::common::{Answer, Daemon, Mounted, settles};
use rustix::mount::{UnmountFlags, unmount};
use tonic::Code;

/// A small file system, mounted as long as this lives.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(words: &[&str], place: &'a Path) -> Self {
        fs::create_dir_all(place).unwrap();
        let done = Command::new("mount").args(words).arg(place).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        Self(place)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0, UnmountFlags::DETACH) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// Takes all room, to the last byte.
fn fill(place: &Path) {
    let mut ballast = fs::File::create(place).unwrap();
    for len in [1 << 16, 1 << 12, 1] {
        while ballast.write_all(&vec![1; len]).is_ok() {}
    }
    // Blocks are given out when they are written.
    let _full = ballast.sync_all();
}

fn refused<T: std::fmt::Debug>(answer: &Answer<T>) -> bool {
    match answer {
        Ok(_) => false,
        Err(status) => {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            true
        }
    }
}

async fn check(words: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let root = path.join("root");
    let disk = SmallDisk::mount(words, &root);
    let daemon = Daemon::start_in(directory).await;
    for number in 0..30 {
        daemon.layer(&format!("layer {number}"), "", |root| fs::write(root.join("file"), [1; 30_000]).unwrap()).await;
        daemon.prepare(&format!("container {number}"), &format!("layer {number}")).await.unwrap();
    }
    let ballast = root.join("ballast");
    fill(&ballast);
    // More than there is reserved, on any file system.
    let mut refusals = 0;
    for number in 0..3000 {
        let labels = crate::common::to_labels(&[("label", "x".repeat(2000).as_str())]);
        let answer = daemon.prepare_with(&format!("more {number}"), "layer 0", labels).await;
        refusals += usize::from(refused(&answer));
        if refusals > 10 {
            break;
        }
    }
    assert!(refusals > 10, "{words:?}: the disk is not full");
    fill(&root.join("more ballast"));
    // Looking and removing work; nothing else makes room.
    assert!(daemon.names(&[]).await.len() >= 60);
    daemon.mounts("container 3").await.unwrap();
    for number in 0..30 {
        daemon.remove(&format!("container {number}")).await.unwrap();
        if number > 0 {
            daemon.remove(&format!("layer {number}")).await.unwrap();
        }
    }
    // All but what was added last.
    let left = daemon.names(&[]).await.len();
    settles(|| daemon.directories().len(), left).await;
    fs::remove_file(&ballast).unwrap();
    let mount = daemon.prepare("again", "layer 0").await.unwrap();
    fs::write(Mounted::new(&mount).path().join("file"), "room again").unwrap();
    daemon.commit("again", "committed").await.unwrap();
    let daemon = daemon.restarted(rustix::process::Signal::KILL).await;
    assert_eq!(daemon.names(&["name==committed"]).await, ["committed"]);
    drop((daemon, disk));
}

#[tokio::test]
async fn snapshots_are_removed_on_a_full_tmpfs() {
    check(&["-t", "tmpfs", "-o", "size=32m", "tmpfs"]).await;
}

#[tokio::test]
async fn snapshots_are_removed_on_a_full_ext4() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(24 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(image.path()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    check(&["-o", "loop", &image.path().display().to_string()]).await;
}
