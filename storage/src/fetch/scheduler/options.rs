//! How many requests run at once, and how long anything is waited for.

use std::time::Duration;

/// How urgent bytes are. Each class has requests of its own, so a read never waits behind a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody is blocked until they are there.
    Read,
    /// They will be read soon: hot pack and read-ahead.
    HotPack,
    /// The rest.
    Background,
}

/// How many requests of one class run at the same time.
///
/// Sources that do not answer keep none that does from being asked, and no number of names gets more than the node has:
///
/// - A source that has one running gets a second one as long as fewer than `node` run. One whose last requests brought
///   nothing has one at most.
/// - A source that has none running gets one beyond `node` too, as long as fewer than [`Self::node_max`] run; where it
///   has brought nothing yet, or nothing lately, only as long as fewer than `node` such run.
/// - Where that leaves a source without any, a request that has had its turn ([`RequestOptions::turn`]) gives way to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// On the whole node, those aside that are the only one of their source.
    pub node: usize,
    /// At one source: whatever has the same [`crate::Source::origin`].
    pub source: usize,
    /// For one layer.
    pub layer: usize,
}

impl RequestLimits {
    /// On the whole node, whatever the sources are called: twice `node`.
    pub fn node_max(self) -> usize {
        self.node.saturating_mul(2)
    }
}

/// The limits of each class, and the times that decide when somebody else is asked.
#[derive(Debug, Clone)]
pub struct RequestOptions {
    /// Requests for blocked reads.
    pub read: RequestLimits,
    /// Requests that open a layer: its index, with its hot pack, and its dedup section.
    pub opening: RequestLimits,
    /// Requests for what nobody has wanted, and a verification needs.
    pub proof: RequestLimits,
    /// Requests for what will be read soon.
    pub hot: RequestLimits,
    /// Requests for everything else.
    pub background: RequestLimits,
    /// A place that refused, or failed twice, is left alone for this long, then twice as long each time.
    pub pause_min: Duration,
    /// The longest such pause.
    pub pause_max: Duration,
    /// A place that says when to come back is left alone for that long, but no longer than this.
    pub retry_after_max: Duration,
    /// A read that has waited so long for its first byte at one place is asked for at the next place too.
    pub hedge_after: Duration,
    /// A request without any answer after this time has failed.
    pub answer_max: Duration,
    /// The same for a layer that is being opened and has another place to ask.
    pub opening_answer_max: Duration,
    /// The time that a request has at least before it gives its slot to a source that has none, where there are not
    /// enough; up to four times as long for a source that brings nothing.
    pub turn: Duration,
    /// The time over which the rate of a request is measured.
    pub rate_window: Duration,
    /// How long a read that failed is remembered: whoever asks for the same at once again gets the same answer.
    pub failure_memory: Duration,
}

impl Default for RequestOptions {
    fn default() -> Self {
        Self {
            // A request holds a frame in memory, about a megabyte; twelve of them fill a link.
            read: RequestLimits { node: 24, source: 16, layer: 12 },
            // Images of thirty layers are opened at once with two requests each, and nothing of them is kept in memory but
            // what arrives.
            opening: RequestLimits { node: 128, source: 64, layer: 4 },
            // One after the other for a layer; each holds a frame in memory.
            proof: RequestLimits { node: 8, source: 2, layer: 1 },
            hot: RequestLimits { node: 8, source: 4, layer: 4 },
            background: RequestLimits { node: 4, source: 2, layer: 2 },
            pause_min: Duration::from_millis(250),
            pause_max: Duration::from_secs(4),
            retry_after_max: Duration::from_secs(15),
            hedge_after: Duration::from_millis(1500),
            // A registry that fetches the blob from another one first is slow to answer.
            answer_max: Duration::from_secs(30),
            opening_answer_max: Duration::from_secs(3),
            turn: Duration::from_secs(2),
            rate_window: Duration::from_secs(10),
            // The kernel asks a second time for a page that could not be read.
            failure_memory: Duration::from_secs(2),
        }
    }
}
