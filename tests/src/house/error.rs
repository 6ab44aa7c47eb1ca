//! Why a house cannot be measured.

use std::{io, path::PathBuf};

/// The house could not be measured; the message says where, on one line.
#[derive(Debug, thiserror::Error)]
pub enum HouseError {
    /// The directory holds no workspace.
    #[error("{} has no Cargo.toml with members of a workspace: name the root of one", .0.display())]
    NoWorkspace(PathBuf),
    /// A file or directory could not be read.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file is not Rust as this program's parser knows it.
    #[error("{}:{}: {source}", path.display(), source.span().start().line)]
    NotRust {
        /// The file.
        path: PathBuf,
        /// The line and the complaint of the parser.
        source: syn::Error,
    },
    /// A module is declared that has no file.
    #[error("{} declares the module {module}, but there is no {}", file.display(), expected.display())]
    NoFile {
        /// Where it is declared.
        file: PathBuf,
        /// Its name.
        module: String,
        /// Where it was looked for.
        expected: PathBuf,
    },
}
