//! `lazuli pull`: flags in, progress and result out.

use std::{
    collections::HashMap,
    io::IsTerminal,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::Args;
use format_spec::Digest;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use registry::Reference;

use crate::output::shown;
use crate::pull::{PullObserver, PullOptions, PulledLayer, pull};
use crate::registry_arguments::RegistryArguments;

/// What `lazuli pull` is told.
#[derive(Debug, Args)]
pub(crate) struct PullArguments {
    /// The image: host/repository:tag or host/repository@sha256:...
    #[arg(value_name = "REF")]
    reference: Reference,
    /// containerd's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd's namespace
    #[arg(long, short, default_value = "default")]
    namespace: String,
    /// The snapshotter, as containerd's configuration names it
    #[arg(long, default_value = "lazuli")]
    snapshotter: String,
    /// Seconds to ask again for a layer that the snapshotter cannot take yet, as one that lies on layers of another image
    /// which are being verified
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u32,
    #[command(flatten)]
    registries: RegistryArguments,
}

/// Pulls, and prints the name and digest of the image.
pub(crate) async fn run(arguments: PullArguments, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    let PullArguments { reference, address, namespace, snapshotter, wait, registries } = arguments;
    let client = registries.into_client()?;
    let options = PullOptions { reference, address, namespace, snapshotter, wait: Duration::from_secs(wait.into()) };
    let observer: Arc<dyn PullObserver> =
        if std::io::stderr().is_terminal() { Arc::new(Bars::default()) } else { Arc::new(Lines::default()) };
    let pulled = pull(&options, &client, observer, interrupted).await;
    let pulled = pulled.map_err(|error| format!("{}: {error}", options.reference))?;
    println!("{} {}", pulled.name, pulled.digest);
    Ok(())
}

/// One line for a layer that is done.
fn describe(outcome: PulledLayer) -> String {
    match outcome {
        PulledLayer::Present => "already there".to_owned(),
        PulledLayer::Lazy => "lazy".to_owned(),
        PulledLayer::Unpacked { downloaded_len } => format!("unpacked, {} downloaded", HumanBytes(downloaded_len)),
    }
}

/// Enough of a digest to tell layers apart.
fn short(digest: &Digest) -> String {
    digest.hex()[..12].to_owned()
}

/// A line for every layer that is done, or that is waited for.
#[derive(Default)]
struct Lines {
    /// The layer that was waited for last.
    waiting: Mutex<Option<usize>>,
}

impl PullObserver for Lines {
    fn download_starts(&self, _: usize, _: &Digest, _: u64) {}

    fn downloaded(&self, _: usize, _: u64) {}

    fn unpack_starts(&self, _: usize) {}

    fn waits(&self, layer: usize, digest: &Digest, reason: &str) {
        if self.waiting.lock().unwrap_or_else(PoisonError::into_inner).replace(layer) != Some(layer) {
            eprintln!("layer {}: waits: {}", short(digest), shown(reason));
        }
    }

    fn layer_done(&self, _: usize, digest: &Digest, outcome: PulledLayer) {
        eprintln!("layer {}: {}", short(digest), describe(outcome));
    }
}

/// A bar for every layer that is downloaded, a line for every other.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<usize, ProgressBar>>,
}

impl Bars {
    fn bar(&self, layer: usize, len: u64) -> ProgressBar {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        bars.entry(layer).or_insert_with(|| self.all.add(ProgressBar::new(len))).clone()
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates here are fixed").progress_chars("=> ")
}

impl PullObserver for Bars {
    fn download_starts(&self, layer: usize, digest: &Digest, len: u64) {
        let bar = self.bar(layer, len);
        bar.set_style(style("{prefix} {msg:11} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}"));
        bar.set_prefix(short(digest));
        bar.set_message("downloading");
    }

    fn downloaded(&self, layer: usize, len: u64) {
        self.bar(layer, len).set_position(len);
    }

    fn unpack_starts(&self, layer: usize) {
        self.bar(layer, 0).set_message("unpacking");
    }

    fn waits(&self, layer: usize, digest: &Digest, reason: &str) {
        let bar = self.bar(layer, 0);
        bar.set_style(style("{prefix} waits: {msg}"));
        bar.set_prefix(short(digest));
        bar.set_message(shown(reason).into_owned());
    }

    fn layer_done(&self, layer: usize, digest: &Digest, outcome: PulledLayer) {
        let bar = self.bar(layer, 0);
        bar.set_style(style("{prefix} {msg}"));
        bar.set_prefix(short(digest));
        bar.finish_with_message(describe(outcome));
    }
}
