//! FUSE session, mounts, control socket.
//!
//! `lazuli-fused` ([`Daemon`]) shows the trees of a node in one session and is asked over the [`control`] socket;
//! [`mount_image`] shows one image without a daemon. In kernel mode ([`Mode`]) each tree is an EROFS mount of its own
//! ([`erofs_mount`]) whose content comes from the session, or from complete cache files. The crate `tree` merges layers
//! and writes EROFS images.
//! Bytes come from `storage`, which asks the sources that a [`SourceFactory`] makes.
//!
//! Words: a *tree* is what a container sees of an image; a *session* is one FUSE mount; a *slot* is the
//! place of a tree among the node numbers of the session.

pub mod chains;
mod connection;
pub mod control;
pub mod daemon;
mod dedup_scope;
pub mod descriptor;
pub mod erofs_mount;
pub mod error;
pub mod factory;
mod fs;
pub mod id_mapped;
mod kernel_mounts;
pub mod log;
pub mod mode;
pub mod mount;
mod mounts;
mod namespace;
mod number;
mod pool;
mod reading;
mod server;
mod service;
mod session;
mod store;
mod tree;
mod trees;
mod users;

/// Where layers lie below the root, each in a directory of the name of its id.
pub const LAYER_CACHES: &str = "cache/layers";

pub use daemon::{Daemon, DaemonOptions, Ended};
pub use dedup_scope::{DedupScope, UnknownScope};
pub use error::Error;
pub use factory::SourceFactory;
pub use mode::Mode;
pub use mount::{Mount, mount_image};
pub use session::SessionOptions;
