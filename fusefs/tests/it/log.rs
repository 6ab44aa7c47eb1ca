//! The program with a log that cannot be written: it serves on.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use control::{RemoteLayer, Request, Response};

use crate::support::{daemon::options, is_mounted};
use format_spec::{Digest, IndexLocation, LazyLayer};
use rustix::process::{Pid, Signal, kill_process};

/// How long the program may take to open its socket, to answer, or to end.
const SOON: Duration = Duration::from_secs(30);

/// The program itself; killed if the test fails.
struct Program(Child);

impl Program {
    fn start(root: &Path, stderr: impl Into<Stdio>, arguments: &[&str]) -> Self {
        let options = options(root);
        let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli-fused"));
        command.arg("--root").arg(&options.root).arg("--address").arg(&options.address);
        command.args(["--mode", "fuse", "--background-rate", "0"]).args(arguments);
        let program = Self(command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap());
        let give_up_at = Instant::now() + SOON;
        while UnixStream::connect(&options.address).is_err() {
            assert!(Instant::now() < give_up_at, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        program
    }

    fn end(mut self) -> bool {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let give_up_at = Instant::now() + SOON;
        while Instant::now() < give_up_at {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(root: &Path, request: &Request) -> Response {
    let mut stream = UnixStream::connect(options(root).address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(format!("{}\n", serde_json::to_string(request).unwrap()).as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).expect("an answer");
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer:?}: {error}"))
}

/// A request that fails and is logged, with a name of this length in its line.
fn fail(root: &Path, number: usize, name_len: usize) {
    let digest = Digest::of(&number.to_le_bytes());
    let index = IndexLocation { offset: 0, compressed_len: 10, plain_len: 20, digest };
    let layer = LazyLayer { blob: digest, blob_len: 100, index, hot_len: 0 };
    // No reference: nobody is asked for it.
    let image = format!("{number} {}", "!".repeat(name_len));
    let answer = ask(root, &Request::MountTree { layers: vec![RemoteLayer { layer, image }] });
    assert!(matches!(answer, Response::Error { .. }), "{answer:?}");
}

fn serves_and_ends(root: &Path, program: Program) {
    for number in 0..100 {
        fail(root, number, 16 << 10);
    }
    assert!(matches!(ask(root, &Request::Status), Response::Status { .. }));
    assert!(fs::read_dir(options(root).root.join("mnt/trees")).unwrap().next().is_none());
    assert!(program.end());
    assert!(!is_mounted(&options(root).root.join("mnt")));
}

#[test]
fn a_full_disk_below_the_log_ends_nothing() {
    let root = tempfile::tempdir().unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    serves_and_ends(root.path(), Program::start(root.path(), full, &[]));
}

#[test]
fn a_log_whose_reader_is_gone_ends_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    serves_and_ends(root.path(), Program::start(root.path(), writer, &[]));
}

#[test]
fn a_log_whose_reader_reads_no_longer_holds_up_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    serves_and_ends(root.path(), Program::start(root.path(), writer, &[]));
    let mut log = vec![0; 1 << 10];
    let len = File::from(reader).read(&mut log).unwrap();
    assert!(String::from_utf8_lossy(&log[..len]).contains("how trees are mounted"), "the beginning is there");
}

#[test]
fn a_log_file_has_the_last_words_and_is_bounded() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("fused.log");
    let old = "what an earlier process said\n".repeat(300_000);
    fs::write(&path, &old).unwrap();
    let stderr = File::options().append(true).open(&path).unwrap();
    let program = Program::start(root.path(), stderr, &["--log-file", path.to_str().unwrap()]);
    serves_and_ends(root.path(), program);
    assert_eq!(fs::read_to_string(root.path().join("fused.log.1")).unwrap().len(), old.len());
    let log = fs::read_to_string(&path).unwrap();
    assert!(log.lines().last().unwrap().contains("unmounted"), "{log}");
    assert!(log.len() < 4 << 20, "{} bytes", log.len());
}

/// As where something of the machine was started in a mount namespace of its own meanwhile: nobody reads there, and the
/// end of the program is no reason to look.
#[test]
fn a_copy_of_the_mount_in_another_namespace_is_no_warning_at_the_end() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("fused.log");
    let program = Program::start(root.path(), File::create(&path).unwrap(), &[]);
    let mut command = Command::new("unshare");
    let other = Program(command.args(["--mount", "--propagation", "private", "sleep", "60"]).spawn().unwrap());
    let namespace = |id: &str| fs::read_link(format!("/proc/{id}/ns/mnt")).unwrap();
    let give_up_at = Instant::now() + SOON;
    while namespace(&other.0.id().to_string()) == namespace("self") {
        assert!(Instant::now() < give_up_at, "it stays in this namespace");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(program.end());
    let log = fs::read_to_string(&path).unwrap();
    assert!(log.contains("another mount namespace has a copy of the mount"), "{log}");
    assert!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");
}
