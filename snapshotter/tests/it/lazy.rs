//! Lazy layers, over gRPC against the real daemon and real mounts. The other daemon is a stand-in that
//! speaks its protocol and shows plain directories as trees: what is tested is who asks it for what, when.

mod trust;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use control::{
    ErrorKind, LayerStatus, ModeStatus, Reading, RemoteLayer, Request, Response, TreeId, TreeMode, TreeStatus, Verdict,
    descriptor, tree_id,
};

use crate::common::{Daemon, Mounted, code, to_labels};
use containerd_client::services::v1::snapshots::Kind;
use format_spec::{Digest, IndexLocation, LayerId, LazyLayer};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest},
    net::{UnixListener, UnixStream},
};
use tonic::Code;

/// A directory of a file system that has no id-mapped mounts.
const UNMAPPABLE: &str = "/proc/sys";

/// Stands in for `lazuli-fused`.
struct Fused {
    asked: Arc<Mutex<Vec<Request>>>,
    verdicts: Arc<Mutex<HashMap<LayerId, Verdict>>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Fused {
    /// Serves the control socket of the daemon that will run in `directory`. A tree is a directory with a
    /// file for each of its layers, owned by user 7.
    fn start(directory: &Path, holds: Vec<RemoteLayer>) -> Self {
        let root = directory.join("root");
        fs::create_dir_all(&root).unwrap();
        let socket = root.join("fused.sock");
        let _stale = fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let verdicts = Arc::new(Mutex::new(HashMap::new()));
        let known = Arc::clone(&verdicts);
        let (trees, log) = (root.join("trees"), Arc::clone(&asked));
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, trees.clone(), Arc::clone(&log), holds.clone(), Arc::clone(&known)));
            }
        });
        Self { asked, verdicts, serving }
    }

    fn take_asked(&self) -> Vec<Request> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    /// Waits until `wanted` was asked: for what the daemon does by itself.
    async fn wait_until_asked(&self, wanted: &Request) {
        for _ in 0..1000 {
            if self.asked.lock().unwrap().contains(wanted) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{wanted:?} was not asked, but {:?}", self.asked.lock().unwrap());
    }
}

impl Drop for Fused {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    stream: UnixStream,
    trees: PathBuf,
    log: Arc<Mutex<Vec<Request>>>,
    holds: Vec<RemoteLayer>,
    known: Arc<Mutex<HashMap<LayerId, Verdict>>>,
) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|len| len > 0) {
        let request: Request = serde_json::from_str(&line).unwrap();
        line.clear();
        // Asked by itself at any time; any descriptor will do.
        if matches!(request, Request::Ping) {
            stream.write_all(b"{\"response\":\"done\"}\n").await.unwrap();
            continue;
        }
        if matches!(request, Request::HoldSession) {
            let (socket, device) = (stream.get_ref(), fs::File::open("/dev/null").unwrap());
            let answer = b"{\"response\":\"session\"}\n";
            socket.async_io(Interest::WRITABLE, || descriptor::send(socket, answer, &device)).await.unwrap();
            continue;
        }
        let response = match &request {
            Request::Verdicts { layers } => {
                let known = known.lock().unwrap();
                Response::Verdicts { verdicts: layers.iter().map(|layer| known.get(layer).cloned()).collect() }
            }
            Request::MountTree { layers } if layers.iter().any(|layer| layer.image == "broken/image") => {
                Response::Error { message: "index of the layer does not match".to_owned(), kind: ErrorKind::Damaged }
            }
            Request::MountTree { layers } if layers.iter().any(|layer| layer.image == "unmappable/image") => {
                Response::Tree { path: UNMAPPABLE.into() }
            }
            Request::MountTree { layers } => Response::Tree { path: tree(&trees, layers).unwrap() },
            Request::ProbeLayer { layer, .. } if layer.image == "refused/image" => {
                Response::Error { message: "no permission: answered 401".to_owned(), kind: ErrorKind::Refused }
            }
            Request::Status => Response::Status {
                mode: ModeStatus { in_use: TreeMode::Fuse, reason: "asked for".to_owned() },
                layers: holds.iter().cloned().map(status).collect(),
                trees: holds.iter().map(|held| tree_status(held.layer.id())).collect(),
            },
            _ => Response::Done,
        };
        log.lock().unwrap().push(request);
        let mut answer = serde_json::to_vec(&response).unwrap();
        answer.push(b'\n');
        stream.write_all(&answer).await.unwrap();
    }
}

fn tree(trees: &Path, layers: &[RemoteLayer]) -> io::Result<PathBuf> {
    let id: TreeId = tree_id(layers.iter().map(|layer| layer.layer.id())).unwrap();
    let path = trees.join(id.hex());
    fs::create_dir_all(&path)?;
    std::os::unix::fs::chown(&path, Some(7), Some(8))?;
    for layer in layers {
        fs::write(path.join(layer.layer.id().hex()), &layer.image)?;
    }
    Ok(path)
}

fn status(layer: RemoteLayer) -> LayerStatus {
    LayerStatus {
        layer,
        frames_present: 0,
        frames_total: 1,
        fetched_bytes: 0,
        is_complete: false,
        verdict: None,
        disk_bytes: 0,
        healed_pages: 0,
        reading: Reading::default(),
    }
}

/// The tree of a single layer has its name.
fn tree_status(tree: TreeId) -> TreeStatus {
    TreeStatus { tree, layers: vec![tree], mode: TreeMode::Fuse, direct_layers: Vec::new() }
}

fn remote(name: &str) -> RemoteLayer {
    let index = IndexLocation {
        offset: 0,
        compressed_len: 10,
        plain_len: 20,
        digest: Digest::of(format!("index of {name}").as_bytes()),
    };
    let layer = LazyLayer { blob: Digest::of(name.as_bytes()), blob_len: 100, index, hot_len: 0 };
    RemoteLayer { layer, image: "host/repo:tag".to_owned() }
}

fn file_of(name: &str) -> String {
    remote(name).layer.id().hex()
}

/// The labels that containerd passes for the layer `name`.
fn labels(name: &str) -> HashMap<String, String> {
    let mut labels: HashMap<_, _> = remote(name).layer.to_annotations().into_iter().collect();
    labels.extend(to_labels(&[
        ("containerd.io/snapshot.ref", name),
        ("containerd.io/snapshot/cri.image-ref", "host/repo:tag"),
        ("containerd.io/snapshot/cri.layer-digest", &remote(name).layer.blob.to_string()),
    ]));
    labels
}

async fn start() -> (Daemon, Fused) {
    let directory = tempfile::tempdir().unwrap();
    let fused = Fused::start(directory.path(), Vec::new());
    (Daemon::start_in(directory).await, fused)
}

async fn prepare_lazy(daemon: &Daemon, name: &str, parent: &str) {
    let answer = daemon.prepare_with(&format!("extract {name}"), parent, labels(name)).await;
    assert_eq!(code(answer), Code::AlreadyExists);
}

#[tokio::test]
async fn a_log_that_nobody_reads_ends_nothing() {
    let directory = TempDir::new().unwrap();
    let fused = Fused::start(directory.path(), Vec::new());
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let daemon = Daemon::start_with_log(directory, writer).await;
    prepare_lazy(&daemon, "one", "").await;
    fused.wait_until_asked(&Request::Status).await;
    // The rest is worth a line or two in the log.
    drop(fused);
    let fused = Fused::start(daemon.directory.path(), Vec::new());
    fused.wait_until_asked(&Request::Status).await;
    daemon.prepare("container", "one").await.unwrap();
}

#[tokio::test]
async fn a_lazy_layer_is_committed_at_prepare_and_found_as_containerd_looks_for_it() {
    let (daemon, fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    prepare_lazy(&daemon, "two", "one").await;
    // The first layer of an image decides; the others are told of behind the call.
    fused.wait_until_asked(&Request::AnnounceLayer { layer: remote("two") }).await;
    let asked: Vec<_> = fused.take_asked().into_iter().filter(|asked| *asked != Request::Status).collect();
    let probe = Request::ProbeLayer { layer: remote("one"), within_ms: 2000 };
    assert_eq!(asked, [probe, Request::AnnounceLayer { layer: remote("two") }]);
    let found = daemon.list(&[r#"labels."containerd.io/snapshot.ref"==two,parent=="one""#]).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].kind(), found[0].parent.as_str()), ("two", Kind::Committed, "one"));
    assert_eq!(found[0].labels["containerd.io/snapshot/remote"], "remote snapshot");
    assert_eq!(daemon.names(&[]).await, ["one", "two"]);
    assert_eq!(daemon.directories(), [""; 0]);
    assert_eq!(code(daemon.mounts("two").await), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_container_runs_on_the_merged_tree() {
    let (daemon, fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    prepare_lazy(&daemon, "two", "one").await;
    fused.take_asked();
    let mount = daemon.prepare("container", "two").await.unwrap();
    assert!(fused.take_asked().contains(&Request::MountTree { layers: vec![remote("one"), remote("two")] }));
    let container = Mounted::new(&mount);
    assert_eq!(container.read(&file_of("one")).unwrap(), "host/repo:tag");
    fs::write(container.path().join(file_of("two")), "changed").unwrap();
    let root = fs::metadata(container.path()).unwrap();
    assert_eq!((std::os::unix::fs::MetadataExt::uid(&root), std::os::unix::fs::MetadataExt::gid(&root)), (7, 8));
    assert_eq!(daemon.mounts("container").await.unwrap(), mount);
    let view = Mounted::new(&daemon.view("view", "two").await.unwrap());
    assert_eq!(view.read(&file_of("two")).unwrap(), "host/repo:tag");
    let refused = fs::write(view.path().join("new"), "x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
}

#[tokio::test]
async fn ordinary_layers_stack_on_lazy_ones_and_not_the_other_way() {
    let (daemon, fused) = start().await;
    prepare_lazy(&daemon, "lazy", "").await;
    daemon.layer("ordinary", "lazy", |root| fs::remove_file(root.join(file_of("lazy"))).unwrap()).await;
    fused.take_asked();
    let mount = daemon.prepare_with("extract", "ordinary", labels("above")).await.unwrap();
    assert_eq!(mount.r#type, "overlay");
    assert_eq!(daemon.stat("extract").await.unwrap().kind(), Kind::Active);
    let view = Mounted::new(&daemon.view("view", "ordinary").await.unwrap());
    assert_eq!(view.read(&file_of("lazy")).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn the_same_layer_under_another_namespace_is_there_already() {
    let (daemon, _fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    prepare_lazy(&daemon, "one", "").await;
    assert_eq!(daemon.names(&[]).await, ["one"]);
}

#[tokio::test]
async fn a_layer_without_annotations_or_image_is_ordinary() {
    let (daemon, fused) = start().await;
    for without in ["containerd.io/snapshot/lazuli/version", "containerd.io/snapshot/cri.image-ref"] {
        let mut labels = labels("one");
        labels.remove(without);
        let mount = daemon.prepare_with(&format!("extract {without}"), "", labels).await.unwrap();
        assert_eq!(mount.r#type, "bind", "{without}");
    }
    assert_eq!(fused.take_asked(), []);
}

#[tokio::test]
async fn refuses_annotations_of_another_layer() {
    let (daemon, fused) = start().await;
    for (key, value) in [
        ("containerd.io/snapshot/cri.layer-digest", Digest::of(b"other").to_string()),
        ("containerd.io/snapshot/lazuli/index.digest", "sha256:no".to_owned()),
    ] {
        let mut labels = labels("one");
        labels.insert(key.to_owned(), value);
        assert_eq!(code(daemon.prepare_with("extract", "", labels).await), Code::InvalidArgument, "{key}");
    }
    assert_eq!(fused.take_asked(), []);
    assert_eq!(daemon.names(&[]).await, [""; 0]);
}

#[tokio::test]
async fn an_unusable_index_fails_the_container_and_leaves_nothing() {
    let (daemon, _fused) = start().await;
    let mut broken = labels("one");
    broken.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "broken/image".to_owned());
    assert_eq!(code(daemon.prepare_with("extract", "", broken).await), Code::AlreadyExists);
    let failed = daemon.prepare("container", "one").await.unwrap_err();
    assert_eq!(failed.code(), Code::DataLoss);
    assert_eq!(failed.message(), "snapshot container: index of the layer does not match");
    assert_eq!((daemon.names(&[]).await, daemon.directories()), (vec!["one".to_owned()], vec![]));
}

#[tokio::test]
async fn a_user_namespace_sees_tree_and_layers_with_its_own_owners() {
    let (daemon, _fused) = start().await;
    prepare_lazy(&daemon, "lazy", "").await;
    daemon.layer("ordinary", "lazy", |root| fs::write(root.join("above"), "x").unwrap()).await;
    let labels = crate::common::user_namespace("0:100000:65536", "0:200000:65536");
    for (number, parent) in [("3", "lazy"), ("4", "ordinary")] {
        let mount = daemon.prepare_with(number, parent, labels.clone()).await.unwrap();
        let container = Mounted::new(&mount);
        assert_eq!(crate::common::owner(&container.path().join(file_of("lazy"))), (100_000, 200_000), "{mount:?}");
    }
}

#[tokio::test]
async fn a_tree_that_cannot_have_other_owners_fails_the_container_and_leaves_nothing() {
    let (daemon, _fused) = start().await;
    let mut unmappable = labels("one");
    unmappable.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "unmappable/image".to_owned());
    assert_eq!(code(daemon.prepare_with("extract", "", unmappable).await), Code::AlreadyExists);
    let labels = crate::common::user_namespace("0:100000:65536", "0:200000:65536");
    let failed = daemon.prepare_with("container", "one", labels).await.unwrap_err();
    assert_eq!(failed.code(), Code::FailedPrecondition, "{failed}");
    let expected = format!("snapshot container: {UNMAPPABLE} cannot be shown with other owners");
    assert!(failed.message().starts_with(&expected) && !failed.message().contains('\n'), "{failed}");
    assert_eq!((daemon.names(&[]).await, daemon.directories()), (vec!["one".to_owned()], vec![]));
    assert_eq!(daemon.mount_points(), [""; 0]);
}

#[tokio::test]
async fn removing_the_last_user_frees_tree_and_cache() {
    let (daemon, fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    prepare_lazy(&daemon, "two", "one").await;
    // The same blob a second time, below nothing: another tree.
    let mut again = labels("two");
    again.insert("containerd.io/snapshot.ref".to_owned(), "two alone".to_owned());
    assert_eq!(code(daemon.prepare_with("extract", "", again).await), Code::AlreadyExists);
    assert_eq!(code(daemon.remove("one").await), Code::FailedPrecondition);
    let (one, two) = (remote("one").layer.id(), remote("two").layer.id());
    let both = tree_id([one, two]).unwrap();
    let release = |tree| Request::ReleaseTree { tree };
    let remove = |layer| Request::RemoveLayer { layer };
    for (key, expected) in [
        ("two", vec![release(both)]),
        ("two alone", vec![release(two), remove(two)]),
        ("one", vec![release(one), remove(one)]),
    ] {
        fused.take_asked();
        daemon.remove(key).await.unwrap();
        fused.wait_until_asked(expected.last().unwrap()).await;
        let mut freed = fused.take_asked();
        // The rest of a removal is done before more is looked for.
        if key != "one" {
            daemon.cleanup().await.unwrap();
            fused.wait_until_asked(&Request::Status).await;
            freed.extend(fused.take_asked());
        }
        freed.retain(|asked| *asked != Request::Status);
        assert_eq!(freed, expected, "{key}");
    }
}

#[tokio::test]
async fn usage_is_what_has_arrived_and_a_layer_counts_once() {
    let (daemon, _fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    prepare_lazy(&daemon, "two", "one").await;
    let mut again = labels("two");
    again.insert("containerd.io/snapshot.ref".to_owned(), "two alone".to_owned());
    assert_eq!(code(daemon.prepare_with("extract", "", again).await), Code::AlreadyExists);
    let cache = daemon.root().join("cache/layers").join(file_of("two"));
    fs::create_dir_all(&cache).unwrap();
    fs::write(cache.join("data"), vec![1; 100_000]).unwrap();
    let on_disk: u64 = [cache.clone(), cache.join("data")]
        .iter()
        .map(|path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512)
        .sum();
    let mut all = Vec::new();
    for key in ["one", "two", "two alone"] {
        let usage = daemon.usage(key).await.unwrap();
        all.push((usage.size, usage.inodes));
    }
    assert_eq!(all, [(0, 0), (i64::try_from(on_disk).unwrap(), 2), (0, 0)]);
    daemon.remove("two").await.unwrap();
    assert_eq!(daemon.usage("two alone").await.unwrap().size, i64::try_from(on_disk).unwrap());
}

#[tokio::test]
async fn an_image_that_cannot_be_read_is_pulled_completely_and_says_why() {
    let (daemon, fused) = start().await;
    let mut refused = labels("one");
    refused.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "refused/image".to_owned());
    let mount = daemon.prepare_with("extract", "", refused.clone()).await.unwrap();
    assert_eq!(mount.r#type, "bind");
    daemon.commit("extract", "one").await.unwrap();
    // Nobody asks for a layer on an ordinary one.
    fused.take_asked();
    let mut above = labels("two");
    above.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "refused/image".to_owned());
    assert_eq!(daemon.prepare_with("extract above", "one", above).await.unwrap().r#type, "overlay");
    let asked = fused.take_asked();
    assert!(!asked.iter().any(|asked| matches!(asked, Request::ProbeLayer { .. } | Request::AnnounceLayer { .. })));
    let noted = control::NotLazy::read(&daemon.root().join(control::root::NOT_LAZY)).unwrap();
    let noted: Vec<_> = noted.into_iter().map(|noted| (noted.image, noted.reason)).collect();
    assert_eq!(noted, [("refused/image".to_owned(), "no permission: answered 401".to_owned())]);
}

/// Nobody was told why a converted image was pulled completely on a node that had its base unconverted.
#[tokio::test]
async fn an_image_whose_base_is_here_as_an_ordinary_one_says_so() {
    let (daemon, _fused) = start().await;
    daemon.prepare("extract base", "").await.unwrap();
    daemon.commit("extract base", "base").await.unwrap();
    let above = labels_of("above", "above", "host/image:lazy");
    assert_eq!(daemon.prepare_with("extract above", "base", above).await.unwrap().r#type, "overlay");
    let noted = control::NotLazy::read(&daemon.root().join(control::root::NOT_LAZY)).unwrap();
    assert_eq!(noted.len(), 1);
    assert_eq!(noted[0].image, "host/image:lazy");
    assert!(noted[0].reason.contains("base is here as an ordinary image"), "{noted:?}");
}

#[tokio::test]
async fn a_layer_that_cannot_be_read_lies_on_lazy_ones_as_an_ordinary_one() {
    let (daemon, _fused) = start().await;
    let base = labels_of("base", "base", "refused/image:base");
    assert_eq!(code(daemon.prepare_with("extract base", "", base).await), Code::AlreadyExists);
    let mut refused = labels("one");
    refused.insert("containerd.io/snapshot/cri.image-ref".to_owned(), "refused/image".to_owned());
    let mount = daemon.prepare_with("extract", "base", refused).await.unwrap();
    assert_eq!(mount.r#type, "overlay");
    let view = Mounted::new(&mount);
    assert_eq!(view.read(&file_of("base")).unwrap(), "refused/image:base");
}

#[tokio::test]
async fn after_a_restart_trees_in_use_are_mounted_and_unused_ones_freed() {
    let (daemon, fused) = start().await;
    prepare_lazy(&daemon, "one", "").await;
    daemon.prepare("container", "one").await.unwrap();
    drop(fused);
    let fused = Fused::start(daemon.directory.path(), vec![remote("one"), remote("left over")]);
    let daemon = daemon.restarted(Signal::KILL).await;
    fused.wait_until_asked(&Request::MountTree { layers: vec![remote("one")] }).await;
    let left_over = remote("left over").layer.id();
    fused.wait_until_asked(&Request::RemoveLayer { layer: left_over }).await;
    fused.wait_until_asked(&Request::ReleaseTree { tree: left_over }).await;
    let one = remote("one").layer.id();
    let asked = fused.take_asked();
    assert!(
        !asked.contains(&Request::RemoveLayer { layer: one }) && !asked.contains(&Request::ReleaseTree { tree: one })
    );
    drop(daemon);
}

#[tokio::test]
async fn without_the_other_daemon_a_base_layer_is_pulled_completely() {
    let daemon = Daemon::start_in(TempDir::new().unwrap()).await;
    let mount = daemon.prepare_with("extract", "", labels("one")).await.unwrap();
    assert_eq!(mount.r#type, "bind");
    daemon.commit("extract", "one").await.unwrap();
    assert_eq!(daemon.stat("one").await.unwrap().labels, HashMap::new());
}

/// The tar stream of the honest base, and the chain IDs of it and of a layer above it.
fn chains() -> (Digest, String, String) {
    let tar = Digest::of(b"tar stream of the base");
    (tar, tar.to_string(), Digest::of(format!("{tar} {}", Digest::of(b"above")).as_bytes()).to_string())
}

/// The labels of the layer `name` for a chain, of an image.
fn labels_of(name: &str, chain: &str, image: &str) -> HashMap<String, String> {
    let mut labels = labels(name);
    labels.insert("containerd.io/snapshot.ref".to_owned(), chain.to_owned());
    labels.insert("containerd.io/snapshot/cri.image-ref".to_owned(), image.to_owned());
    labels
}

impl Fused {
    /// The tar stream of the layer `name` has been hashed.
    fn hashed(&self, name: &str, tar: Digest) {
        self.verdicts.lock().unwrap().insert(remote(name).layer.id(), Verdict::Verified { tar });
    }

    fn layers_of_last_tree(&self) -> Vec<LayerId> {
        let asked = self.asked.lock().unwrap();
        let last = asked.iter().rev().find_map(|asked| match asked {
            Request::MountTree { layers } => Some(layers.iter().map(|layer| layer.layer.id()).collect()),
            _ => None,
        });
        last.unwrap_or_default()
    }
}

/// One image names the config of another, and a layer of its own.
#[tokio::test]
async fn a_chain_that_an_image_lies_about_is_never_shown_to_the_honest_one() {
    let (daemon, fused) = start().await;
    let (tar, chain, _) = chains();
    let evil = labels_of("evil", &chain, "evil/trap:1");
    assert_eq!(code(daemon.prepare_with("a/1/extract-1 x", "", evil).await), Code::AlreadyExists);
    // Another namespace pulls the honest one: which of the two is right is not known, so it is pulled completely.
    let honest = || labels_of("honest", &chain, "host/good:1");
    let mount = daemon.prepare_with("b/2/extract-2 x", "", honest()).await.unwrap();
    assert_eq!(mount.r#type, "bind");
    fused
        .wait_until_asked(&Request::Verify {
            layers: vec![RemoteLayer { image: "evil/trap:1".to_owned(), ..remote("evil") }],
        })
        .await;
    // Now it is known: the honest layer takes the place of the other one.
    fused.hashed("evil", Digest::of(b"another tar stream"));
    assert_eq!(code(daemon.prepare_with("b/3/extract-3 x", "", honest()).await), Code::AlreadyExists);
    daemon.prepare("container", &chain).await.unwrap();
    assert_eq!(fused.layers_of_last_tree(), [remote("honest").layer.id()]);
    fused.hashed("honest", tar);
}

#[tokio::test]
async fn a_layer_that_is_another_by_its_index_is_shared_once_it_is_verified() {
    let (daemon, fused) = start().await;
    let (tar, chain, _) = chains();
    let first = labels_of("first", &chain, "host/good:1");
    assert_eq!(code(daemon.prepare_with("extract-1 x", "", first).await), Code::AlreadyExists);
    fused.hashed("first", tar);
    let again = labels_of("converted again", &chain, "other/good:1");
    assert_eq!(code(daemon.prepare_with("extract-2 x", "", again).await), Code::AlreadyExists);
    daemon.prepare("container", &chain).await.unwrap();
    assert_eq!(fused.layers_of_last_tree(), [remote("first").layer.id()]);
}

#[tokio::test]
async fn an_image_whose_layer_is_there_already_is_a_place_of_it_too() {
    let (daemon, fused) = start().await;
    let (_, chain, _) = chains();
    for (number, image) in ["host/first:1", "host/second:1"].into_iter().enumerate() {
        let labels = labels_of("base", &chain, image);
        assert_eq!(code(daemon.prepare_with(&format!("extract-{number} x"), "", labels).await), Code::AlreadyExists);
    }
    let place = RemoteLayer { image: "host/second:1".to_owned(), ..remote("base") };
    fused.wait_until_asked(&Request::AnnounceLayer { layer: place }).await;
}

/// The first image had the same index in a blob of its own; containers of all images asked for that one.
#[tokio::test]
async fn containers_name_the_blob_of_every_image_of_their_chain() {
    let (daemon, fused) = start().await;
    let (tar, chain, above) = chains();
    let elsewhere = |image: &str, blob: &[u8]| {
        let layer = LazyLayer { blob: Digest::of(blob), ..remote("base").layer };
        RemoteLayer { layer, image: image.to_owned() }
    };
    let (evil, honest) = (elsewhere("evil/trap:1", b"evil"), elsewhere("host/good:1", b"honest"));
    for (number, place) in [&evil, &honest].into_iter().enumerate() {
        let mut labels = labels_of("base", &chain, &place.image);
        labels.extend(place.layer.to_annotations());
        labels.insert("containerd.io/snapshot/cri.layer-digest".to_owned(), place.layer.blob.to_string());
        assert_eq!(code(daemon.prepare_with(&format!("extract-{number} x"), "", labels).await), Code::AlreadyExists);
    }
    fused.wait_until_asked(&Request::AnnounceLayer { layer: honest.clone() }).await;
    daemon.prepare("container", &chain).await.unwrap();
    let asked = fused.take_asked();
    for layers in [vec![evil.clone()], vec![honest.clone()]] {
        let wanted = Request::MountTree { layers };
        assert!(asked.contains(&wanted), "{wanted:?}: {asked:?}");
    }
    // A further layer of the honest image says again where it has those below.
    fused.hashed("base", tar);
    let labels = labels_of("above", &above, "host/good:1");
    assert_eq!(code(daemon.prepare_with("extract-3 x", &chain, labels).await), Code::AlreadyExists);
    fused.wait_until_asked(&Request::AnnounceLayer { layer: honest }).await;
    let guess = RemoteLayer { image: "host/good:1".to_owned(), ..evil };
    assert!(!fused.take_asked().contains(&Request::AnnounceLayer { layer: guess }));
}

#[tokio::test]
async fn a_layer_above_the_unverified_base_of_another_image_waits_for_the_verdict() {
    let (daemon, fused) = start().await;
    let (tar, chain, above) = chains();
    let base = labels_of("base", &chain, "elsewhere/base:1");
    assert_eq!(code(daemon.prepare_with("extract-1 x", "", base).await), Code::AlreadyExists);
    // Lazy, ordinary with the image's name, and ordinary without it.
    let lazy = || labels_of("above", &above, "host/app:1");
    let named = || to_labels(&[("containerd.io/snapshot/cri.image-ref", "host/app:1")]);
    for (number, labels) in [lazy(), named(), HashMap::new()].into_iter().enumerate() {
        let refused = daemon.prepare_with(&format!("extract-2-{number} x"), &chain, labels).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{number}: {refused}");
        assert!(refused.message().contains("ask again"), "{refused}");
    }
    let own = to_labels(&[("containerd.io/snapshot/cri.image-ref", "elsewhere/base:2")]);
    assert!(daemon.prepare_with("extract-3 x", &chain, own).await.is_ok(), "its own repository");
    fused.hashed("base", tar);
    assert_eq!(code(daemon.prepare_with("extract-4 x", &chain, lazy()).await), Code::AlreadyExists);
    for (number, labels) in [named(), HashMap::new()].into_iter().enumerate() {
        assert!(daemon.prepare_with(&format!("extract-5-{number} x"), &chain, labels).await.is_ok(), "{number}");
    }
}

#[tokio::test]
async fn nothing_is_built_on_a_refused_chain_and_the_daemon_remembers_it() {
    let (mut daemon, fused) = start().await;
    let (_, chain, _) = chains();
    let evil = labels_of("evil", &chain, "evil/trap:1");
    assert_eq!(code(daemon.prepare_with("extract-1 x", "", evil.clone()).await), Code::AlreadyExists);
    daemon.prepare("early", &chain).await.unwrap();
    fused.hashed("evil", Digest::of(b"another tar stream"));
    // Nobody asks: it is found out all the same.
    while daemon.mounts("early").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for is_restarted in [false, true] {
        if is_restarted {
            fused.verdicts.lock().unwrap().clear();
            daemon = daemon.restarted(Signal::TERM).await;
        }
        let refused = [
            daemon.prepare(&format!("container {is_restarted}"), &chain).await,
            daemon.view(&format!("view {is_restarted}"), &chain).await,
            daemon.mounts("early").await,
        ];
        for refused in refused.map(Result::unwrap_err) {
            assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
            assert!(refused.message().contains("evil/trap:1, is refused"), "{refused}");
        }
    }
    // Something is built on it, so that no other layer takes its place.
    let honest = labels_of("honest", &chain, "host/good:1");
    assert_eq!(daemon.prepare_with("extract-2 x", "", honest.clone()).await.unwrap().r#type, "bind");
    daemon.remove("early").await.unwrap();
    assert_eq!(code(daemon.prepare_with("extract-3 x", "", honest).await), Code::AlreadyExists);
    daemon.prepare("late", &chain).await.unwrap();
}

/// The annotations of a pod become labels of its sandbox's snapshot.
#[tokio::test]
async fn a_container_that_carries_the_labels_of_a_layer_records_none() {
    let (daemon, fused) = start().await;
    let (_, chain, _) = chains();
    let mount = daemon.prepare_with("k8s.io/4/0123abcd", "", labels_of("evil", &chain, "private/app:1")).await.unwrap();
    assert_eq!(mount.r#type, "bind");
    assert_eq!(daemon.names(&[]).await, ["k8s.io/4/0123abcd"]);
    assert_eq!(fused.take_asked(), []);
}
