//! The findings of a check, for people and programs. `docs/JSON.md` explains the names of the fields.

use std::fmt;

use format_spec::Digest;
use serde::Serialize;

use crate::{image::one_line, layer::sign::SignatureFacts};

/// What a finding is about; the words are those of the JSON report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// A list of images.
    List,
    /// An entry that is no image: an attestation, a signature, a chart.
    Artifact,
    /// The manifest, beside its layers.
    Manifest,
    /// The config.
    Config,
    /// An annotation of a layer descriptor.
    Annotation,
    /// A signature of a layer.
    Signature,
    /// The blob as a whole.
    Blob,
    /// What stands where in a blob.
    Layout,
    /// The footer.
    Footer,
    /// The index.
    Index,
    /// A frame.
    Frame,
    /// The tar stream.
    Tar,
    /// What the index says of a file.
    File,
    /// The hot pack.
    HotPack,
    /// The dedup section.
    Dedup,
}

/// Something that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub part: Part,
    /// Which one: `frame 5, bytes 100..200 of the blob`.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

/// The result for one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerCheck {
    /// Digest of the blob by the manifest.
    pub digest: Digest,
    /// Digest of the tar stream by the config.
    pub diff_id: Digest,
    /// Media type.
    pub media_type: String,
    /// Length of the blob by the manifest, in bytes.
    pub compressed_len: u64,
    /// Whether it is lazy, by its annotations or its footer.
    pub is_lazy: bool,
    /// Its signatures.
    pub signatures: Vec<SignatureFacts>,
    /// Digest of the tar stream as it was read; `None` where it could not be read to its end.
    pub tar_digest: Option<Digest>,
    /// Length of the tar stream as it was read.
    pub plain_len: Option<u64>,
    /// What of a lazy layer was compared.
    #[serde(flatten)]
    pub counts: Counts,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How many findings there are beyond those listed.
    pub further_finding_count: u64,
    /// What could not be checked, with the reason.
    pub not_checked: Vec<String>,
}

/// Records of an index that were compared with the content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Frames whose digests were compared.
    pub checked_frame_count: u64,
    /// Inodes that were compared with the tar stream.
    pub checked_inode_count: u64,
    /// Pieces of the hot pack that were compared with the tar stream.
    pub checked_hot_piece_count: u64,
    /// Digests of the dedup section that were compared with the tar stream.
    pub checked_dedup_piece_count: u64,
}

/// The result for an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageCheck {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the config: the image ID.
    pub config_digest: Digest,
    /// `os/architecture[/variant]`.
    pub platform: String,
    /// The layers, lowest first.
    pub layers: Vec<LayerCheck>,
    /// What is wrong beside the layers, and in what it differs from the original.
    pub findings: Vec<Finding>,
    /// How many such findings there are beyond those listed.
    pub further_finding_count: u64,
}

/// The result for what an index lists and is no image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArtifactCheck {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The kind that it says it is of.
    pub kind: String,
    /// How many blobs were read.
    pub blob_count: u64,
    /// Its faults, and its differences from the original.
    pub findings: Vec<Finding>,
    /// How many findings there are beyond those listed.
    pub further_finding_count: u64,
    /// The parts that could not be checked, with the reasons.
    pub not_checked: Vec<String>,
}

/// The result for what was named: one image, or an index and what it lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Digest of the manifest or index.
    pub digest: Digest,
    /// Whether nothing was found and everything was looked at.
    pub is_sound: bool,
    /// Whether everything was looked at.
    pub is_fully_checked: bool,
    /// The images, in their order, each once.
    pub images: Vec<ImageCheck>,
    /// The other entries of the index, each once.
    pub artifacts: Vec<ArtifactCheck>,
    /// The faults of the index.
    pub findings: Vec<Finding>,
    /// How many such findings there are beyond those listed.
    pub further_finding_count: u64,
}

impl CheckReport {
    /// Number of findings.
    pub fn finding_count(&self) -> u64 {
        let of_images: u64 = self.images.iter().map(ImageCheck::finding_count).sum();
        let of_artifacts = self.artifacts.iter().map(|one| one.findings.len() as u64 + one.further_finding_count);
        of_images + of_artifacts.sum::<u64>() + self.findings.len() as u64 + self.further_finding_count
    }
}

impl ImageCheck {
    /// Number of findings, those of its layers included.
    pub fn finding_count(&self) -> u64 {
        let of_layers: u64 = self.layers.iter().map(LayerCheck::finding_count).sum();
        of_layers + self.findings.len() as u64 + self.further_finding_count
    }
}

impl LayerCheck {
    /// Number of findings, those not listed included.
    pub fn finding_count(&self) -> u64 {
        self.findings.len() as u64 + self.further_finding_count
    }
}

/// Findings in the making: a bounded number of them, the rest counted.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) list: Vec<Finding>,
    pub(crate) further: u64,
    pub(crate) not_checked: Vec<String>,
}

impl Findings {
    /// Most findings of one part that are listed.
    const LISTED_MAX: usize = 10;

    /// Longest description of a problem, in characters: values of a stranger stand in some.
    const PROBLEM_LEN_MAX: usize = 1000;

    pub(crate) fn add(&mut self, part: Part, place: impl Into<String>, problem: impl fmt::Display) {
        let problem: String = problem.to_string().chars().take(Self::PROBLEM_LEN_MAX).collect();
        self.push(Finding { part, place: one_line(&place.into()), problem: one_line(&problem) });
    }

    fn push(&mut self, finding: Finding) {
        if self.list.iter().filter(|other| other.part == finding.part).count() < Self::LISTED_MAX {
            self.list.push(finding);
        } else {
            self.further += 1;
        }
    }

    pub(crate) fn append(&mut self, others: Self) {
        others.list.into_iter().for_each(|finding| self.push(finding));
        self.further += others.further;
        self.not_checked.extend(others.not_checked);
    }

    pub(crate) fn skip(&mut self, what: impl Into<String>) {
        self.not_checked.push(one_line(&what.into()));
    }
}
