//! The project keeps its own rules: arrows between crates, lints, where `unsafe` stands, one name for a thing, and
//! documents that name only tests, files and headings that there are.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

/// Crate, and the crates of this project that it may use. `docs/ARCHITECTURE.md` draws the same. Whoever has no arrow to
/// `test-kit` may use it in tests alone (`dev-dependencies`).
const ARROWS: [(&str, &[&str]); 13] = [
    ("format-spec", &[]),
    ("control", &["format-spec"]),
    ("tar-index", &["format-spec"]),
    ("storage", &["format-spec", "tar-index"]),
    ("registry", &["format-spec", "storage"]),
    ("tree", &["format-spec"]),
    ("fusefs", &["format-spec", "control", "tree", "storage", "registry"]),
    ("converter", &["format-spec", "tar-index", "tree", "storage", "registry"]),
    ("lazuli", &["format-spec", "control", "storage", "registry", "converter", "fusefs"]),
    ("snapshotter", &["format-spec", "control"]),
    ("test-kit", &["format-spec", "storage"]),
    (
        "tests",
        &["format-spec", "control", "tree", "storage", "registry", "fusefs", "converter", "snapshotter", "test-kit"],
    ),
    (
        "fuzz",
        &[
            "format-spec",
            "control",
            "tar-index",
            "tree",
            "storage",
            "registry",
            "fusefs",
            "converter",
            "snapshotter",
            "test-kit",
        ],
    ),
];

/// `registry` is for the program alone: the library takes any source of bytes.
const PROGRAM_ONLY: [(&str, &str, &str); 1] = [("fusefs", "registry", "main.rs")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace").to_owned()
}

fn manifest(crate_name: &str) -> toml::Table {
    let path = root().join(crate_name).join("Cargo.toml");
    fs::read_to_string(&path).expect("every crate has a manifest").parse().expect("manifests are TOML")
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a source directory").map(|entry| entry.expect("readable").path()) {
        if entry.is_dir() {
            found.extend(sources(&entry));
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
    found.sort();
    found
}

#[test]
fn crates_depend_along_the_arrows_only() {
    let allowed: BTreeMap<_, _> = ARROWS.into();
    for (name, allowed_dependencies) in &allowed {
        let manifest = manifest(name);
        for section in ["dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(|section| section.as_table()) else { continue };
            for dependency in dependencies.keys().filter(|dependency| allowed.contains_key(dependency.as_str())) {
                assert!(allowed_dependencies.contains(&dependency.as_str()), "{name} must not use {dependency}");
            }
        }
    }
}

#[test]
fn libraries_leave_to_programs_what_is_theirs() {
    for (crate_name, dependency, program) in PROGRAM_ONLY {
        for source in sources(&root().join(crate_name).join("src")) {
            let text = fs::read_to_string(&source).expect("readable");
            let uses = text.contains(&format!("{dependency}::")) || text.contains(&format!("use {dependency}"));
            assert!(!uses || source.ends_with(program), "{} must not use {dependency}", source.display());
        }
    }
}

#[test]
fn every_crate_opts_into_the_lints_of_the_workspace() {
    for (name, _) in ARROWS {
        let lints = manifest(name).get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        assert_eq!(lints, Some(true), "{name}");
    }
}

#[test]
fn unsafe_code_stands_in_one_file_a_crate_at_most() {
    for (name, _) in ARROWS {
        let allowing: Vec<_> = sources(&root().join(name).join("src"))
            .into_iter()
            .filter(|source| fs::read_to_string(source).expect("readable").contains("allow(unsafe_code)"))
            .collect();
        assert!(allowing.len() <= 1, "{name}: {allowing:?}");
    }
}

#[test]
fn no_test_is_switched_off() {
    let switched_off = ["#[", "ignore"].concat();
    for (name, _) in ARROWS {
        for source in sources(&root().join(name)) {
            let text = fs::read_to_string(&source).expect("readable");
            assert!(!text.contains(&switched_off), "{}", source.display());
        }
    }
}

/// Between backticks, `docs/SEMANTICS.md` has file names and names of tests; the latter have no slash and no dot.
#[test]
fn every_test_that_the_semantics_name_exists() {
    let text = fs::read_to_string(root().join("docs/SEMANTICS.md")).expect("readable");
    let code: String =
        ["tar-index/src", "tree/src", "control/src", "converter/src", "fusefs/src", "fusefs/tests", "tests/tests"]
            .iter()
            .flat_map(|directory| sources(&root().join(directory)))
            .map(|source| fs::read_to_string(source).expect("readable"))
            .collect();
    let is_test_name = |word: &&str| {
        // Names of constants have capitals.
        let is_of_name =
            |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_';
        word.contains('_') && word.chars().all(is_of_name)
    };
    let names: Vec<_> = text.split('`').skip(1).step_by(2).filter(is_test_name).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        assert!(
            // Some take a mode, and a macro makes a test for each.
            code.contains(&format!("#[test]\nfn {name}()"))
                || code.contains(&format!("#[test]\n    fn {name}()"))
                || code.contains(&format!("\nfn {name}(mode: Mode)")),
            "{name}"
        );
    }
}

/// The functions that have the attribute of a test.
fn test_names(code: &str) -> HashSet<&str> {
    let mut names = HashSet::new();
    let mut is_test = false;
    for line in code.lines().map(str::trim_start) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) {
            names.extend(rest.split('(').next());
            is_test = false;
        }
    }
    names
}

/// Between backticks, `docs/PROMISES.md` has names of tests, which have underscores, rows of the torture (`row:NAME`),
/// and words of other kinds.
#[test]
fn every_test_that_the_promises_name_exists() {
    let text = fs::read_to_string(root().join("docs/PROMISES.md")).expect("readable");
    let code: String = ARROWS
        .iter()
        .flat_map(|(name, _)| sources(&root().join(name)))
        .map(|source| fs::read_to_string(source).expect("readable"))
        .collect();
    let names = test_names(&code);
    let rows = fs::read_to_string(root().join("tests/tests/torture/rows.rs")).expect("readable");
    let words: Vec<_> = text.split('`').skip(1).step_by(2).collect();
    let is_test_name = |word: &str| {
        word.matches('_').count() > 1
            && word.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
    };
    let (mut tests, mut rows_named) = (0, 0);
    for word in words {
        if let Some(row) = word.strip_prefix("row:") {
            assert!(rows.contains(&format!("\"{row}\", ")), "no row of the torture is called {row}");
            rows_named += 1;
        } else if is_test_name(word) {
            assert!(names.contains(word), "no test is called {word}");
            tests += 1;
        }
    }
    assert!(tests > 40 && rows_named > 15, "{tests} tests, {rows_named} rows");
}

/// Between backticks, these pages have names of options, files and of tests; the latter are sentences.
#[test]
fn every_test_that_the_pages_on_trust_and_architecture_name_exists() {
    let directories = [
        "format-spec/tests",
        "control/src",
        "lazuli/src",
        "lazuli/tests",
        "storage/tests",
        "tree/src",
        "fusefs/src",
        "fusefs/tests",
        "fuzz/tests",
        "snapshotter/src",
        "snapshotter/tests",
        "tests/tests",
    ];
    let sources = directories.iter().flat_map(|directory| sources(&root().join(directory)));
    let code: String = sources.map(|source| fs::read_to_string(source).expect("readable")).collect();
    let is_test_name = |word: &&str| {
        let is_name =
            |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_';
        word.chars().all(is_name) && word.matches('_').count() > 2
    };
    for (page, count_min) in [("TRUST", 25), ("ARCHITECTURE", 8)] {
        let text = fs::read_to_string(root().join(format!("docs/{page}.md"))).expect("readable");
        let names: Vec<_> = text.split('`').skip(1).step_by(2).filter(is_test_name).collect();
        assert!(names.len() > count_min, "{page}: {names:?}");
        for name in names {
            assert!(code.contains(&format!("fn {name}(")), "{page}: {name}");
        }
    }
}

/// All documents, by their paths.
fn documents() -> Vec<(PathBuf, String)> {
    let beside = ["README.md", "CHANGELOG.md", "CONVENTIONS.md", "format-spec/SPEC.md"].map(|name| root().join(name));
    let docs = fs::read_dir(root().join("docs")).expect("readable").map(|entry| entry.expect("readable").path());
    let mut paths: Vec<_> = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect();
    paths.extend(beside);
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).expect("readable"))).collect()
}

/// The name by which a heading is linked to.
fn anchor_of(heading: &str) -> String {
    let kept = heading.chars().filter(|character| character.is_alphanumeric() || " -_".contains(*character));
    kept.flat_map(char::to_lowercase).map(|character| if character == ' ' { '-' } else { character }).collect()
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut links = 0;
    for (path, text) in documents() {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") || target.contains(' ') {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let at = if file.is_empty() { path.clone() } else { path.parent().expect("a directory").join(file) };
            assert!(at.exists(), "{}: {target}", path.display());
            let is_heading =
                |line: &str| line.starts_with('#') && anchor_of(line.trim_start_matches(['#', ' '])) == anchor;
            if !anchor.is_empty() {
                let there = fs::read_to_string(&at).expect("readable");
                assert!(there.lines().any(is_heading), "{}: {target}", path.display());
            }
            links += 1;
        }
    }
    assert!(links > 30, "{links}");
}

/// Between backticks, the path of a file that begins with a directory of the project is one of it.
#[test]
fn every_file_that_the_documents_name_exists() {
    let directories: HashSet<_> = ARROWS.iter().map(|(name, _)| *name).chain(["docs", "benches", "deploy"]).collect();
    let mut files = 0;
    for (path, text) in documents() {
        for word in text.split('`').skip(1).step_by(2) {
            let Some((first, _)) = word.split_once('/') else { continue };
            let is_path = |character: char| character.is_ascii_alphanumeric() || "/-_.".contains(character);
            let is_file = word.rsplit('/').next().is_some_and(|name| name.contains('.'));
            if directories.contains(first) && is_file && word.chars().all(is_path) {
                assert!(root().join(word).exists(), "{}: {word}", path.display());
                files += 1;
            }
        }
    }
    assert!(files > 60, "{files}");
}

/// The names below the root stand in `control/src/root.rs` alone, and each is explained to operators.
#[test]
fn the_root_directory_has_one_owner() {
    let code = fs::read_to_string(root().join("control/src/root.rs")).expect("readable");
    let names: Vec<_> = code.lines().filter(|line| line.starts_with("pub const")).map(literal).collect();
    assert!(names.len() > 10, "{names:?}");
    let operation = fs::read_to_string(root().join("docs/OPERATION.md")).expect("readable");
    for name in names {
        let top = name.split('/').next().expect("a name");
        assert!(operation.contains(&format!("`{top}`")) || operation.contains(&format!("`{top}/`")), "{name}");
        for path in ["control", "fusefs", "lazuli", "snapshotter"].map(|name| root().join(name).join("src")) {
            for source in sources(&path).iter().filter(|path| !path.ends_with("control/src/root.rs")) {
                let text = fs::read_to_string(source).expect("readable");
                assert!(!text.contains(&format!(".join(\"{name}\")")), "{}: {name}", source.display());
            }
        }
    }
}

/// The text between the quotes of a line.
fn literal(line: &str) -> &str {
    line.split('"').nth(1).expect("a literal")
}

/// Words that other projects have for ours, or that we had ourselves: what has two names is taken for two things. The
/// table of `docs/ARCHITECTURE.md` has those of others, so that a stranger finds ours.
const TWINS: [(&str, &[&str]); 9] = [
    ("frame", &["chunk", "chunks", "span", "spans"]),
    ("index", &["toc", "ztoc", "bootstrap", "blob index"]),
    ("hot pack", &["prefetch pack", "prefetch list", "prefetch table", "prioritized files"]),
    ("plain address space", &["plain space", "uncompressed address space", "logical address space"]),
    ("kernel mode", &["erofs mode", "native mode"]),
    ("portable mode", &["fuse mode", "fallback mode"]),
    ("cache file", &["data file", "backing file", "chunk map"]),
    ("dedup section", &["dedup table", "dedup index", "chunk dictionary"]),
    ("chain ID", &["chain digest", "chain hash"]),
];

/// Where a word is that of somebody else's subject: uploads of the OCI distribution specification, and EROFS's files.
const OWN_WORDS: [(&str, &[&str]); 4] = [
    ("registry/src", &["chunk", "chunks"]),
    ("tree/src/erofs", &["chunk", "chunks"]),
    ("tree/src/erofs.rs", &["chunk"]),
    ("CHANGELOG.md", &["chunks"]),
];

#[test]
fn every_thing_has_one_name_in_documents_and_comments() {
    let comments = |path: &Path| {
        let text = fs::read_to_string(path).expect("readable");
        let lines = text.lines().map(str::trim_start).filter(|line| line.starts_with("//"));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    let crates = ARROWS.iter().map(|(name, _)| root().join(name).join("src"));
    let code = crates.flat_map(|directory| sources(&directory)).map(|path| (path.clone(), comments(&path)));
    let mut found = Vec::new();
    for (path, text) in documents().into_iter().chain(code) {
        for line in text.lines() {
            // A row that has our word has theirs for who looks for it; the words of others stand beside their names.
            if path.ends_with("docs/ARCHITECTURE.md") && line.starts_with('|') {
                continue;
            }
            let spoken: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
            let words: Vec<_> = spoken.split(|character: char| !character.is_alphanumeric()).collect();
            let spoken = format!(" {} ", words.join(" ").to_lowercase());
            for (ours, theirs) in TWINS {
                for twin in theirs {
                    let is_own =
                        |(at, words): &(&str, &[&str])| path.starts_with(root().join(at)) && words.contains(twin);
                    if spoken.contains(&format!(" {twin} ")) && !OWN_WORDS.iter().any(is_own) {
                        found.push(format!("{}: {twin} is {ours}: {line}", path.display()));
                    }
                }
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
