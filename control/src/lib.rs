//! How the programs of a node meet: what is asked over the control socket of `lazuli-fused` and answered
//! ([`protocol`]), descriptors that travel with it ([`descriptor`]), names below the root that more than one of them
//! knows, options that they have in common, and their logs.
//!
//! `lazuli-fused` serves the socket, `lazuli-snapshotter` and `lazuli status` ask it. Neither needs the other's crate.

pub mod chains;
mod client;
mod dedup_scope;
pub mod descriptor;
pub mod id_mapped;
pub mod log;
mod mode;
pub mod protocol;

/// Where layers lie below the root, each in a directory of the name of its id.
pub const LAYER_CACHES: &str = "cache/layers";
/// Where `lazuli-fused` listens, below the root.
pub const SOCKET: &str = "fused.sock";

pub use client::{exchange, request_line};
pub use dedup_scope::{DedupScope, UnknownScope};
pub use mode::Mode;
pub use protocol::*;
