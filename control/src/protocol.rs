//! The control socket of `lazuli-fused`: what a client may ask, and the answers.
//!
//! A connection carries requests one after the other: one JSON object a line, answered by one JSON
//! object a line. Requests on several connections run at the same time.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use format_spec::{Digest, LayerId, LazyLayer};
use serde::{Deserialize, Serialize};

use crate::waits::LayerWaits;

/// Whether a layer is what its tar stream says, once `lazuli-fused` has found it out.
///
/// A type of its own beside that of `storage`: what is kept on disk may change, what clients of another version read
/// may not, and they need nothing else of that crate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Everything is what the tar stream says.
    Verified {
        /// Digest of the tar stream: the diff ID of every image that may show this layer.
        tar: Digest,
    },
    /// The layer contradicts itself: nothing of it is shown any longer.
    Refused {
        /// One line: where, and what differs.
        reason: String,
    },
}

impl Verdict {
    /// Why nothing is shown.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { reason } => Some(reason),
            Self::Verified { .. } => None,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Verified { tar } => write!(f, "verified as {tar}"),
            Self::Refused { reason } => write!(f, "refused: {reason}"),
        }
    }
}

/// A layer and the place to fetch it from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteLayer {
    /// The layer.
    pub layer: LazyLayer,
    /// Image reference `host/repository:tag` or `...@digest` whose repository holds the blob.
    pub image: String,
}

/// The repository of an image reference: `host/repository`, without tag and digest.
pub fn repository_of(image: &str) -> &str {
    let name = image.split('@').next().unwrap_or(image);
    match name.rsplit_once(':') {
        // A colon in front of the last slash is that of a port.
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

/// The registry host of an image reference, with its port.
pub fn host_of(image: &str) -> &str {
    let repository = repository_of(image);
    repository.split_once('/').map_or(repository, |(host, _)| host)
}

/// A merged tree: its layers' ids chained as OCI chains diff IDs.
///
/// Unlike the image's chain ID it covers what is shown: two images that claim the same diff IDs under
/// different indexes never share a tree.
pub type TreeId = Digest;

/// The [`TreeId`] of `layers`, lowest first; `None` without layers.
pub fn tree_id(layers: impl IntoIterator<Item = LayerId>) -> Option<TreeId> {
    layers.into_iter().reduce(|chain, layer| Digest::of(format!("{chain} {layer}").as_bytes()))
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Start to bring a layer's index; answered at once with [`Response::Done`]. Failures show at `MountTree`.
    AnnounceLayer {
        /// The layer.
        layer: RemoteLayer,
    },
    /// Find out whether a layer can be read with what the daemon has; answered with [`Response::Done`] when it has its
    /// index, or its registry gives something of it, and with [`Response::Error`] when not, or not within that time.
    ProbeLayer {
        /// The layer.
        layer: RemoteLayer,
        /// How long the answer may take, in milliseconds.
        within_ms: u64,
    },
    /// Make the merged tree of `layers` (lowest first) available; answered with [`Response::Tree`] when it can be
    /// used as an overlayfs lower directory. Idempotent.
    MountTree {
        /// The layers, lowest first.
        layers: Vec<RemoteLayer>,
    },
    /// Forget a tree that no mount uses any longer. Idempotent.
    ReleaseTree {
        /// The tree.
        tree: TreeId,
    },
    /// Delete the cache of a layer that no tree uses any longer. Idempotent.
    RemoveLayer {
        /// The layer.
        layer: LayerId,
    },
    /// Disk usage of one layer's cache; answered with [`Response::Usage`].
    LayerUsage {
        /// The layer.
        layer: LayerId,
    },
    /// Find out at full speed whether these layers are what their tar streams say; answered at once with
    /// [`Response::Done`]. `Verdicts` tells when it is known.
    Verify {
        /// The layers.
        layers: Vec<RemoteLayer>,
    },
    /// The verdicts on these layers, as far as they are known without waiting for anything; answered with
    /// [`Response::Verdicts`].
    Verdicts {
        /// The layers.
        layers: Vec<LayerId>,
    },
    /// Hold the session, so that it outlives the daemon; answered with [`Response::Session`]. The asker is taken for a
    /// holder until the connection ends.
    HoldSession,
    /// Show that the daemon is there; answered at once with [`Response::Done`].
    Ping,
    /// What is mounted and how much has arrived; answered with [`Response::Status`].
    Status,
    /// Waits of readers; answered with [`Response::Waits`], by a daemon that is older than this with
    /// [`Response::Error`].
    Waits {
        /// The layers that are asked about; all where it is left out.
        #[serde(default)]
        layers: Option<Vec<LayerId>>,
    },
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// It is done, or under way where the request says so.
    Done,
    /// The tree can be used.
    Tree {
        /// Directory that shows the merged tree.
        path: PathBuf,
    },
    /// Disk usage.
    Usage {
        /// Bytes really on disk, index and data.
        bytes: u64,
    },
    /// Verdicts in the order of the question; `None` where there is none yet.
    Verdicts {
        /// The verdicts.
        verdicts: Vec<Option<Verdict>>,
    },
    /// A duplicate of the session's `/dev/fuse` descriptor is attached to the first byte of this answer
    /// ([`crate::descriptor::receive`]). The next daemon gets it as standard input, with `--take-over`.
    Session,
    /// The state of the daemon.
    Status {
        /// How new trees are mounted, and why.
        mode: ModeStatus,
        /// Every known layer, sorted by digest.
        layers: Vec<LayerStatus>,
        /// Every available tree, sorted.
        trees: Vec<TreeStatus>,
    },
    /// Waits of readers.
    Waits {
        /// Those of the question that are open, sorted by digest.
        layers: Vec<LayerWaits>,
    },
    /// The request failed.
    Error {
        /// One line: what, where, what to do.
        message: String,
        /// Whose fault it is, and so whether asking again makes sense.
        #[serde(default)]
        kind: ErrorKind,
    },
}

/// Kinds of failures, as far as a client decides by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The registry or this machine: the same request may succeed later.
    #[default]
    Passing,
    /// What the registry has, or what lies on disk, is not what its digest or the format says.
    Damaged,
    /// The registry answers and says no: no permission, no such layer.
    Refused,
    /// A layer is not what its tar stream says: nothing of it is shown.
    Untrue,
    /// The layer was written by a newer version.
    Newer,
    /// The request makes no sense.
    Invalid,
    /// The disk is full.
    DiskFull,
}

/// A converted image that is pulled completely all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotLazy {
    /// The image reference.
    pub image: String,
    /// One line.
    pub reason: String,
    /// When that was seen last, in seconds since 1970.
    pub since: i64,
}

impl NotLazy {
    /// Reads the file at `path`; without one there are no such images.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or makes no sense.
    pub fn read(path: &Path) -> io::Result<Vec<Self>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// How the kernel reads a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TreeMode {
    /// Kernel mode: an EROFS mount, in which only content that is in no page cache is asked for.
    Erofs,
    /// Portable mode: a directory of the FUSE session.
    Fuse,
}

impl fmt::Display for TreeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        })
    }
}

/// The mode that a daemon chose at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeStatus {
    /// The mode.
    pub in_use: TreeMode,
    /// Why, in a few words: `--mode erofs`, `the kernel mounts EROFS over files`, or what keeps it from that.
    pub reason: String,
}

/// One tree in [`Response::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeStatus {
    /// The tree.
    pub tree: TreeId,
    /// Its layers, lowest first.
    pub layers: Vec<LayerId>,
    /// How the kernel reads it now; a mount that is older than the process keeps its mode.
    pub mode: TreeMode,
    /// Those of its layers that the kernel reads from their cache file, without this process; lowest first.
    pub direct_layers: Vec<LayerId>,
}

/// One layer in [`Response::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// The layer.
    pub layer: RemoteLayer,
    /// Frames that are in the cache.
    pub frames_present: u64,
    /// Frames of the layer.
    pub frames_total: u64,
    /// Compressed bytes that were fetched by this process.
    pub fetched_bytes: u64,
    /// Whether everything has arrived: nothing is fetched any longer, for a verdict neither.
    pub is_complete: bool,
    /// Whether it is what its tar stream says, once that is known.
    #[serde(default)]
    pub verdict: Option<Verdict>,
    /// Bytes that the cache takes on disk, index and data.
    pub disk_bytes: u64,
    /// Pages of 4 KiB that were found damaged on disk since the daemon started, and are fetched again.
    #[serde(default)]
    pub healed_pages: u64,
    /// What is being fetched now.
    pub reading: Reading,
}

/// What of a layer is being fetched at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reading {
    /// Frames that somebody wants: a reader, or fetching ahead.
    pub frames_wanted: u64,
    /// Those of them that a request is bringing.
    pub frames_under_way: u64,
    /// Those of them that a reader is blocked for.
    pub frames_awaited: u64,
    /// The files of `reads`: clients that are older than those read this.
    pub files: Vec<String>,
    /// Reads that wait, longest first, a few of them: one for each file.
    #[serde(default)]
    pub reads: Vec<WaitingRead>,
    /// The last failure to bring something of the layer, as long as nothing has come since: one line.
    #[serde(default)]
    pub failure: Option<String>,
    /// Whether nobody is asked at this moment: every place that has the layer has failed a moment ago.
    #[serde(default)]
    pub is_paused: bool,
}

/// A read that waits for content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRead {
    /// The file in its layer; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// Since when, in milliseconds before the answer.
    pub waiting_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_names_no_layers_asks_about_all() {
        let asked: Request = serde_json::from_str(r#"{"request": "waits"}"#).unwrap();
        assert_eq!(asked, Request::Waits { layers: None });
    }
}
