//! The Lazuli layer format: bytes to types and back.
//!
//! `SPEC.md` beside this crate is the normative text; the code follows it, and a test compares every
//! table with the structures here. Nothing in this crate does I/O, and no input makes it panic.
//!
//! Words: a *layer blob* is a sequence of zstd *frames* that decompress to a tar stream, followed by
//! an *index* and a *footer* in skippable frames. The *plain address space* gives every regular file
//! of a layer an aligned offset; the index maps it to frames.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod annotation;
pub mod builder;
pub mod dedup;
pub mod digest;
pub mod footer;
pub mod index;
pub mod limits;
pub mod paths;
pub mod profile;
pub mod records;
pub mod signature;
pub mod table;

pub use annotation::{LayerId, LazyLayer};
pub use builder::{BlobTail, CompressedIndex, IndexBuilder, LayerData};
pub use digest::{Digest, DigestHasher};
pub use footer::Footer;
pub use index::Index;
pub use records::{Dirent, Extent, Frame, HotFrame, HotPiece, IndexLocation, Inode};
pub use signature::{KeyId, LayerSignatures, PublicKey, SigningKey};
pub use table::{FormatError, Unread};
