//! Image in, lazy image out; checks and looks at images. The command `lazuli` lies beside this crate.
//!
//! `blob/` reads one blob as it streams in, `layer/` makes a lazy layer of it, `image/` knows where images are and how
//! they are described. On these stand `convert/`, `check/` and `inspect/`, one for each thing that a user asks for.
//! `hot_set/` finds what a start of an image reads. No clap, no gRPC, no FUSE.

pub mod blob;
pub mod check;
pub mod convert;
pub mod hot_set;
pub mod image;
pub mod inspect;
pub mod layer;
