//! Manifests, indexes of images and configs: JSON of strangers.

use converter::image::{
    manifest::{ImageConfig, ImageIndex, ImageManifest, IndexEntry},
    platform::Platform,
};
use serde::{Serialize, de::DeserializeOwned};

use super::choose;

/// First byte: what the rest is taken for.
pub(crate) fn run(data: &[u8]) {
    match choose(data, 3) {
        Some((0, rest)) => _ = round_trip::<ImageManifest>(rest),
        Some((1, rest)) => {
            let Some(index) = round_trip::<ImageIndex>(rest) else { return };
            let platforms: Vec<_> = index.manifests.iter().filter_map(IndexEntry::platform).collect();
            let host = Platform::host();
            if let Some((chosen, count)) = host.choose(platforms.iter().map(|found| (found, found))) {
                assert_eq!(host.rank(chosen), platforms.iter().filter_map(|found| host.rank(found)).min(), "the best");
                assert!(1 <= count && count <= platforms.len());
            }
            for found in &platforms {
                // Whoever wants exactly what an image says gets it.
                assert_eq!(Platform::of(found).rank(found), Some(0));
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
