//! What can go wrong at the boundary of this crate.
//!
//! Errors are `Clone`: one failure answers everybody who waited for the same bytes.

use std::{io, path::PathBuf, sync::Arc};

use format_spec::{Digest, FormatError};

use crate::fetch::source::SourceError;

/// A cache or one of its layers cannot be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CacheError {
    /// The directory lies on overlayfs, which cannot hold sparse files that are changed in place.
    #[error("cache directory {} lies on overlayfs: choose one on a disk file system", .0.display())]
    OnOverlay(PathBuf),
    /// The disk refused.
    #[error("{}: {error}", path.display())]
    Disk {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        error: Arc<io::Error>,
    },
    /// The index could not be fetched; a later call may succeed.
    #[error("index of {blob}: {error}")]
    Source {
        /// The layer.
        blob: Digest,
        /// What the source said.
        error: SourceError,
    },
    /// The source delivers bytes that are not the index, or an index that breaks a rule.
    #[error("index of {blob}: {error}")]
    Index {
        /// The layer.
        blob: Digest,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The layer was removed while it was opened, or the runtime ended.
    #[error("layer {0} was not opened: it was removed, or the process is shutting down")]
    Stopped(Digest),
}

/// Bytes of a layer cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The source delivers other bytes than the index promises, also when asked again.
    #[error("frame {frame} of {blob} has digest {found}, expected {expected}")]
    Corrupt {
        /// The layer.
        blob: Digest,
        /// Number of the frame.
        frame: u32,
        /// Digest by the index.
        expected: Digest,
        /// Digest of what arrived.
        found: Digest,
    },
    /// The frame is what the index names, but does not decompress to what the index says.
    #[error("frame {frame} of {blob} does not decompress to {plain_len} bytes: {reason}")]
    Undecodable {
        /// The layer.
        blob: Digest,
        /// Number of the frame.
        frame: u32,
        /// Length by the index.
        plain_len: u32,
        /// What the decompressor said, or the length it found.
        reason: String,
    },
    /// The source gave up; a later call may succeed.
    #[error("layer {blob}: {error}")]
    Source {
        /// The layer.
        blob: Digest,
        /// What the source said.
        error: SourceError,
    },
    /// The cache file cannot be read.
    #[error("cache of {blob}: {error}")]
    Disk {
        /// The layer.
        blob: Digest,
        /// What the disk said.
        error: Arc<io::Error>,
    },
    /// The layer is not what its tar stream says: nothing of it is shown.
    #[error("layer {blob} is refused: {reason}")]
    Refused {
        /// The layer.
        blob: Digest,
        /// Where, and what differs.
        reason: String,
    },
    /// The layer was removed, or the process is shutting down.
    #[error("layer {0} is no longer fetched")]
    Stopped(Digest),
}
