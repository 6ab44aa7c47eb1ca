//! Frames by digest: fetched once, verified, decompressed, kept.

mod bitmap;
pub mod cache;
mod directory;
pub mod error;
mod frame_store;
pub mod layer;
mod mapping;
mod read_ahead;
mod scheduler;
pub mod source;
mod transfer;
mod wait;

pub use cache::{Cache, CacheOptions, KnownLayer};
pub use error::{CacheError, ReadError};
pub use layer::{Layer, LayerIndex, Priority, Progress};
pub use source::{ByteStream, FetchFuture, Source, SourceError};
