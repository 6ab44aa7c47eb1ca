//! The command `lazuli convert` and what it leaves: one program, so that it is linked once.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "only tests use it")]

mod convert;
mod images;
mod lists;
mod scene;
mod signatures;
mod trust;
