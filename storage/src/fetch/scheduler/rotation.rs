//! Slots that change hands where more sources want one than there are slots: see [`super::RequestLimits`].

use std::{cmp::Reverse, time::Instant};

use super::{
    machine::{Class, Effect, Machine, Outcome, Running, Waiter},
    turns::{Candidate, Slots},
};
use crate::fetch::source::SourceError;

impl<W: Waiter> Machine<W> {
    /// Gives slots of requests whose turn is over to sources that have none.
    pub(super) fn rotate(&mut self, now: Instant) {
        for class in Class::ALL {
            // Those that get a slot have their turn now, so this ends.
            while let Some(request) = self.next_to_yield(class, now) {
                if let Some(running) = self.running.get(&request) {
                    running.link.displace();
                    running.link.set_reason(SourceError::passing("too many sources wait, and it was slow"));
                    self.effects.push_back(Effect::Cancel(running.link.clone()));
                }
                self.end(request, Outcome::Displaced, now);
            }
        }
    }

    /// The request that gives its slot to the source that has waited longest for one, if there is such a pair.
    fn next_to_yield(&mut self, class: Class, now: Instant) -> Option<u64> {
        let candidates = self.candidates(class, now);
        let taken = self.taken(class);
        let slots = Slots::new(&taken, self.limits(class));
        let mut waiting: Vec<&Candidate> =
            candidates.iter().filter(|candidate| slots.is_crowded_out(candidate)).collect();
        waiting.sort_by_key(|candidate| candidate.standing.last_turn);
        waiting.into_iter().find_map(|candidate| {
            let must_be_unproven = slots.is_full_of_unproven_for(candidate);
            let may_yield = |running: &Running| {
                let standing = self.standings.of(&running.place.source);
                let is_only_one = slots.at_source(&running.place.source) == 1;
                let turn = if is_only_one { standing.turn(self.options.turn) } else { self.options.turn };
                let has_had_turn = now.duration_since(running.started) >= turn;
                let is_sources_turn = running.link.is_waiting();
                running.class == class && has_had_turn && is_sources_turn && !(must_be_unproven && standing.is_proven)
            };
            let yielding = self.running.iter().filter(|(_, running)| may_yield(running));
            let number =
                yielding.min_by_key(|(request, running)| (Reverse(slots.at_source(&running.place.source)), **request));
            number.map(|(request, _)| *request)
        })
    }

    /// A request does not run any longer: what that says of its source.
    pub(super) fn note_end_of_turn(
        &mut self,
        request: u64,
        running: &Running,
        outcome: Option<&Outcome>,
        now: Instant,
    ) {
        let source = &running.place.source;
        let has_had_turn = now.duration_since(running.started) >= self.standings.of(source).turn(self.options.turn);
        let is_fruitless = match outcome {
            Some(Outcome::Slow) => true,
            Some(Outcome::Done) => false,
            _ => has_had_turn && !running.has_brought,
        };
        if is_fruitless {
            self.standings.note_fruitless(source, request);
        }
    }
}
