//! How Lazuli's starts compare with the fastest of the peers.

use std::collections::BTreeMap;

use lazuli_tests::start::Measured;

use super::{options::Way, ready, report};

/// A line for each of Lazuli's ways that was measured: its median beside that of the peer whose median is the least; none
/// without peers.
pub(super) fn lines(image: &str, link: &str, measured: &BTreeMap<Way, Vec<Measured>>) -> Vec<String> {
    let medians: Vec<(Way, f64)> = measured
        .iter()
        .map(|(way, starts)| (*way, report::median(starts.iter().map(|start| ready(start).as_secs_f64()))))
        .collect();
    let peers = medians.iter().filter(|(way, _)| matches!(way, Way::Peer(_)));
    let Some((best, best_s)) = peers.min_by(|one, other| one.1.total_cmp(&other.1)) else { return Vec::new() };
    let own = medians.iter().filter(|(way, _)| matches!(way, Way::Derived | Way::Recorded));
    own.map(|(way, own_s)| {
        let ratio = own_s / best_s;
        format!("{image:<10}{link:<15}ready / best peer: {} / {} = {ratio:.3}", way.name(), best.name())
    })
    .collect()
}
