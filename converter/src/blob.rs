//! One blob as it comes in: from a file or a connection, through its digest and its decompression.

pub mod file_source;
pub mod reader;
pub mod spool;
pub(crate) mod stages;
pub(crate) mod thread;
