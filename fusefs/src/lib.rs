//! Merged tree of an image, FUSE session, control socket.

pub mod control;
pub mod error;
pub mod factory;
pub mod merge;
pub mod mount;

pub use error::Error;
pub use factory::SourceFactory;
pub use mount::{Mount, mount_image};
