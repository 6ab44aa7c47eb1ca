//! The socket to serve on: a stale one is replaced, a live one is not.

use std::{
    fs, io,
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
};

use rustix::fs::Mode;
use tokio::net::UnixListener;

/// The socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody serves on it.
    #[error("another process listens on {0}")]
    InUse(PathBuf),
    /// Something else lies there.
    #[error("{0} exists and is no socket")]
    NotASocket(PathBuf),
    /// It cannot be made.
    #[error("socket {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
}

/// Opens a socket that only the owner can use, making its directory if need be.
///
/// Must be called within a tokio runtime.
///
/// # Errors
///
/// As [`SocketError`] says; what lies at `path` is then unchanged.
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |error: io::Error| SocketError::Io(path.to_owned(), error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(SocketError::InUse(path.to_owned())),
        Ok(_) => fs::remove_file(path).map_err(failed)?,
    }
    // The mode must be right before the socket can be found.
    let mask = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    listener.map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn replaces_a_stale_socket_and_refuses_a_live_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/s.sock");
        let first = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(listen(&path), Err(SocketError::InUse(_))));
        drop(first);
        listen(&path).unwrap();
    }

    #[tokio::test]
    async fn leaves_a_file_in_the_way_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "kept").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }
}
