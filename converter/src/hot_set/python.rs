//! What a start of Python reads: its own first modules, and what the program imports.
//!
//! Follows CPython's start: `getpath.py` (prefix, virtual environments), `site.py` (search path, `.pth`
//! files), `importlib` (which file a name means, and that a valid `.pyc` is read in place of the source).

use std::collections::{BTreeMap, BTreeSet};

use format_spec::records::hot_reason;

use super::{
    Search,
    files::{Files, Found, join, parent},
    program::{self, Command, Process},
    python_imports::{Import, Scope, imports},
    python_installation::Installation,
};

/// Longest source that is read for its imports.
const SOURCE_LEN_MAX: u64 = 4 << 20;
/// Most names that are looked up.
const NAME_COUNT_MAX: usize = 200_000;
/// Longest name: every package in it is looked up.
const NAME_LEN_MAX: usize = 1024;
/// Most directories of the search path.
const PATH_COUNT_MAX: usize = 1000;
/// Most names that wait to be looked up.
const PENDING_COUNT_MAX: usize = 1_000_000;
/// Length of the head of a `.pyc`: magic, flags, modification time, size (PEP 552).
const PYC_HEAD_LEN: usize = 16;
/// Flag bits of a `.pyc`: named by the hash of its source, and that the hash is compared.
const PYC_BY_HASH: u32 = 1;
const PYC_CHECKED: u32 = 2;

/// Imported before the program, in this order (`initconfig`, `site`).
const START_MODULES: [&str; 16] = [
    "encodings",
    "codecs",
    "encodings.aliases",
    "encodings.utf_8",
    "io",
    "abc",
    "site",
    "os",
    "stat",
    "_collections_abc",
    "posixpath",
    "genericpath",
    "_sitebuiltins",
    "_bootlocale",
    "sitecustomize",
    "usercustomize",
];
/// Part of the program itself since 3.11 (`Python/frozen.c`): their files are not read.
const FROZEN_MODULES: [&str; 15] = [
    "abc",
    "codecs",
    "io",
    "_collections_abc",
    "_sitebuiltins",
    "genericpath",
    "ntpath",
    "posixpath",
    "os",
    "site",
    "stat",
    "importlib.util",
    "importlib.machinery",
    "importlib._bootstrap",
    "runpy",
];

/// Adds what Python reads that was started with this command.
pub(super) fn run(search: &mut Search<'_>, process: &mut Process, command: &Command) {
    let Some(installation) = Installation::find(search, process) else {
        return program::run_arguments(search, command, command.arguments());
    };
    let mut python = Python { installation, path: Vec::new(), seen: BTreeSet::new(), packages: BTreeMap::new() };
    let call = Call::of(command.arguments());
    python.set_path(search, command, &call);
    python.import_all(search, process, START_MODULES.iter().map(|name| (*name).to_owned()), hot_reason::RUNTIME);
    python.read_pth_files(search, process);
    match &call {
        Call::Text(text, _) => {
            let names = named_modules(&imports(&String::from_utf8_lossy(text), Scope::Program), "");
            python.import_all(search, process, names, hot_reason::RUNTIME);
        }
        Call::Module(name, _) => {
            let names = [name.clone(), format!("{name}.__main__")];
            python.import_all(search, process, names, hot_reason::COMMAND);
        }
        Call::Script(path, _) => python.run_script(search, process, &join(&command.directory, path)),
        Call::Nothing => {}
    }
    python.import_arguments(search, process, command, call.arguments());
}

/// What a command line of Python asks for, with the arguments behind it (`python --help`).
enum Call {
    Text(Vec<u8>, Vec<Vec<u8>>),
    Module(String, Vec<Vec<u8>>),
    Script(Vec<u8>, Vec<Vec<u8>>),
    Nothing,
}

impl Call {
    fn of(arguments: &[Vec<u8>]) -> Self {
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            let Some(options) = word.strip_prefix(b"-").filter(|options| !options.is_empty()) else {
                return Self::Script(word.clone(), rest.cloned().collect());
            };
            // Letters may stand together; those with a value end them: `-Wd`, `-um module`.
            let Some(place) = options.iter().position(|letter| b"cmWX".contains(letter)) else { continue };
            let value = match &options[place + 1..] {
                b"" => rest.next().cloned().unwrap_or_default(),
                value => value.to_vec(),
            };
            match options[place] {
                b'c' => return Self::Text(value, rest.cloned().collect()),
                b'm' => return Self::Module(String::from_utf8_lossy(&value).into_owned(), rest.cloned().collect()),
                _ => {}
            }
        }
        Self::Nothing
    }

    fn arguments(&self) -> &[Vec<u8>] {
        match self {
            Self::Text(_, arguments) | Self::Module(_, arguments) | Self::Script(_, arguments) => arguments,
            Self::Nothing => &[],
        }
    }
}

/// A running Python.
struct Python {
    installation: Installation,
    /// Where modules are looked up (`sys.path`).
    path: Vec<Vec<u8>>,
    /// Names that were looked up.
    seen: BTreeSet<String>,
    /// Where the modules of packages are looked up.
    packages: BTreeMap<String, Vec<Vec<u8>>>,
}

/// A module that was found.
struct Module {
    kind: ModuleKind,
    /// Its file; that of a package is its `__init__`.
    file: Found,
    /// Directory and name of the file as they were looked up, links not followed.
    directory: Vec<u8>,
    stem: Vec<u8>,
    is_package: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModuleKind {
    Source,
    Compiled,
    Extension,
}

impl Python {
    /// `sys.path` before the program starts.
    fn set_path(&mut self, search: &Search<'_>, command: &Command, call: &Call) {
        let library = &self.installation.library;
        let first = match call {
            Call::Script(path, _) => {
                let path = join(&command.directory, path);
                search.files.find(&path).map(|found| parent(&found.path).to_vec())
            }
            _ => Some(command.directory.clone()),
        };
        let listed = search.config.variable("PYTHONPATH").unwrap_or_default();
        let listed = listed.split(|byte| *byte == b':').filter(|path| !path.is_empty());
        self.path = first.into_iter().collect();
        self.path.extend(listed.map(|path| join(&command.directory, path)));
        self.path.push(library.clone());
        self.path.push(join(library, b"lib-dynload"));
        self.path.extend(self.installation.site_directories(search));
    }

    /// Directories that `.pth` files add, and what these import (`site.addpackage`).
    fn read_pth_files(&mut self, search: &mut Search<'_>, process: &mut Process) {
        for directory in self.installation.site_directories(search) {
            for name in search.files.names(&directory).iter().filter(|name| name.ends_with(b".pth")) {
                let path = join(&directory, name);
                let Some(text) = search.add_and_read(&path, SOURCE_LEN_MAX, hot_reason::RUNTIME) else { continue };
                for line in String::from_utf8_lossy(&text).lines().map(str::trim) {
                    if line.starts_with("import ") || line.starts_with("import\t") {
                        let names = named_modules(&imports(line, Scope::Module), "");
                        self.import_all(search, process, names, hot_reason::RUNTIME);
                    } else if !line.is_empty() && !line.starts_with('#') {
                        let added = join(&directory, line.as_bytes());
                        let is_new = self.path.len() < PATH_COUNT_MAX && !self.path.contains(&added);
                        if is_new && search.files.find_directory(&added).is_some() {
                            self.path.push(added);
                        }
                    }
                }
            }
        }
    }

    fn run_script(&mut self, search: &mut Search<'_>, process: &mut Process, path: &[u8]) {
        if search.files.find_directory(path).is_some() {
            self.path.insert(0, path.to_vec());
            return self.import_all(search, process, ["__main__".to_owned()], hot_reason::COMMAND);
        }
        let Some(source) = search.add_and_read(path, SOURCE_LEN_MAX, hot_reason::COMMAND) else { return };
        let names = named_modules(&imports(&String::from_utf8_lossy(&source), Scope::Program), "");
        self.import_all(search, process, names, hot_reason::RUNTIME);
    }

    /// Arguments that name a module of the application, as those of gunicorn and uvicorn do: `app.main:app`.
    fn import_arguments(
        &mut self,
        search: &mut Search<'_>,
        process: &mut Process,
        command: &Command,
        arguments: &[Vec<u8>],
    ) {
        for argument in arguments.iter().filter_map(|argument| std::str::from_utf8(argument).ok()) {
            let Some((module, _)) = argument.split_once(':') else { continue };
            let first = module.split('.').next().unwrap_or_default();
            let of_application = [first.to_owned(), format!("{first}.py")];
            if of_application.iter().any(|name| search.files.find(&join(&command.directory, name.as_bytes())).is_some())
            {
                if !self.path.contains(&command.directory) {
                    self.path.push(command.directory.clone());
                }
                self.import_all(search, process, [module.to_owned()], hot_reason::COMMAND);
            }
        }
    }

    /// Imports modules with everything that these import, in the order in which Python reads their files.
    fn import_all(
        &mut self,
        search: &mut Search<'_>,
        process: &mut Process,
        names: impl IntoIterator<Item = String>,
        reason: u32,
    ) {
        // `reason` is that of the first module: the others are there because of it.
        let mut reason = reason;
        let mut pending: Vec<String> = names.into_iter().collect();
        pending.reverse();
        while let Some(name) = pending.pop().filter(|_| !search.files.is_over()) {
            let is_known = self.seen.contains(&name) || name.len() > NAME_LEN_MAX;
            if is_known || self.seen.len() >= NAME_COUNT_MAX {
                continue;
            }
            // `a.b` is looked up in `a`, which is imported first.
            if let Some((package, _)) = name.rsplit_once('.').filter(|(package, _)| !self.seen.contains(*package)) {
                let package = package.to_owned();
                pending.extend([name, package]);
                continue;
            }
            self.seen.insert(name.clone());
            let Some(module) = self.find(&search.files, &name) else { continue };
            let mut inner = self.load(search, process, &name, &module, reason);
            reason = hot_reason::RUNTIME;
            inner.reverse();
            if pending.len() + inner.len() <= PENDING_COUNT_MAX {
                pending.extend(inner);
            }
        }
    }

    /// The file that a name means; `None` for what is built in, and for packages without a file.
    fn find(&mut self, files: &Files<'_>, name: &str) -> Option<Module> {
        let (directories, last) = match name.rsplit_once('.') {
            Some((package, last)) => (self.packages.get(package)?, last),
            None => (&self.path, name),
        };
        let mut portions = Vec::new();
        for directory in directories {
            let inside = join(directory, last.as_bytes());
            if files.find_directory(&inside).is_some() {
                if let Some(module) = self.find_in(files, &inside, b"__init__", true) {
                    self.packages.insert(name.to_owned(), vec![inside]);
                    return Some(module);
                }
                portions.push(inside);
            }
            if let Some(module) = self.find_in(files, directory, last.as_bytes(), false) {
                return Some(module);
            }
        }
        // Directories of that name together are a package (PEP 420).
        if !portions.is_empty() {
            self.packages.insert(name.to_owned(), portions);
        }
        None
    }

    fn find_in(&self, files: &Files<'_>, directory: &[u8], stem: &[u8], is_package: bool) -> Option<Module> {
        let extensions = self.installation.extensions.iter().map(|end| (end.as_slice(), ModuleKind::Extension));
        let others = [(b".py".as_slice(), ModuleKind::Source), (b".pyc".as_slice(), ModuleKind::Compiled)];
        extensions.chain(others).find_map(|(end, kind)| {
            let file = files.find_file(&join(directory, &[stem, end].concat()))?;
            Some(Module { kind, file, directory: directory.to_vec(), stem: stem.to_vec(), is_package })
        })
    }

    /// Adds the file of a module; returns the names that it imports.
    fn load(
        &self,
        search: &mut Search<'_>,
        process: &mut Process,
        name: &str,
        module: &Module,
        reason: u32,
    ) -> Vec<String> {
        let is_frozen = self.installation.version >= (3, 11) && FROZEN_MODULES.contains(&name);
        match module.kind {
            ModuleKind::Extension => {
                process.open_module(search, &module.file, reason);
                return Vec::new();
            }
            ModuleKind::Compiled => {
                search.add_file(&module.file, reason);
                return Vec::new();
            }
            ModuleKind::Source if is_frozen => {}
            ModuleKind::Source => self.add_source(search, module, reason),
        }
        let Some(source) = search.files.read_file(module.file.inode, SOURCE_LEN_MAX) else { return Vec::new() };
        let package = if module.is_package { name } else { name.rsplit_once('.').map_or("", |(package, _)| package) };
        named_modules(&imports(&String::from_utf8_lossy(&source), Scope::Module), package)
    }

    /// Adds the compiled form of a source if Python takes that, otherwise the source.
    fn add_source(&self, search: &mut Search<'_>, module: &Module, reason: u32) {
        let (major, minor) = self.installation.version;
        let name = [module.stem.as_slice(), format!(".cpython-{major}{minor}.pyc").as_bytes()].concat();
        let compiled = search.files.find_file(&join(&join(&module.directory, b"__pycache__"), &name));
        let validity = compiled.as_ref().and_then(|compiled| validity(&mut search.files, compiled, &module.file));
        if let Some(compiled) = compiled.filter(|_| validity.is_some()) {
            search.add_file(&compiled, reason);
        }
        if validity != Some(Validity::Alone) {
            search.add_file(&module.file, reason);
        }
    }
}

/// What Python reads of a module whose compiled form is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Validity {
    /// The compiled form.
    Alone,
    /// The source too, to compare its hash.
    WithSource,
}

/// Whether the compiled form belongs to a source (PEP 552).
fn validity(files: &mut Files<'_>, compiled: &Found, source: &Found) -> Option<Validity> {
    let head = files.read_at(compiled.inode, 0, PYC_HEAD_LEN)?;
    let word = |place: usize| head[place..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let flags = word(4)?;
    if flags & PYC_BY_HASH != 0 {
        return Some(if flags & PYC_CHECKED != 0 { Validity::WithSource } else { Validity::Alone });
    }
    let inode = files.inode(source.inode)?;
    // Both numbers are kept modulo 2^32.
    let is_equal = |kept: u32, number: u64| u64::from(kept) == number & u64::from(u32::MAX);
    let is_valid = is_equal(word(8)?, inode.mtime_seconds.get()) && is_equal(word(12)?, inode.size.get());
    is_valid.then_some(Validity::Alone)
}

/// Absolute names of what a module of `package` imports; of those names that are no modules, nothing comes.
fn named_modules(imports: &[Import], package: &str) -> Vec<String> {
    let mut names = Vec::new();
    for import in imports {
        let mut base = package;
        for _ in 1..import.level {
            base = base.rsplit_once('.').map_or("", |(outer, _)| outer);
        }
        let parts = [if import.level > 0 { base } else { "" }, import.module.as_str()];
        let module = parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(".");
        if module.is_empty() {
            continue;
        }
        names.push(module.clone());
        names.extend(import.names.iter().map(|name| format!("{module}.{name}")));
    }
    names
}

#[cfg(test)]
#[path = "python_tests.rs"]
mod tests;
