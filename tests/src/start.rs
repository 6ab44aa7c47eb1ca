//! A cold start of an image: pulled and run with nothing in any cache, until it is ready.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use crate::{
    Containerd, HarnessError, Result, Scratch, TestRegistry,
    error::Context as _,
    page_cache::{cached_files, drop_page_cache},
    process::{command, run},
};

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
    /// The second start, from files that lie on this machine as far as the first one read them; page cache empty.
    pub again: Duration,
    /// Bytes of blobs that the registry sent until the container was ready.
    pub moved: u64,
    /// Requests for blobs until then.
    pub requests: usize,
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
}

impl Start<'_> {
    /// Pulls and runs with nothing in any cache, then runs once more to see what a start reads.
    ///
    /// The second run is a cold one too: after a full pull the page cache holds what was unpacked, read
    /// or not, so that the first cannot tell.
    ///
    /// # Errors
    ///
    /// When the pull or a run fails.
    pub fn measure(&self, scratch: &Scratch, pull: impl FnOnce() -> Result<()>) -> Result<Measured> {
        let before = self.blobs_served()?;
        drop_page_cache()?;
        let clock = Instant::now();
        pull()?;
        let pulled = clock.elapsed();
        let container = self.run_until_ready("first")?;
        let ready = clock.elapsed();
        let line = container.end()?;
        let after = self.blobs_served()?;
        let (moved, requests) = (after.1 - before.1, after.0 - before.0);

        drop_page_cache()?;
        let clock = Instant::now();
        let second = self.run_until_ready("second")?;
        let again = clock.elapsed();
        second.end()?;
        let read = self.cached_bytes(&scratch.directory("view")?, "second")?;
        Ok(Measured { pull: pulled, start: ready - pulled, line, again, moved, requests, read })
    }

    /// Answers with blobs, or parts of them, and their bytes.
    fn blobs_served(&self) -> Result<(usize, u64)> {
        let served = self.registry.served()?;
        let blobs = || served.iter().filter(|served| served.is_blob_read());
        Ok((blobs().count(), blobs().map(|served| served.body_bytes).sum()))
    }

    fn run_until_ready(&self, id: &'static str) -> Result<Container<'_>> {
        let arguments = ["run", "--snapshotter", self.snapshotter, self.reference, id];
        let ctr = self.containerd.ctr(arguments.iter().chain(self.command));
        // One stream for both outputs: the first line of either is the sign of life.
        let mut joined = command("sh", ["-c", "exec \"$@\" 2>&1", "sh"]);
        joined.arg(ctr.get_program()).args(ctr.get_args()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = joined.spawn().context("running ctr")?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            let mut output = BufReader::new(output);
            output.read_line(&mut line).context("reading what the container prints")?;
            // Somebody must read the rest, or the container waits for it.
            std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        }
        match line.strip_prefix("ctr: ") {
            Some(failure) => Err(HarnessError::Unexpected(format!("ctr run {}: {}", self.reference, failure.trim()))),
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
