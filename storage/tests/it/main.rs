//! The cache against a source in memory that counts requests, and fails or waits on demand.

// Helpers of tests may unwrap like tests; layers made here are small, and a hot pack may be one range.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::single_range_in_vec_init)]

mod copies;
mod disk_order;
mod durability;
mod faults;
mod foresight;
mod health;
mod hot_pack;
mod kept_files;
mod layers;
mod patience;
mod places;
mod power_cut;
mod reads;
mod removal;
mod rest;
mod scheduling;
mod support;
mod truth;
mod watched;
