//! What layers have in common: content that is there twice, files that later layers hide.

use std::collections::HashSet;

use format_spec::{Digest, Index, Inode};
use tree::merge::{MergeError, merge};

use super::{DedupFacts, HiddenFacts, OpenLayer};

/// For every layer, lowest first, what it has twice and what lower layers have; `None` without a dedup section.
pub(super) fn duplicates(layers: &[&OpenLayer]) -> Vec<Option<DedupFacts>> {
    let mut lower: HashSet<Digest> = HashSet::new();
    let mut found = Vec::with_capacity(layers.len());
    for layer in layers {
        let mut own = HashSet::new();
        let mut facts = DedupFacts::default();
        for piece in &layer.pieces {
            let (digest, len) = (piece.digest(), piece.len.get());
            facts.piece_count += 1;
            facts.held_len += len;
            // Counted once, whichever way it is there already.
            if !own.insert(digest) {
                facts.duplicate_len += len;
            } else if lower.contains(&digest) {
                facts.duplicate_of_lower_len += len;
            }
        }
        lower.extend(own);
        found.push(layer.index.dedup().map(|_| facts));
    }
    found
}

/// For every layer, lowest first, the files that the tree of all of them does not show.
pub(super) fn hidden(layers: &[&OpenLayer]) -> Result<Vec<HiddenFacts>, MergeError> {
    if layers.is_empty() {
        return Ok(Vec::new());
    }
    let named: Vec<_> = layers.iter().map(|layer| (layer.lazy.id(), &layer.index)).collect();
    let tree = merge(&named)?;
    let tree = Index::open(tree).map_err(MergeError::from)?;
    let mut hidden: Vec<HiddenFacts> = Vec::with_capacity(layers.len());
    for layer in layers {
        let files = layer.index.inodes().iter().filter(|inode| inode.is_regular());
        hidden.push(files.fold(HiddenFacts::default(), |sum, file| HiddenFacts {
            file_count: sum.file_count + 1,
            hidden_len: sum.hidden_len + stored_len(&layer.index, file),
        }));
    }
    for file in tree.inodes().iter().filter(|inode| inode.is_regular()) {
        let number = file.layer.get() as usize;
        let (Some(facts), Some(layer)) = (hidden.get_mut(number), layers.get(number)) else { continue };
        facts.file_count = facts.file_count.saturating_sub(1);
        facts.hidden_len = facts.hidden_len.saturating_sub(stored_len(&layer.index, file));
    }
    Ok(hidden)
}

/// Content of a file without its holes.
fn stored_len(index: &Index<Vec<u8>>, file: &Inode) -> u64 {
    index.extents()[index.extents_in_plain(&file.plain_range())].iter().map(|extent| extent.len.get()).sum()
}
