//! containerd's own suite for snapshotters, over gRPC against the real daemon: for ordinary layers, on top
//! of a lazy image, and with every layer lazy. `tests/conformance` has the Go side.

use std::{collections::BTreeMap, fs, path::Path, path::PathBuf, sync::OnceLock};

use lazuli_tests::{
    Finished, HarnessError, Result, Scratch, TestRegistry,
    process::{command, finish, require_program, run},
    programs::{program, target_directory},
};

/// The cases of the suite, as it spells them, and one of ours.
const CASES: [&str; 22] = [
    "Basic",
    "StatActive",
    "StatComitted",
    "TransitivityTest",
    "PreareViewFailingtest",
    "Update",
    "Remove",
    "Walk",
    "LayerFileupdate",
    "RemoveDirectoryInLowerLayer",
    "Chown",
    "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer",
    "Rename",
    "ViewReadonly",
    "StatInWalk",
    "CloseTwice",
    "RootPermission",
    "128LayersMount",
    "Move",
];
/// The suite leaves it out itself, whatever the snapshotter: overlayfs does not rename a directory of a lower
/// layer. `Move` is ours and has what can be done.
const LEFT_OUT: &str = "Rename";

#[test]
fn ordinary_layers_conform() -> Result<()> {
    conforms("TestOrdinaryLayers", "auto")
}

#[test]
fn layers_on_a_lazy_image_conform() -> Result<()> {
    conforms("TestOnLazyImage", "auto")
}

#[test]
fn layers_on_a_lazy_image_conform_in_portable_mode() -> Result<()> {
    conforms("TestOnLazyImage", "fuse")
}

#[test]
fn lazy_layers_conform() -> Result<()> {
    conforms("TestEveryLayerLazy", "auto")
}

#[test]
fn filters_select_what_containerds_own_select() -> Result<()> {
    let finished = run_suite("TestFilters", "auto")?;
    assert_eq!(finished.code, Some(0), "{}", finished.stdout);
    Ok(())
}

/// Runs one suite; every case must have passed.
fn conforms(suite: &str, mode: &str) -> Result<()> {
    let finished = run_suite(suite, mode)?;
    let found: BTreeMap<_, _> = finished.stdout.lines().filter_map(|line| outcome(line, suite)).collect();
    let expected = CASES.map(|case| (case, if case == LEFT_OUT { "SKIP" } else { "PASS" })).into();
    let printed = &finished.stdout;
    assert_eq!(found, expected, "{printed}");
    assert_eq!(finished.code, Some(0), "{printed}");
    Ok(())
}

fn run_suite(suite: &str, mode: &str) -> Result<Finished> {
    let scratch = Scratch::new(&format!("{suite}-{mode}"))?;
    let registry = TestRegistry::start(&scratch)?;
    let mut tests = command(suite_program()?, ["-test.v", "-test.run", &format!("^{suite}$")]);
    tests
        .env("TMPDIR", scratch.path())
        .env("LAZULI_MODE", mode)
        .env("REGISTRY", registry.address())
        .env("LAZULI", program("lazuli")?)
        .env("LAZULI_SNAPSHOTTER", program("lazuli-snapshotter")?);
    let finished = finish(&mut tests)?;
    fs::write(scratch.log("suite"), &finished.stdout).expect("the log can be written");
    Ok(finished)
}

/// Case and outcome in a line such as `--- PASS: TestSuite/Case (0.01s)`.
fn outcome<'a>(line: &'a str, suite: &str) -> Option<(&'a str, &'a str)> {
    let (outcome, rest) = line.trim_start().strip_prefix("--- ")?.split_once(": ")?;
    let case = rest.strip_prefix(suite)?.strip_prefix('/')?.split_whitespace().next()?;
    Some((case, outcome))
}

/// Compiles the suite once for all tests of this file.
fn suite_program() -> Result<&'static Path> {
    static COMPILED: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let compiled = COMPILED.get_or_init(|| compile().map_err(|error| error.to_string()));
    compiled.as_deref().map_err(|error| HarnessError::Unexpected(error.clone()))
}

/// With the packages of Debian, in the mode of Go that finds them.
fn compile() -> Result<PathBuf> {
    require_program("go")?;
    let (target, output) = (target_directory()?, target_directory()?.join("conformance.test"));
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance");
    let mut compile = command("go", ["test", "-c", "-vet=off", "-o"]);
    compile.arg(&output).arg(".").current_dir(sources);
    compile.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode").env("GOCACHE", target.join("go-cache"));
    run(&mut compile)?;
    Ok(output)
}
