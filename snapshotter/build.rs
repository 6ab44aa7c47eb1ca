//! Generates the server side of containerd's snapshots service over the message types of `containerd-client`.

use tonic_build::manual::{Builder, Method, MethodBuilder, Service};

const MESSAGES: &str = "::containerd_client::services::v1::snapshots";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let message = |name: &str| format!("{MESSAGES}::{name}");
    let nothing = "crate::api::Empty".to_owned();
    let service = Service::builder()
        .name("Snapshots")
        .package("containerd.services.snapshots.v1")
        .comment("containerd's snapshots service, version 1.")
        .method(method("Prepare", message("PrepareSnapshotRequest"), message("PrepareSnapshotResponse")).build())
        .method(method("View", message("ViewSnapshotRequest"), message("ViewSnapshotResponse")).build())
        .method(method("Mounts", message("MountsRequest"), message("MountsResponse")).build())
        .method(method("Commit", "crate::api::CommitSnapshotRequest".to_owned(), nothing.clone()).build())
        .method(method("Remove", message("RemoveSnapshotRequest"), nothing.clone()).build())
        .method(method("Stat", message("StatSnapshotRequest"), message("StatSnapshotResponse")).build())
        .method(method("Update", message("UpdateSnapshotRequest"), message("UpdateSnapshotResponse")).build())
        .method(
            method("List", message("ListSnapshotsRequest"), message("ListSnapshotsResponse"))
                .server_streaming()
                .build(),
        )
        .method(method("Usage", message("UsageRequest"), message("UsageResponse")).build())
        .method(method("Cleanup", message("CleanupRequest"), nothing).build())
        .build();
    Builder::new().build_client(false).compile(&[service]);
}

fn method(route_name: &str, input: String, output: String) -> MethodBuilder {
    Method::builder()
        .name(route_name.to_lowercase())
        .route_name(route_name)
        .input_type(input)
        .output_type(output)
        .codec_path("::tonic_prost::ProstCodec")
}
