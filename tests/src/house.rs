//! Measures the house: how long functions and files are, and which modules of a crate need each other in a circle.
//!
//! [`read_workspace`] reads; all else are functions of source text, so that old revisions are measured like this one.
//! The command `house` prints the figures; `tests/tests/it/house.rs` holds their limits.
//!
//! Words: a *module* is a file; a *scope* is where a name means something, which is a file or a `mod` between braces in
//! it; a module *uses* another one whose items it names; a *circle* are modules that use each other, be it over others.
//! Code that is compiled for tests alone does not count.

mod error;
mod exempt;
mod scopes;
mod walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

pub use error::HouseError;
use scopes::Scopes;
pub use walk::Function;
use walk::walk;

/// A function with more lines is long: it does not fit a screen.
pub const FUNCTION_LINES_MAX: usize = 60;
/// A file with more lines is long (CONVENTIONS.md, "Files").
pub const FILE_LINES_MAX: usize = 500;
/// The crates that are test code as a whole.
pub const TEST_CRATES: [&str; 3] = ["test-kit", "tests", "fuzz"];

/// The text of one crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrateSource {
    /// Its directory below the root of the workspace, which is its name here.
    pub name: String,
    /// Every file below `src`, by its path below the root of the workspace.
    pub files: BTreeMap<PathBuf, String>,
}

/// A file that is not test code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Path below the root of the workspace.
    pub file: PathBuf,
    /// Its lines without those of test code in it.
    pub line_count: usize,
    /// The other modules of the crate whose items it names.
    pub uses: BTreeSet<PathBuf>,
}

/// The figures of one crate, or of several together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// The crate.
    pub name: String,
    /// Every function.
    pub functions: Vec<Function>,
    /// Every module.
    pub modules: Vec<Module>,
}

impl Figures {
    /// Those of several crates, under one name.
    pub fn together<'a>(name: &str, crates: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = Self { name: name.to_owned(), ..Self::default() };
        for figures in crates {
            all.functions.extend_from_slice(&figures.functions);
            all.modules.extend_from_slice(&figures.modules);
        }
        all
    }

    /// Functions with more lines than [`FUNCTION_LINES_MAX`].
    pub fn long_functions(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| function.line_count > FUNCTION_LINES_MAX)
    }

    /// Files with more lines than [`FILE_LINES_MAX`].
    pub fn long_files(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(|module| module.line_count > FILE_LINES_MAX)
    }

    /// The largest sets of modules that all use each other, be it over others; each has two members at least. A module
    /// and its own parts (`a.rs` and `a/b.rs`) may use each other: they are one thing in several files.
    pub fn circles(&self) -> Vec<BTreeSet<&Path>> {
        let uses: BTreeMap<&Path, _> =
            self.modules.iter().map(|module| (module.file.as_path(), others(module))).collect();
        let reached: BTreeMap<&Path, _> = uses.keys().map(|module| (*module, reached_from(module, &uses))).collect();
        let mut circles = BTreeSet::new();
        for (module, ahead) in &reached {
            let leads_back = |other: &&&Path| reached.get(*other).is_some_and(|back| back.contains(module));
            circles.insert(ahead.iter().filter(leads_back).copied().collect::<BTreeSet<_>>());
        }
        circles.into_iter().filter(|circle| circle.len() > 1).collect()
    }
}

/// The modules that one uses, but for its parts and for that of which it is one.
fn others(module: &Module) -> BTreeSet<&Path> {
    let used = module.uses.iter().map(PathBuf::as_path);
    used.filter(|used| !is_part(used, &module.file) && !is_part(&module.file, used)).collect()
}

/// Whether the file of one module lies in the directory of another one.
fn is_part(part: &Path, whole: &Path) -> bool {
    part.starts_with(whole.with_extension(""))
}

/// The least of `values` that `percent` of them do not exceed; 0 of none.
pub fn percentile(values: impl IntoIterator<Item = usize>, percent: usize) -> usize {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_unstable();
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

/// Reads the sources of all members of the workspace in `root`.
///
/// # Errors
///
/// [`HouseError::NoWorkspace`] where `root` is none, [`HouseError::Read`] where something of it cannot be read.
pub fn read_workspace(root: &Path) -> Result<Vec<CrateSource>, HouseError> {
    let no_workspace = || HouseError::NoWorkspace(root.to_owned());
    let manifest = fs::read_to_string(root.join("Cargo.toml")).map_err(|_| no_workspace())?;
    let manifest: toml::Table = manifest.parse().map_err(|_| no_workspace())?;
    let members = manifest.get("workspace").and_then(|workspace| workspace.get("members"));
    let members = members.and_then(toml::Value::as_array).ok_or_else(no_workspace)?;
    let mut crates = Vec::new();
    for name in members.iter().filter_map(toml::Value::as_str) {
        let mut files = BTreeMap::new();
        read_sources(root, &Path::new(name).join("src"), &mut files)?;
        crates.push(CrateSource { name: name.to_owned(), files });
    }
    Ok(crates)
}

/// Adds the files of Rust below `directory`, which is below `root`.
fn read_sources(root: &Path, directory: &Path, files: &mut BTreeMap<PathBuf, String>) -> Result<(), HouseError> {
    let failed = |path: &Path| {
        let path = root.join(path);
        move |source| HouseError::Read { path, source }
    };
    for entry in fs::read_dir(root.join(directory)).map_err(failed(directory))? {
        let path = directory.join(entry.map_err(failed(directory))?.file_name());
        if root.join(&path).is_dir() {
            read_sources(root, &path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(root.join(&path)).map_err(failed(&path))?;
            files.insert(path, text);
        }
    }
    Ok(())
}

/// Measures one crate: all that its library and its programs reach without tests.
///
/// # Errors
///
/// [`HouseError::NotRust`] and [`HouseError::NoFile`] where the sources are not those of a crate.
pub fn measure(source: &CrateSource) -> Result<Figures, HouseError> {
    let parse = |(path, text): (&PathBuf, &String)| match syn::parse_file(text) {
        Ok(parsed) => Ok((path.clone(), parsed)),
        Err(source) => Err(HouseError::NotRust { path: path.clone(), source }),
    };
    let files = source.files.iter().map(parse).collect::<Result<BTreeMap<_, _>, _>>()?;
    let src = Path::new(&source.name).join("src");
    let roots = files.keys().filter(|path| is_root(path.strip_prefix(&src).unwrap_or(path)));
    let scopes = Scopes::below(roots, &files)?;
    let mut functions = Vec::new();
    let mut modules = BTreeMap::new();
    for (file, found) in walk(&scopes) {
        functions.extend(found.functions);
        let line_count = source.files.get(file).map_or(0, |text| text.lines().count());
        let empty = || Module { file: file.to_owned(), line_count, uses: BTreeSet::new() };
        let module = modules.entry(file).or_insert_with(empty);
        module.line_count = module.line_count.saturating_sub(found.test_line_count);
        module.uses.extend(found.uses);
    }
    Ok(Figures { name: source.name.clone(), functions, modules: modules.into_values().collect() })
}

/// Whether a file, by its path below `src`, is where a library or a program begins.
fn is_root(path: &Path) -> bool {
    let bin = Path::new("bin");
    let is_directory_of_program = path.ends_with("main.rs") && path.parent().and_then(Path::parent) == Some(bin);
    path == Path::new("lib.rs") || path == Path::new("main.rs") || path.parent() == Some(bin) || is_directory_of_program
}

/// All that a module uses, be it over others.
fn reached_from<'a>(module: &'a Path, uses: &BTreeMap<&'a Path, BTreeSet<&'a Path>>) -> BTreeSet<&'a Path> {
    let mut reached = BTreeSet::new();
    let mut pending = vec![module];
    while let Some(module) = pending.pop() {
        let next = uses.get(module).into_iter().flatten();
        pending.extend(next.filter(|next| reached.insert(**next)));
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate `a` with these files below `src`.
    fn crate_of(files: &[(&str, &str)]) -> CrateSource {
        let path = |name: &str| Path::new("a/src").join(name);
        let files = files.iter().map(|(name, text)| (path(name), (*text).to_owned())).collect();
        CrateSource { name: "a".to_owned(), files }
    }

    fn figures_of(files: &[(&str, &str)]) -> Figures {
        measure(&crate_of(files)).expect("the sources are a crate")
    }

    fn functions_of(text: &str) -> Vec<(String, usize, usize)> {
        let functions = figures_of(&[("lib.rs", text)]).functions;
        functions.into_iter().map(|function| (function.name, function.line, function.line_count)).collect()
    }

    /// The modules that `b.rs` uses, beside `lib.rs`, `c.rs` and `c/d.rs`.
    fn uses_of_b(text: &str) -> Vec<String> {
        let lib = "mod b; mod c; mod inline { pub fn f() {} } pub use c::d::{E, F as G}; pub struct Own;";
        let c = "pub mod d; pub use d::*; pub fn own() {}";
        let d = "pub enum E { One } pub struct F; pub fn only() {}";
        let figures = figures_of(&[("lib.rs", lib), ("b.rs", text), ("c.rs", c), ("c/d.rs", d)]);
        let b = figures.modules.iter().find(|module| module.file.ends_with("b.rs")).expect("it is declared");
        b.uses
            .iter()
            .filter_map(|file| file.strip_prefix("a/src").ok())
            .map(|file| file.display().to_string())
            .collect()
    }

    #[test]
    fn a_function_goes_from_its_fn_to_the_closing_brace() {
        let text = "/// Said before.\n#[inline]\npub fn one() {\n    fn within() {}\n}\n";
        assert_eq!(functions_of(text), [("one".to_owned(), 3, 3), ("within".to_owned(), 4, 1)]);
        let text = "trait T {\n    fn open();\n    fn given(\n        &self,\n    ) {\n    }\n}\nimpl T for u8 { fn open() {} }";
        assert_eq!(functions_of(text), [("given".to_owned(), 3, 4), ("open".to_owned(), 8, 1)]);
    }

    #[test]
    fn code_for_tests_alone_does_not_count() {
        let exempt = [
            "#[cfg(test)] mod tests { fn no() {} }",
            "#[cfg(all(test, feature = \"f\"))] fn no() {}",
            "#[cfg(any(test, all(test, unix)))] fn no() {}",
            "#[test] fn no() {}",
            "#[tokio::test(flavor = \"multi_thread\")] async fn no() {}",
            "struct S; impl S { #[cfg(test)] fn no() {} }",
        ];
        for text in exempt {
            assert_eq!(functions_of(text), [], "{text}");
        }
        for text in ["#[cfg(any(test, unix))] fn yes() {}", "#[cfg(not(test))] fn yes() {}", "#[test_like] fn yes() {}"]
        {
            assert_eq!(functions_of(text), [("yes".to_owned(), 1, 1)], "{text}");
        }
    }

    #[test]
    fn files_that_only_tests_reach_do_not_count() {
        let lib = "mod b; mod test_image;\n#[cfg(test)] mod c; #[cfg(test)] #[path = \"../../x.rs\"] mod x;";
        let b = "mod tests; mod d_tests;";
        let others = ["b/tests.rs", "b/d_tests.rs", "test_image.rs", "c.rs", "c/e.rs", "nowhere.rs"];
        let files: Vec<_> = [("lib.rs", lib), ("b.rs", b)].into_iter().chain(others.map(|name| (name, ""))).collect();
        let modules: Vec<_> = figures_of(&files).modules.into_iter().map(|module| module.file).collect();
        assert_eq!(modules, ["a/src/b.rs", "a/src/lib.rs"].map(PathBuf::from));
    }

    #[test]
    fn a_file_is_as_long_as_its_lines_without_tests() {
        let text = "fn one() {}\n\n/// Said before.\n#[cfg(test)]\nmod tests {\n    fn no() {}\n}\n";
        assert_eq!(figures_of(&[("lib.rs", text)]).modules[0].line_count, 2);
    }

    #[test]
    fn programs_and_libraries_have_modules_of_their_own() {
        let library = [("lib.rs", "mod b; pub struct Own;"), ("b.rs", "pub mod d;"), ("b/d/mod.rs", "mod e;")];
        let programs = [("main.rs", "mod c; struct Own;"), ("bin/f.rs", "use a::Own;"), ("bin/g/main.rs", "")];
        let modules = [("b/d/e.rs", "use crate::Own;"), ("c.rs", "use crate::Own; use a::b;"), ("unused.rs", "")];
        let figures = figures_of(&[library, programs, modules].concat());
        assert_eq!(figures.modules.len(), 8);
        let uses: Vec<_> = figures.modules.iter().flat_map(|module| &module.uses).collect();
        assert_eq!(uses, ["a/src/lib.rs", "a/src/main.rs"].map(Path::new));
    }

    #[test]
    fn a_module_uses_those_whose_items_it_names() {
        let cases: [(&str, &[&str]); 17] = [
            ("use crate::c::own;", &["c.rs"]),
            ("use super::c::{self as other, d};", &["c/d.rs", "c.rs"]),
            ("use super::{c::d::*, Own};", &["c/d.rs", "lib.rs"]),
            ("fn f() { use crate::c::own; }", &["c.rs"]),
            ("fn f() -> crate::c::d::F { loop {} }", &["c/d.rs"]),
            ("fn f() { super::inline::f(); }", &["lib.rs"]),
            ("mod within { fn f() { super::super::c::own(); } }", &["c.rs"]),
            ("fn f() { assert!(g(1, crate::c::own())); }", &["c.rs"]),
            ("pub use crate::c::own;", &["c.rs"]),
            ("pub use crate::c::own; fn f() { own() }", &["c.rs"]),
            // Where it is imported from is only its door.
            ("use crate::{E::One, G};", &["c/d.rs"]),
            ("use crate::c::only;", &["c/d.rs"]),
            ("use super::*; fn f(e: E) {}", &["c/d.rs", "lib.rs"]),
            ("use ::c::own; fn f() { ::c::own(); c::own(); std::fs::read(); }", &[]),
            ("pub(in crate::c) fn f() {}", &[]),
            ("/// As [`crate::c::own`].\nfn f() { let c = 1; g(c) }", &[]),
            ("#[cfg(test)] use crate::c::own; mod c { pub fn own() {} } fn f() { c::own() }", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(uses_of_b(text), expected, "{text}");
        }
    }

    #[test]
    fn a_parent_uses_a_child_only_where_it_needs_it_itself() {
        let uses = |parent| {
            let figures = figures_of(&[("lib.rs", parent), ("b.rs", "pub fn f() {}")]);
            figures.modules.into_iter().any(|module| !module.uses.is_empty())
        };
        assert!(!uses("mod b;"));
        assert!(!uses("pub mod b; pub use b::f;"));
        assert!(!uses("mod b; pub(crate) use self::b::*;"));
        assert!(uses("mod b; use b::f;"));
        assert!(uses("mod b; fn g() { b::f() }"));
        assert!(uses("mod b; pub use b::f; fn g() { f() }"));
    }

    #[test]
    fn circles_are_the_modules_that_lead_to_each_other() {
        let module = |(name, uses): (&str, &[&str])| Module {
            file: PathBuf::from(name),
            line_count: 0,
            uses: uses.iter().map(PathBuf::from).collect(),
        };
        let uses: [(&str, &[&str]); 9] = [
            ("g.rs", &["g/h.rs"]),
            ("g/h.rs", &["g.rs"]),
            ("a", &["b", "x"]),
            ("b", &["c"]),
            ("c", &["a"]),
            ("d", &["a", "e"]),
            ("e", &["d"]),
            ("f", &["d"]),
            ("x", &[]),
        ];
        let figures = Figures { modules: uses.map(module).to_vec(), ..Figures::default() };
        let circles = [["a", "b", "c"].as_slice(), &["d", "e"]];
        assert_eq!(figures.circles(), circles.map(|circle| circle.iter().map(Path::new).collect()));
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let of = |values: &[usize]| [50, 90, 100].map(|percent| percentile(values.iter().copied(), percent));
        assert_eq!(of(&[]), [0, 0, 0]);
        assert_eq!(of(&[7]), [7, 7, 7]);
        assert_eq!(of(&[10, 9, 8, 7, 6, 5, 4, 3, 2, 1]), [5, 9, 10]);
    }

    #[test]
    fn errors_say_where() {
        let error = |files: &[(&str, &str)]| measure(&crate_of(files)).expect_err("no crate").to_string();
        assert_eq!(error(&[("lib.rs", "fn f() {}\nfn 1")]), "a/src/lib.rs:2: expected identifier");
        let expected = "a/src/lib.rs declares the module b, but there is no a/src/b.rs";
        assert_eq!(error(&[("lib.rs", "mod b;")]), expected);
        let error = read_workspace(Path::new("/proc/self")).expect_err("no workspace").to_string();
        assert_eq!(error, "/proc/self has no Cargo.toml with members of a workspace: name the root of one");
    }
}
