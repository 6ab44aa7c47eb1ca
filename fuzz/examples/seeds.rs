//! Writes the seeds of all targets into `fuzz/corpus`.

use std::{fs, io, path::Path};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in lazuli_fuzz::TARGETS {
        let directory = corpus.join(target.name);
        fs::create_dir_all(&directory)?;
        for (name, bytes) in lazuli_fuzz::seeds::of(target.name) {
            fs::write(directory.join(name), bytes)?;
        }
    }
    Ok(())
}
