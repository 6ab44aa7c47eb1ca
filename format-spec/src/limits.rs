//! The most that a reader accepts (SPEC.md 9): every bound that keeps a few bytes from becoming many.

/// Most bytes a frame may decompress to (SPEC.md 9): bounds what a reader allocates for one.
pub const FRAME_PLAIN_LEN_MAX: u32 = 4 << 20;
/// Most bytes a frame may have compressed: zstd's worst case over [`FRAME_PLAIN_LEN_MAX`], rounded up.
pub const FRAME_COMPRESSED_LEN_MAX: u32 = FRAME_PLAIN_LEN_MAX + (1 << 16);
/// Most bytes of plain address space (SPEC.md 9) beside those of [`SPACE_PER_FRAME_BYTE`].
pub const SPACE_LEN_FREE: u64 = 16 << 30;
/// Further bytes of plain address space that each compressed byte of the frames allows: a node keeps some bytes for
/// each page of the space, so few bytes of blob must not claim many pages.
pub const SPACE_PER_FRAME_BYTE: u64 = 64;
/// Most bytes of plain address space whatever the frames claim to have.
pub const SPACE_LEN_MAX: u64 = 256 << 30;
/// Longest name of a directory entry: what Linux file systems allow (`NAME_MAX`).
pub const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link: what Linux follows (`PATH_MAX`, less its final zero).
pub const TARGET_LEN_MAX: u64 = 4095;
/// Longest value of an extended attribute (Linux `XATTR_SIZE_MAX`); names are at most [`NAME_LEN_MAX`] long.
pub const XATTR_VALUE_LEN_MAX: u32 = 64 << 10;
/// Most bytes that all targets, xattr names and values have together, shared ones counted each time: an index of few
/// bytes must not become gigabytes where it is merged.
pub const TEXTS_LEN_MAX: u64 = 256 << 20;
/// Most layers a merged tree may have: what overlayfs and containerd can stack.
pub const LAYER_COUNT_MAX: usize = 500;
/// Longest index, compressed or plain, that a reader accepts (SPEC.md 9): bounds what a node allocates.
pub const INDEX_LEN_MAX: u64 = 1 << 30;
