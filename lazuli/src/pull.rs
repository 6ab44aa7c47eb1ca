//! An image into containerd, lazily where the layers allow it.
//!
//! containerd's own client does this for CRI; `ctr image pull` of containerd 1.6 and 1.7 does not tell a
//! snapshotter what a layer is, so this does. Everything goes through containerd's API and is held by a
//! *lease* until the image record exists: what a failed pull leaves behind, containerd collects.
//!
//! A layer is *present* when its snapshot exists, *lazy* when the snapshotter takes it as it is, and else
//! downloaded into the content store, unpacked by containerd and held against its diff ID.

pub(crate) mod containerd;
mod source;

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use containerd_client::types::{Descriptor as ContainerdDescriptor, Mount};
use format_spec::Digest;
use futures_util::TryStreamExt;
use registry::{Client, Reference};

use converter::image::{ImageError, ImageSource, manifest::Descriptor, platform::Platform, resolve::ResolveError};

use crate::pull::{
    containerd::{Containerd, ContainerdError, Prepared, REPOSITORIES, WriteError},
    source::{ImageLayer, PulledImage, PulledManifest},
};

/// Annotations and labels under this prefix are passed between clients and snapshotters.
const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";
/// Names the snapshot that a prepare is for.
const TARGET: &str = "containerd.io/snapshot.ref";
/// The image and the layer, as CRI names them to snapshotters.
const CRI_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
const CRI_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// On a layer blob: the digest of what it unpacks to.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Between two attempts at a layer that the snapshotter cannot take yet; it waits itself before it says so.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What to pull, and where to.
#[derive(Debug, Clone)]
pub(crate) struct PullOptions {
    /// The image; under this name it stands in containerd afterwards.
    pub(crate) reference: Reference,
    /// containerd's socket.
    pub(crate) address: PathBuf,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The snapshotter, as containerd's configuration names it.
    pub(crate) snapshotter: String,
    /// How long to ask again for a layer that the snapshotter cannot take yet.
    pub(crate) wait: Duration,
}

/// What was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pulled {
    /// The name of the image in containerd.
    pub(crate) name: String,
    /// The digest it points to: of the manifest, or of the index over several.
    pub(crate) digest: Digest,
    /// The layers, lowest first.
    pub(crate) layers: Vec<PulledLayer>,
}

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PulledLayer {
    /// Its snapshot was there.
    Present,
    /// It will be read when it is needed.
    Lazy,
    /// It was unpacked; so many bytes were downloaded for it.
    Unpacked {
        /// Compressed bytes; none when the blob was there.
        downloaded_len: u64,
    },
}

/// Is told how a pull goes on; layers are counted from 0.
pub(crate) trait PullObserver: Send + Sync {
    /// A layer must be downloaded.
    fn download_starts(&self, layer: usize, digest: &Digest, len: u64);
    /// So much of it has arrived.
    fn downloaded(&self, layer: usize, len: u64);
    /// containerd unpacks it.
    fn unpack_starts(&self, layer: usize);
    /// The snapshotter cannot take it yet, and is asked again.
    fn waits(&self, layer: usize, digest: &Digest, reason: &str);
    /// It is there.
    fn layer_done(&self, layer: usize, digest: &Digest, outcome: PulledLayer);
}

/// An image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is none for this host.
    #[error("no image for this host, {host}; there is: {available}")]
    Platform {
        /// The host.
        host: Platform,
        /// What there is.
        available: String,
    },
    /// The name points to no image that can be used.
    #[error(transparent)]
    Resolve(ResolveError),
    /// containerd refused or is not there.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// A layer cannot be downloaded.
    #[error("layer {digest}: {reason}")]
    Layer {
        /// The blob.
        digest: Digest,
        /// What the source said.
        reason: String,
    },
    /// The snapshotter could not take a layer in time.
    #[error("layer {digest}: the snapshotter cannot take it after {wait:?}; pull again later")]
    Waiting {
        /// The blob.
        digest: Digest,
        /// How long it was asked.
        wait: Duration,
    },
    /// A layer unpacks to something else than the image says.
    #[error("layer {digest} unpacks to {found}, the image says {expected}: the image is damaged")]
    DiffId {
        /// The blob.
        digest: Digest,
        /// The diff ID in the config.
        expected: Digest,
        /// What containerd found.
        found: String,
    },
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl From<ResolveError> for PullError {
    fn from(error: ResolveError) -> Self {
        match error {
            ResolveError::Image(error) => Self::Image(error),
            ResolveError::Platform { wanted, available } => Self::Platform { host: wanted, available },
            other => Self::Resolve(other),
        }
    }
}

type Result<T> = std::result::Result<T, PullError>;

/// Pulls an image; on `interrupted` it stops and gives up what it holds.
///
/// # Errors
///
/// As [`PullError`] says; containerd then has no new image, and collects what was stored for it.
pub(crate) async fn pull(
    options: &PullOptions,
    client: &Client,
    observer: Arc<dyn PullObserver>,
    interrupted: impl Future<Output = ()>,
) -> Result<Pulled> {
    tokio::pin!(interrupted);
    let source = ImageSource::Registry { client: client.clone(), reference: options.reference.clone() };
    let begin = async {
        // A misspelt name needs no lease.
        let image = PulledImage::resolve(&source).await?;
        let containerd = Containerd::lease(&options.address, &options.namespace).await?;
        Ok::<_, PullError>((image, containerd))
    };
    let (image, containerd) = tokio::select! {
        begun = begin => begun?,
        () = &mut interrupted => return Err(PullError::Interrupted),
    };
    let pull = Pull { options, containerd: &containerd, source: &source, image: &image, observer };
    let pulled = tokio::select! {
        pulled = pull.run() => pulled,
        () = &mut interrupted => Err(PullError::Interrupted),
    };
    // What a failed pull leaves is collected at once; a successful one leaves nothing.
    let ended = containerd.end_lease(pulled.is_err()).await;
    if let (Ok(_), Err(error)) = (&pulled, ended) {
        tracing::warn!(%error, "the image is there; the lease of the pull ends by itself within a day");
    }
    pulled
}

/// One pull under its lease.
struct Pull<'a> {
    options: &'a PullOptions,
    containerd: &'a Containerd,
    source: &'a ImageSource,
    image: &'a PulledImage,
    observer: Arc<dyn PullObserver>,
}

impl Pull<'_> {
    async fn run(&self) -> Result<Pulled> {
        let PulledImage { manifests, config, config_bytes, layers } = self.image;
        for manifest in manifests {
            let labels = self.blob_labels(manifest_labels(manifest));
            self.containerd.store(&manifest.descriptor, manifest.bytes.clone(), labels).await?;
        }
        self.containerd.store(config, config_bytes.clone(), self.blob_labels([])).await?;
        let (mut outcomes, mut chain) = (Vec::with_capacity(layers.len()), None);
        for (number, layer) in layers.iter().enumerate() {
            let name = chain_above(chain, layer.diff_id);
            let outcome = self.layer(number, layer, chain, name).await?;
            self.observer.layer_done(number, &layer.descriptor.digest, outcome);
            outcomes.push(outcome);
            chain = Some(name);
        }
        if let Some(chain) = chain {
            // Keeps the snapshots as long as the image.
            let label = format!("containerd.io/gc.ref.snapshot.{}", self.options.snapshotter);
            self.containerd.label(&config.digest, [(label, chain.to_string())].into()).await?;
        }
        let (name, target) = (self.options.reference.to_string(), &manifests[0].descriptor);
        self.containerd.put_image(&name, to_containerd(target)).await?;
        Ok(Pulled { name, digest: target.digest, layers: outcomes })
    }

    async fn layer(
        &self,
        number: usize,
        layer: &ImageLayer,
        parent: Option<Digest>,
        name: Digest,
    ) -> Result<PulledLayer> {
        let snapshots = self.containerd.snapshots(&self.options.snapshotter);
        if snapshots.has(&name).await? {
            return Ok(PulledLayer::Present);
        }
        let key = format!("extract-{}-{number} {name}", self.containerd.lease_id());
        let labels = self.snapshot_labels(&layer.descriptor, &name);
        let prepare = async {
            loop {
                match snapshots.prepare(&key, parent, &name, labels.clone()).await {
                    Err(ContainerdError::NotYet { reason, .. }) => {
                        self.observer.waits(number, &layer.descriptor.digest, &reason);
                        tokio::time::sleep(ASK_AGAIN_AFTER).await;
                    }
                    prepared => return prepared,
                }
            }
        };
        let Ok(prepared) = tokio::time::timeout(self.options.wait, prepare).await else {
            return Err(PullError::Waiting { digest: layer.descriptor.digest, wait: self.options.wait });
        };
        let Prepared::Mounts(mounts) = prepared? else { return Ok(PulledLayer::Lazy) };
        let unpacked = async {
            let downloaded_len = self.unpack(number, layer, mounts).await?;
            snapshots.commit(&key, &name).await?;
            Ok(PulledLayer::Unpacked { downloaded_len })
        };
        let unpacked = unpacked.await;
        if unpacked.is_err() {
            snapshots.abandon(&key).await;
        }
        unpacked
    }

    /// Returns how many bytes were downloaded.
    async fn unpack(&self, number: usize, layer: &ImageLayer, mounts: Vec<Mount>) -> Result<u64> {
        let ImageLayer { descriptor, diff_id } = layer;
        let downloaded_len = self.download(number, descriptor).await?;
        self.observer.unpack_starts(number);
        let found = self.containerd.apply(to_containerd(descriptor), mounts).await?;
        if found != diff_id.to_string() {
            return Err(PullError::DiffId { digest: descriptor.digest, expected: *diff_id, found });
        }
        self.containerd.label(&descriptor.digest, [(UNCOMPRESSED.to_owned(), found)].into()).await?;
        Ok(downloaded_len)
    }

    async fn download(&self, number: usize, layer: &Descriptor) -> Result<u64> {
        let (digest, labels) = (layer.digest, self.blob_labels([]));
        if self.containerd.has_blob(&digest, &labels).await? {
            return Ok(0);
        }
        self.observer.download_starts(number, &digest, layer.size);
        let stream = self.source.blob_stream(&digest).await?;
        let (observer, mut arrived) = (Arc::clone(&self.observer), 0);
        let pieces = stream.inspect_ok(move |piece| {
            arrived += piece.len() as u64;
            observer.downloaded(number, arrived);
        });
        match self.containerd.write(layer, pieces, labels).await {
            Ok(()) => Ok(layer.size),
            Err(WriteError::Containerd(error)) => Err(error.into()),
            Err(WriteError::Source(error)) => Err(PullError::Layer { digest, reason: error.message }),
        }
    }

    /// Labels of a blob: `others`, and where it came from, as containerd notes it.
    fn blob_labels(&self, others: impl IntoIterator<Item = (String, String)>) -> HashMap<String, String> {
        let reference = &self.options.reference;
        let from = (format!("{REPOSITORIES}{}", reference.host()), reference.repository().to_owned());
        others.into_iter().chain([from]).collect()
    }

    /// What the snapshotter is told about a layer.
    fn snapshot_labels(&self, layer: &Descriptor, name: &Digest) -> HashMap<String, String> {
        let annotations = layer.annotations.iter().flatten();
        let passed = annotations.filter(|(key, _)| key.starts_with(SNAPSHOT_PREFIX));
        let image = self.options.reference.to_string();
        let own = [(TARGET, name.to_string()), (CRI_IMAGE, image), (CRI_LAYER_DIGEST, layer.digest.to_string())];
        let own = own.map(|(key, value)| (key.to_owned(), value));
        passed.map(|(key, value)| (key.clone(), value.clone())).chain(own).collect()
    }
}

/// The labels by which containerd's garbage collector finds what a manifest needs.
fn manifest_labels(manifest: &PulledManifest) -> Vec<(String, String)> {
    let reference = |kind: &str, digest: Digest| (format!("containerd.io/gc.ref.content.{kind}"), digest.to_string());
    let config = manifest.config.iter().map(|config| reference("config", *config));
    let layers = manifest.layers.iter().enumerate().map(|(number, layer)| reference(&format!("l.{number}"), *layer));
    let below = manifest.manifests.iter().enumerate().map(|(number, below)| reference(&format!("m.{number}"), *below));
    config.chain(layers).chain(below).collect()
}

/// The chain ID of a layer, the name of its snapshot. Source: OCI image specification, config.md.
fn chain_above(below: Option<Digest>, diff_id: Digest) -> Digest {
    below.map_or(diff_id, |below| Digest::of(format!("{below} {diff_id}").as_bytes()))
}

fn to_containerd(descriptor: &Descriptor) -> ContainerdDescriptor {
    ContainerdDescriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        assert_eq!(chain_above(None, one), one);
        assert_eq!(chain_above(Some(one), two), Digest::of(format!("{one} {two}").as_bytes()));
    }

    #[test]
    fn a_manifest_refers_to_all_that_it_needs() {
        let [config, one, two] = [b"config", b"layer1", b"layer2"].map(|content| Digest::of(content));
        let descriptor = Descriptor::of("type", b"");
        let manifest = PulledManifest {
            descriptor,
            bytes: bytes::Bytes::new(),
            config: Some(config),
            layers: vec![one, two],
            manifests: Vec::new(),
        };
        let expected = [("config", config), ("l.0", one), ("l.1", two)];
        let expected =
            expected.map(|(kind, digest)| (format!("containerd.io/gc.ref.content.{kind}"), digest.to_string()));
        assert_eq!(manifest_labels(&manifest), expected);
    }
}
