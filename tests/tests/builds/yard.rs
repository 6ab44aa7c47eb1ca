//! Everything that all build machines share: the registry, the layout, and the record of what came of the conversions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    thread,
    time::{Duration, Instant},
};

use lazuli_tests::{
    Finished, HarnessError, Result, Scratch, TestRegistry,
    error::Context as _,
    process::{command, run},
    programs::program,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{dice::Dice, images::Source};

/// Repositories that all machines publish to.
pub(crate) const REPOSITORIES: [&str; 3] = ["team-a", "team-b", "team-c"];
/// How long any conversion may take on a machine that has much to do.
const WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(5);

/// Where an image is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Repository(&'static str),
    Layout,
}

impl Place {
    pub(crate) const ALL: [Self; 4] = [
        Self::Repository(REPOSITORIES[0]),
        Self::Repository(REPOSITORIES[1]),
        Self::Repository(REPOSITORIES[2]),
        Self::Layout,
    ];
}

/// The results of the conversions.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Conversions that ended well, by kind.
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// Manifests that were published: digest and original, and the repositories.
    pub(crate) published: BTreeMap<(String, String), BTreeSet<&'static str>>,
    /// Results that must not be.
    pub(crate) failures: Vec<String>,
}

impl Record {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

/// Everything shared.
#[derive(Debug)]
pub(crate) struct Yard<'a> {
    pub(crate) scratch: &'a Scratch,
    pub(crate) registry: &'a TestRegistry,
    pub(crate) honest: Vec<Source>,
    pub(crate) hostile: Vec<Source>,
    pub(crate) record: Mutex<Record>,
    /// Held by everybody who writes to the layout; alone by a power cut, in the middle of which nobody converts.
    pub(crate) power: RwLock<()>,
}

impl Yard<'_> {
    /// Held while somebody converts to `place`.
    fn power_for(&self, place: Place) -> Option<RwLockReadGuard<'_, ()>> {
        (place == Place::Layout).then(|| self.power.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layout that all machines write to.
    pub(crate) fn layout(&self) -> PathBuf {
        self.scratch.join("shared")
    }

    fn destination(&self, place: Place, tag: &str) -> String {
        match place {
            Place::Repository(repository) => self.registry.reference(&format!("{repository}:{tag}")),
            Place::Layout => format!("oci:{}:{tag}", self.layout().display()),
        }
    }

    /// Has a machine convert an image that must come out; `more` are further arguments.
    pub(crate) fn convert(
        &self,
        machine: &Machine,
        source: &Source,
        from: &str,
        place: Place,
        more: &[&str],
    ) -> Result<()> {
        let _power = self.power_for(place);
        let finished = machine.start(from, &self.destination(place, &source.name), more)?.finish(None)?;
        self.note(source, place, &finished, "honest");
        Ok(())
    }

    /// The same, with a signal when it has run for `after`.
    pub(crate) fn interrupt(
        &self,
        machine: &Machine,
        source: &Source,
        place: Place,
        after: Duration,
        signal: Signal,
    ) -> Result<()> {
        let _power = self.power_for(place);
        let running = machine.start(&source.places[0], &self.destination(place, &source.name), &[])?;
        let finished = running.finish(Some((after, signal)))?;
        match finished.code {
            Some(0) => self.note(source, place, &finished, "honest"),
            // By SIGKILL, or by another signal in its first moment.
            None => self.record().count("killed"),
            // A thread that finds its runtime gone panics.
            Some(1) if finished.stderr.ends_with("lazuli: interrupted\n") && !finished.stderr.contains("panicked") => {
                self.record().count("interrupted");
            }
            _ => self.record().failures.push(format!("{} after {signal:?}: {finished:?}", source.name)),
        }
        Ok(())
    }

    /// Has a machine convert a hostile image.
    pub(crate) fn convert_hostile(&self, machine: &Machine, source: &Source, place: Place) -> Result<()> {
        let from = &source.places[0];
        let _power = self.power_for(place);
        let finished = machine.start(from, &self.destination(place, &source.name), &[])?.finish(None)?;
        match finished.code {
            Some(1) if source.is_refused || source.pushed.is_none() => self.record().count("hostile, refused"),
            Some(0) if !source.is_refused => self.note(source, place, &finished, "hostile, converted"),
            _ => self.record().failures.push(format!("hostile {from}: {finished:?}")),
        }
        Ok(())
    }

    /// Takes down what a conversion that should have published something has said.
    fn note(&self, source: &Source, place: Place, finished: &Finished, what: &'static str) {
        let report: Value = serde_json::from_str(&finished.stdout).unwrap_or_default();
        let mut record = self.record();
        let Some(digest) = report["digest"].as_str().filter(|_| finished.code == Some(0)) else {
            return record.failures.push(format!("{}: {finished:?}", source.name));
        };
        record.count(what);
        let layers = report["images"][0]["layers"].as_array().into_iter().flatten();
        for _ in layers.filter(|layer| layer["is_cached"] == true) {
            record.count("layers from a cache");
        }
        if let (Place::Repository(repository), Some(original)) = (place, &source.pushed) {
            record.published.entry((digest.to_owned(), original.clone())).or_default().insert(repository);
        }
    }

    /// Does by hand what no conversion may rely on; returns what.
    pub(crate) fn attack(&self, machines: &[Machine], dice: &mut Dice) -> Result<&'static str> {
        let evil = &self.hostile[0];
        match dice.below(3) {
            0 => {
                // Whoever may push puts another image at the tag of an honest one, and what it says is learned.
                let tag = &self.honest[dice.below(self.honest.len())].name;
                let repository = REPOSITORIES[dice.below(REPOSITORIES.len())];
                let to = format!("docker://{}", self.destination(Place::Repository(repository), tag));
                let copy = ["copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"];
                let copy = || run(command("skopeo", copy).arg(format!("docker://{}", evil.places[0])).arg(&to));
                // docker-registry 2.8 misses a blob while somebody else links it to the same repository.
                let missed = |error: &HarnessError| error.to_string().contains("blob unknown to registry");
                let mut copied = copy();
                for _ in 0..3 {
                    if !copied.as_ref().is_err_and(missed) {
                        break;
                    }
                    copied = copy();
                }
                copied?;
                Ok("tags replaced")
            }
            1 => {
                let directory = machines[dice.below(machines.len())].entries();
                let other = machines[dice.below(machines.len())].entries();
                spoil_entry(&directory, &other, dice)?;
                Ok("entries of a cache spoilt")
            }
            _ => {
                let _power = self.power.write().unwrap_or_else(PoisonError::into_inner);
                let blobs = files(&self.layout().join("blobs/sha256"));
                if let Some(blob) = dice.choose(&blobs) {
                    // As a power cut leaves it.
                    let len = fs::metadata(blob).at("looking at", blob)?.len();
                    let file = File::options().write(true).open(blob).at("opening", blob)?;
                    file.write_all_at(&[0; 16], len.saturating_sub(16) / 2).at("writing", blob)?;
                }
                Ok("blobs of the layout damaged")
            }
        }
    }
}

/// Changes a digit of an entry, or puts one of another machine in its place.
fn spoil_entry(directory: &Path, other: &Path, dice: &mut Dice) -> Result<()> {
    let is_entry = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "json");
    let entries: Vec<_> = files(directory).iter().filter(is_entry).cloned().collect();
    let Some(entry) = dice.choose(&entries) else { return Ok(()) };
    let theirs = entry.file_name().map(|name| other.join(name)).and_then(|path| fs::read(path).ok());
    // It may be gone by now.
    let Ok(mut text) = fs::read(entry) else { return Ok(()) };
    match theirs.filter(|_| dice.below(2) == 0) {
        Some(theirs) => text = theirs,
        None => {
            let digits: Vec<_> = (0..text.len()).filter(|at| text[*at].is_ascii_digit()).collect();
            if let Some(at) = dice.choose(&digits) {
                text[*at] = if text[*at] == b'1' { b'2' } else { b'1' };
            }
        }
    }
    let mut file = File::create(entry).at("opening", entry)?;
    file.write_all(&text).at("writing", entry)
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// A build machine: a home, a cache and a place for temporary files of its own.
#[derive(Debug)]
pub(crate) struct Machine {
    home: PathBuf,
}

impl Machine {
    pub(crate) fn new(scratch: &Scratch, name: &str) -> Result<Self> {
        let home = scratch.directory(name)?;
        scratch.directory(home.join("tmp"))?;
        Ok(Self { home })
    }

    /// Where it keeps what it converted.
    fn entries(&self) -> PathBuf {
        self.home.join("cache/lazuli/conversions")
    }

    fn start(&self, from: &str, to: &str, more: &[&str]) -> Result<Running> {
        let mut convert = command(program("lazuli")?, ["convert", "--json", from, to]);
        convert.args(more).env("HOME", &self.home).env("XDG_CACHE_HOME", self.home.join("cache"));
        Running::start(convert.env("TMPDIR", self.home.join("tmp")))
    }
}

/// A conversion under way.
struct Running {
    child: Child,
    started: Instant,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self { child: command.spawn().context("starting lazuli")?, started: Instant::now() })
    }

    /// Waits for its end; sends a signal in between. Outputs are short, so pipes hold them.
    fn finish(mut self, mut interruption: Option<(Duration, Signal)>) -> Result<Finished> {
        while self.child.try_wait().context("waiting for lazuli")?.is_none() {
            if let Some((_, signal)) = interruption.take_if(|(after, _)| self.started.elapsed() >= *after) {
                // It has not been waited for, so the ID is its own.
                let _ = kill_process(Pid::from_child(&self.child), signal);
            }
            if self.started.elapsed() > WITHIN {
                self.child.kill().context("ending lazuli")?;
                return Err(HarnessError::Timeout { what: "lazuli did not end".to_owned(), seconds: WITHIN.as_secs() });
            }
            thread::sleep(POLL);
        }
        Ok(self.child.wait_with_output().context("waiting for lazuli")?.into())
    }
}
