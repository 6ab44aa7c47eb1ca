//! Between which layers content is copied instead of fetched: whoever may read the one may read the other.
//!
//! A dedup section can name content by its digest alone, and lists of software publish the digests of files. Copied
//! from any layer of the node, content would be shown to who knows no more than that.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::protocol::{host_of, repository_of};

/// The key under which a layer's description in storage has the reference of its image.
pub const IMAGE: &str = "image";

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

impl DedupScope {
    /// The question of storage: layers with equal answers share content.
    pub fn domain(self) -> fn(&Value) -> String {
        match self {
            Self::Repository => |layer| repository_of(image_of(layer)).to_owned(),
            Self::Registry => |layer| host_of(image_of(layer)).to_owned(),
            Self::Node => |_| String::new(),
        }
    }
}

/// The repository that a layer comes from, by its description in storage.
pub fn owner_of(layer: &Value) -> String {
    repository_of(image_of(layer)).to_owned()
}

fn image_of(layer: &Value) -> &str {
    layer.get(IMAGE).and_then(Value::as_str).unwrap_or_default()
}

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn layers_of_one_repository_share_whatever_tag_or_digest_named_them() {
        let share = |scope: DedupScope, one: &str, other: &str| {
            let [one, other] = [one, other].map(|image| scope.domain()(&json!({ IMAGE: image })));
            one == other
        };
        let digest = format!("host:5000/team/app@sha256:{}", "0".repeat(64));
        for (one, other, scopes) in [
            ("host:5000/team/app:1", digest.as_str(), [true, true, true]),
            ("host:5000/team/app:1", "host:5000/team/app:2@sha256:00", [true, true, true]),
            ("host:5000/team/app:1", "host:5000/team/other:1", [false, true, true]),
            ("host:5000/team/app:1", "host:5001/team/app:1", [false, false, true]),
            ("host/team/app:1", "host:443/team/app:1", [false, false, true]),
            ("host/team/app:1", "HOST/team/app:1", [false, false, true]),
            ("host:5000/team/app", "host:5000/team/apple", [false, true, true]),
        ] {
            let found = [DedupScope::Repository, DedupScope::Registry, DedupScope::Node].map(|s| share(s, one, other));
            assert_eq!(found, scopes, "{one} {other}");
        }
    }
}
