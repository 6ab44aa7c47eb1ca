//! What is run: from the command of the image to programs, through scripts, shells and wrappers.
//!
//! A word of a command that names an executable file is taken for a program with the words behind it as
//! arguments. So `tini -- gosu app python3 main.py` needs no knowledge of tini and gosu.

use format_spec::records::hot_reason;

use super::{
    Search,
    elf::{ElfFile, Part},
    files::{Found, base_name, join},
    java,
    libraries::Loader,
    node, python, ruby, shell, system,
};

/// Programs inside programs: scripts, wrappers, shells.
const DEPTH_MAX: u32 = 8;
/// Most programs that are followed.
const PROGRAM_COUNT_MAX: u32 = 100;
/// First line of a script as far as Linux reads it (`BINPRM_BUF_SIZE`).
const SCRIPT_HEAD_LEN: usize = 256;
/// Longest file that is taken because it is an argument: configuration, not data.
const ARGUMENT_LEN_MAX: u64 = 1 << 20;

/// Something to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    /// Program and arguments.
    pub(super) argv: Vec<Vec<u8>>,
    /// Working directory, absolute.
    pub(super) directory: Vec<u8>,
    /// Why the program is hot.
    pub(super) reason: u32,
    /// Programs that led here.
    pub(super) depth: u32,
}

impl Command {
    /// Another command from within this one.
    pub(super) fn inner(&self, argv: Vec<Vec<u8>>, reason: u32) -> Self {
        Self { argv, directory: self.directory.clone(), reason, depth: self.depth + 1 }
    }

    pub(super) fn arguments(&self) -> &[Vec<u8>] {
        self.argv.get(1..).unwrap_or_default()
    }
}

/// A program that runs.
pub(super) struct Process {
    /// Path as it was looked up, absolute; symbolic links in it are not followed.
    pub(super) path: Vec<u8>,
    /// The file.
    pub(super) program: Found,
    /// Its loader, unless it is static.
    pub(super) loader: Option<Loader>,
}

impl Process {
    /// A shared object that the process opens becomes hot, with its libraries.
    pub(super) fn open_module(&mut self, search: &mut Search<'_>, found: &Found, reason: u32) {
        match &mut self.loader {
            Some(loader) => loader.load_module(search, found, reason),
            None => search.add_file(found, reason),
        }
    }
}

/// Follows the command of the image.
pub(super) fn start(search: &mut Search<'_>) {
    let argv = search.config.argv.clone();
    let directory = search.config.working_directory.clone();
    run(search, &Command { argv, directory, reason: hot_reason::COMMAND, depth: 0 });
}

/// Adds what running a command reads.
pub(super) fn run(search: &mut Search<'_>, command: &Command) {
    if command.depth > DEPTH_MAX || search.program_count >= PROGRAM_COUNT_MAX {
        return;
    }
    let Some((path, program)) = command.argv.first().and_then(|name| look_up(search, &command.directory, name)) else {
        return;
    };
    search.program_count += 1;
    let Some(head) = search.files.read_head(program.inode, SCRIPT_HEAD_LEN) else { return };
    if let Some(line) = head.strip_prefix(b"#!") {
        search.add_file(&program, command.reason);
        run_script(search, command, &path, line);
    } else if let Some(elf) = ElfFile::read(&mut search.files, program.inode) {
        run_elf(search, command, path, program, elf);
    }
}

/// Finds a program as `execvp(3)` does: by path, or by name along `PATH`.
fn look_up(search: &Search<'_>, directory: &[u8], name: &[u8]) -> Option<(Vec<u8>, Found)> {
    let candidate = |path: Vec<u8>| search.files.find_executable(&path).map(|found| (path, found));
    if name.contains(&b'/') {
        return candidate(join(directory, name));
    }
    let places = search.config.search_path().take_while(|_| !search.files.is_over());
    let mut found = places.map(|place| candidate(join(&join(directory, place), name)));
    found.find_map(|found| found)
}

/// Runs the interpreter of a script as Linux does: with at most one argument of its own, then the script.
fn run_script(search: &mut Search<'_>, command: &Command, path: &[u8], line: &[u8]) {
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let (interpreter, argument) = line.split_at(end);
    let argument = argument.trim_ascii();
    let mut argv = vec![interpreter.to_vec()];
    argv.extend((!argument.is_empty()).then(|| argument.to_vec()));
    argv.push(path.to_vec());
    argv.extend_from_slice(command.arguments());
    run(search, &command.inner(argv, hot_reason::INTERPRETER));
}

fn run_elf(search: &mut Search<'_>, command: &Command, path: Vec<u8>, program: Found, elf: ElfFile) {
    search.add_ranges(&program, elf.hot_ranges(Part::Program), command.reason);
    let mut loader = Loader::of(search, &elf);
    if let Some(loader) = &mut loader {
        loader.load(search, &program, elf.clone());
        system::add(search, loader, &elf);
    }
    let name = base_name(&program.path).to_vec();
    let asked_name = base_name(&path).to_vec();
    let mut process = Process { path, program, loader };
    // What a program does follows its own name, except for programs of many names such as busybox.
    if shell::is_shell(&name) || shell::is_shell(&asked_name) {
        shell::run(search, command);
    } else if name.starts_with(b"python") || name.starts_with(b"pypy") {
        python::run(search, &mut process, command);
    } else if name == b"node" || name == b"nodejs" {
        node::run(search, &mut process, command);
    } else if name == b"java" {
        java::run(search, &mut process, command);
    } else if name.starts_with(b"ruby") {
        ruby::run(search, &mut process, command);
    } else if asked_name == b"env" {
        run(search, &command.inner(env_command(command.arguments()), command.reason));
    } else {
        run_arguments(search, command, command.arguments());
    }
}

/// What `env` runs: behind its options and variables; `-S` splits its argument into words (`env(1)`).
fn env_command(arguments: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut rest = arguments.iter();
    let mut argv = Vec::new();
    for word in rest.by_ref() {
        let split = word.strip_prefix(b"-S").or_else(|| word.strip_prefix(b"--split-string="));
        match split {
            Some(words) => {
                argv.extend(words.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).map(<[u8]>::to_vec))
            }
            None if word.starts_with(b"-") || word.contains(&b'=') => continue,
            None => argv.push(word.clone()),
        }
        if !argv.is_empty() {
            break;
        }
    }
    argv.extend(rest.cloned());
    let is_setting = |word: &&Vec<u8>| word.contains(&b'=');
    argv.iter().skip_while(is_setting).cloned().collect()
}

/// Arguments of a program that is not known: the first that is a program itself is run with those behind it,
/// small files before it are configuration.
pub(super) fn run_arguments(search: &mut Search<'_>, command: &Command, arguments: &[Vec<u8>]) {
    for (place, argument) in arguments.iter().enumerate() {
        if search.files.is_over() {
            return;
        }
        let value = match argument.iter().position(|byte| *byte == b'=') {
            Some(equals) if argument.starts_with(b"-") => &argument[equals + 1..],
            _ => argument,
        };
        if value.is_empty() || value.starts_with(b"-") {
            continue;
        }
        if look_up(search, &command.directory, value).is_some() {
            let argv = arguments.get(place..).unwrap_or_default().to_vec();
            return run(search, &command.inner(argv, hot_reason::COMMAND));
        }
        search.add_path(&join(&command.directory, value), ARGUMENT_LEN_MAX, hot_reason::COMMAND);
    }
}
