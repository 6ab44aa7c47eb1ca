//! Outages that are longer than patience: readers get an error, all of them at about the same time.

use std::time::Duration;

use lazuli_tests::{Fault, FaultyRegistry, Result, process::command, programs::program};

use crate::{
    bench::{Bench, logged},
    images::{SINGLE_LEN, single, single_content},
    reader::Seen,
};

/// The option, in seconds.
const PATIENCE: u64 = 10;
/// The earliest and the latest end of a read: the kernel asks a second time and hears it at once, and a busy machine takes
/// its time.
const EARLIEST: Duration = Duration::from_secs(PATIENCE * 8 / 10);
const LATEST: Duration = Duration::from_secs(PATIENCE + 10);

pub(crate) fn patience(bench: &Bench) -> Result<()> {
    let help = lazuli_tests::process::finish(&mut command(program("lazuli-snapshotter")?, ["--help"]))?;
    if !help.stdout.contains("--patience ") {
        bench.line("outages longer than patience", "there is no option for it", "", false);
        return Ok(());
    }
    let node = bench.node_with(&["--background-rate", "0", "--patience", &PATIENCE.to_string()])?;
    let faults = [
        ("connections that end", Fault::Close),
        ("redirect to a dead host", Fault::DeadRedirect),
        ("hanging behind the headers", Fault::Hang),
        ("503", Fault::Status(503, None)),
        ("404", Fault::Status(404, None)),
        ("429, Retry-After 90", Fault::Status(429, Some(90))),
        ("200 with a page", Fault::Page),
        ("a byte in 5 s", Fault::Trickle(Duration::from_secs(5))),
        ("64 KiB of each answer", Fault::SilentAfter(64 << 10)),
    ];
    let mut readers = Vec::new();
    for (number, (words, fault)) in (0..).zip(faults) {
        let registry = FaultyRegistry::before(&bench.upstream)?;
        let image = registry.reference(&format!("{}:lazy", single(number)));
        let tree = bench.pulled_and_mounted(&node, &image)?;
        registry.set(&single(number), fault);
        readers.push((number, words, image, bench.reader(&tree.join("data"), SINGLE_LEN)?));
    }
    for (number, words, image, reader) in readers {
        let seen = reader.finish(LATEST + Duration::from_secs(5))?;
        let is_right = matches!(&seen, Seen::Failed(_, time) if (EARLIEST..=LATEST).contains(time));
        let logged = logged(&node, &[&image[..image.rfind(':').unwrap_or(0)]]);
        let fault = format!("{words}, for good, patience {PATIENCE} s");
        bench.line(&fault, seen.words(&single_content(number)), logged, is_right);
    }
    Ok(())
}
