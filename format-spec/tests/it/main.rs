//! The format from outside: one program, so that it is linked once.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "only tests use it")]

mod index;
mod signatures;
mod spec_sync;
mod vectors;
