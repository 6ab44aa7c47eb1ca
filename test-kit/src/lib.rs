//! For tests of several crates: bytes that do not compress, tar streams, blobs of lazy layers, a source in memory.
//!
//! Nothing here returns an error: whoever calls it made the input, and a panic is a failed test. Programs do without
//! it, and `tests/tests/it/tidy.rs` holds that.
//!
//! A test inside `format-spec` or `storage` (`#[cfg(test)]` in `src`) has types of its own crate that are not those of the
//! library, which this crate gives and takes: it can use only what knows nothing of them.

mod blob;
mod content;
mod source;

pub use blob::{BlobParts, Frames, dedup_location, hot_frame};
pub use content::{gzip, noise, tar};
pub use source::HonestSource;
