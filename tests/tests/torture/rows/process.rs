//! Daemons that are killed, hang, or cannot write what they have to say.

use std::{
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Fault, HarnessError, Result, SnapshotterOptions, error::Context as _, process::command, programs::program,
};
use rustix::process::Signal;

use crate::{
    bench::{Bench, HEALTHY_WITHIN, fused, logged, send},
    images::{SINGLE_LEN, single, single_content},
    kills::{Kills, kill_early},
    reader::{Running, forget_pages},
};

/// Kills of each daemon in the table; `make torture-kills` has more.
const KILLS: u64 = 5;

/// A layer is complete, containers run from it, and `lazuli-fused` is killed before or after it was written down.
pub(crate) fn zeros(bench: &Bench) -> Result<()> {
    let node = bench.node_with(&["--background-rate", "64"])?;
    let moments = [("at once", 0), ("after 1 s", 1000), ("after 2 s", 2000), ("after 4 s", 4000)];
    for (number, (words, millis)) in (0..).zip(moments) {
        let image = bench.registry.reference(&format!("{}:lazy", single(number)));
        bench.pull(&node, &image)?;
        let is_complete = bench.is_complete_within(&node, &image, Duration::from_secs(20))?;
        let completed = Instant::now();
        let (_first, second) = (bench.mounted(&node, &image)?, bench.mounted(&node, &image)?);
        thread::sleep(Duration::from_millis(millis).saturating_sub(completed.elapsed()));
        bench.registry.set(&single(number), Fault::Delay(Duration::from_millis(1500)));
        send(fused(&node)?, Signal::KILL)?;
        thread::sleep(Duration::from_millis(700));
        let (file, expected) = (second.join("data"), single_content(number));
        let seen = bench.read(&file, SINGLE_LEN, Duration::from_secs(30))?;
        let again = bench.read(&file, SINGLE_LEN, Duration::from_secs(30))?;
        let sees = format!("complete: {is_complete}; {}, later {}", seen.words(&expected), again.words(&expected));
        let fault = format!("a complete layer, lazuli-fused killed {words}, registry slow");
        bench.line(&fault, sees, logged(&node, &[]), seen.is(&expected) && again.is(&expected));
    }
    Ok(())
}

/// Each daemon killed at random moments, from the first millisecond of a pull and a start on.
pub(crate) fn early_kills(bench: &Bench) -> Result<()> {
    let mut node = bench.node_with(&["--background-rate", "64"])?;
    let mut kills = Kills::default();
    for number in 0..2 * KILLS {
        kill_early(bench, &mut node, number, &mut kills)?;
    }
    let fault = format!("{KILLS} kills of each daemon, from 1 ms of a pull on");
    bench.line(&fault, kills.words(), logged(&node, &[]), kills.are_right());
    Ok(())
}

/// Standard error of the snapshotter is a pipe that nobody reads; `lazuli-fused` is killed.
pub(crate) fn broken_pipe(bench: &Bench) -> Result<()> {
    let wrapper = ["bash", "-c", r#"exec "$0" "$@" 2> >(exec true)"#].map(str::to_owned).to_vec();
    let flags = SnapshotterOptions::with_flags(&["--background-rate", "0"]).flags;
    let node = bench.node_as(SnapshotterOptions { flags, wrapper, ..SnapshotterOptions::default() })?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    bench.read_healthy(&tree, 0)?;
    for kill in 0..2 {
        let killed = fused(&node)?;
        send(killed, Signal::KILL)?;
        forget_pages(&tree.join("files/0")).at("forgetting pages of", &tree)?;
        bench.healthy_line(&node, "stderr is a broken pipe, lazuli-fused is killed: what is there", &tree, 0)?;
        bench.healthy_line(&node, "the same: what is not there", &tree, 3 + 2 * kill)?;
        if !bench.holds_within(HEALTHY_WITHIN, || Ok(node.snapshotter.fused_id().is_some_and(|id| id != killed)))? {
            break;
        }
    }
    Ok(())
}

/// `lazuli-fused` hangs (SIGSTOP): it is noticed and replaced; `lazuli status` ends.
pub(crate) fn hang(bench: &Bench) -> Result<()> {
    const NOTICED_WITHIN: Duration = Duration::from_secs(90);
    let node = bench.node()?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    bench.read_healthy(&tree, 0)?;
    let stopped = fused(&node)?;
    send(stopped, Signal::STOP)?;
    let reader = bench.reader(&tree.join("files/3"), SINGLE_LEN)?;
    let mut status = command(program("lazuli")?, ["status", "--root"]);
    let mut status = Running::start(&bench.scratch, status.arg(node.snapshotter.root()))?;
    thread::sleep(Duration::from_secs(1));
    let ended_alone = status.has_ended();
    status.signal(Signal::TERM)?;
    thread::sleep(Duration::from_secs(1));
    let is_right = status.has_ended();
    let sees = if is_right { "lazuli status ends on SIGTERM" } else { "lazuli status cannot be interrupted" };
    bench.line("lazuli-fused hangs (SIGSTOP)", format!("{sees}; ended by itself: {ended_alone}"), "", is_right);
    status.kill();
    let words = |finished: bool| if finished { "lazuli status ends by itself" } else { "lazuli status hangs" };
    let mut status = command(program("lazuli")?, ["status", "--root"]);
    let ended = bench.bounded(status.arg(node.snapshotter.root()), Duration::from_secs(30))?.is_some();
    bench.line("the same", words(ended), "", ended);
    let expected = crate::images::healthy_content(3);
    let seen = reader.finish(NOTICED_WITHIN)?;
    let sees = format!("a reader that waits: {}", seen.words(&expected));
    bench.line("the same, for 90 s", sees, logged(&node, &[]), seen.is(&expected));
    // Nothing is stopped any longer when the row ends; a new daemon may have taken its place.
    let _ = send(stopped, Signal::CONT);
    Ok(())
}

/// The snapshotter is stopped and `lazuli-fused` told to end, in this order, while a container runs; both come back.
pub(crate) fn order_of_stops(bench: &Bench) -> Result<()> {
    let mut node = bench.node()?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    bench.read_healthy(&tree, 0)?;
    node.snapshotter.stop();
    let told = fused(&node)?;
    send(told, Signal::TERM)?;
    thread::sleep(Duration::from_secs(2));
    let goes_on = node.snapshotter.fused_id() == Some(told);
    node.snapshotter.restart()?;
    let again = bench.mount(&node, &bench.registry.reference("healthy:lazy"), HEALTHY_WITHIN * 2)?;
    let new = again.path().ok_or_else(|| HarnessError::Unexpected(again.words()))?;
    let sees = format!("lazuli-fused refuses to end: {goes_on}; a new container: {}", again.words());
    let (seen, expected) = (bench.read_healthy(new, 3)?, crate::images::healthy_content(3));
    let logged_line = logged(&node, &["mount"]);
    bench.line("both are stopped and started again", sees, logged_line, seen.is(&expected));
    Ok(())
}
