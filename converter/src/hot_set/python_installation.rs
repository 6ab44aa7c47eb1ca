//! Where a Python is installed: its version, its standard library, the directories of packages.
//!
//! As CPython finds them: `Modules/getpath.py` (prefix, virtual environments) and `site.py`.

use std::collections::BTreeSet;

use format_spec::records::hot_reason;

use super::{
    Search,
    files::{Files, base_name, join, parent},
    program::Process,
};

/// Longest `pyvenv.cfg`.
const SETTINGS_LEN_MAX: u64 = 1 << 20;

/// Where Python is installed.
pub(super) struct Installation {
    /// Such as (3, 11).
    pub(super) version: (u32, u32),
    /// `PREFIX/lib/python3.11`.
    pub(super) library: Vec<u8>,
    /// `PREFIX`, and that of the virtual environment if there is one.
    prefixes: Vec<Vec<u8>>,
    /// Ends of extension modules' names, the most particular first.
    pub(super) extensions: Vec<Vec<u8>>,
}

impl Installation {
    /// The installation that a program belongs to; the settings of a virtual environment become hot.
    pub(super) fn find(search: &mut Search<'_>, process: &Process) -> Option<Self> {
        let mut executable_directory = parent(&process.program.path).to_vec();
        let mut prefixes = Vec::new();
        // A virtual environment is known by a file beside the link to the program, or one above.
        let asked_directory = parent(&process.path);
        for directory in [asked_directory, parent(asked_directory)] {
            let path = join(directory, b"pyvenv.cfg");
            let Some(text) = search.add_and_read(&path, SETTINGS_LEN_MAX, hot_reason::RUNTIME) else { continue };
            if let Some(home) = setting(&text, b"home") {
                executable_directory = home.to_vec();
            }
            prefixes.push(directory.to_vec());
            break;
        }
        let (version, library) = library_of(&search.files, &executable_directory, base_name(&process.program.path))?;
        prefixes.push(parent(parent(&library)).to_vec());
        let extensions = extensions_of(&search.files, &library, version);
        Some(Self { version, library, prefixes, extensions })
    }

    fn name(&self) -> Vec<u8> {
        format!("python{}.{}", self.version.0, self.version.1).into_bytes()
    }

    /// Directories that `site.py` looks into, in its order; Debian's are called otherwise.
    pub(super) fn site_directories(&self, search: &Search<'_>) -> Vec<Vec<u8>> {
        let name = self.name();
        let home = search.config.variable("HOME").unwrap_or(b"/root");
        let mut directories = vec![[home, b"/.local/lib/", &name, b"/site-packages"].concat()];
        for prefix in &self.prefixes {
            for library in [b"/lib/".as_slice(), b"/lib64/"] {
                directories.push([prefix, library, &name, b"/site-packages"].concat());
            }
        }
        let prefix = self.prefixes.last().map(Vec::as_slice).unwrap_or_default();
        directories.push([b"/usr/local/lib/", name.as_slice(), b"/dist-packages"].concat());
        directories.push([prefix, b"/lib/python3/dist-packages"].concat());
        directories.push([self.library.as_slice(), b"/dist-packages"].concat());
        let mut seen = BTreeSet::new();
        let exists = |directory: &Vec<u8>| search.files.find_directory(directory).is_some();
        directories.into_iter().filter(|directory| exists(directory) && seen.insert(directory.clone())).collect()
    }
}

/// The standard library of a program in `directory`: the next one above that has the landmark `os.py`.
fn library_of(files: &Files<'_>, directory: &[u8], program: &[u8]) -> Option<((u32, u32), Vec<u8>)> {
    let mut directory = directory;
    loop {
        let mut found: Vec<((u32, u32), Vec<u8>)> = Vec::new();
        for place in [b"lib".as_slice(), b"lib64"] {
            let place = join(directory, place);
            for name in files.names(&place) {
                let Some(version) = version_of(&name) else { continue };
                let library = join(&place, &name);
                if files.find_file(&join(&library, b"os.py")).is_some()
                    || files.find_file(&join(&library, b"os.pyc")).is_some()
                {
                    found.push((version, library));
                }
            }
        }
        found.sort();
        let is_named = |(version, _): &&((u32, u32), Vec<u8>)| version_of(program) == Some(*version);
        if let Some(found) = found.iter().find(is_named).or(found.last()) {
            return Some(found.clone());
        }
        if directory == b"/" {
            return None;
        }
        directory = parent(directory);
    }
}

/// The version in a name such as `python3.11`.
fn version_of(name: &[u8]) -> Option<(u32, u32)> {
    let (major, minor) = std::str::from_utf8(name).ok()?.strip_prefix("python")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// How extension modules end here: the first name in `lib-dynload` tells the platform.
fn extensions_of(files: &Files<'_>, library: &[u8], (major, minor): (u32, u32)) -> Vec<Vec<u8>> {
    let tag = format!(".cpython-{major}{minor}");
    let names = files.names(&join(library, b"lib-dynload"));
    let full = names.iter().find_map(|name| {
        let start = name.windows(tag.len()).position(|part| part == tag.as_bytes())?;
        Some(name[start..].to_vec())
    });
    full.into_iter().chain([b".abi3.so".to_vec(), b".so".to_vec()]).collect()
}

/// A value of a file of `name = value` lines.
fn setting<'t>(text: &'t [u8], name: &[u8]) -> Option<&'t [u8]> {
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let equals = line.iter().position(|byte| *byte == b'=')?;
        (line[..equals].trim_ascii() == name).then(|| line[equals + 1..].trim_ascii())
    })
}
