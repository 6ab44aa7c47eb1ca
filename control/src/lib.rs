//! How the programs of a node meet: what is asked over the control socket of `lazuli-fused` and answered
//! ([`protocol`]), descriptors that travel with it ([`descriptor`]), what lies below the root directory that they
//! share ([`root`]), options that they have in common, and their logs.
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
pub mod root;
mod waits;

pub use client::{exchange, request_line};
pub use dedup_scope::{DedupScope, UnknownScope};
pub use mode::Mode;
pub use protocol::*;
pub use waits::{LayerWaits, PastWait, WaitCause};
