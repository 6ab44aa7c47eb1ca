//! Images that lie or come from the future, on a real node: the right gRPC code, and nobody else is hurt.

use containerd_client::services::v1::snapshots::{
    Info, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, snapshots_client::SnapshotsClient,
};
use format_spec::{
    Digest, IndexLocation, LazyLayer,
    footer::{SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
};
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry,
    containerd::LAZULI,
    error::Context as _,
    image::{layout_blob, layout_manifest, replace_layer},
    process::run,
    programs::lazuli_ok,
    registry_server::digest_in,
    samples::readable_layers,
};
use tonic::{Code, Status};

/// Offsets in the header of an index (SPEC.md 4.1).
const VERSION_AT: usize = 8;
const FEATURES_INCOMPATIBLE_AT: usize = 24;

/// Which layer of a published image is changed.
const OWN_BASE: usize = 0;
const TOP: usize = 2;

/// An image with a base of its own and a topmost layer that says `name`, converted, with one lazy blob changed.
fn publish(
    scratch: &Scratch,
    registry: &TestRegistry,
    name: &str,
    changed: usize,
    change: impl FnOnce(Vec<u8>, LazyLayer) -> (Vec<u8>, LazyLayer),
) -> Result<String> {
    let layer = TarLayer::new().directory("etc").file("etc/name", name).finish()?;
    let base = TarLayer::new().file(&format!("base-of-{name}"), "").finish()?;
    let image = ImageBuilder::new().layer(base, Compression::Gzip);
    let image = image.layer(readable_layers()?.swap_remove(0), Compression::Gzip);
    let original = image.layer(layer, Compression::Gzip).write(scratch, &format!("{name}-original"))?;
    let lazy = format!("oci:{}:latest", scratch.join(format!("{name}-lazy")).display());
    lazuli_ok(["convert", &original, &lazy])?;
    let descriptor = &layout_manifest(&lazy)?["layers"][changed];
    let annotations = LazyLayer::from_annotations(|key| descriptor["annotations"][key].as_str());
    let described = annotations.expect("annotations are well-formed").expect("the layer is lazy");
    let blob = std::fs::read(layout_blob(&lazy, digest_in(descriptor)?)).context("reading a blob")?;
    let (blob, described) = change(blob, described);
    replace_layer(&lazy, changed, &blob, &described)?;
    registry.push(&lazy, &format!("{name}:latest"))
}

/// Gives a blob another index, behind everything else, whose digest is right.
fn with_index(mut blob: Vec<u8>, described: LazyLayer, change: impl FnOnce(&mut [u8])) -> (Vec<u8>, LazyLayer) {
    let at = |offset: u64| usize::try_from(offset).expect("small");
    let range = described.index.range();
    let compressed = &blob[at(range.start)..at(range.end)];
    let mut index = zstd::bulk::decompress(compressed, at(described.index.plain_len)).expect("an index");
    change(&mut index);
    let compressed = zstd::bulk::compress(&index, 3).expect("small");
    let index = IndexLocation {
        offset: blob.len() as u64 + SKIPPABLE_HEADER_LEN,
        compressed_len: compressed.len() as u64,
        plain_len: described.index.plain_len,
        digest: Digest::of(&compressed),
    };
    blob.extend(skippable_header(SkippableKind::Index, compressed.len() as u64).expect("small"));
    blob.extend(compressed);
    let described = LazyLayer { blob: Digest::of(&blob), blob_len: blob.len() as u64, index, hot_len: 0 };
    (blob, described)
}

/// Prepares a container on the topmost snapshot of `image`, as containerd would; what the snapshotter answers.
async fn prepare_on(node: &Node, image: &str) -> Result<Status, String> {
    let channel = containerd_client::connect(node.snapshotter.socket()).await.map_err(|error| error.to_string())?;
    let mut snapshots = SnapshotsClient::new(channel);
    let filters = vec![format!(r#"labels."containerd.io/snapshot/cri.image-ref"=="{image}""#)];
    let request = ListSnapshotsRequest { filters, ..ListSnapshotsRequest::default() };
    let mut listed = snapshots.list(request).await.map_err(|status| status.to_string())?.into_inner();
    let found = listed.message().await.map_err(|status| status.to_string())?.map_or(Vec::new(), |found| found.info);
    let is_top = |info: &&Info| found.iter().all(|other| other.parent != info.name);
    let top = found.iter().find(is_top).cloned().ok_or("the image is not lazy")?;
    let request =
        PrepareSnapshotRequest { key: "probe".to_owned(), parent: top.name, ..PrepareSnapshotRequest::default() };
    let answer = snapshots.prepare(request).await.map_or_else(|status| status, |_| Status::ok(""));
    if answer.code() == Code::Ok {
        let request = RemoveSnapshotRequest { key: "probe".to_owned(), ..RemoveSnapshotRequest::default() };
        snapshots.remove(request).await.map_err(|status| status.to_string())?;
    }
    Ok(answer)
}

fn newer(at: usize) -> impl FnOnce(Vec<u8>, LazyLayer) -> (Vec<u8>, LazyLayer) {
    move |blob, described| with_index(blob, described, |index| index[at + 1] = 0x40)
}

fn with_another_digest(blob: Vec<u8>, described: LazyLayer) -> (Vec<u8>, LazyLayer) {
    let index = IndexLocation { digest: Digest::of(b"another index"), ..described.index };
    (blob, LazyLayer { index, ..described })
}

/// The index of the first layer is looked at before the image is called lazy.
#[test]
fn an_image_whose_first_index_is_unusable_is_pulled_completely_and_says_why() -> Result<()> {
    let scratch = Scratch::new("unusable-first-index")?;
    let registry = TestRegistry::start(&scratch)?;
    let node = Node::start(&scratch)?;
    let root = node.snapshotter.root().display().to_string();
    let images = [
        (publish(&scratch, &registry, "first-newer", OWN_BASE, newer(VERSION_AT))?, "upgrade"),
        (publish(&scratch, &registry, "first-unknown", OWN_BASE, newer(FEATURES_INCOMPATIBLE_AT))?, "upgrade"),
        (publish(&scratch, &registry, "first-damaged", OWN_BASE, with_another_digest)?, "digest"),
    ];
    for (number, (image, words)) in images.iter().enumerate() {
        let finished = node.lazuli_pull(image)?;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        let status = lazuli_ok(["status", "--root", &root, image])?;
        assert!(status.contains("not lazy: it was pulled completely") && status.contains(words), "{status}");
        let container = format!("complete-{number}");
        let read = ["run", "--rm", "--snapshotter", LAZULI, image, &container, "/bin/cat", "/etc/name"];
        assert!(run(&mut node.containerd.ctr(read))?.starts_with("first-"));
    }
    Ok(())
}

/// That of a further layer is not: its containers hear of it.
#[test]
fn an_unusable_index_fails_its_containers_with_the_right_code_and_no_others() -> Result<()> {
    let scratch = Scratch::new("unusable-index")?;
    let registry = TestRegistry::start(&scratch)?;
    let node = Node::start(&scratch)?;
    let good = publish(&scratch, &registry, "good", TOP, |blob, described| (blob, described))?;
    let version = publish(&scratch, &registry, "newer-version", TOP, newer(VERSION_AT))?;
    let feature = publish(&scratch, &registry, "unknown-feature", TOP, newer(FEATURES_INCOMPATIBLE_AT))?;
    let damaged = publish(&scratch, &registry, "damaged", TOP, with_another_digest)?;
    let runtime = tokio::runtime::Runtime::new().context("making a runtime")?;
    for (image, code, words) in [
        (&good, Code::Ok, ""),
        (&version, Code::FailedPrecondition, "upgrade"),
        (&feature, Code::FailedPrecondition, "upgrade"),
        (&damaged, Code::DataLoss, "digest"),
        (&good, Code::Ok, ""),
    ] {
        let finished = node.lazuli_pull(image)?;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        let answer = runtime.block_on(prepare_on(&node, image)).map_err(HarnessError::Unexpected)?;
        assert_eq!(answer.code(), code, "{image}: {answer}");
        assert!(answer.message().contains(words), "{image}: {answer}");
        assert_eq!(answer.message().lines().count(), usize::from(code != Code::Ok), "{answer}");
    }
    let words = ["run", "--rm", "--snapshotter", LAZULI, &good, "good", "/bin/cat", "/etc/name"];
    assert_eq!(run(&mut node.containerd.ctr(words))?, "good");
    let words = ["run", "--rm", "--snapshotter", LAZULI, &version, "newer", "/bin/cat", "/etc/name"];
    let refused = node.containerd.ctr(words).output().context("running a container")?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("upgrade"), "{refused:?}");
    for image in [&version, &feature, &damaged] {
        run(&mut node.containerd.ctr(["images", "rm", "--sync", image]))?;
    }
    Ok(())
}
