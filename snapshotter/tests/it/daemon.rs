//! The daemon as a process: restarts, orphans, and what stands in its way at start.

use std::{
    collections::HashSet,
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram, process::CommandExt as _},
    time::Duration,
};

use crate::common::{Daemon, Mounted, run, settles};
use rustix::process::Signal;

#[tokio::test]
async fn snapshots_and_mounts_survive_a_restart() {
    for signal in [Signal::TERM, Signal::KILL] {
        let daemon = Daemon::start().await;
        daemon.layer("base", "", |root| fs::write(root.join("file"), "base").unwrap()).await;
        let mount = daemon.prepare("active", "base").await.unwrap();
        let mounted = Mounted::new(&mount);
        let before = daemon.list(&[]).await.unwrap();
        let daemon = daemon.restarted(signal).await;
        assert_eq!(daemon.list(&[]).await.unwrap(), before);
        assert_eq!(daemon.mounts("active").await.unwrap(), mount);
        fs::write(mounted.path().join("file"), "still writable").unwrap();
        daemon.commit("active", "done").await.unwrap();
    }
}

#[tokio::test]
async fn ids_go_on_after_a_restart() {
    let daemon = Daemon::start().await;
    daemon.prepare("a", "").await.unwrap();
    daemon.prepare("b", "").await.unwrap();
    daemon.remove("b").await.unwrap();
    settles(|| daemon.directories(), vec!["1".to_owned()]).await;
    let before: HashSet<_> = daemon.directories().into_iter().collect();
    let daemon = daemon.restarted(Signal::TERM).await;
    daemon.prepare("b", "").await.unwrap();
    let after: HashSet<_> = daemon.directories().into_iter().collect();
    assert_eq!((before.len(), after.difference(&before).count()), (1, 1));
}

#[tokio::test]
async fn orphans_go_at_cleanup_and_at_start() {
    let daemon = Daemon::start().await;
    daemon.prepare("a", "").await.unwrap();
    let orphan = daemon.root().join("snapshots/99/fs");
    let make_orphan = || fs::create_dir_all(&orphan).and_then(|()| fs::write(orphan.join("file"), "x")).unwrap();
    make_orphan();
    daemon.cleanup().await.unwrap();
    settles(|| daemon.directories(), vec!["1".to_owned()]).await;
    make_orphan();
    let daemon = daemon.restarted(Signal::KILL).await;
    settles(|| daemon.directories(), vec!["1".to_owned()]).await;
}

#[tokio::test]
async fn stops_on_a_signal_and_takes_its_socket_along() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start().await;
        assert!(daemon.address().exists());
        daemon.end(signal);
        assert!(!daemon.address().exists());
    }
}

#[tokio::test]
async fn refuses_what_stands_in_its_way_with_one_line() {
    let daemon = Daemon::start().await;
    let directory = daemon.directory.path();
    let elsewhere = tempfile::tempdir().unwrap();
    let config = elsewhere.path().join("config.toml");
    fs::write(&config, "rot = '/x'\n").unwrap();
    let (config, live) = (config.display().to_string(), daemon.address().display().to_string());
    let root = daemon.root().display().to_string();
    let cases = [
        (directory, &["--address", "/tmp/unused.sock"][..], format!("root {root} is in use by another")),
        (elsewhere.path(), &["--address", &live], format!("another process listens on {live}")),
        (elsewhere.path(), &["--address", &config], format!("{config} exists and is no socket")),
        (elsewhere.path(), &["--config", &config], format!("{config}: configuration: line 1: unknown field `rot`")),
        (elsewhere.path(), &["--config", "/nonexistent"], "configuration /nonexistent: No such file".to_owned()),
    ];
    for (directory, arguments, expected) in cases {
        let output = run(directory, arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.starts_with(&format!("lazuli-snapshotter: {expected}")), "{message}");
    }
    assert_eq!(daemon.names(&[]).await.len(), 0);
}

#[tokio::test]
async fn refuses_a_root_on_overlayfs_and_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(at(name)).unwrap();
    }
    let path = |name| at(name).display().to_string();
    let options = [format!("lowerdir={}", path("lower")), format!("upperdir={}", path("upper"))];
    let options = [&options[..], &[format!("workdir={}", path("work"))]].concat();
    let mount = containerd_client::types::Mount {
        r#type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    };
    let merged = Mounted::new(&mount);
    let output = run(merged.path(), &[]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), message.lines().count()), (Some(1), 1), "{message}");
    let root = merged.path().join("root").display().to_string();
    assert!(message.starts_with(&format!("lazuli-snapshotter: root {root} is on overlayfs")), "{message}");
}

/// Somebody else's socket where the other daemon's should be: an image is pulled completely, nothing hangs.
#[tokio::test]
async fn a_foreign_socket_in_place_of_the_other_daemon_makes_no_layer_lazy() {
    let daemon = Daemon::start().await;
    let foreign = std::os::unix::net::UnixListener::bind(daemon.root().join("fused.sock")).unwrap();
    let answering = std::thread::spawn(move || {
        for stream in foreign.incoming() {
            use std::io::{BufRead, Write};
            let mut stream = stream.unwrap();
            let mut line = String::new();
            std::io::BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            if line.contains("done") {
                return;
            }
            // Whoever asked may be gone already.
            let _ = stream.write_all(b"220 mail server ready\n");
        }
    });
    let digest = format_spec::Digest::of(b"layer");
    let index = format_spec::IndexLocation { offset: 0, compressed_len: 10, plain_len: 20, digest };
    let layer = format_spec::LazyLayer { blob: digest, blob_len: 100, index, hot_len: 0 };
    let mut labels: std::collections::HashMap<_, _> = layer.to_annotations().into_iter().collect();
    labels.insert("containerd.io/snapshot.ref".to_owned(), "target".to_owned());
    labels.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "host/repository:tag".to_owned());
    let mount = daemon.prepare_with("extract", "", labels).await.unwrap();
    assert_eq!(mount.r#type, "bind");
    daemon.commit("extract", "target").await.unwrap();
    let done = std::os::unix::net::UnixStream::connect(daemon.root().join("fused.sock"));
    std::io::Write::write_all(&mut done.unwrap(), b"done\n").unwrap();
    answering.join().unwrap();
}

#[tokio::test]
async fn wrong_usage_exits_with_two() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(run(directory.path(), &["--no-such-flag"]).status.code(), Some(2));
}

/// Descriptors and threads that a daemon holds.
fn held(id: u32) -> (usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{id}/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

#[tokio::test]
async fn descriptors_and_threads_are_what_they_were_after_many_snapshots() {
    let daemon = Daemon::start().await;
    daemon.layer("base", "", |root| fs::write(root.join("file"), "base").unwrap()).await;
    let round = async |number: usize| {
        let key = format!("active-{number}");
        let mount = daemon.prepare(&key, "base").await.unwrap();
        assert_eq!(fs::read_to_string(Mounted::new(&mount).path().join("file")).unwrap(), "base");
        daemon.remove(&key).await.unwrap();
    };
    for number in 0..20 {
        round(number).await;
    }
    let (descriptors, threads) = held(daemon.id());
    for number in 20..120 {
        round(number).await;
    }
    let is_as_before = || held(daemon.id()).0 <= descriptors && held(daemon.id()).1 <= threads + 4;
    settles(is_as_before, true).await;
}

/// A service manager starts a daemon again that is silent (`WatchdogSec`).
#[test]
fn a_daemon_that_hangs_is_silent_to_the_service_manager() {
    let directory = tempfile::tempdir().unwrap();
    let manager = directory.path().join("notify");
    let socket = UnixDatagram::bind(&manager).unwrap();
    let receive = |within: Duration| {
        socket.set_read_timeout(Some(within)).unwrap();
        let mut message = [0; 100];
        socket.recv(&mut message).ok().map(|len| String::from_utf8_lossy(&message[..len]).trim().to_owned())
    };
    let (soon, watchdog) = (Duration::from_secs(60), Duration::from_millis(600));
    let mut command = crate::common::command(directory.path(), &[]);
    command.env("NOTIFY_SOCKET", &manager).env("WATCHDOG_USEC", watchdog.as_micros().to_string());
    let mut child = command.spawn().unwrap();
    let id = rustix::process::Pid::from_child(&child);
    let heard = [receive(soon), receive(soon), receive(soon)];
    rustix::process::kill_process(id, Signal::STOP).unwrap();
    // Messages from before are heard first.
    while receive(watchdog).is_some() {}
    let silent = receive(2 * watchdog);
    rustix::process::kill_process(id, Signal::CONT).unwrap();
    let again = receive(soon);
    child.kill().unwrap();
    child.wait().unwrap();
    let heard: Vec<_> = heard.iter().flatten().map(String::as_str).collect();
    assert_eq!(heard, ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]);
    assert_eq!((silent, again.as_deref()), (None, Some("WATCHDOG=1")));
}

/// It said "serving" to a user who can mount nothing.
#[test]
fn who_is_not_root_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Where the tests were built may be closed to others.
    let program = directory.path().join("lazuli-snapshotter");
    fs::copy(env!("CARGO_BIN_EXE_lazuli-snapshotter"), &program).unwrap();
    let output = std::process::Command::new(&program).uid(65_534).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), message.lines().count()), (Some(1), 1), "{message}");
    assert!(message.contains("needs root"), "{message}");
}
