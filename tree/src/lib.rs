//! The merged tree, which is all that a container sees of an image's lazy layers, and its form as an EROFS image.
//!
//! [`merge`](mod@merge) makes one tree of an image's layers by the rules of overlayfs; [`erofs`] writes a tree as an
//! image that the kernel can mount. Bytes in, bytes out: nothing here opens a file, asks a network or mounts.

pub mod erofs;
pub mod merge;
