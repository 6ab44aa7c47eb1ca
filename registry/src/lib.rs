//! OCI distribution client: manifests, blobs by range, push.
//!
//! [`Client`] speaks to any registry; [`Reference`] names an image in one; [`BlobSource`] makes one blob
//! of a repository readable by range for `storage`. Authentication, retries and resuming after a broken
//! connection happen inside and are bounded by [`ClientOptions`].
//!
//! Words: a *host* is the registry as written in a reference (`registry.example.com:5000`); *patience*
//! is how long an operation goes on trying without having got anywhere.
//!
//! Blob content is not verified here: whoever knows a digest of what he reads checks it. Manifests are.
//! Not here: mirrors and client certificates per host (`hosts.toml`), chunked upload.

mod auth;
mod blob;
mod client;
mod credentials;
mod error;
mod manifest;
mod options;
mod push;
mod reference;
mod retry;
mod source;
mod transport;

pub use client::Client;
pub use error::Error;
pub use manifest::{MANIFEST_LEN_MAX, Manifest, media_type};
pub use options::ClientOptions;
pub use push::{BlobContent, Progress};
pub use reference::{ParseReferenceError, Reference};
pub use source::BlobSource;
