//! `lazuli convert`: flags in, progress and report out.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use converter::{
    compress::FrameOptions,
    convert::{ConvertError, ConvertOptions, convert},
    hot_set::Profile,
    image::{ImageDestination, ImageSource},
    location::Location,
    manifest::Platform,
    report::Report,
    start_up::HotPackChoice,
};
use indicatif::HumanBytes;
use registry::{Client, ClientOptions};

use crate::{fail_with, progress};

/// What `lazuli convert` is told.
#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., oci:DIR[:tag], oci-archive:FILE[:tag] or
    /// docker-archive:FILE[:name]
    #[arg(value_name = "SRC")]
    source: Location,
    /// Where the new image goes: host/repository:tag, oci:DIR[:tag] or oci-archive:FILE[:tag]
    #[arg(value_name = "DST")]
    destination: Location,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    /// zstd compression level
    #[arg(long, default_value_t = FrameOptions::DEFAULT_LEVEL, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Compressor threads, and layers converted side by side [default: number of processors]
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Profile of a recorded start: what it names goes into the hot packs [default: derived from the image]
    #[arg(long, value_name = "FILE", conflicts_with = "no_hot_pack")]
    profile: Option<PathBuf>,
    /// Leave hot packs out: the result is smaller, its first start slower
    #[arg(long)]
    no_hot_pack: bool,
    /// Speak plain HTTP to registries; loopback addresses are spoken to in plain HTTP anyway
    #[arg(long)]
    plain_http: bool,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

/// Converts, and prints the name and digest of the new image.
pub(crate) async fn run(arguments: ConvertArguments) -> Result<(), String> {
    let ConvertArguments { source, destination, platform, level, jobs, profile, no_hot_pack, plain_http, json } = arguments;
    let client = Client::new(ClientOptions { plain_http, ..ClientOptions::from_environment() });
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let hot_pack = match (profile, no_hot_pack) {
        (Some(path), _) => HotPackChoice::Profile(Arc::new(read_profile(&path)?)),
        (None, true) => HotPackChoice::None,
        (None, false) => HotPackChoice::Derived,
    };
    let named = source.to_string();
    let report = async {
        let spool_directory = std::env::temp_dir();
        let source = ImageSource::open(source, &client, &spool_directory).await?;
        let destination = ImageDestination::open(&destination, &client, &spool_directory)?;
        let options = ConvertOptions { platform, level, jobs, hot_pack };
        convert(&source, &destination, &options, progress::observer(json)).await
    };
    let report = report.await.map_err(|error: ConvertError| fail_with(&named, &error))?;
    print(&report, json);
    Ok(())
}

/// Longest profile read, in bytes: a line a file makes some megabytes at most.
const PROFILE_LEN_MAX: u64 = 256 << 20;

fn read_profile(path: &Path) -> Result<Profile, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let len = std::fs::metadata(path).map_err(|error| failed(&error))?.len();
    if len > PROFILE_LEN_MAX {
        return Err(failed(&format!("it has {len} bytes, a profile has at most {PROFILE_LEN_MAX}")));
    }
    let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
    Profile::parse(&bytes).map_err(|error| failed(&error))
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
