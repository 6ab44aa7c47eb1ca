//! `make torture-mixed`: a healthy image alone, then beside a registry that misbehaves and images that lie.
//!
//! A round pulls an image, mounts it, reads all of it from its registry and once more from the cache, and removes it.
//! The same rounds run alone and in company, in one process on one node; the times of their reads are compared.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Fault, FaultyRegistry, HarnessError, Node, Result, Scratch, TarLayer, TestRegistry, containerd::LAZULI,
    error::Context as _, process::command, programs::program, samples::noise,
};

use crate::{
    bench::Bench,
    images::{self, SLOW_FILES, SLOW_LEN, publish_lazy},
    lies::{self, GOOD},
    reader::{Reader, Running, forget_pages},
    snapshots::unmount,
};

/// Healthy images that take turns, and what each holds.
const IMAGES: u64 = 4;
const FILES: u64 = 8;
const FILE_LEN: usize = 1 << 20;
/// The time that a good registry takes to answer.
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// Readers of the hostile registry's image.
const HOSTILE_READERS: u64 = 60;
/// How often it misbehaves in another way.
const CHANGE: Duration = Duration::from_secs(10);
/// How often a tenant pulls an image that lies.
const TENANT_PAUSE: Duration = Duration::from_secs(3);
/// How long a read, a pull or a mount may take.
const WITHIN: Duration = Duration::from_secs(60);
/// Times its time alone that a read may take in company.
const TIMES_MAX: f64 = 2.0;

/// Times of reads.
#[derive(Debug, Default)]
struct Times {
    cold: Vec<Duration>,
    warm: Vec<Duration>,
    rounds: u64,
    failures: Vec<String>,
}

fn name(image: u64) -> String {
    format!("steady-{image}")
}

fn content(image: u64, file: u64) -> Vec<u8> {
    noise(80_000 + image * FILES + file, FILE_LEN)
}

/// Publishes a healthy image of the runs that are longer than a row.
pub(crate) fn publish_steady(scratch: &Scratch, registry: &str, image: u64) -> Result<()> {
    let layer = (0..FILES).fold(TarLayer::new(), |layer, file| layer.file(&file.to_string(), content(image, file)));
    publish_lazy(scratch, registry, &name(image), layer)
}

/// Runs half the time alone and half in company; prints both. Whether all was right.
pub(crate) fn run(minutes: u64) -> Result<bool> {
    let scratch = Scratch::new("torture-mixed-images")?;
    let registry = TestRegistry::start(&scratch)?;
    images::publish(&scratch, &registry)?;
    for image in 0..IMAGES {
        publish_steady(&scratch, registry.address(), image)?;
    }
    lies::publish_trap(&scratch, registry.address())?;
    lies::publish_hot_lie(&scratch, registry.address())?;
    lies::publish_claims(&scratch, registry.address())?;
    lies::publish_hostile_index(&scratch, registry.address(), 3)?;
    // The healthy registry is another host than the hostile one.
    let bench = Bench::new("mixed", registry.address(), "auto")?;
    let healthy = FaultyRegistry::before(registry.address())?;
    (0..IMAGES).for_each(|image| healthy.set(&name(image), Fault::Delay(ROUND_TRIP)));
    let node = bench.node_with(&[])?;
    let half = Duration::from_secs(minutes * 30);
    let alone = rounds(&bench, &node, &healthy, half)?;
    let slow = bench.pulled_and_mounted(&node, &bench.registry.reference("slow:lazy"))?;
    let is_over = AtomicBool::new(false);
    let (scratch, hostile) = (&bench.scratch, &bench.registry);
    let socket = node.containerd.socket();
    let (company, tenants) = thread::scope(|scope| {
        scope.spawn(|| misbehave(hostile, &is_over));
        scope.spawn(|| read_hostile(scratch, &slow, &is_over));
        let tenants = scope.spawn(|| tenants(scratch, hostile, socket, &is_over));
        let company = rounds(&bench, &node, &healthy, half);
        is_over.store(true, Ordering::Relaxed);
        (company, tenants.join())
    });
    let (company, tenants) = (company?, tenants.unwrap_or_default());
    let honest = honest_image(&bench, &node, &healthy)?;
    let is_near = report("cold reads", &alone.cold, &company.cold) & report("warm reads", &alone.warm, &company.warm);
    let failures: Vec<_> = alone.failures.iter().chain(&company.failures).chain(&honest).collect();
    println!("rounds: {} alone, {} in company; tenants pulled {tenants} images that lie", alone.rounds, company.rounds);
    failures.iter().for_each(|failure| println!("WRONG {failure}"));
    Ok(is_near && failures.is_empty())
}

/// Prints both and says whether they are near enough.
fn report(what: &str, alone: &[Duration], company: &[Duration]) -> bool {
    let part = |times: &[Duration], percent: usize| {
        let mut sorted = times.to_vec();
        sorted.sort();
        let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let mut is_near = true;
    for percent in [50, 95] {
        let (alone, company) = (part(alone, percent), part(company, percent));
        let times = company / alone.max(0.001);
        // Below a few milliseconds the start of the reading process is what is measured.
        let is_right = times <= TIMES_MAX || company < 20.0;
        let verdict = if is_right { "ok" } else { "WRONG" };
        println!("{verdict} {what}, p{percent}: {alone:.1} ms alone, {company:.1} ms in company, {times:.2} times");
        is_near &= is_right;
    }
    is_near
}

fn rounds(bench: &Bench, node: &Node, registry: &FaultyRegistry, time: Duration) -> Result<Times> {
    let (mut times, started) = (Times::default(), Instant::now());
    while started.elapsed() < time {
        let image = times.rounds % IMAGES;
        let reference = registry.reference(&format!("{}:lazy", name(image)));
        let tree = bench.pulled_and_mounted(node, &reference)?;
        let read = |path: &Path, file: u64, times: &mut Vec<Duration>| -> Result<()> {
            let seen = Reader::start(&bench.scratch, path, FILE_LEN)?.finish(WITHIN)?;
            times.push(seen.time());
            match seen.is(&content(image, file)) {
                true => Ok(()),
                false => Err(HarnessError::Unexpected(format!("{reference}: {}", seen.words(&content(image, file))))),
            }
        };
        for file in 0..FILES {
            let path = tree.join(file.to_string());
            if let Err(error) = read(&path, file, &mut times.cold) {
                times.failures.push(error.to_string());
                continue;
            }
            forget_pages(&path).at("forgetting pages of", &path)?;
            if let Err(error) = read(&path, file, &mut times.warm) {
                times.failures.push(error.to_string());
            }
        }
        unmount_and_forget(bench, node, &tree)?;
        remove(bench, node, &reference)?;
        times.rounds += 1;
    }
    Ok(times)
}

/// Ends a container: unmounts its tree and removes its snapshot.
pub(crate) fn unmount_and_forget(bench: &Bench, node: &Node, tree: &Path) -> Result<()> {
    unmount(tree)?;
    let words = ["snapshots", "--snapshotter", LAZULI, "rm", &tree.to_string_lossy()];
    bench.bounded(&mut node.containerd.ctr(words), WITHIN).map(drop)
}

/// Removes an image with its snapshots and its cache.
pub(crate) fn remove(bench: &Bench, node: &Node, reference: &str) -> Result<()> {
    bench.bounded(&mut node.containerd.ctr(["images", "rm", "--sync", reference]), WITHIN).map(drop)
}

/// Another fault every few seconds.
fn misbehave(registry: &FaultyRegistry, is_over: &AtomicBool) {
    let faults = [
        Fault::Trickle(Duration::from_secs(5)),
        Fault::Hang,
        Fault::SilentAfter(64 << 10),
        Fault::Status(404, None),
        Fault::Status(429, Some(90)),
        Fault::Close,
        Fault::Page,
        Fault::WrongByte,
        Fault::CutInTheMiddle,
    ];
    for fault in faults.iter().cycle() {
        registry.set("slow", fault.clone());
        let since = Instant::now();
        while since.elapsed() < CHANGE {
            if is_over.load(Ordering::Relaxed) {
                return registry.heal("slow");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Keeps so many readers of the hostile registry's image waiting.
fn read_hostile(scratch: &Scratch, tree: &Path, is_over: &AtomicBool) {
    let mut readers: Vec<(u64, Reader)> = Vec::new();
    let mut next = 0;
    while !is_over.load(Ordering::Relaxed) {
        readers.retain_mut(|(_, reader)| !reader.has_ended());
        while (readers.len() as u64) < HOSTILE_READERS {
            let path = tree.join(format!("files/{}", next % SLOW_FILES));
            // Whatever it reads: it is there to be in the way.
            match Reader::start(scratch, &path, SLOW_LEN) {
                Ok(reader) => readers.push((next, reader)),
                Err(_) => break,
            }
            next += 1;
        }
        thread::sleep(Duration::from_millis(500));
    }
    for (_, reader) in readers {
        // Ended at once.
        let _ = reader.finish(Duration::ZERO);
    }
}

/// Two tenants pull images that lie, each into a namespace of its own; returns how many pulls ended.
fn tenants(scratch: &Scratch, registry: &FaultyRegistry, socket: &Path, is_over: &AtomicBool) -> u64 {
    let images = ["evil:trap", "hot-lies:lazy", "claims:lazy", "hostile:lazy", "secret:lazy"];
    let mut pulled = 0;
    for (number, image) in images.iter().cycle().enumerate() {
        if is_over.load(Ordering::Relaxed) {
            return pulled;
        }
        let tenant = if number % 2 == 0 { "tenant-a" } else { "tenant-b" };
        let reference = registry.reference(image);
        let pull = || -> Result<bool> {
            let mut pull = command(program("lazuli")?, ["pull", &reference, "--namespace", tenant]);
            let ended = Running::start(scratch, pull.arg("--address").arg(socket))?.finish(WITHIN)?.is_some();
            let mut remove = command("ctr", ["--address", &socket.to_string_lossy(), "--namespace", tenant]);
            remove.args(["images", "rm", "--sync", &reference]);
            Running::start(scratch, &mut remove)?.finish(WITHIN)?;
            Ok(ended)
        };
        pulled += u64::from(pull().unwrap_or(false));
        thread::sleep(TENANT_PAUSE);
    }
    pulled
}

/// The honest image whose chain ID was lied about, in two namespaces.
fn honest_image(bench: &Bench, node: &Node, registry: &FaultyRegistry) -> Result<Vec<String>> {
    let reference = registry.reference("good:lazy");
    let mut failures = Vec::new();
    for namespace in ["default", "tenant-a"] {
        let mut pull = node.lazuli_pull_command(&reference)?;
        bench.bounded(pull.args(["--namespace", namespace]), WITHIN)?;
        let mounted = bench.mount_in(node, namespace, LAZULI, &reference, WITHIN)?;
        let Some(tree) = mounted.path() else {
            failures.push(format!("honest image in {namespace}: {}", mounted.words()));
            continue;
        };
        let seen = bench.read(&tree.join("etc/msg"), GOOD.len(), WITHIN)?;
        println!("honest image in {namespace}: {}", seen.words(GOOD));
        if !seen.is(GOOD) {
            failures.push(format!("honest image in {namespace}: {}", seen.words(GOOD)));
        }
    }
    Ok(failures)
}
