//! `lazuli inspect`: flags in, tables out.

use clap::Args;
use converter::{
    image::{ImageSource, location::Location, platform::Platform},
    inspect::{HotEntry, ImageFacts, InspectError, LayerFacts, LazyBy, Spread, inspect_image},
};
use indicatif::{HumanBytes, HumanCount};

use crate::{
    output::{fail_with, shown},
    registry_arguments::RegistryArguments,
};

/// What `lazuli inspect` is told.
#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., oci:DIR[:tag] or an archive
    #[arg(value_name = "IMG")]
    image: Location,
    /// List everything that is in the hot packs, in its order
    #[arg(long)]
    hot: bool,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    registries: RegistryArguments,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

/// Looks at the image and prints what it consists of.
pub(crate) async fn run(arguments: InspectArguments) -> Result<(), String> {
    let InspectArguments { image, hot, platform, registries, json } = arguments;
    let client = registries.into_client()?;
    let named = image.to_string();
    let facts = async {
        let source = ImageSource::open(image, &client, &std::env::temp_dir()).await?;
        inspect_image(&source, platform.as_ref(), hot).await
    };
    let facts = facts.await.map_err(|error: InspectError| fail_with(&named, &error))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&facts).expect("facts have no maps"));
    } else {
        print!("{}", describe(&named, &facts));
    }
    Ok(())
}

/// The whole report as text.
fn describe(named: &str, facts: &ImageFacts) -> String {
    let mut text = format!(
        "{} {}\nmanifest {}\nconfig   {}\n\n",
        shown(named),
        shown(&facts.platform),
        facts.digest,
        facts.config_digest
    );
    text += &layer_table(facts);
    if facts.total.lazy_layer_count > 0 {
        text += &frame_table(&facts.layers);
        text += &summary(facts);
    }
    for (number, layer) in numbered(&facts.layers) {
        let hot_pack = layer.lazy.as_ref().and_then(|lazy| lazy.hot_pack.as_ref());
        let list = hot_pack.map(|hot_pack| hot_pack.pieces.as_slice()).unwrap_or_default();
        if !list.is_empty() {
            text += &format!("\nhot pack of layer {number}\n{}", hot_table(list));
        }
    }
    text
}

fn numbered(layers: &[LayerFacts]) -> impl Iterator<Item = (usize, &LayerFacts)> {
    (1..).zip(layers)
}

fn layer_table(facts: &ImageFacts) -> String {
    let mut rows = vec![
        ["", "layer", "type", "compressed", "plain", "ratio", "files", "index", "hot pack", "twice", "below", "hidden"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (number, layer) in numbered(&facts.layers) {
        let mut row =
            vec![number.to_string(), layer.digest.hex()[..12].to_owned(), kind(layer), bytes(layer.compressed_len)];
        match &layer.lazy {
            None => row.extend(std::iter::repeat_n("-".to_owned(), 8)),
            Some(lazy) => {
                let dedup = |of: fn(&converter::inspect::DedupFacts) -> u64| {
                    lazy.dedup.as_ref().map_or("-".to_owned(), |dedup| bytes(of(dedup)))
                };
                row.extend([
                    bytes(lazy.plain_len),
                    format!("{:.3}", lazy.ratio),
                    HumanCount(lazy.inode_count).to_string(),
                    bytes(lazy.index_len),
                    if lazy.hot_pack_len == 0 { "-".to_owned() } else { bytes(lazy.hot_pack_len) },
                    dedup(|dedup| dedup.duplicate_len),
                    dedup(|dedup| dedup.duplicate_of_lower_len),
                    bytes(lazy.hidden.hidden_len),
                ]);
            }
        }
        rows.push(row);
    }
    table(&rows, &[1, 2])
}

/// What a layer is, in a few words: without what all media types start with.
fn kind(layer: &LayerFacts) -> String {
    let media_type = ["application/vnd.oci.image.layer.v1.", "application/vnd.docker.image.rootfs.diff."]
        .into_iter()
        .find_map(|prefix| layer.media_type.strip_prefix(prefix))
        .unwrap_or(&layer.media_type);
    let media_type = shown(media_type);
    match layer.lazy_by {
        None => media_type.into_owned(),
        Some(LazyBy::Annotations) => format!("{media_type} lazy"),
        Some(LazyBy::Footer) => format!("{media_type} lazy, annotations lost"),
    }
}

fn frame_table(layers: &[LayerFacts]) -> String {
    let mut rows = vec![
        ["", "frames", "plain", "min", "median", "max", "compressed", "min", "median", "max"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (number, layer) in numbered(layers) {
        let Some(lazy) = &layer.lazy else { continue };
        let mut row = vec![number.to_string(), HumanCount(lazy.frame_count).to_string()];
        for Spread { min, median, max } in [lazy.frame_plain_len, lazy.frame_compressed_len] {
            row.push(String::new());
            row.extend([min, median, max].map(bytes));
        }
        rows.push(row);
    }
    format!("\n{}", table(&rows, &[]))
}

fn summary(facts: &ImageFacts) -> String {
    let total = &facts.total;
    let count = facts.layers.len();
    let files: u64 = facts.layers.iter().filter_map(|layer| layer.lazy.as_ref()).map(|lazy| lazy.inode_count).sum();
    let mut lines = vec![
        format!("layers    {count}, lazy {}", total.lazy_layer_count),
        format!(
            "size      {} compressed; lazy layers {} for {} plain, {:.3}",
            bytes(total.compressed_len),
            bytes(total.lazy_compressed_len),
            bytes(total.lazy_plain_len),
            total.lazy_compressed_len as f64 / total.lazy_plain_len.max(1) as f64
        ),
        format!(
            "index     {}, {:.1} bytes a file",
            bytes(total.index_len),
            total.index_len as f64 / files.max(1) as f64
        ),
    ];
    let hot_packs = facts.layers.iter().filter_map(|layer| layer.lazy.as_ref()?.hot_pack.as_ref());
    let mut reasons: std::collections::BTreeMap<&str, (u64, u64)> = Default::default();
    let (mut plain_len, mut file_count) = (0, 0);
    for hot_pack in hot_packs {
        plain_len += hot_pack.held_len;
        file_count += hot_pack.file_count;
        for reason in &hot_pack.reasons {
            let sum = reasons.entry(reason.hot_reason).or_default();
            *sum = (sum.0 + reason.file_count, sum.1 + reason.held_len);
        }
    }
    if total.hot_pack_len == 0 {
        lines.push("hot pack  none".to_owned());
    } else {
        let (packed, plain) = (bytes(total.hot_pack_len), bytes(plain_len));
        lines.push(format!("hot pack  {packed} for {plain} of {file_count} files"));
        for (reason, (files, len)) in reasons {
            lines.push(format!("          {reason}: {} of {files} files", bytes(len)));
        }
    }
    let (twice, below) = (bytes(total.duplicate_len), bytes(total.duplicate_of_lower_len));
    lines.push(format!("twice     {twice} within a layer; below: {below} that a lower layer has"));
    let among = if total.lazy_layer_count < count { " (ordinary layers not looked at)" } else { "" };
    lines.push(format!("hidden    {} that later layers replace or delete{among}", bytes(total.hidden_len)));
    for (number, layer) in numbered(&facts.layers).filter(|(_, layer)| layer.lazy.is_some()) {
        let keys = layer.signed_by.join(", ");
        let keys = shown(&keys);
        let signed = if keys.is_empty() { "not signed".to_owned() } else { format!("signed by key {keys}") };
        lines.push(format!("signature layer {number}: {signed}"));
    }
    format!("\n{}\n", lines.join("\n"))
}

fn hot_table(list: &[HotEntry]) -> String {
    let mut rows = vec![["", "path", "reason", "from", "bytes"].map(str::to_owned).to_vec()];
    for (number, entry) in (1..).zip(list) {
        let HotEntry { path, offset, len, hot_reason } = entry;
        rows.push(vec![
            number.to_string(),
            shown(path).into_owned(),
            (*hot_reason).to_owned(),
            offset.to_string(),
            len.to_string(),
        ]);
    }
    table(&rows, &[1, 2])
}

fn bytes(len: u64) -> String {
    HumanBytes(len).to_string()
}

/// Rows under each other: numbers to the right, the columns `left` to the left.
fn table(rows: &[Vec<String>], left: &[usize]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if left.contains(&column) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}
