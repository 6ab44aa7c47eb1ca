//! The `lazuli` command.
//!
//! Exit codes: 0 done, 1 the image or the world is at fault (one line on standard error), 2 wrong usage.

mod progress;
mod pull_command;

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
use converter::{
    convert::{ConvertError, ConvertOptions, convert},
    image::{ImageDestination, ImageSource},
    location::Location,
    manifest::Platform,
    mount::mount,
    report::Report,
};
use indicatif::HumanBytes;
use registry::{Client, ClientOptions};
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
    Convert(ConvertArguments),
    /// Mount a converted image and read it as it arrives, without containerd.
    ///
    /// Stays in the foreground until it is interrupted or the directory is unmounted.
    Mount(MountArguments),
    /// Pull an image into containerd, lazily where it is converted.
    ///
    /// Afterwards `ctr run --snapshotter lazuli REF NAME` starts it.
    Pull(pull_command::PullArguments),
}

#[derive(Debug, Args)]
struct ConvertArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., or oci:DIR[:tag]
    #[arg(value_name = "SRC")]
    source: Location,
    /// Where the new image goes: host/repository:tag or oci:DIR[:tag]
    #[arg(value_name = "DST")]
    destination: Location,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    /// zstd compression level
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Compressor threads, and layers converted side by side [default: number of processors]
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Speak plain HTTP to registries; loopback addresses are spoken to in plain HTTP anyway
    #[arg(long)]
    plain_http: bool,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct MountArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., or oci:DIR[:tag]
    #[arg(value_name = "IMG")]
    image: Location,
    /// The directory to mount it on
    #[arg(value_name = "DIR")]
    mount_point: PathBuf,
    /// Where to keep what has arrived [default: lazuli in the user's cache directory]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// How the kernel reads the image
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    /// Speak plain HTTP to registries; loopback addresses are spoken to in plain HTTP anyway
    #[arg(long)]
    plain_http: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// What works best here
    Auto,
    /// Through FUSE
    Fuse,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let filter = EnvFilter::try_from_env("LAZULI_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    let result = runtime.block_on(async {
        let interrupted = interruption().map_err(|error| error.to_string())?;
        match command.action {
            Action::Convert(arguments) => tokio::select! {
                result = run_convert(arguments) => result,
                () = interrupted => Err("interrupted".to_owned()),
            },
            Action::Mount(arguments) => run_mount(arguments, interrupted).await,
            Action::Pull(arguments) => pull_command::run(arguments, interrupted).await,
        }
    });
    // Threads may still work on what nobody waits for any more.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&message),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("lazuli: {}", message.replace(['\n', '\r'], " "));
    ExitCode::FAILURE
}

/// Ends with the first signal that asks the command to stop.
fn interruption() -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

async fn run_convert(arguments: ConvertArguments) -> Result<(), String> {
    let ConvertArguments { source, destination, platform, level, jobs, plain_http, json } = arguments;
    let client = Client::new(ClientOptions { plain_http, ..ClientOptions::from_environment() });
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let named = source.to_string();
    let report = async {
        let source = ImageSource::new(source, &client);
        let destination = ImageDestination::open(&destination, &client, &std::env::temp_dir())?;
        let options = ConvertOptions { platform, level, jobs };
        convert(&source, &destination, &options, progress::observer(json)).await
    };
    let report = report.await.map_err(|error: ConvertError| format!("{named}: {error}"))?;
    print(&report, json);
    Ok(())
}

fn print(report: &Report, json: bool) {
    if json {
        println!("{}", serde_json::to_string_pretty(report).expect("a report has no maps"));
        return;
    }
    eprintln!(
        "{} layers, {} to {}, {} uploaded, {:.1} s, {:.0} MB/s of plain bytes",
        report.layers.len(),
        HumanBytes(report.source_len),
        HumanBytes(report.target_len),
        HumanBytes(report.uploaded_len),
        report.seconds,
        report.plain_len as f64 / 1e6 / report.seconds.max(0.001)
    );
    println!("{} {}", report.destination, report.digest);
}

async fn run_mount(arguments: MountArguments, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    let MountArguments { image, mount_point, cache, mode, platform, plain_http } = arguments;
    let (Mode::Auto | Mode::Fuse) = mode;
    let client = Client::new(ClientOptions { plain_http, ..ClientOptions::from_environment() });
    let cache_root = cache.unwrap_or_else(default_cache);
    let named = image.to_string();
    let source = ImageSource::new(image, &client);
    let describe = |error: String| format!("{named}: {error}");
    tokio::pin!(interrupted);
    let mut mounted = tokio::select! {
        result = mount(&source, platform.as_ref(), &mount_point, &cache_root) => {
            result.map_err(|error| describe(error.to_string()))?
        }
        () = &mut interrupted => return Err("interrupted".to_owned()),
    };
    println!("{named} is mounted on {}", mounted.mount_point().display());
    let ended = tokio::select! {
        result = mounted.wait() => result,
        () = interrupted => Ok(()),
    };
    let unmounted = mounted.unmount().await;
    ended.and(unmounted).map_err(|error| describe(error.to_string()))
}

/// Source: XDG Base Directory Specification.
fn default_cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    base.unwrap_or_else(|| PathBuf::from("/var/cache")).join("lazuli")
}
