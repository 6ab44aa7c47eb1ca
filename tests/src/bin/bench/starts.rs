//! `make bench-starts`: cold starts of real images, in several ways, over several links, in one run.
//!
//! The method is that of HelloBench: nothing of the image is on the node and nothing in the page cache; clocked are the
//! pull, and the start until the container prints its first line (*ready*). A start is the image's own command (`ready`),
//! or one that reads every file (`whole`), every page of a large one (`mapped`), or four files at once (`four`). Each
//! sample is on a node of its own; ways take turns by chance, so that a machine that warms up favours nobody, and the seed
//! that is printed gives the same turns again. Printed are medians, 95th percentiles, bytes and requests at the registry,
//! processor time and memory, and at the end geometric means over the images. `fleet` is the start of one image of a fleet
//! where another one was started before.
//!
//! *Limit* is a yardstick: the start with everything on the local disk, then two round trips and the transfer of what the
//! recorded start moves, one after the other. Whoever fetches while the container starts may stay below it.

mod options;
mod order;
mod report;

use std::{collections::BTreeMap, fs, time::Duration};

use lazuli_tests::{
    Containerd, ContainerdOptions, HarnessError, Node, Result, Scratch, TestRegistry,
    containerd::{LAZULI, OVERLAYFS},
    error::Context as _,
    peers::Peer,
    process::{require_program, run},
    programs::lazuli_ok,
    real_images::real_image,
    shaped_link::{Shape, ShapedLink},
    start::{Measured, Start},
};

use self::{
    options::{Options, Subject, Way, Work},
    order::Order,
    report::{Case, means, page},
};

/// Prints a row for each image, link, work and way; writes the same as JSON and as a page where that is wanted.
pub(crate) fn bench(words: Vec<String>) -> Result<()> {
    let options = Options::parse(words)?;
    check_machine()?;
    let scratch = crate::scratch("starts")?;
    let registry = TestRegistry::start(&scratch)?;
    let (mut rows, mut order) = (Vec::new(), Order::new(options.seed));
    println!("seed {}\n{}", options.seed, report::header());
    for subject in &options.subjects {
        for image in subject.before.iter().chain([&subject.image]) {
            prepare(&registry, &scratch, image, &options)?;
        }
        let facts = Facts::of(&registry, &subject.image, &options)?;
        for (name, shape) in &options.links {
            let link = shape.map(|shape| ShapedLink::open(registry.address(), shape)).transpose()?;
            let host = link.as_ref().map_or(registry.address(), ShapedLink::address);
            for work in options.works.iter().copied().filter(|work| work.is_for(&subject.image)) {
                let bench = Bench { registry: &registry, scratch: &scratch, host, subject, work };
                let measured = bench.samples(&options, &mut order)?;
                let case = Case { image: &subject.name, link: name, shape: *shape, work, facts };
                let new = report::rows(&case, &measured);
                new.iter().for_each(|row| println!("{}", report::line(&row.cells())));
                rows.extend(new);
            }
        }
    }
    means::lines(&rows).iter().for_each(|line| println!("{line}"));
    write(options.json.as_deref(), || report::json(options.seed, &rows))?;
    write(options.html.as_deref(), || page::html(options.seed, &rows))
}

/// Says in one line what the machine lacks.
fn check_machine() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(HarnessError::Missing("starts mount images and drop the page cache: run it as root".to_owned()));
    }
    ["containerd", "ctr", "runc", "docker-registry", "skopeo"].iter().try_for_each(|program| require_program(program))
}

fn write(path: Option<&str>, content: impl FnOnce() -> String) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    fs::write(path, content()).context(format!("writing {path}"))
}

/// Brings the image in all the forms that are wanted into the registry.
fn prepare(registry: &TestRegistry, scratch: &Scratch, image: &str, options: &Options) -> Result<()> {
    let layout = real_image(image)?;
    registry.push(&layout, &format!("{image}:full"))?;
    let named = |way: &str| registry.reference(&format!("{image}:{way}"));
    lazuli_ok(["convert", "--no-cache", &named("full"), &named("derived")])?;
    if options.ways.contains(&Way::Recorded) {
        let profile = scratch.directory("profiles")?.join(image).display().to_string();
        lazuli_ok(["profile", "record", "--ready-line", "", "-o", &profile, &named("derived")])?;
        lazuli_ok(["convert", "--no-cache", "--profile", &profile, &named("full"), &named("recorded")])?;
    }
    options.ways.iter().try_for_each(|way| match way {
        Way::Peer(peer) => peer.prepare(registry, scratch, image, &layout),
        _ => Ok(()),
    })
}

/// Figures of an image, however it is brought to a node.
#[derive(Debug, Clone, Copy)]
struct Facts {
    layers: usize,
    /// Compressed bytes that the start reads: the hot packs of the recorded image hold those and nothing else, to whole
    /// pages. `None` where there is no recorded one.
    read_len: Option<u64>,
}

impl Facts {
    fn of(registry: &TestRegistry, image: &str, options: &Options) -> Result<Self> {
        let layers = registry.manifest(&format!("{image}:full"))?["layers"].as_array().map_or(0, Vec::len);
        if !options.ways.contains(&Way::Recorded) {
            return Ok(Self { layers, read_len: None });
        }
        let printed = lazuli_ok(["inspect", "--json", &registry.reference(&format!("{image}:recorded"))])?;
        let report: serde_json::Value = serde_json::from_str(&printed).unwrap_or_default();
        let lens = report["layers"].as_array().into_iter().flatten().map(|layer| layer["hot_pack_len"].as_u64());
        let sum = lens.sum::<Option<u64>>().filter(|sum| *sum > 0);
        let none = || HarnessError::Unexpected(format!("{image}: the recorded image has no hot pack: {printed}"));
        Ok(Self { layers, read_len: Some(sum.ok_or_else(none)?) })
    }
}

/// One image that does one thing over one link.
struct Bench<'a> {
    registry: &'a TestRegistry,
    scratch: &'a Scratch,
    host: &'a str,
    subject: &'a Subject,
    work: Work,
}

impl Bench<'_> {
    fn samples(&self, options: &Options, order: &mut Order) -> Result<BTreeMap<Way, Vec<Measured>>> {
        let mut measured: BTreeMap<Way, Vec<Measured>> = BTreeMap::new();
        for _ in 0..options.samples {
            for way in order.shuffled(&options.ways) {
                measured.entry(way).or_default().push(self.start(way)?);
            }
        }
        if self.work != Work::Ready {
            self.check_same_bytes(measured.values().flatten().map(|start| start.line.as_str()).collect())?;
        }
        Ok(measured)
    }

    /// Whoever reads less is not faster.
    fn check_same_bytes(&self, mut lines: Vec<&str>) -> Result<()> {
        lines.sort_unstable();
        lines.dedup();
        match lines[..] {
            [line] if line.starts_with(|first: char| first.is_ascii_digit()) => Ok(()),
            _ => {
                let wrong = format!("{}: starts have read different bytes: {lines:?}", self.subject.name);
                Err(HarnessError::Unexpected(wrong))
            }
        }
    }

    fn start(&self, way: Way) -> Result<Measured> {
        let directory = self.scratch.directory("node")?;
        let own = Scratch::at(&directory, "node")?;
        let reference_of = |image| format!("{}/{image}:{}", self.host, way.tag());
        let reference = reference_of(&self.subject.image);
        let before = self.subject.before.as_ref().map(reference_of);
        let start = |containerd, snapshotter| Start {
            registry: self.registry,
            containerd,
            reference: &reference,
            snapshotter,
            command: self.work.command(),
            before: before.as_deref(),
            lazuli_root: None,
        };
        let measured = match way {
            Way::Full => {
                let containerd = Containerd::start(&own, &ContainerdOptions::default())?;
                start(&containerd, OVERLAYFS).measure(&own, |reference| containerd.pull(reference, OVERLAYFS))?
            }
            Way::Derived | Way::Recorded | Way::Unrecorded => {
                let flags: &[&str] = if way == Way::Unrecorded { &["--record-starts", "false"] } else { &[] };
                let node = Node::start_with(flags, &own)?;
                let start = Start { lazuli_root: Some(node.snapshotter.root()), ..start(&node.containerd, LAZULI) };
                start.measure(&own, |reference| run(&mut node.lazuli_pull_command(reference)?).map(drop))?
            }
            Way::Peer(peer) => {
                let node = peer.start(&own)?;
                let measured =
                    start(&node.containerd, peer.snapshotter()).measure(&own, |reference| node.pull(reference))?;
                node.check(&measured.line)?;
                self.check_lazy(peer, &measured)?;
                measured
            }
        };
        drop(own);
        _ = fs::remove_dir_all(&directory);
        Ok(measured)
    }

    /// Whoever is lazy was ready before the whole image was there.
    fn check_lazy(&self, peer: Peer, measured: &Measured) -> Result<()> {
        let manifest = self.registry.manifest(&format!("{}:full", self.subject.image))?;
        let layers = manifest["layers"].as_array().into_iter().flatten();
        let whole: u64 = layers.filter_map(|layer| layer["size"].as_u64()).sum();
        let is_wrong = peer.is_lazy() && self.work == Work::Ready && measured.moved >= whole;
        let wrong = format!("peer {}: {} was there as a whole before it was ready", peer.name(), self.subject.name);
        if is_wrong { Err(HarnessError::Unexpected(wrong)) } else { Ok(()) }
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
