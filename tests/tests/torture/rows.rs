//! All rows.

mod client;
mod credentials;
mod disk;
mod image;
mod network;
mod patience;
mod process;
mod tls;

use std::time::Duration;

use lazuli_tests::{HarnessError, Result, programs::MODES};

use crate::bench::Bench;

/// Where a row finds the registry with the images: a name in the environment.
pub(crate) const REGISTRY: &str = "LAZULI_TORTURE_REGISTRY";

/// A kind of fault and how it is tried.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Where the fault is: network, registry, credentials, disk, process, image, client.
    pub(crate) kind: &'static str,
    /// The row is ended after this, and WRONG.
    pub(crate) bound: Duration,
    pub(crate) modes: &'static [&'static str],
    pub(crate) run: fn(&Bench) -> Result<()>,
}

const BOTH: &[&str] = &MODES;
/// Where the mode makes no difference to the fault.
const KERNEL: &[&str] = &["erofs"];

const fn row(
    kind: &'static str,
    name: &'static str,
    seconds: u64,
    modes: &'static [&'static str],
    run: fn(&Bench) -> Result<()>,
) -> Row {
    Row { name, kind, bound: Duration::from_secs(seconds), modes, run }
}

/// In the order in which they run.
pub(crate) const ROWS: &[Row] = &[
    row("network", "blips", 120, BOTH, network::blips),
    row("network", "tls", 120, KERNEL, tls::tls),
    row("network", "patience", 150, BOTH, patience::patience),
    row("network", "isolation", 120, BOTH, network::isolation),
    row("network", "mirror", 90, KERNEL, network::mirror),
    row("network", "background", 120, KERNEL, network::background),
    row("registry", "ranges", 120, KERNEL, network::ranges),
    row("registry", "wrong-bytes", 60, BOTH, network::wrong_bytes),
    row("registry", "retry-rate", 60, BOTH, network::retry_rate),
    row("registry", "places", 120, KERNEL, image::places),
    row("credentials", "deputy", 90, KERNEL, credentials::deputy),
    row("credentials", "pull-secret", 120, KERNEL, credentials::pull_secret),
    row("credentials", "helper", 180, KERNEL, credentials::helper),
    row("disk", "full", 120, BOTH, disk::full),
    row("disk", "full-database", 90, KERNEL, disk::full_database),
    row("disk", "bad-block", 180, BOTH, disk::bad_block),
    row("disk", "mapped-bad-block", 180, BOTH, disk::mapped_bad_block),
    row("disk", "slow-sync", 150, KERNEL, disk::slow_sync),
    row("disk", "flipped-bit", 120, BOTH, disk::flipped_bit),
    row("disk", "damaged-presence", 120, BOTH, disk::damaged_presence),
    row("process", "zeros", 180, BOTH, process::zeros),
    row("process", "early-kills", 300, BOTH, process::early_kills),
    row("process", "broken-pipe", 90, KERNEL, process::broken_pipe),
    row("process", "hang", 180, KERNEL, process::hang),
    row("process", "order-of-stops", 60, KERNEL, process::order_of_stops),
    row("image", "chain-ids", 240, KERNEL, image::chain_ids),
    row("image", "hot-pack", 120, KERNEL, image::hot_pack),
    row("image", "dedup-oracle", 120, KERNEL, image::dedup_oracle),
    row("image", "hostile-index", 180, KERNEL, image::hostile_index),
    row("client", "removal", 120, KERNEL, client::removal),
    row("client", "clients", 150, KERNEL, client::clients),
    row("client", "calls", 150, KERNEL, client::calls),
];

/// Runs one row and prints its lines.
pub(crate) fn run(name: &str, mode: &str) -> Result<()> {
    let row = ROWS.iter().find(|row| row.name == name);
    let row = row.ok_or_else(|| HarnessError::Unexpected(format!("no row is called {name}")))?;
    let registry = std::env::var(REGISTRY);
    let registry = registry.map_err(|_| HarnessError::Missing(format!("{REGISTRY} does not name a registry")))?;
    let bench = Bench::new(name, &registry, mode)?;
    let done = (row.run)(&bench);
    if let Err(error) = &done {
        println!("error: {error}");
    }
    if done.is_ok() && bench.line_count() == 0 {
        println!("error: the row reports nothing");
        return Err(HarnessError::Unexpected("a row reports nothing".to_owned()));
    }
    done
}
