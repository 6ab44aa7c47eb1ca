//! Does a `Prepare` ask for a lazy layer? Read off its labels, pure.
//!
//! containerd passes a layer descriptor's annotations under `containerd.io/snapshot/` as labels, together
//! with the name under which the unpacked layer would be committed, the *target*.
//!
//! A layer is ordinary, so that containerd downloads and unpacks it, when it carries no annotations of
//! ours, when the labels name no target or no image to fetch from, and when a newer Lazuli wrote it: it
//! is a complete `tar+zstd` layer in any case. Annotations that contradict themselves are refused: they
//! come from a damaged or forged manifest, and a silent full download would hide that.

use control::RemoteLayer;
use format_spec::{Digest, LazyLayer, annotation::AnnotationError};
use tracing::warn;

use crate::names::{Labels, SnapshotKey};

/// The name under which containerd would commit the layer it prepares for: its chain ID.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// The image a layer is pulled for, as CRI, the transfer service and `lazuli pull` say it: each of them sets the label
/// over an annotation of that name.
pub const CRI_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of the layer blob, as CRI and the transfer service say it.
pub const CRI_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// The ecosystem's mark of a snapshot that was prepared remotely, and its value.
pub const REMOTE_MARK: (&str, &str) = ("containerd.io/snapshot/remote", "remote snapshot");

/// The beginning of containerd's names, behind its own prefix, of snapshots that layers are unpacked into
/// (`snapshots.UnpackKeyPrefix`).
const EXTRACTION: &str = "extract";

/// Whether a snapshot is made to unpack a layer into it. Only then are labels those of a layer: those of a container's
/// snapshot are annotations of whoever describes it, as of a pod.
pub fn is_extraction(key: &SnapshotKey) -> bool {
    // NAMESPACE/NUMBER/KEY, or without containerd in between KEY alone.
    let mut parts = key.as_str().splitn(3, '/');
    let own = match (parts.next(), parts.next(), parts.next()) {
        (_, Some(number), Some(own)) if number.bytes().all(|digit| digit.is_ascii_digit()) => own,
        _ => key.as_str(),
    };
    own.starts_with(EXTRACTION)
}

/// Whether a target may name a snapshot of ours.
///
/// The target of a base layer is the diff ID that an image's config gives, and containerd does not look at its form
/// (`images.RootFS`, `identity.ChainID`). So it may be a digest that nobody can compare, or `NAMESPACE/NUMBER/NAME`,
/// the name that containerd will choose for a snapshot of somebody else.
fn is_fit(target: &SnapshotKey) -> bool {
    let name = target.as_str();
    let number = name.split('/').nth(1);
    let is_of_containerd = number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()));
    name.parse::<Digest>().is_ok() || !(name.contains(':') || is_of_containerd)
}

/// A layer that needs no download now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteRequest {
    /// The name of the committed snapshot.
    pub target: SnapshotKey,
    /// The layer.
    pub layer: RemoteLayer,
}

/// The labels describe no layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Ours are incomplete or malformed.
    #[error("layer for {target}: {error}")]
    Annotation {
        /// The target.
        target: SnapshotKey,
        /// What is wrong.
        error: AnnotationError,
    },
    /// Ours name another blob than containerd's.
    #[error("layer for {target} is {described} by its annotations but {actual} by its descriptor")]
    AnotherBlob {
        /// The target.
        target: SnapshotKey,
        /// What our annotation says.
        described: Digest,
        /// What containerd says.
        actual: String,
    },
}

/// The lazy layer that somebody asks for with a snapshot's key and labels, `None` for an ordinary one.
///
/// # Errors
///
/// When the annotations contradict themselves or what containerd says about the layer.
pub fn remote_request(key: &SnapshotKey, labels: &Labels) -> Result<Option<RemoteRequest>, LabelError> {
    if !is_extraction(key) {
        return Ok(None);
    }
    let label = |key: &str| labels.get(key).map(String::as_str);
    let Some(target) = label(TARGET).and_then(SnapshotKey::new) else { return Ok(None) };
    let layer = match LazyLayer::from_annotations(label) {
        Ok(None) => return Ok(None),
        Ok(Some(layer)) => layer,
        Err(error @ AnnotationError::Version(_)) => {
            warn!(%target, %error, "layer is pulled completely");
            return Ok(None);
        }
        Err(error) => return Err(LabelError::Annotation { target, error }),
    };
    if let Some(actual) = label(CRI_LAYER_DIGEST).filter(|actual| *actual != layer.blob.to_string()) {
        return Err(LabelError::AnotherBlob { target, described: layer.blob, actual: actual.to_owned() });
    }
    if !is_fit(&target) {
        warn!(target = %target.as_str().escape_debug(), "the target is no chain ID, the layer is pulled completely");
        return Ok(None);
    }
    let Some(image) = label(CRI_IMAGE) else {
        warn!(
            %target,
            "labels name no image to fetch from, layer is pulled completely: containerd passes annotations when \
             disable_snapshot_annotations is false (1.6, 1.7) or enable_remote_snapshot_annotations is set (2.1), see NODE.md"
        );
        return Ok(None);
    };
    Ok(Some(RemoteRequest { target, layer: RemoteLayer { layer, image: image.to_owned() } }))
}

#[cfg(test)]
mod tests {
    use format_spec::{IndexLocation, annotation};

    use super::*;

    fn layer() -> LazyLayer {
        let index = IndexLocation { offset: 5, compressed_len: 10, plain_len: 20, digest: Digest::of(b"index") };
        LazyLayer { blob: Digest::of(b"blob"), blob_len: 100, index, hot_len: 0 }
    }

    fn check(change: impl FnOnce(&mut Labels), expected: Result<Option<&str>, ()>) {
        let mut labels = layer().to_annotations();
        labels.insert(TARGET.to_owned(), Digest::of(b"chain").to_string());
        labels.insert(CRI_IMAGE.to_owned(), "host/repo:tag".to_owned());
        labels.insert(CRI_LAYER_DIGEST.to_owned(), layer().blob.to_string());
        change(&mut labels);
        let expected = expected.map(|image| {
            image.map(|image| RemoteRequest {
                target: SnapshotKey::new(Digest::of(b"chain").to_string()).unwrap(),
                layer: RemoteLayer { layer: layer(), image: image.to_owned() },
            })
        });
        let key = SnapshotKey::new("k8s.io/7/extract-1 sha256:chain").unwrap();
        assert_eq!(remote_request(&key, &labels).map_err(|_| ()), expected, "{labels:?}");
    }

    #[test]
    fn annotations_target_and_image_ask_for_a_lazy_layer() {
        check(|_| {}, Ok(Some("host/repo:tag")));
        check(|labels| _ = labels.remove(CRI_LAYER_DIGEST), Ok(Some("host/repo:tag")));
    }

    /// A manifest can set every annotation below `containerd.io/snapshot/`, and they become labels.
    #[test]
    fn no_annotation_of_a_manifest_chooses_the_repository() {
        let own = "containerd.io/snapshot/lazuli/image";
        check(|labels| _ = labels.insert(own.to_owned(), "private/repo:tag".to_owned()), Ok(Some("host/repo:tag")));
        let alone = |labels: &mut Labels| {
            labels.remove(CRI_IMAGE);
            labels.insert(own.to_owned(), "private/repo:tag".to_owned());
        };
        check(alone, Ok(None));
    }

    /// A config may call a base layer whatever it likes, and so the snapshot of it.
    #[test]
    fn no_config_takes_a_name_that_is_no_chain_id() {
        let hex = Digest::of(b"chain").hex();
        for name in [
            format!("sha256:{}", hex.to_uppercase()),
            format!("SHA256:{hex}"),
            format!("sha256:{hex} "),
            format!("sha256:{hex}0"),
            format!("sha512:{hex}{hex}"),
            "sha256:".to_owned(),
            format!("k8s.io/7/sha256:{hex}"),
            "k8s.io/58/0123456789abcdef".to_owned(),
            "default/9/extract-1".to_owned(),
        ] {
            check(|labels| _ = labels.insert(TARGET.to_owned(), name), Ok(None));
        }
    }

    /// The annotations of a pod become labels of its sandbox's snapshot.
    #[test]
    fn no_pod_asks_for_a_layer() {
        let mut labels = layer().to_annotations();
        labels.insert(TARGET.to_owned(), Digest::of(b"chain").to_string());
        labels.insert(CRI_IMAGE.to_owned(), "private/repo:tag".to_owned());
        for key in ["k8s.io/7/0123456789abcdef", "0123", "k8s.io/7/x/extract-1"] {
            assert_eq!(remote_request(&SnapshotKey::new(key).unwrap(), &labels), Ok(None), "{key}");
        }
    }

    #[test]
    fn a_layer_without_them_or_of_a_newer_version_is_ordinary() {
        check(|labels| _ = labels.remove(TARGET), Ok(None));
        check(|labels| _ = labels.remove(CRI_IMAGE), Ok(None));
        check(|labels| _ = labels.remove(annotation::VERSION), Ok(None));
        check(|labels| _ = labels.insert(annotation::VERSION.to_owned(), "9".to_owned()), Ok(None));
    }

    #[test]
    fn refuses_annotations_that_contradict_themselves_or_the_descriptor() {
        check(|labels| _ = labels.remove(annotation::INDEX_DIGEST), Err(()));
        check(|labels| _ = labels.insert(annotation::BLOB_DIGEST.to_owned(), "sha256:no".to_owned()), Err(()));
        check(|labels| _ = labels.insert(CRI_LAYER_DIGEST.to_owned(), Digest::of(b"other").to_string()), Err(()));
    }
}
