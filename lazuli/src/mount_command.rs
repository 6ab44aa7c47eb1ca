//! `lazuli mount`: flags in, a mount for as long as the command runs.

use std::path::PathBuf;

use clap::Args;
use control::Mode;
use converter::image::{ImageSource, location::Location, platform::Platform, resolve::ResolveError};
use fusefs::MountOptions;

use crate::{
    mount::{MountError, mount},
    output::fail_with,
    registry_arguments::RegistryArguments,
    user_directories,
};

/// What `lazuli mount` is told.
#[derive(Debug, Args)]
pub(crate) struct MountArguments {
    /// The image: host/repository:tag, host/repository@sha256:..., oci:DIR[:tag] or oci-archive:FILE[:tag]
    #[arg(value_name = "IMG")]
    image: Location,
    /// The directory to mount it on
    #[arg(value_name = "DIR")]
    mount_point: PathBuf,
    /// Where to keep what has arrived [default: lazuli in the user's cache directory]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// How the kernel reads the image: erofs (Linux 6.12), fuse, or auto for erofs where it works
    #[arg(long, value_name = "MODE", default_value_t)]
    mode: Mode,
    /// Platform to take from an image for several, for instance linux/arm64 [default: this host's]
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    registries: RegistryArguments,
}

/// Mounts, says so, and waits until it is interrupted or the image is unmounted.
pub(crate) async fn run(arguments: MountArguments, interrupted: impl Future<Output = ()>) -> Result<(), String> {
    let MountArguments { image, mount_point, cache, mode, platform, registries } = arguments;
    let client = registries.into_client()?;
    let cache_root = cache.or_else(|| user_directories::cache("lazuli")).unwrap_or_else(|| "/var/cache/lazuli".into());
    let named = image.to_string();
    let mounting = async {
        let source = ImageSource::open(image, &client, &std::env::temp_dir()).await.map_err(ResolveError::from)?;
        mount(&source, platform.as_ref(), &mount_point, &cache_root, MountOptions::plain(mode)).await
    };
    tokio::pin!(interrupted);
    let mut mounted = tokio::select! {
        result = mounting => result.map_err(|error: MountError| fail_with(&named, &error))?,
        () = &mut interrupted => return Err("interrupted".to_owned()),
    };
    println!("{named} is mounted on {}", mounted.mount_point().display());
    let ended = tokio::select! {
        result = mounted.wait() => result,
        () = interrupted => Ok(()),
    };
    let unmounted = mounted.unmount().await;
    ended.and(unmounted).map_err(|error| fail_with(&named, &error))
}
