//! Between which layers content is copied instead of fetched: whoever may read the one may read the other.
//!
//! A dedup section can name content by its digest alone, and lists of software publish the digests of files. Copied
//! from any layer of the node, content would be shown to who knows no more than that.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Which layers share content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DedupScope {
    /// Those of one repository: one credential reads them all.
    #[default]
    Repository,
    /// Those of one registry.
    Registry,
    /// All of the node.
    Node,
}

/// A word that is no [`DedupScope`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no scope: give repository, registry or node")]
pub struct UnknownScope(String);

impl FromStr for DedupScope {
    type Err = UnknownScope;

    fn from_str(word: &str) -> Result<Self, UnknownScope> {
        match word {
            "repository" => Ok(Self::Repository),
            "registry" => Ok(Self::Registry),
            "node" => Ok(Self::Node),
            _ => Err(UnknownScope(word.to_owned())),
        }
    }
}

impl fmt::Display for DedupScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Repository => "repository",
            Self::Registry => "registry",
            Self::Node => "node",
        })
    }
}
