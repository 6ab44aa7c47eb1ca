//! `make bench-starts`: cold starts of real images in several ways, in one run: a full pull, a hot pack that was derived,
//! one that was recorded. Samples in turns that shift, so that a machine that warms up favours nobody; medians.
//!
//! `bench starts [SAMPLES] IMAGE...`, with images of `tests/images`. *Ready* is the first line that the container
//! prints.

use std::{collections::BTreeMap, fs, time::Duration};

use lazuli_tests::{
    Containerd, ContainerdOptions, Node, Result, Scratch, TestRegistry,
    containerd::{LAZULI, OVERLAYFS},
    process::run,
    programs::lazuli_ok,
    real_images::real_image,
    start::{Measured, Start},
};

/// Samples of each way unless said.
const SAMPLES: usize = 5;
/// Full pull; converted with what is derived; converted with what was recorded.
const WAYS: [&str; 3] = ["full", "derived", "recorded"];

/// Prints a row for each image and way.
pub(crate) fn bench(mut arguments: Vec<String>) -> Result<()> {
    let samples = arguments.first().and_then(|first| first.parse().ok());
    if samples.is_some() {
        arguments.remove(0);
    }
    if arguments.is_empty() {
        return Err(crate::usage());
    }
    let scratch = crate::scratch("starts")?;
    let registry = TestRegistry::start(&scratch)?;
    println!("{:<10}{:<10}{:>8}{:>8}{:>8}{:>8}{:>12}", "", "", "pull s", "ready s", "min", "max", "moved MB");
    for image in arguments {
        prepare(&registry, &scratch, &image)?;
        let mut measured: BTreeMap<&str, Vec<Measured>> = BTreeMap::new();
        for sample in 0..samples.unwrap_or(SAMPLES) {
            for turn in 0..WAYS.len() {
                let way = WAYS[(sample + turn) % WAYS.len()];
                measured.entry(way).or_default().push(start(&registry, &scratch, &image, way)?);
            }
        }
        WAYS.iter().for_each(|way| print_row(&image, way, &measured[way]));
    }
    Ok(())
}

/// Brings the image in all its forms into the registry.
fn prepare(registry: &TestRegistry, scratch: &Scratch, image: &str) -> Result<()> {
    registry.push(&real_image(image)?, &format!("{image}:full"))?;
    let named = |way: &str| registry.reference(&format!("{image}:{way}"));
    lazuli_ok(["convert", "--no-cache", &named("full"), &named("derived")])?;
    let profile = scratch.directory("profiles")?.join(image).display().to_string();
    lazuli_ok(["profile", "record", "--ready-line", "", "-o", &profile, &named("derived")])?;
    lazuli_ok(["convert", "--no-cache", "--profile", &profile, &named("full"), &named("recorded")]).map(drop)
}

fn start(registry: &TestRegistry, scratch: &Scratch, image: &str, way: &str) -> Result<Measured> {
    let directory = scratch.directory("node")?;
    let own = Scratch::at(&directory, "node")?;
    let reference = registry.reference(&format!("{image}:{way}"));
    let measured = if way == "full" {
        let containerd = Containerd::start(&own, &ContainerdOptions::default())?;
        let start = Start { registry, containerd: &containerd, reference: &reference, snapshotter: OVERLAYFS };
        start.measure(&own, || containerd.pull(&reference, OVERLAYFS))?
    } else {
        let node = Node::start_with(&[], &own)?;
        let start = Start { registry, containerd: &node.containerd, reference: &reference, snapshotter: LAZULI };
        start.measure(&own, || run(&mut node.lazuli_pull_command(&reference)?).map(drop))?
    };
    drop(own);
    _ = fs::remove_dir_all(&directory);
    Ok(measured)
}

fn print_row(image: &str, way: &str, samples: &[Measured]) {
    let median = |value: &dyn Fn(&Measured) -> f64| {
        let mut values: Vec<_> = samples.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    let seconds = |duration: Duration| duration.as_secs_f64();
    let pull = median(&|sample| seconds(sample.pull)).0;
    let (ready, min, max) = median(&|sample| seconds(sample.pull + sample.start));
    let moved = median(&|sample| sample.moved as f64 / 1e6).0;
    println!("{image:<10}{way:<10}{pull:>8.2}{ready:>8.2}{min:>8.2}{max:>8.2}{moved:>12.1}");
}
