//! `make torture`: every fault injected for real into a node with the real daemons; what a container sees, what is logged.
//!
//! A row injects one kind of fault and reports a line for each case of it. Rows run one after the other, each in a
//! process of its own that is ended when its bound has passed, so that a row that hangs is a line of the table too.
//!
//! ```text
//! torture table [ROW...]     the table, of all rows or those whose names begin so; exit code 1 when a line is WRONG
//! torture kills [COUNT]      so many kills of each daemon, from the first millisecond of a start on
//! torture mixed [MINUTES]    a healthy image beside a hostile registry and hostile images
//! torture soak [MINUTES]     pulls, starts, removals, kills and registry faults; what both daemons hold
//! torture row NAME MODE      one row (REGISTRY in the environment), for the table
//! ```

// clippy knows only functions marked #[test] as tests; the whole program is one.
#![allow(missing_docs)]

mod bench;
mod images;
mod kills;
mod lies;
mod mixed;
mod reader;
mod rows;
mod snapshots;
mod soak;
mod table;

use std::process::ExitCode;

use lazuli_tests::Result;

/// Kills of each daemon in each mode, unless said otherwise.
const KILLS: u64 = 100;
/// Minutes of a mixed run, unless said otherwise.
const MIXED_MINUTES: u64 = 30;
/// Minutes of a soak, unless said otherwise.
const SOAK_MINUTES: u64 = 60;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was right.
fn run(words: &[&str]) -> Result<bool> {
    match words {
        ["table", names @ ..] => table::run(names),
        ["kills", count] => kills::run(count.parse().unwrap_or(KILLS)),
        ["kills"] => kills::run(KILLS),
        ["mixed", minutes] => mixed::run(minutes.parse().unwrap_or(MIXED_MINUTES)),
        ["mixed"] => mixed::run(MIXED_MINUTES),
        ["soak", minutes] => soak::run(minutes.parse().unwrap_or(SOAK_MINUTES)),
        ["soak"] => soak::run(SOAK_MINUTES),
        ["row", name, mode] => rows::run(name, mode).map(|()| true),
        _ => {
            println!("torture: not run; `make torture` runs it, the head of tests/tests/torture/main.rs says how");
            Ok(true)
        }
    }
}
