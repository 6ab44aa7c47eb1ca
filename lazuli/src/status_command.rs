//! `lazuli status`: flags in, a table or JSON out.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use indicatif::{HumanBytes, HumanCount, HumanDuration};

use crate::output::shown;
use crate::status::{Chain, Fetching, ImageLayer, ImageStatus, NodeStatus, REFUSED, Read, Sums, VERIFIED, node_status};

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
    let mut text = match (status.mode, &status.mode_reason) {
        (Some(mode), Some(reason)) => format!("mode {mode}: {}\n", shown(reason)),
        _ => "no lazily pulled images: lazuli-fused is started with the first one\n".to_owned(),
    };
    for image in &status.images {
        text += &format!("\n{}\n", shown(&image.image));
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
            text += &format!("\n{}\n{lines}", shown(image));
        }
    }
    for known in status.not_lazy.iter().filter(|known| is_elsewhere(&known.image.as_str())) {
        text += &format!("\n{}\n  not lazy: it was pulled completely: {}\n", shown(&known.image), shown(&known.reason));
    }
    if status.images.len() > 1 {
        text += &format!("\ntotal, each layer once\n  {}\n", sizes(&status.total));
    }
    text
}

fn lines_of(image: &ImageStatus) -> String {
    let truth = if image.is_verified { "verified" } else { "not verified" };
    let lazy = if image.is_lazy { "lazy" } else { "not lazy" };
    let mounted = image.mode.map_or("not mounted".to_owned(), |mode| format!("mounted by {mode}"));
    let mut text = format!("  {lazy}, {}, {truth}, {mounted}\n", arrived(image.is_complete, &image.sums));
    text +=
        &image.reason.iter().map(|reason| format!("  {}{}\n", refusal_mark(image), shown(reason))).collect::<String>();
    text += &format!("  {}\n", sizes(&image.sums));
    let Fetching { wanted_frame_count, coming_frame_count, awaited_frame_count, reads } = &image.fetching;
    if *awaited_frame_count > 0 {
        text += &format!("  readers wait for {}\n", counted(*awaited_frame_count, "frame"));
    }
    for Read { path, waiting_ms, reason } in reads {
        text += &format!("  waited for: {} for {} s: {}\n", shown(path), waiting_ms / 1000, shown(reason));
    }
    let in_background = wanted_frame_count.saturating_sub(*awaited_frame_count);
    if in_background > 0 {
        let under_way = counted(*coming_frame_count, "frame");
        text += &format!(
            "  fetching {} in the background; {under_way} under way in all\n",
            counted(in_background, "frame")
        );
    }
    let healed: u64 = image.layers.iter().map(|layer| layer.healed_page_count).sum();
    if healed > 0 {
        text += &format!("  {} of 4 KiB, damaged on disk, fetched again\n", counted(healed, "page"));
    }
    text
}

/// Makes a refusal stand out.
fn refusal_mark(image: &ImageStatus) -> &'static str {
    if image.layers.iter().any(|layer| layer.truth == REFUSED) { "REFUSED, " } else { "" }
}

/// Figures that can be added up: of an image, or of all.
fn sizes(sums: &Sums) -> String {
    format!(
        "{}, {} compressed, {} fetched, {} on disk",
        counted(sums.layer_count, "layer"),
        HumanBytes(sums.compressed_len),
        HumanBytes(sums.fetched_bytes),
        HumanBytes(sums.disk_bytes),
    )
}

fn counted(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", HumanCount(count), if count == 1 { "" } else { "s" })
}

/// The lines about the chains of an image; all of them, or those with which something is.
fn chain_lines(status: &NodeStatus, image: &str, all: bool, now: Duration) -> String {
    let of_image = status.chains.iter().filter(|chain| chain.image == image);
    of_image.filter_map(|chain| chain_line(chain, all, now)).collect()
}

fn chain_line(chain: &Chain, all: bool, now: Duration) -> Option<String> {
    let ago = |since: i64| {
        let since = Duration::from_secs(u64::try_from(since).unwrap_or_default());
        HumanDuration(now.saturating_sub(since))
    };
    let is_remarkable = all || chain.waited_for_since.is_some() || chain.truth == REFUSED;
    if !is_remarkable {
        return None;
    }
    let name = shown(chain.chain_id.get(..19).unwrap_or(&chain.chain_id));
    let since = ago(chain.since);
    let truth = match (chain.truth, &chain.reason) {
        (REFUSED, reason) => {
            let reason = shown(reason.as_deref().unwrap_or_default());
            format!("REFUSED {since} ago, nothing is started on it: {reason}; remove the image")
        }
        (VERIFIED, _) => format!("verified {since} ago"),
        _ => format!("believed for {since}"),
    };
    let waits = chain.waited_for_since.map(|since| format!(", its verification is waited for since {}", ago(since)));
    let signed: String = chain.signed_by.iter().map(|key| format!(", signed by key {}", shown(key))).collect();
    Some(format!("  chain {name}: {truth}{}{signed}\n", waits.unwrap_or_default()))
}

/// How much of an image or a layer is here.
pub(crate) fn arrived(is_complete: bool, sums: &Sums) -> String {
    let (present, needed) = (HumanCount(sums.present_frame_count), HumanCount(sums.needed_frame_count));
    if is_complete { "complete".to_owned() } else { format!("{present} of {needed} frames") }
}

fn layer_line(layer: &ImageLayer) -> String {
    let truth = match (&layer.tar_digest, &layer.reason) {
        (Some(tar), _) => format!("verified as {tar}"),
        (None, Some(reason)) => format!("refused: {}", shown(reason)),
        (None, None) => layer.truth.to_owned(),
    };
    format!(
        "  layer {}: {}{}, {truth}, {} compressed, {} fetched, {} on disk\n",
        &layer.digest.hex()[..12],
        arrived(layer.is_complete, &layer.sums),
        if layer.is_direct { ", read by the kernel alone" } else { "" },
        HumanBytes(layer.sums.compressed_len),
        HumanBytes(layer.sums.fetched_bytes),
        HumanBytes(layer.sums.disk_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::why::tests::partly_lazy;

    #[test]
    fn no_name_of_a_tenant_reaches_the_terminal_or_forges_a_line() {
        const FORGED: &str = "x\u{1b}[2J\n  lazy, complete, verified";
        let forged = || FORGED.to_owned();
        let (_, mut status) = partly_lazy();
        let line_count = describe(&status, true, Duration::ZERO).lines().count();
        let image = &mut status.images[0];
        (image.image, image.reason) = (forged(), Some(forged()));
        image.fetching.reads = vec![Read { path: forged(), waiting_ms: 1, reason: forged() }];
        image.layers[0].reason = Some(forged());
        status.mode_reason = Some(forged());
        status.not_lazy = vec![control::NotLazy { image: "other".to_owned() + FORGED, reason: forged(), since: 1 }];
        let text = describe(&status, true, Duration::ZERO);
        // A read that waits; an image that is not lazy, with an empty line before it.
        assert_eq!(text.lines().count(), line_count + 1 + 3, "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains("\n  lazy, complete"), "{text}");
    }
}
