//! A session that goes from one `lazuli-fused` to the next: the real program, a real mount.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::MetadataExt,
            net::{UnixDatagram, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use control::{Request, Response, descriptor};
use rustix::{
    mount::UnmountFlags,
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

/// A directory for a daemon, with no mounts left when it goes.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root")
    }

    fn address(&self) -> PathBuf {
        self.0.path().join("fused.sock")
    }

    fn mount_point(&self) -> PathBuf {
        self.root().join("mnt")
    }

    fn mount_count(&self) -> usize {
        let path = self.mount_point();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.split(' ').nth(4) == path.to_str()).count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while rustix::mount::unmount(self.mount_point(), UnmountFlags::FORCE | UnmountFlags::DETACH).is_ok() {}
    }
}

/// The program; killed when dropped.
struct Program(Child);

const PROGRAM: &str = env!("CARGO_BIN_EXE_lazuli-fused");

impl Program {
    fn start(place: &Place, session: Option<&OwnedFd>) -> Self {
        let mut command = Command::new(PROGRAM);
        if let Some(session) = session {
            command.arg("--take-over").stdin(session.try_clone().unwrap());
        }
        Self::spawn(place, command)
    }

    /// As systemd starts it, with what it has kept for the service.
    fn start_as_service(place: &Place, manager: &Path, kept: Option<&OwnedFd>) -> Self {
        let mut command = Command::new("/bin/sh");
        command.env("NOTIFY_SOCKET", manager);
        match kept {
            Some(session) => {
                command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 </dev/null", PROGRAM]);
                command.envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "session")]).stdin(session.try_clone().unwrap());
            }
            None => drop(command.args(["-c", "exec \"$0\" \"$@\"", PROGRAM])),
        }
        Self::spawn(place, command)
    }

    fn spawn(place: &Place, mut command: Command) -> Self {
        command.arg("--root").arg(place.root()).arg("--address").arg(place.address()).stderr(Stdio::piped());
        command.args(["--background-rate", "0"]);
        let mut program = Self(command.spawn().unwrap());
        let mut lines = BufReader::new(program.0.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("ready")));
        // Keeps reading, so that the program never finds its log closed.
        thread::spawn(move || lines.for_each(drop));
        program
    }

    fn end(mut self, signal: Signal) -> bool {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        self.0.wait().unwrap().success()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The other holder, as long as the daemon lives or this does.
struct Holder {
    session: OwnedFd,
    _connection: UnixStream,
}

impl Holder {
    fn new(place: &Place) -> Self {
        let mut connection = UnixStream::connect(place.address()).unwrap();
        let request = serde_json::to_string(&Request::HoldSession).unwrap();
        connection.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut answer = [0; 100];
        let (len, session) = descriptor::receive(&connection, &mut answer).unwrap();
        assert_eq!(serde_json::from_slice::<Response>(&answer[..len]).unwrap(), Response::Session);
        Self { session: session.unwrap(), _connection: connection }
    }
}

/// Asks for a name that is not there, which the kernel never remembers: somebody must answer.
fn look(mount_point: &Path) -> io::Result<bool> {
    mount_point.join("trees").join("0".repeat(64)).try_exists()
}

#[test]
fn a_killed_daemons_session_goes_on_in_the_next_one() {
    let place = Place::new();
    let mut program = Program::start(&place, None);
    let device = fs::metadata(place.mount_point()).unwrap().dev();
    for _ in 0..3 {
        let holder = Holder::new(&place);
        program.end(Signal::KILL);
        let mount_point = place.mount_point();
        let waiting = thread::spawn(move || look(&mount_point));
        program = Program::start(&place, Some(&holder.session));
        assert!(!waiting.join().unwrap().unwrap());
        assert_eq!(fs::metadata(place.mount_point()).unwrap().dev(), device);
        assert_eq!(place.mount_count(), 1);
    }
}

#[test]
fn a_daemon_told_to_end_leaves_a_session_that_is_held_and_no_other() {
    let place = Place::new();
    let program = Program::start(&place, None);
    let holder = Holder::new(&place);
    assert!(program.end(Signal::TERM));
    assert_eq!(place.mount_count(), 1);
    let program = Program::start(&place, Some(&holder.session));
    assert!(!look(&place.mount_point()).unwrap());
    drop(holder);
    assert!(program.end(Signal::TERM));
    assert_eq!(place.mount_count(), 0);
}

#[test]
fn a_daemon_without_the_session_ends_it_for_those_who_wait() {
    let place = Place::new();
    let program = Program::start(&place, None);
    look(&place.mount_point()).unwrap();
    let holder = Holder::new(&place);
    program.end(Signal::KILL);
    let mount_point = place.mount_point();
    let waiting = thread::spawn(move || look(&mount_point));
    let _program = Program::start(&place, None);
    // It asks the old session, which fails, or the new one.
    let _ = waiting.join().unwrap();
    assert_eq!(place.mount_count(), 1);
    assert!(!look(&place.mount_point()).unwrap());
    drop(holder);
}

#[test]
fn what_a_killed_daemon_left_is_not_below_the_next_mount() {
    let place = Place::new();
    for _ in 0..3 {
        let program = Program::start(&place, None);
        // The kernel answers this from its cache afterwards, whether anybody serves the mount or not.
        fs::metadata(place.mount_point()).unwrap();
        program.end(Signal::KILL);
        assert_eq!(place.mount_count(), 1);
    }
}

#[test]
fn a_session_that_has_ended_is_not_taken_over() {
    let place = Place::new();
    let program = Program::start(&place, None);
    let holder = Holder::new(&place);
    program.end(Signal::KILL);
    rustix::mount::unmount(place.mount_point(), UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
    let _program = Program::start(&place, Some(&holder.session));
    assert_eq!(place.mount_count(), 1);
    assert!(!look(&place.mount_point()).unwrap());
}

#[test]
fn a_service_manager_keeps_the_session() {
    let place = Place::new();
    let manager = place.0.path().join("notify");
    let socket = UnixDatagram::bind(&manager).unwrap();
    let receive = || {
        let mut message = [0; 100];
        let (len, kept) = descriptor::receive(&socket, &mut message).unwrap();
        (String::from_utf8(message[..len].to_owned()).unwrap(), kept)
    };
    let mut kept = None;
    let mut device = None;
    for signal in [Signal::TERM, Signal::KILL, Signal::TERM] {
        let program = Program::start_as_service(&place, &manager, kept.as_ref());
        assert_eq!(receive().0, "FDSTOREREMOVE=1\nFDNAME=session\n");
        let (message, session) = receive();
        assert_eq!(message, "FDSTORE=1\nFDNAME=session\n");
        assert_eq!(receive().0, "READY=1\n");
        assert!(!look(&place.mount_point()).unwrap());
        let now = fs::metadata(place.mount_point()).unwrap().dev();
        assert_eq!(*device.get_or_insert(now), now, "it is the first session still");
        kept = session;
        assert_eq!(program.end(signal), signal == Signal::TERM);
        assert_eq!(place.mount_count(), 1);
    }
}

#[test]
fn a_service_manager_hears_again_and_again_that_the_session_answers() {
    let place = Place::new();
    let manager = place.0.path().join("notify");
    let socket = UnixDatagram::bind(&manager).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut command = Command::new(PROGRAM);
    command.env("NOTIFY_SOCKET", &manager).env("WATCHDOG_USEC", "200000");
    let program = Program::spawn(&place, command);
    let mut told = 0;
    while told < 3 {
        let mut message = [0; 100];
        let len = socket.recv(&mut message).unwrap();
        told += usize::from(&message[..len] == b"WATCHDOG=1\n");
    }
    program.end(Signal::TERM);
}
