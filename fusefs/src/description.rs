//! How the cache of a node describes a place of a layer: by the reference of its image; and what follows from that.

use control::{DedupScope, host_of, repository_of};
use serde_json::Value;

/// The key of the image reference.
pub(crate) const IMAGE: &str = "image";

/// The question of storage: layers with equal answers share content.
pub fn domain_of(scope: DedupScope) -> fn(&Value) -> String {
    match scope {
        DedupScope::Repository => |layer| repository_of(image_of(layer)).to_owned(),
        DedupScope::Registry => |layer| host_of(image_of(layer)).to_owned(),
        DedupScope::Node => |_| String::new(),
    }
}

/// The repository that a layer comes from.
pub(crate) fn owner_of(layer: &Value) -> String {
    repository_of(image_of(layer)).to_owned()
}

fn image_of(layer: &Value) -> &str {
    layer.get(IMAGE).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn layers_of_one_repository_share_whatever_tag_or_digest_named_them() {
        let share = |scope: DedupScope, one: &str, other: &str| {
            let [one, other] = [one, other].map(|image| domain_of(scope)(&json!({ IMAGE: image })));
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
