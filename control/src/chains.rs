//! The file in which the snapshotter says what is known of the chains of lazy layers, for `lazuli status`.

use std::{fmt, io, path::Path};

use format_spec::{Digest, LayerId};
use serde::{Deserialize, Serialize};

/// The truth about a lazy layer under its chain ID, as far as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "truth", rename_all = "snake_case")]
pub enum Truth {
    /// Nothing yet.
    #[default]
    Believed,
    /// Its tar stream has the digest that the chain ID names, and its index says what the stream does.
    Verified,
    /// It is something else: it is not shown.
    Refused {
        /// One line.
        reason: String,
    },
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Believed => f.write_str("believed"),
            Self::Verified => f.write_str("verified"),
            Self::Refused { reason } => write!(f, "refused: {reason}"),
        }
    }
}

/// A lazy layer under the chain ID by which containerd knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainStatus {
    /// The chain ID.
    pub chain: String,
    /// The image that it was pulled for first.
    pub image: String,
    /// The blob of the layer.
    pub blob: Digest,
    /// The layer.
    pub layer: LayerId,
    /// The truth, as far as it is known.
    #[serde(flatten)]
    pub truth: Truth,
    /// Since when, in seconds since 1970.
    pub since: i64,
    /// Since when somebody waits for the verification, in seconds since 1970; `None` when nobody does.
    pub waited_for_since: Option<i64>,
    /// Ids of keys of the configuration that have signed it.
    pub signed_by: Vec<String>,
}

impl ChainStatus {
    /// Reads the file at `path`; without one there are no chains.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or makes no sense.
    pub fn read(path: &Path) -> io::Result<Vec<Self>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}
