//! Merged tree of an image, FUSE session, control socket.

pub mod control;
