//! FUSE session, mounts, control socket.
//!
//! `lazuli-fused` ([`Daemon`]) shows the trees of a node in one session and is asked over its control socket (crate `control`);
//! [`mount_image`] shows one image without a daemon. In kernel mode each tree is an EROFS mount of its own
//! ([`erofs_mount`]) whose content comes from the session, or from complete cache files. The crate `tree` merges layers
//! and writes EROFS images.
//! Bytes come from `storage`, which asks the sources that a [`SourceFactory`] makes.
//!
//! Words: a *tree* is what a container sees of an image; a *session* is one FUSE mount; a *slot* is the
//! place of a tree among the node numbers of the session.

mod choice;
mod connection;
pub mod daemon;
pub mod description;
pub mod erofs_mount;
pub mod error;
pub mod factory;
mod fs;
mod kernel_mounts;
pub mod mount;
mod mounts;
mod namespace;
mod number;
mod pool;
mod read_ahead;
mod reading;
mod recording;
mod server;
mod service;
mod session;
mod starts;
mod store;
mod sync;
mod tree;
mod trees;
mod users;
mod waits;

pub use daemon::{Daemon, DaemonOptions, Ended};
pub use error::Error;
pub use factory::SourceFactory;
pub use mount::{Mount, MountOptions, mount_image};
pub use recording::TouchedFile;
pub use session::SessionOptions;
