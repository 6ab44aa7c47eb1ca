//! The server side of the control socket.
//!
//! One task a connection; requests of one connection are answered in order, those of several at the same
//! time. The socket is for root only.
//!
//! A client that leaves takes its request along, and every answer has a deadline. Requests that change something may
//! take all places but a few, which are for those that ask how things are: however many hang, `Status` and `Ping` are
//! answered.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use control::{ErrorKind, Request, Response, descriptor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{UnixListener, UnixStream, unix::ReadHalf},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{error::Error, mounts::Mounts};

/// Longest request: the layers of a tree, [`format_spec::limits::LAYER_COUNT_MAX`] of them with long image names.
const REQUEST_LEN_MAX: u64 = 4 << 20;
/// Connections at a time; more of them are closed at once. A snapshotter opens one for each call under way. Trees that
/// cannot be had take [`crate::trees::WAITING_MAX`] each, so that a dozen of them leave room for those that can.
const CONNECTIONS_MAX: usize = 2048;
/// Connections that requests for work leave to those that ask how things are.
const CONNECTIONS_FOR_LOOKS: usize = 64;
/// Answers to `Status` and `Waits` that are made at a time: each looks at every layer.
const LOOKS_MAX: usize = 4;
/// How long a tree may take: its indexes come from the registry, which retries and waits on its own. A little less than
/// a snapshotter waits, so that it hears why.
const TREE_WITHIN: Duration = Duration::from_secs(170);
/// How long everything else may take. Work that is begun is done, also when nobody waits for it any longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long a client may be silent that holds nothing.
const SILENT_WITHIN: Duration = Duration::from_secs(60);
/// How often is looked whether a client has gone that has said more than it was asked, or that it says no more.
const GONE_INTERVAL: Duration = Duration::from_secs(1);

/// The control socket, bound. Dropping it removes the socket.
#[derive(Debug)]
pub(crate) struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlServer {
    /// Binds the socket, replacing one on which nobody listens any longer.
    ///
    /// # Errors
    ///
    /// When somebody listens on it, something else is there, or the directory refuses.
    pub(crate) fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::Socket { path: path.to_owned(), error };
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        let server = Self { listener, path: path.to_owned() };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(server)
    }

    /// Answers requests until dropped; `device` is what its holders get.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub(crate) async fn serve(&self, mounts: &Mounts, device: &Arc<HeldDevice>) -> Result<(), Error> {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let lanes = Arc::new(Lanes::default());
        loop {
            let (stream, _) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                // The peer gave up, or descriptors ran out for the moment.
                Err(error) if is_passing(&error) => {
                    warn!(%error, "connection not accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(Error::Socket { path: self.path.clone(), error }),
            };
            let Ok(permit) = connections.clone().try_acquire_owned() else {
                warn!(connections = CONNECTIONS_MAX, "control connection refused: too many are open");
                continue;
            };
            let (mounts, device, lanes) = (mounts.clone(), device.clone(), lanes.clone());
            tokio::spawn(async move {
                if let Err(error) = serve_connection(stream, &mounts, &device, &lanes).await {
                    debug!(%error, "control connection ended");
                }
                drop(permit);
            });
        }
    }
}

/// Places for requests of two kinds.
#[derive(Debug)]
struct Lanes {
    work: Semaphore,
    looks: Semaphore,
}

impl Default for Lanes {
    fn default() -> Self {
        let work = Semaphore::new(CONNECTIONS_MAX - CONNECTIONS_FOR_LOOKS);
        Self { work, looks: Semaphore::new(LOOKS_MAX) }
    }
}

/// How long to wait before accepting again after a passing failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Drop for ControlServer {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::CONNABORTED, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    let failed = |error| Error::Socket { path: path.to_owned(), error };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(Error::SocketInUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
    }
}

/// The descriptor of the session, and how many others hold a duplicate of it.
#[derive(Debug)]
pub(crate) struct HeldDevice {
    device: OwnedFd,
    holder_count: AtomicUsize,
}

/// A holder, as long as it lives.
struct Holder<'a>(&'a HeldDevice);

impl HeldDevice {
    /// Held by nobody yet.
    pub(crate) fn new(device: OwnedFd) -> Self {
        Self { device, holder_count: AtomicUsize::new(0) }
    }

    /// For others.
    pub(crate) fn device(&self) -> &OwnedFd {
        &self.device
    }

    /// Whether the session outlives this process.
    pub(crate) fn is_held(&self) -> bool {
        self.holder_count.load(Ordering::SeqCst) > 0
    }

    /// Counts a holder that stays.
    pub(crate) fn add_holder(&self) {
        self.holder_count.fetch_add(1, Ordering::SeqCst);
    }

    fn hold(&self) -> Holder<'_> {
        self.add_holder();
        Holder(self)
    }
}

impl Drop for Holder<'_> {
    fn drop(&mut self) {
        self.0.holder_count.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve_connection(
    mut stream: UnixStream,
    mounts: &Mounts,
    device: &HeldDevice,
    lanes: &Lanes,
) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut holder = None;
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut reader).take(REQUEST_LEN_MAX);
        let read = limited.read_until(b'\n', &mut line);
        // A holder says nothing for as long as it lives.
        match holder {
            Some(_) => read.await?,
            None => timeout(SILENT_WITHIN, read).await??,
        };
        if line.is_empty() {
            return Ok(());
        }
        let is_whole = line.ends_with(b"\n");
        let request = serde_json::from_slice(&line);
        let holds_session = is_whole && matches!(request, Ok(Request::HoldSession));
        let response = match request {
            _ if !is_whole => {
                refuse(ErrorKind::Invalid, &format!("request does not end within {REQUEST_LEN_MAX} bytes"))
            }
            Ok(request) => tokio::select! {
                response = answer_in_time(request, mounts, lanes) => response,
                () = gone(&mut reader) => return Ok(()),
            },
            Err(error) => refuse(ErrorKind::Invalid, &format!("request is not understood: {error}")),
        };
        let mut answer = serde_json::to_vec(&response).expect("a response has text keys only");
        answer.push(b'\n');
        let mut sent = 0;
        if holds_session {
            holder.get_or_insert_with(|| device.hold());
            let socket: &UnixStream = writer.as_ref();
            sent = socket.async_io(Interest::WRITABLE, || descriptor::send(socket, &answer, device.device())).await?;
        }
        timeout(SILENT_WITHIN, writer.write_all(&answer[sent..])).await??;
        if !is_whole {
            return Ok(());
        }
    }
}

/// Returns when the client has gone. One that only says no more still hears the answer.
async fn gone(reader: &mut BufReader<ReadHalf<'_>>) {
    // Nothing comes from a client that waits; this returns when it has gone, or else was not needed.
    let _ = reader.fill_buf().await;
    while !has_hung_up(reader.get_ref().as_ref()) {
        sleep(GONE_INTERVAL).await;
    }
}

fn has_hung_up(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|_| polled[0].revents().contains(PollFlags::HUP))
}

/// An answer, whatever happens.
async fn answer_in_time(request: Request, mounts: &Mounts, lanes: &Lanes) -> Response {
    let within = if matches!(request, Request::MountTree { .. }) { TREE_WITHIN } else { ANSWER_WITHIN };
    let answered = timeout(within, async {
        let _place = match request {
            Request::HoldSession | Request::Ping | Request::Verdicts { .. } => None,
            Request::Status | Request::Waits { .. } => lanes.looks.acquire().await.ok(),
            _ => match lanes.work.try_acquire() {
                Ok(place) => Some(place),
                Err(_) => return Err(Error::Busy),
            },
        };
        answer(request, mounts).await
    });
    match answered.await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            warn!(%error, "request failed");
            refuse(error.kind(), &error.to_string())
        }
        Err(_) => refuse(ErrorKind::Passing, &format!("no answer within {within:?}: ask again")),
    }
}

/// An error of one line, whatever is in it.
fn refuse(kind: ErrorKind, message: &str) -> Response {
    Response::Error { message: message.split('\n').map(str::trim).collect::<Vec<_>>().join(" "), kind }
}

async fn answer(request: Request, mounts: &Mounts) -> Result<Response, Error> {
    let service = mounts.service();
    match request {
        Request::AnnounceLayer { layer } => service.announce(layer),
        Request::ProbeLayer { layer, within_ms } => {
            service.probe(layer, Duration::from_millis(within_ms)).await?;
        }
        Request::Ping => {}
        Request::MountTree { layers } => {
            return Ok(Response::Tree { path: mounts.mount_tree(&layers).await? });
        }
        Request::Verify { layers } => service.verify(layers),
        Request::Verdicts { layers } => return Ok(Response::Verdicts { verdicts: service.verdicts(&layers) }),
        Request::ReleaseTree { tree } => mounts.release_tree(tree).await?,
        Request::RemoveLayer { layer } => service.remove_layer(layer).await?,
        Request::HoldSession => return Ok(Response::Session),
        Request::LayerUsage { layer } => return Ok(Response::Usage { bytes: service.layer_usage(layer).await? }),
        Request::Status => {
            let (layers, trees) = (service.layers().await?, mounts.available_trees().await);
            return Ok(Response::Status { mode: mounts.mode(), layers, trees });
        }
        Request::Waits { layers } => return Ok(Response::Waits { layers: service.waits(layers).await }),
    }
    Ok(Response::Done)
}
