//! Every call that containerd makes is answered while something else hangs: `lazuli-fused` with its session, the
//! registry, the disk's syncs. Real daemons, and the table of `docs/MEASUREMENTS.md` as a by-product.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
};
use lazuli_tests::{
    Node, Result, Scratch, Snapshotter,
    containerd::{LAZULI, OVERLAYFS},
    error::{Context as _, HarnessError},
    node::SnapshotterOptions,
    process::{command, finish, run, wait_for},
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
/// How long a sync takes on the slow disk.
const SLOW_SYNC_MS: u32 = 300;
/// Makes syncs slow as long as the file that `SLOW_SYNC` names is there.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
static void slow(void) { const char *flag = getenv("SLOW_SYNC"); if (flag && access(flag, F_OK) == 0) usleep(SLOW_SYNC_MS * 1000); }
int fsync(int fd) { slow(); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { slow(); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"#;

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
        let answer = self.runtime.block_on(async { tokio::time::timeout(CALL_WITHIN * 5, future).await });
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

    /// What is asked about a snapshot of any kind.
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
        self.prepare("Prepare ordinary", &named("extract"), "", HashMap::new())?;
        self.commit("Commit ordinary", &named("extract"), &named("layer"))?;
        self.prepare("Prepare ordinary", &named("container"), &named("layer"), HashMap::new())?;
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

/// Compiles [`SHIM`].
fn slow_syncs(scratch: &Scratch) -> Result<PathBuf> {
    let (source, library) = (scratch.join("slow.c"), scratch.join("slow.so"));
    let code = SHIM.replace("SLOW_SYNC_MS", &SLOW_SYNC_MS.to_string());
    fs::write(&source, code).at("writing", &source)?;
    run(command("cc", ["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl"))?;
    Ok(library)
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
    let (library, slow) = (slow_syncs(&scratch)?.display().to_string(), scratch.join("slow"));
    let flag = slow.display().to_string();
    let options = SnapshotterOptions {
        environment: [("LD_PRELOAD", library), ("SLOW_SYNC", flag)]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        ..SnapshotterOptions::with_flags(&["--background-rate", "0", "--hang-timeout", "0", "--start-timeout", "300"])
    };
    let node = Node::start_as(options, &scratch)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    assert_eq!(node.containerd.run(&lazy, LAZULI, "first", &["/bin/cat", "/etc/greeting"])?.code, Some(0));

    let runtime = Runtime::new().context("making a runtime")?;
    let mut times = Times::new();
    let mut overlayfs =
        Calls::connect(&runtime, node.containerd.socket(), OVERLAYFS, "0 overlayfs in containerd", &mut times)?;
    for round in 0..ROUNDS {
        overlayfs.ordinary(round)?;
    }
    // It would remove what it has not made itself.
    let Node { containerd, snapshotter, .. } = node;
    drop(containerd);
    for stall in
        ["1 nothing hangs", "2 the registry hangs", "3 lazuli-fused and its session hang", "4 a sync takes 0.3 s"]
    {
        let mut calls = Calls::connect(&runtime, snapshotter.socket(), LAZULI, stall, &mut times)?;
        let lazy_ones = Lazy::make(&mut calls)?;
        let mut hanging = Vec::new();
        match stall.as_bytes()[0] {
            b'2' => {
                registry.pause();
                // Somebody reads what is not here.
                let file = calls.tree(&lazy_ones.top, "reader")?.join("large/3");
                let mut read = command("cat", [&file]);
                hanging.push(read.stdout(Stdio::null()).spawn().context("starting cat")?);
            }
            b'3' => {
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
            b'4' => fs::write(&slow, "").at("writing", &slow)?,
            _ => {}
        }
        let done = (0..ROUNDS).try_for_each(|round| {
            calls.ordinary(round)?;
            lazy_ones.round(&mut calls, round)
        });
        match stall.as_bytes()[0] {
            b'2' => registry.resume(),
            b'3' => signal(snapshotter.fused_id(), Signal::CONT)?,
            b'4' => fs::remove_file(&slow).at("removing", &slow)?,
            _ => {}
        }
        for mut child in hanging {
            child.wait().context("waiting for a child")?;
        }
        done?;
    }
    println!("{}", table(&times));
    for (stall, calls) in &times {
        // Making what the stall needs, before it, is not measured against the limit.
        for (call, times) in calls.iter().filter(|(call, _)| !call.starts_with("Prepare lazy")) {
            let slowest = times.iter().max().copied().unwrap_or_default();
            assert!(slowest < CALL_WITHIN, "{call} took {slowest:?} while {stall}");
        }
    }
    // What was removed while nothing could be deleted is deleted now.
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
/// ordinary images start all the same.
#[test]
fn pods_of_ordinary_images_start_with_the_registry_dead_and_the_pause_image_on_overlayfs() -> Result<()> {
    let scratch = Scratch::new("boot")?;
    let mut registry = publish_sample(&scratch)?;
    let ordinary = registry.reference("sample:original");
    let lazy = registry.reference("sample:lazy");
    let (mut node, cri) = Node::start_release_with_cri(&scratch, &registry, Default::default(), OVERLAYFS)?;
    assert_eq!(node.lazuli_pull(&lazy)?.code, Some(0));
    cri.pull_image(&ordinary)?;
    drop(cri.run_pod("before")?);
    node.snapshotter.stop();
    signal(node.snapshotter.fused_id(), Signal::KILL)?;
    registry.pause();
    let started = start_ordinary_pod(&mut node, &cri, &ordinary);
    registry.resume();
    let took = started?;
    assert!(took < Duration::from_secs(30), "{took:?}");
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
