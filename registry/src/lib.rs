//! OCI distribution client: manifests, blobs by range, push.
//!
//! [`Client`] speaks to any registry; [`Reference`] names an image in one; [`BlobSource`] makes one blob
//! of a repository readable by range for `storage`. Authentication, retries and resuming after a broken
//! connection happen inside and are bounded by [`ClientOptions`].
//!
//! Words: a *registry* is what is written in a reference (`registry.example.com:5000`); an *endpoint* is a host
//! that answers for it, the registry itself or a mirror of `hosts.toml`; *patience* is how long an operation goes
//! on trying without having got anywhere.
//!
//! Blob content is not verified here: whoever knows a digest of what he reads checks it. Manifests are.

mod auth;
mod begun;
mod blob;
mod chunks;
mod client;
mod credentials;
mod docker_config;
mod download;
mod endpoint;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod gates;
mod growing;
mod helper;
mod hosts;
mod hosts_dir;
mod http;
mod manifest;
mod mirrors;
mod options;
mod pace;
mod part;
mod push;
mod race;
mod redirects;
mod reference;
mod referrers;
mod resolver;
mod retry;
mod source;
mod transport;
mod upload;

pub use client::Client;
pub use error::Error;
pub use growing::{GrowingFile, Growth, UncommittedBlob};
pub use manifest::{MANIFEST_LEN_MAX, Manifest, media_type};
pub use options::{ClientOptions, PlainHttp};
pub use reference::{ParseReferenceError, Reference};
pub use referrers::Referrer;
pub use source::BlobSource;
pub use upload::{BlobContent, Progress};
