//! Image in, lazy image out: the library behind the `lazuli` command.

pub mod archive;
pub mod blob_reader;
pub mod compress;
mod contents;
pub mod convert;
pub mod destination;
pub mod docker_archive;
pub mod file_source;
pub mod frame_reader;
pub mod framer;
mod header;
mod hot_pack;
pub mod hot_set;
pub mod image;
pub mod layer;
pub mod layer_index;
pub mod layout;
pub mod lazy_layer;
pub mod location;
pub mod manifest;
pub mod mount;
pub mod oci_archive;
pub mod oci_directory;
mod pax;
mod plain;
pub mod pull;
pub mod report;
pub mod resolve;
pub mod start_up;
pub mod tree;
pub mod walker;

pub use pax::Time;
