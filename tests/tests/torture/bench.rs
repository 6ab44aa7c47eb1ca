//! One row under way: its scratch directory, its node, and the lines that it reports.

use std::{
    cell::{Cell, RefCell},
    fmt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    FaultyRegistry, Finished, HarnessError, Node, Result, Scratch, SnapshotterOptions, containerd::LAZULI,
    process::command, programs::program,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    images::{HEALTHY_LEN, healthy_content},
    reader::{Reader, Running, Seen},
};

/// How long a pull of an image without faults may take on a busy machine.
const PULL_WITHIN: Duration = Duration::from_secs(60);
/// How long a healthy image may take to be mounted or read, whatever happens beside it.
pub(crate) const HEALTHY_WITHIN: Duration = Duration::from_secs(10);
/// Longest text of a cell.
const CELL_LEN_MAX: usize = 220;
/// Shows an image at a directory through a snapshotter, as a container would get it: `SOCKET NAMESPACE SNAPSHOTTER IMAGE
/// DIRECTORY`; the snapshot is called like the directory. (`ctr images mount` of containerd 1.6 does not look at its
/// flag `--snapshotter`.)
const MOUNT: &str = r#"set -e
socket=$1 namespace=$2 snapshotter=$3 image=$4 directory=$5
ctr() { command ctr --address "$socket" --namespace "$namespace" "$@"; }
manifest=$(ctr images ls "name==$image" | awk 'NR == 2 { print $3 }')
[ "$manifest" ] || { echo "no image $image" >&2; exit 1; }
config=$(ctr content get "$manifest" | jq -r .config.digest)
chain=
for diff in $(ctr content get "$config" | jq -r '.rootfs.diff_ids[]'); do
    chain=${chain:+sha256:$(printf '%s %s' "$chain" "$diff" | sha256sum | cut -d' ' -f1)}
    chain=${chain:-$diff}
done
mount=$(ctr snapshots --snapshotter "$snapshotter" view --target "$directory" "$directory" "$chain")
exec $mount
"#;
/// Digits of a digest that a cell has.
const HEX_LEN_MAX: u32 = 8;
/// The mark that a row prints before each of its lines, for the process that makes the table.
pub(crate) const LINE_MARK: &str = "torture-line\t";

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// The fault that was made.
    pub(crate) fault: String,
    /// A container's view.
    pub(crate) sees: String,
    /// The log's words.
    pub(crate) logged: String,
    /// Whether that is right.
    pub(crate) is_right: bool,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_right { "ok" } else { "WRONG" };
        write!(f, "{LINE_MARK}{verdict}\t{}\t{}\t{}", cell(&self.fault), cell(&self.sees), cell(&self.logged))
    }
}

impl Line {
    /// Reads what [`fmt::Display`] wrote.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut cells = text.strip_prefix(LINE_MARK)?.split('\t');
        let is_right = cells.next()? == "ok";
        let mut next = || cells.next().map(str::to_owned);
        Some(Self { fault: next()?, sees: next()?, logged: next()?, is_right })
    }
}

/// A text that fits a cell: on one line, digests by their beginning.
pub(crate) fn cell(text: &str) -> String {
    let mut short = String::new();
    let mut hex_len = 0;
    for character in text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "/").chars() {
        hex_len = if character.is_ascii_hexdigit() { hex_len + 1 } else { 0 };
        if hex_len <= HEX_LEN_MAX {
            short.push(character);
        }
    }
    let text = short;
    match text.char_indices().nth(CELL_LEN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// How a mount of an image ended.
#[derive(Debug)]
pub(crate) enum Mounted {
    /// It is there.
    At(PathBuf, Duration),
    /// containerd refused, with this text.
    Refused(String, Duration),
    /// No answer until the limit.
    Waiting(Duration),
}

impl Mounted {
    /// The directory, if it is there.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::At(path, _) => Some(path),
            _ => None,
        }
    }

    /// In the words of the table.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::At(_, time) => format!("starts after {:.1} s", time.as_secs_f64()),
            Self::Refused(text, time) => {
                let reason = text.trim().rsplit("ctr: ").next().unwrap_or_default();
                format!("refused after {:.1} s: {}", time.as_secs_f64(), reason.trim())
            }
            Self::Waiting(time) => format!("no start in {:.0} s", time.as_secs_f64()),
        }
    }
}

/// The tools of a row.
pub(crate) struct Bench {
    pub(crate) scratch: Scratch,
    /// `host:port` of the registry that has all images.
    pub(crate) upstream: String,
    /// The mode of lazy layers.
    pub(crate) mode: String,
    /// A faulty registry in front of it.
    pub(crate) registry: FaultyRegistry,
    mounts: Cell<u32>,
    counts: RefCell<Vec<Line>>,
}

impl Bench {
    pub(crate) fn new(name: &str, upstream: &str, mode: &str) -> Result<Self> {
        Ok(Self {
            scratch: Scratch::new(&format!("torture-{name}-{mode}"))?,
            upstream: upstream.to_owned(),
            mode: mode.to_owned(),
            registry: FaultyRegistry::before(upstream)?,
            mounts: Cell::default(),
            counts: RefCell::default(),
        })
    }

    /// Reports a line.
    pub(crate) fn line(&self, fault: &str, sees: impl Into<String>, logged: impl Into<String>, is_right: bool) {
        let line = Line { fault: fault.to_owned(), sees: sees.into(), logged: logged.into(), is_right };
        println!("{line}");
        self.counts.borrow_mut().push(line);
    }

    /// Lines that were reported.
    pub(crate) fn line_count(&self) -> usize {
        self.counts.borrow().len()
    }

    /// A node in this row's mode that fetches what is read and nothing else.
    pub(crate) fn node(&self) -> Result<Node> {
        self.node_with(&["--background-rate", "0"])
    }

    /// One with these flags.
    pub(crate) fn node_with(&self, flags: &[&str]) -> Result<Node> {
        self.node_as(SnapshotterOptions::with_flags(flags))
    }

    /// One with these options; the mode is added to them.
    pub(crate) fn node_as(&self, mut options: SnapshotterOptions) -> Result<Node> {
        options.flags.extend(["--mode".to_owned(), self.mode.clone()]);
        Node::start_as(options, &self.scratch)
    }

    /// Runs a command; `None` when it had to be ended after `limit`.
    pub(crate) fn bounded(&self, command: &mut Command, limit: Duration) -> Result<Option<(Finished, Duration)>> {
        Running::start(&self.scratch, command)?.finish(limit)
    }

    /// Pulls with `lazuli pull` and expects it to succeed.
    pub(crate) fn pull(&self, node: &Node, reference: &str) -> Result<()> {
        self.pull_with(node, &mut node.lazuli_pull_command(reference)?)
    }

    /// The same with a command of the caller's.
    pub(crate) fn pull_with(&self, _: &Node, pull: &mut Command) -> Result<()> {
        match self.bounded(pull, PULL_WITHIN)? {
            Some((Finished { code: Some(0), .. }, _)) => Ok(()),
            Some((finished, _)) => Err(HarnessError::Unexpected(format!("lazuli pull: {}", finished.stderr.trim()))),
            None => Err(HarnessError::Timeout { what: "lazuli pull did not end".to_owned(), seconds: 60 }),
        }
    }

    /// Has containerd mount an image as a container would see it.
    pub(crate) fn mount(&self, node: &Node, reference: &str, limit: Duration) -> Result<Mounted> {
        self.mount_in(node, "default", LAZULI, reference, limit)
    }

    /// The same of another namespace or snapshotter.
    pub(crate) fn mount_in(
        &self,
        node: &Node,
        namespace: &str,
        snapshotter: &str,
        reference: &str,
        limit: Duration,
    ) -> Result<Mounted> {
        let number = self.mounts.replace(self.mounts.get() + 1);
        let path = self.scratch.directory(format!("mnt-{number}"))?;
        let socket = node.containerd.socket();
        let finished = self.bounded(&mut mount_command(socket, namespace, snapshotter, reference, &path), limit)?;
        Ok(match finished {
            Some((Finished { code: Some(0), .. }, time)) => Mounted::At(path, time),
            Some((finished, time)) => Mounted::Refused(finished.stderr, time),
            None => Mounted::Waiting(limit),
        })
    }

    /// Mounts an image that nothing is wrong with.
    pub(crate) fn mounted(&self, node: &Node, reference: &str) -> Result<PathBuf> {
        match self.mount(node, reference, PULL_WITHIN)? {
            Mounted::At(path, _) => Ok(path),
            other => Err(HarnessError::Unexpected(format!("{reference}: {}", other.words()))),
        }
    }

    /// Pulls an image and mounts it.
    pub(crate) fn pulled_and_mounted(&self, node: &Node, reference: &str) -> Result<PathBuf> {
        self.pull(node, reference)?;
        self.mounted(node, reference)
    }

    /// Starts to read a file.
    pub(crate) fn reader(&self, path: &Path, len: usize) -> Result<Reader> {
        Reader::start(&self.scratch, path, len)
    }

    /// Reads a file.
    pub(crate) fn read(&self, path: &Path, len: usize, limit: Duration) -> Result<Seen> {
        self.reader(path, len)?.finish(limit)
    }

    /// Reads file `number` of a mounted `healthy`.
    pub(crate) fn read_healthy(&self, tree: &Path, number: u64) -> Result<Seen> {
        self.read(&tree.join(format!("files/{number}")), HEALTHY_LEN, HEALTHY_WITHIN)
    }

    /// Reads it and reports whether it was right, and soon.
    pub(crate) fn healthy_line(&self, node: &Node, fault: &str, tree: &Path, number: u64) -> Result<()> {
        let seen = self.read_healthy(tree, number)?;
        let expected = healthy_content(number);
        self.line(fault, format!("healthy image: {}", seen.words(&expected)), logged(node, &[]), seen.is(&expected));
        Ok(())
    }

    /// Runs `lazuli status --json`; `None` when it does not end in time.
    pub(crate) fn status(&self, node: &Node, limit: Duration) -> Result<Option<serde_json::Value>> {
        let mut status = command(program("lazuli")?, ["status", "--json", "--root"]);
        let finished = self.bounded(status.arg(node.snapshotter.root()), limit)?;
        Ok(finished.and_then(|(finished, _)| serde_json::from_str(&finished.stdout).ok()))
    }

    /// Waits until `lazuli status` says that an image is complete; whether it did in time.
    pub(crate) fn is_complete_within(&self, node: &Node, reference: &str, limit: Duration) -> Result<bool> {
        self.holds_within(limit, || {
            let status = self.status(node, Duration::from_secs(10))?.unwrap_or_default();
            let image =
                status["images"].as_array().and_then(|all| all.iter().find(|image| image["image"] == reference));
            Ok(image.is_some_and(|image| image["is_complete"] == true))
        })
    }

    /// Waits until something holds; whether it did in time.
    pub(crate) fn holds_within(&self, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while !holds()? {
            if Instant::now() > deadline {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(true)
    }
}

/// The command that shows an image at a directory.
pub(crate) fn mount_command(
    socket: &Path,
    namespace: &str,
    snapshotter: &str,
    reference: &str,
    directory: &Path,
) -> Command {
    let mut mount = command("bash", ["-c", MOUNT, "mount"]);
    mount.arg(socket).args([namespace, snapshotter, reference]).arg(directory);
    mount
}

/// Sends a signal to a process.
pub(crate) fn send(id: u32, signal: Signal) -> Result<()> {
    let id = Pid::from_raw(id.cast_signed()).ok_or_else(|| HarnessError::Unexpected("process 0".to_owned()))?;
    kill_process(id, signal).map_err(|error| HarnessError::Unexpected(format!("signal: {error}")))
}

/// The `lazuli-fused` of a node.
pub(crate) fn fused(node: &Node) -> Result<u32> {
    node.snapshotter.fused_id().ok_or_else(|| HarnessError::Unexpected("there is no lazuli-fused".to_owned()))
}

/// Both logs of a node.
pub(crate) fn logs(node: &Node) -> String {
    let fused = std::fs::read(node.snapshotter.root().join("fused.log")).unwrap_or_default();
    String::from_utf8_lossy(&fused).into_owned() + &node.snapshotter.log()
}

/// The last warning or error in the logs that has all these words, without its time; `nothing` without one.
pub(crate) fn logged(node: &Node, words: &[&str]) -> String {
    let text = logs(node);
    let found = text.lines().rev().find(|line| {
        let is_loud = line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked");
        is_loud && words.iter().all(|word| line.contains(word))
    });
    found.map_or("nothing".to_owned(), |line| {
        let start = ["ERROR", "WARN", "panicked"].iter().filter_map(|word| line.find(word)).min();
        line[start.unwrap_or(0)..].to_owned()
    })
}

/// A number of `/proc/<id>/status`, in bytes or as it stands.
pub(crate) fn status_number(id: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let mut words = line.unwrap_or_default().split_whitespace();
    let number = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    if words.next() == Some("kB") { number << 10 } else { number }
}
