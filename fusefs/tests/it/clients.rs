//! Clients of the control socket that wait for what does not come, and leave.

use std::{
    ffi::CString,
    fs,
    io::Write as _,
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use control::{ErrorKind, RemoteLayer, Request, Response};

use crate::support::{
    daemon::{Connection, Running},
    *,
};
use rustix::mount::{MountFlags, UnmountFlags};

/// Clients of one image whose index never comes; kubelet repeats a start for as long as it fails.
const CLIENTS: usize = 300;
/// How long the server may take to notice that they have gone.
const SOON: Duration = Duration::from_secs(30);

fn one_layer(registry: &Registry, name: &str) -> RemoteLayer {
    registry.push(&layer([(name, file(name))]))
}

/// Sockets of this process that are bound to the path: one that listens and those that it accepted.
fn connections(address: &Path) -> usize {
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().filter(|line| line.ends_with(address.to_str().unwrap())).count()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let give_up_at = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < give_up_at, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn clients_of_a_tree_that_never_comes_stop_nobody_and_leave_nothing() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let daemon = Running::start(root.path(), &registry);
    let (lower, upper) = (one_layer(&registry, "lower"), one_layer(&registry, "upper"));
    daemon.mount(&[lower.clone(), upper.clone()]);
    registry.set_held(true);
    let layers = vec![one_layer(&registry, "dead")];
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = Connection::open(&daemon.address);
            client.send(&Request::MountTree { layers: layers.clone() });
            client
        })
        .collect();

    assert!(matches!(daemon.ask(&Request::Status), Response::Status { .. }));
    assert_eq!(daemon.ask(&Request::Ping), Response::Done);
    for healthy in [&[lower.clone(), upper.clone()][..], &[upper.clone(), lower], &[upper]] {
        assert!(daemon.mount(healthy).join("upper").exists(), "known trees and new ones of layers that are there");
    }
    let mut refused = 0;
    wait_until("some are told at once", || {
        for client in &mut clients {
            match client.answer_if_there() {
                None => {}
                Some(Response::Error { kind: ErrorKind::Passing, message }) => {
                    assert!(message.contains("128 requests wait for it already"), "{message}");
                    refused += 1;
                }
                Some(other) => panic!("{other:?}"),
            }
        }
        refused == CLIENTS - 128
    });

    let requests = registry.requests();
    drop(clients);
    // The one that listens.
    wait_until("no connection stays", || connections(&daemon.address) == 1);
    assert_eq!(registry.requests(), requests);
    registry.set_held(false);
    assert!(daemon.mount(&layers).join("dead").exists());
}

#[test]
fn a_client_that_says_no_more_still_hears_the_answer() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let daemon = Running::start(root.path(), &registry);
    registry.set_held(true);
    let layers = vec![one_layer(&registry, "file")];
    let mut stream = UnixStream::connect(&daemon.address).unwrap();
    let request = serde_json::to_string(&Request::MountTree { layers }).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    wait_until("the index is asked for", || registry.requests() == 1);
    registry.set_held(false);
    let answer = std::io::read_to_string(stream).unwrap();
    assert!(matches!(serde_json::from_str(&answer).unwrap(), Response::Tree { .. }), "{answer}");
}

#[test]
fn removing_a_layer_whose_index_does_not_come_holds_up_no_tree() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let daemon = Running::start(root.path(), &registry);
    let healthy = [one_layer(&registry, "lower"), one_layer(&registry, "upper")];
    let path = daemon.mount(&healthy);
    registry.set_held(true);
    let dead = one_layer(&registry, "dead");
    assert_eq!(daemon.ask(&Request::AnnounceLayer { layer: dead.clone() }), Response::Done);
    wait_until("its index is asked for", || registry.requests() == 3);
    let mut removers: Vec<_> = (0..10).map(|_| Connection::open(&daemon.address)).collect();
    for remover in &mut removers {
        remover.send(&Request::RemoveLayer { layer: dead.layer.id() });
    }
    assert_eq!(daemon.mount(&healthy), path);
    assert!(daemon.mount(&healthy[1..]).join("upper").exists());
    assert!(matches!(daemon.ask(&Request::Status), Response::Status { .. }));
    registry.set_held(false);
    assert_eq!(daemon.ask(&Request::RemoveLayer { layer: dead.layer.id() }), Response::Done);
    assert_eq!(daemon.usage(dead.layer.id()), 0);
}

#[test]
fn a_daemon_that_containers_read_through_refuses_to_end_until_it_is_told_twice() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let daemon = Running::start(root.path(), &registry);
    let lower = daemon.mount(&[one_layer(&registry, "file")]);
    for name in ["upper", "work", "merged"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    let at = |name: &str| root.path().join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), at("upper"), at("work"));
    let options = CString::new(options).unwrap();
    rustix::mount::mount("overlay", at("merged"), "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    daemon.tell_to_end();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(daemon.ask(&Request::Ping), Response::Done);
    assert_eq!(fs::read_to_string(root.path().join("merged/file")).unwrap(), "file");
    daemon.tell_to_end();
    assert!(daemon.ends(), "told twice");
    rustix::mount::unmount(at("merged"), UnmountFlags::DETACH).unwrap();
    drop(daemon);

    let daemon = Running::start(root.path(), &registry);
    daemon.tell_to_end();
    assert!(daemon.ends(), "nobody uses it");
}
