//! Content that will be read soon, by what somebody knows of earlier starts: fetched before it is read.
//!
//! Only a hint: what is there, or comes by itself, is left alone, and a failure is nobody's.

use std::{collections::HashSet, ops::Range};

use crate::{fetch::scheduler::Priority, layer::Layer};

/// The frames that are fetched ahead for one start, and how much more may be.
#[derive(Debug)]
pub struct Foresight {
    len_left: u64,
    /// Numbers of layers and of their frames that were looked at.
    seen: HashSet<(u64, u32)>,
}

impl Foresight {
    /// Nothing yet, and no more than `len_max` compressed bytes.
    pub fn new(len_max: u64) -> Self {
        Self { len_left: len_max, seen: HashSet::new() }
    }

    /// Wants what plain ranges of a layer miss, in their order; neighbours come in one request. Returns how many
    /// compressed bytes that are. Does not block.
    pub fn want(&mut self, layer: &Layer, ranges: &[Range<u64>]) -> u64 {
        let (core, records) = (layer.core(), layer.index().frames());
        if core.store.is_complete() || core.store.is_disk_refusing() {
            return 0;
        }
        let (mut frames, mut wanted_len) = (Vec::new(), 0);
        for frame in ranges.iter().flat_map(|plain| layer.inner().frames_to_fetch(plain.clone())) {
            let Some(record) = records.get(frame as usize) else { continue };
            if !self.seen.insert((core.number, frame)) {
                continue;
            }
            let len = u64::from(record.compressed_len.get());
            if len > self.len_left {
                self.len_left = 0;
                break;
            }
            self.len_left -= len;
            wanted_len += len;
            frames.push(frame);
        }
        layer.inner().scheduler.want(core, frames, Priority::HotPack, None);
        wanted_len
    }
}

impl Layer {
    /// Whether its hot pack is on its way, or it is being found out what of it is needed.
    pub fn is_hot_pack_coming(&self) -> bool {
        self.inner().warm().is_hot_pack_coming()
    }
}
