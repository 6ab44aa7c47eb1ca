//! The daemon through its control socket and its session: a real socket, a real mount, a source in memory.

use std::{
    fs, io,
    io::{BufRead, BufReader},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use control::{ErrorKind, RemoteLayer, Request, Response};

use crate::support::{
    daemon::{Connection, Running, options},
    *,
};
use format_spec::Digest;
use fusefs::{Daemon, DaemonOptions, Error};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    process::{Pid, Signal, kill_process},
};
use tokio::runtime::Runtime;

fn message(response: Response) -> String {
    match response {
        Response::Error { message, .. } => message,
        other => panic!("{other:?}"),
    }
}

fn two_layers(registry: &Registry) -> Vec<RemoteLayer> {
    let lower = layer([("lower", file("from below")), ("both", file("old"))]);
    vec![registry.push(&lower), registry.push(&layer([("both", file("new"))]))]
}

#[test]
fn a_tree_appears_under_its_id_and_stays_the_same() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    let trees = daemon.root.join("mnt/trees");
    let expected = trees.join(id_of(&layers).hex());
    assert!(!expected.exists());
    assert_eq!(fs::read_dir(&trees).unwrap().count(), 0);

    assert_eq!(daemon.mount(&layers), expected);
    assert_eq!(fs::read_to_string(expected.join("lower")).unwrap(), "from below");
    assert_eq!(fs::read_to_string(expected.join("both")).unwrap(), "new");
    assert_eq!(fs::read_dir(&trees).unwrap().count(), 1, "the listing is looked at again");
    let requests = registry.requests();
    assert_eq!(daemon.mount(&layers), expected);
    assert_eq!(registry.requests(), requests);
    assert_eq!(daemon.trees(), [id_of(&layers)]);
    assert_eq!(fs::metadata(daemon.root.join("mnt")).unwrap().mode(), 0o40700);
}

#[test]
fn the_same_tree_asked_for_many_times_at_once_is_made_once() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20).map(|_| scope.spawn(|| daemon.mount(&layers))).collect();
        for thread in threads {
            assert!(thread.join().unwrap().join("lower").exists());
        }
    });
    assert_eq!(registry.requests(), 2, "one for each index");
    let slot = fs::read_to_string(daemon.root.join("trees/next-slot")).unwrap();
    assert_eq!(slot, "2");
}

#[test]
fn an_announced_layer_is_there_before_it_is_mounted() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    for layer in &layers {
        assert_eq!(daemon.ask(&Request::AnnounceLayer { layer: layer.clone() }), Response::Done);
    }
    daemon.mount(&layers);
    assert_eq!(registry.requests(), 2);
    let Response::Status { layers: status, .. } = daemon.ask(&Request::Status) else { panic!("no status") };
    let mut expected: Vec<_> = layers.iter().map(|layer| (layer.clone(), 0, 1)).collect();
    expected.sort_by_key(|(layer, ..)| layer.layer.id());
    let status: Vec<_> =
        status.into_iter().map(|layer| (layer.layer, layer.frames_present, layer.frames_total)).collect();
    assert_eq!(status, expected);
}

#[test]
fn a_layer_is_removed_once_no_tree_uses_it() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let (tree, layer) = (id_of(&layers), layers[0].layer.id());
    let daemon = Running::start(root.path(), &registry);
    let path = daemon.mount(&layers);
    fs::read(path.join("lower")).unwrap();
    assert!(daemon.usage(layer) > 0);
    let refused = message(daemon.ask(&Request::RemoveLayer { layer }));
    assert_eq!(refused, format!("layer {layer} is used by tree {tree}: release the tree first"));

    for _ in 0..2 {
        assert_eq!(daemon.ask(&Request::ReleaseTree { tree }), Response::Done);
        assert!(!path.exists());
        assert_eq!(daemon.trees(), []);
    }
    for _ in 0..2 {
        assert_eq!(daemon.ask(&Request::RemoveLayer { layer }), Response::Done);
        assert_eq!(daemon.usage(layer), 0);
    }
    assert_eq!(daemon.mount(&layers), path);
    assert_eq!(fs::read_to_string(path.join("lower")).unwrap(), "from below");
}

#[test]
fn a_blob_is_the_plain_address_space_of_its_layer() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let (a, b) = (noise(1, 5000), noise(2, 3000));
    let layers = [registry.push(&layer([("a", file(&a)), ("b", file(&b))]))];
    let daemon = Running::start(root.path(), &registry);
    daemon.mount(&layers);
    let mut expected = a;
    expected.resize(8192, 0);
    expected.extend(b);
    expected.resize(12288, 0);
    let blob = daemon.root.join("mnt/layers").join(layers[0].layer.id().hex());
    assert!(fs::read(&blob).unwrap() == expected);
    assert_eq!(fs::metadata(&blob).unwrap().mode(), 0o100_400);
    assert_eq!(fs::read_dir(daemon.root.join("mnt/layers")).unwrap().count(), 1);
}

#[test]
fn a_restarted_daemon_shows_the_same_trees_with_the_same_numbers() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let number = |daemon: &Running| {
        let path = daemon.mount(&layers);
        assert_eq!(fs::read_to_string(path.join("lower")).unwrap(), "from below");
        fs::metadata(path.join("lower")).unwrap().ino()
    };
    let before = number(&Running::start(root.path(), &registry));
    registry.set_down(true);
    assert_eq!(number(&Running::start(root.path(), &registry)), before);
    let daemon = Running::start(root.path(), &registry);
    assert_eq!(daemon.ask(&Request::ReleaseTree { tree: id_of(&layers) }), Response::Done);
    assert_ne!(number(&daemon), before, "numbers of a released tree are not used again");
}

#[test]
fn a_damaged_tree_is_made_again() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let path = Running::start(root.path(), &registry).mount(&layers);
    let stored = root.path().join("root/trees").join(id_of(&layers).hex());
    fs::write(&stored, &fs::read(&stored).unwrap()[..100]).unwrap();
    let daemon = Running::start(root.path(), &registry);
    assert_eq!(daemon.mount(&layers), path);
    assert_eq!(fs::read_to_string(path.join("lower")).unwrap(), "from below");
}

#[test]
fn what_fails_says_why_and_can_be_asked_again() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    let mut connection = Connection::open(&daemon.address);
    registry.set_down(true);
    let error = message(connection.ask(&Request::MountTree { layers: layers.clone() }));
    assert!(error.contains("registry is down") && error.contains("index of sha256:"), "{error}");
    assert_eq!(connection.ask(&Request::RemoveLayer { layer: layers[0].layer.id() }), Response::Done);
    registry.set_down(false);
    assert!(matches!(connection.ask(&Request::MountTree { layers: layers.clone() }), Response::Tree { .. }));

    assert!(message(connection.ask_raw("{\"request\":\"dance\"}")).contains("request is not understood"));
    assert!(message(connection.ask_raw("nonsense")).contains("request is not understood"));
    assert!(message(connection.ask(&Request::MountTree { layers: vec![] })).contains("image has 0 layers"));
    let mut liar = layers;
    liar[0].layer.index.digest = Digest::of(b"another index");
    assert!(
        message(connection.ask(&Request::MountTree { layers: liar })).contains("compressed index has digest sha256:")
    );
    assert!(matches!(connection.ask(&Request::Status), Response::Status { .. }));
}

#[test]
fn a_root_and_a_socket_have_one_daemon() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let runtime = Runtime::new().unwrap();
    let start =
        |options: DaemonOptions| runtime.block_on(Daemon::start(options, registry.sources())).map(drop).unwrap_err();
    let daemon = Running::start(root.path(), &registry);
    assert!(matches!(start(options(root.path())), Error::Locked(_)));
    let other_root = DaemonOptions { root: root.path().join("other"), ..options(root.path()) };
    assert!(matches!(start(other_root.clone()), Error::SocketInUse(_)));
    assert!(matches!(daemon.ask(&Request::Status), Response::Status { .. }));
    assert!(!is_mounted(&root.path().join("other/mnt")));
    drop(daemon);

    fs::write(options(root.path()).address, "no socket").unwrap();
    assert!(matches!(start(other_root), Error::Socket { error, .. } if error.kind() == io::ErrorKind::AlreadyExists));
    fs::remove_file(options(root.path()).address).unwrap();
    drop(UnixListener::bind(options(root.path()).address).unwrap());
    let daemon = Running::start(root.path(), &registry);
    assert!(matches!(daemon.ask(&Request::Status), Response::Status { .. }), "a stale socket is replaced");
    let socket = fs::metadata(&daemon.address).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_daemon_told_to_end_does_not_wait_for_containers() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    let lower = daemon.mount(&layers);
    for name in ["upper", "work", "merged"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    let at = |name: &str| root.path().join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), at("upper"), at("work"));
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("overlay", at("merged"), "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    drop(daemon);
    rustix::mount::unmount(at("merged"), UnmountFlags::DETACH).unwrap();
}

/// The program itself; killed if the test fails.
struct Program(Child);

impl Program {
    fn start(root: &Path) -> Self {
        let DaemonOptions { root, address, .. } = options(root);
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli-fused"));
        command.arg("--root").arg(root).arg("--address").arg(address).stderr(Stdio::piped());
        command.args(["--background-rate", "0"]);
        let mut program = Self(command.spawn().unwrap());
        let log = BufReader::new(program.0.stderr.take().unwrap());
        let mut lines = log.lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("ready")));
        // Keeps reading, so that the program never finds its log closed.
        std::thread::spawn(move || lines.for_each(drop));
        program
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_program_leaves_nothing_behind_when_it_is_told_to_end() {
    let root = tempfile::tempdir().unwrap();
    let mount_point = options(root.path()).root.join("mnt");
    for signal in [Signal::TERM, Signal::INT] {
        let mut program = Program::start(root.path());
        assert!(is_mounted(&mount_point));
        program.signal(signal);
        assert!(program.0.wait().unwrap().success());
        assert!(!is_mounted(&mount_point));
        assert!(!options(root.path()).address.exists());
    }
}

#[test]
fn a_killed_daemon_is_followed_by_another() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let mount_point = options(root.path()).root.join("mnt");
    let mut program = Program::start(root.path());
    program.signal(Signal::KILL);
    program.0.wait().unwrap();
    assert!(is_mounted(&mount_point), "the dead mount is what the next one finds");
    let layers = two_layers(&registry);
    let daemon = Running::start(root.path(), &registry);
    assert!(daemon.mount(&layers).join("lower").exists());
}

#[test]
fn the_program_says_in_its_last_line_why_it_did_not_start() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    let program = env!("CARGO_BIN_EXE_lazuli-fused");
    let output =
        Command::new(program).arg("--root").arg(&file).arg("--address").arg(root.path().join("s")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.lines().last().unwrap().contains(file.to_str().unwrap()), "{log}");
    assert_eq!(Command::new(program).arg("--unknown").output().unwrap().status.code(), Some(2));
}

/// Its index says other things than its tar stream: the headers of layers made here are none.
#[test]
fn a_layer_that_is_refused_is_in_no_new_mount_and_its_reads_fail() {
    let (root, registry) = (tempfile::tempdir().unwrap(), Registry::default());
    let layers = vec![registry.push(&layer([("file", file(noise(1, 100_000)))]))];
    let id = layers[0].layer.id();
    let daemon = Running::start(root.path(), &registry);
    let verdict = || match daemon.ask(&Request::Verdicts { layers: vec![id] }) {
        Response::Verdicts { verdicts } => verdicts[0].clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(verdict(), None, "of an unknown layer nothing is known");
    let tree = daemon.mount(&layers);
    let open = fs::File::open(tree.join("file")).unwrap();
    assert_eq!(verdict(), None);
    assert_eq!(daemon.ask(&Request::Verify { layers: layers.clone() }), Response::Done);
    let verdict = loop {
        if let Some(verdict) = verdict() {
            break verdict;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let reason = verdict.refusal().unwrap().to_owned();
    assert!(reason.starts_with("tar stream: tar entry at byte 0"), "{reason}");
    let error = std::os::unix::fs::FileExt::read_at(&open, &mut [0; 10], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    match daemon.ask(&Request::MountTree { layers }) {
        Response::Error { message, kind: ErrorKind::Untrue } => assert!(message.ends_with(&reason), "{message}"),
        other => panic!("{other:?}"),
    }
    let Response::Status { layers: status, .. } = daemon.ask(&Request::Status) else { panic!("no status") };
    assert_eq!(status[0].verdict, Some(verdict));
}
