//! containerd's own suite for snapshotters, over gRPC against the real daemon: for ordinary layers, on top
//! of a lazy image, and with every layer lazy. `tests/conformance` has the Go side.

use std::{collections::BTreeMap, fs};

use lazuli_tests::{Finished, Result, Scratch, TestRegistry, conformance, process::finish};

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
    let arguments = ["-test.v", "-test.run", &format!("^{suite}$")];
    let finished = finish(conformance::suite(&scratch, &registry, &arguments)?.env("LAZULI_MODE", mode))?;
    fs::write(scratch.log("suite"), &finished.stdout).expect("the log can be written");
    Ok(finished)
}

/// Case and outcome in a line such as `--- PASS: TestSuite/Case (0.01s)`.
fn outcome<'a>(line: &'a str, suite: &str) -> Option<(&'a str, &'a str)> {
    let (outcome, rest) = line.trim_start().strip_prefix("--- ")?.split_once(": ")?;
    let case = rest.strip_prefix(suite)?.strip_prefix('/')?.split_whitespace().next()?;
    Some((case, outcome))
}
