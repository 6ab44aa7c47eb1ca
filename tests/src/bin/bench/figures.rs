//! Times and memory of commands, and the middle of such figures.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Finished, HarnessError, Result, Scratch,
    error::Context as _,
    process::{command, finish, require_program},
};

/// Time and memory of a command from its start to its end.
pub(crate) struct Used {
    /// Seconds of a clock.
    pub(crate) wall: f64,
    /// Seconds of processors.
    pub(crate) cpu: f64,
    /// Memory at the peak, in KiB.
    pub(crate) memory_kib: f64,
    /// How it ended.
    pub(crate) finished: Finished,
}

/// Runs a command to its end, whatever its exit code.
///
/// It is a child of `time`: the peak of a child of this program would begin with what this program holds.
pub(crate) fn used_by(measured: &Command, scratch: &Scratch) -> Result<Used> {
    require_program("time")?;
    let path = scratch.join("time");
    let mut time = command("time", ["-f", "%e %U %S %M", "-o"]);
    time.arg(&path).arg(measured.get_program()).args(measured.get_args());
    time.envs(measured.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let finished = finish(&mut time)?;
    let printed = fs::read_to_string(&path).at("reading", &path)?;
    // The last line: before it one says that the command failed.
    let words: Vec<f64> =
        printed.lines().last().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
    let [wall, user, system, memory_kib] = words[..] else {
        return Err(HarnessError::Unexpected(format!("time: {printed}")));
    };
    Ok(Used { wall, cpu: user + system, memory_kib, finished })
}

/// Seconds that `work` takes, unless it fails.
pub(crate) fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let clock = Instant::now();
    work()?;
    Ok(clock.elapsed().as_secs_f64())
}

/// Milliseconds.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The middle one, of an even number the lower one.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// How many processes have wanted a processor, on average of the last minute.
pub(crate) fn load() -> f64 {
    let averages = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    averages.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}
