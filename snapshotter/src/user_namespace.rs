//! A user namespace that exists for its mapping alone: id-mapped mounts name one by a descriptor.
//!
//! The kernel makes one only for a process of a single thread, so this program starts itself once more, with an
//! argument that makes it do nothing else, has it wait while its mapping is written, and ends it.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
};

use crate::{id_map::IdMap, system_calls};

/// The argument of the process that a user namespace is made by.
pub const ARGUMENT: &str = "in-a-user-namespace";
/// What is running, whatever lies at its path by now.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// There is no such user namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The process cannot be started or looked at.
    #[error("process for a user namespace: {0}")]
    Process(#[from] io::Error),
    /// The kernel makes none.
    #[error("{}", .0.trim())]
    Refused(String),
    /// The mapping is none.
    #[error("the kernel refuses the ranges for {0}, do they overlap, are they more than 340? ({1})")]
    Mapping(&'static str, #[source] io::Error),
}

/// What the process does that was started with [`ARGUMENT`]: says that it is in its namespace, and ends when its
/// standard input does. Must be called before there is a second thread.
///
/// # Errors
///
/// When the kernel makes no user namespace.
pub fn wait_in_new_namespace() -> io::Result<()> {
    system_calls::enter_new_user_namespace()
        .map_err(|error| io::Error::other(format!("the kernel makes no user namespace: {error}")))?;
    io::stdout().write_all(b"\n")?;
    io::stdout().flush()?;
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

/// A user namespace with this mapping. Blocks for some milliseconds.
///
/// # Errors
///
/// As [`NamespaceError`] says.
pub fn user_namespace(id_map: &IdMap) -> Result<OwnedFd, NamespaceError> {
    let mut command = Command::new(THIS_PROGRAM);
    command.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process(command.spawn()?);
    process.wait_until_ready()?;
    let path = |name: &str| format!("/proc/{}/{name}", process.0.id());
    for (name, table) in [("uid_map", id_map.user_table()), ("gid_map", id_map.group_table())] {
        // In one piece: the kernel takes a single write.
        fs::write(path(name), table).map_err(|error| NamespaceError::Mapping(name, error))?;
    }
    Ok(File::open(path("ns/user"))?.into())
}

/// Ended when dropped.
struct Process(Child);

impl Process {
    fn wait_until_ready(&mut self) -> Result<(), NamespaceError> {
        let output = self.0.stdout.as_mut().expect("piped above");
        if output.read(&mut [0])? == 1 {
            return Ok(());
        }
        let mut said = String::new();
        self.0.stderr.as_mut().expect("piped above").read_to_string(&mut said)?;
        Err(NamespaceError::Refused(said))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
