//! Manifests, indexes of images and configs: JSON of strangers.

use converter::manifest::{ImageConfig, ImageIndex, ImageManifest, Platform};
use serde::{Serialize, de::DeserializeOwned};

use super::choose;

/// First byte: what the rest is taken for.
pub(crate) fn run(data: &[u8]) {
    match choose(data, 3) {
        Some((0, rest)) => _ = round_trip::<ImageManifest>(rest),
        Some((1, rest)) => {
            let Some(index) = round_trip::<ImageIndex>(rest) else { return };
            let _ = index.platforms();
            let platform = Platform::host();
            for found in index.manifests.iter().filter_map(|manifest| manifest.platform.as_ref()) {
                platform.accepts(&found.os, &found.architecture, found.variant.as_deref());
            }
        }
        Some((_, rest)) => _ = serde_json::from_slice::<ImageConfig>(rest),
        None => {}
    }
}

/// What was read is written and read again: nothing is lost or added.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq>(data: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let written = serde_json::to_vec(&value).expect("maps have text keys");
    let again: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert!(again == value, "the same comes back");
    assert_eq!(serde_json::to_vec(&again).expect("as before"), written, "equal values give equal bytes");
    Some(value)
}
