//! The result of a conversion, for people and programs. `docs/JSON.md` explains the names of the fields.

use format_spec::Digest;
use serde::Serialize;

/// A conversion that is done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where the image is now.
    pub destination: String,
    /// Digest of its manifest or index.
    pub digest: Digest,
    /// Digest of the original.
    pub source_digest: Digest,
    /// The images that were converted, in the order of the index.
    pub images: Vec<ImageReport>,
    /// What is no container image and was copied as it is.
    pub artifacts: Vec<ArtifactReport>,
    /// What came along because it refers to the original.
    pub referrers: Vec<ReferrerReport>,
    /// Compressed length of the original layers, in bytes.
    pub source_compressed_len: u64,
    /// Compressed length of the layers now, in bytes.
    pub compressed_len: u64,
    /// Length of the tar streams of the layers that were converted, in bytes.
    pub plain_len: u64,
    /// Bytes of layers that went to the destination.
    pub uploaded_bytes: u64,
    /// Ids of the keys that signed every lazy layer.
    pub signed_by: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// One image of a conversion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImageReport {
    /// The platform that its config says.
    pub platform: String,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Digest of the original manifest.
    pub source_digest: Digest,
    /// Digest of the config, the same before and after.
    pub config_digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerReport>,
}

/// A manifest that describes no container image.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ArtifactReport {
    /// Digest of the manifest, the same before and after.
    pub digest: Digest,
    /// Bytes of its blobs that had to be moved.
    pub copied_bytes: u64,
    /// Its kind, by its own words: the artifact type, or that of the config; empty where it says neither.
    pub kind: String,
}

/// A manifest that refers to the original.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReferrerReport {
    /// Digest of what it refers to.
    pub subject: Digest,
    /// Digest of its manifest, the same before and after.
    pub digest: Digest,
    /// What it is about, such as `application/spdx+json`, or the tag that it was found under.
    pub kind: String,
    /// Digest of the copy that refers to the new manifest; `None` for signatures and the like.
    pub attached: Option<Digest>,
}

/// One layer of a conversion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Digest of the original blob.
    pub source_digest: Digest,
    /// Length of the original blob, in bytes.
    pub source_compressed_len: u64,
    /// Digest of the blob now.
    pub digest: Digest,
    /// Length of the blob now, in bytes.
    pub compressed_len: u64,
    /// Digest of the tar stream, the same before and after.
    pub diff_id: Digest,
    /// Whether it was converted; lazy layers and what is no layer are carried over as they are.
    pub is_converted: bool,
    /// Whether it was converted earlier and found in the cache.
    pub is_cached: bool,
    /// What conversion found in it; `None` where it was not converted.
    #[serde(flatten)]
    pub content: Option<LayerContent>,
    /// Whether it was sent to the destination; otherwise that had it already.
    pub is_uploaded: bool,
    /// How long it took, upload included.
    pub seconds: f64,
}

/// What is in a converted layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerContent {
    /// Length of the tar stream, in bytes.
    pub plain_len: u64,
    /// Length of all regular files, in bytes.
    pub content_len: u64,
    /// Number of frames.
    pub frame_count: u64,
    /// Number of inodes: files, directories, links, devices.
    pub inode_count: u64,
    /// Compressed length of the index, in bytes.
    pub index_len: u64,
    /// Length of the hot pack in the blob, in bytes; 0 without one.
    pub hot_pack_len: u64,
    /// Length of the dedup section in the blob, in bytes; 0 without one.
    pub dedup_len: u64,
}

/// Is told how a conversion goes on. Layers are named by their place in the image, lowest first.
pub trait Observer: Send + Sync {
    /// Work on one of several images begins; `name` is its platform.
    fn image_starts(&self, name: &str);
    /// Work on a layer begins; its blob has `len` bytes.
    fn layer_starts(&self, layer: usize, digest: &Digest, len: u64);
    /// So many bytes of the original blob have been read.
    fn layer_read(&self, layer: usize, read_len: u64);
    /// So many of `len` bytes of the new blob have been sent.
    fn layer_sent(&self, layer: usize, sent_len: u64, len: u64);
    /// The layer is at the destination.
    fn layer_done(&self, layer: usize, report: &LayerReport);
}

/// Looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn image_starts(&self, _: &str) {}
    fn layer_starts(&self, _: usize, _: &Digest, _: u64) {}
    fn layer_read(&self, _: usize, _: u64) {}
    fn layer_sent(&self, _: usize, _: u64, _: u64) {}
    fn layer_done(&self, _: usize, _: &LayerReport) {}
}
