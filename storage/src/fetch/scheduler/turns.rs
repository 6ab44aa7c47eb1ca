//! Whose request is made next: slots and turns.

use std::{collections::HashMap, sync::Arc};

use super::{options::RequestLimits, standing::Standing};

/// A layer that has something to ask for, and the place that it would ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) layer: u64,
    pub(crate) place: u64,
    pub(crate) source: Arc<str>,
    /// Requests that the place may have at the same time, of all classes.
    pub(crate) window: usize,
    /// When its last request was begun: a number that grows with each.
    pub(crate) last_turn: u64,
    /// The standing of the source.
    pub(crate) standing: Standing,
}

/// A request that runs, as far as it takes a slot away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) layer: u64,
    pub(crate) place: u64,
    pub(crate) source: Arc<str>,
    /// Whether it is of the class that is looked at.
    pub(crate) is_of_class: bool,
    /// Whether the source is.
    pub(crate) is_proven: bool,
}

/// The slots of a class.
#[derive(Debug)]
pub(crate) struct Slots<'a> {
    limits: RequestLimits,
    on_node: usize,
    /// Those of sources that are not proven.
    unproven: usize,
    at_source: HashMap<&'a str, usize>,
    of_layer: HashMap<u64, usize>,
    /// Those of all classes.
    at_place: HashMap<(u64, u64), usize>,
}

impl<'a> Slots<'a> {
    pub(crate) fn new(running: &'a [Taken], limits: RequestLimits) -> Self {
        let (at_source, of_layer, at_place) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut slots = Self { limits, on_node: 0, unproven: 0, at_source, of_layer, at_place };
        for taken in running {
            *slots.at_place.entry((taken.layer, taken.place)).or_insert(0) += 1;
            if taken.is_of_class {
                slots.on_node += 1;
                slots.unproven += usize::from(!taken.is_proven);
                *slots.at_source.entry(&taken.source).or_insert(0) += 1;
                *slots.of_layer.entry(taken.layer).or_insert(0) += 1;
            }
        }
        slots
    }

    /// Those that a source has.
    pub(crate) fn at_source(&self, source: &str) -> usize {
        self.at_source.get(source).copied().unwrap_or(0)
    }

    fn of_layer(&self, layer: u64) -> usize {
        self.of_layer.get(&layer).copied().unwrap_or(0)
    }

    /// Whether a source may have one more.
    pub(crate) fn has_room_for(&self, source: &str, standing: Standing) -> bool {
        match self.at_source(source) {
            0 => self.on_node < self.limits.node_max() && (standing.is_proven || self.unproven < self.limits.node),
            count => standing.fruitless_turns == 0 && count < self.limits.source && self.on_node < self.limits.node,
        }
    }

    /// Whether a place may be asked once more.
    pub(crate) fn is_open(&self, layer: u64, place: u64, window: usize) -> bool {
        self.at_place.get(&(layer, place)).copied().unwrap_or(0) < window
    }

    /// Whether everything allows a request but the room that is left.
    fn is_allowed(&self, candidate: &Candidate) -> bool {
        self.of_layer(candidate.layer) < self.limits.layer
            && self.is_open(candidate.layer, candidate.place, candidate.window)
    }

    /// Whether its source has no slot because others have them all.
    pub(crate) fn is_crowded_out(&self, candidate: &Candidate) -> bool {
        let has_none = self.at_source(&candidate.source) == 0;
        has_none && self.is_allowed(candidate) && !self.has_room_for(&candidate.source, candidate.standing)
    }

    /// Whether only the slot of a source that is not proven is of use to it.
    pub(crate) fn is_full_of_unproven_for(&self, candidate: &Candidate) -> bool {
        !candidate.standing.is_proven && self.unproven >= self.limits.node
    }
}

/// Chooses among `candidates` with the requests of `running`; `None` if none of them may have a slot.
///
/// Of those that may, the one whose source has the fewest and has waited longest for its turn, then whose layer.
pub(crate) fn choose<'a>(
    candidates: impl IntoIterator<Item = &'a Candidate>,
    running: &[Taken],
    limits: RequestLimits,
) -> Option<&'a Candidate> {
    let slots = Slots::new(running, limits);
    let may_start = |candidate: &&Candidate| {
        slots.is_allowed(candidate) && slots.has_room_for(&candidate.source, candidate.standing)
    };
    candidates.into_iter().filter(may_start).min_by_key(|candidate| {
        let of_source = (slots.at_source(&candidate.source), candidate.standing.last_turn);
        (of_source, slots.of_layer(candidate.layer), candidate.last_turn, candidate.layer)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RequestLimits = RequestLimits { node: 6, source: 4, layer: 3 };

    fn candidate(layer: u64, source: &str, last_turn: u64) -> Candidate {
        Candidate { layer, place: layer, source: source.into(), window: 64, last_turn, standing: Standing::default() }
    }

    fn taken(layer: u64, source: &str, count: usize) -> Vec<Taken> {
        vec![Taken { layer, place: layer, source: source.into(), is_of_class: true, is_proven: false }; count]
    }

    /// The layer among `candidates` that gets the slot, with so many running of each layer and source.
    fn chosen(candidates: &[Candidate], running: &[(u64, &str, usize)]) -> Option<u64> {
        let running: Vec<_> = running.iter().flat_map(|(layer, source, count)| taken(*layer, source, *count)).collect();
        choose(candidates, &running, LIMITS).map(|candidate| candidate.layer)
    }

    #[test]
    fn slots_and_turns() {
        let (a, b, c) = (candidate(1, "slow", 5), candidate(2, "slow", 3), candidate(3, "fast", 9));
        let all = [a.clone(), b.clone(), c.clone()];
        // Nobody has any: who waited longest.
        assert_eq!(chosen(&all, &[]), Some(2));
        // The source with the fewest, then the layer with the fewest.
        assert_eq!(chosen(&all, &[(1, "slow", 1)]), Some(3));
        assert_eq!(chosen(&all, &[(1, "slow", 1), (3, "fast", 2)]), Some(2));
        assert_eq!(chosen(&[a.clone(), b.clone()], &[(1, "slow", 1), (2, "slow", 1)]), Some(2));
        // A layer that has its slots, a source that has.
        assert_eq!(chosen(std::slice::from_ref(&a), &[(1, "slow", 3)]), None);
        assert_eq!(chosen(&[a.clone(), b.clone()], &[(1, "slow", 3)]), Some(2));
        assert_eq!(chosen(&[a.clone(), b.clone()], &[(1, "slow", 3), (2, "slow", 1)]), None);
        // The node has none left: only for who has none at all, and not for everybody.
        let full = [(1, "slow", 3), (4, "other", 3)];
        assert_eq!(chosen(&[a.clone(), b], &full), None);
        assert_eq!(chosen(&[a, c.clone()], &full), None, "nobody has brought anything");
        let proven = Candidate { standing: Standing { is_proven: true, ..Standing::default() }, ..c.clone() };
        assert_eq!(chosen(std::slice::from_ref(&proven), &full), Some(3));
        let more = ["d", "e", "f", "g", "h", "i"].map(|source| (5, source, 1));
        assert_eq!(chosen(&[proven], &[&full[..], &more].concat()), None);
        assert_eq!(chosen(&[c], &[(1, "slow", 3), (4, "other", 2), (3, "fast", 1)]), None);
    }

    #[test]
    fn requests_of_other_classes_take_no_slots_but_fill_the_window_of_a_place() {
        let slow = Candidate { window: 2, ..candidate(1, "slow", 0) };
        let others: Vec<_> =
            taken(1, "slow", 2).into_iter().map(|taken| Taken { is_of_class: false, ..taken }).collect();
        assert_eq!(choose([&slow], &others, LIMITS), None);
        assert_eq!(choose([&slow], &others[1..], LIMITS), Some(&slow));
        assert_eq!(
            choose([&candidate(1, "slow", 0)], &others, RequestLimits { node: 1, source: 1, layer: 1 })
                .map(|found| found.layer),
            Some(1)
        );
    }
}
