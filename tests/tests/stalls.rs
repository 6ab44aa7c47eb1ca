//! Every call that containerd makes is answered while something else hangs: `lazuli-fused` with its session, the
//! registry, the disk. Real daemons, and the table of `docs/MEASUREMENTS.md` as a by-product.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
    snapshots_client::SnapshotsClient,
};
use lazuli_tests::{
    Node, Result, Scratch, Snapshotter,
    containerd::{LAZULI, OVERLAYFS},
    disks::BadDisk,
    error::{Context as _, HarnessError},
    node::SnapshotterOptions,
    process::{command, finish, wait_for},
    programs::program,
    samples::publish_sample,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tonic::{Request, Status, transport::Channel};

/// How often each call is made under each stall.
const ROUNDS: usize = 10;
/// No call may take longer, whatever hangs: the machine may be busy.
const CALL_WITHIN: Duration = Duration::from_secs(2);
/// The same on a slow disk, for calls that are answered when something is on it.
const DURABLE_WITHIN: Duration = Duration::from_secs(6);
/// A call that has no answer by then gets none.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// Rounds of overlayfs on the slow disk, where each call waits for several syncs.
const SLOW_ROUNDS: usize = 4;
/// How long a sync takes on the slow disk.
const SLOW_SYNC: Duration = Duration::from_millis(300);
/// Calls that wait for the disk: who asks for them relies on what they made after a crash.
const DURABLE: [&str; 3] = ["Prepare container", "View", "Commit"];

/// Times by stall and call.
type Times = BTreeMap<String, BTreeMap<String, Vec<Duration>>>;

/// A client of a snapshots service, with a clock.
struct Calls<'a> {
    runtime: &'a Runtime,
    client: SnapshotsClient<Channel>,
    snapshotter: &'static str,
    stall: String,
    times: &'a mut Times,
}

impl<'a> Calls<'a> {
    fn connect(
        runtime: &'a Runtime,
        socket: &Path,
        snapshotter: &'static str,
        stall: &str,
        times: &'a mut Times,
    ) -> Result<Self> {
        let channel = runtime.block_on(containerd_client::connect(socket));
        let channel = channel.map_err(|error| HarnessError::Unexpected(format!("{}: {error}", socket.display())))?;
        Ok(Self { runtime, client: SnapshotsClient::new(channel), snapshotter, stall: stall.to_owned(), times })
    }

    /// Makes a call, which must succeed in time, and notes how long it took.
    fn call<R, T, F>(
        &mut self,
        name: &str,
        request: R,
        call: impl FnOnce(SnapshotsClient<Channel>, Request<R>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Status>>,
    {
        let mut request = Request::new(request);
        let namespace = "default".parse().expect("plain text");
        request.metadata_mut().insert("containerd-namespace", namespace);
        let begin = Instant::now();
        let future = call(self.client.clone(), request);
        let answer = self.runtime.block_on(async { tokio::time::timeout(GIVE_UP_AFTER, future).await });
        let took = begin.elapsed();
        self.times.entry(self.stall.clone()).or_default().entry(name.to_owned()).or_default().push(took);
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
        answer.map_err(|status| {
            HarnessError::Unexpected(format!("{name} while {}, after {took:?}: {status}", self.stall))
        })
    }

    fn prepare(&mut self, name: &str, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<()> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let labels = labels.into_iter().chain(kept()).collect();
        let request = PrepareSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key, parent, labels };
        self.call(name, request, |mut client, request| async move { client.prepare(request).await }).map(drop)
    }

    fn commit(&mut self, name: &str, key: &str, committed: &str) -> Result<()> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            name: committed.to_owned(),
            labels: kept(),
        };
        self.call(name, request, |mut client, request| async move { client.commit(request).await }).map(drop)
    }

    fn remove(&mut self, name: &str, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key: key.to_owned() };
        self.call(name, request, |mut client, request| async move { client.remove(request).await }).map(drop)
    }

    fn list(&mut self, name: &str) -> Result<Vec<Info>> {
        let request = ListSnapshotsRequest { snapshotter: self.snapshotter.to_owned(), ..Default::default() };
        self.call(name, request, |mut client, request| async move {
            let mut stream = client.list(request).await?.into_inner();
            let mut infos = Vec::new();
            while let Some(message) = stream.message().await? {
                infos.extend(message.info);
            }
            Ok(infos)
        })
    }

    /// The questions about a snapshot of any kind.
    fn look(&mut self, kind: &str, key: &str) -> Result<()> {
        let (snapshotter, key) = (self.snapshotter.to_owned(), key.to_owned());
        let request = StatSnapshotRequest { snapshotter: snapshotter.clone(), key: key.clone() };
        let stat = self
            .call(&format!("Stat {kind}"), request, |mut client, request| async move { client.stat(request).await })?;
        let info = stat.into_inner().info.unwrap_or_default();
        let request = UsageRequest { snapshotter: snapshotter.clone(), key };
        self.call(&format!("Usage {kind}"), request, |mut client, request| async move { client.usage(request).await })?;
        let request = UpdateSnapshotRequest { snapshotter, info: Some(info), update_mask: None };
        let update = format!("Update {kind}");
        self.call(&update, request, |mut client, request| async move { client.update(request).await }).map(drop)
    }

    /// The directory that shows lazy layers.
    fn tree(&mut self, parent: &str, key: &str) -> Result<PathBuf> {
        let (key, parent, labels) = (key.to_owned(), parent.to_owned(), kept());
        let request = ViewSnapshotRequest { snapshotter: self.snapshotter.to_owned(), key, parent, labels };
        let view = self.call("View lazy", request, |mut client, request| async move { client.view(request).await })?;
        let mounts = view.into_inner().mounts;
        Ok(mounts.first().map(|mount| PathBuf::from(&mount.source)).unwrap_or_default())
    }

    /// The life of ordinary snapshots, as a pull and a container of an image that is not lazy have it.
    fn ordinary(&mut self, round: usize) -> Result<()> {
        let name = format!("{}-{round}", self.stall.replace(' ', "-"));
        let named = |what: &str| format!("{what}-{name}");
        let target = HashMap::from([("containerd.io/snapshot.ref".to_owned(), named("layer"))]);
        self.prepare("Prepare layer", &named("extract"), "", target)?;
        self.commit("Commit ordinary", &named("extract"), &named("layer"))?;
        self.prepare("Prepare container", &named("container"), &named("layer"), HashMap::new())?;
        let request = MountsRequest { snapshotter: self.snapshotter.to_owned(), key: named("container") };
        self.call("Mounts ordinary", request, |mut client, request| async move { client.mounts(request).await })?;
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: named("view"),
            parent: named("layer"),
            labels: kept(),
        };
        self.call("View ordinary", request, |mut client, request| async move { client.view(request).await })?;
        self.look("ordinary", &named("container"))?;
        self.list("List")?;
        for what in ["view", "container", "layer"] {
            self.remove("Remove ordinary", &named(what))?;
        }
        if self.snapshotter == LAZULI {
            let request = CleanupRequest { snapshotter: self.snapshotter.to_owned() };
            self.call("Cleanup", request, |mut client, request| async move { client.cleanup(request).await })?;
        }
        Ok(())
    }
}

/// Keeps containerd's garbage collection from a snapshot.
fn kept() -> HashMap<String, String> {
    HashMap::from([("containerd.io/gc.root".to_owned(), "yes".to_owned())])
}

/// Lazy snapshots for one stall: what is looked at, committed and removed while something hangs.
struct Lazy {
    bottom: Info,
    top: String,
    names: Vec<(String, String)>,
}

impl Lazy {
    /// For each round a committed lazy layer of its own, and an active snapshot on the image.
    fn make(calls: &mut Calls<'_>) -> Result<Self> {
        let all = calls.list("List")?;
        let is_lazy = |info: &&Info| info.labels.contains_key("containerd.io/snapshot/remote");
        let bottom = all.iter().filter(is_lazy).find(|info| info.parent.is_empty() && !info.name.starts_with("again-"));
        let bottom = bottom.cloned().ok_or_else(|| HarnessError::Unexpected(format!("nothing is lazy: {all:?}")))?;
        let mut names = Vec::new();
        for round in 0..ROUNDS {
            let name = format!("{}-{round}", calls.stall.replace(' ', "-"));
            let (layer, active) = (format!("again-{name}"), format!("active-{name}"));
            let mut labels = bottom.labels.clone();
            labels.remove("containerd.io/snapshot/remote");
            labels.insert("containerd.io/snapshot.ref".to_owned(), layer.clone());
            let prepared = calls.prepare("Prepare lazy", &format!("extract-{name}"), "", labels);
            assert!(
                matches!(&prepared, Err(error) if error.to_string().contains("AlreadyExists") || error.to_string().contains("already exist")),
                "{prepared:?}"
            );
            calls.prepare("Prepare on lazy", &active, &bottom.name, HashMap::new())?;
            names.push((layer, active));
        }
        Ok(Self { bottom, top: Self::top(&all)?, names })
    }

    /// The topmost layer of the image.
    fn top(all: &[Info]) -> Result<String> {
        let is_lazy = |info: &&Info| info.labels.contains_key("containerd.io/snapshot/remote");
        let is_parent = |name: &str| all.iter().filter(is_lazy).any(|other| other.parent == name);
        let is_top = |info: &&Info| !info.parent.is_empty() && !is_parent(&info.name);
        let top = all.iter().filter(is_lazy).find(is_top).map(|info| info.name.clone());
        top.ok_or_else(|| HarnessError::Unexpected(format!("nothing is lazy: {all:?}")))
    }

    fn round(&self, calls: &mut Calls<'_>, round: usize) -> Result<()> {
        let (layer, active) = &self.names[round];
        calls.look("lazy", &self.bottom.name)?;
        calls.look("on lazy", active)?;
        calls.commit("Commit on lazy", active, &format!("committed-{active}"))?;
        calls.remove("Remove lazy", layer)
    }
}

fn signal(id: Option<u32>, signal: Signal) -> Result<()> {
    let id = id.and_then(|id| Pid::from_raw(i32::try_from(id).unwrap_or_default()));
    let id = id.ok_or_else(|| HarnessError::Unexpected("there is no lazuli-fused".to_owned()))?;
    kill_process(id, signal).map_err(std::io::Error::from).context("sending a signal")
}

fn percentile(times: &[Duration], hundredth: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[(times.len() * hundredth / 100).min(times.len() - 1)]
}

fn table(times: &Times) -> String {
    let stalls: Vec<_> = times.keys().collect();
    let calls: std::collections::BTreeSet<_> = times.values().flat_map(BTreeMap::keys).collect();
    let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
    let mut text =
        format!("| p50 / p99, ms |{}\n", stalls.iter().map(|stall| format!(" {stall} |")).collect::<String>());
    text += &format!("|---|{}\n", "---|".repeat(stalls.len()));
    for call in calls {
        let cell = |stall: &&String| match times[*stall].get(call) {
            Some(times) => format!(" {} / {} |", ms(percentile(times, 50)), ms(percentile(times, 99))),
            None => " |".to_owned(),
        };
        text += &format!("| {call} |{}\n", stalls.iter().map(cell).collect::<String>());
    }
    text
}

#[test]
fn no_call_waits_for_what_hangs() -> Result<()> {
    let scratch = Scratch::new("stalls")?;
    let mut registry = publish_sample(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let disks = [("snapshotter", 256 << 20), ("containerd", 512 << 20)];
    let disks = disks.map(|(name, len)| BadDisk::mount(&scratch, name, len));
    let disks = disks.into_iter().collect::<Result<Vec<_>>>()?;
    let slow_down = |sync_takes| disks.iter().try_for_each(|disk| disk.slow_down(sync_takes));
    let flags = ["--background-rate", "0", "--hang-timeout", "0", "--start-timeout", "300"];
    let node = Node::start_as(SnapshotterOptions::with_flags(&flags), &scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    assert_eq!(node.containerd.run(&lazy, LAZULI, "first", &["/bin/cat", "/etc/greeting"])?.code, Some(0));

    let runtime = Runtime::new().context("making a runtime")?;
    let mut times = Times::new();
    for (stall, rounds, sync_takes) in [
        ("0 overlayfs in containerd", ROUNDS, Duration::ZERO),
        ("1 overlayfs, a sync takes 0.3 s", SLOW_ROUNDS, SLOW_SYNC),
    ] {
        let mut overlayfs = Calls::connect(&runtime, node.containerd.socket(), OVERLAYFS, stall, &mut times)?;
        slow_down(sync_takes)?;
        let done = (0..rounds).try_for_each(|round| overlayfs.ordinary(round));
        slow_down(Duration::ZERO)?;
        done?;
    }
    // It would remove what it has not made itself.
    let Node { containerd, snapshotter, .. } = node;
    drop(containerd);
    for stall in
        ["2 nothing hangs", "3 the registry hangs", "4 lazuli-fused and its session hang", "5 a sync takes 0.3 s"]
    {
        let mut calls = Calls::connect(&runtime, snapshotter.socket(), LAZULI, stall, &mut times)?;
        let lazy_ones = Lazy::make(&mut calls)?;
        let mut hanging = Vec::new();
        match stall.as_bytes()[0] {
            b'3' => {
                registry.pause();
                // Somebody reads what is not here.
                let file = calls.tree(&lazy_ones.top, "reader")?.join("large/3");
                let mut read = command("cat", [&file]);
                hanging.push(read.stdout(Stdio::null()).spawn().context("starting cat")?);
            }
            b'4' => {
                signal(snapshotter.fused_id(), Signal::STOP)?;
                // Starts that wait, of a user namespace too, and a look at the session.
                for number in 0..20 {
                    let mut labels = HashMap::new();
                    if number % 2 == 0 {
                        for ids in ["uidmapping", "gidmapping"] {
                            labels.insert(format!("containerd.io/snapshot/{ids}"), "0:100000:65536".to_owned());
                        }
                    }
                    let mut client = calls.client.clone();
                    let (key, parent) = (format!("start-{number}"), lazy_ones.bottom.name.clone());
                    let request = PrepareSnapshotRequest { snapshotter: LAZULI.to_owned(), key, parent, labels };
                    runtime.spawn(async move { client.prepare(request).await });
                }
                let session = snapshotter.root().join("mnt");
                let mut look = command("stat", ["-f"]);
                hanging.push(look.arg(session).stdout(Stdio::null()).spawn().context("starting stat")?);
                thread::sleep(Duration::from_millis(200));
            }
            b'5' => slow_down(SLOW_SYNC)?,
            _ => {}
        }
        let done = (0..ROUNDS).try_for_each(|round| {
            calls.ordinary(round)?;
            lazy_ones.round(&mut calls, round)
        });
        match stall.as_bytes()[0] {
            b'3' => registry.resume(),
            b'4' => signal(snapshotter.fused_id(), Signal::CONT)?,
            b'5' => slow_down(Duration::ZERO)?,
            _ => {}
        }
        for mut child in hanging {
            child.wait().context("waiting for a child")?;
        }
        done?;
    }
    println!("{}", table(&times));
    for (stall, calls) in times.iter().filter(|(stall, _)| !stall.contains("overlayfs")) {
        // Making what the stall needs, before it, is not measured against the limit.
        let is_before = |call: &str| call.starts_with("Prepare lazy") || call.starts_with("Prepare on lazy");
        for (call, times) in calls.iter().filter(|(call, _)| !is_before(call)) {
            let is_durable = DURABLE.iter().any(|durable| call.starts_with(durable));
            let is_slow_disk = stall.contains("sync");
            let (half, slowest) = (percentile(times, 50), percentile(times, 100));
            let within = if is_slow_disk && is_durable { DURABLE_WITHIN } else { CALL_WITHIN };
            assert!(slowest < within, "{call} took {slowest:?} while {stall}");
            let waits = is_slow_disk && !is_durable && half > SLOW_SYNC / 2;
            assert!(!waits, "{call} took {half:?} mostly while {stall}: it waits for the disk");
        }
    }
    // Snapshots that were removed while nothing could be deleted are deleted now.
    wait_for("a lazy layer that is used is gone, or directories stay", || {
        let snapshots = snapshotter.root().join("snapshots");
        let directories = fs::read_dir(&snapshots).at("listing", &snapshots)?.count();
        let known = directories_known(&runtime, &snapshotter)?;
        Ok((directories == known && snapshotter.cached_layers()? == 3).then_some(()))
    })?;
    let mut calls = Calls::connect(&runtime, snapshotter.socket(), LAZULI, "at the end", &mut times)?;
    let top = Lazy::top(&calls.list("List")?)?;
    let greeting = calls.tree(&top, "last")?.join("etc/greeting");
    assert_eq!(fs::read_to_string(&greeting).at("reading", &greeting)?, "good morning\n");
    Ok(())
}

/// How many snapshots have a directory.
fn directories_known(runtime: &Runtime, snapshotter: &Snapshotter) -> Result<usize> {
    let mut times = Times::new();
    let all = Calls::connect(runtime, snapshotter.socket(), LAZULI, "at the end", &mut times)?.list("List")?;
    Ok(all.iter().filter(|info| !info.labels.contains_key("containerd.io/snapshot/remote")).count())
}

/// A daemon that is there and does not answer is replaced, and what reads through it goes on.
#[test]
fn a_lazuli_fused_that_hangs_is_replaced() -> Result<()> {
    let scratch = Scratch::new("hangs")?;
    let registry = publish_sample(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let node = Node::start_with(&["--background-rate", "0", "--hang-timeout", "3"], &scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    let script = "while [ ! -e /tmp/go ]; do sleep 0.1; done; sha256sum /large/2";
    let run = ["run", "--rm", "--snapshotter", LAZULI, &lazy, "of-hanging", "/bin/sh", "-c", script];
    let reader = node.containerd.ctr(run).stdout(Stdio::piped()).spawn().context("starting ctr")?;
    let exec = ["tasks", "exec", "--exec-id", "go", "of-hanging", "/bin/sh", "-c", "echo go > /tmp/go"];
    wait_for("the container does not run", || {
        let listed = finish(&mut node.containerd.ctr(["tasks", "list"]))?;
        Ok(listed.stdout.contains("RUNNING").then_some(()))
    })?;
    let hanging = node.snapshotter.fused_id();
    signal(hanging, Signal::STOP)?;
    let replaced = wait_for("lazuli-fused was not replaced", || {
        Ok(node.snapshotter.fused_id().filter(|id| Some(*id) != hanging))
    })?;
    assert_eq!(finish(&mut node.containerd.ctr(exec))?.code, Some(0));
    let read = reader.wait_with_output().context("waiting for the container")?;
    assert!(read.status.success());
    assert_eq!(String::from_utf8_lossy(&read.stdout), lazuli_tests::samples::checksum_line(2));
    assert_eq!(node.snapshotter.fused_id(), Some(replaced));
    assert!(node.snapshotter.log().contains("does not answer"), "{}", node.snapshotter.log());
    Ok(())
}

/// A container whose layers do not come hears so after `start_timeout`, and its next attempt starts when they do.
#[test]
fn a_container_hears_unavailable_after_start_timeout() -> Result<()> {
    const START_TIMEOUT: Duration = Duration::from_secs(2);
    let scratch = Scratch::new("start-timeout")?;
    let registry = publish_sample(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let flags = ["--background-rate", "0", "--hang-timeout", "0", "--start-timeout", "2"];
    let node = Node::start_with(&flags, &scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    signal(node.snapshotter.fused_id(), Signal::STOP)?;
    let begin = Instant::now();
    let refused = node.containerd.run(&lazy, LAZULI, "too-early", &["/bin/cat", "/etc/greeting"]);
    let took = begin.elapsed();
    signal(node.snapshotter.fused_id(), Signal::CONT)?;
    let refused = refused?;
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("unavailable"), "{}", refused.stderr);
    assert!((START_TIMEOUT..START_TIMEOUT * 6).contains(&took), "{took:?}");
    let started = node.containerd.run(&lazy, LAZULI, "later", &["/bin/cat", "/etc/greeting"])?;
    assert_eq!((started.code, started.stdout.as_str()), (Some(0), "good morning\n"), "{}", started.stderr);
    Ok(())
}

/// Nobody reads what the snapshotter logs any longer: that ends nothing.
#[test]
fn lazuli_fused_is_brought_back_though_nobody_reads_the_log() -> Result<()> {
    let scratch = Scratch::new("dead-log")?;
    let registry = publish_sample(&scratch)?;
    let lazy = registry.reference("sample:lazy");
    let mut node = Node::start(&scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    node.snapshotter.stop();
    let mut unread = command(program("lazuli-snapshotter")?, ["--background-rate", "0", "--address"]);
    unread.arg(node.snapshotter.socket()).arg("--root").arg(node.snapshotter.root());
    let mut unread = unread.stderr(Stdio::piped()).spawn().context("starting lazuli-snapshotter")?;
    drop(unread.stderr.take());
    wait_for("the snapshotter does not serve", || {
        Ok(std::os::unix::net::UnixStream::connect(node.snapshotter.socket()).is_ok().then_some(()))
    })?;
    let mut ids = vec![node.snapshotter.fused_id()];
    for _ in 0..3 {
        // It must hold the session: else the kill would be the end of it.
        thread::sleep(Duration::from_millis(500));
        let before = node.snapshotter.fused_id();
        signal(before, Signal::KILL)?;
        let after = wait_for("nobody started lazuli-fused again", || {
            Ok(node.snapshotter.fused_id().filter(|id| Some(*id) != before))
        })?;
        ids.push(Some(after));
    }
    let run = node.containerd.run(&lazy, LAZULI, "of-unread-log", &["/bin/cat", "/etc/greeting"]);
    // It is no service of the harness.
    unread.kill().and_then(|()| unread.wait()).context("ending lazuli-snapshotter")?;
    assert_eq!(run?.stdout, "good morning\n", "{ids:?}");
    Ok(())
}

/// After a reboot with the registry dead: the image of sandboxes lies unpacked for another snapshotter, and pods of
/// ordinary images start all the same, as do containers of lazy images that are here.
#[test]
fn containers_start_with_the_registry_dead_and_the_pause_image_on_overlayfs() -> Result<()> {
    let scratch = Scratch::new("boot")?;
    let mut registry = publish_sample(&scratch)?;
    let ordinary = registry.reference("sample:original");
    let lazy = registry.reference("sample:lazy");
    let (mut node, cri) = Node::start_release_with_cri(&scratch, &registry, Default::default(), OVERLAYFS)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    let read_all = "find / -xdev -type f | xargs cat > /dev/null";
    assert_eq!(node.containerd.run(&lazy, LAZULI, "reads-all", &["/bin/sh", "-c", read_all])?.code, Some(0));
    cri.pull_image(&ordinary)?;
    drop(cri.run_pod("before")?);
    node.snapshotter.stop();
    signal(node.snapshotter.fused_id(), Signal::KILL)?;
    registry.pause();
    let started = start_ordinary_pod(&mut node, &cri, &ordinary);
    let cached = node.containerd.run(&lazy, LAZULI, "cached", &["/bin/cat", "/etc/greeting"]);
    registry.resume();
    let took = started?;
    assert!(took < Duration::from_secs(30), "{took:?}");
    let cached = cached?;
    assert_eq!((cached.code, cached.stdout.as_str()), (Some(0), "good morning\n"), "{}", cached.stderr);
    Ok(())
}

fn start_ordinary_pod(node: &mut Node, cri: &lazuli_tests::Cri, image: &str) -> Result<Duration> {
    node.snapshotter.restart()?;
    node.switch_pods_to(LAZULI, cri)?;
    let begin = Instant::now();
    let pod = cri.run_pod("after")?;
    let container = pod.start_container("sample", image, &["/bin/sleep", "1000"])?;
    let took = begin.elapsed();
    assert_eq!(pod.shell(&container, "cat /etc/greeting")?, "good morning\n");
    Ok(took)
}
