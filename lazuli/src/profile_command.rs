//! `lazuli profile`: what starts of an image read.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use control::Mode;
use converter::{
    image::{ImageSource, location::Location, platform::Platform},
    inspect::recorded_profile,
};
use format_spec::profile::Profile;
use indicatif::{HumanBytes, HumanDuration};

use crate::{
    output::{fail_with, shown},
    profile::{
        Ready,
        node::{NodeRecord, node_record, node_records},
        record::{RecordOptions, record},
    },
    registry_arguments::RegistryArguments,
};

/// How long a container may take to get ready.
const READY_WITHIN_SECONDS: u32 = 300;
/// How long a container runs that nothing says of when it is ready.
const RUN_SECONDS: u32 = 30;
/// Longest profile read, in bytes: a line a file makes some megabytes at most.
const PROFILE_LEN_MAX: u64 = 256 << 20;

/// The arguments of `lazuli profile`.
#[derive(Debug, Args)]
pub(crate) struct ProfileArguments {
    #[command(subcommand)]
    action: ProfileAction,
}

#[derive(Debug, Subcommand)]
enum ProfileAction {
    /// Run a converted image, and record what it reads until it is ready.
    ///
    /// The image is mounted with nothing in the cache and run by runc with the network of this host, writes to a
    /// directory that is removed afterwards, and is ended once it is ready. Needs root.
    Record(RecordCommand),
    /// Show the files of profiles and how much of each is read.
    Show {
        /// The profiles
        #[arg(value_name = "FILE", required = true)]
        profiles: Vec<PathBuf>,
    },
    /// Take the profile out of a converted image that was made with one.
    Export(ImageArguments),
    /// Write what this node has recorded of starts of an image's repository, or list all such records.
    ///
    /// lazuli-fused records what starts of containers read, and uses it for the next version of the image on this node;
    /// given to lazuli convert --profile it serves all nodes.
    Node(NodeCommand),
    /// Put several profiles together: what any of them has, first what is read first.
    Merge {
        /// The profiles
        #[arg(value_name = "FILE", required = true)]
        profiles: Vec<PathBuf>,
        /// Where to write the result [default: standard output]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
struct RecordCommand {
    #[command(flatten)]
    image: ImageArguments,
    #[command(flatten)]
    ready: ReadyArguments,
    /// Run this instead of the image's command
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct NodeCommand {
    /// A repository, host/repository, or an image of it [default: list the repositories]
    #[arg(value_name = "REPOSITORY")]
    repository: Option<String>,
    /// The directory that lazuli-snapshotter was given as its root
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lazuli")]
    root: PathBuf,
    /// Where to write the profile [default: standard output]
    #[arg(long, short, value_name = "FILE", requires = "repository")]
    output: Option<PathBuf>,
}

/// The image of a profile, and where the profile goes.
#[derive(Debug, Args)]
struct ImageArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., oci:DIR[:tag] or oci-archive:FILE[:tag]
    #[arg(value_name = "IMG")]
    image: Location,
    /// Where to write the profile [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    registries: RegistryArguments,
}

/// When a container that is recorded is ready.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReadyArguments {
    /// Ready when a line of the container's output has this text in it
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["ready_port", "run_for"])]
    ready_line: Option<String>,
    /// Ready when this port answers on the loopback interface
    #[arg(long, value_name = "PORT", conflicts_with = "run_for")]
    ready_port: Option<u16>,
    /// Ready when the container ends, or after so many seconds [default: 30, unless --ready-line or --ready-port say more]
    #[arg(long, value_name = "SECONDS")]
    run_for: Option<u32>,
    /// Seconds that the container may take to get ready
    #[arg(long, value_name = "SECONDS", default_value_t = READY_WITHIN_SECONDS)]
    ready_within: u32,
    /// Where what the container reads and writes is kept meanwhile [default: the directory for temporary files]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// How the kernel reads the image while it is recorded: erofs (Linux 6.12), fuse, or auto for erofs where it works
    #[arg(long, value_name = "MODE", default_value_t)]
    record_mode: Mode,
}

impl ReadyArguments {
    /// How to record the image for `platform` with this command instead of its own, unless it is empty.
    pub(crate) fn options(self, platform: Option<Platform>, command: Vec<String>) -> RecordOptions {
        let ready = match (self.ready_line, self.ready_port) {
            (Some(line), _) => Ready::Line(line),
            (None, Some(port)) => Ready::Port(port),
            (None, None) => Ready::End(Duration::from_secs(self.run_for.unwrap_or(RUN_SECONDS).into())),
        };
        let within = Duration::from_secs(self.ready_within.into());
        let work = self.work.unwrap_or_else(std::env::temp_dir);
        RecordOptions { command, ready, within, platform, mode: self.record_mode, work }
    }
}

/// Does what is asked of profiles.
pub(crate) async fn run(arguments: ProfileArguments, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    match arguments.action {
        ProfileAction::Record(command) => run_record(command, interrupted).await,
        ProfileAction::Show { profiles } => profiles.iter().try_for_each(|path| {
            show(&read_profile(path)?);
            Ok(())
        }),
        ProfileAction::Export(arguments) => tokio::select! {
            exported = run_export(arguments) => exported,
            () = interrupted => Err("interrupted".to_owned()),
        },
        ProfileAction::Node(command) => run_node(command),
        ProfileAction::Merge { profiles, output } => {
            let profiles = profiles.iter().map(|path| read_profile(path)).collect::<Result<Vec<_>, _>>()?;
            write(&Profile::merge(&profiles), output.as_deref())
        }
    }
}

async fn run_record(command: RecordCommand, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    let RecordCommand { image, ready, command } = command;
    let ImageArguments { image, output, platform, registries } = image;
    let client = registries.into_client()?;
    let named = image.to_string();
    let options = ready.options(platform, command);
    let source = ImageSource::open(image, &client, &std::env::temp_dir()).await;
    let source = source.map_err(|error| fail_with(&named, &error))?;
    let recorded = record(&source, &options, |line| eprintln!("{}", shown(line)), interrupted).await;
    let profile = recorded.map_err(|error| fail_with(&named, &error))?;
    eprintln!("recorded: {}", summary(&profile));
    write(&profile, output.as_deref())
}

async fn run_export(arguments: ImageArguments) -> Result<(), String> {
    let ImageArguments { image, output, platform, registries } = arguments;
    let client = registries.into_client()?;
    let named = image.to_string();
    let source = ImageSource::open(image, &client, &std::env::temp_dir()).await;
    let source = source.map_err(|error| fail_with(&named, &error))?;
    let profile = recorded_profile(&source, platform.as_ref()).await.map_err(|error| fail_with(&named, &error))?;
    let none = || format!("{named}: no profile is in its hot packs; record one with lazuli profile record");
    write(&profile.ok_or_else(none)?.profile, output.as_deref())
}

fn run_node(command: NodeCommand) -> Result<(), String> {
    let NodeCommand { repository, root, output } = command;
    if let Some(named) = repository {
        let record = node_record(&root, &named).map_err(|error| error.to_string())?;
        return write(&record.profile, output.as_deref());
    }
    let (records, damaged) = node_records(&root).map_err(|error| error.to_string())?;
    damaged.iter().for_each(|error| eprintln!("{}", shown(&error.to_string())));
    if records.is_empty() {
        eprintln!("no start is recorded in {}", root.display());
    }
    for NodeRecord { repository, profile, age } in records {
        println!("{}: {}, {} ago", shown(&repository), summary(&profile), HumanDuration(age));
    }
    Ok(())
}

/// Files and bytes of a profile.
pub(crate) fn summary(profile: &Profile) -> String {
    format!("{} of {} files", HumanBytes(profile.ranges_len()), profile.files().count())
}

fn show(profile: &Profile) {
    for (path, ranges) in profile.files() {
        let path = path.escape_ascii();
        match ranges {
            Some(ranges) => {
                let len: u64 = ranges.iter().map(|range| range.end - range.start).sum();
                println!("{:>12}  {path}", HumanBytes(len).to_string());
            }
            None => println!("{:>12}  {path}", "all"),
        }
    }
    println!("{}", summary(profile));
}

/// Reads a profile from a file.
pub(crate) fn read_profile(path: &Path) -> Result<Profile, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(|error| failed(&error))?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, PROFILE_LEN_MAX + 1), &mut bytes)
        .map_err(|error| failed(&error))?;
    if bytes.len() as u64 > PROFILE_LEN_MAX {
        return Err(failed(&format!("it has more than {PROFILE_LEN_MAX} bytes")));
    }
    Profile::parse(&bytes).map_err(|error| failed(&error))
}

/// Writes a profile to a file in one step, or to standard output.
fn write(profile: &Profile, output: Option<&Path>) -> Result<(), String> {
    let text = profile.to_json();
    let Some(path) = output else {
        println!("{text}");
        return Ok(());
    };
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    writeln!(file, "{text}").map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
