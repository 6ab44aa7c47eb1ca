//! A cold start of an image: pulled and run with nothing in any cache, until it is ready.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant, SystemTime},
};

use serde_json::Value;

use crate::{
    Containerd, HarnessError, Result, Scratch, TestRegistry,
    error::Context as _,
    page_cache::{cached_files, drop_page_cache},
    process::{command, run},
    programs::program,
    usage::{peaks_of_daemons, processors_worked},
};

/// How long all of an image may take to arrive: 2 GB over a link of 50 Mbit/s take 6 minutes.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(900);
const ARRIVAL_INTERVAL: Duration = Duration::from_millis(200);
/// How long a container may go on after it was ready: one that is a server is ended then.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// Times and bytes of one cold start.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The pull.
    pub pull: Duration,
    /// From the pull to ready.
    pub start: Duration,
    /// The first line that the container printed.
    pub line: String,
    /// The second start, from files that lie on this machine; page cache empty. A lazy image has arrived completely
    /// where [`Start::lazuli_root`] is said, else as far as the first start read it.
    pub again: Duration,
    /// Bytes of blobs that the registry sent until the container was ready. Answers under way then count by the part
    /// of their time that had passed.
    pub moved: u64,
    /// Requests for blobs that the registry was sent until then.
    pub requests: usize,
    /// Processor time of the machine from the pull to ready, without this process and the registry: see
    /// [`processors_worked`].
    pub processor: Duration,
    /// Memory of the node's daemons at their peak until ready, in bytes, by program.
    pub daemons: BTreeMap<String, u64>,
    /// Bytes of the image's files that a cold start brings into the page cache.
    pub read: u64,
}

/// One way to start the image.
#[derive(Debug)]
pub struct Start<'a> {
    /// Where the image is.
    pub registry: &'a TestRegistry,
    /// The node's.
    pub containerd: &'a Containerd,
    /// The image.
    pub reference: &'a str,
    /// The snapshotter that mounts it.
    pub snapshotter: &'static str,
    /// The program and its arguments, instead of the image's own; none for that.
    pub command: &'a [&'a str],
    /// Another image that the node has pulled and started before; none for an empty node.
    pub before: Option<&'a str>,
    /// The root directory of the node's Lazuli: all of the image is waited for before the second start.
    pub lazuli_root: Option<&'a Path>,
}

impl Start<'_> {
    /// Pulls by `pull`, which is given the reference, and runs with nothing in any cache; then runs once more to see
    /// what a start reads. `scratch` is the node's.
    ///
    /// The second run is a cold one too: after a full pull the page cache holds what was unpacked, read
    /// or not, so that the first cannot tell.
    ///
    /// # Errors
    ///
    /// When the pull or a run fails, or the image does not arrive within 15 minutes.
    pub fn measure(&self, scratch: &Scratch, pull: impl Fn(&str) -> Result<()>) -> Result<Measured> {
        if let Some(before) = self.before {
            pull(before)?;
            self.run_until_ready(before, "before", &[])?.end()?;
            self.wait_for_arrival()?;
        }
        let served_before = self.registry.served()?.len();
        drop_page_cache()?;
        let worked = processors_worked(&[self.registry.id()])?;
        let clock = Instant::now();
        pull(self.reference)?;
        let pulled = clock.elapsed();
        let container = self.run_until_ready(self.reference, "first", self.command)?;
        let (ready, moment) = (clock.elapsed(), SystemTime::now());
        let processor = processors_worked(&[self.registry.id()])?.saturating_sub(worked);
        let daemons = peaks_of_daemons(scratch.path());
        let line = container.end()?;
        self.wait_for_arrival()?;
        let (requests, moved) = self.blobs_served(served_before, moment)?;

        drop_page_cache()?;
        let clock = Instant::now();
        let second = self.run_until_ready(self.reference, "second", self.command)?;
        let again = clock.elapsed();
        second.end()?;
        let read = self.cached_bytes(&scratch.directory("view")?, "second")?;
        Ok(Measured { pull: pulled, start: ready - pulled, line, again, moved, requests, processor, daemons, read })
    }

    /// Requests for blobs, or parts of them, that were made before `moment`, and the bytes that were sent until then;
    /// without the first `skipped` answers.
    fn blobs_served(&self, skipped: usize, moment: SystemTime) -> Result<(usize, u64)> {
        let served = self.registry.served()?;
        let blobs = served.iter().skip(skipped).filter(|served| served.is_blob_read());
        let bytes: Vec<u64> = blobs.filter_map(|served| served.bytes_at(moment)).collect();
        Ok((bytes.len(), bytes.iter().sum()))
    }

    /// Waits until all lazy images of the node are there and verified; returns at once where no root is said.
    fn wait_for_arrival(&self) -> Result<()> {
        let Some(root) = self.lazuli_root else { return Ok(()) };
        let deadline = Instant::now() + ARRIVAL_PATIENCE;
        loop {
            let printed = run(command(program("lazuli")?, ["status", "--json", "--root"]).arg(root))?;
            let status: Value = serde_json::from_str(&printed).unwrap_or_default();
            let mut images = status["images"].as_array().into_iter().flatten();
            let reason = images.find_map(|image| image["reason"].as_str());
            match reason {
                None => return Ok(()),
                Some(reason) if Instant::now() > deadline => {
                    return Err(HarnessError::Unexpected(format!("{} has not arrived: {reason}", self.reference)));
                }
                Some(_) => std::thread::sleep(ARRIVAL_INTERVAL),
            }
        }
    }

    fn run_until_ready(&self, reference: &str, id: &'static str, words: &[&str]) -> Result<Container<'_>> {
        let arguments = ["run", "--snapshotter", self.snapshotter, reference, id];
        let ctr = self.containerd.ctr(arguments.iter().chain(words));
        // One stream for both outputs: the first line of either is the sign of life.
        let mut joined = command("sh", ["-c", "exec \"$@\" 2>&1", "sh"]);
        joined.arg(ctr.get_program()).args(ctr.get_args()).stdin(Stdio::null()).stdout(Stdio::piped());
        joined.envs(ctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut child = joined.spawn().context("running ctr")?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            let mut output = BufReader::new(output);
            output.read_line(&mut line).context("reading what the container prints")?;
            // Somebody must read the rest, or the container waits for it.
            std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        }
        match line.strip_prefix("ctr: ") {
            Some(failure) => Err(HarnessError::Unexpected(format!("ctr run {reference}: {}", failure.trim()))),
            None => Ok(Container { containerd: self.containerd, id, child, line }),
        }
    }

    /// How much of the container's root file system is in the page cache.
    fn cached_bytes(&self, view: &Path, id: &str) -> Result<u64> {
        let snapshots = ["snapshots", "--snapshotter", self.snapshotter, "mounts"];
        let mount = run(self.containerd.ctr(snapshots).arg(view).arg(id))?;
        run(&mut command("sh", ["-ec", &mount]))?;
        let files = cached_files(view)?;
        run(&mut command("umount", [view]))?;
        Ok(files.iter().map(|file| file.cached_len).sum())
    }
}

/// A container that has become ready.
struct Container<'a> {
    containerd: &'a Containerd,
    id: &'static str,
    child: Child,
    line: String,
}

impl Container<'_> {
    /// Waits for its end, or ends it when it goes on; the first line that it has printed.
    fn end(mut self) -> Result<String> {
        let deadline = Instant::now() + END_PATIENCE;
        while self.child.try_wait().context("waiting for ctr")?.is_none() {
            if Instant::now() > deadline {
                run(&mut self.containerd.ctr(["tasks", "kill", "--signal", "SIGKILL", self.id]))?;
                self.child.wait().context("waiting for ctr")?;
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(self.line)
    }
}
