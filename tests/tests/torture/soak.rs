//! `make soak`: a node that works for an hour; what both daemons and the disk hold at the beginning and at the end.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Fault, Node, Result, Scratch, TestRegistry,
    error::Context as _,
    process::{command, run as run_command},
};
use rustix::process::Signal;

use crate::{
    bench::{Bench, fused, send, status_number},
    images::{self, SINGLE_LEN, SINGLES, single, single_content},
    mixed::{publish_steady, remove, unmount_and_forget},
};

/// Images that stay mounted throughout.
const IMAGES: u64 = 10;
/// The memory that both daemons may hold together at any moment.
const MEMORY_MAX: u64 = 64 << 20;
/// Every so many rounds a daemon is killed.
const KILL_EVERY: u64 = 5;
/// How many descriptors and threads more than at the beginning are no leak: connections and pools come and go.
const MORE_MAX: u64 = 24;
const WITHIN: Duration = Duration::from_secs(60);

/// The resources that both daemons together hold at one moment.
#[derive(Debug, Clone, Copy)]
struct Held {
    memory: u64,
    descriptors: u64,
    threads: u64,
    disk: u64,
}

impl Held {
    fn now(node: &Node) -> Result<Self> {
        let ids = [fused(node)?, node.snapshotter.id().unwrap_or_default()];
        let sum = |of: &dyn Fn(u32) -> u64| ids.iter().map(|id| of(*id)).sum();
        let descriptors = |id: u32| fs::read_dir(format!("/proc/{id}/fd")).map_or(0, |all| all.count() as u64);
        Ok(Self {
            memory: sum(&|id| status_number(id, "VmRSS")),
            descriptors: sum(&descriptors),
            threads: sum(&|id| status_number(id, "Threads")),
            disk: disk_bytes(node.snapshotter.root())?,
        })
    }

    fn words(&self) -> String {
        let Self { memory, descriptors, threads, disk } = self;
        format!(
            "{:.1} MiB of memory, {descriptors} descriptors, {threads} threads, {:.1} MiB on disk",
            *memory as f64 / 1048576.0,
            *disk as f64 / 1048576.0
        )
    }
}

/// The bytes that lie below `root` on its own file system.
fn disk_bytes(root: &Path) -> Result<u64> {
    let printed = run_command(command("du", ["-sxk"]).arg(root))?;
    Ok(printed.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10)
}

/// Soaks for so many minutes. Whether all was right.
pub(crate) fn run(minutes: u64) -> Result<bool> {
    let scratch = Scratch::new("torture-soak-images")?;
    let registry = TestRegistry::start(&scratch)?;
    images::publish(&scratch, &registry)?;
    let bench = Bench::new("soak", registry.address(), "auto")?;
    let mut node = bench.node_with(&[])?;
    for image in 0..IMAGES {
        publish_steady(&scratch, registry.address(), image)?;
        let reference = bench.registry.reference(&format!("steady-{image}:lazy"));
        bench.pulled_and_mounted(&node, &reference)?;
        bench.is_complete_within(&node, &reference, WITHIN)?;
    }
    let faults = [
        Fault::None,
        Fault::Status(503, Some(1)),
        Fault::CutInTheMiddle,
        Fault::Status(404, None),
        Fault::Hang,
        Fault::Page,
        Fault::SilentInTheMiddle,
    ];
    let (mut first, mut most, mut last) = (None, 0, None);
    let (mut failures, mut kills, mut round) = (Vec::new(), 0, 0_u64);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(minutes * 60) {
        let number = round % SINGLES;
        let reference = bench.registry.reference(&format!("{}:lazy", single(number)));
        bench.registry.heal(&single(number));
        let tree = bench.pulled_and_mounted(&node, &reference)?;
        let index = usize::try_from(round).unwrap_or_default() % faults.len();
        bench.registry.set(&single(number), faults[index].clone());
        let reader = bench.reader(&tree.join("data"), SINGLE_LEN)?;
        std::thread::sleep(Duration::from_millis(500));
        if round % KILL_EVERY == KILL_EVERY - 1 {
            match (round / KILL_EVERY).is_multiple_of(2) {
                true => send(fused(&node)?, Signal::KILL)?,
                false => node.snapshotter.kill_and_restart()?,
            }
            kills += 1;
        }
        bench.registry.heal(&single(number));
        let seen = reader.finish(WITHIN)?;
        if !seen.is(&single_content(number)) {
            failures.push(format!("round {round}, {:?}: {}", faults[index], seen.words(&single_content(number))));
        }
        unmount_and_forget(&bench, &node, &tree)?;
        remove(&bench, &node, &reference)?;
        bench.holds_within(WITHIN, || Ok(node.snapshotter.fused_id().is_some()))?;
        let held = Held::now(&node)?;
        most = most.max(held.memory);
        // The first rounds start pools and connections that stay.
        if round == 10 || (first.is_none() && round > 10) {
            first = Some(held);
        }
        last = Some(held);
        if round % 20 == 0 {
            println!("round {round}, {:.0} s: {}", started.elapsed().as_secs_f64(), held.words());
        }
        round += 1;
    }
    let (Some(first), Some(last)) = (first, last) else {
        println!("WRONG too few rounds to compare: {round}");
        return Ok(false);
    };
    println!("beginning: {}", first.words());
    println!("end:       {}", last.words());
    println!(
        "{round} rounds, {kills} kills, {} failed reads, at most {:.1} MiB",
        failures.len(),
        most as f64 / 1048576.0
    );
    failures.iter().for_each(|failure| println!("WRONG {failure}"));
    let checks = [
        ("memory", most <= MEMORY_MAX),
        ("descriptors", last.descriptors <= first.descriptors + MORE_MAX),
        ("threads", last.threads <= first.threads + MORE_MAX),
        ("disk", last.disk <= first.disk + first.disk / 10 + (16 << 20)),
    ];
    for (what, is_right) in checks {
        println!("{} {what}", if is_right { "ok" } else { "WRONG" });
    }
    let root = node.snapshotter.root().to_owned();
    fs::metadata(&root).at("reading metadata of", &root)?;
    Ok(failures.is_empty() && checks.iter().all(|(_, is_right)| *is_right))
}
