//! Content that comes for a layer without being asked for: its hot pack, and copies of what other layers have.
//!
//! One value says it, and one function changes it. `cache/start_up.rs` tells what happens, `bring.rs` looks.

pub(crate) mod dedup;
pub(crate) mod hot_pack;

/// Content coming for a layer by itself: `H` is a hot pack on its way, `P` a plan of copies, `W` somebody who waits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Warm<H, P, W> {
    /// Nothing, or nothing yet.
    #[default]
    Nothing,
    /// The hot pack, or parts of it.
    Hot(H),
    /// It is being found out what other layers have; these wait for the result.
    Sought(Vec<W>),
    /// Copies of what other layers have; and what they lack of the hot pack, as long as that is received.
    Copies(P, Option<H>),
}

/// The events that change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event<H, P> {
    /// The hot pack is received from now on.
    HotBegins(H),
    /// Readers wait from now on until it is known what other layers have.
    SearchBegins,
    /// It is known: what they have, and what is received of the hot pack beside that.
    Found(Option<P>, Option<H>),
    /// No more of the hot pack comes.
    HotEnds,
    /// Everything was copied, as far as that could be.
    CopyingEnds,
    /// Whoever did all this has ended, however.
    AllEnds,
}

impl<H: Clone, P: Clone, W: Clone> Warm<H, P, W> {
    /// The value after an event, and who has waited for that.
    pub(crate) fn after(&self, event: Event<H, P>) -> (Self, Vec<W>) {
        let after = match (self, event) {
            (Self::Nothing, Event::HotBegins(hot)) => Self::Hot(hot),
            (Self::Nothing, Event::SearchBegins) => Self::Sought(Vec::new()),
            (Self::Nothing | Self::Sought(_), Event::Found(plan, hot)) => Self::of(plan, hot),
            (Self::Hot(_), Event::HotEnds) => Self::Nothing,
            (Self::Copies(plan, _), Event::HotEnds) => Self::Copies(plan.clone(), None),
            (Self::Copies(_, hot), Event::CopyingEnds) => Self::of(None, hot.clone()),
            (_, Event::AllEnds) => Self::Nothing,
            // Steps follow each other: whatever else is told is about something that has ended.
            (same, _) => return (same.clone(), Vec::new()),
        };
        match self {
            Self::Sought(waits) => (after, waits.clone()),
            _ => (after, Vec::new()),
        }
    }

    fn of(plan: Option<P>, hot: Option<H>) -> Self {
        match (plan, hot) {
            (Some(plan), hot) => Self::Copies(plan, hot),
            (None, Some(hot)) => Self::Hot(hot),
            (None, None) => Self::Nothing,
        }
    }

    /// Has somebody wait for the result of the search, if it is under way.
    pub(crate) fn join(&mut self, wait: impl FnOnce() -> W) {
        if let Self::Sought(waits) = self {
            waits.push(wait());
        }
    }

    /// Whether it is being found out what other layers have.
    pub(crate) fn is_sought(&self) -> bool {
        matches!(self, Self::Sought(_))
    }

    /// Whether parts of the hot pack come, or it is not known yet.
    pub(crate) fn is_hot_pack_coming(&self) -> bool {
        matches!(self, Self::Sought(_) | Self::Hot(_) | Self::Copies(_, Some(_)))
    }

    /// Whether nothing comes by itself.
    pub(crate) fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

#[cfg(test)]
mod tests {
    use super::{Event::*, Warm::*, *};

    type State = Warm<&'static str, &'static str, u8>;
    type Happening = Event<&'static str, &'static str>;

    fn sought() -> State {
        Sought(vec![1, 2])
    }

    /// Whatever is not in the table changes nothing.
    #[test]
    fn events_lead_from_state_to_state() {
        let changes = [
            (Nothing, HotBegins("new"), Hot("new")),
            (Nothing, SearchBegins, Sought(vec![])),
            (Nothing, Found(None, Some("rest")), Hot("rest")),
            (Nothing, Found(Some("plan"), None), Copies("plan", None)),
            (Nothing, Found(Some("plan"), Some("rest")), Copies("plan", Some("rest"))),
            (sought(), Found(None, None), Nothing),
            (sought(), Found(None, Some("rest")), Hot("rest")),
            (sought(), Found(Some("plan"), None), Copies("plan", None)),
            (sought(), Found(Some("plan"), Some("rest")), Copies("plan", Some("rest"))),
            (sought(), AllEnds, Nothing),
            (Hot("hot"), HotEnds, Nothing),
            (Hot("hot"), AllEnds, Nothing),
            (Copies("old", None), CopyingEnds, Nothing),
            (Copies("old", None), AllEnds, Nothing),
            (Copies("old", Some("hot")), HotEnds, Copies("old", None)),
            (Copies("old", Some("hot")), CopyingEnds, Hot("hot")),
            (Copies("old", Some("hot")), AllEnds, Nothing),
        ];
        let states = [Nothing, sought(), Hot("hot"), Copies("old", None), Copies("old", Some("hot"))];
        let found = [None, Some("plan")].map(|plan| [None, Some("rest")].map(|rest| Found(plan, rest)));
        let others = [HotBegins("new"), SearchBegins, HotEnds, CopyingEnds, AllEnds];
        for state in states {
            for event in found.into_iter().flatten().chain(others) {
                let change = changes.iter().find(|(from, by, _)| *from == state && *by == event);
                let after = change.map_or(state.clone(), |(.., after)| after.clone());
                // Whoever waits hears of the end of what he waits for, and of nothing else.
                let ended = if state.is_sought() && !after.is_sought() { vec![1, 2] } else { vec![] };
                assert_eq!(state.after(event), (after, ended), "{state:?} and {event:?}");
            }
        }
    }

    #[test]
    fn every_start_up_ends_with_nothing_and_nobody_waits() {
        let ways: [&[Happening]; 5] = [
            &[HotBegins("hot"), HotEnds, AllEnds],
            &[HotBegins("hot"), HotEnds, Found(Some("plan"), None), CopyingEnds, AllEnds],
            &[SearchBegins, Found(Some("plan"), Some("rest")), CopyingEnds, HotEnds, AllEnds],
            &[SearchBegins, Found(Some("plan"), Some("rest")), HotEnds, CopyingEnds, AllEnds],
            &[SearchBegins, AllEnds],
        ];
        for way in ways {
            let (mut state, mut joined, mut ended) = (State::default(), vec![], vec![]);
            for (number, event) in (0..).zip(way) {
                state.join(|| {
                    joined.push(number);
                    number
                });
                let (after, waits) = state.after(*event);
                state = after;
                ended.extend(waits);
            }
            assert_eq!((state, ended), (Nothing, joined), "{way:?}");
        }
    }
}
