//! The real daemon, its clients, and real mounts.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
        RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, UsageResponse,
        ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_bind_recursive, mount_remount, move_mount, unmount,
};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};

/// How long the daemon may take to serve, or to end.
const SOON: Duration = Duration::from_secs(30);

pub(crate) type Answer<T> = Result<T, Status>;

/// A running `lazuli-snapshotter` with a root of its own, ended when dropped.
pub(crate) struct Daemon {
    pub(crate) directory: TempDir,
    child: Child,
    client: SnapshotsClient<Channel>,
}

impl Daemon {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn start_in(directory: TempDir) -> Self {
        let child = spawn(directory.path(), &[]);
        let client = connect(&directory.path().join("s.sock")).await;
        Self { directory, child, client }
    }

    /// Writes its log to `log`.
    pub(crate) async fn start_with_log(directory: TempDir, log: impl Into<Stdio>) -> Self {
        let child = command(directory.path(), &[]).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let client = connect(&directory.path().join("s.sock")).await;
        Self { directory, child, client }
    }

    /// Ends the daemon with `signal` and starts it again on the same root.
    pub(crate) async fn restarted(mut self, signal: rustix::process::Signal) -> Self {
        self.end(signal);
        self.child = spawn(self.directory.path(), &[]);
        self.client = connect(&self.directory.path().join("s.sock")).await;
        self
    }

    pub(crate) fn end(&mut self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.directory.path().join("s.sock")
    }

    pub(crate) async fn prepare(&self, key: &str, parent: &str) -> Answer<Mount> {
        self.prepare_with(key, parent, HashMap::new()).await
    }

    pub(crate) async fn prepare_with(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Answer<Mount> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = PrepareSnapshotRequest { snapshotter: "lazuli".to_owned(), key, parent, labels };
        let mut mounts = self.client.clone().prepare(request).await?.into_inner().mounts;
        assert_eq!(mounts.len(), 1);
        Ok(mounts.remove(0))
    }

    pub(crate) async fn view(&self, key: &str, parent: &str) -> Answer<Mount> {
        self.view_with(key, parent, HashMap::new()).await
    }

    pub(crate) async fn view_with(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Answer<Mount> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = ViewSnapshotRequest { key, parent, labels, ..ViewSnapshotRequest::default() };
        Ok(self.client.clone().view(request).await?.into_inner().mounts.remove(0))
    }

    pub(crate) async fn mounts(&self, key: &str) -> Answer<Mount> {
        let request = MountsRequest { key: key.to_owned(), ..MountsRequest::default() };
        Ok(self.client.clone().mounts(request).await?.into_inner().mounts.remove(0))
    }

    pub(crate) async fn commit(&self, key: &str, name: &str) -> Answer<()> {
        let (key, name) = (key.to_owned(), name.to_owned());
        let request = CommitSnapshotRequest { key, name, ..CommitSnapshotRequest::default() };
        self.client.clone().commit(request).await.map(|_| ())
    }

    /// Commits onto a parent, as containerd 2 can: `containerd-client` has no field for it.
    pub(crate) async fn commit_onto(&self, key: &str, name: &str, parent: &str) -> Answer<()> {
        let request = snapshotter::api::CommitSnapshotRequest {
            key: key.to_owned(),
            name: name.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        let path = "/containerd.services.snapshots.v1.Snapshots/Commit";
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
        let channel = containerd_client::connect(self.address()).await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<_, ()>::default();
        client.unary(tonic::Request::new(request), path, codec).await.map(|_| ())
    }

    pub(crate) async fn remove(&self, key: &str) -> Answer<()> {
        let request = RemoveSnapshotRequest { key: key.to_owned(), ..RemoveSnapshotRequest::default() };
        self.client.clone().remove(request).await.map(|_| ())
    }

    pub(crate) async fn stat(&self, key: &str) -> Answer<Info> {
        let request = StatSnapshotRequest { key: key.to_owned(), ..StatSnapshotRequest::default() };
        Ok(self.client.clone().stat(request).await?.into_inner().info.unwrap())
    }

    pub(crate) async fn update(&self, key: &str, labels: &[(&str, &str)], paths: &[&str]) -> Answer<Info> {
        let info = Info { name: key.to_owned(), labels: to_labels(labels), ..Info::default() };
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let request = UpdateSnapshotRequest {
            info: Some(info),
            update_mask: Some(prost_types::FieldMask { paths }),
            ..UpdateSnapshotRequest::default()
        };
        Ok(self.client.clone().update(request).await?.into_inner().info.unwrap())
    }

    pub(crate) async fn list(&self, filters: &[&str]) -> Answer<Vec<Info>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListSnapshotsRequest { filters, ..ListSnapshotsRequest::default() };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut infos = Vec::new();
        while let Some(message) = stream.message().await? {
            infos.extend(message.info);
        }
        Ok(infos)
    }

    pub(crate) async fn names(&self, filters: &[&str]) -> Vec<String> {
        self.list(filters).await.unwrap().into_iter().map(|info| info.name).collect()
    }

    pub(crate) async fn usage(&self, key: &str) -> Answer<UsageResponse> {
        let request = UsageRequest { key: key.to_owned(), ..UsageRequest::default() };
        Ok(self.client.clone().usage(request).await?.into_inner())
    }

    pub(crate) async fn cleanup(&self) -> Answer<()> {
        self.client.clone().cleanup(CleanupRequest::default()).await.map(|_| ())
    }

    /// Commits `name` on `parent` after `change` has run in the mounted snapshot.
    pub(crate) async fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("{name}-active");
        let mount = self.prepare(&key, parent).await.unwrap();
        change(Mounted::new(&mount).path());
        self.commit(&key, name).await.unwrap();
    }

    /// The mount points below the root, sorted.
    pub(crate) fn mount_points(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = self.root().display().to_string();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4)?.strip_prefix(&root));
        let mut points: Vec<_> = points.map(str::to_owned).collect();
        points.sort();
        points
    }

    /// The ids of the snapshot directories.
    pub(crate) fn directories(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("snapshots")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have been ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // They outlive it.
        for point in self.mount_points().iter().rev() {
            let path = format!("{}{point}", self.root().display());
            if let Err(error) = unmount(&path, UnmountFlags::DETACH) {
                eprintln!("{path}: {error}");
            }
        }
    }
}

/// Waits until something is as expected: for what the daemon does behind its calls.
pub(crate) async fn settles<T: PartialEq + std::fmt::Debug>(look: impl Fn() -> T, expected: T) {
    let give_up_at = Instant::now() + SOON;
    loop {
        let found = look();
        if found == expected {
            return;
        }
        assert!(Instant::now() < give_up_at, "{found:?} instead of {expected:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Starts the daemon in `directory` with further arguments.
pub(crate) fn spawn(directory: &Path, arguments: &[&str]) -> Child {
    command(directory, arguments).stdin(Stdio::null()).spawn().unwrap()
}

/// Runs the daemon to its end, which is expected to be an error.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> Output {
    command(directory, arguments).output().unwrap()
}

pub(crate) fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazuli-snapshotter"));
    command.arg("--root").arg(directory.join("root")).arg("--fused").arg("/nonexistent/lazuli-fused");
    if !arguments.contains(&"--address") {
        command.arg("--address").arg(directory.join("s.sock"));
    }
    let config = directory.join("node.toml");
    if config.exists() {
        command.arg("--config").arg(config);
    }
    command.args(arguments);
    command
}

pub(crate) async fn connect(address: &Path) -> SnapshotsClient<Channel> {
    let give_up_at = Instant::now() + SOON;
    loop {
        match containerd_client::connect(address).await {
            Ok(channel) => return SnapshotsClient::new(channel),
            Err(error) if Instant::now() > give_up_at => panic!("{}: {error}", address.display()),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

pub(crate) fn code<T: std::fmt::Debug>(answer: Answer<T>) -> Code {
    answer.unwrap_err().code()
}

pub(crate) fn to_labels(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// The labels of a snapshot of a user namespace.
pub(crate) fn user_namespace(users: &str, groups: &str) -> HashMap<String, String> {
    to_labels(&[("containerd.io/snapshot/uidmapping", users), ("containerd.io/snapshot/gidmapping", groups)])
}

/// User and group of a file.
pub(crate) fn owner(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (std::os::unix::fs::MetadataExt::uid(&found), std::os::unix::fs::MetadataExt::gid(&found))
}

/// A snapshot mounted as containerd would, unmounted when dropped.
pub(crate) struct Mounted(TempDir);

impl Mounted {
    pub(crate) fn new(mount: &Mount) -> Self {
        let target = tempfile::tempdir().unwrap();
        match mount.r#type.as_str() {
            "bind" => {
                mount_bind_recursive(&mount.source, target.path()).unwrap();
                if mount.options.iter().any(|option| option == "ro") {
                    mount_remount(target.path(), MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
                }
            }
            "overlay" => overlay(mount, target.path()).unwrap(),
            other => panic!("mount type {other}"),
        }
        Self(target)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.path().join(name))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0.path(), UnmountFlags::DETACH) {
            eprintln!("{}: {error}", self.0.path().display());
        }
    }
}

/// Through the new mount API: one lower directory a call, so that their number does not matter.
fn overlay(mount: &Mount, target: &Path) -> io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", paths)) => {
                for path in paths.split(':') {
                    fsconfig_set_string(&context, "lowerdir+", path)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&context, option.as_str())?,
        }
    }
    fsconfig_create(&context)?;
    let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&mounted, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}
