//! Waits of readers of lazy layers, in the answer of `lazuli-fused`.

use std::fmt;

use format_spec::LayerId;
use serde::{Deserialize, Serialize};

/// The waits of one layer's readers since the daemon opened it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerWaits {
    /// The layer.
    pub layer: LayerId,
    /// Reads that waited, or wait.
    pub wait_count: u64,
    /// Their times together, up to now, in milliseconds.
    pub waited_ms: u64,
    /// The time during which at least one of them waited, in milliseconds.
    pub blocked_ms: u64,
    /// The longest of those that are over, longest first.
    pub longest: Vec<PastWait>,
    /// Compressed bytes that were fetched because readers wanted them, beside the hot pack.
    pub demanded_bytes: u64,
    /// Compressed bytes of the hot pack that were fetched.
    pub hot_bytes: u64,
    /// The best rate at which one request brought bytes, in bytes a second; `None` where none was long enough to tell.
    pub best_rate: Option<u64>,
}

/// A wait that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastWait {
    /// The file in its layer; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// Where the read began in the file, in bytes.
    pub offset: u64,
    /// When it began, in milliseconds since the layer was opened.
    pub after_ms: u64,
    /// How long it waited, in milliseconds.
    pub waited_ms: u64,
    /// The cause of most of that time.
    pub cause: WaitCause,
}

/// The thing that a read waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitCause {
    /// A look at what other layers have, or a copy from one.
    OtherLayers,
    /// The hot pack, which was on its way.
    HotPack,
    /// A frame that was asked for because of this read.
    Frame,
    /// A frame that was asked for already.
    FrameUnderWay,
    /// Something that a newer daemon knows.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for WaitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherLayers => "a copy from another layer, or a look for one",
            Self::HotPack => "the hot pack, on its way",
            Self::Frame => "a frame that this read asked for",
            Self::FrameUnderWay => "a frame that was under way already",
            Self::Unknown => "something that this version does not know",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_of_a_newer_daemon_are_no_fault() {
        let causes: Vec<WaitCause> = serde_json::from_str(r#"["hot_pack", "frame_under_way", "moon"]"#).unwrap();
        assert_eq!(causes, [WaitCause::HotPack, WaitCause::FrameUnderWay, WaitCause::Unknown]);
    }
}
