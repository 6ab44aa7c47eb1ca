//! Figures beside what a user would take instead, each set of them in one run: `bench SUBCOMMAND`.
//!
//! The targets of the Makefile that begin with `bench` call it; `docs/MEASUREMENTS.md` holds what it printed. It needs
//! root and works below `target/bench-<subcommand>`, on one file system; where an `IMAGE` is, it is one of
//! `tests/images`. *Plain* is what is not compressed, MB are 10^6 bytes.

mod bombs;
mod convert;
mod figures;
mod hot_set;
mod mounts;
mod snapshots;
mod start_reads;
mod starts;
mod unpacked;

use std::process::ExitCode;

use lazuli_tests::{HarnessError, Result, Scratch};

const USAGE: &str =
    "usage: bench starts [--samples N] [--seed N] [--link loopback|RATEmbit,MILLISECONDSms|RATEgbit,MILLISECONDSms]...
                    [--work ready|whole|mapped|four]... [--way full|derived|recorded|unrecorded|PEER]...
                    [--json FILE] [--html FILE] IMAGE|fleet...
       bench convert [--large] [IMAGE...] [-- OPTION...]
       bench mounts [--rounds N] [--no-images] [IMAGE...]
       bench snapshots [NAME]
       bench hot-set [IMAGE...]
       bench bombs [PROGRAM]
       bench start-reads IMAGE";

fn main() -> ExitCode {
    match bench(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(mut words: impl Iterator<Item = String>) -> Result<()> {
    let name = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    match (name.as_str(), words.as_slice()) {
        ("starts", _) => starts::bench(words),
        ("convert", _) => convert::bench(&words),
        ("mounts", _) => mounts::bench(&words),
        ("snapshots", [] | [_]) => snapshots::bench(words.first().map(String::as_str)),
        ("hot-set", _) => hot_set::bench(&words),
        ("bombs", [] | [_]) => bombs::bench(words.first().map(String::as_str)),
        ("start-reads", [image]) => start_reads::print(image),
        _ => Err(usage()),
    }
}

fn usage() -> HarnessError {
    HarnessError::Unexpected(USAGE.to_owned())
}

/// Where a subcommand works; whatever it leaves there ends with it, or with Ctrl-C.
fn scratch(subcommand: &str) -> Result<Scratch> {
    let scratch = Scratch::in_target(&format!("bench-{subcommand}"))?;
    scratch.clear_when_interrupted();
    Ok(scratch)
}

/// The images that are named, or these.
fn images_or<'a>(named: &'a [String], usual: &[&'a str]) -> Vec<&'a str> {
    match named {
        [] => usual.to_vec(),
        _ => named.iter().map(String::as_str).collect(),
    }
}
