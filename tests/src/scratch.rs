//! A directory for one test, emptied of processes, mounts and files when the test ends.
//!
//! It lies in the system's temporary directory and has a short name: the path of a unix socket has at
//! most 107 bytes. Logs go elsewhere, to `target/logs/<test>`, and stay.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};

use crate::{
    error::{Context as _, HarnessError, Result},
    programs::target_directory,
};

/// The start of a scratch directory's name; the process ID and a number follow.
const PREFIX: &str = "lazuli-";
/// Longest path of a scratch directory, so that `<scratch>/<two short names>` still fits a socket address.
const PATH_LEN_MAX: usize = 60;
/// How long processes may take to end after SIGKILL: one that waits for a dead mount takes a moment.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

static SWEEP: Once = Once::new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A scratch directory; dropping it ends and removes everything in it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    logs: PathBuf,
}

impl Scratch {
    /// Makes a new one; `name` is the name of the test, under which its logs are kept.
    ///
    /// Also removes what an earlier run of the tests left behind when it was killed.
    ///
    /// # Errors
    ///
    /// Without root, or when the directory cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        if path.as_os_str().len() > PATH_LEN_MAX {
            return Err(HarnessError::Missing(format!(
                "{} is too long a path for unix sockets: set TMPDIR to a shorter one",
                path.display()
            )));
        }
        Self::at(&path, name)
    }

    /// Makes one at a path of the caller's choice, emptying it first.
    ///
    /// # Errors
    ///
    /// Without root, or when the directory cannot be made.
    pub fn at(path: &Path, name: &str) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(HarnessError::Missing("the end-to-end tests mount file systems: run them as root".to_owned()));
        }
        SWEEP.call_once(sweep_abandoned);
        clear(path);
        fs::create_dir_all(path).at("creating", path)?;
        let logs = target_directory()?.join("logs").join(name);
        if logs.exists() {
            fs::remove_dir_all(&logs).at("removing", &logs)?;
        }
        fs::create_dir_all(&logs).at("creating", &logs)?;
        Ok(Self { path: path.to_owned(), logs })
    }

    /// Makes one at `target/<name>`, or at a shorter path where sockets below that would not fit.
    ///
    /// # Errors
    ///
    /// Without root, or when the directory cannot be made.
    pub fn in_target(name: &str) -> Result<Self> {
        let usual = target_directory()?.join(name);
        let is_short = usual.as_os_str().len() <= PATH_LEN_MAX;
        let path = if is_short { usual } else { std::env::temp_dir().join(format!("lazuli-{name}")) };
        Self::at(&path, name)
    }

    /// Has Ctrl-C end processes and mounts below too, and then this process.
    pub fn clear_when_interrupted(&self) {
        let path = self.path.clone();
        std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                clear(&path);
                std::process::exit(130);
            }
        });
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A new directory in it.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn directory(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.join(name);
        fs::create_dir_all(&path).at("creating", &path)?;
        Ok(path)
    }

    /// Where the log called `name` goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The mount points below the directory, deepest last.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        clear(&self.path);
    }
}

/// Mount points at or below `path`, in the order in which they were mounted.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let fields = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(unescape).filter(|mount| mount.starts_with(path)).collect()
}

/// Ends every process that names `path` on its command line, unmounts everything below, deletes it.
///
/// containerd's shims and their containers outlive containerd, `lazuli-fused` outlives the
/// snapshotter: guards of the processes that the harness started itself are not enough.
pub fn clear(path: &Path) {
    kill_processes_of(path);
    for mount in mounts_below(path).iter().rev() {
        if let Err(error) = unmount(mount, UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", mount.display());
        }
    }
    if path.exists()
        && let Err(error) = fs::remove_dir_all(path)
    {
        eprintln!("cannot remove {}: {error}", path.display());
    }
}

/// Removes scratch directories whose process is gone.
fn sweep_abandoned() {
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).and_then(|(id, _)| id.parse().ok());
        if owner.is_some_and(|id: u32| !Path::new("/proc").join(id.to_string()).exists()) {
            clear(&entry.path());
        }
    }
}

fn kill_processes_of(path: &Path) {
    let deadline = Instant::now() + KILL_PATIENCE;
    loop {
        let running = processes_of(path);
        if running.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            eprintln!("processes {running:?} of {} do not end", path.display());
            return;
        }
        for id in running {
            // It may have ended meanwhile.
            let _ = kill_process(id, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Live processes with `path` on their command line, and all their descendants.
fn processes_of(path: &Path) -> Vec<Pid> {
    let needle = path.as_os_str().as_encoded_bytes();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all: Vec<Process> = entries.filter_map(|entry| Process::read(&entry.path())).collect();
    // This process and those that started it may name the path for other reasons.
    let mut excluded = vec![std::process::id()];
    while let Some(process) = all.iter().find(|process| Some(&process.id) == excluded.last()) {
        excluded.push(process.parent);
    }
    let names_path = |process: &&Process| {
        let mut windows = process.command_line.windows(needle.len() + 1);
        !excluded.contains(&process.id)
            && windows.any(|window| window.starts_with(needle) && matches!(window.last(), Some(b'/' | 0)))
    };
    let mut found: Vec<u32> = all.iter().filter(names_path).map(|process| process.id).collect();
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|process| process.parent == parent).map(|process| process.id));
        next += 1;
    }
    found.sort_unstable();
    found.dedup();
    found.iter().filter_map(|id| Pid::from_raw(i32::try_from(*id).ok()?)).collect()
}

struct Process {
    id: u32,
    parent: u32,
    command_line: Vec<u8>,
}

impl Process {
    /// Reads `/proc/<id>`; `None` for what is no process or has ended.
    fn read(directory: &Path) -> Option<Self> {
        let id = directory.file_name()?.to_str()?.parse().ok()?;
        let status = fs::read_to_string(directory.join("stat")).ok()?;
        // After the name in parentheses: state, parent.
        let mut fields = status.rsplit_once(')')?.1.split_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let parent = fields.next()?.parse().ok()?;
        Some(Self { id, parent, command_line: fs::read(directory.join("cmdline")).ok()? })
    }
}

/// Undoes the octal escapes of a mount table.
fn unescape(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [byte, tail @ ..] = rest {
        let escape = (*byte == b'\\').then(|| tail.get(..3)).flatten();
        let octal = escape.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(octal.unwrap_or(*byte));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    std::ffi::OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_escapes_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c\09"), Path::new(r"/a b\c\09"));
    }
}
