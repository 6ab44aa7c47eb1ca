//! `kill -9` of `lazuli-fused` and of `lazuli-snapshotter` while containers read: nobody notices but by a pause.
//!
//! The registry stands behind a slow link, so that at any moment something is being fetched; what was read leaves the
//! page cache, so that it is asked for again. `LAZULI_KILLS` says how often each daemon is killed.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use format_spec::Digest;
use lazuli_tests::{
    Compression, HarnessError, ImageBuilder, Node, Result, Scratch, TarLayer, TestRegistry,
    containerd::LAZULI,
    process::wait_for,
    programs::{MODES, lazuli_ok},
    registry_server::digest_in,
    samples::{noise, readable_layers},
};
use rustix::{
    fs::{Advice, fadvise},
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};

const KILLS: &str = "LAZULI_KILLS";
const KILLS_BY_DEFAULT: u64 = 3;
const READERS: u64 = 3;
const FILE_LEN: usize = 1 << 20;
/// What a reader asks for at a time.
const READ_LEN: usize = 64 << 10;
/// Between two kills the readers get on by up to so many bytes, sometimes by none.
const PROGRESS_MAX: u64 = 6 << 20;

/// Content of file `index`, which does not compress.
fn content(index: u64) -> Vec<u8> {
    noise(1000 + index, FILE_LEN)
}

/// An image with `file_count` files under `/files`, converted, as `sample:lazy`.
fn publish(scratch: &Scratch, file_count: u64) -> Result<TestRegistry> {
    let registry = TestRegistry::start(scratch)?;
    let mut files = TarLayer::new().directory("files");
    for index in 0..file_count {
        files = files.file(&format!("files/{index}"), content(index));
    }
    let mut image = ImageBuilder::new().layer(files.finish()?, Compression::Gzip);
    for layer in readable_layers()? {
        image = image.layer(layer, Compression::Gzip);
    }
    let original = registry.push(&image.write(scratch, "image")?, "sample:original")?;
    lazuli_ok(["convert", &original, &registry.reference("sample:lazy")])?;
    Ok(registry)
}

/// A way to the registry on which answers take their time.
struct SlowLink {
    address: String,
    is_slow: Arc<AtomicBool>,
    /// Nothing gets through.
    is_cut: Arc<AtomicBool>,
    /// Connections that did not get through.
    refused: Arc<AtomicU64>,
}

impl SlowLink {
    const CHUNK_LEN: usize = 64 << 10;
    /// For one chunk, of all connections together: 6 MB/s.
    const CHUNK_PAUSE: Duration = Duration::from_millis(10);

    fn to(registry: &TestRegistry) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let link = Self {
            address: listener.local_addr()?.to_string(),
            is_slow: Arc::new(AtomicBool::new(true)),
            is_cut: Arc::default(),
            refused: Arc::default(),
        };
        let target = registry.address().to_owned();
        let (is_slow, is_cut, refused) = (link.is_slow.clone(), link.is_cut.clone(), link.refused.clone());
        let line = Arc::new(Mutex::new(()));
        // Ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if is_cut.load(Ordering::Relaxed) {
                    refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let Ok(server) = TcpStream::connect(&target) else { continue };
                let (Ok(mut from_client), Ok(mut to_server)) = (client.try_clone(), server.try_clone()) else {
                    continue;
                };
                thread::spawn(move || {
                    let _ = io::copy(&mut from_client, &mut to_server);
                    let _ = to_server.shutdown(std::net::Shutdown::Write);
                });
                let (is_slow, line) = (is_slow.clone(), line.clone());
                thread::spawn(move || relay_slowly(server, client, &is_slow, &line));
            }
        });
        Ok(link)
    }
}

fn relay_slowly(mut from: TcpStream, mut to: TcpStream, is_slow: &AtomicBool, line: &Mutex<()>) {
    let mut buffer = vec![0; SlowLink::CHUNK_LEN];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if is_slow.load(Ordering::Relaxed) {
            let _line = line.lock();
            thread::sleep(SlowLink::CHUNK_PAUSE);
        }
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// What the readers have done.
#[derive(Default)]
struct Progress {
    bytes: AtomicU64,
    longest_read: Mutex<Duration>,
    failures: Mutex<Vec<String>>,
    stop: AtomicBool,
}

impl Progress {
    /// Reads all files again and again, in an order of its own, until it is stopped; every file at least once.
    fn read_all(&self, directory: &Path, file_count: u64, reader: u64) {
        let mut seen = HashSet::new();
        for step in 0.. {
            if self.stop.load(Ordering::Relaxed) && seen.len() as u64 == file_count {
                return;
            }
            // The stride has no factor in common with any file count that is used here.
            let index = (reader * file_count / READERS + step * 101) % file_count;
            match self.read(&directory.join(index.to_string())) {
                Ok(bytes) if bytes == content(index) => drop(seen.insert(index)),
                Ok(_) => return self.fail(format!("file {index} has other content")),
                Err(error) => return self.fail(format!("file {index}: {error}")),
            }
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut bytes = vec![0; FILE_LEN + 1];
        let mut len = 0;
        loop {
            let end = bytes.len().min(len + READ_LEN);
            let since = Instant::now();
            let read = file.read(&mut bytes[len..end])?;
            let mut longest = self.longest_read.lock().expect("nobody panics with it");
            *longest = longest.max(since.elapsed());
            if read == 0 {
                break;
            }
            self.bytes.fetch_add(read as u64, Ordering::Relaxed);
            len += read;
        }
        bytes.truncate(len);
        fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(bytes)
    }

    fn longest_read(&self) -> Duration {
        *self.longest_read.lock().expect("nobody panics with it")
    }

    fn fail(&self, failure: String) {
        self.failures.lock().expect("nobody panics with it").push(failure);
    }

    fn failures(&self) -> Vec<String> {
        self.failures.lock().expect("nobody panics with it").clone()
    }

    /// Waits until the readers got on by so many bytes, or failed.
    fn wait_for(&self, bytes: u64) -> Result<()> {
        let target = self.bytes.load(Ordering::Relaxed) + bytes;
        wait_for("the readers do not get on", || {
            let is_there = self.bytes.load(Ordering::Relaxed) >= target || !self.failures().is_empty();
            Ok(is_there.then_some(()))
        })
    }
}

/// Has readers end, over a link without hindrance, when it is dropped: whatever fails while they read must not wait for
/// them for ever. Then maybe nobody serves them any longer, so that the session must end for their reads to end.
struct EndReaders<'a> {
    progress: &'a Progress,
    link: &'a SlowLink,
    session: PathBuf,
    is_served: bool,
}

impl<'a> EndReaders<'a> {
    fn of(progress: &'a Progress, link: &'a SlowLink, node: &Node) -> Self {
        Self { progress, link, session: node.snapshotter.root().join("mnt"), is_served: false }
    }

    /// Lets them read to the end if all went well.
    fn after<T>(mut self, result: Result<T>) -> Result<T> {
        self.is_served = result.is_ok();
        result
    }
}

impl Drop for EndReaders<'_> {
    fn drop(&mut self) {
        self.link.is_slow.store(false, Ordering::Relaxed);
        self.link.is_cut.store(false, Ordering::Relaxed);
        self.progress.stop.store(true, Ordering::Relaxed);
        if !self.is_served {
            // The failure itself is what is told.
            let _ = unmount(&self.session, UnmountFlags::FORCE | UnmountFlags::DETACH);
        }
    }
}

/// Whether a process has a descriptor of `/dev/fuse`.
fn holds_session(id: u32) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == Path::new("/dev/fuse"))
}

/// Waits until the session has two holders; returns the `lazuli-fused` among them, which is not `old`.
fn wait_for_holders(node: &Node, old: Option<u32>) -> Result<u32> {
    wait_for("the session does not have two holders", || {
        let fused = node.snapshotter.fused_id().filter(|id| Some(*id) != old && holds_session(*id));
        Ok(fused.filter(|_| node.snapshotter.id().is_some_and(holds_session)))
    })
}

/// A container that reads all files once and then waits for the end of its input.
struct ReadingContainer {
    ctr: std::process::Child,
    output: PathBuf,
}

impl ReadingContainer {
    /// One that no other test of this machine uses: runc keeps all containers in one place.
    fn id(scratch: &Scratch) -> String {
        let name = scratch.path().file_name().unwrap_or_default();
        format!("reading-{}", name.to_string_lossy())
    }

    fn start(node: &Node, scratch: &Scratch, image: &str) -> Result<Self> {
        let output = scratch.join("container.out");
        let failed = |error: io::Error| HarnessError::Unexpected(format!("ctr: {error}"));
        let script = "cd /files && sha256sum *; cat > /dev/null";
        let mut ctr = node.containerd.ctr(["run", "--rm", "--snapshotter", LAZULI, image, &Self::id(scratch)]);
        ctr.args(["/bin/sh", "-c", script]).stdin(Stdio::piped());
        ctr.stdout(File::create(&output).map_err(failed)?);
        Ok(Self { ctr: ctr.spawn().map_err(failed)?, output })
    }

    /// Its directory of files, as this process sees it.
    fn files(&self, scratch: &Scratch) -> Result<PathBuf> {
        let tasks = scratch.join("containerd/state/io.containerd.runtime.v2.task");
        let files = tasks.join("default").join(Self::id(scratch)).join("rootfs/files");
        wait_for("the container has no files", || Ok(files.exists().then(|| files.clone())))
    }

    /// Waits until it has read everything; whether it printed the right checksums.
    fn finish(mut self, file_count: u64) -> Result<bool> {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<HashSet<_>>();
        let printed = wait_for("the container does not get on", || {
            let text = fs::read_to_string(&self.output).unwrap_or_default();
            Ok((text.lines().count() as u64 >= file_count).then(|| lines(&text)))
        })?;
        drop(self.ctr.stdin.take());
        let status = self.ctr.wait().map_err(|error| HarnessError::Unexpected(format!("ctr: {error}")))?;
        let expected = (0..file_count).map(|index| format!("{}  {index}", Digest::of(&content(index)).hex())).collect();
        Ok(status.success() && printed == expected)
    }
}

/// Kills `lazuli-fused` and then `lazuli-snapshotter`, each when the session has both for holders.
fn kill_both(node: &mut Node, progress: &Progress, kill: u64) -> Result<()> {
    let fused = wait_for_holders(node, None)?;
    progress.wait_for(kill.wrapping_mul(0x9e37_79b9_7f4a_7c15) % PROGRESS_MAX)?;
    send(fused, Signal::KILL)?;
    wait_for_holders(node, Some(fused))?;
    progress.wait_for(kill.wrapping_mul(0xd1b5_4a32_d192_ed03) % PROGRESS_MAX)?;
    node.snapshotter.kill_and_restart()
}

/// A node behind a slow link with a container that reads.
struct Reading {
    container: ReadingContainer,
    files: PathBuf,
    node: Node,
    link: SlowLink,
    registry: TestRegistry,
}

impl Reading {
    fn start(mode: &str, scratch: &Scratch, file_count: u64) -> Result<Self> {
        let registry = publish(scratch, file_count)?;
        let link = SlowLink::to(&registry).map_err(|error| HarnessError::Unexpected(format!("relay: {error}")))?;
        let image = format!("{}/sample:lazy", link.address);
        let node = Node::start_in(mode, scratch)?;
        let pulled = node.lazuli_pull(&image)?;
        assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
        let container = ReadingContainer::start(&node, scratch, &image)?;
        let files = container.files(scratch)?;
        Ok(Self { container, files, node, link, registry })
    }
}

fn send(id: u32, signal: Signal) -> Result<()> {
    let sent = kill_process(Pid::from_raw(id.cast_signed()).expect("not 0"), signal);
    sent.map_err(|error| HarnessError::Unexpected(format!("signal to {id}: {error}")))
}

/// Number of sessions that are mounted.
fn session_count(scratch: &Scratch) -> usize {
    scratch.mounts().iter().filter(|path| path.ends_with("snapshotter/mnt")).count()
}

#[test]
fn readers_do_not_notice_that_daemons_are_killed_in_kernel_mode() -> Result<()> {
    check_kills("erofs")
}

#[test]
fn readers_do_not_notice_that_daemons_are_killed_in_portable_mode() -> Result<()> {
    check_kills("fuse")
}

fn check_kills(mode: &str) -> Result<()> {
    let kills = std::env::var(KILLS).ok().and_then(|number| number.parse().ok()).unwrap_or(KILLS_BY_DEFAULT);
    // Enough that something is still to be fetched at the last kill.
    let file_count = 8 + 4 * kills;
    let scratch = Scratch::new(&format!("kills-{mode}"))?;
    let Reading { container, files, mut node, link, registry: _registry } = Reading::start(mode, &scratch, file_count)?;
    let progress = Progress::default();
    thread::scope(|scope| {
        let end = EndReaders::of(&progress, &link, &node);
        for reader in 0..READERS {
            let (progress, files) = (&progress, &files);
            scope.spawn(move || progress.read_all(files, file_count, reader));
        }
        end.after((0..kills).try_for_each(|kill| kill_both(&mut node, &progress, kill)))
    })?;
    let (bytes, longest) = (progress.bytes.load(Ordering::Relaxed), progress.longest_read());
    println!(
        "{mode}: {kills} kills of each daemon while {} MB were read over a slow link: {} failed readers, longest read {longest:?}",
        bytes / 1_000_000,
        progress.failures().len(),
    );
    assert_eq!(progress.failures(), Vec::<String>::new());

    // Now everything has arrived: what a read takes longer is the new daemon's start.
    let warm = Progress::default();
    thread::scope(|scope| {
        let end = EndReaders::of(&warm, &link, &node);
        scope.spawn(|| warm.read_all(&files, file_count, 0));
        end.after((0..kills).try_for_each(|kill| kill_both(&mut node, &warm, kill)))
    })?;
    println!("{mode}: {kills} more while all was there: longest read {:?}", warm.longest_read());
    assert_eq!(warm.failures(), Vec::<String>::new());
    let container_is_right = container.finish(file_count)?;
    assert!(container_is_right, "the container printed something else");
    assert_eq!(session_count(&scratch), 1, "it is the first one still");
    Ok(())
}

/// An upgrade: the daemon is told to end while containers read, and the next one, maybe of a new version, goes on.
#[test]
fn readers_do_not_notice_that_lazuli_fused_is_replaced() -> Result<()> {
    MODES.into_iter().try_for_each(check_replacement)
}

fn check_replacement(mode: &str) -> Result<()> {
    const FILE_COUNT: u64 = 8;
    let scratch = Scratch::new(&format!("replaced-{mode}"))?;
    let Reading { container, files, node, link, registry: _registry } = Reading::start(mode, &scratch, FILE_COUNT)?;
    let progress = Progress::default();
    thread::scope(|scope| {
        let end = EndReaders::of(&progress, &link, &node);
        scope.spawn(|| progress.read_all(&files, FILE_COUNT, 0));
        let fused = wait_for_holders(&node, None)?;
        send(fused, Signal::TERM)?;
        end.after(wait_for_holders(&node, Some(fused)))
    })?;
    assert_eq!(progress.failures(), Vec::<String>::new());
    assert!(container.finish(FILE_COUNT)?, "the container printed something else");
    assert_eq!(session_count(&scratch), 1, "it is the first one still");
    Ok(())
}

/// The index of a layer is damaged when the next daemon looks for it, and the registry away: whoever reads waits.
#[test]
fn readers_wait_for_a_tree_whose_index_must_be_fetched_again() -> Result<()> {
    MODES.into_iter().try_for_each(check_damaged_index)
}

fn check_damaged_index(mode: &str) -> Result<()> {
    const FILE_COUNT: u64 = 2;
    let scratch = Scratch::new(&format!("index-again-{mode}"))?;
    let Reading { container, files, node, link, registry } = Reading::start(mode, &scratch, FILE_COUNT)?;
    let fused = wait_for_holders(&node, None)?;
    link.is_cut.store(true, Ordering::Relaxed);
    let blob = digest_in(&registry.manifest("sample:lazy")?["layers"][0])?;
    let layers = node.snapshotter.root().join("cache/layers");
    let mut damaged = 0;
    for layer in fs::read_dir(&layers).expect("the cache is there").flatten() {
        let record = fs::read_to_string(layer.path().join("layer.json")).unwrap_or_default();
        if record.contains(&blob.hex()) {
            fs::write(layer.path().join("index.new"), "damaged").expect("writable");
            fs::rename(layer.path().join("index.new"), layer.path().join("index")).expect("writable");
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);
    send(fused, Signal::KILL)?;
    wait_for_holders(&node, Some(fused))?;
    let progress = Progress::default();
    thread::scope(|scope| -> Result<()> {
        let end = EndReaders::of(&progress, &link, &node);
        scope.spawn(|| progress.read_all(&files, FILE_COUNT, 0));
        wait_for("the index is not asked for", || Ok((link.refused.load(Ordering::Relaxed) > 0).then_some(())))?;
        assert_eq!(progress.failures(), Vec::<String>::new());
        end.after(Ok(()))
    })?;
    assert_eq!(progress.failures(), Vec::<String>::new());
    assert!(container.finish(FILE_COUNT)?, "the container printed something else");
    Ok(())
}

/// Before Linux 6.9: what was being read when the daemon was killed fails or is read again, nobody waits for ever.
#[test]
fn a_kernel_that_cannot_send_again_loses_only_reads_under_way() -> Result<()> {
    const FILE_COUNT: u64 = 8;
    let scratch = Scratch::new("no-resend")?;
    let Reading { container: _container, files, node, link, registry: _registry } =
        Reading::start("fuse", &scratch, FILE_COUNT)?;
    let fused = wait_for_holders(&node, None)?;
    // The second word of flags of the kernel's first message, where it says that it can.
    let path = node.snapshotter.root().join("fused.init");
    let mut init = fs::read(&path).expect("it lies there");
    init[56..60].fill(0);
    fs::write(&path, init).expect("writable");
    let progress = Progress::default();
    thread::scope(|scope| {
        let end = EndReaders::of(&progress, &link, &node);
        for reader in 0..READERS {
            let (progress, files) = (&progress, &files);
            scope.spawn(move || progress.read_all(files, FILE_COUNT, reader));
        }
        progress.wait_for(1)?;
        send(fused, Signal::KILL)?;
        end.after(wait_for_holders(&node, Some(fused)))
    })?;
    let log = fs::read_to_string(node.snapshotter.root().join("fused.log")).expect("it was started twice");
    assert!(log.contains("reads under way are lost"), "it believed to be on a kernel that can: {log}");
    println!("failed readers: {:?}", progress.failures());
    let after = Progress::default();
    after.stop.store(true, Ordering::Relaxed);
    after.read_all(&files, FILE_COUNT, 0);
    assert_eq!(after.failures(), Vec::<String>::new());
    assert_eq!(session_count(&scratch), 1, "it is the first one still");
    Ok(())
}
