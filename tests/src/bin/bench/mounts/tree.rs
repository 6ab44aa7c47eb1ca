//! How long `lazuli-fused` takes to mount a tree of 100,000 files, in kernel and in portable mode.
//!
//! Milliseconds from request to answer: *cold*, with the layers' indexes on the node and nothing else; *second*, in a
//! new daemon that finds what the first one made; *again*, in the same daemon.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Instant,
};

use format_spec::LazyLayer;
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Result, Scratch, Service, TarLayer, TestRegistry,
    error::Context as _,
    process::{command, run, wait_for},
    programs::{MODES, lazuli_ok, program},
    tar_layer::Attributes,
};
use serde_json::{Value, json};

use crate::figures::{median, milliseconds};

const LAYER_COUNT: usize = 5;
/// Files of each layer.
const FILE_COUNT: usize = 20_000;
const ROUNDS: usize = 5;

pub(super) fn bench(scratch: &Scratch) -> Result<()> {
    let registry = TestRegistry::start(scratch)?;
    let lazy = registry.reference("many:lazy");
    lazuli_ok(["convert", &image()?.write(scratch, "many")?, &lazy])?;
    let layers = remote_layers(&registry, &lazy)?;
    println!("mount of {} files, {LAYER_COUNT} layers     cold   second    again", LAYER_COUNT * FILE_COUNT);
    for mode in MODES {
        let rounds = (0..ROUNDS).map(|_| measure(scratch, mode, &layers)).collect::<Result<Vec<_>>>()?;
        let middle = |figure: usize| median(rounds.iter().map(|figures| figures[figure]));
        println!("{mode:32}{:6.0} ms{:6.0} ms{:6.0} ms", middle(0), middle(1), middle(2));
    }
    Ok(())
}

fn image() -> Result<ImageBuilder> {
    let mut image = ImageBuilder::new();
    for layer in 0..LAYER_COUNT {
        let files = (0..FILE_COUNT).fold(TarLayer::new(), |files, file| {
            // Directories of 50 files, many of which several layers share.
            let path = format!("lib/package-{}/module_{}/source_{layer}_{file}.py", file / 1000, file / 50);
            let time = (1_700_000_000 + file as u64 % 7, 0);
            let content = format!("name = {}\n", layer * FILE_COUNT + file).repeat(20);
            files.file_with(&path, &Attributes { time, ..Attributes::of_mode(0o644) }, content)
        });
        image = image.layer(files.finish()?, Compression::None);
    }
    Ok(image)
}

/// The layers that a snapshotter learns from the annotations of the manifest.
fn remote_layers(registry: &TestRegistry, image: &str) -> Result<Vec<Value>> {
    let manifest = registry.manifest("many:lazy")?;
    let layers = manifest["layers"].as_array().into_iter().flatten().map(|layer| {
        let found = LazyLayer::from_annotations(|key| layer["annotations"][key].as_str()).ok().flatten();
        let found = found.ok_or_else(|| HarnessError::Unexpected(format!("not a lazy layer: {layer}")))?;
        Ok(json!({ "layer": found, "image": image }))
    });
    layers.collect()
}

/// Cold, second and again.
fn measure(scratch: &Scratch, mode: &str, layers: &[Value]) -> Result<[f64; 3]> {
    let own = Scratch::at(&scratch.join("node"), "bench-mounts-node")?;
    let request = json!({ "request": "mount_tree", "layers": layers });
    let fused = Fused::start(&own, mode)?;
    for layer in layers {
        fused.ask(&json!({ "request": "announce_layer", "layer": layer }))?;
    }
    wait_for("the indexes did not arrive", || {
        let status = fused.ask(&json!({ "request": "status" }))?.1;
        Ok(status["layers"].as_array().filter(|known| known.len() == LAYER_COUNT).map(drop))
    })?;
    let (cold, answer) = fused.ask(&request)?;
    let path = answer["path"].as_str().unwrap_or_default();
    let count = run(&mut command("sh", ["-ec", "find \"$1\" -type f | wc -l", "sh", path]))?;
    if count.trim() != (LAYER_COUNT * FILE_COUNT).to_string() {
        return Err(HarnessError::Unexpected(format!("{} files in {answer}", count.trim())));
    }
    let (again, _) = fused.ask(&request)?;
    fused.stop()?;
    let fused = Fused::start(&own, mode)?;
    let (second, _) = fused.ask(&request)?;
    fused.stop()?;
    Ok([cold, second, again])
}

/// A daemon of its own.
struct Fused {
    socket: PathBuf,
    service: Service,
}

impl Fused {
    fn start(scratch: &Scratch, mode: &str) -> Result<Self> {
        let socket = scratch.join("fused.sock");
        let mut fused = command(program("lazuli-fused")?, ["--mode", mode, "--root"]);
        fused.arg(scratch.path()).arg("--address").arg(&socket);
        let log = scratch.log("fused");
        // An earlier one was ready too.
        fs::write(&log, "").at("emptying", &log)?;
        let is_ready = || fs::read_to_string(&log).is_ok_and(|printed| printed.contains("ready"));
        let service = Service::start("lazuli-fused", &mut fused, &log, is_ready)?;
        Ok(Self { socket, service })
    }

    /// Milliseconds to the answer, and the answer.
    fn ask(&self, request: &Value) -> Result<(f64, Value)> {
        let clock = Instant::now();
        let mut connection = UnixStream::connect(&self.socket).at("connecting to", &self.socket)?;
        connection.write_all(format!("{request}\n").as_bytes()).at("asking", &self.socket)?;
        let mut line = String::new();
        BufReader::new(connection).read_line(&mut line).at("reading from", &self.socket)?;
        let answer: Value = serde_json::from_str(&line).map_err(std::io::Error::from).context("parsing an answer")?;
        let took = milliseconds(clock.elapsed());
        match answer["response"].as_str() {
            None | Some("error") => Err(HarnessError::Unexpected(format!("{request}: {line}"))),
            Some(_) => Ok((took, answer)),
        }
    }

    fn stop(mut self) -> Result<()> {
        self.service.stop();
        match self.service.exit_status()? {
            Some(status) if status.success() => Ok(()),
            status => Err(HarnessError::Unexpected(format!("lazuli-fused ended with {status:?}"))),
        }
    }
}
