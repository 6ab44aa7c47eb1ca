//! Ordinary layers, over gRPC against the real daemon with real overlay mounts.
//!
//! The cases are those that containerd's own suite holds every snapshotter to.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
};

use crate::common::{Daemon, Mounted, code, settles, to_labels};
use containerd_client::services::v1::snapshots::Kind;
use tonic::Code;

fn write(root: &Path, name: &str, content: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn order(time: Option<prost_types::Timestamp>) -> (i64, i32) {
    time.map(|time| (time.seconds, time.nanos)).unwrap()
}

#[tokio::test]
async fn layers_stack_and_a_container_sees_and_changes_them() {
    let daemon = Daemon::start().await;
    daemon.layer("one", "", |root| write(root, "a/file", "one")).await;
    daemon.layer("two", "one", |root| write(root, "b/file", "two")).await;
    let container = Mounted::new(&daemon.prepare("container", "two").await.unwrap());
    assert_eq!((container.read("a/file").unwrap(), container.read("b/file").unwrap()), ("one".into(), "two".into()));
    write(container.path(), "a/file", "changed");
    drop(container);
    let again = Mounted::new(&daemon.mounts("container").await.unwrap());
    assert_eq!(again.read("a/file").unwrap(), "changed");
    let view = Mounted::new(&daemon.view("view", "two").await.unwrap());
    assert_eq!(view.read("a/file").unwrap(), "one");
}

#[tokio::test]
async fn an_upper_layer_changes_deletes_replaces_and_moves_what_lies_below() {
    let daemon = Daemon::start().await;
    daemon
        .layer("lower", "", |root| {
            for name in ["changed", "deleted", "moved", "directory/gone", "replaced/gone", "kept"] {
                write(root, name, "lower");
            }
        })
        .await;
    daemon
        .layer("middle", "lower", |root| {
            write(root, "changed", "middle");
            fs::remove_file(root.join("deleted")).unwrap();
            fs::rename(root.join("moved"), root.join("moved-away")).unwrap();
            fs::remove_dir_all(root.join("directory")).unwrap();
            fs::remove_dir_all(root.join("replaced")).unwrap();
            write(root, "replaced/new", "middle");
        })
        .await;
    daemon.layer("upper", "middle", |root| symlink("kept", root.join("link")).unwrap()).await;
    for parent in ["middle", "upper"] {
        let mount = daemon.view(&format!("view-{parent}"), parent).await.unwrap();
        let view = Mounted::new(&mount);
        let found = ["changed", "moved-away", "replaced/new", "kept"].map(|name| view.read(name).unwrap());
        assert_eq!(found, ["middle", "lower", "middle", "lower"]);
        for name in ["deleted", "moved", "directory", "replaced/gone"] {
            assert_eq!(view.read(name).unwrap_err().kind(), io::ErrorKind::NotFound, "{name} in {parent}");
        }
    }
}

#[tokio::test]
async fn owner_and_mode_of_directories_survive_commits() {
    let daemon = Daemon::start().await;
    daemon
        .layer("lower", "", |root| {
            assert_eq!(fs::metadata(root).unwrap().permissions().mode() & 0o7777, 0o755);
            fs::create_dir_all(root.join("home/user")).unwrap();
            chown(root.join("home/user"), Some(1000), Some(1001)).unwrap();
            fs::set_permissions(root.join("home/user"), fs::Permissions::from_mode(0o1700)).unwrap();
            chown(root, Some(7), Some(8)).unwrap();
        })
        .await;
    daemon.layer("upper", "lower", |root| write(root, "home/user/file", "x")).await;
    let top = Mounted::new(&daemon.prepare("top", "upper").await.unwrap());
    let user = fs::metadata(top.path().join("home/user")).unwrap();
    assert_eq!((user.uid(), user.gid(), user.mode() & 0o7777), (1000, 1001, 0o1700));
    let root = fs::metadata(top.path()).unwrap();
    assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (7, 8, 0o755));
}

#[tokio::test]
async fn a_view_is_read_only() {
    let daemon = Daemon::start().await;
    daemon.layer("one", "", |root| write(root, "file", "one")).await;
    daemon.layer("two", "one", |root| write(root, "file", "two")).await;
    for parent in ["", "one", "two"] {
        let view = Mounted::new(&daemon.view(&format!("view-{parent}"), parent).await.unwrap());
        let refused = fs::write(view.path().join("new"), "x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem, "view of {parent:?}");
    }
}

#[tokio::test]
async fn a_hundred_and_twenty_eight_layers_mount() {
    let daemon = Daemon::start().await;
    let mut parent = String::new();
    for number in 1..=128 {
        let name = format!("layer-{number}");
        daemon.prepare("work", &parent).await.unwrap();
        let id = daemon.directories().iter().map(|id| id.parse::<u32>().unwrap()).max().unwrap();
        write(&daemon.root().join(format!("snapshots/{id}/fs")), &format!("file-{number}"), &name);
        daemon.commit("work", &name).await.unwrap();
        parent = name;
    }
    let top = Mounted::new(&daemon.prepare("top", &parent).await.unwrap());
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 128);
    assert_eq!(top.read("file-1").unwrap(), "layer-1");
}

#[tokio::test]
async fn stat_tells_kind_parent_labels_and_times() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |_| {}).await;
    daemon.prepare_with("active", "base", to_labels(&[("a", "1"), ("empty", "")])).await.unwrap();
    daemon.view("view", "base").await.unwrap();
    let active = daemon.stat("active").await.unwrap();
    assert_eq!(
        (active.kind(), active.parent.as_str(), &active.labels),
        (Kind::Active, "base", &to_labels(&[("a", "1")]))
    );
    assert_eq!(active.created_at, active.updated_at);
    assert_eq!(daemon.stat("view").await.unwrap().kind(), Kind::View);
    daemon.commit("active", "done").await.unwrap();
    let done = daemon.stat("done").await.unwrap();
    assert_eq!((done.kind(), done.parent.as_str(), &done.labels), (Kind::Committed, "base", &HashMap::new()));
    assert!(order(done.created_at) > order(active.created_at));
    assert_eq!(code(daemon.stat("active").await), Code::NotFound);
}

#[tokio::test]
async fn update_changes_labels_only() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |_| {}).await;
    let updated = daemon.update("base", &[("a", "1"), ("b", "2")], &[]).await.unwrap();
    assert_eq!(updated.labels, to_labels(&[("a", "1"), ("b", "2")]));
    let updated = daemon.update("base", &[("a", "3"), ("b", "ignored")], &["labels.a"]).await.unwrap();
    assert_eq!(updated.labels, to_labels(&[("a", "3"), ("b", "2")]));
    let updated = daemon.update("base", &[], &["labels.a"]).await.unwrap();
    assert_eq!(updated.labels, to_labels(&[("b", "2")]));
    let updated = daemon.update("base", &[("c", "4")], &["labels"]).await.unwrap();
    assert_eq!(updated, daemon.stat("base").await.unwrap());
    assert_eq!(updated.labels, to_labels(&[("c", "4")]));
    assert!(order(updated.updated_at) > order(updated.created_at));
    assert_eq!(code(daemon.update("base", &[], &["parent"]).await), Code::InvalidArgument);
    assert_eq!(code(daemon.update("missing", &[], &[]).await), Code::NotFound);
}

#[tokio::test]
async fn list_shows_what_the_filters_select() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |_| {}).await;
    daemon.prepare("active", "base").await.unwrap();
    daemon.view("view", "base").await.unwrap();
    daemon.update("view", &[("x.y/z", "1")], &[]).await.unwrap();
    for (filters, expected) in [
        (&[][..], &["active", "base", "view"][..]),
        (&["kind==committed"], &["base"]),
        (&["kind==active", "kind==view"], &["active", "view"]),
        (&[r#"labels."x.y/z"==1,parent=="base""#], &["view"]),
        (&["parent==base,kind~=^a"], &["active"]),
        (&["name==missing"], &[]),
    ] {
        assert_eq!(daemon.names(filters).await, expected, "{filters:?}");
    }
    let listed = daemon.list(&["name==view"]).await.unwrap().remove(0);
    assert_eq!(listed, daemon.stat("view").await.unwrap());
    assert_eq!(code(daemon.list(&["name="]).await), Code::InvalidArgument);
}

#[tokio::test]
async fn list_sends_more_than_one_message_holds() {
    let daemon = Daemon::start().await;
    for number in 0..101 {
        daemon.view(&format!("view-{number:03}"), "").await.unwrap();
    }
    assert_eq!(daemon.names(&[]).await.len(), 101);
}

#[tokio::test]
async fn refuses_as_the_overlayfs_snapshotter_does() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |_| {}).await;
    daemon.prepare("active", "base").await.unwrap();
    daemon.view("view", "base").await.unwrap();
    assert_eq!(code(daemon.prepare("active", "base").await), Code::AlreadyExists);
    assert_eq!(code(daemon.view("active", "base").await), Code::AlreadyExists);
    assert_eq!(code(daemon.prepare("x", "missing").await), Code::NotFound);
    assert_eq!(code(daemon.prepare("x", "active").await), Code::InvalidArgument);
    assert_eq!(code(daemon.view("x", "active").await), Code::InvalidArgument);
    assert_eq!(code(daemon.prepare("", "base").await), Code::InvalidArgument);
    assert_eq!(code(daemon.mounts("base").await), Code::FailedPrecondition);
    assert_eq!(code(daemon.mounts("missing").await), Code::NotFound);
    assert_eq!(code(daemon.commit("view", "x").await), Code::FailedPrecondition);
    assert_eq!(code(daemon.commit("active", "base").await), Code::AlreadyExists);
    assert_eq!(code(daemon.commit("missing", "x").await), Code::NotFound);
    assert_eq!(code(daemon.remove("base").await), Code::FailedPrecondition);
    assert_eq!(code(daemon.remove("missing").await), Code::NotFound);
    assert_eq!(code(daemon.usage("missing").await), Code::NotFound);
    assert_eq!(daemon.names(&[]).await, ["active", "base", "view"]);
}

#[tokio::test]
async fn a_snapshot_is_committed_onto_a_parent_that_it_was_not_prepared_on() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |root| write(root, "below", "base")).await;
    let mount = daemon.prepare("extract", "").await.unwrap();
    write(Mounted::new(&mount).path(), "above", "top");
    assert_eq!(code(daemon.commit_onto("extract", "top", "missing").await), Code::NotFound);
    daemon.commit_onto("extract", "top", "base").await.unwrap();
    assert_eq!(daemon.stat("top").await.unwrap().parent, "base");
    let view = Mounted::new(&daemon.view("view", "top").await.unwrap());
    assert_eq!((view.read("below").unwrap(), view.read("above").unwrap()), ("base".to_owned(), "top".to_owned()));
    daemon.prepare("other", "top").await.unwrap();
    assert_eq!(code(daemon.commit_onto("other", "x", "base").await), Code::InvalidArgument);
    daemon.prepare("free", "").await.unwrap();
    assert_eq!(code(daemon.commit_onto("free", "x", "other").await), Code::FailedPrecondition);
    assert_eq!(code(daemon.remove("base").await), Code::FailedPrecondition);
}

#[tokio::test]
async fn remove_frees_the_directory_and_the_key() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |root| write(root, "file", "x")).await;
    daemon.layer("middle", "base", |_| {}).await;
    daemon.prepare("active", "middle").await.unwrap();
    assert_eq!(code(daemon.remove("middle").await), Code::FailedPrecondition);
    for key in ["active", "middle", "base"] {
        daemon.remove(key).await.unwrap();
    }
    settles(|| daemon.directories(), vec![]).await;
    daemon.prepare("active", "").await.unwrap();
}

#[tokio::test]
async fn usage_counts_own_blocks_and_inodes() {
    let daemon = Daemon::start().await;
    let content = vec![7; 1 << 20];
    daemon.layer("base", "", |root| fs::write(root.join("file"), &content).unwrap()).await;
    let base = daemon.usage("base").await.unwrap();
    assert_eq!(base.inodes, 2);
    assert!((1 << 20..(1 << 20) + 65536).contains(&base.size), "{}", base.size);
    let active = Mounted::new(&daemon.prepare("active", "base").await.unwrap());
    let empty = daemon.usage("active").await.unwrap();
    assert!(empty.size < 65536 && empty.inodes == 1, "{empty:?}");
    fs::write(active.path().join("one"), &content).unwrap();
    fs::hard_link(active.path().join("one"), active.path().join("two")).unwrap();
    let written = daemon.usage("active").await.unwrap();
    assert_eq!(written.inodes, 2);
    assert!((1 << 20..(1 << 20) + 65536).contains(&written.size), "{}", written.size);
    daemon.view("view", "base").await.unwrap();
    assert_eq!(daemon.usage("view").await.unwrap().size, 0);
}
