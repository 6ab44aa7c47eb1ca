//! How the command shows what a conversion does: bars on a terminal, lines elsewhere, on standard error.

use std::{
    collections::HashMap,
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use converter::convert::report::{LayerReport, NoObserver, Observer};
use format_spec::Digest;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

use crate::output::shown;

/// The observer that suits standard error.
pub(crate) fn observer(is_quiet: bool) -> Arc<dyn Observer> {
    match (is_quiet, std::io::stderr().is_terminal()) {
        (true, _) => Arc::new(NoObserver),
        (false, true) => Arc::new(Bars::default()),
        (false, false) => Arc::new(Lines),
    }
}

/// Enough of a digest to tell layers apart.
fn short(digest: &Digest) -> String {
    digest.hex()[..12].to_owned()
}

/// One line for a layer that is done.
fn describe(report: &LayerReport) -> String {
    let what = match &report.content {
        Some(content) => format!(
            "{} files, {} frames, {} to {}",
            content.inode_count,
            content.frame_count,
            HumanBytes(report.source_compressed_len),
            HumanBytes(report.compressed_len)
        ),
        None if report.is_cached => format!("{} converted before", HumanBytes(report.source_compressed_len)),
        None => format!("{} carried over", HumanBytes(report.source_compressed_len)),
    };
    let sent = if report.is_uploaded { "" } else { ", already there" };
    format!("{what}{sent}, {:.1} s", report.seconds)
}

/// A line for every layer that is done.
struct Lines;

impl Observer for Lines {
    fn image_starts(&self, name: &str) {
        eprintln!("{}:", shown(name));
    }

    fn layer_starts(&self, _: usize, _: &Digest, _: u64) {}

    fn layer_read(&self, _: usize, _: u64) {}

    fn layer_sent(&self, _: usize, _: u64, _: u64) {}

    fn layer_done(&self, _: usize, report: &LayerReport) {
        eprintln!("layer {}: {}", short(&report.source_digest), describe(report));
    }
}

/// A bar for every layer.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<HashMap<usize, ProgressBar>>,
}

impl Bars {
    fn update(&self, layer: usize, update: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = self.bars.lock().unwrap_or_else(PoisonError::into_inner).get(&layer) {
            update(bar);
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates here are fixed").progress_chars("=> ")
}

impl Observer for Bars {
    fn image_starts(&self, name: &str) {
        // A terminal that cannot be written to shows at the next bar.
        let _ = self.all.println(shown(name));
    }

    fn layer_starts(&self, layer: usize, digest: &Digest, len: u64) {
        let bar = self.all.add(ProgressBar::new(len));
        bar.set_style(style("{prefix} {msg:9} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}"));
        bar.set_prefix(short(digest));
        bar.set_message("converting");
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, bar);
    }

    fn layer_read(&self, layer: usize, read_len: u64) {
        self.update(layer, |bar| bar.set_position(read_len));
    }

    fn layer_sent(&self, layer: usize, sent_len: u64, len: u64) {
        self.update(layer, |bar| {
            bar.set_message("uploading");
            bar.set_length(len);
            bar.set_position(sent_len);
        });
    }

    fn layer_done(&self, layer: usize, report: &LayerReport) {
        self.update(layer, |bar| {
            bar.set_style(style("{prefix} {msg}"));
            bar.finish_with_message(describe(report));
        });
    }
}
