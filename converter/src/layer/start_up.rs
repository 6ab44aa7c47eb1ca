//! From what a start of an image reads to the hot pieces of its layers.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    sync::Arc,
};

use format_spec::{Digest, HotPiece, Index, Inode, profile::Profile, records::PLAIN_ALIGN};
use tree::merge::{MergeError, merge};

use crate::{
    hot_set::{FileContent, HotRange, StartConfig, derive, hot_set_of, unknown_count},
    layer::frame_reader::FrameReader,
};

/// Where it is known from what a start reads.
#[derive(Debug, Clone, Default)]
pub enum HotPackChoice {
    /// From the image: its command, interpreters, libraries, runtimes.
    #[default]
    Derived,
    /// From a recorded profile.
    Profile {
        /// What it says.
        profile: Arc<Profile>,
        /// Digest of its file, which names it.
        digest: Digest,
    },
    /// Nowhere: there are no hot packs.
    None,
}

/// A layer whose files can be looked at.
#[derive(Debug)]
pub struct ReadableLayer<'a> {
    /// The original blob.
    pub digest: Digest,
    /// Its index, checked.
    pub index: &'a Index<Vec<u8>>,
    /// Reads its files.
    pub reader: FrameReader<'a, Vec<u8>>,
}

/// The start of an image cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum StartUpError {
    /// The layers make no tree.
    #[error(transparent)]
    Merge(#[from] MergeError),
}

/// The hot pieces of each layer, by the digest of its original blob, in the order of first access.
///
/// `layers` stand as in the manifest, lowest first; those that cannot be looked at are left out.
///
/// # Errors
///
/// When the layers make no tree.
pub fn choose_hot_pieces(
    layers: Vec<ReadableLayer<'_>>,
    choice: &HotPackChoice,
    config: &[u8],
) -> Result<HashMap<Digest, Vec<HotPiece>>, StartUpError> {
    if layers.is_empty() || matches!(choice, HotPackChoice::None) {
        return Ok(HashMap::new());
    }
    let indexes: Vec<(Digest, &Index<Vec<u8>>)> = layers.iter().map(|layer| (layer.digest, layer.index)).collect();
    let tree = Index::open(merge(&indexes)?).map_err(MergeError::Format)?;
    let hot = match choice {
        HotPackChoice::None => Vec::new(),
        HotPackChoice::Profile { profile, .. } => {
            let unknown_count = unknown_count(profile, &tree);
            if unknown_count > 0 {
                tracing::warn!("files of the profile that the image does not have: {unknown_count}; record it again");
            }
            hot_set_of(profile, &tree)
        }
        HotPackChoice::Derived => {
            // A hot pack is a hint: an image whose start cannot be told goes without.
            match StartConfig::from_json(config) {
                Ok(config) => derive(&tree, &mut ImageFiles(layers), &config),
                Err(error) => {
                    tracing::warn!(%error, "no hot packs: the config does not say how the image starts");
                    Vec::new()
                }
            }
        }
    };
    Ok(place(&tree, &hot))
}

/// The files of an image, read through the layers that hold them.
#[derive(Debug)]
struct ImageFiles<'a>(Vec<ReadableLayer<'a>>);

impl FileContent for ImageFiles<'_> {
    fn read_at(&mut self, inode: &Inode, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let layer = self.0.get_mut(inode.layer.get() as usize).ok_or(io::ErrorKind::NotFound)?;
        let file = inode.plain_range();
        let start = file.start.saturating_add(offset).min(file.end);
        layer.reader.read(start..start.saturating_add(len as u64).min(file.end))
    }
}

/// Ranges of files as pieces of the layers that hold the files.
fn place(tree: &Index<Vec<u8>>, hot: &[HotRange]) -> HashMap<Digest, Vec<HotPiece>> {
    let layers: Vec<Digest> = tree.layers().collect();
    let mut packs: HashMap<Digest, LayerPack> = HashMap::new();
    for HotRange { inode, range, reason } in hot {
        let Some(inode) = tree.inode(*inode).filter(|inode| inode.is_regular()) else { continue };
        let Some(layer) = layers.get(inode.layer.get() as usize) else { continue };
        let file = inode.plain_range();
        let start = file.start + range.start / PLAIN_ALIGN * PLAIN_ALIGN;
        let end = file.end.min(file.start + range.end.min(inode.size.get()).next_multiple_of(PLAIN_ALIGN));
        if start < end {
            packs.entry(*layer).or_default().push(start..end, *reason);
        }
    }
    packs.into_iter().map(|(layer, pack)| (layer, pack.pieces)).collect()
}

/// The pieces of one layer.
#[derive(Debug, Default)]
struct LayerPack {
    pieces: Vec<HotPiece>,
    /// Where each of them starts and ends.
    taken: BTreeMap<u64, u64>,
}

impl LayerPack {
    /// Adds a piece unless some of it is there: an image may have the same layer twice.
    fn push(&mut self, plain: Range<u64>, reason: u32) -> bool {
        let is_taken = self.taken.range(..plain.end).next_back().is_some_and(|(_, end)| *end > plain.start);
        let Ok(len) = u32::try_from(plain.end - plain.start) else { return false };
        if !is_taken {
            self.taken.insert(plain.start, plain.end);
            self.pieces.push(HotPiece { plain_offset: plain.start.into(), len: len.into(), reason: reason.into() });
        }
        !is_taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_taken_once() {
        let mut pack = LayerPack::default();
        let added =
            [4096..8192, 0..4096, 4096..5000, 8192..8200, 8000..9000, 4096..8192].map(|range| pack.push(range, 1));
        assert_eq!(added, [true, true, false, true, false, false]);
        assert_eq!(
            pack.pieces.iter().map(HotPiece::plain_range).collect::<Vec<_>>(),
            [4096..8192, 0..4096, 8192..8200]
        );
    }
}
