//! `lazuli-snapshotter`: containerd's snapshots service on a Unix socket.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use control::{
    DedupScope, Mode,
    log::{self, Log, LogTarget},
};
use snapshotter::{
    api::snapshots_server::SnapshotsServer,
    config::{CONFIG_PATH, Config, Settings},
    fused::FusedProgram,
    service::Service,
    signers::read_keys,
    snapshotter::Snapshotter,
    socket, user_namespace,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{info, warn};

mod service_manager;

/// How long requests under way may take after the signal to stop.
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// How long the last answers may take to leave; clients may keep their connections open forever.
const ANSWERS_LEAVE_WITHIN: Duration = Duration::from_millis(200);

/// Starts containers before their image has arrived: containerd's snapshots service.
#[derive(Debug, Parser)]
#[command(name = "lazuli-snapshotter", version)]
struct Arguments {
    /// Configuration file [default: /etc/lazuli/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket to serve on [default: /run/lazuli/snapshotter.sock]
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Directory that holds everything [default: /var/lib/lazuli]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The program lazuli-fused [default: beside this one]
    #[arg(long, value_name = "PATH")]
    fused: Option<PathBuf>,
    /// Fetch lazy layers in plain HTTP from every registry; on loopback that is done anyway
    #[arg(long)]
    plain_http: bool,
    /// How the kernel reads lazy layers: erofs (Linux 6.12), fuse, or auto for erofs where it works [default: auto]
    #[arg(long, value_name = "MODE")]
    mode: Option<Mode>,
    /// What the kernel reads ahead of a sequential reader, in KiB [default: that of lazuli-fused]
    #[arg(long, value_name = "KIB")]
    read_ahead: Option<u32>,
    /// MiB a second at which the rest of each layer is fetched after start-up; 0 fetches only what is read [default:
    /// that of lazuli-fused]
    #[arg(long, value_name = "MIB")]
    background_rate: Option<u32>,
    /// Seconds that a read waits for bytes, whatever the registries answer; then it fails [default: that of lazuli-fused]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u32>,
    /// MiB of memory for all indexes that are being opened [default: that of lazuli-fused]
    #[arg(long, value_name = "MIB")]
    index_memory: Option<u32>,
    /// MiB a second at which cached content is compared with its checksums when nobody waits; 0 for never [default: that
    /// of lazuli-fused]
    #[arg(long, value_name = "MIB")]
    scrub_rate: Option<u32>,
    /// Record what starts of containers read, and fetch it ahead when the next version of their image is started: true or
    /// false [default: that of lazuli-fused]
    #[arg(long, value_name = "BOOL")]
    record_starts: Option<bool>,
    /// Seconds that a container waits for its lazy layers; they are waited for all the same [default: 60]
    #[arg(long, value_name = "SECONDS")]
    start_timeout: Option<u32>,
    /// Seconds that the first lazy layer of an image waits for a look at its registry; then the image is pulled
    /// completely [default: 2]
    #[arg(long, value_name = "SECONDS")]
    probe_timeout: Option<u32>,
    /// Seconds that lazuli-fused may be silent before it is ended and started again; 0 for ever [default: 30]
    #[arg(long, value_name = "SECONDS")]
    hang_timeout: Option<u32>,
    /// Between which layers lazuli-fused copies content instead of fetching it: of one repository, one registry, or all
    /// of the node [default: that of lazuli-fused]
    #[arg(long, value_name = "SCOPE")]
    dedup: Option<DedupScope>,
    /// What both programs log: a level, or directives as snapshotter=debug,storage=info [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

fn main() -> ExitCode {
    // Not for people: how the daemon asks itself for a user namespace. There is one thread here still.
    let is_for_namespace = std::env::args_os().nth(1).is_some_and(|argument| argument == user_namespace::ARGUMENT);
    let done = match is_for_namespace {
        true => user_namespace::wait_in_new_namespace().map_err(Into::into),
        false => run(Arguments::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may read it any longer.
            let _unread = writeln!(io::stderr(), "lazuli-snapshotter: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let config = configuration(arguments)?;
    if !rustix::process::geteuid().is_root() {
        return Err("needs root: it mounts file systems".into());
    }
    let filter = log::filter(&config.log)?;
    let color = io::IsTerminal::is_terminal(&io::stderr());
    let _log = Log::start(filter, LogTarget::StandardError, color).map_err(|error| format!("log: {error}"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let (path, arguments) = (config.fused.clone(), config.fused_arguments());
    let fused = FusedProgram { path, arguments, is_service: config.fused_is_service };
    let snapshotter = Snapshotter::open(&config.root, fused, config.limits, config.trust.clone())?;
    runtime.block_on(serve(&config, snapshotter))?;
    // A request that waits for the registry is not waited for.
    runtime.shutdown_timeout(Duration::ZERO);
    Ok(())
}

fn configuration(arguments: Arguments) -> Result<Config, Box<dyn std::error::Error>> {
    let path = arguments.config.as_deref().unwrap_or(Path::new(CONFIG_PATH));
    let file = match fs::read_to_string(path) {
        Ok(text) => Settings::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound && arguments.config.is_none() => Settings::default(),
        Err(error) => return Err(format!("configuration {}: {error}", path.display()).into()),
    };
    let program = std::env::current_exe()?;
    let Arguments { address, root, fused, plain_http, mode, read_ahead, background_rate, patience, .. } = arguments;
    let Arguments { index_memory, scrub_rate, record_starts, start_timeout, probe_timeout, .. } = arguments;
    let Arguments { hang_timeout, dedup, log, .. } = arguments;
    let (plain_http, fused_is_service) = (plain_http.then_some(true), None);
    let flags = Settings {
        address,
        root,
        fused,
        fused_is_service,
        plain_http,
        mode,
        read_ahead,
        background_rate,
        patience,
        index_memory,
        scrub_rate,
        record_starts,
        start_timeout,
        probe_timeout,
        hang_timeout,
        dedup,
        trust: None,
        log,
    };
    let keys = file.trust.as_ref().map(|trust| read_keys(&trust.keys)).transpose();
    let keys = keys.map_err(|error| format!("configuration {}: {error}", path.display()))?.unwrap_or_default();
    let mut config = flags.or(file, program.parent());
    config.trust.keys = keys;
    Ok(config)
}

async fn serve(config: &Config, snapshotter: Snapshotter) -> Result<(), Box<dyn std::error::Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = socket::listen(&config.address)?;
    info!(address = %config.address.display(), root = %config.root.display(), "serving");
    snapshotter.start_tasks();
    service_manager::tell_that_it_serves(&snapshotter);
    let service = Service::new(snapshotter.clone());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .add_service(SnapshotsServer::new(service.clone()))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async { _ = stopped.await });
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return Ok(served?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping; lazuli-fused and the containers go on");
    // Gone before the last answers, so that a new daemon can take its place.
    if let Err(error) = fs::remove_file(&config.address) {
        warn!(address = %config.address.display(), %error, "socket stays");
    }
    _ = stop.send(());
    let idle = async {
        service.idle().await;
        if let Err(error) = snapshotter.make_durable().await {
            warn!(%error, "the last changes are lost");
        }
        tokio::time::sleep(ANSWERS_LEAVE_WITHIN).await;
    };
    tokio::select! {
        served = server => served?,
        () = idle => {}
        () = tokio::time::sleep(STOP_WITHIN) => warn!("requests under way are given up"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_has_its_key_and_every_key_stands_in_the_documentation() {
        let command = Arguments::command();
        let documentation = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/NODE.md")).unwrap();
        for flag in command.get_arguments().filter(|flag| flag.get_id() != "config") {
            let (key, name) = (flag.get_id().as_str(), flag.get_long().unwrap());
            let values =
                ["true", "1", "'text'", "'auto'", "'node'"].map(|value| Settings::parse(&format!("{key} = {value}")));
            let errors: Vec<_> = values.iter().filter_map(|parsed| parsed.as_ref().err()).collect();
            assert!(errors.len() < values.len(), "{key} is no key: {errors:?}");
            assert!(documentation.contains(&format!("| `{key}` | `--{name}` |")), "{key} is not in docs/NODE.md");
        }
        let refused = Settings::parse("no-such-key = 1").unwrap_err().to_string();
        let (_, keys) = refused.split_once("expected one of ").unwrap();
        for key in keys.split(", ") {
            assert!(documentation.contains(&format!("\n| {key} | ")), "{key} is not in docs/NODE.md");
        }
    }
}
