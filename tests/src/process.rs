//! Processes: commands that are waited for, and services that end with their guard.

use std::{
    ffi::OsStr,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Context as _, HarnessError, Result};

/// How long anything may take that usually takes a second: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process may take to end after SIGTERM before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The longest part of a command's standard error that an error message repeats, in characters.
const STDERR_MAX: usize = 2000;

/// A process that runs in the background until it is stopped or dropped.
#[derive(Debug)]
pub struct Service {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Service {
    /// Starts `command` with both outputs appended to `log`, and waits until `is_ready`.
    ///
    /// # Errors
    ///
    /// When it cannot be started, ends early, or is not ready after [`PATIENCE`]; the message then has
    /// the last line of the log.
    pub fn start(name: &str, command: &mut Command, log: &Path, mut is_ready: impl FnMut() -> bool) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log).at("opening", log)?;
        let errors = output.try_clone().at("opening", log)?;
        let program = Path::new(command.get_program()).display().to_string();
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .context(format_args!("starting {program}"))?;
        let mut service = Self { name: name.to_owned(), child, log: log.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while !is_ready() {
            if let Some(status) = service.exit_status()? {
                let last_line = service.last_log_line();
                return Err(HarnessError::Unexpected(format!("{name} ended early with {status}: {last_line}")));
            }
            if Instant::now() > deadline {
                let what = format!("{name} did not start ({})", service.last_log_line());
                return Err(HarnessError::Timeout { what, seconds: PATIENCE.as_secs() });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(service)
    }

    /// The process ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file that its outputs go to.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, or `None` while it runs.
    ///
    /// # Errors
    ///
    /// When the system cannot tell.
    pub fn exit_status(&mut self) -> Result<Option<std::process::ExitStatus>> {
        self.child.try_wait().context(format_args!("waiting for {}", self.name))
    }

    /// Sends `signal`; nothing happens when it has ended already.
    pub fn signal(&mut self, signal: Signal) {
        // The child has not been waited for if this says None, so the ID cannot be another process's.
        if let Ok(None) = self.child.try_wait() {
            let id = Pid::from_child(&self.child);
            // It may end in this very moment, which is as good.
            let _ = kill_process(id, signal);
        }
    }

    /// Ends it with SIGTERM, or with SIGKILL when it does not end in time; waits for the end.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.kill();
    }

    /// Ends it with SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        // An error means that it has been waited for already.
        let _ = self.child.wait();
    }

    fn last_log_line(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("its log is empty").to_owned()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Its standard output; `what` says what it did, for the error.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Unexpected`] when it ended with another exit code than 0.
    pub fn stdout_of(self, what: &str) -> Result<String> {
        match self.code {
            Some(0) => Ok(self.stdout),
            _ => Err(HarnessError::Unexpected(format!("{what}: {self:?}"))),
        }
    }
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `command` to its end, whatever its exit code.
///
/// # Errors
///
/// When it cannot be started: usually because the program is not installed.
pub fn finish(command: &mut Command) -> Result<Finished> {
    let output = command.stdin(Stdio::null()).output().context(format_args!("running {}", describe(command)))?;
    Ok(output.into())
}

/// Runs `command` and returns its standard output.
///
/// # Errors
///
/// When it cannot be started, or ends with another exit code than 0.
pub fn run(command: &mut Command) -> Result<String> {
    let finished = finish(command)?;
    if finished.code == Some(0) {
        return Ok(finished.stdout);
    }
    let stderr = finished.stderr.trim();
    let start = stderr.char_indices().rev().nth(STDERR_MAX).map_or(0, |(index, _)| index);
    Err(HarnessError::Command {
        command: describe(command),
        code: finished.code.map_or("a signal".to_owned(), |code| format!("exit code {code}")),
        stderr: stderr[start..].to_owned(),
    })
}

/// A command with its arguments, for [`run`] and [`finish`].
pub fn command<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Waits until `attempt` returns a value; `what` says in the past what else did not happen.
///
/// # Errors
///
/// [`HarnessError::Timeout`] after [`PATIENCE`], or the first error of `attempt`.
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            return Err(HarnessError::Timeout { what: what.to_owned(), seconds: PATIENCE.as_secs() });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Fails with a sentence that says which package brings `program`, when it is not in the path.
///
/// # Errors
///
/// [`HarnessError::Missing`].
pub fn require_program(program: &str) -> Result<()> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&paths).any(|directory| directory.join(program).is_file()) {
        true => Ok(()),
        false => Err(HarnessError::Missing(format!("{program} is not installed: run `make deps`"))),
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
