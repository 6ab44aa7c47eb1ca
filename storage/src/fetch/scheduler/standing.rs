//! The standing of each source, whatever layers it was asked for: who was served last, and who brings something.

use std::{collections::HashMap, sync::Arc, time::Duration};

/// The turn of a source that brings nothing doubles this many times: a slow link must get a frame through.
const DOUBLINGS_MAX: u32 = 2;

/// One source, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Standing {
    /// When the last request to it was begun: a number that grows with each.
    pub(crate) last_turn: u64,
    /// Whether right bytes have come from it, and no turn without any was since.
    pub(crate) is_proven: bool,
    /// Turns without any right bytes, since some came.
    pub(crate) fruitless_turns: u32,
    /// Requests before this one have been judged: those that ran together count once.
    pub(super) judged_until: u64,
}

impl Standing {
    /// How long a request of it keeps a slot that a source without any wants; `turn` is the shortest.
    pub(super) fn turn(self, turn: Duration) -> Duration {
        turn.saturating_mul(1 << self.fruitless_turns.min(DOUBLINGS_MAX))
    }
}

/// The standings of all sources that have been asked; others have none.
#[derive(Debug, Default)]
pub(super) struct Standings(HashMap<Arc<str>, Standing>);

impl Standings {
    pub(super) fn of(&self, source: &str) -> Standing {
        self.0.get(source).copied().unwrap_or_default()
    }

    /// A request is begun.
    pub(super) fn note_turn(&mut self, source: &Arc<str>, turn: u64) {
        self.0.entry(source.clone()).or_default().last_turn = turn;
    }

    /// Right bytes have come.
    pub(super) fn note_right(&mut self, source: &Arc<str>) {
        let standing = self.0.entry(source.clone()).or_default();
        (standing.is_proven, standing.fruitless_turns) = (true, 0);
    }

    /// A request has had its time, and brought nothing or too little.
    pub(super) fn note_fruitless(&mut self, source: &Arc<str>, request: u64) {
        let standing = self.0.entry(source.clone()).or_default();
        standing.is_proven = false;
        if request < standing.judged_until {
            return;
        }
        standing.judged_until = standing.last_turn + 1;
        standing.fruitless_turns = standing.fruitless_turns.saturating_add(1);
    }

    /// Forgets the sources that nobody names any longer.
    pub(super) fn retain(&mut self, is_named: impl Fn(&str) -> bool) {
        self.0.retain(|source, _| is_named(source));
    }
}
