//! A container that runs until it is ready, with runc and nothing else: no daemon, no image store.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

/// Pauses between two looks at a port.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest line that is looked at, in bytes.
const LINE_LEN_MAX: usize = 64 << 10;
/// Lines that are told in an error: the last ones.
const LINES_TOLD: usize = 5;
/// How long runc may take to end what it started.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// When a container is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ready {
    /// A line of its output has this text in it.
    Line(String),
    /// Somebody listens on this port of the host's loopback interface.
    Port(u16),
    /// It ends, or has run for so long.
    End(Duration),
}

/// Why nothing can be recorded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// runc is not there.
    #[error("runc cannot be started: {0}; install it")]
    Runc(#[source] std::io::Error),
    /// The directory of the bundle.
    #[error("{0}: {1}")]
    Bundle(PathBuf, #[source] std::io::Error),
    /// It ended too early.
    #[error("the container ended ({0}) before it was ready; its last lines: {1}")]
    Ended(ExitStatus, String),
    /// It never got ready.
    #[error("the container was not ready after {} s; its last lines: {last_lines}", within.as_secs())]
    Late {
        /// So long was waited.
        within: Duration,
        /// Its output.
        last_lines: String,
    },
}

/// A container that runs. Call [`Self::end`].
#[derive(Debug)]
pub(crate) struct Container {
    child: Child,
    state: PathBuf,
    id: String,
    lines: mpsc::Receiver<String>,
    last_lines: Vec<String>,
}

impl Container {
    /// Starts a container as `config` says; `directory`, which must be empty, gets its bundle and runc's state.
    ///
    /// # Errors
    ///
    /// When runc is not there. Its words about the container show in [`Self::wait`].
    pub(crate) fn start(directory: &Path, config: &Value) -> Result<Self, ContainerError> {
        let failed = |error| ContainerError::Bundle(directory.to_owned(), error);
        let (bundle, state) = (directory.join("bundle"), directory.join("runc"));
        fs::create_dir(&bundle).map_err(failed)?;
        fs::write(bundle.join("config.json"), config.to_string()).map_err(failed)?;
        let id = format!("lazuli-profile-{}", std::process::id());
        let mut command = Command::new("runc");
        command.arg("--root").arg(&state).arg("run").arg("--bundle").arg(&bundle).arg(&id);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(ContainerError::Runc)?;
        let (sender, lines) = mpsc::channel(64);
        if let Some(output) = child.stdout.take() {
            tokio::spawn(forward(output, sender.clone()));
        }
        if let Some(errors) = child.stderr.take() {
            tokio::spawn(forward(errors, sender));
        }
        Ok(Self { child, state, id, lines, last_lines: Vec::new() })
    }

    /// Waits until it is ready, `within` this time; each line of its output goes to `tell`.
    ///
    /// # Errors
    ///
    /// When it ends before, or takes longer.
    pub(crate) async fn wait(
        &mut self,
        ready: &Ready,
        within: Duration,
        mut tell: impl FnMut(&str),
    ) -> Result<(), ContainerError> {
        let deadline = Instant::now() + if let Ready::End(after) = ready { *after } else { within };
        loop {
            tokio::select! {
                Some(line) = self.lines.recv() => {
                    tell(&line);
                    let is_it = is_ready_line(ready, &line);
                    self.last_lines.push(line);
                    self.last_lines.drain(..self.last_lines.len().saturating_sub(LINES_TOLD));
                    if is_it {
                        return Ok(());
                    }
                }
                ended = self.child.wait() => {
                    let status = ended.map_err(ContainerError::Runc)?;
                    while let Ok(Some(line)) = timeout(LOOK_INTERVAL, self.lines.recv()).await {
                        tell(&line);
                        if is_ready_line(ready, &line) {
                            return Ok(());
                        }
                        self.last_lines.push(line);
                    }
                    return match ready {
                        Ready::End(_) if status.success() => Ok(()),
                        _ => Err(ContainerError::Ended(status, self.told())),
                    };
                }
                () = answers(ready) => return Ok(()),
                () = tokio::time::sleep_until(deadline) => {
                    let is_enough = matches!(ready, Ready::End(_));
                    return if is_enough { Ok(()) } else { Err(ContainerError::Late { within, last_lines: self.told() }) };
                }
            }
        }
    }

    fn told(&self) -> String {
        if self.last_lines.is_empty() { "none".to_owned() } else { self.last_lines.join(" | ") }
    }

    /// Kills what still runs of it, and removes what runc keeps.
    pub(crate) async fn end(mut self) {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.state).args(["delete", "--force", &self.id]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = timeout(END_PATIENCE, command.status()).await;
        tracing::debug!(?ended, "container removed");
        _ = timeout(END_PATIENCE, self.child.wait()).await;
    }
}

/// Whether a line says that the container is ready; what runc says of its own failure is none of the container's.
fn is_ready_line(ready: &Ready, line: &str) -> bool {
    matches!(ready, Ready::Line(text) if line.contains(text)) && !line.contains("runc run failed: ")
}

/// Sends a stream line by line.
async fn forward(stream: impl AsyncRead + Unpin, lines: mpsc::Sender<String>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        match stream.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(bytes) => {
                let end = bytes.iter().position(|byte| *byte == b'\n');
                let len = end.map_or(bytes.len(), |end| end + 1);
                line.extend_from_slice(&bytes[..len]);
                stream.consume(len);
                if end.is_none() && line.len() < LINE_LEN_MAX {
                    continue;
                }
            }
        }
        if send(&lines, &mut line).await.is_err() {
            return;
        }
    }
    if !line.is_empty() {
        _ = send(&lines, &mut line).await;
    }
}

async fn send(lines: &mpsc::Sender<String>, line: &mut Vec<u8>) -> Result<(), mpsc::error::SendError<String>> {
    let text = String::from_utf8_lossy(line).trim_end().to_owned();
    line.clear();
    lines.send(text).await
}

/// Returns when the port of `ready` answers; never where it names none.
async fn answers(ready: &Ready) {
    let Ready::Port(port) = ready else { return std::future::pending().await };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
    while TcpStream::connect(address).await.is_err() {
        sleep(LOOK_INTERVAL).await;
    }
}
