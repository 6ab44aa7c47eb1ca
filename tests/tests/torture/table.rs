//! The table: rows in processes of their own, with bounds, and what they reported.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use lazuli_tests::{
    HarnessError, Result, Scratch, TestRegistry, error::Context as _, process::command, scratch::clear,
};

use crate::{
    bench::{Line, cell},
    images,
    rows::{REGISTRY, ROWS, Row},
};

/// Runs rows whose names begin with one of `names`, all without names; prints the table. Whether all was right.
pub(crate) fn run(names: &[&str]) -> Result<bool> {
    let is_wanted = |row: &&Row| names.is_empty() || names.iter().any(|name| row.name.starts_with(name));
    let rows: Vec<&Row> = ROWS.iter().filter(is_wanted).collect();
    if rows.is_empty() {
        let known: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        return Err(HarnessError::Unexpected(format!("no row is called so; there are: {}", known.join(" "))));
    }
    let scratch = Scratch::new("torture")?;
    let registry = TestRegistry::start(&scratch)?;
    let started = Instant::now();
    images::publish(&scratch, &registry)?;
    eprintln!("images are published after {:.0} s", started.elapsed().as_secs_f64());
    println!("| kind | row | mode | fault | a container sees | logged | |");
    println!("|---|---|---|---|---|---|---|");
    let (mut wrong, mut all) = (0, 0);
    for row in rows {
        for mode in row.modes {
            let begun = Instant::now();
            let lines = run_row(row, mode, registry.address(), &scratch)?;
            eprintln!("{} {mode}: {:.0} s", row.name, begun.elapsed().as_secs_f64());
            for line in lines {
                let verdict = if line.is_right { "ok" } else { "WRONG" };
                let Line { fault, sees, logged, .. } = &line;
                println!("| {} | {} | {mode} | {fault} | {sees} | {logged} | {verdict} |", row.kind, row.name);
                wrong += u32::from(!line.is_right);
                all += 1;
            }
        }
    }
    println!("\n{wrong} of {all} lines WRONG, {:.0} s", started.elapsed().as_secs_f64());
    Ok(wrong == 0)
}

/// Runs a row to its end, or ends it after its bound.
fn run_row(row: &Row, mode: &str, registry: &str, scratch: &Scratch) -> Result<Vec<Line>> {
    let output = scratch.join(format!("{}-{mode}.lines", row.name));
    let program = std::env::current_exe().context("finding this program")?;
    let mut child = command(program, ["row", row.name, mode])
        .env(REGISTRY, registry)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&output).at("creating", &output)?)
        .spawn()
        .context("starting a row")?;
    let deadline = Instant::now() + row.bound;
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for a row")? {
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut failure = None;
    if status.is_none() {
        failure = Some(format!("the row did not end within its bound of {} s", row.bound.as_secs()));
        child.kill().context("ending a row")?;
        child.wait().context("waiting for a row")?;
        // Its processes and mounts, which it could not end itself.
        clear(&std::env::temp_dir().join(format!("lazuli-{}-0", child.id())));
    } else if !status.is_some_and(|status| status.success()) {
        failure = Some("the row ended with an error".to_owned());
    }
    let printed = fs::read_to_string(&output).at("reading", &output)?;
    let mut lines: Vec<Line> = printed.lines().filter_map(Line::parse).collect();
    if let Some(failure) = failure {
        let last = printed.lines().rev().find(|line| line.starts_with("error: ")).unwrap_or_default();
        let sees = cell(&format!("{failure} {last}"));
        lines.push(Line { fault: "all of it".to_owned(), sees, logged: String::new(), is_right: false });
    }
    Ok(lines)
}
