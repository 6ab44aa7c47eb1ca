//! The snapshotter, called as containerd calls it, for what no client of containerd 1.6 can ask for.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::snapshots::{
        CommitSnapshotRequest, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
        StatSnapshotRequest, UsageRequest, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use format_spec::LazyLayer;
use lazuli_tests::{
    HarnessError, Node, Result, Scratch,
    error::Context as _,
    process::{command, run},
};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::{Code, Request, Status, transport::Channel};

/// The labels that name the snapshot that a prepare is for, the image and the blob.
pub(crate) const TARGET: &str = "containerd.io/snapshot.ref";
const CRI_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
const CRI_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
const NAMESPACE: &str = "containerd-namespace";

/// A connection; blocks.
pub(crate) struct Snapshots {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
}

/// An answer and the time that it took; `None` when the client gave up.
pub(crate) type Answer<T> = (Option<Result<T, Status>>, Duration);

/// A call of the service, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Prepare,
    View,
    Mounts,
    Stat,
    Usage,
    List,
    Commit,
    Remove,
}

impl Snapshots {
    pub(crate) fn connect(node: &Node) -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("a runtime")?;
        let connected = runtime.block_on(containerd_client::connect(node.snapshotter.socket()));
        let channel = connected.map_err(|error| HarnessError::Unexpected(format!("connecting: {error}")))?;
        Ok(Self { runtime, client: SnapshotsClient::new(channel) })
    }

    /// The runtime and a client of its own, for many calls at once.
    pub(crate) fn parts(&self) -> (&Runtime, SnapshotsClient<Channel>) {
        (&self.runtime, self.client.clone())
    }

    /// Prepares with labels.
    pub(crate) fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
        limit: Duration,
    ) -> Answer<Vec<Mount>> {
        let request = prepare_request(key, parent, labels);
        let mut client = self.client.clone();
        self.timed(limit, async move { Ok(client.prepare(request).await?.into_inner().mounts) })
    }

    /// Makes one of the calls about the snapshot `key` (of `parent` where one is made).
    pub(crate) fn call(&self, call: Call, key: &str, parent: &str, limit: Duration) -> Answer<()> {
        let mut client = self.client.clone();
        let (key, parent) = (key.to_owned(), parent.to_owned());
        self.timed(limit, async move {
            match call {
                Call::Prepare => drop(client.prepare(prepare_request(&key, &parent, HashMap::new())).await?),
                Call::View => {
                    let request = ViewSnapshotRequest { key, parent, ..Default::default() };
                    drop(client.view(in_default(request)).await?);
                }
                Call::Mounts => drop(client.mounts(in_default(MountsRequest { key, ..Default::default() })).await?),
                Call::Stat => drop(client.stat(in_default(StatSnapshotRequest { key, ..Default::default() })).await?),
                Call::Usage => drop(client.usage(in_default(UsageRequest { key, ..Default::default() })).await?),
                Call::List => {
                    let mut listed = client.list(in_default(ListSnapshotsRequest::default())).await?.into_inner();
                    while listed.message().await?.is_some() {}
                }
                Call::Commit => {
                    let request = CommitSnapshotRequest { name: format!("{key}-committed"), key, ..Default::default() };
                    drop(client.commit(in_default(request)).await?);
                }
                Call::Remove => {
                    drop(client.remove(in_default(RemoveSnapshotRequest { key, ..Default::default() })).await?);
                }
            }
            Ok(())
        })
    }

    fn timed<T>(&self, limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Answer<T> {
        let started = Instant::now();
        let answer = self.runtime.block_on(async { tokio::time::timeout(limit, call).await });
        (answer.ok(), started.elapsed())
    }

    /// Names of the snapshots whose labels have `label` with this value.
    pub(crate) fn names_with(&self, label: &str, value: &str) -> Result<Vec<String>> {
        let filters = vec![format!(r#"labels."{label}"=="{value}""#)];
        let mut client = self.client.clone();
        let listed = self.runtime.block_on(async {
            let request = in_default(ListSnapshotsRequest { filters, ..Default::default() });
            let mut listed = client.list(request).await?.into_inner();
            let mut names = Vec::new();
            while let Some(part) = listed.message().await? {
                names.extend(part.info.into_iter().map(|info| info.name));
            }
            Ok::<_, Status>(names)
        });
        listed.map_err(|status| HarnessError::Rpc { call: "List", status: Box::new(status) })
    }

    /// The topmost lazy snapshot of an image that was pulled.
    pub(crate) fn top_of(&self, image: &str) -> Result<String> {
        let names = self.names_with("containerd.io/snapshot/cri.image-ref", image)?;
        names.into_iter().next_back().ok_or_else(|| HarnessError::Unexpected(format!("{image} has no lazy snapshot")))
    }
}

/// A prepare as containerd's proxy sends it.
pub(crate) fn prepare_request(
    key: &str,
    parent: &str,
    labels: HashMap<String, String>,
) -> Request<PrepareSnapshotRequest> {
    let (key, parent) = (key.to_owned(), parent.to_owned());
    in_default(PrepareSnapshotRequest { snapshotter: "lazuli".to_owned(), key, parent, labels })
}

fn in_default<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(NAMESPACE, tonic::metadata::MetadataValue::from_static("default"));
    request
}

/// The labels with which containerd's CRI service prepares layer `number` of an image: annotations, image, blob.
pub(crate) fn cri_labels(image: &str, manifest: &Value, number: usize, chain: &str) -> HashMap<String, String> {
    let layer = &manifest["layers"][number];
    let annotations = layer["annotations"].as_object().into_iter().flatten();
    let mut labels: HashMap<String, String> = annotations
        .filter(|(key, _)| key.starts_with("containerd.io/snapshot/"))
        .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect();
    labels.insert(TARGET.to_owned(), chain.to_owned());
    labels.insert(CRI_IMAGE.to_owned(), image.to_owned());
    labels.insert(CRI_LAYER_DIGEST.to_owned(), layer["digest"].as_str().unwrap_or_default().to_owned());
    labels
}

/// The lazy layer that a descriptor of a manifest describes.
pub(crate) fn lazy_layer(descriptor: &Value) -> Result<LazyLayer> {
    let described = LazyLayer::from_annotations(|key| descriptor["annotations"][key].as_str());
    described.ok().flatten().ok_or_else(|| HarnessError::Unexpected(format!("no lazy layer: {descriptor}")))
}

/// Mounts what the snapshotter answered, as containerd's runtime would.
pub(crate) fn mount_at(mounts: &[Mount], scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let directory = scratch.directory(name)?;
    let [mount] = mounts else {
        return Err(HarnessError::Unexpected(format!("{} mounts", mounts.len())));
    };
    let options = mount.options.join(",");
    let mut command = command("mount", ["-t", &mount.r#type, "-o", &options]);
    run(command.arg(&mount.source).arg(&directory))?;
    Ok(directory)
}

/// In the words of the table.
pub(crate) fn words<T>((answer, time): &Answer<T>) -> String {
    let seconds = time.as_secs_f64();
    match answer {
        None => format!("no answer in {seconds:.0} s"),
        Some(Ok(_)) => format!("done in {seconds:.2} s"),
        Some(Err(status)) => format!("{:?} in {seconds:.2} s: {}", status.code(), status.message()),
    }
}

/// Whether it answered with this code.
pub(crate) fn has_code<T>(answer: &Answer<T>, code: Code) -> bool {
    match &answer.0 {
        None => false,
        Some(Ok(_)) => code == Code::Ok,
        Some(Err(status)) => status.code() == code,
    }
}

/// Unmounts a directory, whoever uses it.
pub(crate) fn unmount(directory: &Path) -> Result<()> {
    run(command("umount", ["-l"]).arg(directory)).map(drop)
}
