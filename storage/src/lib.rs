//! Frames by digest: fetched once, verified, decompressed, kept.

pub mod cache;
pub mod error;
pub mod layer;
pub mod source;

pub use cache::{Cache, CacheOptions, KnownLayer};
pub use error::{CacheError, ReadError};
pub use layer::{Layer, LayerIndex, Priority, Progress};
pub use source::{ByteStream, FetchFuture, Source, SourceError};
