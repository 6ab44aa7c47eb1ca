//! The daemon and its mounts, as clients and containers meet them: one program, so that it is linked once.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "only tests use it")]

mod clients;
mod control;
mod erofs;
mod file_operations;
mod kernel;
mod log;
mod mount;
mod overlay;
mod registries;
mod stalls;
mod starts;
mod support;
mod takeover;
