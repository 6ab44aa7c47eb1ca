//! A private containerd, and `ctr` to talk to it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    containerd_config::configuration,
    error::{Context as _, HarnessError, Result},
    process::{Finished, Service, command, finish, require_program, run},
    programs::target_directory,
    scratch::Scratch,
};

/// The snapshotter that containerd brings itself.
pub const OVERLAYFS: &str = "overlayfs";
/// The name under which a [`crate::Snapshotter`] is known to containerd.
pub const LAZULI: &str = "lazuli";

/// A version of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Release {
    /// 1.6 of Debian 12, which is installed.
    #[default]
    V1_6,
    /// 1.7 of Debian 13, as `tests/containerd-versions` unpacks it.
    V1_7,
    /// 2.1 of the Debian after that, unpacked likewise.
    V2_1,
}

impl Release {
    /// How the number of its version begins.
    fn number(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6.",
            Self::V1_7 => "1.7.",
            Self::V2_1 => "2.1.",
        }
    }

    /// The directory of its programs; `None` for what is installed.
    ///
    /// # Errors
    ///
    /// When it has not been unpacked, or is another version.
    fn programs(self) -> Result<Option<PathBuf>> {
        let programs = self.directory()?;
        let containerd = programs.as_deref().map_or("containerd".into(), |programs| programs.join("containerd"));
        let printed = run(&mut command(&containerd, ["--version"]))?;
        match version_in(&printed) {
            Some(version) if version.starts_with(self.number()) => Ok(programs),
            _ => Err(HarnessError::Missing(format!(
                "{} is not {}x but `{}`: the tests want that of Debian 12, and of the suites that `tests/containerd-versions` names",
                containerd.display(),
                self.number(),
                printed.trim()
            ))),
        }
    }

    fn directory(self) -> Result<Option<PathBuf>> {
        let suite = match self {
            Self::V1_6 => return Ok(None),
            Self::V1_7 => "trixie",
            Self::V2_1 => "forky",
        };
        let programs = target_directory()?.join("containerd").join(suite).join("usr/bin");
        match programs.join("containerd").is_file() {
            true => Ok(Some(programs)),
            false => Err(HarnessError::Missing(format!(
                "containerd of {suite} is not there: run `tests/containerd-versions target/containerd`"
            ))),
        }
    }
}

/// The version in what `containerd --version` prints: its name, where it is from, the version, and maybe more.
fn version_in(printed: &str) -> Option<&str> {
    printed.split_whitespace().nth(2)
}

/// What distinguishes one private containerd from another.
#[derive(Debug, Clone, Default)]
pub struct ContainerdOptions {
    /// Its version.
    pub release: Release,
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
    /// `None` of one that is not Debian's.
    release: Option<Release>,
    programs: Option<PathBuf>,
    directory: PathBuf,
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
    /// When containerd or runc are not installed, it is of another version than asked for, or does not start.
    pub fn start(scratch: &Scratch, options: &ContainerdOptions) -> Result<Self> {
        for program in ["containerd", "ctr", "runc", "containerd-shim-runc-v2"] {
            require_program(program)?;
        }
        let directory = scratch.directory("containerd")?;
        let socket = scratch.join("containerd.sock");
        let config = directory.join("config.toml");
        let (release, programs) = (Some(options.release), options.release.programs()?);
        let log = scratch.log("containerd");
        let mut containerd = Self { release, programs, directory, socket, config, log, service: None };
        containerd.configure(options)?;
        containerd.launch()?;
        Ok(containerd)
    }

    /// Starts an empty one of the `programs` in a directory; `configuration` is given where it keeps everything, and its
    /// socket.
    ///
    /// # Errors
    ///
    /// When runc is not installed, or it does not start.
    pub(crate) fn start_with(
        scratch: &Scratch,
        programs: &Path,
        configuration: impl FnOnce(&Path, &Path) -> String,
    ) -> Result<Self> {
        require_program("runc")?;
        let directory = scratch.directory("containerd")?;
        let (socket, config) = (scratch.join("containerd.sock"), directory.join("config.toml"));
        fs::write(&config, configuration(&directory, &socket)).at("writing", &config)?;
        let (programs, log) = (Some(programs.to_owned()), scratch.log("containerd"));
        let mut containerd = Self { release: None, programs, directory, socket, config, log, service: None };
        containerd.launch()?;
        Ok(containerd)
    }

    /// Restarts containerd with another configuration on the same state; containers go on.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn reconfigure(&mut self, options: &ContainerdOptions) -> Result<()> {
        assert_eq!(Some(options.release), self.release, "state goes with its version");
        self.configure(options)?;
        self.restart()
    }

    fn configure(&self, options: &ContainerdOptions) -> Result<()> {
        fs::write(&self.config, configuration(&self.directory, &self.socket, options)).at("writing", &self.config)?;
        let Some(cri) = &options.cri else { return Ok(()) };
        let hosts = self.directory.join("certs.d").join(&cri.registry);
        fs::create_dir_all(&hosts).at("creating", &hosts)?;
        let server = format!("server = \"http://{}\"\n", cri.registry);
        fs::write(hosts.join("hosts.toml"), server).at("writing hosts.toml in", &hosts)
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
        let mut ctr = command(self.program("ctr"), [OsStr::new("--address"), self.socket.as_os_str()]);
        // A warning of 2.4 about this machine would come before the lines of a container.
        ctr.args(arguments).env("CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS", "1");
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

    fn program(&self, name: &str) -> PathBuf {
        self.programs.as_ref().map_or_else(|| name.into(), |programs| programs.join(name))
    }

    fn launch(&mut self) -> Result<()> {
        let mut containerd = command(self.program("containerd"), ["--config"]);
        containerd.arg(&self.config);
        if let Some(programs) = &self.programs {
            // It looks for its shim in the path first.
            let path = std::env::var_os("PATH").unwrap_or_default();
            let paths = std::iter::once(programs.clone()).chain(std::env::split_paths(&path));
            let joined = std::env::join_paths(paths).map_err(|error| HarnessError::Missing(error.to_string()))?;
            containerd.env("PATH", joined);
        }
        let answers = || {
            UnixStream::connect(&self.socket).is_ok()
                && matches!(finish(&mut self.ctr(["version"])), Ok(Finished { code: Some(0), .. }))
        };
        self.service = Some(Service::start("containerd", &mut containerd, &self.log, answers)?);
        Ok(())
    }
}
