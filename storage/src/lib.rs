//! Frames by digest: fetched once, verified, decompressed, kept.

pub mod source;

pub use source::{ByteStream, FetchFuture, Source, SourceError};
