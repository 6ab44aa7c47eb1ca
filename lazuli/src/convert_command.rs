//! `lazuli convert`: flags in, progress and report out.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use converter::{
    convert::{ConvertError, ConvertOptions, Platforms, cache::CacheOptions, convert, report::Report},
    image::{ImageDestination, ImageError, ImageSource, location::Location, platform::Platform},
    inspect::{RecordedProfile, recorded_profile},
    layer::{
        compress::FrameOptions,
        sign::{KeyFileError, read_signing_key},
        start_up::HotPackChoice,
    },
};
use format_spec::{Digest, profile::Profile};
use indicatif::HumanBytes;
use registry::Client;

use crate::{
    output::{fail_with, shown},
    profile,
    profile_command::{self, ReadyArguments, read_profile},
    progress,
    registry_arguments::RegistryArguments,
    user_directories,
};

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
    #[arg(long, conflicts_with = "all_platforms")]
    platform: Option<Platform>,
    /// Convert the images for all platforms; attestations and other artifacts beside them are kept
    #[arg(long)]
    all_platforms: bool,
    /// Keep what is converted in mind here, so that it need not be converted again [default: lazuli/conversions in
    /// the user's cache directory]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Also take layers from an image that was converted before, for instance the last version; can be repeated
    #[arg(long, value_name = "IMG")]
    cache_from: Vec<Location>,
    /// Convert everything, whatever was converted before: the result depends on the image and the options alone
    #[arg(long, conflicts_with_all = ["cache", "cache_from"])]
    no_cache: bool,
    /// Bring along signatures, SBOMs and whatever else refers to the image
    #[arg(long)]
    referrers: bool,
    /// zstd compression level
    #[arg(long, default_value_t = FrameOptions::DEFAULT_LEVEL, value_parser = clap::value_parser!(i32).range(1..=19))]
    level: i32,
    /// Compressor threads, and layers converted side by side [default: number of processors]
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Profile of a recorded start: what it names goes into the hot packs [default: derived from the image]
    #[arg(long, value_name = "FILE", conflicts_with = "no_hot_pack")]
    profile: Option<PathBuf>,
    /// Run the image first, and record what it reads until it is ready: that goes into the hot packs. Needs root and runc
    #[arg(long, conflicts_with_all = ["profile", "no_hot_pack", "all_platforms"])]
    record: bool,
    #[command(flatten, next_help_heading = "With --record")]
    ready: ReadyArguments,
    /// Leave hot packs out: the result is smaller, its first start slower
    #[arg(long)]
    no_hot_pack: bool,
    /// Sign each lazy layer with the Ed25519 private key in this file, PKCS#8 in PEM or DER; can be repeated
    #[arg(long, value_name = "KEYFILE")]
    sign: Vec<PathBuf>,
    #[command(flatten)]
    registries: RegistryArguments,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

/// Converts, and prints the name and digest of the new image.
///
/// When it is interrupted, uploads under way are ended at the registry.
pub(crate) async fn run(arguments: ConvertArguments, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    let ConvertArguments {
        source,
        destination,
        platform,
        all_platforms,
        cache,
        cache_from,
        no_cache,
        referrers,
        level,
        jobs,
        profile,
        record,
        ready,
        no_hot_pack,
        sign,
        registries,
        json,
    } = arguments;
    let client = registries.into_client()?;
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let profile = profile.map(|path| read_profile(&path)).transpose()?;
    let sign = sign.iter().map(|path| read_signing_key(path)).collect::<Result<_, _>>();
    let sign = sign.map_err(|error: KeyFileError| error.to_string())?;
    let named = source.to_string();
    if let Some(directory) = &cache {
        std::fs::create_dir_all(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    tokio::pin!(interrupted);
    let recorded = match record {
        true => Some(record_start(&source, &client, platform.as_ref(), ready, jobs, &mut interrupted).await?),
        false => None,
    };
    let report = async {
        let spool_directory = std::env::temp_dir();
        let source = ImageSource::open(source, &client, &spool_directory).await?;
        let at_destination = image_at(&destination, &client).await;
        let destination = ImageDestination::open(&destination, &client, &spool_directory)?;
        let platforms = if all_platforms { Platforms::All } else { Platforms::One(platform.clone()) };
        let cache = match no_cache {
            true => None,
            false => Some(CacheOptions {
                directory: cache.or_else(|| user_directories::cache("lazuli/conversions")),
                images: open_all(cache_from, &client).await?,
            }),
        };
        let last_versions = match (&cache, all_platforms) {
            (Some(cache), false) => at_destination.into_iter().chain(cache.images.iter().cloned()).collect(),
            _ => Vec::new(),
        };
        let hot_pack = match profile.or(recorded) {
            Some(profile) => profile_choice(profile),
            None if no_hot_pack => HotPackChoice::None,
            None => carried_or_derived(&last_versions, platform.as_ref()).await,
        };
        let options = ConvertOptions { platforms, referrers, cache, level, jobs, hot_pack, sign };
        convert(&source, &destination, &options, progress::observer(json)).await
    };
    let report = tokio::select! {
        report = report => Some(report),
        () = &mut interrupted => None,
    };
    let Some(report) = report else {
        client.uploads_have_ended(UPLOADS_END_PATIENCE).await;
        return Err("interrupted".to_owned());
    };
    if report.is_err() {
        client.uploads_have_ended(UPLOADS_END_PATIENCE).await;
    }
    let report = report.map_err(|error: ConvertError| fail_with(&named, &error))?;
    print(&report, json);
    Ok(())
}

/// zstd level of a conversion that is made to be run once.
const RECORD_LEVEL: i32 = 1;
/// How long a conversion that gives up waits for registries to be told of it.
const UPLOADS_END_PATIENCE: Duration = Duration::from_secs(3);
fn profile_choice(profile: Profile) -> HotPackChoice {
    // Its content names it, and not the place where it was recorded.
    let profile = profile.with_origin(None);
    let digest = Digest::of(profile.to_json().as_bytes());
    HotPackChoice::Profile { profile: Arc::new(profile), digest }
}

/// The image that the destination's tag points to now. An archive is written anew, and whatever stands in its place is not opened.
async fn image_at(destination: &Location, client: &Client) -> Option<ImageSource> {
    match destination {
        Location::Registry(_) | Location::OciDirectory(_) => {
            ImageSource::open(destination.clone(), client, &std::env::temp_dir()).await.ok()
        }
        Location::OciArchive(_) | Location::DockerArchive { .. } => None,
    }
}

/// The profile that the last version was converted with: what it read is what the next one reads, mostly. Images that
/// are not there, or have none, do not help. For several platforms nothing is carried: the files of one say little of
/// another's.
async fn carried_or_derived(last_versions: &[ImageSource], platform: Option<&Platform>) -> HotPackChoice {
    for image in last_versions {
        if let Ok(Some(RecordedProfile { profile, digest })) = recorded_profile(image, platform).await {
            eprintln!("profile of {}: {}", shown(&image.name()), profile_command::summary(&profile));
            return HotPackChoice::Profile { profile: Arc::new(profile), digest };
        }
    }
    HotPackChoice::Derived
}

/// Converts an image for its recording alone, runs it, and returns what it read.
async fn record_start(
    source: &Location,
    client: &Client,
    platform: Option<&Platform>,
    ready: ReadyArguments,
    jobs: NonZeroUsize,
    interrupted: impl Future<Output = ()>,
) -> Result<Profile, String> {
    tokio::pin!(interrupted);
    let named = source.to_string();
    let options = ready.options(platform.cloned(), Vec::new());
    let directory = tempfile::Builder::new().prefix("lazuli-record-").tempdir_in(&options.work);
    let directory = directory.map_err(|error| format!("{}: {error}", options.work.display()))?;
    let place: Location = format!("oci:{}", directory.path().join("image").display())
        .parse()
        .map_err(|error| format!("{}: {error}", directory.path().display()))?;
    let making = async {
        let source = ImageSource::open(source.clone(), client, directory.path()).await?;
        let destination = ImageDestination::open(&place, client, directory.path())?;
        let quick = ConvertOptions {
            platforms: Platforms::One(platform.cloned()),
            referrers: false,
            cache: None,
            level: RECORD_LEVEL,
            jobs,
            hot_pack: HotPackChoice::None,
            sign: Vec::new().into(),
        };
        convert(&source, &destination, &quick, progress::observer(true)).await?;
        Ok(ImageSource::open(place.clone(), client, directory.path()).await?)
    };
    let image = tokio::select! {
        made = making => made.map_err(|error: ConvertError| fail_with(&named, &error))?,
        () = &mut interrupted => return Err("interrupted".to_owned()),
    };
    eprintln!("{named}: running it");
    let recorded = profile::record::record(&image, &options, |line| eprintln!("{}", shown(line)), interrupted).await;
    let recorded = recorded.map_err(|error| fail_with(&named, &error))?;
    eprintln!("recorded: {}", profile_command::summary(&recorded));
    Ok(recorded)
}

async fn open_all(locations: Vec<Location>, client: &Client) -> Result<Vec<ImageSource>, ImageError> {
    let mut opened = Vec::with_capacity(locations.len());
    for location in locations {
        opened.push(ImageSource::open(location, client, &std::env::temp_dir()).await?);
    }
    Ok(opened)
}

fn print(report: &Report, json: bool) {
    if json {
        println!("{}", serde_json::to_string_pretty(report).expect("a report has no maps"));
        return;
    }
    for artifact in &report.artifacts {
        let kind = if artifact.kind.is_empty() { "of no type" } else { &artifact.kind };
        eprintln!("{}: no container image ({}), copied as it is", artifact.digest, shown(kind));
    }
    if report.images.is_empty() {
        eprintln!("warning: nothing was converted: {} holds no lazy image", report.destination);
    }
    for referrer in &report.referrers {
        let attached = if referrer.attached.is_some() { ", attached to the new image" } else { "" };
        eprintln!("referrer {} ({}): carried along{attached}", referrer.digest, shown(&referrer.kind));
    }
    if !report.images.is_empty() {
        eprintln!(
            "{} layers, {} to {}, {} uploaded, {:.1} s, {:.0} MB/s of plain bytes",
            report.images.iter().map(|image| image.layers.len()).sum::<usize>(),
            HumanBytes(report.source_compressed_len),
            HumanBytes(report.compressed_len),
            HumanBytes(report.uploaded_bytes),
            report.seconds,
            report.plain_len as f64 / 1e6 / report.seconds.max(0.001)
        );
    }
    report.signed_by.iter().for_each(|key| eprintln!("signed by key {key}"));
    println!("{} {}", report.destination, report.digest);
}
