//! `make demo`: a real image, run after a full pull and run with Lazuli, both cold, side by side.
//!
//! Everything runs privately below `target/demo`: a registry, two containerds with empty state, the
//! Lazuli snapshotter. `IMAGE=host/repository:tag` takes another image than the Python one made here.
//! *Ready* is the first line that the container prints, or its end if it prints none.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Containerd, ContainerdOptions, Node, Result, Scratch, TestRegistry,
    containerd::{LAZULI, OVERLAYFS},
    process::{command, run},
    programs::lazuli_ok,
    real_images::real_image,
    start::{Measured, Start},
};

fn main() -> ExitCode {
    match demonstrate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate() -> Result<()> {
    let scratch = Scratch::in_target("demo")?;
    scratch.clear_when_interrupted();
    let registry = TestRegistry::start(&scratch)?;

    let original = registry.reference("demo:original");
    let name = provide_image(&registry, &original)?;
    say("converting it, registry to registry");
    let lazy = registry.reference("demo:lazy");
    let clock = Instant::now();
    lazuli_ok(["convert", &original, &lazy])?;
    let conversion = clock.elapsed();
    let sizes = [layer_bytes(&registry, "demo:original")?, layer_bytes(&registry, "demo:lazy")?];
    say(&format!(
        "{name}: {} layers, {} gzip, {} converted in {:.1} s; image ID unchanged: {}",
        sizes[0].0,
        megabytes(sizes[0].1),
        megabytes(sizes[1].1),
        conversion.as_secs_f64(),
        if registry.config("demo:original")? == registry.config("demo:lazy")? { "yes" } else { "NO" },
    ));

    say("full pull, then run with overlayfs");
    let full = {
        let scratch = Scratch::at(&scratch.join("full"), "demo-full")?;
        let containerd = Containerd::start(&scratch, &ContainerdOptions::default())?;
        let start = Start {
            registry: &registry,
            containerd: &containerd,
            reference: &original,
            snapshotter: OVERLAYFS,
            command: &[],
            before: None,
            lazuli_root: None,
        };
        start.measure(&scratch, |reference| containerd.pull(reference, OVERLAYFS))?
    };
    say("lazy pull, then run with Lazuli");
    let lazily = {
        let scratch = Scratch::at(&scratch.join("lazy"), "demo-lazy")?;
        // As it is without configuration.
        let node = Node::start_with(&[], &scratch)?;
        let start = Start {
            registry: &registry,
            containerd: &node.containerd,
            reference: &lazy,
            snapshotter: LAZULI,
            command: &[],
            before: None,
            lazuli_root: None,
        };
        start.measure(&scratch, |reference| run(&mut node.lazuli_pull_command(reference)?).map(drop))?
    };
    print_table(&full, &lazily);
    Ok(())
}

/// Brings the image into the registry; returns what to call it.
fn provide_image(registry: &TestRegistry, reference: &str) -> Result<String> {
    let wanted = std::env::var("IMAGE").unwrap_or_default();
    if wanted.is_empty() {
        say("making an image: Debian, Python with numpy, pandas, scipy, scikit-learn, an application");
        registry.push(&real_image("python")?, "demo:original")?;
        return Ok("python".to_owned());
    }
    say(&format!("copying {wanted}"));
    let is_loopback = wanted.starts_with("127.") || wanted.starts_with("localhost:");
    let mut copy = command("skopeo", ["copy", "--quiet", "--dest-tls-verify=false"]);
    copy.arg(format!("--src-tls-verify={}", !is_loopback));
    run(copy.args([format!("docker://{wanted}"), format!("docker://{reference}")]))?;
    Ok(wanted)
}

/// Number of layers, and their length together.
fn layer_bytes(registry: &TestRegistry, name: &str) -> Result<(usize, u64)> {
    let layers = registry.manifest(name)?["layers"].as_array().cloned().unwrap_or_default();
    Ok((layers.len(), layers.iter().filter_map(|layer| layer["size"].as_u64()).sum()))
}

fn print_table(full: &Measured, lazy: &Measured) {
    let seconds = |duration: Duration| format!("{:.2} s", duration.as_secs_f64());
    let row = |what: &str, full: &str, lazy: &str| println!("{what:<34}{full:>18}{lazy:>18}");
    println!();
    row("", "full pull", "Lazuli");
    row("pull", &seconds(full.pull), &seconds(lazy.pull));
    row("run until ready", &seconds(full.start), &seconds(lazy.start));
    row("time to ready", &seconds(full.pull + full.start), &seconds(lazy.pull + lazy.start));
    row("bytes moved (registry's side)", &megabytes(full.moved), &megabytes(lazy.moved));
    row("bytes read (page cache, cold run)", &megabytes(full.read), &megabytes(lazy.read));
    println!();
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn say(what: &str) {
    println!("* {what}");
}
