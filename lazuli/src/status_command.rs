//! `lazuli status`: flags in, a table or JSON out.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use control::{
    Reading, Verdict,
    chains::{ChainStatus, Truth},
};
use indicatif::{HumanBytes, HumanCount, HumanDuration};

use crate::status::{ImageLayer, ImageStatus, NodeStatus, node_status};

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
        status.chains.retain(|chain| chain.image == *wanted);
        status.not_lazy.retain(|known| known.image == *wanted);
        if status.images.is_empty() && status.chains.is_empty() && status.not_lazy.is_empty() {
            return Err(format!("{wanted}: no layer of it is here; `lazuli status` lists what is"));
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&status).expect("a status has text keys only"));
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        print!("{}", describe(&status, arguments.image.is_some(), now));
    }
    Ok(())
}

/// `now` is the time since 1970.
fn describe(status: &NodeStatus, with_layers: bool, now: Duration) -> String {
    let mut text = match &status.mode {
        Some(mode) => format!("mode {}: {}\n", mode.in_use, mode.reason),
        None => "no lazily pulled images: lazuli-fused is started with the first one\n".to_owned(),
    };
    for image in &status.images {
        text += &format!("\n{}\n", image.image);
        text += &lines_of(image);
        if with_layers {
            text += &image.layers.iter().map(layer_line).collect::<String>();
        }
        text += &chain_lines(status, &image.image, with_layers, now);
    }
    // Those whose layers are in the cache for other images only, or no longer.
    let is_elsewhere = |image: &&str| status.images.iter().all(|other| other.image != *image);
    let others: BTreeSet<&str> = status.chains.iter().map(|chain| chain.image.as_str()).filter(is_elsewhere).collect();
    for image in others {
        let lines = chain_lines(status, image, with_layers, now);
        if !lines.is_empty() {
            text += &format!("\n{image}\n{lines}");
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
    if *frames_awaited > 0 {
        text += &format!("  readers wait for {} frames\n", HumanCount(*frames_awaited));
    }
    let in_background = frames_wanted.saturating_sub(*frames_awaited);
    if in_background > 0 {
        text += &format!(
            "  fetching {} frames in the background; {} frames under way in all\n",
            HumanCount(in_background),
            HumanCount(*frames_under_way),
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
    text + &files.iter().map(|file| format!("  waited for: {file}\n")).collect::<String>()
}

/// The lines about the chains of an image; all of them, or those with which something is.
fn chain_lines(status: &NodeStatus, image: &str, all: bool, now: Duration) -> String {
    let of_image = status.chains.iter().filter(|chain| chain.image == image);
    of_image.filter_map(|chain| chain_line(chain, all, now)).collect()
}

fn chain_line(chain: &ChainStatus, all: bool, now: Duration) -> Option<String> {
    let ago = |since: i64| {
        let since = Duration::from_secs(u64::try_from(since).unwrap_or_default());
        HumanDuration(now.saturating_sub(since))
    };
    let is_remarkable = all || chain.waited_for_since.is_some() || matches!(chain.truth, Truth::Refused { .. });
    if !is_remarkable {
        return None;
    }
    let name = chain.chain.get(..19).unwrap_or(&chain.chain);
    let since = ago(chain.since);
    let truth = match &chain.truth {
        Truth::Believed => format!("believed for {since}"),
        Truth::Verified => format!("verified {since} ago"),
        Truth::Refused { reason } => {
            format!("REFUSED {since} ago, nothing is started on it: {reason}; remove the image")
        }
    };
    let waits = chain.waited_for_since.map(|since| format!(", its verification is waited for since {}", ago(since)));
    let signed: String = chain.signed_by.iter().map(|key| format!(", signed by key {key}")).collect();
    Some(format!("  chain {name}: {truth}{}{signed}\n", waits.unwrap_or_default()))
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
