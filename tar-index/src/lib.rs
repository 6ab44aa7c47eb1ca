//! The index that a layer must have, read off its tar stream.
//!
//! A converter makes indexes with it, `lazuli check` and a node compare indexes with it. It reads what containerd's
//! unpack reads, refuses what that refuses, and takes bounded memory whatever the stream is.
//!
//! `walker.rs` finds the entries of a stream (`header.rs`, `pax.rs`), `tree.rs` says what they mean together
//! (`attributes.rs`, `acl.rs`), `layer_index.rs` makes an index of that, `compare.rs` holds another index against it.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod acl;
mod attributes;
pub mod compare;
mod header;
#[allow(clippy::indexing_slicing, reason = "numbers of nodes are of its own tree")]
pub mod layer_index;
mod pax;
#[allow(clippy::indexing_slicing, reason = "numbers of nodes are of its own tree")]
pub mod tree;
pub mod walker;

pub use pax::Time;

/// Changes whenever equal tar streams begin to give other indexes: what was converted before is then converted again.
pub const TREE_GENERATION: u32 = 1;
