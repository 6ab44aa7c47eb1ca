//! Frames by digest: fetched once, verified, decompressed, kept.
//!
//! A [`Cache`] is a directory with one subdirectory a [`Layer`]. A layer's *plain address space* holds
//! the content of all its files; the index maps it to *frames* of the layer blob. A read names a range
//! of that space; the frames that hold it are fetched from a [`Source`] unless they are there, each is
//! checked against its digest before anything else looks at it, decompressed, written where it belongs
//! in the layer's sparse file, and its readers are called back.
//!
//! What stays outside: how a registry is spoken to (`registry` implements [`Source`]), what the files of
//! a layer are called (`fusefs` reads the index), and who decides that a layer is no longer needed.
//!
//! `layer.rs` is the way of a read, `bring.rs` decides how what it misses comes: `dedup.rs` copies it from
//! another layer, `hot_pack.rs` receives what a start-up reads, `scheduler.rs` decides what else is requested
//! and `transfer.rs` carries a request out. `frame_store.rs` keeps it all, `presence.rs` knows what is there,
//! `unpack.rs` makes indexes of what is fetched, `directory.rs` keeps the files and `disk.rs` changes them.

mod bitmap;
mod bring;
pub mod cache;
mod decode;
mod dedup;
mod directory;
pub mod disk;
pub mod error;
mod frame_store;
mod gaps;
mod hot_pack;
pub mod layer;
pub mod mapping;
mod places;
mod presence;
mod proof;
mod ranges;
mod read_ahead;
mod scheduler;
pub mod source;
mod transfer;
mod unpack;
mod verify;
mod wait;

pub use cache::{Cache, CacheOptions, KnownLayer, RestOptions};
pub use disk::create_private_directory;
pub use error::{CacheError, ReadError};
pub use layer::{Activity, Layer, LayerIndex, Priority, Progress};
pub use proof::Verdict;
pub use scheduler::{RequestLimits, RequestOptions};
pub use source::{ByteStream, FetchFuture, FetchWideFuture, Source, SourceError, SourceErrorKind, Sources, WideStream};
