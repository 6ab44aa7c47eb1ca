//! `lazuli why`: flags in, a few lines or JSON out.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use indicatif::{HumanBytes, HumanCount};

use crate::{
    output::shown,
    status::{NodeStatus, Read, node_status},
    status_command::arrived,
    why::{
        Figures, Subject, Wait, Why, explain, lazy_layers, node_waits,
        records::{Records, records},
    },
};

/// Waits that are shown as lines; `--json` has all that there are.
const SHOWN_MAX: usize = 10;

/// The words of `lazuli why`.
#[derive(Debug, Args)]
pub(crate) struct WhyArguments {
    /// The image as `lazuli status` shows it; or a container of containerd: its ID, what begins it, or its name
    #[arg(value_name = "IMAGE|CONTAINER")]
    wanted: String,
    /// containerd's socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd's namespace; without it the name is looked for in all of them
    #[arg(long, short)]
    namespace: Option<String>,
    /// The directory that lazuli-snapshotter was given as its root
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lazuli")]
    root: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Asks both daemons and prints.
pub(crate) async fn run(arguments: WhyArguments) -> Result<(), String> {
    let status = node_status(&arguments.root).await.map_err(|error| error.to_string())?;
    let subject = find(&arguments, &status).await?;
    let layers = lazy_layers(&subject, &status);
    let waits = node_waits(&arguments.root, layers).await.map_err(|error| error.to_string())?;
    let why = explain(&subject, &status, &waits)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&why).expect("an answer has text keys only"));
    } else {
        print!("{}", describe(&why));
    }
    Ok(())
}

/// The image that is meant.
async fn find(arguments: &WhyArguments, status: &NodeStatus) -> Result<Subject, String> {
    let WhyArguments { wanted, address, namespace, .. } = arguments;
    let is_image = status.images.iter().any(|image| image.image == *wanted)
        || status.chains.iter().any(|chain| chain.image == *wanted)
        || status.not_lazy.iter().any(|known| known.image == *wanted);
    let Records { container, layers, has_image } = match records(address, namespace.as_deref(), wanted, is_image).await
    {
        Ok(records) => records,
        // The rest is known without it.
        Err(error) if is_image => {
            eprintln!("warning: layers that are not lazy are not shown: {}", shown(&error.to_string()));
            Records { container: None, layers: None, has_image: true }
        }
        Err(error) => return Err(format!("{wanted}: {error}")),
    };
    if container.is_none() && !has_image && !is_image {
        let place =
            namespace.as_ref().map_or("in any namespace of".to_owned(), |name| format!("in namespace {name} of"));
        return Err(format!(
            "{wanted}: no image and no container is called so {place} the containerd at {}; `lazuli status` lists the \
             lazily pulled images",
            address.display()
        ));
    }
    let image = container.as_ref().map_or(wanted, |container| &container.image).clone();
    Ok(Subject { image, container, layers })
}

fn describe(why: &Why) -> String {
    let container =
        why.container.iter().map(|container| format!(", container {}", shown(container))).collect::<String>();
    let mut text = format!("{}{container}\n", shown(&why.image));
    let lazy = if why.is_lazy { "lazy" } else { "not lazy" };
    let truth = match why.is_verified {
        None => String::new(),
        Some(is_verified) => {
            let truth = if is_verified { "verified" } else { "not verified" };
            let mounted = why.mode.map_or("not mounted".to_owned(), |mode| format!("mounted by {mode}"));
            format!(", {}, {truth}, {mounted}", arrived(why.is_complete, &why.sums))
        }
    };
    text += &format!("  {lazy}{truth}\n");
    let reason = why.reason.as_ref().filter(|reason| !why.obstacles.contains(reason));
    text += &reason.iter().map(|reason| format!("  {}\n", shown(reason))).collect::<String>();
    text += &why.obstacles.iter().map(|obstacle| format!("  not lazy: {}\n", shown(obstacle))).collect::<String>();
    if why.is_lazy {
        text += &waited_lines(why);
    }
    for Read { path, waiting_ms, reason } in &why.reads {
        text += &format!("  waited for now: {} for {}: {}\n", shown(path), time(*waiting_ms), shown(reason));
    }
    text += &wait_table(&why.waits);
    text += &why.suggestions.iter().map(|suggestion| format!("  {}\n", shown(suggestion))).collect::<String>();
    text
}

fn waited_lines(why: &Why) -> String {
    let Figures { wait_count, waited_ms, blocked_ms, demanded_bytes, hot_bytes } = why.figures;
    // Time in which several layers blocked readers counts in each.
    let blocked_layers = why.layers.iter().filter_map(|layer| layer.figures).filter(|of| of.blocked_ms > 0).count();
    let at_most = if blocked_layers > 1 { "at most " } else { "" };
    let waited = match wait_count {
        0 => "no reader has waited since lazuli-fused started".to_owned(),
        1 => format!("readers waited once, {}", time(waited_ms)),
        _ => format!(
            "readers waited {} times, {} in all, at least one of them during {at_most}{}",
            HumanCount(wait_count),
            time(waited_ms),
            time(blocked_ms)
        ),
    };
    let pull = match (why.bytes_per_second, why.full_pull_ms) {
        (Some(rate), Some(pull)) => format!(
            "a full pull of {} at {}/s would have taken {} before the start, and unpacking it",
            HumanBytes(why.sums.compressed_len),
            HumanBytes(rate),
            time(pull)
        ),
        _ => format!(
            "a full pull would have fetched {} before the start; no request was long enough to tell how fast",
            HumanBytes(why.sums.compressed_len)
        ),
    };
    format!(
        "  {waited}\n  asked for {} that no profile expected, beside {} of hot pack\n  {pull}\n",
        HumanBytes(demanded_bytes),
        HumanBytes(hot_bytes)
    )
}

/// The longest waits: path, how long, and for what.
fn wait_table(waits: &[Wait]) -> String {
    let longest = waits.iter().take(SHOWN_MAX);
    let rows: Vec<[String; 3]> =
        longest.map(|wait| [shown(&wait.path).into_owned(), time(wait.waited_ms), wait.cause.to_string()]).collect();
    let head = ["file", "waited", "for"].map(str::to_owned);
    let rows: Vec<[String; 3]> = if rows.is_empty() { rows } else { [head].into_iter().chain(rows).collect() };
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (path_width, time_width) = (width(0), width(1));
    let line =
        |[path, waited, cause]: &[String; 3]| format!("    {path:path_width$}  {waited:>time_width$}  {cause}\n");
    rows.iter().map(line).collect()
}

fn time(ms: u64) -> String {
    let time = Duration::from_millis(ms);
    if ms < 1000 { format!("{ms} ms") } else { format!("{:.1} s", time.as_secs_f64()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::why::tests::{layer_waits, partly_lazy};

    #[test]
    fn the_answer_is_a_few_lines() {
        let (subject, status) = partly_lazy();
        let why = explain(&subject, &status, &[layer_waits("lazy", 12)]).unwrap();
        let expected = "\
host/app:1, container web-1
  lazy, 1 of 2 frames, not verified, not mounted
  1 of 1 layers have not arrived: they come when they are read, or in the background
  not lazy: 1 of 2 layers is not converted, and downloaded before the start: 3.00 MiB (HEX)
  readers waited 12 times, 1.3 s in all, at least one of them during 900 ms
  asked for 20.00 MiB that no profile expected, beside 10.00 MiB of hot pack
  a full pull of 33.00 MiB at 11.00 MiB/s would have taken 3.0 s before the start, and unpacking it
    file           waited  for
    /usr/lib/long   1.1 s  a frame that this read asked for
    /bin/a          40 ms  the hot pack, on its way
  record what a start reads: `lazuli profile record -o FILE host/app:1`, then `lazuli convert --profile FILE` (docs/PROFILE.md)
  convert the layers that are not lazy: `lazuli convert host/app:1`
";
        let ordinary = &subject.layers.as_ref().unwrap()[1];
        assert_eq!(describe(&why), expected.replace("HEX", &ordinary.digest.hex()[..12]));
    }

    #[test]
    fn no_name_of_a_tenant_reaches_the_terminal_or_forges_a_line() {
        const FORGED: &str = "x\u{1b}[2J\n  lazy, complete, verified";
        let (subject, status) = partly_lazy();
        let mut why = explain(&subject, &status, &[layer_waits("lazy", 12)]).unwrap();
        let line_count = describe(&why).lines().count();
        let forged = || FORGED.to_owned();
        (why.image, why.container, why.reason) = (forged(), Some(forged()), Some(format!("reason {FORGED}")));
        why.obstacles = vec![forged()];
        why.waits[0].path = forged();
        why.suggestions[0] = forged();
        why.reads = vec![Read { path: forged(), waiting_ms: 1, reason: forged() }];
        let text = describe(&why);
        assert_eq!(text.lines().count(), line_count + 1, "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains("\n  lazy, complete"), "{text}");
    }

    #[test]
    fn a_start_that_nobody_waited_in_says_so() {
        let (subject, status) = partly_lazy();
        let text = describe(&explain(&subject, &status, &[]).unwrap());
        assert!(text.contains("no reader has waited since lazuli-fused started"), "{text}");
        assert!(
            text.contains("no request was long enough to tell how fast") && !text.contains("profile record"),
            "{text}"
        );
    }
}
