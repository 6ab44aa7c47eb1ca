//! `make bench-starts`: cold starts of real images, in several ways, over several links, in one run.
//!
//! The method is that of HelloBench: nothing of the image is on the node and nothing in the page cache; clocked are the
//! pull, and the start until the container prints its first line (*ready*). A start is the image's own command (`ready`),
//! or one that reads every file (`whole`). Each sample is on a node of its own; ways take turns that shift, so that a
//! machine that warms up favours nobody. Printed are medians, 95th percentiles, bytes and requests at the registry.
//!
//! *Limit* is a yardstick: the start with everything on the local disk, then two round trips and the transfer of what the
//! recorded start moves, one after the other. Whoever fetches while the container starts may stay below it.

mod options;
mod report;

use std::{collections::BTreeMap, fs, time::Duration};

use lazuli_tests::{
    Containerd, ContainerdOptions, HarnessError, Node, Result, Scratch, TestRegistry,
    containerd::{LAZULI, OVERLAYFS},
    error::Context as _,
    process::run,
    programs::lazuli_ok,
    real_images::real_image,
    shaped_link::{Shape, ShapedLink},
    start::{Measured, Start},
};

use self::options::{Options, Way, Work};

/// Reads every file of the image and says how many bytes that were.
const READ_ALL: [&str; 3] = ["sh", "-c", "find / -xdev -type f -exec cat {} + | wc -c"];

/// Prints a row for each image, link, work and way; writes the same as JSON and as a page where that is wanted.
pub(crate) fn bench(words: Vec<String>) -> Result<()> {
    let options = Options::parse(words)?;
    let scratch = crate::scratch("starts")?;
    let registry = TestRegistry::start(&scratch)?;
    let mut rows = Vec::new();
    println!("{}", report::HEADER);
    for image in &options.images {
        prepare(&registry, &scratch, image, &options)?;
        for (name, shape) in &options.links {
            let link = shape.map(|shape| ShapedLink::open(registry.address(), shape)).transpose()?;
            let host = link.as_ref().map_or(registry.address(), ShapedLink::address);
            for work in &options.works {
                let bench = Bench { registry: &registry, scratch: &scratch, host, image, work: *work };
                let measured = bench.samples(&options)?;
                let new = report::rows((image, name, *shape), *work, &measured);
                new.iter().for_each(|row| println!("{row}"));
                rows.extend(new);
            }
        }
    }
    write(options.json.as_deref(), || report::json(&rows))?;
    write(options.html.as_deref(), || report::html(&rows))
}

fn write(path: Option<&str>, content: impl FnOnce() -> String) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    fs::write(path, content()).context(format!("writing {path}"))
}

/// Brings the image in all the forms that are wanted into the registry.
fn prepare(registry: &TestRegistry, scratch: &Scratch, image: &str, options: &Options) -> Result<()> {
    registry.push(&real_image(image)?, &format!("{image}:full"))?;
    let named = |way: &str| registry.reference(&format!("{image}:{way}"));
    lazuli_ok(["convert", "--no-cache", &named("full"), &named("derived")])?;
    if options.ways.contains(&Way::Recorded) {
        let profile = scratch.directory("profiles")?.join(image).display().to_string();
        lazuli_ok(["profile", "record", "--ready-line", "", "-o", &profile, &named("derived")])?;
        lazuli_ok(["convert", "--no-cache", "--profile", &profile, &named("full"), &named("recorded")])?;
    }
    Ok(())
}

/// One image that does one thing over one link.
struct Bench<'a> {
    registry: &'a TestRegistry,
    scratch: &'a Scratch,
    host: &'a str,
    image: &'a str,
    work: Work,
}

impl Bench<'_> {
    fn samples(&self, options: &Options) -> Result<BTreeMap<Way, Vec<Measured>>> {
        let mut measured: BTreeMap<Way, Vec<Measured>> = BTreeMap::new();
        for sample in 0..options.samples {
            for turn in 0..options.ways.len() {
                let way = options.ways[(sample + turn) % options.ways.len()];
                measured.entry(way).or_default().push(self.start(way)?);
            }
        }
        if self.work == Work::Whole {
            // Whoever reads less is not faster.
            let mut lines: Vec<_> = measured.values().flatten().map(|start| &start.line).collect();
            lines.sort_unstable();
            lines.dedup();
            let differ =
                || HarnessError::Unexpected(format!("{}: starts have read different bytes: {lines:?}", self.image));
            return if lines.len() == 1 { Ok(measured) } else { Err(differ()) };
        }
        Ok(measured)
    }

    fn start(&self, way: Way) -> Result<Measured> {
        let directory = self.scratch.directory("node")?;
        let own = Scratch::at(&directory, "node")?;
        let reference = format!("{}/{}:{}", self.host, self.image, way.tag());
        let command: &[&str] = if self.work == Work::Whole { &READ_ALL } else { &[] };
        let start = |containerd, snapshotter| Start {
            registry: self.registry,
            containerd,
            reference: &reference,
            snapshotter,
            command,
        };
        let measured = if way == Way::Full {
            let containerd = Containerd::start(&own, &ContainerdOptions::default())?;
            start(&containerd, OVERLAYFS).measure(&own, || containerd.pull(&reference, OVERLAYFS))?
        } else {
            let node = Node::start_with(&[], &own)?;
            let mut pull = node.lazuli_pull_command(&reference)?;
            start(&node.containerd, LAZULI).measure(&own, || run(&mut pull).map(drop))?
        };
        drop(own);
        _ = fs::remove_dir_all(&directory);
        Ok(measured)
    }
}

/// The yardstick of starts over this link; `None` without a recorded one, and on loopback.
fn limit(shape: Option<Shape>, measured: &BTreeMap<Way, Vec<Measured>>) -> Option<f64> {
    let (shape, full, recorded) = (shape?, measured.get(&Way::Full)?, measured.get(&Way::Recorded)?);
    let again = report::median(full.iter().map(|start| start.again.as_secs_f64()));
    let moved = report::median(recorded.iter().map(|start| start.moved as f64));
    let transfer = moved * 8.0 / shape.bits_per_second as f64;
    Some(again + (2 * shape.round_trip).as_secs_f64() + transfer)
}

fn ready(start: &Measured) -> Duration {
    start.pull + start.start
}
