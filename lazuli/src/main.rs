//! The `lazuli` command.
//!
//! Exit codes: 0 done, 1 the image or the world is at fault (one line on standard error), 2 wrong usage, 3 nothing
//! is wrong with what could be checked of an image, but that was not all.

#[macro_use]
mod output;

mod check_command;
mod convert_command;
mod inspect_command;
mod mount;
mod mount_command;
mod profile;
mod profile_command;
mod progress;
mod pull;
mod pull_command;
mod registry_arguments;
mod status;
mod status_command;
mod user_directories;
mod why;
mod why_command;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control::log;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Starts containers before their image has arrived.
#[derive(Debug, Parser)]
#[command(name = "lazuli", version)]
struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Rewrite an image so that it can be mounted before it has arrived.
    ///
    /// The image stays the same image: its layers are compressed anew and get an index, nothing else changes.
    Convert(convert_command::ConvertArguments),
    /// Check every digest of an image, and its lazy layers' indexes against their tar streams, entry by entry.
    ///
    /// Reads all of it. Prints a line for everything that is wrong; exit code 1 if there is any.
    Check(check_command::CheckArguments),
    /// Show what an image consists of: layers, sizes, frames, hot packs, duplicate and hidden bytes.
    ///
    /// Reads the indexes of lazy layers only.
    Inspect(inspect_command::InspectArguments),
    /// Mount a converted image and read it as it arrives, without containerd.
    ///
    /// Stays in the foreground until it is interrupted or the directory is unmounted.
    Mount(mount_command::MountArguments),
    /// Record what a start of an image reads, and look at such profiles.
    ///
    /// With a profile `lazuli convert` puts exactly that into the hot packs, in place of what it would guess.
    Profile(profile_command::ProfileArguments),
    /// Pull an image into containerd, lazily where it is converted.
    ///
    /// Afterwards `ctr run --snapshotter lazuli REF NAME` starts it.
    Pull(pull_command::PullArguments),
    /// Show the lazily pulled images of this node: how they are mounted, what has arrived, what is being read.
    Status(status_command::StatusArguments),
    /// Say which reads of an image or a container waited, for how long and for what; what is not lazy of it, and why.
    Why(why_command::WhyArguments),
}

fn main() -> ExitCode {
    let command = Command::parse();
    let filter =
        match std::env::var("LAZULI_LOG").map_or_else(|_| Ok(EnvFilter::new("warn")), |text| log::filter(&text)) {
            Ok(filter) => filter,
            Err(error) => return fail(&format!("LAZULI_LOG: {error}")),
        };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false).init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    let result = runtime.block_on(async {
        let interrupted = interruption().map_err(|error| error.to_string())?;
        match command.action {
            Action::Convert(arguments) => convert_command::run(arguments, interrupted).await,
            Action::Check(arguments) => tokio::select! {
                result = check_command::run(arguments) => return result,
                () = interrupted => Err("interrupted".to_owned()),
            },
            Action::Inspect(arguments) => tokio::select! {
                result = inspect_command::run(arguments) => result,
                () = interrupted => Err("interrupted".to_owned()),
            },
            Action::Mount(arguments) => mount_command::run(arguments, interrupted).await,
            Action::Profile(arguments) => profile_command::run(arguments, interrupted).await,
            Action::Pull(arguments) => pull_command::run(arguments, interrupted).await,
            Action::Status(arguments) => tokio::select! {
                result = status_command::run(arguments) => result,
                () = interrupted => Err("interrupted".to_owned()),
            },
            Action::Why(arguments) => tokio::select! {
                result = why_command::run(arguments) => result,
                () = interrupted => Err("interrupted".to_owned()),
            },
        }?;
        Ok(ExitCode::SUCCESS)
    });
    // Threads may still work on what nobody waits for any more, and ask the runtime for it: a runtime that was shut down
    // would have them panic. It ends with the process.
    std::mem::forget(runtime);
    match result {
        Ok(_) if output::has_failed() => fail("standard output cannot be written"),
        Ok(code) => code,
        Err(message) => fail(&message),
    }
}

fn fail(message: &str) -> ExitCode {
    // Words of an image may stand in it, also such as a terminal takes for commands.
    let line: String = message.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    eprintln!("lazuli: {line}");
    ExitCode::FAILURE
}

/// Ends with the first signal that asks the command to stop.
fn interruption() -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // A terminal that is closed, and one that says so loudly.
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
            _ = quit.recv() => {}
        }
    })
}
