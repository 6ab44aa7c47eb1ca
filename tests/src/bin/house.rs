//! `house [DIRECTORY]`: how long functions and files of a workspace are, and which modules need each other in a circle.
//! Without a directory, of this one. `lazuli_tests::house` says how it counts.
//!
//! Exit codes: 0 measured, 1 the sources cannot be measured, 2 wrong usage or no workspace.

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use lazuli_tests::house::{
    FILE_LINES_MAX, FUNCTION_LINES_MAX, Figures, Function, HouseError, Module, TEST_CRATES, measure, percentile,
    read_workspace,
};

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let directory = match arguments.as_slice() {
        [] => own_workspace(),
        [directory] if !directory.as_encoded_bytes().starts_with(b"-") => PathBuf::from(directory),
        _ => {
            eprintln!("usage: house [DIRECTORY]");
            return ExitCode::from(2);
        }
    };
    let crates =
        read_workspace(&directory).and_then(|crates| crates.iter().map(measure).collect::<Result<Vec<_>, _>>());
    match crates {
        Ok(crates) => {
            io::stdout().write_all(report(&crates).as_bytes()).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("house: {error}");
            ExitCode::from(if matches!(error, HouseError::NoWorkspace(_)) { 2 } else { 1 })
        }
    }
}

/// The workspace that this program was built in.
fn own_workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// All that is printed: a table with a row a crate, then the names of what is long and of what is in circles.
fn report(crates: &[Figures]) -> String {
    let (tests, products): (Vec<_>, Vec<_>) =
        crates.iter().partition(|figures| TEST_CRATES.contains(&figures.name.as_str()));
    let total = Figures::together("total", products.iter().copied());
    let mut text = format!(
        "{:14}{:>10}{:>7}{:>5}{:>5}{:>5}  {:>6}{:>5}{:>5}  {:>14}\n",
        "", "functions", "median", "p90", "p99", ">60", "files", "p90", ">500", "in circles",
    );
    text.extend(products.iter().copied().chain([&total]).map(row));
    text.push_str("\ntest code\n");
    text.extend(tests.into_iter().map(row));
    text.push_str(&format!("\nfunctions over {FUNCTION_LINES_MAX} lines\n"));
    text.extend(crates.iter().flat_map(Figures::long_functions).map(function_line));
    text.push_str(&format!("\nfiles over {FILE_LINES_MAX} lines\n"));
    text.extend(crates.iter().flat_map(Figures::long_files).map(file_line));
    text.extend(crates.iter().flat_map(circle_lines));
    text
}

fn row(figures: &Figures) -> String {
    let functions = |percent| percentile(figures.functions.iter().map(|function| function.line_count), percent);
    let file_count = figures.modules.len();
    let in_circles: usize = figures.circles().iter().map(|circle| circle.len()).sum();
    format!(
        "{:14}{:>10}{:>7}{:>5}{:>5}{:>5}  {:>6}{:>5}{:>5}  {:>7}{:>5} %\n",
        figures.name,
        figures.functions.len(),
        functions(50),
        functions(90),
        functions(99),
        figures.long_functions().count(),
        file_count,
        percentile(figures.modules.iter().map(|module| module.line_count), 90),
        figures.long_files().count(),
        in_circles,
        (in_circles * 100).checked_div(file_count).unwrap_or(0),
    )
}

fn function_line(function: &Function) -> String {
    format!("  {}:{} {}: {}\n", function.file.display(), function.line, function.name, function.line_count)
}

fn file_line(module: &Module) -> String {
    format!("  {}: {}\n", module.file.display(), module.line_count)
}

/// Each circle of a crate: its modules, and those of the circle that each uses.
fn circle_lines(figures: &Figures) -> Vec<String> {
    let src = Path::new(&figures.name).join("src");
    let name = |file: &Path| file.strip_prefix(&src).unwrap_or(file).with_extension("").display().to_string();
    let mut lines = Vec::new();
    for circle in figures.circles() {
        lines.push(format!("\n{}: a circle of {} modules\n", figures.name, circle.len()));
        for module in figures.modules.iter().filter(|module| circle.contains(module.file.as_path())) {
            let uses = module.uses.iter().filter(|other| circle.contains(other.as_path()));
            let uses: Vec<_> = uses.map(|other| name(other)).collect();
            lines.push(format!("  {} uses {}\n", name(&module.file), uses.join(", ")));
        }
    }
    lines
}
