//! Snapshots of user namespaces, over gRPC against the real daemon with real id-mapped and overlay mounts.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::{
        fs::{chown, lchown, symlink},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use crate::common::{Daemon, Mounted, code, owner, settles, user_namespace};
use rustix::{
    mount::{UnmountFlags, mount_bind, unmount},
    process::Signal,
};
use tonic::Code;

const ROOT: (u32, u32) = (100_000, 200_000);

fn labels() -> HashMap<String, String> {
    user_namespace("0:100000:65536", "0:200000:65536")
}

/// Two layers with files of root, of a user, and of somebody whom no mapping knows.
async fn layers(daemon: &Daemon) {
    daemon
        .layer("one", "", |root| {
            fs::create_dir(root.join("home")).unwrap();
            fs::write(root.join("home/file"), "one").unwrap();
            chown(root.join("home"), Some(1000), Some(1001)).unwrap();
            chown(root.join("home/file"), Some(1000), Some(1001)).unwrap();
            fs::write(root.join("hers"), "one").unwrap();
            chown(root.join("hers"), Some(70_000), Some(0)).unwrap();
        })
        .await;
    daemon
        .layer("two", "one", |root| {
            symlink("home/file", root.join("link")).unwrap();
            lchown(root.join("link"), Some(3), Some(4)).unwrap();
            fs::write(root.join("roots"), "two").unwrap();
        })
        .await;
}

fn check_owners(shown: &Path) {
    let user = (ROOT.0 + 1000, ROOT.1 + 1001);
    let expected =
        [("home", user), ("home/file", user), ("link", (ROOT.0 + 3, ROOT.1 + 4)), ("roots", ROOT), ("", ROOT)];
    for (name, expected) in expected {
        assert_eq!(owner(&shown.join(name)), expected, "{name}");
    }
    assert_eq!(owner(&shown.join("hers")), (65_534, ROOT.1), "the overflow user");
}

/// As root of the user namespace, as far as files see it.
fn shell(directory: &Path, script: &str) -> bool {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script]).current_dir(directory).uid(ROOT.0).gid(ROOT.1);
    shell.status().unwrap().success()
}

#[tokio::test]
async fn a_user_namespace_sees_its_own_owners_and_writes_as_them() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    let before = fs::metadata(daemon.root().join("snapshots/1/fs/home/file")).unwrap();
    let mount = daemon.prepare_with("container", "two", labels()).await.unwrap();
    assert_eq!(mount.r#type, "overlay");
    assert!(!mount.options.iter().any(|option| option.contains("idmap")), "{mount:?}");
    let container = Mounted::new(&mount);
    check_owners(container.path());
    assert!(shell(container.path(), "echo mine > new && echo more >> roots && chmod 600 roots && rm link"));
    let upper = daemon.root().join("snapshots/3/fs");
    assert_eq!((owner(&upper), owner(&upper.join("new")), owner(&upper.join("roots"))), (ROOT, ROOT, ROOT));
    assert_eq!(fs::read_to_string(upper.join("roots")).unwrap(), "twomore\n");
    // Nothing below was changed, and whoever is not mapped sees what is his.
    let after = fs::metadata(daemon.root().join("snapshots/1/fs/home/file")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::ctime_nsec(&before), std::os::unix::fs::MetadataExt::ctime_nsec(&after));
    let other = Mounted::new(&daemon.prepare("other", "two").await.unwrap());
    assert_eq!(owner(&other.path().join("home/file")), (1000, 1001));
    assert!(!shell(other.path(), "echo x > new 2>/dev/null"));
}

#[tokio::test]
async fn views_and_snapshots_without_parents_have_owners_too() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    let view = Mounted::new(&daemon.view_with("view", "two", labels()).await.unwrap());
    check_owners(view.path());
    let single = daemon.view_with("single", "one", labels()).await.unwrap();
    assert_eq!(
        (single.r#type.as_str(), single.options.as_slice()),
        ("bind", &["ro".to_owned(), "rbind".to_owned()][..])
    );
    let single = Mounted::new(&single);
    assert_eq!(owner(&single.path().join("home")), (ROOT.0 + 1000, ROOT.1 + 1001));
    assert!(!shell(single.path(), "echo x > roots 2>/dev/null"), "a view is read-only");
    let free = Mounted::new(&daemon.prepare_with("free", "", labels()).await.unwrap());
    assert!(shell(free.path(), "echo mine > new"));
    assert_eq!((owner(free.path()), owner(&free.path().join("new"))), (ROOT, ROOT));
}

#[tokio::test]
async fn mounts_outlive_the_daemon_are_made_again_after_a_reboot_and_go_with_the_snapshot() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    let mount = daemon.prepare_with("container", "two", labels()).await.unwrap();
    let points = ["/id-mapped/3/layers"];
    assert_eq!(daemon.mount_points(), points);
    let container = Mounted::new(&mount);
    let daemon = daemon.restarted(Signal::KILL).await;
    assert_eq!(
        (daemon.mount_points(), daemon.mounts("container").await.unwrap()),
        (points.map(str::to_owned).into(), mount.clone())
    );
    assert_eq!(daemon.mount_points(), points, "they are not made twice");
    drop(container);
    // What a reboot leaves: a directory that is no mount point.
    unmount(daemon.root().join("id-mapped/3/layers"), UnmountFlags::DETACH).unwrap();
    assert_eq!(daemon.mounts("container").await.unwrap(), mount);
    assert_eq!(daemon.mount_points(), points);
    let container = Mounted::new(&mount);
    check_owners(container.path());
    // Something else in its place, as after a tree was mounted anew: it is replaced.
    let place = daemon.root().join("id-mapped/3/layers");
    unmount(&place, UnmountFlags::DETACH).unwrap();
    mount_bind("/proc/sys", &place).unwrap();
    daemon.mounts("container").await.unwrap();
    assert_eq!(daemon.mount_points(), points);
    check_owners(Mounted::new(&mount).path());
    daemon.remove("container").await.unwrap();
    settles(|| (daemon.mount_points(), daemon.directories()), (vec![], vec!["1".to_owned(), "2".to_owned()])).await;
    assert_eq!(fs::read_dir(daemon.root().join("id-mapped")).unwrap().count(), 0);
    assert_eq!(container.read("home/file").unwrap(), "one", "who uses a mount keeps it");
}

#[tokio::test]
async fn mounts_of_no_snapshot_go_at_cleanup_and_at_start() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    daemon.prepare_with("container", "two", labels()).await.unwrap();
    let place = daemon.root().join("id-mapped/99/tree");
    let make = || -> io::Result<()> {
        fs::create_dir_all(&place)?;
        Ok(mount_bind(daemon.root().join("snapshots"), &place)?)
    };
    make().unwrap();
    daemon.cleanup().await.unwrap();
    settles(|| daemon.mount_points(), vec!["/id-mapped/3/layers".to_owned()]).await;
    make().unwrap();
    let daemon = daemon.restarted(Signal::TERM).await;
    settles(|| daemon.mount_points(), vec!["/id-mapped/3/layers".to_owned()]).await;
    assert_eq!(daemon.directories(), ["1", "2", "3"]);
}

/// containerd changes owners in a copy of the image when it does not know the capability, and passes the labels too.
#[tokio::test]
async fn owners_that_are_mapped_on_disk_are_not_mapped_again() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    daemon
        .layer("changed", "two", |root| {
            for name in ["", "home", "home/file", "link", "roots"] {
                let (user, group) = owner(&root.join(name));
                lchown(root.join(name), Some(ROOT.0 + user), Some(ROOT.1 + group)).unwrap();
            }
            chown(root.join("hers"), Some(65_534), Some(ROOT.1)).unwrap();
        })
        .await;
    let container = Mounted::new(&daemon.prepare_with("container", "changed", labels()).await.unwrap());
    check_owners(container.path());
    assert!(shell(container.path(), "echo mine > new"));
    drop(container);
    // Nor are those of a container of such a user namespace that became a layer; what lies below it is.
    daemon.prepare_with("writing", "two", labels()).await.unwrap();
    assert!(shell(Mounted::new(&daemon.mounts("writing").await.unwrap()).path(), "echo mine > new; chmod 600 roots"));
    daemon.commit("writing", "written").await.unwrap();
    let next = Mounted::new(&daemon.prepare_with("next", "written", labels()).await.unwrap());
    check_owners(next.path());
    assert_eq!(owner(&next.path().join("new")), ROOT);
    // Where root is the host's, all layers look like that, and none is.
    let half = user_namespace("0:0:1,1:100001:65535", "0:0:1,1:100001:65535");
    let half = Mounted::new(&daemon.prepare_with("half", "two", half).await.unwrap());
    assert_eq!((owner(&half.path().join("roots")), owner(&half.path().join("home"))), ((0, 0), (101_000, 101_001)));
}

#[tokio::test]
async fn a_committed_snapshot_needs_no_mounts_any_longer() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    daemon.prepare_with("container", "two", labels()).await.unwrap();
    daemon.commit("container", "three").await.unwrap();
    settles(|| daemon.mount_points(), vec![]).await;
}

#[tokio::test]
async fn mappings_that_make_no_sense_are_refused_and_leave_nothing() {
    let daemon = Daemon::start().await;
    layers(&daemon).await;
    let many = (0..400).map(|id| format!("{id}:{id}:1")).collect::<Vec<_>>().join(",");
    // The last two are refused by the kernel: they overlap, there are too many.
    for users in ["1:1:1", "0:1", "0:1:1,upperdir=/", "", "0:100000:10,5:200000:10", &many] {
        let refused = daemon.prepare_with("x", "two", user_namespace(users, "0:200000:65536")).await;
        assert_eq!(code(refused), Code::InvalidArgument, "{users}");
    }
    assert_eq!((daemon.directories(), daemon.mount_points()), (vec!["1".to_owned(), "2".to_owned()], vec![]));
    assert_eq!(daemon.names(&[]).await, ["one", "two"]);
}
