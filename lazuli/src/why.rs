//! Why an image or a container started as fast as it did: what is lazy of it and what is not, which reads waited for
//! what, and the time that a full pull would have taken.
//!
//! `records.rs` asks containerd, `status.rs` asks `lazuli-fused`; here both are put together.

pub(crate) mod records;

use std::{cmp::Reverse, collections::BTreeMap, path::Path};

use control::{ErrorKind, LayerWaits, NotLazy, PastWait, Request, Response, TreeMode, WaitCause};
use converter::image::manifest::Descriptor;
use format_spec::{Digest, LayerId, LazyLayer};
use indicatif::HumanBytes;
use serde::Serialize;

use self::records::ContainerRecord;
use crate::status::{ImageLayer, ImageStatus, NodeStatus, REFUSED, Read, StatusError, Sums, VERIFIED, ask, no_answer};

/// Snapshotters that containerd brings along: Lazuli is none of them.
const OWN_SNAPSHOTTERS: [&str; 7] = ["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "aufs"];
/// From this part of the content of starts on, in percent, a profile is worth recording: fetched because it was read, of
/// that and the hot pack.
const DEMANDED_PERCENT_MIN: u64 = 25;
/// And not for less than this.
const DEMANDED_LEN_MIN: u64 = 1 << 20;
/// Layers that a line names.
const NAMED_MAX: usize = 4;

/// The subject of the question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Subject {
    /// The image, in the words of the question or of the container's record.
    pub(crate) image: String,
    pub(crate) container: Option<ContainerRecord>,
    /// The layers that its manifest names, lowest first; `None` where that cannot be had.
    pub(crate) layers: Option<Vec<Descriptor>>,
}

/// The answer; `docs/JSON.md` explains the names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Why {
    /// The image, in the words of the question or of the container's record.
    pub(crate) image: String,
    /// The container that was asked for.
    pub(crate) container: Option<String>,
    /// Whether containers read it lazily, or some layers of it.
    pub(crate) is_lazy: bool,
    /// Whether all of its lazy layers have arrived.
    pub(crate) is_complete: bool,
    /// Whether each of them is what its tar stream says; `None` where there are none.
    pub(crate) is_verified: Option<bool>,
    /// How the kernel reads it; none before the first container.
    pub(crate) mode: Option<TreeMode>,
    /// Why it is not lazy, complete and verified, as `lazuli status` says it.
    pub(crate) reason: Option<String>,
    /// Everything of it that is not lazy, and why.
    pub(crate) obstacles: Vec<String>,
    /// Its layers together; the length is that of the ordinary ones too.
    #[serde(flatten)]
    pub(crate) sums: Sums,
    /// Its lazy layers together.
    #[serde(flatten)]
    pub(crate) figures: Figures,
    /// The best rate at which one request brought bytes of it.
    pub(crate) bytes_per_second: Option<u64>,
    /// How long a full pull would have taken at that rate, without unpacking.
    pub(crate) full_pull_ms: Option<u64>,
    /// The longest waits that are over, longest first.
    pub(crate) waits: Vec<Wait>,
    /// Reads that wait now.
    pub(crate) reads: Vec<Read>,
    /// Its layers, lowest first where the manifest or a mount says the order.
    pub(crate) layers: Vec<WhyLayer>,
    /// Advice.
    pub(crate) suggestions: Vec<String>,
}

/// Figures of what readers waited for; those of an image are sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Figures {
    /// Reads that waited, or wait.
    pub(crate) wait_count: u64,
    /// Their times together.
    pub(crate) waited_ms: u64,
    /// The time during which at least one of them waited.
    pub(crate) blocked_ms: u64,
    /// Compressed bytes that were fetched because they were read.
    pub(crate) demanded_bytes: u64,
    /// Those that came with hot packs.
    pub(crate) hot_bytes: u64,
}

/// A wait that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Wait {
    pub(crate) path: String,
    /// Where the read began in the file.
    pub(crate) offset: u64,
    /// When it began, since the layer was opened.
    pub(crate) after_ms: u64,
    pub(crate) waited_ms: u64,
    pub(crate) cause: WaitCause,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct WhyLayer {
    /// Its digest in the registry.
    pub(crate) digest: Digest,
    /// Whether it is read lazily.
    pub(crate) is_lazy: bool,
    /// Length of its blob.
    pub(crate) compressed_len: u64,
    /// Left out of one that is not lazy.
    #[serde(flatten)]
    pub(crate) figures: Option<Figures>,
}

/// The layers of the subject that `lazuli-fused` has.
pub(crate) fn lazy_layers(subject: &Subject, status: &NodeStatus) -> Vec<LayerId> {
    let node = Node::new(status, &[]);
    let layers = node.layers(subject, node.image(subject));
    layers.iter().filter_map(|layer| layer.here).map(|(layer, _)| layer.id).collect()
}

/// The waits of readers of these layers; nothing where there are none.
///
/// # Errors
///
/// When it does not answer, or is of a version that does not know.
pub(crate) async fn node_waits(root: &Path, layers: Vec<LayerId>) -> Result<Vec<LayerWaits>, StatusError> {
    if layers.is_empty() {
        return Ok(Vec::new());
    }
    match ask(root, &Request::Waits { layers: Some(layers) }).await? {
        Response::Waits { layers } => Ok(layers),
        Response::Error { kind: ErrorKind::Invalid, .. } => Err(StatusError::Answer {
            path: root.join(control::root::SOCKET),
            problem: "this lazuli-fused is older than the command and cannot tell what readers waited for: send it \
                      SIGTERM, and the program that lies there now goes on (docs/OPERATION.md)"
                .to_owned(),
        }),
        other => Err(no_answer(root, other)),
    }
}

/// The node's knowledge of the subject; `Err` says in one line why that is nothing.
pub(crate) fn explain(subject: &Subject, status: &NodeStatus, waits: &[LayerWaits]) -> Result<Why, String> {
    if let Some(container) = subject.container.as_ref().filter(|container| has_own_snapshotter(container)) {
        return Err(format!(
            "{}: not lazy: the container is on snapshotter {}, which has all of an image before the start; create it \
             with that of Lazuli",
            container.id, container.snapshotter
        ));
    }
    let node = Node::new(status, waits);
    let found = node.image(subject);
    let pulled = status.not_lazy.iter().find(|known| known.image == subject.image);
    let layers = node.layers(subject, found);
    if !layers.iter().any(|layer| layer.here.is_some()) && found.is_none() && pulled.is_none() {
        return Err(nothing_lazy(subject, &layers));
    }
    Ok(answer(subject, found, pulled, &layers))
}

fn has_own_snapshotter(container: &ContainerRecord) -> bool {
    OWN_SNAPSHOTTERS.contains(&container.snapshotter.as_str())
}

/// The state of a node, by layers.
struct Node<'a> {
    status: &'a NodeStatus,
    layers: BTreeMap<LayerId, &'a ImageLayer>,
    waits: BTreeMap<LayerId, &'a LayerWaits>,
}

/// A layer of the subject.
struct SubjectLayer<'a> {
    digest: Digest,
    compressed_len: u64,
    /// Whether it was converted.
    is_converted: bool,
    /// The layer as `lazuli-fused` has it.
    here: Option<(&'a ImageLayer, Option<&'a LayerWaits>)>,
}

impl<'a> Node<'a> {
    fn new(status: &'a NodeStatus, waits: &'a [LayerWaits]) -> Self {
        let layers = status.images.iter().flat_map(|image| &image.layers).map(|layer| (layer.id, layer)).collect();
        Self { status, layers, waits: waits.iter().map(|waits| (waits.layer, waits)).collect() }
    }

    /// The image of that name. A container may know it by another one: then it is the image that has its topmost lazy
    /// layer.
    fn image(&self, subject: &Subject) -> Option<&'a ImageStatus> {
        let named = self.status.images.iter().find(|image| image.image == subject.image);
        let top = || subject.layers.iter().flatten().rev().find_map(id_of);
        let has = |image: &&ImageStatus, id| image.layers.iter().any(|layer| layer.id == id);
        named.or_else(|| top().and_then(|top| self.status.images.iter().find(|image| has(image, top))))
    }

    fn layers(&self, subject: &Subject, found: Option<&'a ImageStatus>) -> Vec<SubjectLayer<'a>> {
        let here = |id: &LayerId| self.layers.get(id).map(|layer| (*layer, self.waits.get(id).copied()));
        match (&subject.layers, found) {
            (Some(layers), _) => {
                let layer = |layer: &Descriptor| SubjectLayer {
                    digest: layer.digest,
                    compressed_len: layer.size,
                    is_converted: id_of(layer).is_some(),
                    here: id_of(layer).as_ref().and_then(here),
                };
                layers.iter().map(layer).collect()
            }
            (None, Some(found)) => {
                let layer = |layer: &ImageLayer| SubjectLayer {
                    digest: layer.digest,
                    compressed_len: layer.sums.compressed_len,
                    is_converted: true,
                    here: here(&layer.id),
                };
                found.layers.iter().map(layer).collect()
            }
            (None, None) => Vec::new(),
        }
    }
}

fn id_of(layer: &Descriptor) -> Option<LayerId> {
    LazyLayer::from_annotations(|key| layer.annotation(key)).ok().flatten().map(|lazy| lazy.id())
}

/// The line for an image that the node reads nothing of lazily.
fn nothing_lazy(subject: &Subject, layers: &[SubjectLayer<'_>]) -> String {
    let image = &subject.image;
    let of_container = subject.container.as_ref().map(|container| format!("{}: ", container.id)).unwrap_or_default();
    let how = "`lazuli convert` makes a lazy image of it";
    let reason = match layers.iter().filter(|layer| layer.is_converted).count() {
        _ if layers.is_empty() => format!("its manifest is not in containerd; if it was never converted, {how}"),
        0 => format!("none of its {} is converted, so all was pulled before the start; {how}", counted(layers.len())),
        _ => {
            "it is converted, and was pulled completely: with another snapshotter, by a containerd that does not pass \
              on what a layer is, or onto layers that were here as ordinary ones (docs/NODE.md)"
                .to_owned()
        }
    };
    format!("{of_container}{image}: not lazy: {reason}")
}

fn counted(layers: usize) -> String {
    format!("{layers} layer{}", if layers == 1 { "" } else { "s" })
}

fn answer(
    subject: &Subject,
    found: Option<&ImageStatus>,
    pulled: Option<&NotLazy>,
    layers: &[SubjectLayer<'_>],
) -> Why {
    let here = || layers.iter().filter_map(|layer| layer.here);
    let waits = || here().filter_map(|(_, waits)| waits);
    let compressed_len = layers.iter().map(|layer| layer.compressed_len).sum();
    let sums = here().map(|(layer, _)| layer.sums).sum::<Sums>();
    let figures = waits().map(Figures::of).fold(Figures::default(), Figures::plus);
    let bytes_per_second = waits().filter_map(|waits| waits.best_rate).max();
    let reason = match pulled {
        Some(known) => Some(format!("it was pulled completely: {}", known.reason)),
        None => found.filter(|found| found.image == subject.image).and_then(|found| found.reason.clone()),
    };
    let is_lazy = pulled.is_none() && here().next().is_some();
    let mut longest: Vec<Wait> = waits().flat_map(|waits| &waits.longest).map(Wait::of).collect();
    longest.sort_by_key(|wait| Reverse(wait.waited_ms));
    let mut why = Why {
        image: subject.image.clone(),
        container: subject.container.as_ref().map(|container| container.id.clone()),
        is_lazy,
        is_complete: here().all(|(layer, _)| layer.is_complete),
        is_verified: here().next().map(|_| here().all(|(layer, _)| layer.truth == VERIFIED)),
        mode: found.and_then(|found| found.mode),
        obstacles: obstacles(layers, reason.as_ref().filter(|_| !is_lazy)),
        reason,
        sums: Sums { layer_count: layers.len() as u64, compressed_len, ..sums },
        figures,
        bytes_per_second,
        full_pull_ms: bytes_per_second.map(|rate| compressed_len.saturating_mul(1000) / rate.max(1)),
        waits: longest,
        reads: here().flat_map(|(layer, _)| layer.fetching.reads.clone()).collect(),
        layers: layers.iter().map(WhyLayer::of).collect(),
        suggestions: Vec::new(),
    };
    why.suggestions = suggestions(&why);
    why
}

/// Everything that is not lazy, a line each; `pulled` says that it is all of the image, and why.
fn obstacles(layers: &[SubjectLayer<'_>], pulled: Option<&String>) -> Vec<String> {
    let refused = layers.iter().filter_map(|layer| layer.here).filter(|(layer, _)| layer.truth == REFUSED);
    let refused = refused.filter_map(|(layer, _)| Some(format!("nothing of it is shown: {}", layer.reason.as_ref()?)));
    let away = |is_converted| {
        let is_so = move |layer: &&SubjectLayer<'_>| layer.here.is_none() && layer.is_converted == is_converted;
        layers.iter().filter(is_so).collect::<Vec<_>>()
    };
    let ordinary = away(false);
    let ordinary_line = (!ordinary.is_empty()).then(|| {
        format!("{} not converted, and downloaded before the start: {}", part(&ordinary, layers), names(&ordinary))
    });
    let converted = away(true);
    let converted_line = (!converted.is_empty() && pulled.is_none()).then(|| {
        let why = match ordinary.is_empty() {
            true => "lazuli-fused has nothing of them",
            false => "a lazy layer lies on lazy ones only",
        };
        format!("{} converted, and not lazy all the same: {why}: {}", part(&converted, layers), names(&converted))
    });
    pulled.cloned().into_iter().chain(refused).chain(ordinary_line).chain(converted_line).collect()
}

/// `1 of 4 layers is`, or `2 of 4 layers are`.
fn part(some: &[&SubjectLayer<'_>], all: &[SubjectLayer<'_>]) -> String {
    format!("{} of {} {}", some.len(), counted(all.len()), if some.len() == 1 { "is" } else { "are" })
}

/// How long some layers are, and which they are.
fn names(layers: &[&SubjectLayer<'_>]) -> String {
    let len = HumanBytes(layers.iter().map(|layer| layer.compressed_len).sum());
    let short = |layer: &&SubjectLayer<'_>| layer.digest.hex()[..12].to_owned();
    let named: Vec<String> = layers.iter().take(NAMED_MAX).map(short).collect();
    let more = if layers.len() > NAMED_MAX { ", ..." } else { "" };
    format!("{len} ({}{more})", named.join(", "))
}

fn suggestions(why: &Why) -> Vec<String> {
    let Figures { wait_count, demanded_bytes, hot_bytes, .. } = why.figures;
    let image = &why.image;
    let is_much = demanded_bytes >= DEMANDED_LEN_MIN
        && demanded_bytes * 100 >= demanded_bytes.saturating_add(hot_bytes).saturating_mul(DEMANDED_PERCENT_MIN);
    let profile = (wait_count > 0 && is_much).then(|| {
        format!(
            "record what a start reads: `lazuli profile record -o FILE {image}`, then `lazuli convert --profile FILE` \
             (docs/PROFILE.md)"
        )
    });
    let is_partly_ordinary = why.is_lazy && why.layers.iter().any(|layer| !layer.is_lazy);
    let convert = is_partly_ordinary.then(|| format!("convert the layers that are not lazy: `lazuli convert {image}`"));
    profile.into_iter().chain(convert).collect()
}

impl Figures {
    fn of(waits: &LayerWaits) -> Self {
        let LayerWaits { wait_count, waited_ms, blocked_ms, demanded_bytes, hot_bytes, .. } = *waits;
        Self { wait_count, waited_ms, blocked_ms, demanded_bytes, hot_bytes }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            wait_count: self.wait_count.saturating_add(other.wait_count),
            waited_ms: self.waited_ms.saturating_add(other.waited_ms),
            blocked_ms: self.blocked_ms.saturating_add(other.blocked_ms),
            demanded_bytes: self.demanded_bytes.saturating_add(other.demanded_bytes),
            hot_bytes: self.hot_bytes.saturating_add(other.hot_bytes),
        }
    }
}

impl Wait {
    fn of(wait: &PastWait) -> Self {
        let PastWait { path, offset, after_ms, waited_ms, cause } = wait.clone();
        Self { path, offset, after_ms, waited_ms, cause }
    }
}

impl WhyLayer {
    fn of(layer: &SubjectLayer<'_>) -> Self {
        let figures = layer.here.map(|(_, waits)| waits.map(Figures::of).unwrap_or_default());
        let SubjectLayer { digest, compressed_len, .. } = *layer;
        Self { digest, is_lazy: layer.here.is_some(), compressed_len, figures }
    }
}

#[cfg(test)]
pub(crate) mod tests;
