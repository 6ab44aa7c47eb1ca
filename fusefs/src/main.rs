//! `lazuli-fused`: the daemon that shows lazy layers of a node through FUSE.
//!
//! Wiring only: command line, logging, signals, and registries as the place that layers come from.

use std::{
    fs::File,
    io::{self, Write as _},
    num::NonZeroU64,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{ArgAction, Parser};
use control::{
    DedupScope, Mode, RemoteLayer, descriptor,
    log::{self, Log, LogTarget},
    root::SOCKET,
};
use fusefs::{
    Daemon, DaemonOptions, Ended, Error, SessionOptions, daemon::Health, description::domain_of, factory::on_runtime,
};
use registry::{BlobSource, Client, ClientOptions, PlainHttp, Reference};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use storage::{CacheOptions, RestOptions, Source, SourceError};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    signal::unix::SignalKind,
    sync::mpsc,
};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

/// Threads for what arrives and for requests; reads are served by threads of the session.
const WORKER_THREADS: usize = 2;
/// Threads that decode frames and write files. Trees have threads of their own.
const BLOCKING_THREADS_MAX: usize = 16;
/// How long a reader waits for bytes, whatever the registries answer.
const PATIENCE_SECONDS: u32 = 60;
/// How long a request goes on by itself where it broke: who waits, how long, and where else to ask is decided in one
/// place, which is `storage`.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);
/// Threads for connections to registries.
const NETWORK_THREADS: usize = 2;
/// Threads that wait for resolvers and look up credentials. Registries that hang may take all of them, and then keep
/// each other waiting, but nobody who reads what is there.
const NETWORK_BLOCKING_THREADS_MAX: usize = 64;
/// Half of a link of 1 Gbit/s: a node of many images is complete within minutes, and what starts next finds room.
const BACKGROUND_RATE_MIB: u32 = 64;
/// 100 GiB in four hours, and hardly to be seen on any disk.
const SCRUB_RATE_MIB: u32 = 8;
/// Six large indexes at a time; more wait for each other.
const INDEX_MEMORY_MIB: u32 = 64;
/// The session's descriptor, as the service manager calls it.
const STORED_SESSION: &str = "session";

/// Shows the layers and merged trees of lazily mounted images through one FUSE session.
///
/// Started by lazuli-snapshotter, which asks for trees over the control socket.
#[derive(Debug, Parser)]
#[command(name = "lazuli-fused", version)]
struct Arguments {
    /// Directory for cache, trees and mount point.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lazuli")]
    root: PathBuf,
    /// Path of the control socket; `fused.sock` in the root, where all others look for it, unless said.
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Speak plain HTTP to every registry, not only on loopback.
    #[arg(long)]
    plain_http: bool,
    /// What the kernel reads ahead of a sequential reader, in KiB.
    #[arg(long, value_name = "KIB", default_value_t = SessionOptions::default().read_ahead_kib)]
    read_ahead: u32,
    /// MiB a second at which the rest of each layer is fetched after start-up; 0 fetches only what is read.
    #[arg(long, value_name = "MIB", default_value_t = BACKGROUND_RATE_MIB)]
    background_rate: u32,
    /// MiB of memory for all indexes that are being opened, whatever they claim.
    #[arg(long, value_name = "MIB", default_value_t = INDEX_MEMORY_MIB)]
    index_memory: u32,
    /// MiB a second at which cached content is compared with its checksums when nobody waits; 0 for never.
    #[arg(long, value_name = "MIB", default_value_t = SCRUB_RATE_MIB)]
    scrub_rate: u32,
    /// Record what starts of containers read, and fetch it ahead when the next version of their image is started: true or
    /// false.
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true)]
    record_starts: bool,
    /// Between which layers content is copied instead of fetched: of one repository, one registry, or all of the node.
    #[arg(long, value_name = "SCOPE", default_value_t)]
    dedup: DedupScope,
    /// Seconds that a read waits for bytes, whatever the registries answer; then it fails.
    #[arg(long, value_name = "SECONDS", default_value_t = PATIENCE_SECONDS)]
    patience: u32,
    /// Go on with the session whose /dev/fuse descriptor is standard input, if it is still there.
    #[arg(long)]
    take_over: bool,
    /// How the kernel reads trees: erofs (Linux 6.12), fuse, or auto for erofs where it works.
    #[arg(long, value_name = "MODE", default_value_t)]
    mode: Mode,
    /// What to log: a level, or directives as `fusefs=debug,storage=info`.
    #[arg(long, value_name = "FILTER", default_value = "info", value_parser = log::filter)]
    log: EnvFilter,
    /// Log to this file instead of standard error, and keep it short.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !rustix::process::geteuid().is_root() {
        _ = writeln!(io::stderr(), "lazuli-fused: needs root: it mounts file systems");
        return ExitCode::FAILURE;
    }
    let log = match start_log(arguments.log, arguments.log_file) {
        Ok(log) => log,
        Err(error) => {
            // There is nobody else to tell.
            _ = writeln!(io::stderr(), "lazuli-fused: log: {error}");
            return ExitCode::FAILURE;
        }
    };
    raise_descriptor_limit();
    let inherited = match arguments.take_over {
        true => take_standard_input().map(Some),
        false => descriptor::take_from_service_manager(STORED_SESSION),
    };
    let take_over = match inherited {
        Ok(device) => device.map(Arc::new),
        Err(error) => {
            error!("descriptor of the session: {error}");
            return ExitCode::FAILURE;
        }
    };
    let options = DaemonOptions {
        address: arguments.address.unwrap_or_else(|| arguments.root.join(SOCKET)),
        root: arguments.root,
        session: SessionOptions { read_ahead_kib: arguments.read_ahead },
        take_over,
        mode: arguments.mode,
        records_starts: arguments.record_starts,
        cache: CacheOptions {
            rest: NonZeroU64::new(u64::from(arguments.background_rate) << 20).map(RestOptions::new),
            index_memory: u64::from(arguments.index_memory) << 20,
            scrub_rate: NonZeroU64::new(u64::from(arguments.scrub_rate) << 20),
            domain: domain_of(arguments.dedup),
            patience: Some(Duration::from_secs(arguments.patience.max(1).into())),
            ..CacheOptions::default()
        },
    };
    let environment = ClientOptions::from_environment();
    let client = Client::new(ClientOptions {
        plain_http: if arguments.plain_http { PlainHttp::Always } else { environment.plain_http },
        patience: CLIENT_PATIENCE,
        first_contact_patience: CLIENT_PATIENCE,
        ..environment
    });
    let result = match runtimes() {
        Ok((runtime, network)) => {
            let result = runtime.block_on(run(options, client, network.handle())).map_err(|error| error.to_string());
            if result == Ok(Ended::SessionLeft) {
                drop(log);
                std::process::exit(0);
            }
            // The next process may be waiting for this one to end.
            runtime.shutdown_timeout(Duration::ZERO);
            network.shutdown_timeout(Duration::ZERO);
            result
        }
        Err(error) => Err(error.to_string()),
    };
    match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// For everything, and for connections to registries.
fn runtimes() -> io::Result<(Runtime, Runtime)> {
    let runtime = |name: &str, threads, blocking_threads_max| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(threads).max_blocking_threads(blocking_threads_max).thread_name(name);
        builder.enable_all().build()
    };
    Ok((
        runtime("lazuli-fused", WORKER_THREADS, BLOCKING_THREADS_MAX)?,
        runtime("lazuli-network", NETWORK_THREADS, NETWORK_BLOCKING_THREADS_MAX)?,
    ))
}

/// As many descriptors as this process may have: each open layer takes one, each control connection another.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "descriptors stay limited to {:?}", limit.current);
    }
}

/// Where a file cannot be had, standard error is as good.
fn start_log(filter: EnvFilter, file: Option<PathBuf>) -> io::Result<Log> {
    let Some(file) = file else { return Log::start(filter, LogTarget::StandardError, false) };
    Log::start(filter.clone(), LogTarget::File(file.clone()), false).or_else(|error| {
        let log = Log::start(filter, LogTarget::StandardError, false)?;
        warn!(file = %file.display(), %error, "log goes to standard error");
        Ok(log)
    })
}

/// Takes the descriptor from there, so that it is closed with the session's last one.
fn take_standard_input() -> io::Result<OwnedFd> {
    let device = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(device)
}

/// Has the service manager keep the session for the next process; false without one that wants to hear from us.
///
/// The unit must allow it: `FileDescriptorStoreMax` (systemd.service(5)).
fn store_session(daemon: &Daemon) -> io::Result<bool> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(false);
    }
    let name = NotifyState::FdName(STORED_SESSION);
    sd_notify::notify(&[NotifyState::FdStoreRemove, name.clone()])?;
    sd_notify::notify_with_fds(&[NotifyState::FdStore, name], &[daemon.device()])?;
    sd_notify::notify(&[NotifyState::Ready])?;
    Ok(true)
}

async fn run(options: DaemonOptions, client: Client, network: &Handle) -> Result<Ended, Error> {
    let network = network.clone();
    let sources = move |layer: &RemoteLayer| Ok(on_runtime(blob_source(&client, layer)?, network.clone()));
    let stop = stop_signals();
    let daemon = Daemon::start(options, Arc::new(sources)).await?;
    match store_session(&daemon) {
        Ok(true) => daemon.add_holder(),
        Ok(false) => {}
        Err(error) => warn!(%error, "the service manager does not keep the session"),
    }
    if let Some(interval) = sd_notify::watchdog_enabled() {
        tokio::spawn(tell_watchdog(daemon.health(), interval));
    }
    info!("ready");
    daemon.run(stop).await
}

/// Tells the service manager that the session answers, as often as it wants to hear that (sd_watchdog_enabled(3)); it
/// replaces a process that says it no longer.
async fn tell_watchdog(health: Health, interval: Duration) {
    loop {
        match health.ask().await {
            Ok(()) => {
                if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                    warn!(%error, "the service manager does not listen");
                }
            }
            Err(error) => error!(%error, "the session does not answer"),
        }
        tokio::time::sleep(interval / 2).await;
    }
}

fn blob_source(client: &Client, layer: &RemoteLayer) -> Result<Arc<dyn Source>, SourceError> {
    let reference: Reference = layer.image.parse().map_err(|error| SourceError::refused(format!("{error}")))?;
    Ok(Arc::new(BlobSource::new(client.clone(), reference, layer.layer.blob, layer.layer.blob_len)))
}

/// Hears of every SIGTERM and SIGINT from now on.
fn stop_signals() -> mpsc::Receiver<()> {
    let listen = |kind| tokio::signal::unix::signal(kind).expect("a signal that may be caught");
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    let (sender, stop) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            info!("{name}: told to end");
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    stop
}
