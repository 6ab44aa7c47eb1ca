//! What a hot pack holds and why, in the words of files.

use std::collections::BTreeSet;

use format_spec::{HotPiece, Index, paths::Paths, records::hot_reason};
use serde::Serialize;

/// A hot pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HotPackFacts {
    /// Length of what it holds, in bytes.
    pub held_len: u64,
    /// Number of files that it holds something of.
    pub file_count: u64,
    /// Number of pieces.
    pub piece_count: u64,
    /// The same by reason, most bytes first.
    pub reasons: Vec<ReasonFacts>,
    /// Everything in it, in the order of first access; empty unless asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pieces: Vec<HotEntry>,
}

/// What is in a hot pack for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReasonFacts {
    /// The reason.
    pub hot_reason: &'static str,
    /// Number of files.
    pub file_count: u64,
    /// Length of what is held of them, in bytes.
    pub held_len: u64,
}

/// A piece of a hot pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HotEntry {
    /// The file.
    pub path: String,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub len: u64,
    /// Why it is there.
    pub hot_reason: &'static str,
}

/// A reason in one word.
fn word(reason: u32) -> &'static str {
    match reason {
        hot_reason::PROFILE => "profile",
        hot_reason::COMMAND => "command",
        hot_reason::INTERPRETER => "interpreter",
        hot_reason::LIBRARY => "library",
        hot_reason::SYSTEM => "system",
        hot_reason::RUNTIME => "runtime",
        _ => "other",
    }
}

/// The hot pack of a layer; `None` without one.
pub(crate) fn facts<B: AsRef<[u8]>>(index: &Index<B>, with_list: bool) -> Option<HotPackFacts> {
    let pieces = index.hot_pieces();
    if pieces.is_empty() {
        return None;
    }
    let paths = Paths::new(index);
    let file = |piece: &HotPiece| paths.file_at(piece.plain_offset.get()).unwrap_or_default();
    let entry = |piece: &HotPiece| {
        let (inode, offset) = file(piece);
        HotEntry { path: paths.path(inode), offset, len: piece.len.get().into(), hot_reason: word(piece.reason.get()) }
    };
    let files_of = |pieces: &mut dyn Iterator<Item = &HotPiece>| {
        pieces.map(|piece| file(piece).0).collect::<BTreeSet<_>>().len() as u64
    };
    let words: BTreeSet<&'static str> = pieces.iter().map(|piece| word(piece.reason.get())).collect();
    let mut reasons: Vec<ReasonFacts> = words
        .into_iter()
        .map(|reason| {
            let own = || pieces.iter().filter(|piece| word(piece.reason.get()) == reason);
            ReasonFacts { hot_reason: reason, file_count: files_of(&mut own()), held_len: len_of(own()) }
        })
        .collect();
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.held_len));
    Some(HotPackFacts {
        held_len: len_of(pieces.iter()),
        file_count: files_of(&mut pieces.iter()),
        piece_count: pieces.len() as u64,
        reasons,
        pieces: if with_list { pieces.iter().map(entry).collect() } else { Vec::new() },
    })
}

fn len_of<'a>(pieces: impl Iterator<Item = &'a HotPiece>) -> u64 {
    pieces.map(|piece| u64::from(piece.len.get())).sum()
}
