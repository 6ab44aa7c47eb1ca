//! The root directory that the programs of a node share: the name of each thing directly below it.
//!
//! Whoever makes a thing decides how it lies inside: `cache/` is storage's, `trees/` and `starts/` fusefs' and
//! `snapshots/` the snapshotter's.

use format_spec::Digest;

/// Layers and what is fetched of them: the cache of `lazuli-fused` or of `lazuli mount`.
pub const CACHE: &str = "cache";
/// Where layers lie, each in a directory of the name of its id.
pub const LAYER_CACHES: &str = "cache/layers";
/// Merged trees.
pub const TREES: &str = "trees";
/// The files that starts of each repository's images were seen to read; see [`record_of_starts`].
pub const STARTS: &str = "starts";
/// The mount point of the FUSE session.
pub const SESSION: &str = "mnt";
/// Mount points of trees that the kernel reads by itself.
pub const KERNEL_MOUNTS: &str = "erofs";
/// Mount points of layers for containers with user namespaces of their own.
pub const ID_MAPPED: &str = "id-mapped";
/// Where `lazuli-fused` listens.
pub const SOCKET: &str = "fused.sock";
/// The kernel's first message of the session, which a `lazuli-fused` that takes it over needs.
pub const SESSION_START: &str = "fused.init";
/// Held by the `lazuli-fused` that serves the root.
pub const FUSED_LOCK: &str = "fused.lock";
/// The log of a `lazuli-fused` that the snapshotter has started.
pub const FUSED_LOG: &str = "fused.log";
/// The writable directories of containers, and ordinary layers.
pub const SNAPSHOTS: &str = "snapshots";
/// The snapshotter's records.
pub const DATABASE: &str = "snapshotter.redb";
/// Held by the `lazuli-snapshotter` of the root.
pub const SNAPSHOTTER_LOCK: &str = "lock";
/// The truth about the chains of lazy layers as far as it is known, for `lazuli status`: a list of [`crate::chains::ChainStatus`], sorted by
/// chain.
pub const CHAINS: &str = "chains.json";
/// Images that are not lazy although they could be, for `lazuli status`: a list of [`crate::NotLazy`], oldest first.
pub const NOT_LAZY: &str = "not-lazy.json";

/// The name of the record of starts of a repository's images, below the root: a profile (`docs/PROFILE.md`).
pub fn record_of_starts(repository: &str) -> String {
    format!("{STARTS}/{}", Digest::of(repository.as_bytes()).hex())
}
