//! The server side of the control socket.
//!
//! One task a connection; requests of one connection are answered in order, those of several at the same
//! time. The socket is for root only.

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

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tracing::{debug, warn};

use crate::{
    control::{ErrorKind, Request, Response},
    descriptor,
    error::Error,
    service::Service,
};

/// Longest request: the layers of a tree, [`format_spec::index::LAYER_COUNT_MAX`] of them with long image names.
const REQUEST_LEN_MAX: u64 = 4 << 20;
/// Connections served at a time; more of them wait. A snapshotter opens one for each call under way.
const CONNECTIONS_MAX: usize = 256;

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
    pub(crate) async fn serve(&self, service: &Service, device: &Arc<HeldDevice>) -> Result<(), Error> {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let permit = connections.clone().acquire_owned().await.expect("never closed");
            let (stream, _) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                // The peer gave up, or descriptors ran out for the moment.
                Err(error) if is_passing(&error) => {
                    warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(Error::Socket { path: self.path.clone(), error }),
            };
            let (service, device) = (service.clone(), device.clone());
            tokio::spawn(async move {
                if let Err(error) = serve_connection(stream, &service, &device).await {
                    debug!(%error, "control connection ended");
                }
                drop(permit);
            });
        }
    }
}

/// How long to wait before accepting again after a passing failure.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

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

async fn serve_connection(mut stream: UnixStream, service: &Service, device: &HeldDevice) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut holder = None;
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        (&mut reader).take(REQUEST_LEN_MAX).read_until(b'\n', &mut line).await?;
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
            Ok(request) => answer(request, service).await.unwrap_or_else(|error| {
                warn!(%error, "request failed");
                refuse(error.kind(), &error.to_string())
            }),
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
        writer.write_all(&answer[sent..]).await?;
        if !is_whole {
            return Ok(());
        }
    }
}

/// An error of one line, whatever is in it.
fn refuse(kind: ErrorKind, message: &str) -> Response {
    Response::Error { message: message.split('\n').map(str::trim).collect::<Vec<_>>().join(" "), kind }
}

async fn answer(request: Request, service: &Service) -> Result<Response, Error> {
    match request {
        Request::AnnounceLayer { layer } => service.announce(layer),
        Request::ProbeLayer { layer, within_ms } => {
            service.probe(layer, Duration::from_millis(within_ms)).await?;
        }
        Request::Ping => {}
        Request::MountTree { layers } => {
            return Ok(Response::Tree { path: service.mount_tree(&layers).await? });
        }
        Request::Verify { layers } => service.verify(layers),
        Request::Verdicts { layers } => return Ok(Response::Verdicts { verdicts: service.verdicts(&layers) }),
        Request::ReleaseTree { tree } => service.release_tree(tree).await?,
        Request::RemoveLayer { layer } => service.remove_layer(layer).await?,
        Request::HoldSession => return Ok(Response::Session),
        Request::LayerUsage { layer } => return Ok(Response::Usage { bytes: service.layer_usage(layer).await? }),
        Request::Status => {
            let (layers, trees) = (service.layers().await?, service.available_trees().await);
            return Ok(Response::Status { mode: service.mode(), layers, trees });
        }
    }
    Ok(Response::Done)
}
