//! Frames that the disk did not take, in memory for a while: who reads a file piece by piece does not fetch the same
//! frame again and again.
//!
//! One for all layers of a cache, so that a full disk costs the same memory however many layers are read.

use std::collections::VecDeque;

use bytes::Bytes;
use format_spec::LayerId;

use crate::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
    lock,
};

/// Most bytes of frames: at usual lengths sixteen of them, or eight of the longest. Older ones give way.
pub(crate) const UNKEPT_LEN_MAX: usize = 32 << 20;
/// Most frames: short ones are looked for one by one.
const UNKEPT_COUNT_MAX: usize = 64;

/// The frames. Safe from many threads.
#[derive(Debug, Default)]
pub(crate) struct Unkept {
    frames: Mutex<VecDeque<(LayerId, u32, Bytes)>>,
    /// Costs a read one load as long as the disk takes everything.
    has_any: AtomicBool,
}

impl Unkept {
    /// Keeps a frame of a layer.
    pub(crate) fn keep(&self, layer: LayerId, frame: u32, content: Bytes) {
        let mut frames = lock(&self.frames);
        frames.retain(|(of, number, _)| (*of, *number) != (layer, frame));
        frames.push_back((layer, frame, content));
        let mut len: usize = frames.iter().map(|(_, _, content)| content.len()).sum();
        while len > UNKEPT_LEN_MAX || frames.len() > UNKEPT_COUNT_MAX {
            let Some((_, _, oldest)) = frames.pop_front() else { break };
            len -= oldest.len();
        }
        self.has_any.store(true, Ordering::Release);
    }

    /// A frame of a layer, if it is here.
    pub(crate) fn find(&self, layer: LayerId, frame: u32) -> Option<Bytes> {
        if !self.has_any.load(Ordering::Acquire) {
            return None;
        }
        let frames = lock(&self.frames);
        frames.iter().find(|(of, number, _)| (*of, *number) == (layer, frame)).map(|(_, _, content)| content.clone())
    }

    /// The disk takes the frames of a layer again.
    pub(crate) fn forget(&self, layer: LayerId) {
        let mut frames = lock(&self.frames);
        frames.retain(|(of, _, _)| *of != layer);
        self.has_any.store(!frames.is_empty(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, limits::FRAME_PLAIN_LEN_MAX};

    use super::*;

    fn len_of(unkept: &Unkept) -> usize {
        lock(&unkept.frames).iter().map(|(_, _, content)| content.len()).sum()
    }

    #[test]
    fn a_full_disk_costs_the_same_memory_however_many_layers_are_read() {
        let unkept = Unkept::default();
        let longest = Bytes::from(vec![1; FRAME_PLAIN_LEN_MAX as usize]);
        let layers: Vec<_> = (0..40u8).map(|number| Digest::of(&[number])).collect();
        for layer in &layers {
            for frame in 0..10 {
                unkept.keep(*layer, frame, longest.clone());
                assert!(len_of(&unkept) <= UNKEPT_LEN_MAX);
                assert!(unkept.find(*layer, frame).is_some(), "the newest one is there");
            }
        }
        assert_eq!(unkept.find(layers[39], 1), None, "the oldest ones went");
        for frame in 0..1000 {
            unkept.keep(layers[0], frame, Bytes::from_static(b"short"));
        }
        assert_eq!(lock(&unkept.frames).len(), UNKEPT_COUNT_MAX);
    }

    #[test]
    fn frames_go_when_the_disk_takes_them_again() {
        let unkept = Unkept::default();
        let layers = [Digest::of(b"one"), Digest::of(b"other")];
        layers.iter().for_each(|layer| unkept.keep(*layer, 7, Bytes::from_static(b"frame")));
        unkept.forget(layers[0]);
        assert_eq!((unkept.find(layers[0], 7), unkept.find(layers[1], 7)), (None, Some(Bytes::from_static(b"frame"))));
        unkept.forget(layers[1]);
        assert_eq!(len_of(&unkept), 0);
    }
}
