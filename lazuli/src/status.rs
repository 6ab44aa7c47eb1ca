//! What a node's `lazuli-fused` holds, image by image.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use control::{
    LayerStatus, ModeStatus, NotLazy, Reading, Request, Response, TreeMode, TreeStatus, Verdict,
    chains::ChainStatus,
    exchange, request_line,
    root::{CHAINS, LAYER_CACHES, NOT_LAZY, SNAPSHOTS, SOCKET},
};
use format_spec::{Digest, LayerId};
use serde::Serialize;
use tokio::net::UnixStream;

/// How long an answer may take: a daemon that works answers at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct NodeStatus {
    /// How new trees are mounted, and why; `None` on a node without lazy images, on which `lazuli-fused` need not run.
    pub(crate) mode: Option<ModeStatus>,
    /// Every image that has layers here, sorted by name.
    pub(crate) images: Vec<ImageStatus>,
    /// The layers under the chain IDs by which containerd knows them, with what is known of each, sorted by chain ID.
    pub(crate) chains: Vec<ChainStatus>,
    /// Converted images that were pulled completely all the same, and why, oldest first.
    pub(crate) not_lazy: Vec<NotLazy>,
}

/// One image on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ImageStatus {
    /// The reference it was pulled by.
    pub(crate) image: String,
    /// How the kernel reads it; none before the first container.
    pub(crate) mode: Option<TreeMode>,
    /// Its layers: lowest first when it is mounted, else sorted.
    pub(crate) layers: Vec<ImageLayer>,
    /// Frames of its layers that are in the cache.
    pub(crate) frames_present: u64,
    /// Frames of its layers.
    pub(crate) frames_total: u64,
    /// Compressed bytes of its layers in the registry.
    pub(crate) compressed_bytes: u64,
    /// Bytes that its layers take on disk.
    pub(crate) disk_bytes: u64,
    /// Whether everything has arrived.
    pub(crate) is_complete: bool,
    /// Reads that wait, and fetching ahead: all layers together.
    pub(crate) reading: Reading,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ImageLayer {
    /// Its digest in the registry.
    pub(crate) blob: Digest,
    /// Its length in the registry, in bytes.
    pub(crate) compressed_bytes: u64,
    /// Frames that are in the cache.
    pub(crate) frames_present: u64,
    /// Frames of the layer.
    pub(crate) frames_total: u64,
    /// Compressed bytes that `lazuli-fused` fetched since it started.
    pub(crate) fetched_bytes: u64,
    /// Bytes that it takes on disk.
    pub(crate) disk_bytes: u64,
    /// Pages of 4 KiB that `lazuli-fused` found damaged on disk since it started, and fetches again.
    pub(crate) healed_pages: u64,
    /// Whether everything has arrived.
    pub(crate) is_complete: bool,
    /// Whether the kernel reads it from its cache file, without any daemon.
    pub(crate) is_direct: bool,
    /// Whether it is what its tar stream says, once that is known.
    pub(crate) verdict: Option<Verdict>,
    /// What is being fetched of it.
    pub(crate) reading: Reading,
}

/// The state of a node cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// Nobody listens.
    #[error(
        "no lazuli-fused listens on {}: it runs while there are lazily pulled images; --root names another directory",
        .0.display()
    )]
    NotRunning(PathBuf),
    /// No answer came in time.
    #[error("lazuli-fused does not answer on {} within {within:?}: it hangs or is very busy", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        within: Duration,
    },
    /// The connection failed.
    #[error("{}: {error}", path.display())]
    Connection {
        /// The socket.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// The answer is none.
    #[error("{}: {problem}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What came instead.
        problem: String,
    },
}

/// Asks the `lazuli-fused` of `root`, the directory that `lazuli-snapshotter` was given.
///
/// # Errors
///
/// When it does not run or does not answer.
pub(crate) async fn node_status(root: &Path) -> Result<NodeStatus, StatusError> {
    let path = root.join(SOCKET);
    let timeout = |_| StatusError::Timeout { path: path.clone(), within: ANSWER_WITHIN };
    let answer = tokio::time::timeout(ANSWER_WITHIN, ask(&path)).await.map_err(timeout)?;
    let refuse = |problem| StatusError::Answer { path: path.clone(), problem };
    // Both are for people: one that cannot be read says nothing.
    let chains = ChainStatus::read(&root.join(CHAINS)).unwrap_or_default();
    let not_lazy = NotLazy::read(&root.join(NOT_LAZY)).unwrap_or_default();
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            let is_healthy = is_without_layers(root);
            let status = NodeStatus { mode: None, images: Vec::new(), chains, not_lazy };
            return if is_healthy { Ok(status) } else { Err(StatusError::NotRunning(path)) };
        }
        Err(error) => return Err(StatusError::Connection { path, error }),
    };
    match serde_json::from_slice(&answer) {
        Ok(Response::Status { mode, layers, trees }) => {
            Ok(NodeStatus { mode: Some(mode), images: images(layers, &trees), chains, not_lazy })
        }
        Ok(Response::Error { message, .. }) => Err(refuse(message)),
        Ok(_) => Err(refuse("the answer is none to the question".to_owned())),
        Err(error) => Err(refuse(format!("the answer is of another version of lazuli-fused: {error}"))),
    }
}

/// Whether this is the root directory of a node, and none of its layers wants `lazuli-fused` to run.
fn is_without_layers(root: &Path) -> bool {
    let layers = std::fs::read_dir(root.join(LAYER_CACHES)).map(|mut entries| entries.next().is_some());
    root.join(SNAPSHOTS).exists() && !layers.unwrap_or(false)
}

async fn ask(path: &Path) -> io::Result<Vec<u8>> {
    let mut connection = UnixStream::connect(path).await?;
    exchange(&mut connection, &request_line(&Request::Status)).await
}

/// Puts layers and trees together to images.
///
/// A layer knows the image that it was last pulled for, a tree only layers. So the image of a tree is that
/// of its topmost layer, and layers below that others share belong to it too.
fn images(layers: Vec<LayerStatus>, trees: &[TreeStatus]) -> Vec<ImageStatus> {
    let by_id: BTreeMap<LayerId, LayerStatus> =
        layers.into_iter().map(|layer| (layer.layer.layer.id(), layer)).collect();
    let direct: BTreeSet<LayerId> = trees.iter().flat_map(|tree| &tree.direct_layers).copied().collect();
    let mut of_image: BTreeMap<&str, (Option<TreeMode>, Vec<LayerId>)> = BTreeMap::new();
    // The tallest tree of an image last: it says the order.
    let mut trees: Vec<&TreeStatus> = trees.iter().collect();
    trees.sort_by_key(|tree| tree.layers.len());
    for tree in trees {
        let Some(top) = tree.layers.last().and_then(|top| by_id.get(top)) else { continue };
        let (mode, ids) = of_image.entry(&top.layer.image).or_default();
        *mode = Some(tree.mode);
        let others: Vec<LayerId> = ids.iter().filter(|id| !tree.layers.contains(id)).copied().collect();
        *ids = tree.layers.iter().copied().chain(others).collect();
    }
    for (id, layer) in &by_id {
        let (_, ids) = of_image.entry(&layer.layer.image).or_default();
        if !ids.contains(id) {
            ids.push(*id);
        }
    }
    let layer = |id: &LayerId| by_id.get(id).map(|layer| image_layer(layer, direct.contains(id)));
    of_image
        .into_iter()
        .map(|(image, (mode, ids))| summarize(image, mode, ids.iter().filter_map(layer).collect()))
        .collect()
}

fn image_layer(layer: &LayerStatus, is_direct: bool) -> ImageLayer {
    ImageLayer {
        blob: layer.layer.layer.blob,
        compressed_bytes: layer.layer.layer.blob_len,
        frames_present: layer.frames_present,
        frames_total: layer.frames_total,
        fetched_bytes: layer.fetched_bytes,
        disk_bytes: layer.disk_bytes,
        healed_pages: layer.healed_pages,
        is_complete: layer.is_complete,
        is_direct,
        verdict: layer.verdict.clone(),
        reading: layer.reading.clone(),
    }
}

fn summarize(image: &str, mode: Option<TreeMode>, layers: Vec<ImageLayer>) -> ImageStatus {
    let sum = |of: fn(&ImageLayer) -> u64| layers.iter().map(of).sum();
    ImageStatus {
        image: image.to_owned(),
        mode,
        frames_present: sum(|layer| layer.frames_present),
        frames_total: sum(|layer| layer.frames_total),
        compressed_bytes: sum(|layer| layer.compressed_bytes),
        disk_bytes: sum(|layer| layer.disk_bytes),
        is_complete: layers.iter().all(|layer| layer.is_complete),
        reading: Reading {
            frames_wanted: sum(|layer| layer.reading.frames_wanted),
            frames_under_way: sum(|layer| layer.reading.frames_under_way),
            frames_awaited: sum(|layer| layer.reading.frames_awaited),
            files: layers.iter().flat_map(|layer| layer.reading.files.clone()).collect(),
        },
        layers,
    }
}

#[cfg(test)]
mod tests {
    use control::{RemoteLayer, tree_id};
    use format_spec::{IndexLocation, LazyLayer};

    use super::*;

    fn layer(name: &str, image: &str) -> LayerStatus {
        let digest = Digest::of(name.as_bytes());
        let index = IndexLocation { offset: 0, compressed_len: 1, plain_len: 1, digest };
        let layer = LazyLayer { blob: digest, blob_len: 100, index, hot_len: 0 };
        LayerStatus {
            layer: RemoteLayer { layer, image: image.to_owned() },
            frames_present: 1,
            frames_total: 2,
            fetched_bytes: 50,
            is_complete: name == "complete",
            verdict: None,
            disk_bytes: 4096,
            healed_pages: 0,
            reading: Reading { frames_awaited: 1, files: vec![format!("/{name}")], ..Reading::default() },
        }
    }

    fn tree(layers: &[&LayerStatus], direct_layers: Vec<LayerId>) -> TreeStatus {
        let layers: Vec<_> = layers.iter().map(|layer| layer.layer.layer.id()).collect();
        let tree = tree_id(layers.iter().copied()).unwrap();
        TreeStatus { tree, layers, mode: TreeMode::Erofs, direct_layers }
    }

    #[test]
    fn a_layer_that_two_images_share_belongs_to_both() {
        let (base, one, two) = (layer("complete", "two:t"), layer("one", "one:t"), layer("two", "two:t"));
        let trees =
            [tree(&[&base, &one], vec![base.layer.layer.id()]), tree(&[&base, &two], vec![base.layer.layer.id()])];
        let images = images(vec![base, one, two], &trees);
        let names: Vec<_> = images.iter().map(|image| (image.image.as_str(), image.layers.len())).collect();
        assert_eq!(names, [("one:t", 2), ("two:t", 2)]);
        let first = &images[0];
        assert_eq!(first.layers.iter().map(|layer| layer.is_direct).collect::<Vec<_>>(), [true, false]);
        assert_eq!((first.frames_present, first.frames_total, first.compressed_bytes), (2, 4, 200));
        assert_eq!((first.mode, first.is_complete, first.disk_bytes), (Some(TreeMode::Erofs), false, 8192));
        assert_eq!((first.reading.frames_awaited, first.reading.files.len()), (2, 2));
    }

    #[test]
    fn an_image_without_a_container_has_layers_and_no_mode() {
        let images = images(vec![layer("complete", "one:t")], &[]);
        let [image] = images.as_slice() else { panic!("{images:?}") };
        assert_eq!((image.image.as_str(), image.mode, image.is_complete), ("one:t", None, true));
    }
}
