//! Everything real, started privately: the harness of the end-to-end tests and of the demo.
//!
//! Words: a *scratch* directory holds whatever one test makes and is emptied of processes and mounts
//! when the test ends, however it ends; a *service* is a process that runs until its guard is dropped;
//! a *node* is a containerd with a Lazuli snapshotter of its own; a *layout* is an OCI image layout.
//!
//! The harness drives the programs from outside, by their command lines and sockets. It knows nothing
//! of their insides, so that it shows what a user would see.

pub mod compare;
pub mod conformance;
pub mod containerd;
mod containerd_config;
pub mod cri;
pub mod disks;
pub mod error;
pub mod faulty_registry;
pub mod house;
pub mod image;
pub mod lazy_blob;
pub mod node;
pub mod page_cache;
pub mod peers;
pub mod process;
pub mod programs;
pub mod raw_tar;
pub mod real_images;
pub mod registry_log;
pub mod registry_server;
pub mod samples;
pub mod scratch;
pub mod shaped_link;
pub mod start;
pub mod tar_layer;
pub mod usage;

pub use compare::{Difference, compare_trees, diff_trees};
pub use containerd::{Containerd, ContainerdOptions, Release};
pub use cri::{Cri, Pod};
pub use error::{HarnessError, Result};
pub use faulty_registry::{Asked, Fault, FaultyRegistry};
pub use image::{Compression, ImageBuilder};
pub use lazy_blob::LazyBlob;
pub use node::{Node, Snapshotter, SnapshotterOptions};
pub use process::{Finished, Service};
pub use programs::{LazyMount, lazuli};
pub use raw_tar::{RawHeader, RawTar};
pub use registry_server::TestRegistry;
pub use scratch::Scratch;
pub use tar_layer::TarLayer;
