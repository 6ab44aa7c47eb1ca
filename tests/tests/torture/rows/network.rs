//! Faults of the network and of registries.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{Fault, FaultyRegistry, Result, SnapshotterOptions, error::Context as _, process::command};

use crate::{
    bench::{Bench, HEALTHY_WITHIN, fused, logged, logs},
    images::{HEALTHY_FILES, HEALTHY_LEN, SINGLE_LEN, SLOW_FILES, SLOW_LEN, healthy_content, single, single_content},
    reader::{Running, Seen, forget_pages},
};

/// How long a blip takes: far less than the patience that is promised.
const BLIP: Duration = Duration::from_secs(3);
/// When a reader must have its bytes after a blip is over: pauses between tries may have grown.
const AFTER_BLIP: Duration = Duration::from_secs(40);
/// A byte each time: what a slow registry sends.
const TRICKLE: Fault = Fault::Trickle(Duration::from_secs(5));

/// Each fault for some seconds, one reader in a container that asks for what is not there yet.
pub(crate) fn blips(bench: &Bench) -> Result<()> {
    let faults = [
        ("404", Fault::Status(404, None)),
        ("403", Fault::Status(403, None)),
        ("401", Fault::Status(401, None)),
        ("400", Fault::Status(400, None)),
        ("416", Fault::Status(416, None)),
        ("429, Retry-After 90", Fault::Status(429, Some(90))),
        ("503", Fault::Status(503, None)),
        ("503, Retry-After 120", Fault::Status(503, Some(120))),
        ("200 with a page", Fault::Page),
        ("206 of another range", Fault::WrongRange),
        ("redirect to a dead host", Fault::DeadRedirect),
        ("connections that end", Fault::Close),
        ("connections that end in the middle", Fault::CutInTheMiddle),
        ("hanging behind the headers", Fault::Hang),
        ("silence in the middle", Fault::SilentInTheMiddle),
        ("a byte in 5 s", TRICKLE),
    ];
    let node = bench.node()?;
    let mut victims = Vec::new();
    for (number, (words, fault)) in (0..).zip(faults) {
        let registry = FaultyRegistry::before(&bench.upstream)?;
        let image = registry.reference(&format!("{}:lazy", single(number)));
        let tree = bench.pulled_and_mounted(&node, &image)?;
        victims.push((number, words, fault, registry, tree, image));
    }
    let mut readers = Vec::new();
    for (number, _, fault, registry, tree, _) in &victims {
        registry.set(&single(*number), fault.clone());
        readers.push(bench.reader(&tree.join("data"), SINGLE_LEN)?);
    }
    thread::sleep(BLIP);
    for (number, _, _, registry, ..) in &victims {
        registry.heal(&single(*number));
    }
    for ((number, words, _, _, _, image), reader) in victims.into_iter().zip(readers) {
        let (seen, expected) = (reader.finish(BLIP + AFTER_BLIP)?, single_content(number));
        bench.line(
            &format!("{words}, for 3 s"),
            seen.words(&expected),
            logged(&node, &[&image[..image.rfind(':').unwrap_or(0)]]),
            seen.is(&expected),
        );
    }
    Ok(())
}

/// A slow registry with ever more readers beside a healthy one.
pub(crate) fn isolation(bench: &Bench) -> Result<()> {
    let node = bench.node()?;
    let healthy = FaultyRegistry::before(&bench.upstream)?;
    let slow_tree = bench.pulled_and_mounted(&node, &bench.registry.reference("slow:lazy"))?;
    let healthy_tree = bench.pulled_and_mounted(&node, &healthy.reference("healthy:lazy"))?;
    let cached = healthy_tree.join("files/0");
    bench.read_healthy(&healthy_tree, 0)?;
    bench.registry.set("slow", TRICKLE);
    let mut readers = Vec::new();
    let mut start_readers = |until: u64| -> Result<()> {
        for number in readers.len() as u64..until {
            readers.push(bench.reader(&slow_tree.join(format!("files/{}", number % SLOW_FILES)), SLOW_LEN)?);
        }
        thread::sleep(Duration::from_secs(1));
        Ok(())
    };
    for (count, fresh) in [(20, 2), (120, 4), (300, 6)] {
        start_readers(count)?;
        bench.healthy_line(&node, &format!("{count} readers of a registry of a byte in 5 s"), &healthy_tree, fresh)?;
        forget_pages(&cached).at("forgetting pages of", &cached)?;
        let (seen, expected) = (bench.read_healthy(&healthy_tree, 0)?, healthy_content(0));
        let sees = format!("healthy image, cached file: {}", seen.words(&expected));
        bench.line(&format!("the same {count} readers"), sees, logged(&node, &[]), seen.is(&expected));
    }
    bench.registry.set("slow", Fault::Hang);
    let again = bench.mount(&node, &healthy.reference("healthy:lazy"), HEALTHY_WITHIN)?;
    bench.line("the same, then it hangs", format!("healthy image: {}", again.words()), "", again.path().is_some());
    Ok(())
}

/// A mirror that sends a little of each answer, or a byte at a time, in front of a healthy registry.
pub(crate) fn mirror(bench: &Bench) -> Result<()> {
    const WITHIN: Duration = Duration::from_secs(25);
    let mirror = FaultyRegistry::before(&bench.upstream)?;
    let hosts = bench.scratch.directory(format!("hosts/{}", bench.registry.address()))?;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        bench.registry.address(),
        mirror.address()
    );
    fs::write(hosts.join("hosts.toml"), text).at("writing", &hosts)?;
    let environment = vec![("LAZULI_HOSTS_DIR".to_owned(), bench.scratch.join("hosts").to_string_lossy().into_owned())];
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let node = bench.node_as(SnapshotterOptions { environment, flags, ..SnapshotterOptions::default() })?;
    let faults = [
        ("a mirror that sends 64 KiB of each answer", Fault::SilentAfter(64 << 10)),
        ("a mirror that sends a byte in 5 s", TRICKLE),
        ("a mirror that hangs behind the headers", Fault::Hang),
        ("a mirror that answers 404", Fault::Status(404, None)),
        ("a mirror whose bytes are wrong", Fault::WrongByte),
    ];
    let mut trees = Vec::new();
    for number in 0..faults.len() as u64 {
        trees.push(bench.pulled_and_mounted(&node, &bench.registry.reference(&format!("{}:lazy", single(number))))?);
    }
    for ((number, (words, fault)), tree) in (0..).zip(faults).zip(trees) {
        let mirror_is_wrong = fault == Fault::WrongByte;
        mirror.set(&single(number), fault);
        let (asked_before, expected) = (bench.registry.asked(&single(number)).len(), single_content(number));
        let seen = bench.read(&tree.join("data"), SINGLE_LEN, WITHIN)?;
        let asked = bench.registry.asked(&single(number)).len() - asked_before;
        let sees = format!("{}; {asked} requests to the registry", seen.words(&expected));
        // Bytes that are not those of their digest may end in an error, wherever they came from.
        let may_fail = mirror_is_wrong && matches!(seen, Seen::Failed(..));
        bench.line(words, sees, logged(&node, &[]), seen.is(&expected) || may_fail);
    }
    Ok(())
}

/// A registry that trickles beside one that is healthy: the rest of the healthy image comes all the same.
pub(crate) fn background(bench: &Bench) -> Result<()> {
    const WITHIN: Duration = Duration::from_secs(60);
    let node = bench.node_with(&["--background-rate", "64"])?;
    let healthy = FaultyRegistry::before(&bench.upstream)?;
    bench.registry.set("slow", Fault::Delay(Duration::from_secs(1)));
    bench.pulled_and_mounted(&node, &bench.registry.reference("slow:lazy"))?;
    bench.registry.set("slow", TRICKLE);
    thread::sleep(Duration::from_secs(3));
    let image = healthy.reference("healthy:lazy");
    bench.pulled_and_mounted(&node, &image)?;
    let started = Instant::now();
    let is_complete = bench.is_complete_within(&node, &image, WITHIN)?;
    let sees = format!("healthy image complete: {is_complete}, after {:.0} s", started.elapsed().as_secs_f64());
    bench.line("a registry of a byte in 5 s, in the background", sees, logged(&node, &[]), is_complete);
    Ok(())
}

/// Answers with another range than the one asked for, all of them legal.
pub(crate) fn ranges(bench: &Bench) -> Result<()> {
    /// Times the blob that a registry without ranges may send: for the index, for the content, and what is under way
    /// when the first look at it ends.
    const TIMES_MAX: u64 = 4;
    let node = bench.node()?;
    let faults = [("206 from the block before", Fault::Aligned), ("206 of 5,000 bytes", Fault::Clamped(5000))];
    for (number, (words, fault)) in (0..).zip(faults) {
        bench.registry.set(&single(number), fault);
        let image = bench.registry.reference(&format!("{}:lazy", single(number)));
        bench.pull(&node, &image)?;
        let mounted = bench.mount(&node, &image, Duration::from_secs(20))?;
        let expected = single_content(number);
        match mounted.path() {
            Some(tree) => {
                let seen = bench.read(&tree.join("data"), SINGLE_LEN, Duration::from_secs(30))?;
                bench.line(words, seen.words(&expected), logged(&node, &[]), seen.is(&expected));
            }
            None => bench.line(words, mounted.words(), logged(&node, &[]), false),
        }
    }
    let blob_len = HEALTHY_FILES * HEALTHY_LEN as u64;
    bench.registry.set("healthy", Fault::IgnoresRange);
    let tree: PathBuf = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    let mut is_right = true;
    for number in 0..HEALTHY_FILES {
        is_right &= bench.read_healthy(&tree, number)?.is(&healthy_content(number));
    }
    let sent = bench.registry.bytes("healthy");
    let sees =
        format!("right bytes: {is_right}; the registry sent {:.1} times the blob", sent as f64 / blob_len as f64);
    bench.line(
        "200 with everything, whatever the range",
        sees,
        logged(&node, &[]),
        is_right && sent <= TIMES_MAX * blob_len,
    );
    Ok(())
}

/// Bytes that are not those of their digest: an error, never the bytes; right ones later.
pub(crate) fn wrong_bytes(bench: &Bench) -> Result<()> {
    let node = bench.node()?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference(&format!("{}:lazy", single(0))))?;
    let (file, expected) = (tree.join("data"), single_content(0));
    bench.registry.set(&single(0), Fault::WrongByte);
    let seen = bench.read(&file, SINGLE_LEN, Duration::from_secs(15))?;
    let is_right = !seen.is_wrong(&expected) && !seen.is(&expected);
    bench.line("a wrong byte in each answer", seen.words(&expected), logged(&node, &["digest"]), is_right);
    bench.registry.heal(&single(0));
    // A failure is remembered for a moment, so that nobody asks without a pause.
    let (healed, mut last) = (Instant::now(), String::new());
    let is_right = bench.holds_within(Duration::from_secs(20), || {
        let seen = bench.read(&file, SINGLE_LEN, Duration::from_secs(20))?;
        last = seen.words(&expected);
        Ok(seen.is(&expected))
    })?;
    let sees = format!("{last}, {:.1} s later", healed.elapsed().as_secs_f64());
    bench.line("the same registry, right again", sees, "", is_right);
    Ok(())
}

/// A program that reads again and again what the registry does not have.
pub(crate) fn retry_rate(bench: &Bench) -> Result<()> {
    const SECONDS: u64 = 10;
    /// A few requests a second at most, of one layer.
    const REQUESTS_MAX: usize = 60;
    const LOG_LEN_MAX: usize = 64 << 10;
    let node = bench.node()?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference(&format!("{}:lazy", single(0))))?;
    bench.registry.set(&single(0), Fault::Status(404, None));
    let (asked, log_len) = (bench.registry.asked(&single(0)).len(), logs(&node).len());
    let script = format!("while :; do cat {}; done", tree.join("data").display());
    let mut program = Running::start(&bench.scratch, &mut command("sh", ["-c", &script]))?;
    thread::sleep(Duration::from_secs(SECONDS));
    program.kill();
    let asked = bench.registry.asked(&single(0)).len() - asked;
    let log_len = logs(&node).len() - log_len;
    let sees = format!("{asked} requests and {log_len} bytes of log in {SECONDS} s");
    let is_right = asked <= REQUESTS_MAX && log_len <= LOG_LEN_MAX && fused(&node).is_ok();
    bench.line("404 and a program that tries again at once", sees, logged(&node, &[]), is_right);
    Ok(())
}
