//! Snapshots of user namespaces over lazy images: everything that is real, and the snapshotter asked as containerd asks.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
};

use containerd_client::{
    services::v1::snapshots::{
        ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
        snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry, compare_trees,
    containerd::LAZULI,
    error::Context as _,
    node,
    process::{command, finish, run, wait_for},
    programs::{MODES, lazuli_ok},
    real_images::busybox,
    samples::{LARGE_FILE_COUNT, LARGE_FILES_LEN, checksum_line, eventful_layers, large_file, readable_layers},
    tar_layer::Attributes,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// What is added to users and groups, and how many of each are mapped.
const USERS: u32 = 100_000;
const GROUPS: u32 = 200_000;
/// More than all owners in the image: what belongs to others cannot even root read.
const COUNT: u32 = 3_000_000;
/// `cap_net_bind_service`, effective and permitted, for whoever is root of the user namespace that it is read in.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const LIST: &str = "system.posix_acl_access";

/// An access control list that lets a user read and write, as Linux passes it (include/uapi/linux/posix_acl_xattr.h).
fn list_for(user: u32) -> Vec<u8> {
    let entry = |tag: u16, permission: u16, id: u32| {
        [&tag.to_le_bytes()[..], &permission.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let all = [(1, 6, u32::MAX), (2, 6, user), (4, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 4, u32::MAX)];
    let entries = all.into_iter().flat_map(|(tag, permission, id)| entry(tag, permission, id));
    2_u32.to_le_bytes().into_iter().chain(entries).collect()
}

/// An image of every kind of entry, with a shell and large files, converted, as `sample:lazy`.
fn publish(scratch: &Scratch) -> Result<TestRegistry> {
    let registry = TestRegistry::start(scratch)?;
    let marked = |name, value: &[u8]| Attributes { xattrs: vec![(name, value.to_vec())], ..Attributes::of_mode(0o755) };
    let listed = Attributes { mode: 0o664, ..marked(LIST, &list_for(1000)) };
    let own = TarLayer::new()
        .directory("own")
        .file_with("own/cat", &marked("security.capability", &CAPABILITY), busybox()?)
        .symlink("own/start-stop-daemon", "/bin/busybox")
        .directory("etc")
        .file("etc/passwd", "user:x:1000:1001::/:/bin/sh\n")
        .file_with("own/listed", &listed, "listed")
        .file_with("own/of-a-user", &Attributes { owner: (1000, 1001), ..Attributes::of_mode(0o600) }, "hers");
    let layers = eventful_layers()?.into_iter().chain(readable_layers()?).chain([own.finish()?]);
    let image = layers.fold(ImageBuilder::new(), |image, tar| image.layer(tar, Compression::Gzip));
    let original = registry.push(&image.write(scratch, "image")?, "sample:original")?;
    lazuli_ok(["convert", &original, &registry.reference("sample:lazy")])?;
    Ok(registry)
}

/// The snapshotter, asked directly.
struct Snapshots {
    runtime: Runtime,
    socket: PathBuf,
}

impl Snapshots {
    fn of(node: &Node) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")?;
        Ok(Self { runtime, socket: node.snapshotter.socket().to_owned() })
    }

    /// Connected anew each time: it may have been started again.
    fn ask<T>(
        &self,
        request: impl AsyncFnOnce(SnapshotsClient<Channel>) -> std::result::Result<T, tonic::Status>,
    ) -> Result<T> {
        let failed = |error: String| HarnessError::Unexpected(error);
        self.runtime.block_on(async {
            let channel = containerd_client::connect(&self.socket).await.map_err(|error| failed(error.to_string()))?;
            request(SnapshotsClient::new(channel)).await.map_err(|status| failed(status.to_string()))
        })
    }

    /// The key of the topmost layer of the one image that was pulled.
    fn top(&self) -> Result<String> {
        let all = self.ask(async |mut client| {
            let mut stream = client.list(ListSnapshotsRequest::default()).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.extend(message.info);
            }
            Ok(all)
        })?;
        let top = all.iter().find(|info| all.iter().all(|other| other.parent != info.name));
        top.map(|info| info.name.clone()).ok_or_else(|| HarnessError::Unexpected("there are no snapshots".to_owned()))
    }

    fn prepare(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<Mount> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = PrepareSnapshotRequest { key, parent, labels, ..PrepareSnapshotRequest::default() };
        self.ask(async |mut client| Ok(client.prepare(request).await?.into_inner().mounts.remove(0)))
    }

    fn view(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<Mount> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = ViewSnapshotRequest { key, parent, labels, ..ViewSnapshotRequest::default() };
        self.ask(async |mut client| Ok(client.view(request).await?.into_inner().mounts.remove(0)))
    }

    fn mounts(&self, key: &str) -> Result<Mount> {
        let request = MountsRequest { key: key.to_owned(), ..MountsRequest::default() };
        self.ask(async |mut client| Ok(client.mounts(request).await?.into_inner().mounts.remove(0)))
    }

    fn remove(&self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest { key: key.to_owned(), ..RemoveSnapshotRequest::default() };
        self.ask(async |mut client| client.remove(request).await.map(drop))
    }
}

fn labels() -> HashMap<String, String> {
    [("uid", USERS), ("gid", GROUPS)]
        .map(|(kind, first)| (format!("containerd.io/snapshot/{kind}mapping"), format!("0:{first}:{COUNT}")))
        .into()
}

/// Mounts as containerd does.
fn mount(mount: &Mount, directory: &Path) -> Result<()> {
    let mut words = vec!["-t".to_owned(), mount.r#type.clone(), mount.source.clone(), directory.display().to_string()];
    words.extend(["-o".to_owned(), mount.options.join(",").replace("ro,rbind", "rbind")]);
    run(&mut command("mount", words)).map(drop)
}

/// Everything below a directory, itself included, by relative path.
fn entries(root: &Path) -> Result<BTreeMap<PathBuf, fs::Metadata>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let metadata = fs::symlink_metadata(&path).at("looking at", &path)?;
        if metadata.is_dir() {
            for entry in fs::read_dir(&path).at("listing", &path)? {
                pending.push(relative.join(entry.at("listing", &path)?.file_name()));
            }
        }
        found.insert(relative, metadata);
    }
    Ok(found)
}

/// The same but for owners, which are shifted in every entry, and what names owners in attributes.
fn check_shifted(plain: &Path, shown: &Path) -> Result<()> {
    let (originals, all) = (entries(plain)?, entries(shown)?);
    assert!(all.len() > 60 && all.len() == originals.len(), "{} entries of {}", all.len(), originals.len());
    for (path, found) in &all {
        let original = &originals[path];
        let expected = (USERS + original.uid(), GROUPS + original.gid());
        assert_eq!((found.uid(), found.gid()), expected, "{}", path.display());
    }
    let differences: Vec<_> = compare_trees(plain, shown)?.iter().map(ToString::to_string).collect();
    let others = differences.iter().filter(|line| !line.contains(": owner and group is "));
    let others: Vec<_> = others.filter_map(|line| Some(line.split_once(" is ")?.0)).collect();
    assert_eq!(others, ["/own/cat: xattrs", "/own/listed: xattrs", "/xattrs/capable: xattrs"]);
    let value = |path: &str, name| {
        let path = shown.join(path);
        xattr::get(&path, name).at("reading an attribute of", &path).map(Option::unwrap_or_default)
    };
    // Version 3 says whose root it is for.
    let capability = [&[1, 0, 0, 3], &CAPABILITY[4..], &USERS.to_le_bytes()].concat();
    assert_eq!(value("own/cat", "security.capability")?, capability);
    assert_eq!(value("own/listed", LIST)?, list_for(USERS + 1000));
    Ok(())
}

/// Runs a script as root of the user namespace, as far as files see it.
fn as_root(directory: &Path, script: &str) -> Result<String> {
    let mut shell = command("/bin/sh", ["-c", script]);
    let finished = finish(shell.current_dir(directory).uid(USERS).gid(GROUPS))?;
    assert_eq!(finished.code, Some(0), "{script}: {finished:?}");
    Ok(finished.stdout)
}

/// What `sha256sum` prints for large file `index`, called by its path from the root directory on.
fn relative_checksum_line(index: usize) -> String {
    checksum_line(index).replace(" /large/", " large/")
}

/// The `lazuli-fused` of a root directory, once it answers.
fn fused_of(root: &Path, old: Option<u32>) -> Result<u32> {
    wait_for("there is no lazuli-fused", || {
        let is_there = std::os::unix::net::UnixStream::connect(root.join("fused.sock")).is_ok();
        Ok(node::fused_of(root).filter(|id| Some(*id) != old && is_there))
    })
}

fn send(id: u32, signal: Signal) -> Result<()> {
    let sent = kill_process(Pid::from_raw(id.cast_signed()).expect("not 0"), signal);
    sent.map_err(|error| HarnessError::Unexpected(format!("signal to {id}: {error}")))
}

fn mounts_in(scratch: &Scratch, directory: &Path) -> usize {
    scratch.mounts().iter().filter(|mount| mount.starts_with(directory)).count()
}

#[test]
fn a_lazy_image_is_shown_with_other_owners_in_kernel_mode() -> Result<()> {
    check("erofs")
}

#[test]
fn a_lazy_image_is_shown_with_other_owners_in_portable_mode() -> Result<()> {
    check("fuse")
}

/// Goal: a snapshot of a user namespace shows what another shows, with all owners shifted, takes writes with shifted
/// owners, goes on when daemons are killed and restarted, and leaves no mount.
/// Method: one snapshot with mapping and one without over the same lazy image, as containerd would mount them.
fn check(mode: &str) -> Result<()> {
    let scratch = Scratch::new(&format!("user-namespaces-{mode}"))?;
    let registry = publish(&scratch)?;
    let mut node = Node::start_in(mode, &scratch)?;
    let before = registry.blob_bytes()?;
    let pulled = node.lazuli_pull(&registry.reference("sample:lazy"))?;
    assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
    let (snapshots, root) = (Snapshots::of(&node)?, node.snapshotter.root().to_owned());
    let top = snapshots.top()?;
    let [plain, shown, viewed] = ["plain", "shown", "viewed"].map(|name| scratch.directory(name));
    let (plain, shown, viewed) = (plain?, shown?, viewed?);
    let mounts = snapshots.prepare("shown", &top, labels())?;
    mount(&mounts, &shown)?;
    assert_eq!(
        as_root(&shown, "cat etc/greeting; stat -c '%u %g' large/*| uniq; ls large | wc -l")?,
        "good morning\n100000 200000\n6\n"
    );
    let moved = registry.blob_bytes()? - before;
    assert!(moved < LARGE_FILES_LEN / 2, "{mode}: {moved} bytes for a snapshot of which a line was read");

    let script =
        "echo mine > own/new && echo more >> etc/greeting && rm large/5 && cat etc/greeting && echo x > root 2>&1";
    assert_eq!(as_root(&shown, script)?, "good morning\nmore\n");
    let upper = mounts.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    let upper = PathBuf::from(upper.ok_or_else(|| HarnessError::Unexpected(format!("{mounts:?}")))?);
    for name in ["", "own", "own/new", "etc/greeting", "root"] {
        let found = fs::symlink_metadata(upper.join(name)).at("looking at", &upper.join(name))?;
        assert_eq!((found.uid(), found.gid()), (USERS, GROUPS), "{name}");
    }

    // What is not there yet comes through whichever daemon there is.
    node.snapshotter.kill_and_restart()?;
    assert_eq!(as_root(&shown, "sha256sum large/0")?, relative_checksum_line(0));
    let fused = fused_of(&root, None)?;
    wait_for("the session has one holder", || Ok(holds_session(node.snapshotter.id()).then_some(())))?;
    send(fused, Signal::KILL)?;
    assert_eq!(as_root(&shown, "sha256sum large/1")?, relative_checksum_line(1));
    let fused = fused_of(&root, Some(fused))?;
    assert_eq!(snapshots.mounts("shown")?, mounts);
    let mapped = root.join("id-mapped");
    assert_eq!(mounts_in(&scratch, &mapped), 1);

    mount(&snapshots.view("plain", &top, HashMap::new())?, &plain)?;
    mount(&snapshots.view("viewed", &top, labels())?, &viewed)?;
    check_shifted(&plain, &viewed)?;
    assert_eq!(mounts_in(&scratch, &mapped), 2);
    for directory in [&plain, &viewed] {
        run(&mut command("umount", [directory]))?;
    }
    snapshots.remove("viewed")?;
    // The call changes records; the mount goes behind it.
    wait_for("the view's mount stays", || Ok((mounts_in(&scratch, &mapped) == 1).then_some(())))?;
    // Told to end while nobody holds its session, lazuli-fused leaves no mount behind, that of a snapshot included.
    run(&mut command("umount", [&shown]))?;
    node.snapshotter.stop();
    send(fused, Signal::TERM)?;
    wait_for("mounts stay", || Ok((mounts_in(&scratch, &root) == 0).then_some(())))?;
    // As after a reboot.
    node.snapshotter.restart()?;
    assert_eq!(snapshots.mounts("shown")?, mounts);
    mount(&mounts, &shown)?;
    assert_eq!(
        as_root(&shown, "cat etc/greeting; sha256sum large/2")?,
        format!("good morning\nmore\n{}", relative_checksum_line(2))
    );
    run(&mut command("umount", [&shown]))?;
    snapshots.remove("shown")?;
    wait_for("the snapshot's mount stays", || Ok((mounts_in(&scratch, &mapped) == 0).then_some(())))?;
    Ok(())
}

/// A tree that has arrived is mounted anew over the cache files when it is asked for, and so is what is made of it: no
/// daemon is needed to read it then.
#[test]
fn a_complete_image_is_shown_without_any_daemon() -> Result<()> {
    let scratch = Scratch::new("user-namespaces-complete")?;
    let registry = TestRegistry::start(&scratch)?;
    let files = (0..LARGE_FILE_COUNT).fold(TarLayer::new().directory("large"), |layer, index| {
        layer.file(&format!("large/{index}"), large_file(index))
    });
    let image = ImageBuilder::new().layer(files.finish()?, Compression::Gzip).write(&scratch, "image")?;
    lazuli_ok(["convert", &image, &registry.reference("sample:lazy")])?;
    let node = Node::start_in("erofs", &scratch)?;
    let pulled = node.lazuli_pull(&registry.reference("sample:lazy"))?;
    assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
    let (snapshots, root) = (Snapshots::of(&node)?, node.snapshotter.root().to_owned());
    let (top, shown) = (snapshots.top()?, scratch.directory("shown")?);
    let view = snapshots.view("view", &top, labels())?;
    let device = || fs::metadata(&view.source).map(|found| found.dev()).at("looking at", Path::new(&view.source));
    let before = device()?;
    mount(&view, &shown)?;
    let all: String = (0..LARGE_FILE_COUNT).map(relative_checksum_line).collect();
    assert_eq!(as_root(&shown, "sha256sum large/*")?, all);
    wait_for("the image is not complete", || {
        assert_eq!(snapshots.mounts("view")?, view);
        Ok((device()? != before).then_some(()))
    })?;
    assert_eq!(mounts_in(&scratch, &root.join("id-mapped")), 1);
    run(&mut command("umount", [&shown]))?;
    mount(&view, &shown)?;
    let fused = fused_of(&root, None)?;
    send(fused, Signal::STOP)?;
    let read = as_root(&shown, "timeout 20 sha256sum large/*");
    send(fused, Signal::CONT)?;
    assert_eq!(read?, all);
    run(&mut command("umount", [&shown])).map(drop)
}

/// Whether a process has a descriptor of `/dev/fuse`.
fn holds_session(id: Option<u32>) -> bool {
    let descriptors = id.and_then(|id| fs::read_dir(format!("/proc/{id}/fd")).ok()).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == Path::new("/dev/fuse"))
}

/// A program of the image that has a capability has it in the container's user namespace, not outside, and programs
/// run as the users that the container sees.
#[test]
fn programs_run_with_the_capabilities_of_their_files_in_each_mode() -> Result<()> {
    for mode in MODES {
        let scratch = Scratch::new(&format!("user-namespace-capabilities-{mode}"))?;
        let registry = publish(&scratch)?;
        let node = Node::start_in(mode, &scratch)?;
        let lazy = registry.reference("sample:lazy");
        let pulled = node.lazuli_pull(&lazy)?;
        assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
        let script = "/own/cat /own/of-a-user /own/listed; for cat in /bin/cat /own/cat; do \
                      while read key value; do [ $key != CapEff: ] || echo $value; done <<END\n$($cat /proc/self/status)\nEND\ndone";
        let mut ctr =
            node.containerd.ctr(["run", "--rm", "--snapshotter", LAZULI, "--remap-labels", "--allow-new-privs"]);
        ctr.args(["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", &lazy, &format!("capable-{mode}")]);
        ctr.args(["/own/start-stop-daemon", "-S", "-c", "user", "-x", "/bin/sh", "--", "-c", script]);
        let finished = finish(&mut ctr)?;
        let expected = "herslisted0000000000000000\n0000000000000400\n";
        assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), expected), "{mode}: {}", finished.stderr);
    }
    Ok(())
}
