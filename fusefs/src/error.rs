//! What can go wrong at the boundary of this crate.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use control::{ErrorKind, TreeId};
use format_spec::{Digest, FormatError, LayerId};
use storage::{CacheError, ReadError, SourceError, SourceErrorKind};
use tree::{erofs::WriteError, merge::MergeError};

use crate::erofs_mount::MountError;

/// A tree cannot be made, kept or mounted. One line each, for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount point cannot be used.
    #[error("mount point {}: {error}", path.display())]
    MountPoint {
        /// The directory.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// This machine or user cannot use FUSE.
    #[error("/dev/fuse: {0}: load the kernel module fuse, and run as root")]
    Device(io::Error),
    /// The kernel refused the mount.
    #[error("cannot mount on {}: {error}", path.display())]
    Mount {
        /// The directory.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
    /// The kernel refused to unmount.
    #[error("cannot unmount {}: {error}", path.display())]
    Unmount {
        /// The directory.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
    /// The session ended with an error.
    #[error("FUSE session on {} ended: {error}", path.display())]
    Session {
        /// The directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// A layer's cache or index cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// What arrived cannot be made durable.
    #[error(transparent)]
    Flush(#[from] ReadError),
    /// There is nowhere to fetch a layer from.
    #[error("layer {blob} of {image}: {error}")]
    Source {
        /// The layer.
        blob: Digest,
        /// The image reference given for it.
        image: String,
        /// What is wrong.
        error: SourceError,
    },
    /// Whether a layer can be read did not show in time.
    #[error("layer {blob} of {image}: nothing of it came within {within:?}")]
    Unread {
        /// The layer.
        blob: Digest,
        /// The image reference given for it.
        image: String,
        /// How long was waited.
        within: Duration,
    },
    /// A layer is not what its tar stream says.
    #[error("layer {blob} of {image} is refused: {reason}")]
    Untrue {
        /// The layer.
        blob: Digest,
        /// An image that has it.
        image: String,
        /// Where, and what differs.
        reason: String,
    },
    /// The layers do not make a tree.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// A tree is kept for other layers: its record is damaged.
    #[error("tree {0} is kept for other layers: remove its files below trees/")]
    OtherLayers(TreeId),
    /// A file of the root directory cannot be read or written.
    #[error("{}: {error}", path.display())]
    Disk {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// A file of the root directory is damaged.
    #[error("{}: {error}", path.display())]
    Tree {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The root directory belongs to another process.
    #[error("root {} is in use by another lazuli-fused", .0.display())]
    Locked(PathBuf),
    /// Somebody else answers on the control socket.
    #[error("control socket {} is in use by another process", .0.display())]
    SocketInUse(PathBuf),
    /// The control socket cannot be made.
    #[error("control socket {}: {error}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// Kernel mode was asked for and does not work here.
    #[error("--mode erofs: {0}")]
    KernelMode(MountError),
    /// A tree cannot be mounted in kernel mode.
    #[error("tree {0}: {1}")]
    KernelMount(TreeId, MountError),
    /// A tree cannot be an EROFS image.
    #[error("tree {0}: {1}")]
    Image(TreeId, WriteError),
    /// A layer is in use.
    #[error("layer {layer} is used by tree {tree}: release the tree first")]
    LayerInUse {
        /// The layer.
        layer: LayerId,
        /// A tree that needs it.
        tree: TreeId,
    },
    /// Too many wait for a tree already.
    #[error("tree {0}: {1} requests wait for it already: ask again")]
    Crowded(TreeId, usize),
    /// Too much is under way.
    #[error("too many requests are under way: ask again")]
    Busy,
    /// A tree was not made to the end, or was released before it was mounted.
    #[error("tree {0} was given up before it was there: ask again")]
    GivenUp(TreeId),
    /// An attempt failed that others waited for too.
    #[error("{0}")]
    Shared(Arc<Error>),
}

impl Error {
    /// What a client is told about whose fault it is.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Shared(error) => error.kind(),
            Self::Cache(CacheError::Index { error, .. }) | Self::Tree { error, .. } => match error {
                FormatError::Version { .. } | FormatError::Features { .. } => ErrorKind::Newer,
                _ => ErrorKind::Damaged,
            },
            Self::OtherLayers(_) => ErrorKind::Damaged,
            Self::Source { error, .. } | Self::Cache(CacheError::Source { error, .. })
                if error.kind == SourceErrorKind::Refused =>
            {
                ErrorKind::Refused
            }
            Self::Untrue { .. } => ErrorKind::Untrue,
            Self::Merge(_) | Self::Image(..) | Self::LayerInUse { .. } => ErrorKind::Invalid,
            Self::Disk { error, .. } => kind_of_disk_error(error),
            Self::Cache(CacheError::Disk { error, .. }) | Self::Flush(ReadError::Disk { error, .. }) => {
                kind_of_disk_error(error)
            }
            _ => ErrorKind::Passing,
        }
    }

    /// For `map_err`: what happened to a file of the root directory.
    pub(crate) fn disk(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error| Self::Disk { path, error }
    }
}

fn kind_of_disk_error(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::DiskFull,
        _ => ErrorKind::Passing,
    }
}
