//! The Go side of the tests: containerd's own suite for snapshotters, and benchmarks, in `tests/conformance`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::{
    error::{HarnessError, Result},
    process::{command, require_program, run},
    programs::{program, target_directory},
    registry_server::TestRegistry,
    scratch::Scratch,
};

/// The program of the suite, with these arguments: it works in `scratch` and has its images in `registry`.
///
/// # Errors
///
/// When it cannot be compiled, or the programs that it tests have not been built.
pub fn suite(scratch: &Scratch, registry: &TestRegistry, arguments: &[&str]) -> Result<Command> {
    let mut suite = command(compiled()?, arguments);
    suite
        .env("TMPDIR", scratch.path())
        .env("REGISTRY", registry.address())
        .env("LAZULI", program("lazuli")?)
        .env("LAZULI_SNAPSHOTTER", program("lazuli-snapshotter")?);
    Ok(suite)
}

/// Compiles it once a process.
fn compiled() -> Result<&'static Path> {
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
