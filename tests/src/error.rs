//! What can go wrong in the harness itself.

use std::{fmt, io, path::Path};

/// Result of a harness function.
pub type Result<T, E = HarnessError> = std::result::Result<T, E>;

/// The harness could not do its part; the message says what, on one line.
#[derive(thiserror::Error)]
pub enum HarnessError {
    /// A file or a process could not be used.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A command ended with another exit code than 0.
    #[error("`{command}` ended with {code}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Exit code or signal, in words.
        code: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{what} within {seconds} s")]
    Timeout {
        /// What was awaited, as a sentence in the past: `containerd did not start`.
        what: String,
        /// How long it was awaited.
        seconds: u64,
    },
    /// The machine lacks something that the tests need.
    #[error("{0}")]
    Missing(String),
    /// An answer was not what it must be.
    #[error("{0}")]
    Unexpected(String),
    /// A call to a gRPC service failed.
    #[error("{call}: {status}")]
    Rpc {
        /// The call.
        call: &'static str,
        /// What the service answered.
        status: Box<tonic::Status>,
    },
}

/// The error as a test prints it: tests return it, and the test runner shows `Debug`.
impl fmt::Debug for HarnessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Says what was tried when an I/O operation fails.
pub trait Context<T> {
    /// Adds `what`, for example `creating /tmp/x`.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] with `what` where this was an error.
    fn context(self, what: impl fmt::Display) -> Result<T>;

    /// Adds `action` and the path it was about.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] where this was an error.
    fn at(self, action: &str, path: &Path) -> Result<T>
    where
        Self: Sized,
    {
        self.context(format_args!("{action} {}", path.display()))
    }
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| HarnessError::Io { what: what.to_string(), source: error.into() })
    }
}
