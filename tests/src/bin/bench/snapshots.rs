//! How long a container waits for its snapshot, and what both daemons hold in memory: `bench snapshots [NAME]`.
//!
//! - `PrepareAndMounts`: both together on a node with 1,000 snapshots: half and 99 of 100 within, on an ordinary base
//!   and on a lazy one.
//! - `Memory`: with 10 images of 50,000 files mounted, in both modes, after every file was looked at.
//!
//! NAME takes the figures of one of them only. The benchmarks are those of `tests/conformance`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use lazuli_tests::{HarnessError, Result, Scratch, TestRegistry, conformance, error::Context as _};

pub(crate) fn bench(name: Option<&str>) -> Result<()> {
    // Sockets lie deep below it.
    let scratch = Scratch::new("bench-snapshots")?;
    scratch.clear_when_interrupted();
    let registry = TestRegistry::start(&scratch)?;
    let arguments = ["-test.run", "^$", "-test.bench", name.unwrap_or("."), "-test.benchtime", "1x"];
    let mut suite = conformance::suite(&scratch, &registry, &arguments)?;
    let load = fs::read_to_string("/proc/loadavg").context("reading the load")?;
    println!("load: {}", load.split(' ').take(3).collect::<Vec<_>>().join(" "));
    let mut child = suite.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("running the benchmarks")?;
    let mut other_lines = Vec::new();
    for line in child.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines()) {
        let line = line.context("reading what the benchmarks print")?;
        match line.strip_prefix("Benchmark") {
            Some(figures) => println!("{figures}"),
            None => other_lines.push(line),
        }
    }
    match child.wait().context("waiting for the benchmarks")?.success() {
        true => Ok(()),
        false => Err(HarnessError::Unexpected(format!("the benchmarks failed:\n{}", other_lines.join("\n")))),
    }
}
