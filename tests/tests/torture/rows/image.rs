//! Images that lie, and layers that several images share.

use std::{collections::HashMap, fs, path::PathBuf, time::Duration};

use lazuli_tests::{
    Fault, FaultyRegistry, Node, Result, TarLayer, containerd::LAZULI, error::Context as _, registry_server::push_to,
};

use crate::{
    bench::{Bench, HEALTHY_WITHIN, Mounted, fused, logged, status_number},
    images::{SINGLE_LEN, single, single_content, write_lazy},
    lies::{
        CLAIMED_LEN, EVIL, GOOD, message, own, publish_claims, publish_hostile_index, publish_hot_lie, publish_trap,
        secret,
    },
    reader::Seen,
};

/// How long it may take until a layer that lies has been found out: its bytes arrive in a moment.
const FOUND_OUT_WITHIN: Duration = Duration::from_secs(40);

/// An image whose config is another's: its content must not be shown under the other's chain ID.
pub(crate) fn chain_ids(bench: &Bench) -> Result<()> {
    publish_trap(&bench.scratch, &bench.upstream)?;
    // Without this line a container on the very chain is shown what is not verified yet: docs/TRUST.md.
    let config = bench.scratch.join("config.toml");
    fs::write(&config, "[trust]\nunverified = \"wait\"\n").at("writing", &config)?;
    let node = bench.node_with(&["--background-rate", "64", "--config", &config.to_string_lossy()])?;
    let (trap, honest) = (bench.registry.reference("evil:trap"), bench.registry.reference("good:lazy"));
    // Whether it is refused or taken is for the snapshotter to say.
    let pulled = bench.bounded(&mut node.lazuli_pull_command(&trap)?, Duration::from_secs(60))?;
    let pulled = pulled.map_or("did not end".to_owned(), |(finished, _)| format!("exit code {:?}", finished.code));

    let ordinary = bench.registry.reference("good:1");
    let words = ["images", "pull", "--plain-http", "--snapshotter", LAZULI, &ordinary];
    bench.bounded(&mut node.containerd.ctr(words), Duration::from_secs(60))?;
    let shown = bench.mount(&node, &ordinary, Duration::from_secs(60))?;
    let fault = format!("a lie about the chain ID (pull: {pulled}), then the honest ordinary image");
    report_message(bench, &node, &fault, &shown, &[])?;

    let mut other = node.lazuli_pull_command(&honest)?;
    bench.bounded(other.args(["--namespace", "other"]), Duration::from_secs(60))?;
    let shown = bench.mount_in(&node, "other", LAZULI, &honest, Duration::from_secs(60))?;
    report_message(bench, &node, "the same, the honest lazy image in another namespace", &shown, &[])?;

    let is_found_out = bench.holds_within(FOUND_OUT_WITHIN, || {
        let shown = bench.mount(&node, &trap, Duration::from_secs(20))?;
        Ok(!reads(bench, &shown)?.is_some_and(|bytes| bytes == EVIL))
    })?;
    let sees = if is_found_out { "no longer shown" } else { "EVIL for good" };
    bench.line("the image that lies, later", sees, logged(&node, &["chain"]), is_found_out);
    Ok(())
}

/// `/etc/msg` of a tree; `None` when it cannot be read.
fn reads(bench: &Bench, mounted: &Mounted) -> Result<Option<Vec<u8>>> {
    let Some(tree) = mounted.path() else { return Ok(None) };
    match bench.read(&tree.join("etc/msg"), GOOD.len(), HEALTHY_WITHIN)? {
        Seen::Bytes(bytes, _) => Ok(Some(bytes)),
        _ => Ok(None),
    }
}

fn report_message(bench: &Bench, node: &Node, fault: &str, shown: &Mounted, words: &[&str]) -> Result<()> {
    let bytes = reads(bench, shown)?;
    let sees = match &bytes {
        Some(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        None => shown.words(),
    };
    bench.line(fault, sees, logged(node, words), bytes.is_none_or(|bytes| bytes == GOOD));
    Ok(())
}

/// A hot pack that holds other bytes than the frames: found out when all has arrived.
pub(crate) fn hot_pack(bench: &Bench) -> Result<()> {
    publish_hot_lie(&bench.scratch, &bench.upstream)?;
    let node = bench.node_with(&["--background-rate", "64"])?;
    let image = bench.registry.reference("hot-lies:lazy");
    bench.pull(&node, &image)?;
    let is_found_out = bench.holds_within(FOUND_OUT_WITHIN, || {
        let shown = bench.mount(&node, &image, Duration::from_secs(20))?;
        Ok(!reads(bench, &shown)?.is_some_and(|bytes| bytes == EVIL))
    })?;
    let sees = if is_found_out { "no longer shown" } else { "the pack's bytes for good" };
    bench.line("a hot pack that lies about a file", sees, logged(&node, &[]), is_found_out);
    Ok(())
}

/// A layer that claims, for a file of its own, the digest of a private one: it must not be given those bytes.
pub(crate) fn dedup_oracle(bench: &Bench) -> Result<()> {
    publish_claims(&bench.scratch, &bench.upstream)?;
    let (secret, own) = (secret(), own());
    let node = bench.node_with(&["--background-rate", "64"])?;
    let elsewhere = FaultyRegistry::before(&bench.upstream)?;
    let image = bench.registry.reference("secret:lazy");
    bench.pulled_and_mounted(&node, &image)?;
    bench.is_complete_within(&node, &image, Duration::from_secs(20))?;
    bench.pull(&node, &elsewhere.reference("claims:lazy"))?;
    // A layer whose claim is found out may be refused; the other's bytes it must not have.
    let mounted = bench.mount(&node, &elsewhere.reference("claims:lazy"), HEALTHY_WITHIN * 2)?;
    let (sees, is_right) = match mounted.path() {
        Some(tree) => {
            let seen = bench.read(&tree.join("data"), CLAIMED_LEN, HEALTHY_WITHIN)?;
            match seen.is(&secret) {
                true => ("THE OTHER'S BYTES".to_owned(), false),
                false => (seen.words(&own), !seen.is_wrong(&own)),
            }
        }
        None => (mounted.words(), true),
    };
    bench.line("a dedup section that claims a file of another registry's image", sees, logged(&node, &[]), is_right);
    Ok(())
}

/// One layer in images of two registries, one of which refuses.
pub(crate) fn places(bench: &Bench) -> Result<()> {
    let node = bench.node()?;
    let other = FaultyRegistry::before(&bench.upstream)?;
    let name = |number| format!("{}:lazy", single(number));
    // A fresh container of an image whose registry is healthy. It is pulled in another namespace: in one that has the
    // snapshots already, containerd says nothing of it.
    bench.pull(&node, &bench.registry.reference(&name(0)))?;
    let healthy = other.reference(&name(0));
    bench.pull_with(&node, node.lazuli_pull_command(&healthy)?.args(["--namespace", "other"]))?;
    bench.registry.set(&single(0), Fault::AllStatus(404));
    let mounted = bench.mount_in(&node, "other", LAZULI, &healthy, Duration::from_secs(30))?;
    let fault = "X from A, then Y with its layers from B; A has it no longer; a container of Y";
    report_data(bench, &node, fault, mounted.path().map(|tree| tree.join("data")), 0, &mounted.words())?;
    // A running container whose layer somebody else has announced from elsewhere.
    let (own, above) = (TarLayer::new().file("data", single_content(1)).finish()?, message(GOOD)?);
    let layout = write_lazy(&bench.scratch, "above", vec![above, own])?;
    push_to(&bench.upstream, &layout, "above:lazy")?;
    let tree = bench.pulled_and_mounted(&node, &bench.registry.reference(&name(1)))?;
    bench.pull(&node, &other.reference("above:lazy"))?;
    other.set("above", Fault::AllStatus(404));
    let fault = "X runs from A; an image of B with its layer is pulled; B has it no longer";
    report_data(bench, &node, fault, Some(tree.join("data")), 1, "")
}

fn report_data(
    bench: &Bench,
    node: &Node,
    fault: &str,
    path: Option<PathBuf>,
    number: u64,
    otherwise: &str,
) -> Result<()> {
    let expected = single_content(number);
    let (sees, is_right) = match path {
        Some(path) => {
            let seen = bench.read(&path, SINGLE_LEN, Duration::from_secs(30))?;
            (seen.words(&expected), seen.is(&expected))
        }
        None => (otherwise.to_owned(), false),
    };
    bench.line(fault, sees, logged(node, &[]), is_right);
    Ok(())
}

/// Indexes of a few KiB that claim to be a gigabyte each, and are.
pub(crate) fn hostile_index(bench: &Bench) -> Result<()> {
    const LAYERS: u64 = 6;
    /// The memory that `lazuli-fused` may hold at its peak: its budget for indexes and as much again.
    const PEAK_MAX: u64 = 160 << 20;
    publish_hostile_index(&bench.scratch, &bench.upstream, LAYERS)?;
    let node = bench.node()?;
    let healthy = bench.pulled_and_mounted(&node, &bench.registry.reference("healthy:lazy"))?;
    let image = bench.registry.reference("hostile:lazy");
    bench.bounded(&mut node.lazuli_pull_command(&image)?, Duration::from_secs(60))?;
    let mounted = bench.mount(&node, &image, Duration::from_secs(40))?;
    let peak = status_number(fused(&node)?, "VmHWM");
    let sees = format!("{}; lazuli-fused held {} MiB at the peak", mounted.words(), peak >> 20);
    // It may be pulled completely, without its indexes, or refused; not waited for.
    let is_right = !matches!(mounted, Mounted::Waiting(_)) && peak <= PEAK_MAX;
    bench.line("6 indexes that are a gigabyte each", sees, logged(&node, &["index"]), is_right);
    bench.healthy_line(&node, "the same", &healthy, 1)
}

/// Labels with one more.
pub(crate) fn with_label(mut labels: HashMap<String, String>, key: &str, value: &str) -> HashMap<String, String> {
    labels.insert(key.to_owned(), value.to_owned());
    labels
}
