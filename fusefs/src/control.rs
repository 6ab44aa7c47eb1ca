//! The control socket of `lazuli-fused`: what a client may ask, and the answers.
//!
//! A connection carries requests one after the other: one JSON object a line, answered by one JSON
//! object a line. Requests on several connections run at the same time.

use std::path::PathBuf;

use format_spec::{Digest, LayerId, LazyLayer};
use serde::{Deserialize, Serialize};

/// A layer and the place to fetch it from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteLayer {
    /// The layer.
    pub layer: LazyLayer,
    /// Image reference `host/repository:tag` or `...@digest` whose repository holds the blob.
    pub image: String,
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
    /// What is mounted and how much has arrived; answered with [`Response::Status`].
    Status,
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
    /// The state of the daemon.
    Status {
        /// Every known layer, sorted by digest.
        layers: Vec<LayerStatus>,
        /// Every available tree, sorted.
        trees: Vec<TreeId>,
    },
    /// The request failed.
    Error {
        /// One line: what, where, what to do.
        message: String,
    },
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
}
