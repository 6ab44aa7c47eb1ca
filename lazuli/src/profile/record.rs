//! Records what a start of an image reads: mounts it with nothing in the cache, runs it until it is ready, and looks at
//! what was read by then.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use control::Mode;
use converter::{
    hot_set::{ConfigError, StartConfig},
    image::{ImageSource, platform::Platform, resolve::ResolveError},
};
use format_spec::profile::Profile;
use fusefs::MountOptions;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use super::{
    bundle::{BundleError, runtime_config},
    container::{Container, ContainerError, Ready},
};
use crate::mount::{MountError, mount};

/// How an image is run.
#[derive(Debug, Clone)]
pub(crate) struct RecordOptions {
    /// Takes the place of the image's command unless it is empty.
    pub(crate) command: Vec<String>,
    pub(crate) ready: Ready,
    /// How long it may take to get ready.
    pub(crate) within: Duration,
    pub(crate) platform: Option<Platform>,
    pub(crate) mode: Mode,
    /// Where the container's writes and what it reads are kept meanwhile.
    pub(crate) work: PathBuf,
}

/// Nothing is recorded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// Not root.
    #[error("needs root: it mounts the image and runs a container")]
    NotRoot,
    /// Somebody else has the port.
    #[error("port {0} answers already: end who listens there, or have the container listen elsewhere")]
    PortInUse(u16),
    /// The place for what is kept meanwhile.
    #[error("{}: {error}", path.display())]
    Work {
        /// A directory.
        path: PathBuf,
        /// Why not.
        #[source]
        error: std::io::Error,
    },
    /// Overlayfs refuses the place.
    #[error("{} cannot hold what a container writes: {error}; name a directory on another file system with --work", path.display())]
    Overlay {
        /// The directory.
        path: PathBuf,
        /// The kernel's error.
        error: Errno,
    },
    /// Finding the image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Mounting it.
    #[error(transparent)]
    Mount(Box<MountError>),
    /// Its config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Finding what to run.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Running it.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Taking the mount away.
    #[error("unmounting: {0}")]
    Unmount(#[source] fusefs::Error),
    /// Somebody ended the command.
    #[error("interrupted")]
    Interrupted,
    /// Nothing was read.
    #[error("the container read nothing of the image before it was ready")]
    Nothing,
}

/// Runs the image at `source` and returns what it read until it was ready; lines of its output go to `tell`.
///
/// Everything that is made is gone afterwards, whatever happens.
///
/// # Errors
///
/// When the image is not there, not lazy, cannot be run or does not get ready.
pub(crate) async fn record(
    source: &ImageSource,
    options: &RecordOptions,
    tell: impl FnMut(&str),
    interrupted: impl Future<Output = ()>,
) -> Result<Profile, RecordError> {
    tokio::pin!(interrupted);
    if !rustix::process::geteuid().is_root() {
        return Err(RecordError::NotRoot);
    }
    if let Ready::Port(port) = options.ready
        && TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
    {
        return Err(RecordError::PortInUse(port));
    }
    let work = tempfile::Builder::new().prefix("lazuli-profile-").tempdir_in(&options.work);
    let work = work.map_err(|error| RecordError::Work { path: options.work.clone(), error })?;
    let places = Places::make(work.path())?;
    let mounting = async {
        let config = image_config(source, options.platform.as_ref()).await?;
        // An empty cache: what is there already is not asked for.
        let mount_options = MountOptions { mode: options.mode, records: true };
        let mounted = mount(source, options.platform.as_ref(), &places.image, &places.cache, mount_options).await;
        let mounted = mounted.map_err(|error| RecordError::Mount(Box::new(error)))?;
        Ok::<_, RecordError>((config, mounted))
    };
    let (config, mounted) = tokio::select! {
        mounted = mounting => mounted?,
        () = &mut interrupted => return Err(RecordError::Interrupted),
    };
    let ran = run(&places, &config, options, tell, interrupted).await;
    let touched = mounted.touched_files();
    let unmounted = mounted.unmount().await;
    ran?;
    unmounted.map_err(RecordError::Unmount)?;
    if touched.is_empty() {
        return Err(RecordError::Nothing);
    }
    Ok(Profile::of_files(touched.into_iter().map(|file| (file.path, file.ranges))))
}

async fn image_config(source: &ImageSource, platform: Option<&Platform>) -> Result<StartConfig, RecordError> {
    let image = converter::image::resolve::resolve_image(source, platform).await?;
    Ok(StartConfig::from_json(&image.config)?)
}

async fn run(
    places: &Places,
    config: &StartConfig,
    options: &RecordOptions,
    tell: impl FnMut(&str),
    interrupted: impl Future<Output = ()>,
) -> Result<(), RecordError> {
    let _overlay = Overlay::mount(places)?;
    let document = runtime_config(config, &options.command, &places.root)?;
    let mut container = Container::start(&places.run, &document)?;
    let ready = tokio::select! {
        ready = container.wait(&options.ready, options.within, tell) => ready.map_err(RecordError::Container),
        () = interrupted => Err(RecordError::Interrupted),
    };
    container.end().await;
    ready
}

/// Directories of a recording.
#[derive(Debug)]
struct Places {
    cache: PathBuf,
    image: PathBuf,
    written: PathBuf,
    scratch: PathBuf,
    root: PathBuf,
    run: PathBuf,
}

impl Places {
    fn make(work: &Path) -> Result<Self, RecordError> {
        let make = |name: &str| {
            let path = work.join(name);
            fs::create_dir(&path).map(|()| path.clone()).map_err(|error| RecordError::Work { path, error })
        };
        Ok(Self {
            cache: make("cache")?,
            image: make("image")?,
            written: make("written")?,
            scratch: make("scratch")?,
            root: make("root")?,
            run: make("run")?,
        })
    }
}

/// The container's root file system; gone with this.
#[derive(Debug)]
struct Overlay<'a>(&'a Path);

impl<'a> Overlay<'a> {
    fn mount(places: &'a Places) -> Result<Self, RecordError> {
        let Places { image, written, scratch, root, .. } = places;
        let (lower, upper, work) = (image.display(), written.display(), scratch.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let overlay = |error| RecordError::Overlay { path: written.clone(), error };
        let options = std::ffi::CString::new(options).map_err(|_| overlay(Errno::INVAL))?;
        rustix::mount::mount("overlay", root, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .map_err(overlay)?;
        Ok(Self(root))
    }
}

impl Drop for Overlay<'_> {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(self.0, UnmountFlags::DETACH) {
            tracing::warn!(path = %self.0.display(), %error, "still mounted");
        }
    }
}
