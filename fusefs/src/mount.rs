//! One image mounted by this process itself: what `lazuli mount` does.

use std::{path::Path, sync::Arc};

use tokio::runtime::Handle;

use crate::{
    control::RemoteLayer,
    error::Error,
    factory::SourceFactory,
    namespace::Namespace,
    service::{Service, blocking},
    session::{Session, SessionOptions},
};

/// A mounted image. Dropping it leaves the mount; call [`Self::unmount`].
#[derive(Debug)]
pub struct Mount {
    session: Session,
    service: Service,
}

impl Mount {
    /// Where it is mounted, as an absolute path.
    pub fn mount_point(&self) -> &Path {
        self.session.mount_point()
    }

    /// Waits until somebody unmounts it. May be dropped and called again; call [`Self::unmount`] after it.
    ///
    /// # Errors
    ///
    /// When the session ended by itself.
    pub async fn wait(&mut self) -> Result<(), Error> {
        self.session.wait().await
    }

    /// Unmounts it if nobody did, waits until the session has ended, and makes what arrived durable.
    ///
    /// If somebody uses the files still, the mount is detached only and works until he is done or the process ends.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or what arrived cannot be made durable.
    pub async fn unmount(mut self) -> Result<(), Error> {
        let unmounted = self.session.unmount().await;
        let service = self.service;
        blocking(move || service.flush()).await?;
        unmounted
    }
}

/// Mounts the merged tree of `layers` (lowest first) on the directory `mount_point`; returns when it can be used.
///
/// Indexes are fetched before that, data when it is read. Everything fetched is kept below `cache_root`.
/// Needs the runtime it is called on until the mount is gone.
///
/// # Errors
///
/// When the mount point, FUSE, the cache or an index cannot be used; then nothing is mounted.
pub async fn mount_image(
    layers: Vec<RemoteLayer>,
    sources: Arc<dyn SourceFactory>,
    cache_root: &Path,
    mount_point: &Path,
) -> Result<Mount, Error> {
    Session::check_mount_point(mount_point)?;
    let root = cache_root.to_owned();
    let runtime = Handle::current();
    let service = blocking(move || Service::open(&root, runtime, sources)).await?;
    let tree = service.tree(&layers).await?;
    let mount_point = mount_point.to_owned();
    let namespace = Arc::new(Namespace::of_tree(tree));
    let mount = move || Session::mount(namespace, &mount_point, &SessionOptions::default());
    let session = blocking(mount).await?;
    Ok(Mount { session, service })
}
