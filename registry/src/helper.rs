//! Docker's credential helpers: programs that are asked on their standard input and answer with JSON.
//!
//! A helper is a process with a deadline, and killed with all that it has started when the deadline passes or nobody
//! waits any longer. It costs no thread of the runtime.
//!
//! Source: docker/docker-credential-helpers `README.md`, "Development".

use std::{io, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

use crate::{
    docker_config::{Credential, parse_helper_answer},
    error::clean,
};

/// Longest run of a helper: it may ask a service over the network, but not a person. A read of a container waits for
/// it, and clouds' token services answer within a second.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer: tokens are some kilobytes.
const ANSWER_LEN_MAX: u64 = 1 << 20;
/// The part of a helper's complaints that is kept.
const COMPLAINT_LEN_MAX: u64 = 4 << 10;
/// The helpers' agreed way to say that they have nothing for this host.
const NOT_FOUND: &str = "credentials not found";

/// Asks `docker-credential-NAME` for the credentials under `key`; `None` where it has none.
///
/// # Errors
///
/// One line: the helper cannot be run, fails, answers with something else, or too late.
pub(crate) async fn ask_helper(name: &str, key: &str) -> Result<Option<Credential>, String> {
    let program = format!("docker-credential-{name}");
    match tokio::time::timeout(HELPER_TIMEOUT, run(&program, key)).await {
        Ok(Ok(output)) => output.into_credential(&program),
        Ok(Err(error)) => Err(clean(&format!("the credential helper {program} cannot be run: {error}"))),
        Err(_) => {
            Err(clean(&format!("the credential helper {program} did not answer in {} s", HELPER_TIMEOUT.as_secs())))
        }
    }
}

struct Output {
    is_success: bool,
    answer: Vec<u8>,
    complaint: Vec<u8>,
}

impl Output {
    fn into_credential(self, program: &str) -> Result<Option<Credential>, String> {
        let Self { is_success, answer, complaint } = self;
        let refuse = |reason: String| Err(clean(&format!("the credential helper {program} {reason}")));
        if answer.len() as u64 > ANSWER_LEN_MAX {
            return refuse(format!("answers with more than {ANSWER_LEN_MAX} bytes"));
        }
        if is_success {
            return match parse_helper_answer(&answer) {
                Some(credential) => Ok(Some(credential)),
                None => refuse("answers with no user and secret".to_owned()),
            };
        }
        let (answer, complaint) = (String::from_utf8_lossy(&answer), String::from_utf8_lossy(&complaint));
        if answer.contains(NOT_FOUND) {
            return Ok(None);
        }
        refuse(format!("failed: {answer} {complaint}"))
    }
}

/// A helper that runs; dropped, it and what it has started are killed.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It leads a group of its own; there is no number once it has been waited for.
        let group = self.0.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = group {
            // Fails only for a group that is gone.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn run(program: &str, key: &str) -> io::Result<Output> {
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut helper = Helper(command.process_group(0).kill_on_drop(true).spawn()?);
    let (stdin, stdout, stderr) = (helper.0.stdin.take(), helper.0.stdout.take(), helper.0.stderr.take());
    let ask = async {
        if let Some(mut stdin) = stdin {
            // One that knows its answer need not read the question.
            let _ = stdin.write_all(key.as_bytes()).await;
        }
    };
    let (_, answer, complaint) =
        tokio::join!(ask, read_start(stdout, ANSWER_LEN_MAX + 1, false), read_start(stderr, COMPLAINT_LEN_MAX, true));
    let is_too_long = answer.len() as u64 > ANSWER_LEN_MAX;
    let is_success = !is_too_long && helper.0.wait().await?.success();
    Ok(Output { is_success, answer, complaint })
}

/// The first bytes of what a helper writes. When it writes more, that is thrown away if it `may_go_on`, else it finds
/// the pipe closed.
async fn read_start(pipe: Option<impl AsyncRead + Unpin>, limit: u64, may_go_on: bool) -> Vec<u8> {
    let mut start = Vec::new();
    if let Some(pipe) = pipe {
        // The bytes before a failure are all that there is.
        let mut limited = pipe.take(limit);
        let read = limited.read_to_end(&mut start).await;
        if read.is_ok() && may_go_on {
            let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
        }
    }
    start
}
