//! What a node's `lazuli-fused` holds, image by image.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    io,
    iter::Sum,
    path::{Path, PathBuf},
    time::Duration,
};

use control::{
    LayerStatus, ModeStatus, NotLazy, Reading, Request, Response, TreeMode, TreeStatus, Verdict, WaitingRead,
    chains::{ChainStatus, Truth},
    exchange, request_line,
    root::{CHAINS, LAYER_CACHES, NOT_LAZY, SNAPSHOTS, SOCKET},
};
use format_spec::{Digest, LayerId};
use serde::Serialize;
use tokio::net::UnixStream;

/// Nothing is known of the truth of it yet.
pub(crate) const BELIEVED: &str = "believed";
/// It is what its tar stream says.
pub(crate) const VERIFIED: &str = "verified";
/// It is something else.
pub(crate) const REFUSED: &str = "refused";

/// How long an answer may take: a daemon that works answers at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The lazy images of a node; `docs/JSON.md` explains the names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct NodeStatus {
    /// How new trees are mounted; `None` on a node without lazy images, on which `lazuli-fused` need not run.
    pub(crate) mode: Option<TreeMode>,
    /// Why so.
    pub(crate) mode_reason: Option<String>,
    /// Every image that has layers here, sorted by name.
    pub(crate) images: Vec<ImageStatus>,
    /// All layers of the node, each counted once however many images have it.
    pub(crate) total: Sums,
    /// The layers under the chain IDs by which containerd knows them, with what is known of each, sorted by chain ID.
    pub(crate) chains: Vec<Chain>,
    /// Converted images that were pulled completely all the same, and why, oldest first.
    pub(crate) not_lazy: Vec<NotLazy>,
}

/// One image on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ImageStatus {
    /// The reference it was pulled by.
    pub(crate) image: String,
    /// Whether containers read it lazily; not where it was pulled completely since.
    pub(crate) is_lazy: bool,
    /// Whether everything has arrived.
    pub(crate) is_complete: bool,
    /// Whether every layer is what its tar stream says.
    pub(crate) is_verified: bool,
    /// The reason that keeps it from being all of these; `None` when it is.
    pub(crate) reason: Option<String>,
    /// How the kernel reads it; none before the first container.
    pub(crate) mode: Option<TreeMode>,
    /// Its layers together; those that it shares with others are counted in each of them.
    #[serde(flatten)]
    pub(crate) sums: Sums,
    /// The fetching of all its layers.
    #[serde(flatten)]
    pub(crate) fetching: Fetching,
    /// Its layers: lowest first when it is mounted, else sorted.
    pub(crate) layers: Vec<ImageLayer>,
}

/// Sums over layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Sums {
    /// Number of layers.
    pub(crate) layer_count: u64,
    /// Frames that are in the cache.
    pub(crate) present_frame_count: u64,
    /// Frames that hold file content: others are never fetched to be read.
    pub(crate) needed_frame_count: u64,
    /// Length of the blobs in the registry, in bytes.
    pub(crate) compressed_len: u64,
    /// Compressed bytes that `lazuli-fused` fetched since it started.
    pub(crate) fetched_bytes: u64,
    /// Bytes on disk.
    pub(crate) disk_bytes: u64,
}

/// The fetching at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Fetching {
    /// Frames that somebody wants: a reader, or fetching ahead.
    pub(crate) wanted_frame_count: u64,
    /// Those of them that a request is bringing.
    pub(crate) coming_frame_count: u64,
    /// Those of them that a reader is blocked for.
    pub(crate) awaited_frame_count: u64,
    /// Reads that wait, longest first, a few of them.
    pub(crate) reads: Vec<Read>,
}

/// A read that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Read {
    /// The file.
    pub(crate) path: String,
    /// Since when, in milliseconds.
    pub(crate) waiting_ms: u64,
    /// The thing that it waits for.
    pub(crate) reason: String,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ImageLayer {
    /// Its digest in the registry.
    pub(crate) digest: Digest,
    /// By which the node knows it.
    #[serde(skip)]
    pub(crate) id: LayerId,
    /// Whether everything has arrived.
    pub(crate) is_complete: bool,
    /// Whether the kernel reads it from its cache file, without any daemon.
    pub(crate) is_direct: bool,
    /// Whether it is what its tar stream says: `believed`, `verified` or `refused`.
    pub(crate) truth: &'static str,
    /// Why it is refused.
    pub(crate) reason: Option<String>,
    /// Digest of its tar stream, once it is verified.
    pub(crate) tar_digest: Option<Digest>,
    /// Pages of 4 KiB that `lazuli-fused` found damaged on disk since it started, and fetches again.
    pub(crate) healed_page_count: u64,
    /// Its figures.
    #[serde(flatten)]
    pub(crate) sums: Sums,
    /// The fetching of it.
    #[serde(flatten)]
    pub(crate) fetching: Fetching,
}

/// A lazy layer under the chain ID by which containerd knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Chain {
    /// The chain ID.
    pub(crate) chain_id: String,
    /// The image that it was pulled for first.
    pub(crate) image: String,
    /// The layer's digest in the registry.
    pub(crate) digest: Digest,
    /// Digest of the layer's index, by which a node knows it.
    pub(crate) index_digest: LayerId,
    /// The truth, as far as it is known: `believed`, `verified` or `refused`.
    pub(crate) truth: &'static str,
    /// Why it is refused.
    pub(crate) reason: Option<String>,
    /// Since when that is so, in seconds since 1970.
    pub(crate) since: i64,
    /// Since when somebody waits for the verification, in seconds since 1970; `None` when nobody does.
    pub(crate) waited_for_since: Option<i64>,
    /// Ids of keys of the configuration that have signed it.
    pub(crate) signed_by: Vec<String>,
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
    let answer = ask(root, &Request::Status).await;
    // Both are for people: one that cannot be read says nothing.
    let chains: Vec<Chain> =
        ChainStatus::read(&root.join(CHAINS)).unwrap_or_default().into_iter().map(Chain::from).collect();
    let not_lazy = NotLazy::read(&root.join(NOT_LAZY)).unwrap_or_default();
    match answer {
        Ok(Response::Status { mode, layers, trees }) => {
            let total = layers.iter().map(sums_of_layer).sum();
            let ModeStatus { in_use, reason } = mode;
            let (mode, mode_reason, images) = (Some(in_use), Some(reason), images(layers, &trees, &not_lazy));
            Ok(NodeStatus { mode, mode_reason, images, total, chains, not_lazy })
        }
        Ok(other) => Err(no_answer(root, other)),
        Err(StatusError::NotRunning(_)) if is_without_layers(root) => {
            let (images, total) = (Vec::new(), Sums::default());
            Ok(NodeStatus { mode: None, mode_reason: None, images, total, chains, not_lazy })
        }
        Err(error) => Err(error),
    }
}

/// Whether this is the root directory of a node, and none of its layers wants `lazuli-fused` to run.
fn is_without_layers(root: &Path) -> bool {
    let layers = std::fs::read_dir(root.join(LAYER_CACHES)).map(|mut entries| entries.next().is_some());
    root.join(SNAPSHOTS).exists() && !layers.unwrap_or(false)
}

/// Asks the `lazuli-fused` of `root` for something that it knows without waiting.
///
/// # Errors
///
/// When it does not run, does not answer, or does not make itself understood; not when it refuses.
pub(crate) async fn ask(root: &Path, request: &Request) -> Result<Response, StatusError> {
    let path = root.join(SOCKET);
    let exchanged = async {
        let mut connection = UnixStream::connect(&path).await?;
        exchange(&mut connection, &request_line(request)).await
    };
    let answer = match tokio::time::timeout(ANSWER_WITHIN, exchanged).await {
        Err(_) => return Err(StatusError::Timeout { path, within: ANSWER_WITHIN }),
        Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(StatusError::NotRunning(path));
        }
        Ok(Err(error)) => return Err(StatusError::Connection { path, error }),
        Ok(Ok(answer)) => answer,
    };
    let problem = |error| format!("the answer is of another version of lazuli-fused: {error}");
    serde_json::from_slice(&answer).map_err(|error| StatusError::Answer { path, problem: problem(error) })
}

/// The error for a response that is none to the question: a refusal, most likely.
pub(crate) fn no_answer(root: &Path, response: Response) -> StatusError {
    let problem = match response {
        Response::Error { message, .. } => message,
        _ => "the answer is none to the question".to_owned(),
    };
    StatusError::Answer { path: root.join(SOCKET), problem }
}

/// Puts layers and trees together to images.
///
/// A layer knows the image that it was last pulled for, a tree only layers. So the image of a tree is that
/// of its topmost layer, and layers below that others share belong to it too.
fn images(layers: Vec<LayerStatus>, trees: &[TreeStatus], not_lazy: &[NotLazy]) -> Vec<ImageStatus> {
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
        .map(|(image, (mode, ids))| {
            let pulled = not_lazy.iter().find(|known| known.image == image);
            summarize(image, mode, ids.iter().filter_map(layer).collect(), pulled)
        })
        .collect()
}

fn sums_of_layer(layer: &LayerStatus) -> Sums {
    Sums {
        layer_count: 1,
        present_frame_count: layer.frames_present,
        needed_frame_count: layer.frames_total,
        compressed_len: layer.layer.layer.blob_len,
        fetched_bytes: layer.fetched_bytes,
        disk_bytes: layer.disk_bytes,
    }
}

fn image_layer(layer: &LayerStatus, is_direct: bool) -> ImageLayer {
    let (truth, reason, tar_digest) = match &layer.verdict {
        None => (BELIEVED, None, None),
        Some(Verdict::Verified { tar }) => (VERIFIED, None, Some(*tar)),
        Some(Verdict::Refused { reason }) => (REFUSED, Some(reason.clone()), None),
    };
    ImageLayer {
        digest: layer.layer.layer.blob,
        id: layer.layer.layer.id(),
        is_complete: layer.is_complete,
        is_direct,
        truth,
        reason,
        tar_digest,
        healed_page_count: layer.healed_pages,
        sums: sums_of_layer(layer),
        fetching: fetching(&layer.reading),
    }
}

fn fetching(reading: &Reading) -> Fetching {
    let reason = wait_reason(reading);
    let read = |read: &WaitingRead| {
        let WaitingRead { path, waiting_ms } = read.clone();
        Read { path, waiting_ms, reason: reason.clone() }
    };
    Fetching {
        wanted_frame_count: reading.frames_wanted,
        coming_frame_count: reading.frames_under_way,
        awaited_frame_count: reading.frames_awaited,
        reads: reading.reads.iter().map(read).collect(),
    }
}

/// The thing that reads of a layer wait for, as far as `lazuli-fused` knows.
fn wait_reason(reading: &Reading) -> String {
    match (&reading.failure, reading.is_paused) {
        (Some(failure), true) => format!("{failure}; the registry is asked again soon"),
        (Some(failure), false) => format!("{failure}; it is tried again"),
        (None, true) => "the registry failed a moment ago, and is asked again soon".to_owned(),
        (None, false) if reading.frames_under_way > 0 => "the registry was asked, its answer is under way".to_owned(),
        (None, false) => "other requests go first".to_owned(),
    }
}

fn summarize(
    image: &str,
    mode: Option<TreeMode>,
    layers: Vec<ImageLayer>,
    pulled_completely: Option<&NotLazy>,
) -> ImageStatus {
    let sum = |of: fn(&Fetching) -> u64| layers.iter().map(|layer| of(&layer.fetching)).sum();
    let mut reads: Vec<Read> = layers.iter().flat_map(|layer| layer.fetching.reads.clone()).collect();
    reads.sort_by_key(|read| Reverse(read.waiting_ms));
    let fetching = Fetching {
        wanted_frame_count: sum(|fetching| fetching.wanted_frame_count),
        coming_frame_count: sum(|fetching| fetching.coming_frame_count),
        awaited_frame_count: sum(|fetching| fetching.awaited_frame_count),
        reads,
    };
    ImageStatus {
        image: image.to_owned(),
        is_lazy: pulled_completely.is_none(),
        is_complete: layers.iter().all(|layer| layer.is_complete),
        is_verified: layers.iter().all(|layer| layer.truth == VERIFIED),
        reason: match pulled_completely {
            Some(known) => Some(format!("it was pulled completely: {}", known.reason)),
            None => missing_reason(&layers, &fetching),
        },
        mode,
        sums: layers.iter().map(|layer| layer.sums).sum(),
        fetching,
        layers,
    }
}

/// The reason that keeps an image from being complete and verified.
fn missing_reason(layers: &[ImageLayer], fetching: &Fetching) -> Option<String> {
    if let Some(reason) = layers.iter().find_map(|layer| layer.reason.as_ref()) {
        return Some(format!("nothing of it is shown: {reason}"));
    }
    let incomplete = layers.iter().filter(|layer| !layer.is_complete).count();
    if incomplete > 0 {
        let how = match fetching.wanted_frame_count {
            0 => "they come when they are read, or in the background",
            _ => "they are being fetched",
        };
        return Some(format!("{incomplete} of {} layers have not arrived: {how}", layers.len()));
    }
    let unverified = layers.iter().filter(|layer| layer.truth == BELIEVED).count();
    (unverified > 0).then(|| format!("{unverified} of {} layers have arrived and are not verified yet", layers.len()))
}

impl Sum for Sums {
    fn sum<I: Iterator<Item = Self>>(sums: I) -> Self {
        sums.fold(Self::default(), |sum, one| Self {
            layer_count: sum.layer_count + one.layer_count,
            present_frame_count: sum.present_frame_count + one.present_frame_count,
            needed_frame_count: sum.needed_frame_count + one.needed_frame_count,
            compressed_len: sum.compressed_len.saturating_add(one.compressed_len),
            fetched_bytes: sum.fetched_bytes + one.fetched_bytes,
            disk_bytes: sum.disk_bytes + one.disk_bytes,
        })
    }
}

impl From<ChainStatus> for Chain {
    fn from(chain: ChainStatus) -> Self {
        let ChainStatus { chain: chain_id, image, blob: digest, layer, truth, since, waited_for_since, signed_by } =
            chain;
        let (truth, reason) = match truth {
            Truth::Believed => (BELIEVED, None),
            Truth::Verified => (VERIFIED, None),
            Truth::Refused { reason } => (REFUSED, Some(reason)),
        };
        Self { chain_id, image, digest, index_digest: layer, truth, reason, since, waited_for_since, signed_by }
    }
}

#[cfg(test)]
mod tests {
    use control::{RemoteLayer, tree_id};
    use format_spec::{IndexLocation, LazyLayer};

    use super::*;

    /// The longer the name, the longer it waits.
    fn read(name: &str) -> WaitingRead {
        WaitingRead { path: format!("/{name}"), waiting_ms: 1000 * name.len() as u64 }
    }

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
            reading: Reading { frames_awaited: 1, reads: vec![read(name)], ..Reading::default() },
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
        let total: Sums = [&base, &one, &two].into_iter().map(sums_of_layer).sum();
        let images = images(vec![base, one, two], &trees, &[]);
        let names: Vec<_> = images.iter().map(|image| (image.image.as_str(), image.layers.len())).collect();
        assert_eq!(names, [("one:t", 2), ("two:t", 2)]);
        let first = &images[0];
        assert_eq!(first.layers.iter().map(|layer| layer.is_direct).collect::<Vec<_>>(), [true, false]);
        let expected = |count: u64| Sums {
            layer_count: count,
            present_frame_count: count,
            needed_frame_count: 2 * count,
            compressed_len: 100 * count,
            fetched_bytes: 50 * count,
            disk_bytes: 4096 * count,
        };
        assert_eq!((first.mode, first.is_complete, first.sums), (Some(TreeMode::Erofs), false, expected(2)));
        assert_eq!(total, expected(3), "the layer that both have counts once");
        let reads: Vec<_> = first.fetching.reads.iter().map(|read| (read.path.as_str(), read.waiting_ms)).collect();
        assert_eq!((first.fetching.awaited_frame_count, reads), (2, vec![("/complete", 8000), ("/one", 3000)]));
    }

    #[test]
    fn an_image_without_a_container_has_layers_and_no_mode() {
        let images = images(vec![layer("complete", "one:t")], &[], &[]);
        let [image] = images.as_slice() else { panic!("{images:?}") };
        assert_eq!((image.image.as_str(), image.mode, image.is_complete), ("one:t", None, true));
    }

    #[test]
    fn what_keeps_an_image_from_being_lazy_complete_or_verified_is_said() {
        let tar = Digest::of(b"tar");
        let reason = |layers: Vec<LayerStatus>, not_lazy: &[NotLazy]| {
            let images = images(layers, &[], not_lazy);
            let [image] = images.as_slice() else { panic!("{images:?}") };
            let reason = image.reason.clone().unwrap_or_default();
            (image.is_lazy, image.is_complete, image.is_verified, reason)
        };
        let named = |name: &str| layer(name, "one:t");
        let with = |verdict| vec![LayerStatus { verdict: Some(verdict), ..named("complete") }];
        let arrives = "1 of 2 layers have not arrived: they come when they are read, or in the background";
        assert_eq!(reason(vec![named("complete"), named("one")], &[]), (true, false, false, arrives.to_owned()));
        let believed = "1 of 1 layers have arrived and are not verified yet";
        assert_eq!(reason(vec![named("complete")], &[]), (true, true, false, believed.to_owned()));
        assert_eq!(reason(with(Verdict::Verified { tar }), &[]), (true, true, true, String::new()));
        let refused = with(Verdict::Refused { reason: "it lies".to_owned() });
        assert_eq!(reason(refused, &[]), (true, true, false, "nothing of it is shown: it lies".to_owned()));
        let known = NotLazy { image: "one:t".to_owned(), reason: "its base is not lazy".to_owned(), since: 1 };
        let pulled = "it was pulled completely: its base is not lazy";
        assert_eq!(reason(with(Verdict::Verified { tar }), &[known]), (false, true, true, pulled.to_owned()));
    }

    #[test]
    fn a_read_says_what_it_waits_for() {
        let reason = |failure: Option<&str>, is_paused, frames_under_way| {
            let failure = failure.map(str::to_owned);
            wait_reason(&Reading { failure, is_paused, frames_under_way, ..Reading::default() })
        };
        assert_eq!(reason(Some("host answered 503"), true, 0), "host answered 503; the registry is asked again soon");
        assert_eq!(reason(Some("reset"), false, 1), "reset; it is tried again");
        assert_eq!(reason(None, false, 1), "the registry was asked, its answer is under way");
        assert_eq!(reason(None, false, 0), "other requests go first");
    }
}
