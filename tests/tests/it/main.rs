//! The whole path, with real containerd, runc, registries and mounts: one program, so that it is linked once.

mod bad_input;
mod check;
mod conformance;
mod containers;
mod convert;
mod formats;
mod harness;
mod hot_pack;
mod house;
mod inode_numbers;
mod inspect;
mod json;
mod model;
mod modes;
mod mount;
mod node_bad_input;
mod private_images;
mod profile;
mod starts;
mod status;
mod tar_features;
mod tidy;
mod truth;
mod user_namespaces;
mod why;
