//! The order in which sources are served, so that each has the same time whatever it does with it.

use std::{collections::HashMap, sync::Arc, time::Duration};

/// The name of the host that answers, which sources may have in common: see [`crate::Source::origin`].
pub(super) type SourceName = Option<Arc<str>>;

/// The time that each source has had.
#[derive(Debug, Default)]
pub(super) struct Shares {
    times: HashMap<SourceName, Duration>,
    /// The time that a source begins with that was not here before: as much as whoever was served last.
    clock: Duration,
}

impl Shares {
    /// The time that a source has had; whoever has the least is served next.
    pub(super) fn time_of(&self, source: &SourceName) -> Duration {
        self.times.get(source).copied().unwrap_or(self.clock)
    }

    /// A source is served.
    pub(super) fn begin(&mut self, source: &SourceName) {
        let time = self.time_of(source);
        self.clock = self.clock.max(time);
        self.times.insert(source.clone(), time);
    }

    /// It was, for this time.
    pub(super) fn end(&mut self, source: &SourceName, took: Duration) {
        let clock = self.clock;
        *self.times.entry(source.clone()).or_insert(clock) += took;
    }

    /// Forgets the sources that nothing is wanted of.
    pub(super) fn retain(&mut self, is_wanted: impl Fn(&SourceName) -> bool) {
        self.times.retain(|source, _| is_wanted(source));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves so many times; how often each was.
    fn serve(shares: &mut Shares, sources: &[(SourceName, u64)], times: usize) -> Vec<usize> {
        let mut counts = vec![0; sources.len()];
        for _ in 0..times {
            let next = (0..sources.len()).min_by_key(|number| shares.time_of(&sources[*number].0)).unwrap();
            counts[next] += 1;
            let (source, seconds) = &sources[next];
            shares.begin(source);
            shares.end(source, Duration::from_secs(*seconds));
        }
        counts
    }

    #[test]
    fn slow_sources_have_no_more_time_than_a_fast_one() {
        let source = |name: &str, seconds| (Some(Arc::from(name)), seconds);
        let mut shares = Shares::default();
        let mut sources = vec![source("slow", 20), source("also slow", 20), source("fast", 1)];
        assert_eq!(serve(&mut shares, &sources, 220), [10, 10, 200]);
        // One that is new has to make up for nothing, and nobody for it.
        sources.push(source("new", 1));
        let counts = serve(&mut shares, &sources, 42);
        assert!(counts[3].abs_diff(counts[2]) <= 20 && counts[3] > 15, "{counts:?}");
    }
}
