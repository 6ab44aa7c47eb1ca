//! Whether a layer is what its tar stream says: the answer, and how it is kept.

use std::fmt;

use format_spec::Digest;
use serde::{Deserialize, Serialize};

/// The result of a proof.
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

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Verified { tar } => write!(f, "verified as {tar}"),
            Self::Refused { reason } => write!(f, "refused: {reason}"),
        }
    }
}

/// Content of the file `verdict`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VerdictRecord {
    /// Of the index that it speaks of.
    pub(crate) index: Digest,
    #[serde(flatten)]
    pub(crate) verdict: Verdict,
    /// Some of the content that it speaks of was lost since, and may have come otherwise.
    #[serde(default)]
    pub(crate) is_doubted: bool,
}

impl VerdictRecord {
    /// Whether nothing may be shown.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self.verdict, Verdict::Refused { .. })
    }
}
