//! The libraries of a program, found as the dynamic loader finds them (`ld.so(8)`; musl `ldso/dynlink.c`).

use std::{
    collections::{BTreeSet, VecDeque},
    rc::Rc,
};

use format_spec::records::hot_reason;

use super::{
    Search,
    elf::{ElfFile, ElfKind, Part},
    files::{Files, Found, base_name, parent},
    ld_cache::LdCache,
};

/// Most libraries of one program.
const LIBRARY_COUNT_MAX: usize = 2000;
/// Longest `/etc/ld.so.cache` and `/etc/ld-musl-ARCH.path`.
const CACHE_LEN_MAX: u64 = 4 << 20;
/// Where musl looks without `/etc/ld-musl-ARCH.path`.
const MUSL_DIRECTORIES: &[u8] = b"/lib:/usr/local/lib:/usr/lib";
/// Where glibc looks at last; distributions build it for some of these.
const GLIBC_DIRECTORIES: [&[u8]; 4] = [b"/lib64", b"/usr/lib64", b"/lib", b"/usr/lib"];
/// Ends of the names of Debian's directories per architecture, which glibc looks into too.
const MULTIARCH_MARK: &[u8] = b"-linux-gnu";
/// Libraries that are a whole interpreter, behind a program that only calls them.
const PROGRAM_LIBRARIES: [&[u8]; 6] = [b"libnode.so", b"libpython", b"libruby", b"libperl.so", b"libjvm.so", b"libphp"];

/// Loader caches of the image, each read once.
#[derive(Debug, Default)]
pub(super) struct LoaderCaches {
    glibc: Option<Rc<LdCache>>,
}

/// The dynamic loader of a process: where it looks and what it has loaded.
#[derive(Debug)]
pub(super) struct Loader {
    kind: ElfKind,
    cache: Rc<LdCache>,
    library_path: Vec<Vec<u8>>,
    /// Directories it looks into at last.
    directories: Vec<Vec<u8>>,
    loaded: BTreeSet<u32>,
}

/// A library whose own libraries are still to be found.
struct Loaded {
    file: ElfFile,
    directory: Vec<u8>,
    /// Run paths of what led here: `DT_RPATH` counts for these libraries too.
    inherited: Vec<Vec<u8>>,
}

impl Loader {
    /// The loader that a program names, which becomes hot; `None` for static programs.
    pub(super) fn of(search: &mut Search<'_>, program: &ElfFile) -> Option<Self> {
        let path = program.interpreter.as_ref()?;
        let file = search.files.find_file(path)?;
        let elf = ElfFile::read(&mut search.files, file.inode)?;
        search.add_ranges(&file, elf.hot_ranges(Part::Program), hot_reason::LIBRARY);
        let library_path = search.config.variable("LD_LIBRARY_PATH").map(split_list).unwrap_or_default();
        let (cache, directories) = match base_name(path).strip_prefix(b"ld-musl-") {
            Some(name) => (Rc::default(), musl_directories(search, name)),
            None => (glibc_cache(search), glibc_directories(&search.files)),
        };
        Some(Self { kind: program.kind, cache, library_path, directories, loaded: BTreeSet::from([file.inode]) })
    }

    /// Everything that a program or module needs becomes hot, in the order in which a loader opens it.
    pub(super) fn load(&mut self, search: &mut Search<'_>, found: &Found, file: ElfFile) {
        if !self.loaded.insert(found.inode) {
            return;
        }
        let directory = parent(&found.path).to_vec();
        let mut queue = VecDeque::from([Loaded { file, directory, inherited: Vec::new() }]);
        while let Some(object) = queue.pop_front() {
            let run_paths = object.run_paths(self.kind);
            for name in &object.file.needed {
                let Some((library, file)) = self.find(&mut search.files, &run_paths, name) else { continue };
                if self.loaded.len() >= LIBRARY_COUNT_MAX || !self.loaded.insert(library.inode) {
                    continue;
                }
                let is_program = PROGRAM_LIBRARIES.iter().any(|prefix| base_name(name).starts_with(prefix));
                let part = if is_program { Part::Program } else { Part::Library };
                search.add_ranges(&library, file.hot_ranges(part), hot_reason::LIBRARY);
                let directory = parent(&library.path).to_vec();
                queue.push_back(Loaded { file, directory, inherited: run_paths.rpath.clone() });
            }
        }
    }

    /// A module that the process opens by its path, with what it needs.
    pub(super) fn load_module(&mut self, search: &mut Search<'_>, found: &Found, reason: u32) {
        let Some(file) = ElfFile::read(&mut search.files, found.inode) else { return };
        let is_program = PROGRAM_LIBRARIES.iter().any(|prefix| base_name(&found.path).starts_with(prefix));
        let part = if is_program { Part::Program } else { Part::Library };
        search.add_ranges(found, file.hot_ranges(part), reason);
        self.load(search, found, file);
    }

    /// A library that the process opens by name, with what it needs.
    pub(super) fn load_name(&mut self, search: &mut Search<'_>, name: &[u8]) {
        let run_paths = RunPaths { rpath: Vec::new(), runpath: Vec::new() };
        if let Some((found, _)) = self.find(&mut search.files, &run_paths, name) {
            self.load_module(search, &found, hot_reason::LIBRARY);
        }
    }

    /// A library by its name in `DT_NEEDED`: the first file of the right kind.
    fn find(&self, files: &mut Files<'_>, run_paths: &RunPaths, name: &[u8]) -> Option<(Found, ElfFile)> {
        if name.contains(&b'/') {
            return self.open(files, name);
        }
        let in_directory = |directory: &Vec<u8>| [directory, b"/".as_slice(), name].concat();
        let before_cache = run_paths.rpath.iter().chain(&self.library_path).chain(&run_paths.runpath);
        let candidates = before_cache.map(in_directory).chain(self.cache.paths(name).iter().cloned());
        let mut candidates = candidates.chain(self.directories.iter().map(in_directory));
        candidates.find_map(|path| self.open(files, &path))
    }

    fn open(&self, files: &mut Files<'_>, path: &[u8]) -> Option<(Found, ElfFile)> {
        let found = files.find_file(path)?;
        let file = ElfFile::read(files, found.inode).filter(|file| file.kind == self.kind)?;
        Some((found, file))
    }
}

/// The run paths that count for what an object needs.
struct RunPaths {
    /// Before the environment's; of what led to the object too.
    rpath: Vec<Vec<u8>>,
    /// Behind the environment's.
    runpath: Vec<Vec<u8>>,
}

impl Loaded {
    fn run_paths(&self, kind: ElfKind) -> RunPaths {
        let expand = |list: &Option<Vec<u8>>| -> Vec<Vec<u8>> {
            split_list(list.as_deref().unwrap_or_default()).iter().map(|path| self.expand(path, kind)).collect()
        };
        let runpath = expand(&self.file.runpath);
        let own = if self.file.runpath.is_some() { Vec::new() } else { expand(&self.file.rpath) };
        RunPaths { rpath: own.into_iter().chain(self.inherited.iter().cloned()).collect(), runpath }
    }

    /// Replaces `$ORIGIN` and `$LIB` (`ld.so(8)`, dynamic string tokens).
    fn expand(&self, path: &[u8], kind: ElfKind) -> Vec<u8> {
        let lib: &[u8] = if kind.is_64 { b"lib64" } else { b"lib" };
        let mut expanded = Vec::with_capacity(path.len());
        let mut rest = path;
        'next: while let Some(byte) = rest.first() {
            for (token, value) in [("ORIGIN", self.directory.as_slice()), ("LIB", lib)] {
                for form in [format!("${token}"), format!("${{{token}}}")] {
                    if let Some(behind) = rest.strip_prefix(form.as_bytes()) {
                        expanded.extend_from_slice(value);
                        rest = behind;
                        continue 'next;
                    }
                }
            }
            expanded.push(*byte);
            rest = &rest[1..];
        }
        expanded
    }
}

fn glibc_cache(search: &mut Search<'_>) -> Rc<LdCache> {
    if let Some(cache) = &search.loader_caches.glibc {
        return Rc::clone(cache);
    }
    let bytes = search.add_and_read(b"/etc/ld.so.cache", CACHE_LEN_MAX, hot_reason::SYSTEM);
    let cache = Rc::new(bytes.map(|bytes| LdCache::parse(&bytes)).unwrap_or_default());
    search.loader_caches.glibc = Some(Rc::clone(&cache));
    cache
}

fn glibc_directories(files: &Files<'_>) -> Vec<Vec<u8>> {
    let mut directories = Vec::new();
    for directory in GLIBC_DIRECTORIES {
        let names = files.names(directory).into_iter().filter(|name| name.ends_with(MULTIARCH_MARK));
        directories.extend(names.map(|name| [directory, b"/", &name].concat()));
        directories.push(directory.to_vec());
    }
    directories
}

/// Where musl's loader looks; `name` is its file name behind `ld-musl-`, such as `x86_64.so.1`.
fn musl_directories(search: &mut Search<'_>, name: &[u8]) -> Vec<Vec<u8>> {
    let architecture = name.split(|byte| *byte == b'.').next().unwrap_or_default();
    let path = [b"/etc/ld-musl-", architecture, b".path"].concat();
    let list = search.add_and_read(&path, CACHE_LEN_MAX, hot_reason::SYSTEM);
    split_list(&list.unwrap_or_else(|| MUSL_DIRECTORIES.to_vec()))
}

/// The parts of a list of directories, between colons, semicolons or line ends.
fn split_list(list: &[u8]) -> Vec<Vec<u8>> {
    let parts = list.split(|byte| matches!(byte, b':' | b';' | b'\n')).filter(|part| !part.is_empty());
    parts.map(<[u8]>::to_vec).collect()
}
