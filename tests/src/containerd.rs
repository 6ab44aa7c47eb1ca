//! A private containerd, and `ctr` to talk to it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::{Context as _, Result},
    process::{Finished, Service, command, finish, require_program, run},
    scratch::Scratch,
};

/// The snapshotter that containerd brings itself.
pub const OVERLAYFS: &str = "overlayfs";
/// The name under which a [`crate::Snapshotter`] is known to containerd.
pub const LAZULI: &str = "lazuli";

/// What distinguishes one private containerd from another.
#[derive(Debug, Clone, Default)]
pub struct ContainerdOptions {
    /// Socket of the Lazuli snapshotter, where there is one.
    pub snapshotter: Option<PathBuf>,
    /// What the container runtime interface needs, where it is used.
    pub cri: Option<CriOptions>,
}

/// Settings of the container runtime interface.
#[derive(Debug, Clone)]
pub struct CriOptions {
    /// The image of the sandbox container.
    pub pause_image: String,
    /// Directory with the network configuration.
    pub network_configuration: PathBuf,
    /// The snapshotter that pods use.
    pub snapshotter: &'static str,
    /// `host:port` of the registry that speaks plain HTTP.
    pub registry: String,
}

/// A containerd of Debian with its own root, state and sockets.
#[derive(Debug)]
pub struct Containerd {
    socket: PathBuf,
    config: PathBuf,
    log: PathBuf,
    service: Option<Service>,
}

impl Containerd {
    /// Starts an empty one in `<scratch>/containerd`.
    ///
    /// # Errors
    ///
    /// When containerd or runc are not installed, or it does not start.
    pub fn start(scratch: &Scratch, options: &ContainerdOptions) -> Result<Self> {
        for program in ["containerd", "ctr", "runc", "containerd-shim-runc-v2"] {
            require_program(program)?;
        }
        let directory = scratch.directory("containerd")?;
        let socket = scratch.join("containerd.sock");
        let config = directory.join("config.toml");
        fs::write(&config, configuration(&directory, &socket, options)).at("writing", &config)?;
        if let Some(cri) = &options.cri {
            let hosts = directory.join("certs.d").join(&cri.registry);
            fs::create_dir_all(&hosts).at("creating", &hosts)?;
            let server = format!("server = \"http://{}\"\n", cri.registry);
            fs::write(hosts.join("hosts.toml"), server).at("writing hosts.toml in", &hosts)?;
        }
        let mut containerd = Self { socket, config, log: scratch.log("containerd"), service: None };
        containerd.launch()?;
        Ok(containerd)
    }

    /// Ends containerd and starts it again on the same state; containers go on.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.service = None;
        self.launch()
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A `ctr` command with these arguments.
    pub fn ctr<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut ctr = command("ctr", [OsStr::new("--address"), self.socket.as_os_str()]);
        ctr.args(arguments);
        ctr
    }

    /// Pulls an image completely, as `ctr images pull` does.
    ///
    /// # Errors
    ///
    /// When `ctr` fails.
    pub fn pull(&self, reference: &str, snapshotter: &str) -> Result<()> {
        run(&mut self.ctr(["images", "pull", "--plain-http", "--snapshotter", snapshotter, reference])).map(drop)
    }

    /// Takes in the images of an archive without unpacking them.
    ///
    /// # Errors
    ///
    /// When `ctr` fails.
    pub fn import(&self, archive: &Path) -> Result<()> {
        run(self.ctr(["images", "import", "--no-unpack"]).arg(archive)).map(drop)
    }

    /// Runs a container to its end; without `words`, what the image says.
    ///
    /// # Errors
    ///
    /// When `ctr` cannot be started; not when the container fails.
    pub fn run(&self, reference: &str, snapshotter: &str, id: &str, words: &[&str]) -> Result<Finished> {
        finish(self.ctr(["run", "--rm", "--snapshotter", snapshotter, reference, id]).args(words))
    }

    /// Mounts an image that containerd has, read-only, as containers would see it; unpacks what is not yet.
    ///
    /// # Errors
    ///
    /// When `ctr` fails.
    pub fn mount_image(&self, reference: &str, snapshotter: &str, directory: &Path) -> Result<()> {
        run(self.ctr(["images", "mount", "--snapshotter", snapshotter, reference]).arg(directory)).map(drop)
    }

    fn launch(&mut self) -> Result<()> {
        let mut containerd = command("containerd", ["--config"]);
        containerd.arg(&self.config);
        let answers = || {
            UnixStream::connect(&self.socket).is_ok()
                && matches!(finish(&mut self.ctr(["version"])), Ok(Finished { code: Some(0), .. }))
        };
        self.service = Some(Service::start("containerd", &mut containerd, &self.log, answers)?);
        Ok(())
    }
}

fn configuration(directory: &Path, socket: &Path, options: &ContainerdOptions) -> String {
    let path = directory.display();
    let socket = socket.display();
    let mut text = format!(
        r#"version = 2
root = "{path}/root"
state = "{path}/state"
{disabled}
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{path}/opt"
"#,
        disabled = match options.cri {
            Some(_) => "",
            None => r#"disabled_plugins = ["io.containerd.grpc.v1.cri"]"#,
        }
    );
    if let Some(snapshotter) = &options.snapshotter {
        text += &format!(
            r#"[proxy_plugins.{LAZULI}]
type = "snapshot"
address = "{}"
"#,
            snapshotter.display()
        );
    }
    if let Some(cri) = &options.cri {
        // Without the right to lower an OOM score and without AppArmor, as inside many build machines.
        text += &format!(
            r#"[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{path}/certs.d"
"#,
            pause = cri.pause_image,
            network = cri.network_configuration.display(),
            snapshotter = cri.snapshotter,
        );
    }
    text
}
