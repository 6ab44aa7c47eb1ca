//! `lazuli check`: flags in, one line for everything that is wrong.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use converter::{
    check::{CheckError, CheckReport, Finding, LayerCheck, check},
    image::{ImageSource, location::Location, platform::Platform},
    layer::sign::read_public_keys,
};
use indicatif::HumanBytes;

use crate::{
    output::{fail_with, shown},
    registry_arguments::RegistryArguments,
};

/// What `lazuli check` is told.
#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., oci:DIR[:tag] or an archive
    #[arg(value_name = "IMG")]
    image: Location,
    /// The image that it was converted from: compares config, tar streams and annotations
    #[arg(long, value_name = "ORIGINAL")]
    against: Option<Location>,
    /// Each lazy layer must be signed with one of the Ed25519 public keys in this PEM file; can be repeated
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Check the image for this platform alone, for instance linux/arm64 [default: everything that an index lists]
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    registries: RegistryArguments,
    /// Succeed although something of the file system could not be checked, such as layers that lie elsewhere
    #[arg(long)]
    allow_unchecked: bool,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

/// Says that nothing was found in what could be checked, but that something could not.
const INCOMPLETE: u8 = 3;

/// Checks, and prints what was found; an image with findings is an error.
pub(crate) async fn run(arguments: CheckArguments) -> Result<ExitCode, String> {
    let CheckArguments { image, against, key, platform, registries, allow_unchecked, json } = arguments;
    let keys = key.iter().map(|path| read_public_keys(path)).collect::<Result<Vec<_>, _>>();
    let keys = keys.map_err(|error| error.to_string())?.concat();
    let client = registries.into_client()?;
    let named = image.to_string();
    let spool = std::env::temp_dir();
    let report = async {
        let source = ImageSource::open(image, &client, &spool).await.map_err(|error| fail_with(&named, &error))?;
        let original = match against {
            None => None,
            Some(original) => {
                let named = original.to_string();
                let opened = ImageSource::open(original, &client, &spool).await;
                Some(opened.map_err(|error| fail_with(&named, &error))?)
            }
        };
        let print = |layer: &LayerCheck| {
            if !json {
                print_layer(layer);
            }
        };
        let report = check(&source, original.as_ref(), platform.as_ref(), &keys, &print).await;
        report.map_err(|error: CheckError| fail_with(&named, &error))
    };
    let report: CheckReport = report.await?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report).expect("a report has no maps"));
    } else {
        print_findings(&report);
    }
    match report.finding_count() {
        0 => {
            let verdict =
                if report.is_fully_checked { "is sound" } else { "has nothing wrong in what was checked of it" };
            if !json {
                println!("{} {} {verdict}", shown(&named), shown(&describe(&report)));
            }
            let is_enough = report.is_fully_checked || allow_unchecked;
            Ok(if is_enough { ExitCode::SUCCESS } else { ExitCode::from(INCOMPLETE) })
        }
        1 => Err(format!("{named}: 1 finding")),
        count => Err(format!("{named}: {count} findings")),
    }
}

/// Prints all findings but those of the layers, which have been printed.
fn print_findings(report: &CheckReport) {
    let print = |place: &str, findings: &[Finding], further: u64, not_checked: &[String]| {
        findings.iter().for_each(|finding| println!("{place}{}", shown(&finding.to_string())));
        if further > 0 {
            println!("{place}{further} findings more of the same kinds");
        }
        not_checked.iter().for_each(|what| println!("{place}not checked: {}", shown(what)));
    };
    for image in &report.images {
        let is_only = report.digest == image.digest || report.images.len() == 1;
        let place = if is_only { String::new() } else { format!("image {}: ", shown(&image.platform)) };
        print(&place, &image.findings, image.further_finding_count, &[]);
    }
    for artifact in &report.artifacts {
        let place = format!("artifact {}: ", artifact.digest);
        print(&place, &artifact.findings, artifact.further_finding_count, &artifact.not_checked);
    }
    print("", &report.findings, report.further_finding_count, &[]);
}

/// The image that was checked, or how many the index lists.
fn describe(report: &CheckReport) -> String {
    let digest = report.digest;
    match report.images.as_slice() {
        [image] if image.digest == digest => format!("{} {digest}", image.platform),
        images => {
            let platforms = images.iter().map(|image| image.platform.as_str()).collect::<Vec<_>>().join(", ");
            let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
            let artifacts = count(report.artifacts.len(), "artifact");
            format!("{digest} with {} ({platforms}) and {artifacts}", count(images.len(), "image"))
        }
    }
}

fn print_layer(layer: &LayerCheck) {
    let LayerCheck { digest, counts, .. } = layer;
    let kind = if layer.is_lazy { "lazy" } else { "ordinary" };
    let mut words = vec![format!("{kind}, {}", HumanBytes(layer.compressed_len))];
    words.extend(layer.plain_len.map(|len| format!("{} of tar", HumanBytes(len))));
    if layer.is_lazy {
        words.push(format!("{} frames, {} files", counts.checked_frame_count, counts.checked_inode_count));
        words.push(format!(
            "{} hot pieces, {} dedup pieces",
            counts.checked_hot_piece_count, counts.checked_dedup_piece_count
        ));
    }
    let verdict = match layer.finding_count() {
        0 if layer.not_checked.is_empty() => "sound".to_owned(),
        0 => "not checked".to_owned(),
        1 => "1 finding".to_owned(),
        count => format!("{count} findings"),
    };
    println!("layer {digest}: {verdict} ({})", words.join(", "));
    for signature in &layer.signatures {
        println!("layer {digest}: signed by key {}", shown(&signature.to_string()));
    }
    for finding in &layer.findings {
        println!("layer {digest}: {}", shown(&finding.to_string()));
    }
    if layer.further_finding_count > 0 {
        println!("layer {digest}: {} findings more of the same kinds", layer.further_finding_count);
    }
    for what in &layer.not_checked {
        println!("layer {digest}: not checked: {}", shown(what));
    }
}
