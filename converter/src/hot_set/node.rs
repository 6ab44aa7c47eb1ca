//! What a start of Node reads: its own scripts where a distribution keeps them as files, and the program
//! with the modules that it loads.
//!
//! Names are resolved as Node does (its documentation, "Modules: CommonJS modules" and "Modules: Packages"):
//! files and directories, `node_modules` upwards, `main` and `exports` of `package.json`.

use std::collections::{BTreeMap, BTreeSet};

use format_spec::records::hot_reason;
use serde_json::Value;

use super::{
    Search,
    files::{Found, base_name, join, parent},
    javascript::{Request, requests},
    program::{self, Command, Process},
};

/// Longest source that is read for what it loads, and longest `package.json`.
const SOURCE_LEN_MAX: u64 = 16 << 20;
/// Most modules of one program.
const MODULE_COUNT_MAX: usize = 20_000;
/// Most requests that wait to be resolved.
const PENDING_COUNT_MAX: usize = 1_000_000;
/// Objects inside each other in `exports`.
const EXPORTS_DEPTH_MAX: u32 = 8;
/// Parts of Node that Debian keeps as files, which every start reads.
const SHARED_BUILTINS: [&str; 6] = [
    "/usr/share/nodejs/cjs-module-lexer/lexer.js",
    "/usr/share/nodejs/cjs-module-lexer/dist/lexer.js",
    "/usr/share/nodejs/undici/undici-fetch.js",
    "/usr/share/nodejs/acorn/dist/acorn.js",
    "/usr/share/nodejs/acorn-walk/dist/walk.js",
    "/usr/share/nodejs/minimatch/index.js",
];
/// Options whose value is a word of its own (`node --help`).
const OPTIONS_WITH_VALUE: [&[u8]; 10] = [
    b"-r",
    b"--require",
    b"--import",
    b"--loader",
    b"--experimental-loader",
    b"-C",
    b"--conditions",
    b"--title",
    b"--stack-trace-limit",
    b"--input-type",
];
/// Of these the value is a module that is loaded before the program.
const PRELOADING_OPTIONS: [&[u8]; 5] = [b"-r", b"--require", b"--import", b"--loader", b"--experimental-loader"];
/// What Node adds to the name of a file that is not there.
const EXTENSIONS: [&[u8]; 6] = [b"", b".js", b".json", b".node", b".mjs", b".cjs"];

/// Adds what Node reads that was started with this command.
pub(super) fn run(search: &mut Search<'_>, process: &mut Process, command: &Command) {
    for path in SHARED_BUILTINS {
        search.add_path(path.as_bytes(), SOURCE_LEN_MAX, hot_reason::RUNTIME);
    }
    let mut node = Node::default();
    let main = join(&command.directory, b"main");
    let mut words = command.arguments().iter();
    while let Some(word) = words.next() {
        if !word.starts_with(b"-") {
            let path = join(&command.directory, word);
            let Some(program) = find_file(search, &path).or_else(|| find_in_directory(search, &path)) else { return };
            node.load_all(search, process, program.clone(), hot_reason::COMMAND);
            let rest: Vec<_> = words.cloned().collect();
            return run_package_script(search, command, &program, &rest);
        }
        let Some(value) = OPTIONS_WITH_VALUE.contains(&word.as_slice()).then(|| words.next()).flatten() else {
            continue;
        };
        if PRELOADING_OPTIONS.contains(&word.as_slice()) {
            let request = Request { specifier: value.clone(), is_import: false };
            if let Some(found) = node.resolve(search, &main, &request) {
                node.load_all(search, process, found, hot_reason::COMMAND);
            }
        }
    }
}

/// `npm start` and its like run a line of the application's `package.json`.
fn run_package_script(search: &mut Search<'_>, command: &Command, program: &Found, arguments: &[Vec<u8>]) {
    let name = base_name(&program.path);
    if ![b"npm".as_slice(), b"yarn", b"pnpm"].iter().any(|manager| name.starts_with(manager)) {
        return;
    }
    let mut words =
        arguments.iter().filter(|word| !word.starts_with(b"-") && !matches!(word.as_slice(), b"run" | b"run-script"));
    let Some(script) = words.next().and_then(|word| std::str::from_utf8(word).ok()) else { return };
    let path = join(&command.directory, b"package.json");
    let Some(text) = search.add_and_read(&path, SOURCE_LEN_MAX, hot_reason::COMMAND) else { return };
    let Ok(package) = serde_json::from_slice::<Value>(&text) else { return };
    let Some(line) = package["scripts"][script].as_str() else { return };
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    let binary = join(&command.directory, &[b"node_modules/.bin/", first.as_bytes()].concat());
    let line = match search.files.find_executable(&binary) {
        Some(_) => [&binary, b" ".as_slice(), rest.as_bytes()].concat(),
        None => line.as_bytes().to_vec(),
    };
    let argv = vec![b"/bin/sh".to_vec(), b"-c".to_vec(), line];
    program::run(search, &command.inner(argv, hot_reason::COMMAND));
}

/// Modules that are loaded.
#[derive(Default)]
struct Node {
    loaded: BTreeSet<u32>,
    /// Parsed `package.json` by directory; `None` where there is none.
    packages: BTreeMap<Vec<u8>, Option<Value>>,
}

impl Node {
    /// Loads a module with everything that it asks for, in the order in which Node reads the files.
    fn load_all(&mut self, search: &mut Search<'_>, process: &mut Process, program: Found, reason: u32) {
        let mut reason = reason;
        let mut pending: Vec<(Vec<u8>, Request)> = Vec::new();
        let mut next = Some(program);
        loop {
            if let Some(found) = next.take() {
                if self.loaded.len() < MODULE_COUNT_MAX && self.loaded.insert(found.inode) {
                    let mut inner = self.load(search, process, &found, reason);
                    inner.reverse();
                    if pending.len() + inner.len() <= PENDING_COUNT_MAX {
                        pending.extend(inner.into_iter().map(|request| (found.path.clone(), request)));
                    }
                }
                reason = hot_reason::RUNTIME;
            }
            let Some((path, request)) = pending.pop() else { return };
            next = self.resolve(search, &path, &request);
        }
    }

    /// Adds a module's file; returns what it asks for.
    fn load(&mut self, search: &mut Search<'_>, process: &mut Process, found: &Found, reason: u32) -> Vec<Request> {
        if found.path.ends_with(b".node") {
            process.open_module(search, found, reason);
            return Vec::new();
        }
        // The next package.json says what kind of module this is.
        let mut directory = parent(&found.path);
        while self.package(search, directory).is_none() && directory != b"/" {
            directory = parent(directory);
        }
        search.add_file(found, reason);
        if found.path.ends_with(b".json") {
            return Vec::new();
        }
        let source = search.files.read_file(found.inode, SOURCE_LEN_MAX);
        source.map(|source| requests(&source)).unwrap_or_default()
    }

    /// The `package.json` in a directory, which becomes hot.
    fn package(&mut self, search: &mut Search<'_>, directory: &[u8]) -> Option<&Value> {
        if !self.packages.contains_key(directory) {
            let path = join(directory, b"package.json");
            let text = search.add_and_read(&path, SOURCE_LEN_MAX, hot_reason::RUNTIME);
            let package = text.and_then(|text| serde_json::from_slice(&text).ok());
            self.packages.insert(directory.to_vec(), package);
        }
        self.packages.get(directory)?.as_ref()
    }

    /// The file that a request in the source at `path` means.
    fn resolve(&mut self, search: &mut Search<'_>, path: &[u8], request: &Request) -> Option<Found> {
        let specifier = request.specifier.as_slice();
        let is_path = [b"./".as_slice(), b"../", b"/"].iter().any(|start| specifier.starts_with(start));
        if is_path || specifier == b"." || specifier == b".." {
            return self.find_path(search, &join(parent(path), specifier));
        }
        // Node's own modules, which no directory is looked up for.
        if specifier.starts_with(b"node:") || specifier.starts_with(b"#") {
            return None;
        }
        let (name, inside) = split_package(specifier);
        let mut directory = parent(path);
        loop {
            let package = join(&join(directory, b"node_modules"), name);
            let is_there = base_name(directory) != b"node_modules" && search.files.find_directory(&package).is_some();
            let found = is_there.then(|| self.find_in_package(search, &package, inside, request.is_import)).flatten();
            if found.is_some() {
                return found;
            }
            if directory == b"/" {
                return None;
            }
            directory = parent(directory);
        }
    }

    fn find_in_package(
        &mut self,
        search: &mut Search<'_>,
        package: &[u8],
        inside: &[u8],
        is_import: bool,
    ) -> Option<Found> {
        let subpath = [b".", inside].concat();
        let exports = self.package(search, package).and_then(|package| package.get("exports")).cloned();
        let exported = exports.and_then(|exports| exported_file(&exports, &subpath, is_import));
        if let Some(file) = exported.and_then(|file| find_file(search, &join(package, file.as_bytes()))) {
            return Some(file);
        }
        self.find_path(search, &[package, inside].concat())
    }

    /// The file that a path means, which may be without its extension, or a directory.
    fn find_path(&mut self, search: &mut Search<'_>, path: &[u8]) -> Option<Found> {
        if let Some(found) = find_file(search, path) {
            return Some(found);
        }
        search.files.find_directory(path)?;
        let main = self.package(search, path).and_then(|package| package.get("main")?.as_str().map(str::to_owned));
        let main = main.map(|main| join(path, main.trim_start_matches('/').as_bytes()));
        let found = main.and_then(|main| find_file(search, &main).or_else(|| find_in_directory(search, &main)));
        found.or_else(|| find_in_directory(search, path))
    }
}

fn find_file(search: &Search<'_>, path: &[u8]) -> Option<Found> {
    EXTENSIONS.iter().find_map(|extension| search.files.find_file(&[path, extension].concat()))
}

fn find_in_directory(search: &Search<'_>, path: &[u8]) -> Option<Found> {
    find_file(search, &join(path, b"index"))
}

/// Parts `@scope/name/inside` into the package and what follows it.
fn split_package(specifier: &[u8]) -> (&[u8], &[u8]) {
    let slashes = if specifier.starts_with(b"@") { 2 } else { 1 };
    let mut places = specifier.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(place, _)| place);
    let end = places.nth(slashes - 1).unwrap_or(specifier.len());
    specifier.split_at(end)
}

/// The file that `exports` gives for a subpath such as `.` or `./inside`.
fn exported_file(exports: &Value, subpath: &[u8], is_import: bool) -> Option<String> {
    let subpath = std::str::from_utf8(subpath).ok()?;
    let Some(subpaths) = exports.as_object().filter(|object| object.keys().any(|key| key.starts_with('.'))) else {
        return (subpath == ".").then(|| condition(exports, is_import, 0)).flatten();
    };
    if let Some(target) = subpaths.get(subpath) {
        return condition(target, is_import, 0);
    }
    // A star stands for any part of the path, in the target too.
    subpaths.iter().find_map(|(pattern, target)| {
        let (start, end) = pattern.split_once('*')?;
        let part = subpath.strip_prefix(start)?.strip_suffix(end)?;
        Some(condition(target, is_import, 0)?.replace('*', part))
    })
}

/// The first target whose conditions Node has.
fn condition(target: &Value, is_import: bool, depth: u32) -> Option<String> {
    let own = if is_import { "import" } else { "require" };
    match target {
        _ if depth > EXPORTS_DEPTH_MAX => None,
        Value::String(file) => Some(file.clone()),
        Value::Array(targets) => targets.iter().find_map(|target| condition(target, is_import, depth + 1)),
        Value::Object(conditions) => {
            let holds = |name: &str| name == own || matches!(name, "node" | "default" | "node-addons" | "module-sync");
            let targets = conditions.iter().filter(|(name, _)| holds(name));
            targets.map(|(_, target)| target).find_map(|target| condition(target, is_import, depth + 1))
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
