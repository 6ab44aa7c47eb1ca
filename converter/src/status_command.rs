//! `lazuli status`: flags in, a table or JSON out.

use std::path::PathBuf;

use clap::Args;
use converter::status::{ImageLayer, ImageStatus, NodeStatus, node_status};
use fusefs::control::{Reading, Verdict};
use indicatif::{HumanBytes, HumanCount};

/// What `lazuli status` is told.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// Only this image, with its layers
    #[arg(value_name = "REF")]
    image: Option<String>,
    /// The directory that lazuli-snapshotter was given as its root
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lazuli")]
    root: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub(crate) async fn run(arguments: StatusArguments) -> Result<(), String> {
    let mut status = node_status(&arguments.root).await.map_err(|error| error.to_string())?;
    if let Some(wanted) = &arguments.image {
        status.images.retain(|image| image.image == *wanted);
        status.not_lazy.retain(|known| known.image == *wanted);
        if status.images.is_empty() && status.not_lazy.is_empty() {
            return Err(format!("{wanted}: no layer of it is here; `lazuli status` lists what is"));
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&status).expect("a status has text keys only"));
    } else {
        print!("{}", describe(&status, arguments.image.is_some()));
    }
    Ok(())
}

fn describe(status: &NodeStatus, with_layers: bool) -> String {
    let mut text = format!("mode {}: {}\n", status.mode.in_use, status.mode.reason);
    for image in &status.images {
        text += &format!("\n{}\n", image.image);
        text += &lines_of(image);
        if with_layers {
            text += &image.layers.iter().map(layer_line).collect::<String>();
        }
    }
    for known in &status.not_lazy {
        text += &format!("\n{}\n  not lazy, it was pulled completely: {}\n", known.image, known.reason);
    }
    text
}

fn lines_of(image: &ImageStatus) -> String {
    let mounted = image.mode.map_or("not mounted".to_owned(), |mode| format!("mounted by {mode}"));
    let mut text = format!(
        "  {mounted}, {} layers, {}, {} on disk of {} compressed\n",
        HumanCount(image.layers.len() as u64),
        arrived(image.is_complete, image.frames_present, image.frames_total),
        HumanBytes(image.disk_bytes),
        HumanBytes(image.compressed_bytes),
    );
    let Reading { frames_wanted, frames_under_way, frames_awaited, files } = &image.reading;
    if *frames_wanted > 0 {
        text += &format!(
            "  fetching {} frames, {} under way, readers wait for {}\n",
            HumanCount(*frames_wanted),
            HumanCount(*frames_under_way),
            HumanCount(*frames_awaited),
        );
    }
    let verdicts = || image.layers.iter().map(|layer| &layer.verdict);
    for reason in verdicts().flatten().filter_map(Verdict::refusal) {
        text += &format!("  REFUSED, nothing of it is shown: {reason}\n");
    }
    let healed: u64 = image.layers.iter().map(|layer| layer.healed_pages).sum();
    if healed > 0 {
        text += &format!("  {} pages of 4 KiB were damaged on disk and are fetched again\n", HumanCount(healed));
    }
    let unverified = verdicts().filter(|verdict| verdict.is_none()).count();
    if unverified > 0 {
        text += &format!("  {} layers believed, not verified yet\n", HumanCount(unverified as u64));
    }
    text + &files.iter().map(|file| format!("  read now: {file}\n")).collect::<String>()
}

fn arrived(is_complete: bool, frames_present: u64, frames_total: u64) -> String {
    match is_complete {
        true => "complete".to_owned(),
        false => format!("{} of {} frames", HumanCount(frames_present), HumanCount(frames_total)),
    }
}

fn layer_line(layer: &ImageLayer) -> String {
    format!(
        "  layer {}: {}{}, {}, {} on disk of {} compressed, {} fetched\n",
        &layer.blob.hex()[..12],
        arrived(layer.is_complete, layer.frames_present, layer.frames_total),
        if layer.is_direct { ", read by the kernel alone" } else { "" },
        layer.verdict.as_ref().map_or("believed".to_owned(), ToString::to_string),
        HumanBytes(layer.disk_bytes),
        HumanBytes(layer.compressed_bytes),
        HumanBytes(layer.fetched_bytes),
    )
}
