//! What a start of Ruby reads: RubyGems and what Ruby loads with it, the descriptions of all gems, and what
//! the program requires.
//!
//! Directories are those of `rbconfig.rb` and RubyGems as upstream and Debian set them; `autoload` is left
//! out, as it loads nothing until a name is used.

use std::collections::BTreeSet;

use format_spec::records::hot_reason;

use super::{
    Search,
    files::{Files, Found, base_name, join, parent},
    program::{self, Command, Process},
};

/// Longest source that is read for what it requires.
const SOURCE_LEN_MAX: u64 = 4 << 20;
/// Most files of one program.
const FILE_COUNT_MAX: usize = 20_000;
/// Most requests that wait to be resolved.
const PENDING_COUNT_MAX: usize = 1_000_000;
/// Most gems whose files are looked through.
const GEM_COUNT_MAX: usize = 2000;
/// Loaded at each start (`gem_prelude.rb`, `encdb`).
const START_LIBRARIES: [&str; 7] = [
    "enc/encdb",
    "enc/trans/transdb",
    "rubygems",
    "error_highlight",
    "did_you_mean",
    "syntax_suggest/core_ext",
    "monitor",
];
/// Words before the name of what is loaded.
const REQUIRE: &str = "require";
const REQUIRE_RELATIVE: &str = "require_relative";
/// Options whose value is a word of its own (`ruby --help`).
const OPTIONS_WITH_VALUE: [&[u8]; 5] = [b"-e", b"-r", b"-I", b"-C", b"-E"];

/// Adds what Ruby reads that was started with this command.
pub(super) fn run(search: &mut Search<'_>, process: &mut Process, command: &Command) {
    let mut ruby = Ruby::find(&search.files, &process.program);
    ruby.add_gems(search);
    let start = START_LIBRARIES.iter().map(|name| Required { name: (*name).to_owned(), relative_to: None });
    ruby.load_all(search, process, start.collect());
    let mut words = command.arguments().iter();
    while let Some(word) = words.next() {
        let value = OPTIONS_WITH_VALUE.contains(&word.as_slice()).then(|| words.next()).flatten();
        match (word.as_slice(), value) {
            (b"-e", Some(text)) => {
                ruby.load_all(search, process, required(&String::from_utf8_lossy(text), &command.directory))
            }
            (b"-r", Some(name)) => {
                let name = String::from_utf8_lossy(name).into_owned();
                ruby.load_all(search, process, vec![Required { name, relative_to: None }]);
            }
            (b"-I", Some(directory)) => ruby.path.insert(0, join(&command.directory, directory)),
            (option, _) if option.starts_with(b"-") => {}
            (script, _) => {
                let path = join(&command.directory, script);
                if let Some(found) = search.files.find_file(&path) {
                    let required = ruby.load(search, process, &found, hot_reason::COMMAND);
                    ruby.load_all(search, process, required);
                }
                // `bundle exec PROGRAM` and its like.
                let rest: Vec<_> = words.cloned().collect();
                return program::run_arguments(search, command, &rest);
            }
        }
    }
}

/// A library that is asked for.
struct Required {
    name: String,
    /// The directory that `require_relative` starts from.
    relative_to: Option<Vec<u8>>,
}

/// A running Ruby.
struct Ruby {
    /// Where libraries are looked up (`$LOAD_PATH`), with those of all gems at its end.
    path: Vec<Vec<u8>>,
    /// Directories with gems.
    gem_directories: Vec<Vec<u8>>,
    loaded: BTreeSet<u32>,
}

impl Ruby {
    /// The installation of a program `PREFIX/bin/ruby`.
    fn find(files: &Files<'_>, program: &Found) -> Self {
        let mut ruby = Self { path: Vec::new(), gem_directories: Vec::new(), loaded: BTreeSet::new() };
        let library = join(parent(parent(&program.path)), b"lib");
        let root = join(&library, b"ruby");
        // Debian keeps what depends on the architecture in a directory for that.
        let triplets = files.names(&library).into_iter().map(|name| join(&join(&library, &name), b"ruby"));
        let roots: Vec<_> = std::iter::once(root.clone()).chain(triplets).collect();
        for version in files.names(&root).into_iter().filter(|name| is_version(name)) {
            for kind in [b"site_ruby".as_slice(), b"vendor_ruby", b"."] {
                for root in &roots {
                    ruby.add_to_path(files, join(&join(root, kind), &version));
                }
                ruby.add_to_path(files, join(&root, kind));
            }
            ruby.gem_directories.push(join(&join(&root, b"gems"), &version));
        }
        ruby
    }

    /// Adds a directory of libraries and, inside it, that of the architecture.
    fn add_to_path(&mut self, files: &Files<'_>, directory: Vec<u8>) {
        let Some(found) = files.find_directory(&directory).filter(|found| !self.path.contains(&found.path)) else {
            return;
        };
        let names = files.names(&found.path).into_iter().map(|name| join(&found.path, &name));
        let inner = names.filter(|inner| files.find_file(&join(inner, b"rbconfig.rb")).is_some());
        let inner: Vec<_> = inner.collect();
        self.path.push(found.path);
        self.path.extend(inner);
    }

    /// Adds the descriptions of all gems, which RubyGems reads, and puts their libraries into the path.
    fn add_gems(&mut self, search: &mut Search<'_>) {
        let home = search.config.variable("GEM_HOME").map(<[u8]>::to_vec);
        self.gem_directories.extend(home);
        for directory in self.gem_directories.clone() {
            for specifications in [b"specifications/default".as_slice(), b"specifications"] {
                let specifications = join(&directory, specifications);
                for name in search.files.names(&specifications).iter().filter(|name| name.ends_with(b".gemspec")) {
                    search.add_path(&join(&specifications, name), SOURCE_LEN_MAX, hot_reason::RUNTIME);
                }
            }
            let gems = join(&directory, b"gems");
            for name in search.files.names(&gems).into_iter().take(GEM_COUNT_MAX) {
                let library = join(&join(&gems, &name), b"lib");
                if search.files.find_directory(&library).is_some() {
                    self.path.push(library);
                }
            }
        }
    }

    /// Loads libraries with everything that these require, in the order in which Ruby reads the files.
    fn load_all(&mut self, search: &mut Search<'_>, process: &mut Process, required: Vec<Required>) {
        let mut pending = required;
        pending.reverse();
        while let Some(required) = pending.pop().filter(|_| !search.files.is_over()) {
            let Some(found) = self.resolve(&search.files, &required) else { continue };
            let mut inner = self.load(search, process, &found, hot_reason::RUNTIME);
            inner.reverse();
            if pending.len() + inner.len() <= PENDING_COUNT_MAX {
                pending.extend(inner);
            }
        }
    }

    fn resolve(&self, files: &Files<'_>, required: &Required) -> Option<Found> {
        let name = required.name.as_bytes();
        let find = |directory: &Vec<u8>| {
            let path = join(directory, name);
            let ends = [b".rb".as_slice(), b".so", b""];
            ends.iter().find_map(|end| files.find_file(&[path.as_slice(), end].concat()))
        };
        match &required.relative_to {
            Some(directory) => find(directory),
            None => self.path.iter().take_while(|_| !files.is_over()).find_map(find),
        }
    }

    /// Adds a file; returns what it requires.
    fn load(&mut self, search: &mut Search<'_>, process: &mut Process, found: &Found, reason: u32) -> Vec<Required> {
        if self.loaded.len() >= FILE_COUNT_MAX || !self.loaded.insert(found.inode) {
            return Vec::new();
        }
        if base_name(&found.path).ends_with(b".so") {
            process.open_module(search, found, reason);
            return Vec::new();
        }
        search.add_file(found, reason);
        let source = search.files.read_file(found.inode, SOURCE_LEN_MAX);
        let source = source.map(|source| String::from_utf8_lossy(&source).into_owned()).unwrap_or_default();
        required(&source, parent(&found.path))
    }
}

/// Whether a directory is that of a version, such as `3.1.0`.
fn is_version(name: &[u8]) -> bool {
    name.first().is_some_and(u8::is_ascii_digit) && name.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.')
}

/// What a source in `directory` requires by literal names, outside its methods.
fn required(source: &str, directory: &[u8]) -> Vec<Required> {
    let mut required = Vec::new();
    // Indentation of the method that is left out now: its `end` stands below its `def`.
    let mut method: Option<usize> = None;
    for line in source.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if let Some(outer) = method {
            let ends = indent == outer && text.starts_with("end");
            method = (!ends).then_some(outer);
            continue;
        }
        if text.starts_with("def ") {
            // A method of one line: `def name = value` or `def name; end`.
            let is_closed = text.contains(" = ") || text.trim_end().ends_with("end");
            method = (!is_closed).then_some(indent);
            continue;
        }
        let word_len = text.find(|char: char| !char.is_ascii_lowercase() && char != '_').unwrap_or(text.len());
        let (word, rest) = text.split_at(word_len);
        if word != REQUIRE && word != REQUIRE_RELATIVE {
            continue;
        }
        let rest = rest.trim_start_matches([' ', '(']);
        let Some(quote) = rest.chars().next().filter(|char| matches!(char, '\'' | '"')) else { continue };
        let Some((name, _)) = rest[1..].split_once(quote) else { continue };
        let relative_to = (word == REQUIRE_RELATIVE).then(|| directory.to_vec());
        required.push(Required { name: name.to_owned(), relative_to });
    }
    required
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_names_outside_methods_are_required() {
        let source = "require 'a'\n  require(\"b/c\") if x\nrequire_relative 'd'\nrequire name\nrequirement 'e'\n\
            class F\n  def g\n    require 'h'\n  end\n  def i = require('j')\n  require 'k'\nend\n";
        let names: Vec<_> =
            required(source, b"/app").into_iter().map(|required| (required.name, required.relative_to)).collect();
        let expected = [("a", None), ("b/c", None), ("d", Some(b"/app".to_vec())), ("k", None)];
        assert_eq!(names, expected.map(|(name, directory)| (name.to_owned(), directory)));
    }
}
