//! The plugin, asked as containerd asks it: one program, so that it is linked once.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "only tests use it")]

mod common;
mod daemon;
mod full_disk;
mod id_mapped;
mod lazy;
mod ordinary;
