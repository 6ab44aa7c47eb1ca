//! The log of a daemon: what is logged can neither end a thread nor hold one up, and is bounded.
//!
//! Lines go into a short queue, and a thread of its own writes them out: a full disk, a closed pipe or a reader that
//! has stopped reading costs lines, never the thread that logs. Lines that are lost are counted, and the number stands
//! in the log as soon as it can be written again. Lines that a container can cause again and again are written a few
//! times a minute (`repeats.rs`), and a file is cut (`output.rs`).

mod output;
mod repeats;

use std::{
    hash::{BuildHasher, RandomState},
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing::{Level, Metadata, callsite::Identifier, error};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use self::{
    output::Output,
    repeats::{Admission, Repeats},
};

/// Where log lines of our programs come from; a filter may name these, modules in them, and a few libraries.
const TARGETS: [&str; 18] = [
    "control",
    "converter",
    "format_spec",
    "fusefs",
    "lazuli",
    "lazuli_fused",
    "lazuli_snapshotter",
    "registry",
    "snapshotter",
    "storage",
    "tar_index",
    "tree",
    "fuser",
    "h2",
    "hyper",
    "reqwest",
    "rustls",
    "tonic",
];
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Reads what is to be logged: a level, or directives as `fusefs=debug,storage=info`.
///
/// # Errors
///
/// One line, for a word that is no level and for a place that logs nothing: taken as they are, both would silence
/// everything.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        let (target, level) = directive.split_once('=').unwrap_or(("", directive));
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(format!("log filter {text:?}: {level:?} is no level: give {}", LEVELS.join(", ")));
        }
        let program = target.split("::").next().unwrap_or(target);
        if !target.is_empty() && !TARGETS.contains(&program) {
            return Err(format!(
                "log filter {text:?}: nothing logs as {program:?}: give one of {}",
                TARGETS.join(", ")
            ));
        }
    }
    EnvFilter::try_new(text).map_err(|error| format!("log filter {text:?}: {error}"))
}

/// Bytes that wait for the writing thread at most; a burst of some thousand lines.
const QUEUE_LEN_MAX: usize = 256 << 10;
/// Longest line; what follows is cut off.
const LINE_LEN_MAX: usize = 16 << 10;
/// How long the end of the process waits for the last lines.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);
/// Within this time the limits below hold.
const WINDOW: Duration = Duration::from_secs(60);
/// Equal lines in a window: a program that repeats a failing read logs as many, whatever its speed.
const EQUAL_LINES_MAX: u32 = 10;
/// Lines of one place in the code in a window, equal or not: more than a node with 500 images logs at its start.
const LINES_OF_PLACE_MAX: u32 = 2000;

/// Where a log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard error, whatever that is.
    StandardError,
    /// A file of bounded length, which becomes standard error too. Of what was in it before, the newer part stays
    /// beside it, with `.1` behind its name.
    File(PathBuf),
}

/// The log of this process. Dropping it waits for the last lines, for a second at most.
#[derive(Debug)]
pub struct Log(Arc<Queue>);

impl Log {
    /// Begins to log what `filter` lets pass; panics are logged too. To be called once, in `main`.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, or there is no thread to be had.
    pub fn start(filter: EnvFilter, target: LogTarget, with_color: bool) -> io::Result<Self> {
        let log = Self::new(Output::open(target)?)?;
        let writer = QueueWriter { queue: log.0.clone(), place: None };
        let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(with_color);
        // A failure to format a line would be told to standard error by a function that panics when it cannot.
        subscriber.with_writer(writer).log_internal_errors(false).init();
        // The standard hook writes to standard error, and waits for its reader.
        std::panic::set_hook(Box::new(|panic| error!("panic: {panic}")));
        Ok(log)
    }

    fn new(output: Output) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let written = queue.clone();
        thread::Builder::new().name("lazuli-log".to_owned()).spawn(move || written.write_out(output))?;
        Ok(Self(queue))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// Lines that wait to be written.
#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    /// Something came, or everything is written.
    changed: Condvar,
    hash: RandomState,
}

#[derive(Debug)]
struct State {
    lines: Vec<u8>,
    line_count: u64,
    /// Lines that are in no log since the last one that is.
    lost_count: u64,
    is_writing: bool,
    equal_lines: Repeats<u64>,
    lines_of_place: Repeats<Identifier>,
}

impl Default for Queue {
    fn default() -> Self {
        let state = State {
            lines: Vec::new(),
            line_count: 0,
            lost_count: 0,
            is_writing: false,
            equal_lines: Repeats::new(EQUAL_LINES_MAX, WINDOW),
            lines_of_place: Repeats::new(LINES_OF_PLACE_MAX, WINDOW),
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), hash: RandomState::new() }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A log is worth more than the reason why somebody panicked in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line if there is room; those with a `place` count against the limits.
    fn push(&self, line: &[u8], place: Option<&Identifier>, now: Instant) {
        let mut state = self.lock();
        let State { equal_lines, lines_of_place, .. } = &mut *state;
        let note = match place {
            None => Some(String::new()),
            Some(place) => {
                let equal = equal_lines.admit(self.hash.hash_one(without_time(line)), now);
                let of_place = lines_of_place.admit(place.clone(), now);
                note_of(&equal, "equal to this one")
                    .and_then(|one| note_of(&of_place, "of this place").map(|other| one + &other))
            }
        };
        let Some(note) = note else { return };
        let (line, end) = match line.strip_suffix(b"\n").unwrap_or(line) {
            line if line.len() > LINE_LEN_MAX => (&line[..LINE_LEN_MAX], "...\n"),
            line => (line, "\n"),
        };
        if state.lines.len() + line.len() + note.len() + end.len() > QUEUE_LEN_MAX {
            state.lost_count += 1;
            return;
        }
        for part in [line, note.as_bytes(), end.as_bytes()] {
            state.lines.extend_from_slice(part);
        }
        state.line_count += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// Writes lines as they come, for ever.
    fn write_out(&self, mut output: Output) {
        let mut lines = Vec::new();
        loop {
            let mut state = self.lock();
            while state.lines.is_empty() {
                state.is_writing = false;
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.is_writing = true;
            lines.clear();
            std::mem::swap(&mut lines, &mut state.lines);
            let line_count = std::mem::take(&mut state.line_count);
            let lost_count = std::mem::take(&mut state.lost_count);
            drop(state);
            // Lines are lost when the queue is full or the output fails, and so behind those that come here.
            let is_written = output.write(&lines).is_ok();
            let is_told = lost_count == 0 || is_written && output.write(lost_line(lost_count).as_bytes()).is_ok();
            let newly_lost = if is_written { 0 } else { line_count } + if is_told { 0 } else { lost_count };
            self.lock().lost_count += newly_lost;
        }
    }

    /// Waits until everything is written, but not for long.
    fn flush(&self) {
        let give_up_at = Instant::now() + FLUSH_PATIENCE;
        let mut state = self.lock();
        while !state.lines.is_empty() || state.is_writing {
            let Some(left) = give_up_at.checked_duration_since(Instant::now()) else { return };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn lost_line(count: u64) -> String {
    format!("{count} lines of the log are lost: it could not be written\n")
}

/// The note behind a line; `None` if it is left out.
fn note_of(admission: &Admission, which: &str) -> Option<String> {
    match admission {
        Admission::Write { left_out: 0 } => Some(String::new()),
        Admission::Write { left_out } => Some(format!(" [{left_out} lines {which} were left out]")),
        Admission::WriteAsLast => Some(format!(" [further lines {which} are left out for a minute]")),
        Admission::LeaveOut => None,
    }
}

/// A line without its first word, which is the time.
fn without_time(line: &[u8]) -> &[u8] {
    line.iter().position(|byte| *byte == b' ').map_or(line, |at| &line[at..])
}

/// Writes one line; never fails.
#[derive(Debug, Clone)]
struct QueueWriter {
    queue: Arc<Queue>,
    /// Where the line comes from, if that may log so many only.
    place: Option<Identifier>,
}

impl<'a> MakeWriter<'a> for QueueWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self {
        // Whoever asks for every request gets every request.
        let place = (*metadata.level() <= Level::INFO).then(|| metadata.callsite());
        Self { queue: self.queue.clone(), place }
    }
}

impl io::Write for QueueWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line, self.place.as_ref(), Instant::now());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
