//! The server side of containerd's snapshots service: what `build.rs` generated, and the one message
//! that `containerd-client` has in an older form.

#![allow(missing_docs, unreachable_pub, clippy::all)]

use std::collections::HashMap;

pub use containerd_client::services::v1::snapshots::{
    CleanupRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest, MountsResponse,
    PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse,
    UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest,
    ViewSnapshotResponse,
};

/// `google.protobuf.Empty`.
pub type Empty = ();

/// `CommitSnapshotRequest` as containerd 2.x sends it: with the parent onto which a snapshot that was
/// prepared without one is committed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitSnapshotRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub key: String,
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
    #[prost(string, tag = "5")]
    pub parent: String,
}

tonic::include_proto!("containerd.services.snapshots.v1.Snapshots");
