//! Rows of `bench starts`: their figures, as lines and as JSON; [`page`] makes a page of them, [`means`] what they come
//! to.

pub(crate) mod means;
pub(crate) mod page;

use std::collections::BTreeMap;

use lazuli_tests::{shaped_link::Shape, start::Measured};
use serde_json::{Value, json};

use self::means::Mean;
use super::{
    Facts, limit,
    options::{Way, Work},
    ready,
};

/// The daemon that every way has.
const CONTAINERD: &str = "containerd";

/// Heads and widths of the lines, and of the table in the page; the first four are words.
pub(crate) const COLUMNS: [(&str, usize); 21] = [
    ("image", 11),
    ("link", 15),
    ("work", 7),
    ("way", 14),
    ("pull s", 7),
    ("ready s", 8),
    ("p95", 7),
    ("again s", 8),
    ("/full", 7),
    ("/limit", 7),
    ("/peer", 7),
    ("/unrec", 7),
    ("MB", 7),
    ("/read", 6),
    ("reqs", 6),
    ("/layer", 7),
    ("cpu s", 7),
    ("ctrd MB", 8),
    ("own MB", 7),
    ("largest", 8),
    ("n", 3),
];

/// The meaning of the columns, for whoever reads the page.
pub(crate) const LEGEND: [(&str, &str); 12] = [
    ("ready s", "from the pull to the first line that the container prints, median; p95 is the 95th percentile"),
    ("again s", "a second start with everything of the image on the local disk and an empty page cache"),
    ("/full", "ready against that of a full pull in this run"),
    (
        "/limit",
        "ready against that of a full pull's second start, two round trips and the transfer of what recorded moves",
    ),
    ("/peer", "ready against that of the fastest peer in this run"),
    ("/unrec", "ready against that of the same image on a node that records no starts"),
    ("MB", "bytes of blobs that the registry sent until ready"),
    ("/read", "those against the compressed bytes that the start reads: the hot packs of the recorded image"),
    ("reqs", "requests for blobs until ready; /layer is the same for each layer of the image"),
    (
        "cpu s",
        "user, system and interrupt time of the machine until ready (/proc/stat), without the registry and the link",
    ),
    ("ctrd MB", "memory of containerd at its peak until ready"),
    ("own MB", "the same of the way's own daemons together; largest is that of the largest of them"),
];

/// One image that does one thing over one link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case<'a> {
    pub(crate) image: &'a str,
    pub(crate) link: &'a str,
    pub(crate) shape: Option<Shape>,
    pub(crate) work: Work,
    pub(crate) facts: Facts,
}

/// One way of a case. Figures are medians of its samples.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) image: String,
    pub(crate) link: String,
    pub(crate) work: Work,
    pub(crate) way: Way,
    pub(crate) samples: usize,
    /// Seconds, as the next three.
    pub(crate) pull: f64,
    pub(crate) ready: f64,
    pub(crate) p95: f64,
    pub(crate) again: f64,
    pub(crate) ratios: Ratios,
    pub(crate) moved_mb: f64,
    pub(crate) requests: f64,
    pub(crate) requests_per_layer: f64,
    /// Seconds of processors.
    pub(crate) processor: f64,
    /// Memory at the peak.
    pub(crate) containerd_mb: f64,
    /// All other daemons of the node together, and the largest of them.
    pub(crate) daemons_mb: f64,
    pub(crate) largest_daemon_mb: f64,
}

/// One figure against another of the same case; `None` where that was not measured.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ratios {
    pub(crate) full: Option<f64>,
    pub(crate) limit: Option<f64>,
    pub(crate) peer: Option<f64>,
    pub(crate) unrecorded: Option<f64>,
    pub(crate) read: Option<f64>,
}

impl Ratios {
    /// Adds them to an object of the JSON.
    pub(crate) fn add_to(&self, object: &mut Value) {
        object["ready_to_full"] = json!(self.full);
        object["ready_to_limit"] = json!(self.limit);
        object["ready_to_peer"] = json!(self.peer);
        object["ready_to_unrecorded"] = json!(self.unrecorded);
        object["moved_to_read"] = json!(self.read);
    }
}

/// The rows of all ways that were measured.
pub(crate) fn rows(case: &Case<'_>, measured: &BTreeMap<Way, Vec<Measured>>) -> Vec<Row> {
    measured.iter().map(|(way, starts)| row(case, *way, starts, measured)).collect()
}

fn row(case: &Case<'_>, way: Way, starts: &[Measured], measured: &BTreeMap<Way, Vec<Measured>>) -> Row {
    let value = |of: &dyn Fn(&Measured) -> f64| median(starts.iter().map(of));
    let daemons = |of: fn(Vec<u64>) -> u64, is_containerd: bool| {
        let chosen = |start: &Measured| {
            let peaks = start.daemons.iter().filter(|(name, _)| (*name == CONTAINERD) == is_containerd);
            of(peaks.map(|(_, peak)| *peak).collect()) as f64 / 1e6
        };
        value(&chosen)
    };
    let sum: fn(Vec<u64>) -> u64 = |peaks| peaks.iter().sum();
    let requests = value(&|start| start.requests as f64);
    Row {
        image: case.image.to_owned(),
        link: case.link.to_owned(),
        work: case.work,
        way,
        samples: starts.len(),
        pull: value(&|start| start.pull.as_secs_f64()),
        ready: ready_of(starts),
        p95: percentile(starts.iter().map(|start| ready(start).as_secs_f64()), 95),
        again: value(&|start| start.again.as_secs_f64()),
        ratios: ratios(case, way, starts, measured),
        moved_mb: value(&|start| start.moved as f64 / 1e6),
        requests,
        requests_per_layer: requests / case.facts.layers.max(1) as f64,
        processor: value(&|start| start.processor.as_secs_f64()),
        containerd_mb: daemons(sum, true),
        daemons_mb: daemons(sum, false),
        largest_daemon_mb: daemons(|peaks| peaks.into_iter().max().unwrap_or_default(), false),
    }
}

fn ratios(case: &Case<'_>, way: Way, starts: &[Measured], measured: &BTreeMap<Way, Vec<Measured>>) -> Ratios {
    let of = |other: Option<f64>| other.map(|other| ready_of(starts) / other);
    let ready_by = |way: Way| measured.get(&way).map(|starts| ready_of(starts));
    let peers = measured.iter().filter(|(way, _)| way.is_peer()).map(|(_, starts)| ready_of(starts));
    let is_start = case.work == Work::Ready;
    let moved = median(starts.iter().map(|start| start.moved as f64));
    Ratios {
        full: of(ready_by(Way::Full)),
        limit: of(limit(case.shape, measured).filter(|_| is_start)),
        peer: of(peers.min_by(f64::total_cmp)).filter(|_| !way.is_peer()),
        unrecorded: of(ready_by(Way::Unrecorded)).filter(|_| way == Way::Derived),
        read: case.facts.read_len.filter(|_| is_start).map(|read| moved / read as f64),
    }
}

impl Row {
    /// Its cells, one for each column.
    pub(crate) fn cells(&self) -> [String; COLUMNS.len()] {
        let ratio =
            |ratio: Option<f64>, digits| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.digits$}"));
        let Ratios { full, limit, peer, unrecorded, read } = self.ratios;
        [
            self.image.clone(),
            self.link.clone(),
            self.work.name().to_owned(),
            self.way.name().to_owned(),
            format!("{:.2}", self.pull),
            format!("{:.2}", self.ready),
            format!("{:.2}", self.p95),
            format!("{:.2}", self.again),
            ratio(full, 3),
            ratio(limit, 2),
            ratio(peer, 2),
            ratio(unrecorded, 3),
            format!("{:.1}", self.moved_mb),
            ratio(read, 2),
            self.requests.to_string(),
            format!("{:.1}", self.requests_per_layer),
            format!("{:.2}", self.processor),
            format!("{:.0}", self.containerd_mb),
            format!("{:.0}", self.daemons_mb),
            format!("{:.0}", self.largest_daemon_mb),
            self.samples.to_string(),
        ]
    }

    fn to_json(&self) -> Value {
        let mut object = json!({
            "image": self.image, "link": self.link, "work": self.work.name(), "way": self.way.name(),
            "samples": self.samples, "pull_s": self.pull, "ready_s": self.ready, "ready_p95_s": self.p95,
            "again_s": self.again, "moved_mb": self.moved_mb, "requests": self.requests,
            "requests_per_layer": self.requests_per_layer, "processor_s": self.processor,
            "containerd_peak_mb": self.containerd_mb, "daemons_peak_mb": self.daemons_mb,
            "largest_daemon_peak_mb": self.largest_daemon_mb,
        });
        self.ratios.add_to(&mut object);
        object
    }
}

/// The head of the lines.
pub(crate) fn header() -> String {
    line(&COLUMNS.map(|(head, _)| head.to_owned()))
}

/// Cells as a line: words to the left, figures to the right.
pub(crate) fn line(cells: &[String; COLUMNS.len()]) -> String {
    let cells = cells.iter().zip(COLUMNS).enumerate();
    let padded = cells.map(|(place, (cell, (_, width)))| match place {
        0..4 => format!("{cell:<width$}"),
        _ => format!("{cell:>width$}"),
    });
    padded.collect()
}

/// An object with the seed, the rows and the means; times in seconds, lengths in 10^6 bytes.
pub(crate) fn json(seed: u64, rows: &[Row]) -> String {
    let means: Vec<Value> = means::of(rows).iter().map(Mean::to_json).collect();
    let rows: Vec<Value> = rows.iter().map(Row::to_json).collect();
    format!("{:#}\n", json!({ "seed": seed, "rows": rows, "means": means }))
}

fn ready_of(starts: &[Measured]) -> f64 {
    median(starts.iter().map(|start| ready(start).as_secs_f64()))
}

/// The middle one, of an even number the upper one.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    percentile(values, 50)
}

fn percentile(values: impl Iterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let place = values.len() * percent / 100;
    values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}
