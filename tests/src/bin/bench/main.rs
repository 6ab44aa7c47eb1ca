//! Figures beside what a user would take instead, each set of them in one run: `bench SUBCOMMAND`.
//!
//! The targets of the Makefile that begin with `bench` call it; `docs/MEASUREMENTS.md` holds what it printed.

mod starts;

use std::process::ExitCode;

use lazuli_tests::{HarnessError, Result};

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
    match words.next().as_deref() {
        Some("starts") => starts::bench(words.collect()),
        _ => Err(HarnessError::Unexpected("usage: bench starts ...".to_owned())),
    }
}
