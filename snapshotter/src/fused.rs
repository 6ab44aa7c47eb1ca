//! The other daemon: asking `lazuli-fused` over its control socket, and starting it when it is not there.
//!
//! `lazuli-fused` outlives this process: containers read through it. So it is started detached, found
//! again by its socket, and never ended from here. Every request may be repeated, which is what happens
//! when a connection breaks.
//!
//! This process holds a duplicate of the session's `/dev/fuse` descriptor: when `lazuli-fused` ends, in whatever way,
//! the kernel keeps the session and its readers wait, until the next one, which gets the descriptor as standard input,
//! goes on with it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex as StdMutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use control::{
    ErrorKind, LayerStatus, RemoteLayer, Request, Response, TreeId, Verdict, descriptor, exchange, request_line, root,
};
use format_spec::LayerId;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::UnixStream,
    sync::Mutex,
    time,
};
use tracing::{info, warn};

/// How long a request that only changes local state may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// How long deleting may take, which nobody waits for: longer than a daemon that hangs is left alone.
const FREE_WITHIN: Duration = Duration::from_secs(120);
/// How often a daemon is asked whether it is there: a fraction of the time that it may be silent.
const PING_FRACTION: u32 = 6;
/// How long a tree may take: its indexes come from the registry, which retries and waits on its own.
const TREE_WITHIN: Duration = Duration::from_secs(180);
/// How long a new daemon may take to open its socket.
const START_WITHIN: Duration = Duration::from_secs(20);
/// How often a new daemon's socket is tried.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a request is repeated while connections break.
const REPEAT_WITHIN: Duration = Duration::from_secs(5);
/// After a failed start: how long requests fail at once instead of starting it again.
const START_PAUSE: Duration = Duration::from_secs(1);
/// Bytes from which on memory of the daemon goes back to the system at once: glibc's default, which it raises by itself
/// otherwise.
const MMAP_THRESHOLD: &str = "131072";
/// Longest answer to a ping.
const PONG_LEN_MAX: u64 = 4096;

/// What `lazuli-fused` is started from.
#[derive(Debug, Clone)]
pub struct FusedProgram {
    /// The program.
    pub path: PathBuf,
    /// What it is told besides its places.
    pub arguments: Vec<String>,
    /// Whether it is a service of its own, which somebody else starts.
    pub is_service: bool,
}

/// A client of `lazuli-fused`.
#[derive(Debug)]
pub struct Fused {
    root: PathBuf,
    address: PathBuf,
    program: FusedProgram,
    last_failure: Mutex<Option<(Instant, String)>>,
    /// The session of the daemon that ran last: a duplicate of its `/dev/fuse` descriptor.
    session: StdMutex<Option<OwnedFd>>,
}

/// `lazuli-fused` did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FusedError {
    /// It cannot be started.
    #[error("cannot start {0}: {1}")]
    Start(PathBuf, #[source] io::Error),
    /// It ended instead of opening its socket.
    #[error("{binary} ended at start, {status}: {last_line}")]
    Ended {
        /// The program.
        binary: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The last line of its log.
        last_line: String,
    },
    /// It did not open its socket in time.
    #[error("lazuli-fused did not open {0} within {START_WITHIN:?}")]
    NoSocket(PathBuf),
    /// It failed to start a moment ago.
    #[error("{0}")]
    StartedInVain(String),
    /// The connection failed.
    #[error("control socket {0}: {1}")]
    Connection(PathBuf, #[source] io::Error),
    /// No answer came in time.
    #[error("lazuli-fused did not answer within {0:?}")]
    Timeout(Duration),
    /// The answer makes no sense.
    #[error("lazuli-fused answered {0:?}")]
    Answer(String),
    /// It was understood and could not be done.
    #[error("{message}")]
    Refused {
        /// What, where, what to do.
        message: String,
        /// Whose fault it is.
        kind: ErrorKind,
    },
}

type Result<T> = std::result::Result<T, FusedError>;

impl Fused {
    /// A client for the daemon of `root`, to be started from `program` if need be.
    pub fn new(root: &Path, program: FusedProgram) -> Self {
        let address = root.join(root::SOCKET);
        Self { root: root.to_owned(), address, program, last_failure: Mutex::default(), session: StdMutex::default() }
    }

    /// Has a layer's index fetched in the background.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached; failures to fetch show in [`Self::mount_tree`].
    pub async fn announce_layer(&self, layer: RemoteLayer) -> Result<()> {
        self.done(Request::AnnounceLayer { layer }).await
    }

    /// Has a layer's index fetched, or, where it is here, sees whether the image's registry gives something of it: an
    /// answer within that time.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached, or cannot read the layer, or not in time.
    pub async fn probe_layer(&self, layer: RemoteLayer, within: Duration) -> Result<()> {
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        self.done(Request::ProbeLayer { layer, within_ms }).await
    }

    /// Has verdicts on layers found out at full speed, in the background.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached.
    pub async fn verify(&self, layers: Vec<RemoteLayer>) -> Result<()> {
        self.done(Request::Verify { layers }).await
    }

    /// The verdicts that there are, in the order of `layers`.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached.
    pub async fn verdicts(&self, layers: Vec<LayerId>) -> Result<Vec<Option<Verdict>>> {
        match self.request(&Request::Verdicts { layers }, ANSWER_WITHIN).await? {
            Response::Verdicts { verdicts } => Ok(verdicts),
            other => Err(FusedError::Answer(format!("{other:?}"))),
        }
    }

    /// Makes a merged tree available and returns its directory; `layers` are lowest first, at least one.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached or an index cannot be fetched, verified or understood.
    pub async fn mount_tree(&self, layers: Vec<RemoteLayer>) -> Result<PathBuf> {
        match self.request(&Request::MountTree { layers }, TREE_WITHIN).await? {
            Response::Tree { path } => Ok(path),
            other => Err(FusedError::Answer(format!("{other:?}"))),
        }
    }

    /// Has a tree forgotten.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached or refuses.
    pub async fn release_tree(&self, tree: TreeId) -> Result<()> {
        self.done_within(Request::ReleaseTree { tree }, FREE_WITHIN).await
    }

    /// Has a layer's cache deleted.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached or refuses.
    pub async fn remove_layer(&self, layer: LayerId) -> Result<()> {
        self.done_within(Request::RemoveLayer { layer }, FREE_WITHIN).await
    }

    /// What the daemon holds.
    ///
    /// # Errors
    ///
    /// When the daemon cannot be reached.
    pub async fn status(&self) -> Result<(Vec<LayerStatus>, Vec<TreeId>)> {
        match self.request(&Request::Status, ANSWER_WITHIN).await? {
            Response::Status { layers, trees, .. } => Ok((layers, trees.into_iter().map(|tree| tree.tree).collect())),
            other => Err(FusedError::Answer(format!("{other:?}"))),
        }
    }

    /// Starts the daemon if it is not there, and holds its session; what is returned tells when it ends.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or gives no descriptor.
    pub async fn watch(&self) -> Result<Watch> {
        let mut connection = self.connect().await?;
        let held = self.hold_session(&mut connection).await;
        let watch = Watch(BufReader::new(connection));
        if let Err(FusedError::Timeout(_)) = held
            && self.session_outlives_daemon()
        {
            warn!("lazuli-fused takes connections and does not answer, it is ended and started again");
            watch.kill();
        }
        held.map(|()| watch)
    }

    /// Whether containers notice nothing when the daemon is killed.
    fn session_outlives_daemon(&self) -> bool {
        self.program.is_service || self.session().is_some()
    }

    /// The daemon takes us for a holder until the connection ends.
    async fn hold_session(&self, connection: &mut UnixStream) -> Result<()> {
        let received = time::timeout(ANSWER_WITHIN, ask_for_session(connection)).await;
        let received = received.map_err(|_| FusedError::Timeout(ANSWER_WITHIN))?;
        let (answer, device) = received.map_err(|error| FusedError::Connection(self.address.clone(), error))?;
        match (parse_answer(&answer)?, device) {
            (Response::Session, Some(device)) => {
                *self.session() = Some(device);
                Ok(())
            }
            (other, _) => Err(FusedError::Answer(format!("{other:?}"))),
        }
    }

    fn session(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        // It is replaced as a whole: a panic elsewhere leaves it whole.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn done(&self, request: Request) -> Result<()> {
        self.done_within(request, ANSWER_WITHIN).await
    }

    async fn done_within(&self, request: Request, within: Duration) -> Result<()> {
        match self.request(&request, within).await? {
            Response::Done => Ok(()),
            other => Err(FusedError::Answer(format!("{other:?}"))),
        }
    }

    async fn request(&self, request: &Request, within: Duration) -> Result<Response> {
        let line = request_line(request);
        let mut broken_since = None;
        let answer = loop {
            match self.exchange(&line, within).await {
                // The daemon ended with the request under way, or still takes connections while it ends: ask the next.
                Err(FusedError::Connection(..))
                    if broken_since.get_or_insert_with(Instant::now).elapsed() < REPEAT_WITHIN =>
                {
                    time::sleep(START_POLL).await;
                }
                answer => break answer,
            }
        };
        match answer? {
            Response::Error { message, kind } => Err(FusedError::Refused { message, kind }),
            response => Ok(response),
        }
    }

    async fn exchange(&self, line: &[u8], within: Duration) -> Result<Response> {
        let mut connection = self.connect().await?;
        let answer =
            time::timeout(within, exchange(&mut connection, line)).await.map_err(|_| FusedError::Timeout(within))?;
        parse_answer(&answer.map_err(|error| FusedError::Connection(self.address.clone(), error))?)
    }

    async fn connect(&self) -> Result<UnixStream> {
        match self.try_connect().await? {
            Some(connection) => Ok(connection),
            None => self.start().await,
        }
    }

    /// `None` when nobody listens.
    async fn try_connect(&self) -> Result<Option<UnixStream>> {
        match UnixStream::connect(&self.address).await {
            Ok(connection) => Ok(Some(connection)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(FusedError::Connection(self.address.clone(), error)),
        }
    }

    async fn start(&self) -> Result<UnixStream> {
        let mut last_failure = self.last_failure.lock().await;
        // Another request may have started it while this one waited.
        if let Some(connection) = self.try_connect().await? {
            return Ok(connection);
        }
        if let Some((at, message)) = &*last_failure
            && at.elapsed() < START_PAUSE
        {
            return Err(FusedError::StartedInVain(message.clone()));
        }
        let started = if self.program.is_service { self.await_service().await } else { self.spawn_and_connect().await };
        *last_failure = started.as_ref().err().map(|error| (Instant::now(), error.to_string()));
        started
    }

    async fn spawn_and_connect(&self) -> Result<UnixStream> {
        let log = self.log();
        let mut child = self.spawn(&log).map_err(|error| FusedError::Start(self.program.path.clone(), error))?;
        let give_up_at = Instant::now() + START_WITHIN;
        let started = loop {
            match self.connect_and_hold().await {
                // It may be the daemon before, which is just ending.
                Ok(None) | Err(FusedError::Connection(..)) => {}
                Ok(Some(connection)) => break Ok(connection),
                Err(error) => break Err(error),
            }
            if let Ok(Some(status)) = child.try_wait() {
                let last_line = last_line(&log).unwrap_or_default();
                return Err(FusedError::Ended { binary: self.program.path.clone(), status, last_line });
            }
            if Instant::now() > give_up_at {
                break Err(FusedError::NoSocket(self.address.clone()));
            }
            time::sleep(START_POLL).await;
        };
        info!(pid = child.id(), log = %log.display(), "lazuli-fused started");
        wait_in_background(child);
        started
    }

    fn log(&self) -> PathBuf {
        self.root.join(root::FUSED_LOG)
    }

    async fn await_service(&self) -> Result<UnixStream> {
        let give_up_at = Instant::now() + START_WITHIN;
        loop {
            match self.connect_and_hold().await {
                Ok(None) | Err(FusedError::Connection(..)) if Instant::now() < give_up_at => {
                    time::sleep(START_POLL).await;
                }
                Ok(None) => return Err(FusedError::NoSocket(self.address.clone())),
                Ok(Some(connection)) => return Ok(connection),
                Err(error) => return Err(error),
            }
        }
    }

    /// Holds the session before anything depends on it; `None` when nobody listens.
    async fn connect_and_hold(&self) -> Result<Option<UnixStream>> {
        let Some(mut connection) = self.try_connect().await? else { return Ok(None) };
        self.hold_session(&mut connection).await?;
        Ok(Some(connection))
    }

    /// In a process group of its own, so that no signal meant for this process reaches it, and with a log
    /// file, so that it does not depend on whoever reads our messages.
    fn spawn(&self, log: &Path) -> io::Result<Child> {
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
        let session = self.session().as_ref().map(OwnedFd::try_clone).transpose()?;
        Command::new(&self.program.path)
            .arg("--root")
            .arg(&self.root)
            .arg("--address")
            .arg(&self.address)
            // It keeps the file short; what it says before that, or instead, goes there as well.
            .arg("--log-file")
            .arg(self.log())
            .args(&self.program.arguments)
            .args(session.is_some().then_some("--take-over"))
            // It is no part of the service that this process may be.
            .env_remove("NOTIFY_SOCKET")
            // Else what merging a large tree took for a moment stays in the heaps of its threads (mallopt(3)).
            .env("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD)
            .current_dir("/")
            .stdin(session.map_or_else(Stdio::null, Stdio::from))
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
    }
}

/// A daemon that was alive at some point.
#[derive(Debug)]
pub struct Watch(BufReader<UnixStream>);

/// The fate of a watched daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It has ended.
    Ended,
    /// It is there and has not answered for so long.
    Hangs(Duration),
}

impl Watch {
    /// Returns when the daemon has ended, or is silent for that time; without one it may be silent for ever.
    pub async fn ended(&mut self, hang: Option<Duration>) -> End {
        let Some(hang) = hang else {
            // It says nothing unasked, so this returns at the end of the connection, in whatever way that comes.
            let _ended = self.0.read(&mut [0]).await;
            return End::Ended;
        };
        loop {
            // Unasked it says nothing.
            if time::timeout(hang / PING_FRACTION, self.0.read(&mut [0])).await.is_ok() {
                return End::Ended;
            }
            match time::timeout(hang, self.ping()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return End::Ended,
                Err(_) => return End::Hangs(hang),
            }
        }
    }

    /// Any answer will do: an older daemon does not understand the question.
    async fn ping(&mut self) -> io::Result<()> {
        self.0.write_all(&request_line(&Request::Ping)).await?;
        let mut answer = Vec::new();
        (&mut self.0).take(PONG_LEN_MAX).read_until(b'\n', &mut answer).await?;
        if answer.ends_with(b"\n") { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Ends the daemon at once, also one that is stopped. It has not ended before: the connection is there.
    pub fn kill(&self) {
        let killed = rustix::net::sockopt::socket_peercred(self.0.get_ref())
            .and_then(|peer| rustix::process::kill_process(peer.pid, rustix::process::Signal::KILL));
        if let Err(error) = killed {
            warn!(%error, "lazuli-fused cannot be ended");
        }
    }
}

fn parse_answer(answer: &[u8]) -> Result<Response> {
    serde_json::from_slice(answer)
        .map_err(|_| FusedError::Answer(String::from_utf8_lossy(answer).chars().take(200).collect()))
}

/// The answer to [`Request::HoldSession`], and the descriptor that comes with it.
async fn ask_for_session(connection: &mut UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    connection.write_all(&request_line(&Request::HoldSession)).await?;
    let (mut answer, mut device) = (Vec::new(), None);
    while !answer.ends_with(b"\n") {
        let mut buffer = [0; 256];
        let (len, attached) =
            connection.async_io(Interest::READABLE, || descriptor::receive(&*connection, &mut buffer)).await?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answer.extend_from_slice(&buffer[..len]);
        device = attached.or(device);
    }
    Ok((answer, device))
}

/// Keeps an ended daemon from staying a zombie, and says that it ended.
fn wait_in_background(mut child: Child) {
    std::thread::spawn(move || match child.wait() {
        Ok(status) if status.success() => info!(pid = child.id(), "lazuli-fused ended"),
        Ok(status) => warn!(pid = child.id(), %status, "lazuli-fused ended"),
        Err(error) => warn!(pid = child.id(), %error, "lazuli-fused cannot be waited for"),
    });
}

fn last_line(log: &Path) -> io::Result<String> {
    const TAIL_LEN: u64 = 4096;
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_LEN)))?;
    let mut tail = Vec::new();
    file.take(TAIL_LEN).read_to_end(&mut tail)?;
    let tail = String::from_utf8_lossy(&tail);
    Ok(tail.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use format_spec::Digest;

    /// Any program that says something about the flags it does not know, and ends.
    const NOT_A_DAEMON: &str = "/bin/ls";

    fn client(root: &Path, program: &str) -> Fused {
        Fused::new(root, FusedProgram { path: program.into(), arguments: Vec::new(), is_service: false })
    }

    #[tokio::test]
    async fn a_daemon_that_cannot_start_is_reported_with_its_last_words() {
        let root = tempfile::tempdir().unwrap();
        let fused = client(root.path(), NOT_A_DAEMON);
        let error = fused.release_tree(Digest::of(b"")).await.unwrap_err().to_string();
        assert_eq!(error, "/bin/ls ended at start, exit status: 2: Try '/bin/ls --help' for more information.");
    }

    #[tokio::test]
    async fn a_failed_start_is_not_repeated_at_once() {
        let root = tempfile::tempdir().unwrap();
        let fused = client(root.path(), NOT_A_DAEMON);
        let first = fused.release_tree(Digest::of(b"")).await.unwrap_err().to_string();
        match fused.release_tree(Digest::of(b"")).await {
            Err(FusedError::StartedInVain(message)) => assert_eq!(message, first),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let root = tempfile::tempdir().unwrap();
        let fused = client(root.path(), "/nonexistent/lazuli-fused");
        assert!(matches!(fused.status().await, Err(FusedError::Start(..))));
    }
}
