//! Fuzz targets: one function for each family of bytes that come from outside.
//!
//! A target takes any bytes and returns; it panics where a parser breaks a promise: that nothing from outside
//! makes it panic, take unbounded memory or time, or accept what breaks a rule. Targets are plain functions:
//! `main.rs` hands them to libFuzzer, `tests/replay.rs` runs them over the seeds of `corpus/` and over changes
//! of them. Bytes that a checksum protects are put right first (`seal.rs`), or nothing would get past it.

pub mod seal;
pub mod seeds;
mod targets;
mod tree_rules;

/// Bytes that a target may have allocated at once; zstd's own memory is not counted.
pub const MEMORY_LEN_MAX: usize = 512 << 20;

/// The allocator of everything that runs targets: who exceeds [`MEMORY_LEN_MAX`] ends with an error.
#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, MEMORY_LEN_MAX);

/// A family of parsers.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also that of its directory of seeds.
    pub name: &'static str,
    /// Runs the parsers over any bytes.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 12] = [
    Target { name: "tar", run: targets::tar::run },
    Target { name: "layer", run: targets::layer::run },
    Target { name: "index", run: targets::index::run },
    Target { name: "trees", run: targets::trees::run },
    Target { name: "blob_end", run: targets::blob_end::run },
    Target { name: "manifest", run: targets::manifest::run },
    Target { name: "archive", run: targets::archive::run },
    Target { name: "start", run: targets::start::run },
    Target { name: "names", run: targets::names::run },
    Target { name: "registry", run: targets::registry::run },
    Target { name: "node", run: targets::node::run },
    Target { name: "cache", run: targets::cache::run },
];
