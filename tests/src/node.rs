//! A node: containerd with a Lazuli snapshotter, and a network for its pods.

use std::{
    ffi::OsString,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::json;

use crate::{
    containerd::{Containerd, ContainerdOptions, CriOptions, LAZULI, Release},
    cri::Cri,
    error::{Context as _, Result},
    image::{Compression, ImageBuilder},
    process::{Finished, Service, command, finish, require_program},
    programs::program,
    registry_server::TestRegistry,
    scratch::Scratch,
    tar_layer::TarLayer,
};

/// Flags under which nothing is fetched but what readers ask for: tests count it.
const READERS_ONLY: [&str; 2] = ["--background-rate", "0"];

/// The options of a `lazuli-snapshotter` besides its places.
#[derive(Debug, Clone, Default)]
pub struct SnapshotterOptions {
    /// Flags.
    pub flags: Vec<String>,
    /// Names and values in its environment, which `lazuli-fused` inherits.
    pub environment: Vec<(String, String)>,
    /// A program and arguments that are given the command line of the daemon, to run it their way.
    pub wrapper: Vec<String>,
}

impl SnapshotterOptions {
    /// Those with these flags alone.
    pub fn with_flags(flags: &[&str]) -> Self {
        Self { flags: flags.iter().map(|&flag| flag.to_owned()).collect(), ..Self::default() }
    }
}

/// A running `lazuli-snapshotter`.
#[derive(Debug)]
pub struct Snapshotter {
    socket: PathBuf,
    root: PathBuf,
    log: PathBuf,
    daemon_log: PathBuf,
    options: SnapshotterOptions,
    service: Option<Service>,
}

impl Drop for Snapshotter {
    /// Keeps the log of `lazuli-fused`, which is about to be removed with the root.
    fn drop(&mut self) {
        // There is none when the daemon was never started.
        let _ = fs::copy(self.root.join("fused.log"), &self.daemon_log);
    }
}

impl Snapshotter {
    /// Starts one in `<scratch>/snapshotter`.
    ///
    /// # Errors
    ///
    /// When it has not been built, or does not start.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_with(&READERS_ONLY, scratch)
    }

    /// The same with these flags.
    ///
    /// # Errors
    ///
    /// Those of [`Self::start`].
    pub fn start_with(flags: &[&str], scratch: &Scratch) -> Result<Self> {
        Self::start_as(SnapshotterOptions::with_flags(flags), scratch)
    }

    /// The same with these options.
    ///
    /// # Errors
    ///
    /// Those of [`Self::start`].
    pub fn start_as(options: SnapshotterOptions, scratch: &Scratch) -> Result<Self> {
        let root = scratch.directory("snapshotter")?;
        let (log, daemon_log) = (scratch.log("snapshotter"), scratch.log("fused"));
        let socket = scratch.join("snapshotter.sock");
        let mut snapshotter = Self { socket, root, log, daemon_log, options, service: None };
        snapshotter.launch()?;
        Ok(snapshotter)
    }

    /// The socket that containerd connects to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Layers that the cache has.
    ///
    /// # Errors
    ///
    /// When there is no cache.
    pub fn cached_layers(&self) -> Result<usize> {
        let layers = self.root.join("cache/layers");
        Ok(fs::read_dir(&layers).at("listing", &layers)?.count())
    }

    /// The process ID of its `lazuli-fused`; `None` when there is none at the moment.
    pub fn fused_id(&self) -> Option<u32> {
        fused_of(&self.root)
    }

    /// Its process ID, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.service.as_ref().map(Service::id)
    }

    /// Ends it with SIGTERM; `lazuli-fused` goes on.
    pub fn stop(&mut self) {
        self.service = None;
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Stops it with SIGTERM and starts it again, as an upgrade does.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.service = None;
        self.launch()
    }

    /// Ends it with SIGKILL and starts it again, as a crash does.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        if let Some(mut service) = self.service.take() {
            service.kill();
        }
        self.launch()
    }

    fn launch(&mut self) -> Result<()> {
        let SnapshotterOptions { flags, environment, wrapper } = &self.options;
        let mut words = wrapper.iter().map(OsString::from).chain([program("lazuli-snapshotter")?.into_os_string()]);
        let mut snapshotter = command(words.next().unwrap_or_default(), words);
        snapshotter.arg("--address").arg(&self.socket).arg("--root").arg(&self.root).args(flags);
        snapshotter.envs(environment.iter().map(|(name, value)| (name, value)));
        let answers = || UnixStream::connect(&self.socket).is_ok();
        self.service = Some(Service::start("lazuli-snapshotter", &mut snapshotter, &self.log, answers)?);
        Ok(())
    }
}

/// The `lazuli-fused` of a root directory; `None` when there is none at the moment.
pub fn fused_of(root: &Path) -> Option<u32> {
    let root = format!("--root\0{}\0", root.display());
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let command = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let program = command.split('\0').next()?;
        (program.ends_with("/lazuli-fused") && command.contains(&root)).then_some(id)
    })
}

/// A containerd whose pods and containers use a Lazuli snapshotter.
#[derive(Debug)]
pub struct Node {
    /// containerd.
    pub containerd: Containerd,
    /// The snapshotter beside it.
    pub snapshotter: Snapshotter,
    network: Option<PodNetwork>,
    options: ContainerdOptions,
}

impl Node {
    /// Starts a node without the container runtime interface: for `ctr` and `lazuli pull`.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_release(scratch, Release::default())
    }

    /// As [`Self::start`], with another version of containerd.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_release(scratch: &Scratch, release: Release) -> Result<Self> {
        Self::with(Snapshotter::start(scratch)?, scratch, release)
    }

    /// As [`Self::start`], with a mode for lazy layers.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_in(mode: &str, scratch: &Scratch) -> Result<Self> {
        Self::start_release_in(mode, scratch, Release::default())
    }

    /// As [`Self::start_release`], with a mode for lazy layers.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_release_in(mode: &str, scratch: &Scratch, release: Release) -> Result<Self> {
        let flags = [&["--mode", mode], &READERS_ONLY[..]].concat();
        Self::with(Snapshotter::start_with(&flags, scratch)?, scratch, release)
    }

    /// As [`Self::start`], with these flags of the snapshotter.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_with(flags: &[&str], scratch: &Scratch) -> Result<Self> {
        Self::with(Snapshotter::start_with(flags, scratch)?, scratch, Release::default())
    }

    /// As [`Self::start`], with these options of the snapshotter.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_as(options: SnapshotterOptions, scratch: &Scratch) -> Result<Self> {
        Self::with(Snapshotter::start_as(options, scratch)?, scratch, Release::default())
    }

    fn with(snapshotter: Snapshotter, scratch: &Scratch, release: Release) -> Result<Self> {
        let options = ContainerdOptions { release, snapshotter: Some(snapshotter.socket.clone()), cri: None };
        let containerd = Containerd::start(scratch, &options)?;
        Ok(Self { containerd, snapshotter, network: None, options })
    }

    /// Starts a node with the container runtime interface, a network and a sandbox image in `registry`.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_with_cri(scratch: &Scratch, registry: &TestRegistry) -> Result<(Self, Cri)> {
        Self::start_release_with_cri(scratch, registry, Release::default(), LAZULI)
    }

    /// As [`Self::start_with_cri`], with these flags of the snapshotter.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_with_flags_and_cri(flags: &[&str], scratch: &Scratch, registry: &TestRegistry) -> Result<(Self, Cri)> {
        Self::with_cri(Snapshotter::start_with(flags, scratch)?, scratch, registry, Release::default(), LAZULI)
    }

    /// As [`Self::start_with_cri`], with these options of the snapshotter.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_as_with_cri(
        options: SnapshotterOptions,
        scratch: &Scratch,
        registry: &TestRegistry,
    ) -> Result<(Self, Cri)> {
        Self::with_cri(Snapshotter::start_as(options, scratch)?, scratch, registry, Release::default(), LAZULI)
    }

    /// As [`Self::start_with_cri`], with another version of containerd, or pods on another snapshotter.
    ///
    /// # Errors
    ///
    /// When something that it consists of does not start.
    pub fn start_release_with_cri(
        scratch: &Scratch,
        registry: &TestRegistry,
        release: Release,
        snapshotter_of_pods: &'static str,
    ) -> Result<(Self, Cri)> {
        Self::with_cri(Snapshotter::start(scratch)?, scratch, registry, release, snapshotter_of_pods)
    }

    fn with_cri(
        snapshotter: Snapshotter,
        scratch: &Scratch,
        registry: &TestRegistry,
        release: Release,
        snapshotter_of_pods: &'static str,
    ) -> Result<(Self, Cri)> {
        let network = PodNetwork::new(scratch)?;
        let cri = CriOptions {
            pause_image: push_pause_image(scratch, registry)?,
            network_configuration: network.configuration.clone(),
            snapshotter: snapshotter_of_pods,
            registry: registry.address().to_owned(),
        };
        let options = ContainerdOptions { release, snapshotter: Some(snapshotter.socket.clone()), cri: Some(cri) };
        let containerd = Containerd::start(scratch, &options)?;
        let cri = Cri::connect(containerd.socket())?;
        Ok((Self { containerd, snapshotter, network: Some(network), options }, cri))
    }

    /// Restarts containerd so that new pods use another of its snapshotters.
    ///
    /// # Errors
    ///
    /// When it does not start, or has no container runtime interface.
    pub fn switch_pods_to(&mut self, snapshotter: &'static str, cri: &Cri) -> Result<()> {
        if let Some(options) = &mut self.options.cri {
            options.snapshotter = snapshotter;
        }
        self.containerd.reconfigure(&self.options)?;
        cri.wait_until_ready()
    }

    /// Runs `lazuli pull` against this node's containerd.
    ///
    /// # Errors
    ///
    /// When `lazuli` has not been built; not when it fails.
    pub fn lazuli_pull(&self, reference: &str) -> Result<Finished> {
        finish(&mut self.lazuli_pull_command(reference)?)
    }

    /// The command that [`Self::lazuli_pull`] runs.
    ///
    /// # Errors
    ///
    /// When `lazuli` has not been built.
    pub fn lazuli_pull_command(&self, reference: &str) -> Result<std::process::Command> {
        let mut pull = command(program("lazuli")?, ["pull", reference]);
        pull.arg("--address").arg(self.containerd.socket());
        Ok(pull)
    }

    /// Whether pods have a network here.
    pub fn has_network(&self) -> bool {
        self.network.is_some()
    }
}

/// A bridge of its own for the pods of a node; removed when dropped.
#[derive(Debug)]
pub struct PodNetwork {
    bridge: String,
    configuration: PathBuf,
}

impl PodNetwork {
    /// Writes the configuration of a network with Debian's CNI plugins; they make the bridge when needed.
    ///
    /// # Errors
    ///
    /// When the plugins are not installed.
    pub fn new(scratch: &Scratch) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        require_program("ip")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The name of an interface has at most 15 bytes.
        let bridge = format!("lz{}-{number}", std::process::id());
        let configuration = scratch.directory("network")?;
        let network = json!({
            "cniVersion": "0.4.0",
            "name": "lazuli",
            "plugins": [{
                "type": "bridge",
                "bridge": bridge,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": format!("10.199.{}.0/24", (std::process::id() + number) % 256) }]],
                    "dataDir": scratch.join("network.leases"),
                },
            }],
        });
        let path = configuration.join("10-lazuli.conflist");
        fs::write(&path, network.to_string()).at("writing", &path)?;
        Ok(Self { bridge, configuration })
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        // It does not exist when no pod was started.
        let _ = finish(&mut command("ip", ["link", "delete", &self.bridge]));
    }
}

/// Makes and pushes the image of sandbox containers; returns its reference.
fn push_pause_image(scratch: &Scratch, registry: &TestRegistry) -> Result<String> {
    require_program("catatonit")?;
    let catatonit = fs::read("/usr/bin/catatonit").context("reading catatonit")?;
    let layer = TarLayer::new().program("pause", catatonit).finish()?;
    let image = ImageBuilder::new().layer(layer, Compression::Gzip).command(&["/pause", "-P"]);
    registry.push(&image.write(scratch, "pause-image")?, "pause:latest")
}
