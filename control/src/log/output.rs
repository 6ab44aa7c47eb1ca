//! Where lines go: standard error, or a file that is cut.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::PathBuf,
    thread,
    time::Duration,
};

use tracing::debug;

use super::LogTarget;

/// Longest file. With the one before it, twice as much of the disk that the cache lies on.
pub(super) const FILE_LEN_MAX: u64 = 8 << 20;
/// The suffix of the file before.
const OLD_SUFFIX: &str = ".1";
/// How often somebody's non-blocking pipe is tried while it is full.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// An open log.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    /// `None` for standard error.
    path: Option<PathBuf>,
    /// The last line that was written is not whole.
    is_line_open: bool,
}

impl Output {
    /// Opens the log; a file becomes standard error.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub(super) fn open(target: LogTarget) -> io::Result<Self> {
        let LogTarget::File(path) = target else {
            // Past the lock of the standard library's: whoever waits for it would wait for the reader.
            let file = io::stderr().as_fd().try_clone_to_owned()?.into();
            return Ok(Self { file, path: None, is_line_open: false });
        };
        let file = append_to(&path)?;
        rustix::stdio::dup2_stderr(&file)?;
        Ok(Self { file, path: Some(path), is_line_open: false })
    }

    #[cfg(test)]
    pub(super) fn of_file(file: File, path: Option<PathBuf>) -> Self {
        Self { file, path, is_line_open: false }
    }

    /// Writes whole lines; blocks as long as the reader or the disk does.
    ///
    /// # Errors
    ///
    /// When they cannot be written, or not all of them.
    pub(super) fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if let Some(path) = self.path.clone() {
            self.cut(path, lines.len() as u64);
        }
        if self.is_line_open {
            self.write_all(b"\n")?;
        }
        self.write_all(lines)
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(last) = bytes.last() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    self.is_line_open = if len == bytes.len() { *last != b'\n' } else { bytes[len - 1] != b'\n' };
                    bytes = &bytes[len..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(FULL_PAUSE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Begins a new file when this one has no room for `len` bytes.
    fn cut(&mut self, path: PathBuf, len: u64) {
        // Asked each time: the process before this one may be writing its last lines.
        let is_full = self.file.metadata().is_ok_and(|metadata| metadata.len() + len > FILE_LEN_MAX);
        if !is_full {
            return;
        }
        let mut old = path.clone().into_os_string();
        old.push(OLD_SUFFIX);
        match fs::rename(&path, old).and_then(|()| append_to(&path)) {
            Ok(file) => {
                if let Err(error) = rustix::stdio::dup2_stderr(&file) {
                    debug!(%error, "standard error stays the file before");
                }
                (self.file, self.is_line_open) = (file, false);
            }
            // Bounded all the same: a directory that takes no new name is no reason to fill the disk.
            Err(error) => {
                debug!(path = %path.display(), %error, "log is emptied, as it cannot be moved");
                if self.file.set_len(0).is_ok() {
                    self.is_line_open = false;
                }
            }
        }
    }
}

fn append_to(path: &PathBuf) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}
