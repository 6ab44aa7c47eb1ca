//! Readers and other commands that may hang: processes of their own, which are waited for with a limit.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant, SystemTime},
};

use lazuli_tests::{Finished, Result, Scratch, error::Context as _, process::command};
use rustix::{
    fs::{Advice, fadvise},
    process::Signal,
};

use crate::bench::send;

/// How long the end of a process that was killed is waited for.
const KILLED_WITHIN: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);
/// The same as long as it has just started: what takes milliseconds is told from what takes twice as many.
const POLL_SOON: Duration = Duration::from_micros(500);
/// How long it has.
const SOON: Duration = Duration::from_millis(200);

/// The result of a reader.
#[derive(Debug)]
pub(crate) enum Seen {
    /// Everything it asked for.
    Bytes(Vec<u8>, Duration),
    /// An error, in the words of the system.
    Failed(String, Duration),
    /// Nothing until its limit: it was ended then.
    Waiting(Duration),
}

impl Seen {
    /// Whether these bytes came.
    pub(crate) fn is(&self, expected: &[u8]) -> bool {
        matches!(self, Self::Bytes(bytes, _) if bytes == expected)
    }

    /// Whether bytes came that are others.
    pub(crate) fn is_wrong(&self, expected: &[u8]) -> bool {
        matches!(self, Self::Bytes(bytes, _) if bytes != expected)
    }

    /// How long it took, or was waited for.
    pub(crate) fn time(&self) -> Duration {
        match self {
            Self::Bytes(_, time) | Self::Failed(_, time) | Self::Waiting(time) => *time,
        }
    }

    /// In the words of the table.
    pub(crate) fn words(&self, expected: &[u8]) -> String {
        match self {
            Self::Bytes(bytes, time) if bytes == expected => format!("right bytes after {:.1} s", time.as_secs_f64()),
            Self::Bytes(bytes, _) if bytes.iter().all(|byte| *byte == 0) => "ZEROS".to_owned(),
            Self::Bytes(..) => "OTHER BYTES".to_owned(),
            Self::Failed(error, time) => format!("{error} after {:.1} s", time.as_secs_f64()),
            Self::Waiting(time) => format!("nothing in {:.0} s", time.as_secs_f64()),
        }
    }
}

/// A process under way, its output in files.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    output: PathBuf,
    errors: PathBuf,
    started: Instant,
    /// The same, for times of files.
    started_at: SystemTime,
}

impl Running {
    /// Starts `command`.
    pub(crate) fn start(scratch: &Scratch, command: &mut Command) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (output, errors) = (scratch.join(format!("out-{number}")), scratch.join(format!("err-{number}")));
        command.stdin(Stdio::null());
        command.stdout(File::create(&output).at("creating", &output)?);
        command.stderr(File::create(&errors).at("creating", &errors)?);
        let child = command.spawn().context("starting a command")?;
        Ok(Self { child, output, errors, started: Instant::now(), started_at: SystemTime::now() })
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        send(self.child.id(), signal)
    }

    /// Ends it by SIGKILL.
    pub(crate) fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        // A process whose request a dead daemon has taken along cannot end before another answers it.
        let deadline = Instant::now() + KILLED_WITHIN;
        while !self.has_ended() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }

    /// Waits for its end, at most until `limit` has passed since its start; `None` when it had to be ended.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<Option<(Finished, Duration)>> {
        let ended_before = self.has_ended();
        while !self.has_ended() {
            if self.started.elapsed() > limit {
                self.kill();
                return Ok(None);
            }
            std::thread::sleep(if self.started.elapsed() < SOON { POLL_SOON } else { POLL });
        }
        let time = if ended_before { self.last_words() } else { self.started.elapsed() };
        let code = self.child.wait().context("waiting for a command")?.code();
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let finished = Finished {
            code,
            stdout: text(&self.output).at("reading", &self.output)?,
            stderr: text(&self.errors).at("reading", &self.errors)?,
        };
        Ok(Some((finished, time)))
    }
}

impl Running {
    /// How long after its start it wrote something for the last time: about when it ended, if nobody looked then.
    fn last_words(&self) -> Duration {
        let written = [&self.output, &self.errors].into_iter().filter_map(|path| fs::metadata(path).ok());
        let last = written.filter(|file| file.len() > 0).filter_map(|file| file.modified().ok()).max();
        last.and_then(|last| last.duration_since(self.started_at).ok()).unwrap_or(self.started.elapsed())
    }
}

/// A process that reads a file from its beginning.
#[derive(Debug)]
pub(crate) struct Reader {
    running: Running,
}

impl Reader {
    /// Starts to read at most `len` bytes.
    pub(crate) fn start(scratch: &Scratch, path: &Path, len: usize) -> Result<Self> {
        let mut read = command("head", ["-c", &len.to_string()]);
        Ok(Self { running: Running::start(scratch, read.arg(path))? })
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Waits for its end, at most until `limit` has passed since its start.
    pub(crate) fn finish(self, limit: Duration) -> Result<Seen> {
        let output = self.running.output.clone();
        let seen = match self.running.finish(limit)? {
            None => Seen::Waiting(limit),
            Some((Finished { code: Some(0), .. }, time)) => {
                Seen::Bytes(fs::read(&output).at("reading", &output)?, time)
            }
            Some((finished, time)) => {
                let error = finished.stderr.trim().rsplit(": ").next().unwrap_or_default().to_owned();
                Seen::Failed(error, time)
            }
        };
        // Many readers of large files fill the disk otherwise.
        fs::remove_file(&output).at("removing", &output)?;
        Ok(seen)
    }
}

/// Takes a file out of the page cache, as far as it is there; what is mounted below it keeps its own.
pub(crate) fn forget_pages(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // Nothing is written through a mount of an image, so all of its pages are clean.
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// Changes one bit of a file, in its middle, where there is content.
pub(crate) fn flip_bit(path: &Path, offset: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset)?;
    file.sync_all()
}
