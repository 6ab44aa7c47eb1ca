//! Whose request is made next: slots and turns.

use std::{collections::HashMap, sync::Arc};

use super::options::RequestLimits;

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
}

/// A request that runs, as far as it takes a slot away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) layer: u64,
    pub(crate) place: u64,
    pub(crate) source: Arc<str>,
    /// Whether it is of the class that is looked at.
    pub(crate) is_of_class: bool,
}

/// Chooses among `candidates` with the requests of `running`; `None` if none of them may have a slot.
///
/// Of those that may, the one whose source, then whose layer has the fewest, then who has waited longest for its turn.
pub(crate) fn choose<'a>(
    candidates: impl IntoIterator<Item = &'a Candidate>,
    running: &[Taken],
    limits: RequestLimits,
) -> Option<&'a Candidate> {
    let (mut at_source, mut of_layer, mut at_place) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut on_node = 0;
    for taken in running {
        *at_place.entry((taken.layer, taken.place)).or_insert(0) += 1;
        if taken.is_of_class {
            on_node += 1;
            *at_source.entry(&*taken.source).or_insert(0) += 1;
            *of_layer.entry(taken.layer).or_insert(0) += 1;
        }
    }
    let counts = |candidate: &Candidate| {
        let source = at_source.get(&*candidate.source).copied().unwrap_or(0);
        (source, of_layer.get(&candidate.layer).copied().unwrap_or(0))
    };
    let may_start = |candidate: &&Candidate| {
        let (source, layer) = counts(candidate);
        let place = at_place.get(&(candidate.layer, candidate.place)).copied().unwrap_or(0);
        let has_node_slot = on_node < limits.node || source == 0;
        has_node_slot && source < limits.source && layer < limits.layer && place < candidate.window
    };
    candidates
        .into_iter()
        .filter(may_start)
        .min_by_key(|candidate| (counts(candidate), candidate.last_turn, candidate.layer))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RequestLimits = RequestLimits { node: 6, source: 4, layer: 3 };

    fn candidate(layer: u64, source: &str, last_turn: u64) -> Candidate {
        Candidate { layer, place: layer, source: source.into(), window: 64, last_turn }
    }

    fn taken(layer: u64, source: &str, count: usize) -> Vec<Taken> {
        vec![Taken { layer, place: layer, source: source.into(), is_of_class: true }; count]
    }

    /// Who gets the slot of `candidates`, with so many running of each layer and source.
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
        // The node has none left: only for who has none at all.
        let full = [(1, "slow", 3), (4, "other", 3)];
        assert_eq!(chosen(&[a.clone(), b], &full), None);
        assert_eq!(chosen(&[a, c.clone()], &full), Some(3));
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
