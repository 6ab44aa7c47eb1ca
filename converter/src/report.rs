//! What a conversion has done, for people and programs.

use format_spec::Digest;
use serde::Serialize;

/// A conversion that is done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where the image is now.
    pub destination: String,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Digest of the original manifest.
    pub source_digest: Digest,
    /// Digest of the config, the same before and after.
    pub config_digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerReport>,
    /// Compressed length of the original layers, in bytes.
    pub source_len: u64,
    /// Compressed length of the layers now, in bytes.
    pub target_len: u64,
    /// Length of the tar streams of the layers that were converted, in bytes.
    pub plain_len: u64,
    /// Bytes of layers that went to the destination.
    pub uploaded_len: u64,
    /// How long it took.
    pub seconds: f64,
}

/// One layer of a conversion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Digest of the original blob.
    pub source_digest: Digest,
    /// Length of the original blob, in bytes.
    pub source_len: u64,
    /// Digest of the blob now.
    pub target_digest: Digest,
    /// Length of the blob now, in bytes.
    pub target_len: u64,
    /// Digest of the tar stream, the same before and after.
    pub diff_id: Digest,
    /// Whether it was converted; lazy layers and what is no layer are carried over as they are.
    pub converted: bool,
    /// What conversion found in it; `None` where it was not converted.
    #[serde(flatten)]
    pub content: Option<LayerContent>,
    /// Whether it was sent to the destination; otherwise that had it already.
    pub uploaded: bool,
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
    pub frames: u64,
    /// Number of inodes: files, directories, links, devices.
    pub files: u64,
    /// Compressed length of the index, in bytes.
    pub index_len: u64,
    /// Length of the hot pack in the blob, in bytes; 0 without one.
    pub hot_len: u64,
    /// Length of the dedup section in the blob, in bytes; 0 without one.
    pub dedup_len: u64,
}

/// Is told how a conversion goes on. Layers are named by their place in the image, lowest first.
pub trait Observer: Send + Sync {
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
    fn layer_starts(&self, _: usize, _: &Digest, _: u64) {}
    fn layer_read(&self, _: usize, _: u64) {}
    fn layer_sent(&self, _: usize, _: u64, _: u64) {}
    fn layer_done(&self, _: usize, _: &LayerReport) {}
}
