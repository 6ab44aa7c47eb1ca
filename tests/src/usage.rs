//! Processors and memory: what the machine spends, and what daemons held at their peak.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::error::{Context as _, Result};

/// Ticks a second in `/proc`: USER_HZ, the same on every architecture that containerd runs on.
const TICKS_PER_SECOND: u64 = 100;
/// Programs that name a node's directory on their command line without being daemons of it.
const NO_DAEMONS: [&str; 6] = ["containerd-shim-runc-v2", "ctr", "lazuli", "runc", "sh", "tail"];

/// Time that all processors have worked since the machine started, but for this process and those of `others`: user,
/// system and interrupts (proc(5), `/proc/stat`). Work of the rest of the machine is in it.
///
/// # Errors
///
/// Without `/proc`.
pub fn processors_worked(others: &[u32]) -> Result<Duration> {
    let path = Path::new("/proc/stat");
    let text = fs::read_to_string(path).at("reading", path)?;
    let numbers: Vec<u64> =
        text.lines().next().into_iter().flat_map(str::split_whitespace).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq; time of guests is in the first two already.
    let all: u64 = [0, 1, 2, 5, 6].iter().filter_map(|place| numbers.get(*place)).sum();
    let ours = std::iter::once(std::process::id()).chain(others.iter().copied());
    let theirs: u64 = ours.filter_map(ticks_of).sum();
    Ok(Duration::from_millis(all.saturating_sub(theirs) * 1000 / TICKS_PER_SECOND))
}

/// User and system time of a process, in ticks; `None` when there is none.
fn ticks_of(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // After the name in parentheses come state and ten more, then both times.
    let fields = status.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
    Some(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// Memory at the peak, in bytes, of the daemons that name `directory` on their command lines, by the names of their
/// programs; several of one name are added up.
pub fn peaks_of_daemons(directory: &Path) -> BTreeMap<String, u64> {
    let mut peaks = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Some((name, peak)) = peak_of_daemon(&entry.path(), directory) {
            *peaks.entry(name).or_default() += peak;
        }
    }
    peaks
}

fn peak_of_daemon(process: &Path, directory: &Path) -> Option<(String, u64)> {
    let command_line = fs::read_to_string(process.join("cmdline")).ok()?;
    let mut words = command_line.split('\0');
    let name = PathBuf::from(words.next()?).file_name()?.to_str()?.to_owned();
    let is_of_node = words.any(|word| word.contains(directory.to_str().unwrap_or_default()));
    if !is_of_node || NO_DAEMONS.contains(&name.as_str()) {
        return None;
    }
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((name, kib * 1024))
}

#[cfg(test)]
mod tests {
    use std::{process::Stdio, time::Instant};

    use super::*;
    use crate::process::command;

    #[test]
    fn work_of_another_process_counts_and_work_of_this_one_does_not() {
        let before = processors_worked(&[]).unwrap();
        let mut busy = command("sh", ["-c", "while :; do :; done"]).spawn().unwrap();
        let clock = Instant::now();
        while ticks_of(busy.id()).is_some_and(|ticks| ticks < 30) && clock.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let all = processors_worked(&[]).unwrap().saturating_sub(before);
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(all >= Duration::from_millis(250), "{all:?}");
    }

    #[test]
    fn daemons_are_known_by_the_directory_on_their_command_line() {
        let path = "/nonexistent/of-a-daemon";
        let mut daemon = command("bash", ["-c", "read -r -t 60 <&0; :", path]);
        let mut child = daemon.stdin(Stdio::piped()).spawn().unwrap();
        let clock = Instant::now();
        let mut peaks = BTreeMap::new();
        while !peaks.contains_key("bash") && clock.elapsed() < Duration::from_secs(60) {
            peaks = peaks_of_daemons(Path::new(path));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(peaks["bash"] > 100_000, "{peaks:?}");
    }
}
