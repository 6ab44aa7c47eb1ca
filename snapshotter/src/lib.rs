//! Lazuli's proxy snapshotter for containerd.
//!
//! A *snapshot* is a file system state that containerd names by a key: *active* ones are written to,
//! *committed* ones are parents of others, *views* are read. Ordinary layers are directories stacked by
//! overlayfs, as containerd's own overlayfs snapshotter has them. A *lazy* layer is committed the moment
//! containerd asks to prepare it, and read through `lazuli-fused` when a container needs it.

pub mod api;
mod chains;
pub mod config;
mod database;
pub mod filter;
pub mod fused;
mod held;
pub mod host;
pub mod id_map;
pub mod id_mapped;
pub mod metadata;
pub mod mounts;
pub mod names;
mod not_lazy;
mod probes;
pub mod records;
pub mod remote;
pub mod service;
pub mod signers;
pub mod snapshotter;
pub mod socket;
mod system_calls;
pub mod trees;
pub mod trust;
mod truth;
pub mod usage;
pub mod user_namespace;
mod watching;
