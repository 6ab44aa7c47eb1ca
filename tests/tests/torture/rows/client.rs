//! Clients that leave, removals, and how long containerd's calls take while something stalls.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use lazuli_tests::{Fault, FaultyRegistry, Finished, Node, Result, containerd::LAZULI, error::Context as _};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    bench::{Bench, HEALTHY_WITHIN, fused, logged, mount_command, send},
    images::{SINGLE_LEN, SLOW_FILES, SLOW_LEN, single},
    reader::Running,
    snapshots::{Call, Snapshots, has_code, prepare_request},
};

/// How long a removal may take, whatever hangs.
const REMOVED_WITHIN: Duration = Duration::from_secs(10);

/// Pulls an image lazily and takes its indexes away, so that they must come again from a registry that hangs.
fn pull_without_index(bench: &Bench, node: &Node, repository: &str) -> Result<String> {
    let image = bench.registry.reference(&format!("{repository}:lazy"));
    let is_announced = |name: &str| {
        let layers = node.snapshotter.root().join("cache/layers");
        fs::read_dir(layers).into_iter().flatten().flatten().any(|layer| {
            let record = fs::read_to_string(layer.path().join("layer.json")).unwrap_or_default();
            record.contains(repository) && layer.path().join(name).exists()
        })
    };
    bench.pull(node, &image)?;
    bench.holds_within(HEALTHY_WITHIN, || Ok(is_announced("index")))?;
    bench.registry.set(repository, Fault::Trickle(Duration::from_secs(5)));
    let layers = node.snapshotter.root().join("cache/layers");
    for layer in fs::read_dir(&layers).at("listing", &layers)?.flatten() {
        let record = fs::read_to_string(layer.path().join("layer.json")).unwrap_or_default();
        if record.contains(repository) {
            let index = layer.path().join("index");
            fs::write(index.with_extension("new"), "damaged").at("writing", &index)?;
            fs::rename(index.with_extension("new"), &index).at("writing", &index)?;
        }
    }
    let killed = fused(node)?;
    send(killed, Signal::KILL)?;
    bench.holds_within(HEALTHY_WITHIN, || Ok(node.snapshotter.fused_id().is_some_and(|id| id != killed)))?;
    Ok(image)
}

/// Images are removed whose index does not come, and while `lazuli-fused` hangs.
///
/// While a container is created, containerd (`metadata/snapshot.go`) collects no garbage, and behind a collection that
/// waits nothing is created: a container that waits for its index may wait so for `start_timeout` and no longer.
pub(crate) fn removal(bench: &Bench) -> Result<()> {
    let node = bench.node_with(&["--background-rate", "0", "--start-timeout", "5"])?;
    let other = FaultyRegistry::before(&bench.upstream)?;
    let healthy = other.reference("healthy:lazy");
    bench.pulled_and_mounted(&node, &healthy)?;
    let image = pull_without_index(bench, &node, &single(0))?;
    // A container of it asks for the index and waits.
    let waiting = bench.scratch.directory("waiting")?;
    let mut mount = mount_command(node.containerd.socket(), "default", LAZULI, &image, &waiting);
    let mut waiting = Running::start(&bench.scratch, &mut mount)?;
    thread::sleep(Duration::from_secs(2));
    waiting.kill();
    remove(bench, &node, &image, "an image whose index does not come")?;
    let started = bench.mount(&node, &healthy, HEALTHY_WITHIN)?;
    let sees = format!("healthy image: {}", started.words());
    bench.line("the same", sees, logged(&node, &[]), started.path().is_some());

    let lazy = other.reference(&format!("{}:lazy", single(1)));
    let tree = bench.pulled_and_mounted(&node, &lazy)?;
    let ordinary = other.reference("ordinary:1");
    node.containerd.pull(&ordinary, LAZULI)?;
    // Else its snapshot is used, and stays.
    crate::mixed::unmount_and_forget(bench, &node, &tree)?;
    let stopped = fused(&node)?;
    send(stopped, Signal::STOP)?;
    remove(bench, &node, &lazy, "a lazy image while lazuli-fused hangs")?;
    let started = bench.mount(&node, &ordinary, HEALTHY_WITHIN)?;
    let sees = format!("an ordinary image: {}", started.words());
    bench.line("the same", sees, logged(&node, &[]), started.path().is_some());
    // It may have been replaced.
    let _ = send(stopped, Signal::CONT);
    Ok(())
}

fn remove(bench: &Bench, node: &Node, image: &str, fault: &str) -> Result<()> {
    let removed = bench.bounded(&mut node.containerd.ctr(["images", "rm", "--sync", image]), REMOVED_WITHIN)?;
    let (sees, is_right) = match &removed {
        None => ("no end in 10 s".to_owned(), false),
        Some((Finished { code: Some(0), .. }, time)) => (format!("removed in {:.1} s", time.as_secs_f64()), true),
        Some((finished, _)) => (finished.stderr.clone(), false),
    };
    bench.line(&format!("removal of {fault}"), sees, "", is_right);
    Ok(())
}

/// Many clients ask for an image whose index does not come, and leave.
pub(crate) fn clients(bench: &Bench) -> Result<()> {
    const CLIENTS: usize = 260;
    let node = bench.node()?;
    let other = FaultyRegistry::before(&bench.upstream)?;
    let healthy = other.reference("healthy:lazy");
    bench.pulled_and_mounted(&node, &healthy)?;
    let image = pull_without_index(bench, &node, &single(0))?;
    let snapshots = Snapshots::connect(&node)?;
    let top = snapshots.top_of(&image)?;
    let (runtime, client) = snapshots.parts();
    let calls: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (mut client, parent) = (client.clone(), top.clone());
            let request = prepare_request(&format!("default/{}/leaves", 1000 + number), &parent, [].into());
            runtime.spawn(async move { client.prepare(request).await.map(drop) })
        })
        .collect();
    thread::sleep(Duration::from_secs(6));
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    thread::sleep(Duration::from_secs(1));
    let fault = format!("{CLIENTS} containers of an image whose index does not come, their clients gone");
    let started = bench.mount(&node, &healthy, HEALTHY_WITHIN)?;
    let sees = format!("healthy image: {}", started.words());
    bench.line(&fault, sees, logged(&node, &[]), started.path().is_some());
    let status = bench.status(&node, HEALTHY_WITHIN)?;
    let sees = if status.is_some() { "lazuli status answers" } else { "lazuli status hangs" };
    bench.line("the same", sees, "", status.is_some());
    bench.registry.heal(&single(0));
    let started = bench.mount(&node, &image, Duration::from_secs(60))?;
    bench.line("the index comes", started.words(), "", started.path().is_some());
    Ok(())
}

/// The p99 of a call while something stalls: 100 ms, as the project promises, and as much again on a busy machine.
const CALL_MAX: Duration = Duration::from_millis(200);
const ROUNDS: usize = 40;

/// Every call of the snapshots service while nothing stalls, and while a registry, FUSE and `lazuli-fused` do.
///
/// Not among them is `Mounts` of a container on a lazy image: that is its start, which waits for `lazuli-fused`.
pub(crate) fn calls(bench: &Bench) -> Result<()> {
    let node = bench.node()?;
    let healthy = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    bench.read_healthy(&healthy, 0)?;
    let slow = bench.pulled_and_mounted(&node, &bench.registry.reference("slow:lazy"))?;
    let snapshots = Snapshots::connect(&node)?;
    time_calls(bench, &node, &snapshots, "nothing stalls")?;
    bench.registry.set("slow", Fault::Hang);
    let mut readers = Vec::new();
    for number in 0..SLOW_FILES {
        readers.push(bench.reader(&slow.join(format!("files/{number}")), SLOW_LEN)?);
    }
    time_calls(bench, &node, &snapshots, "the registry hangs, 200 readers wait")?;
    let stopped = fused(&node)?;
    send(stopped, Signal::STOP)?;
    readers.push(bench.reader(&healthy.join("files/3"), SINGLE_LEN)?);
    time_calls(bench, &node, &snapshots, "lazuli-fused and with it FUSE hangs")?;
    // It may have been replaced.
    let _ = send(stopped, Signal::CONT);
    Ok(())
}

fn time_calls(bench: &Bench, node: &Node, snapshots: &Snapshots, fault: &str) -> Result<()> {
    use Call::{Commit, List, Mounts, Prepare, Remove, Stat, Usage, View};
    const LIMIT: Duration = Duration::from_secs(5);
    let mut times: Vec<(Call, Vec<Duration>)> = Vec::new();
    let mut failures = 0;
    let begun = Instant::now();
    let top = snapshots.top_of(&bench.registry.reference("healthy:lazy"))?;
    let mut timed = |call: Call, key: &str| {
        let answer = snapshots.call(call, key, "", LIMIT);
        failures += u32::from(!has_code(&answer, Code::Ok));
        match times.iter_mut().find(|(known, _)| *known == call) {
            Some((_, of_call)) => of_call.push(answer.1),
            None => times.push((call, vec![answer.1])),
        }
    };
    for round in 0..ROUNDS {
        let name = |what: &str| format!("default/{}/{what}-{}", 2000 + round, fault.replace(' ', "-"));
        let (active, view) = (name("active"), name("view"));
        for (call, key) in [
            (Prepare, &active),
            (View, &view),
            (Mounts, &active),
            (Stat, &active),
            (Usage, &active),
            (List, &active),
            (Usage, &top),
            (Remove, &view),
            (Commit, &active),
            (Remove, &format!("{active}-committed")),
        ] {
            timed(call, key);
        }
        if begun.elapsed() > Duration::from_secs(20) {
            break;
        }
    }
    let at = |sorted: &[Duration], part: usize| sorted.get((sorted.len() * part / 100).min(sorted.len() - 1)).copied();
    let mut worst = Duration::ZERO;
    let mut cells = Vec::new();
    for (call, of_call) in &mut times {
        of_call.sort();
        let (half, most) = (at(of_call, 50).unwrap_or_default(), at(of_call, 99).unwrap_or_default());
        worst = worst.max(most);
        cells.push(format!("{call:?} {:.0}/{:.0}", half.as_secs_f64() * 1e3, most.as_secs_f64() * 1e3));
    }
    let sees = format!("p50/p99 in ms: {}; {failures} failed", cells.join(" "));
    bench.line(fault, sees, logged(node, &[]), failures == 0 && worst <= CALL_MAX);
    Ok(())
}
