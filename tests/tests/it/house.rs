//! The house stays as it was built: what is long, and what is in circles, becomes no more. `house` prints the figures.

use std::{collections::BTreeSet, path::Path, sync::LazyLock};

use lazuli_tests::house::{Figures, HouseError, TEST_CRATES, measure, read_workspace};

/// Functions of more than 60 lines.
const LONG_FUNCTIONS_MAX: usize = 8;

/// Files of more than 500 lines without their tests.
const LONG_FILES: [&str; 7] = [
    "format-spec/src/table.rs",
    "fusefs/src/service.rs",
    "snapshotter/src/snapshotter.rs",
    "storage/src/cache.rs",
    "storage/src/disk/frame_store.rs",
    "storage/src/fetch/scheduler/machine.rs",
    "tree/src/erofs.rs",
];

/// Percent of all modules that may be in circles.
const IN_CIRCLES_PERCENT_MAX: usize = 5;

/// Where modules may use each other in circles: an interpreter is recursive, and all of a registry's parts ask.
const FREE: [&str; 3] = ["converter/src/hot_set", "converter/src/hot_set.rs", "registry"];

/// All crates but those that are test code; reading them takes seconds, so it is done once.
static CRATES: LazyLock<Result<Vec<Figures>, HouseError>> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace");
    let crates = read_workspace(root)?;
    crates.iter().filter(|source| !TEST_CRATES.contains(&source.name.as_str())).map(measure).collect()
});

fn crates() -> &'static [Figures] {
    CRATES.as_ref().expect("the workspace can be read")
}

#[test]
fn functions_over_60_lines_become_no_more() {
    let all = Figures::together("all", crates());
    let long: Vec<_> = all.long_functions().collect();
    assert!(all.functions.len() > 2_000, "{} functions", all.functions.len());
    assert!(long.len() <= LONG_FUNCTIONS_MAX, "{}: {long:#?}", long.len());
}

#[test]
fn no_file_but_those_named_has_over_500_lines() {
    let all = Figures::together("all", crates());
    let long: BTreeSet<_> = all.long_files().map(|module| module.file.as_path()).collect();
    assert_eq!(long, LONG_FILES.map(Path::new).into(), "a file is new here, or no longer long");
}

#[test]
fn few_modules_are_in_circles() {
    let (mut count, mut in_circles) = (0, Vec::new());
    let is_bound = |module: &Path| !FREE.iter().any(|free| module.starts_with(free));
    for figures in crates() {
        count += figures.modules.iter().filter(|module| is_bound(&module.file)).count();
        let circles = figures.circles();
        in_circles
            .extend(circles.iter().flatten().filter(|module| is_bound(module)).map(|module| module.to_path_buf()));
    }
    assert!(count > 150, "{count} modules");
    assert!(
        in_circles.len() * 100 <= count * IN_CIRCLES_PERCENT_MAX,
        "{} of {count}: {in_circles:#?}",
        in_circles.len()
    );
}
