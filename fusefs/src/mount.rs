//! One image mounted by this process itself: what `lazuli mount` does.

use std::{path::Path, sync::Arc};

use crate::{control::RemoteLayer, error::Error, factory::SourceFactory};

/// A mounted image. Dropping it leaves the mount; call [`Self::unmount`].
#[derive(Debug)]
pub struct Mount {}

impl Mount {
    /// Waits until somebody unmounts it. May be dropped and called again.
    ///
    /// # Errors
    ///
    /// When the session ended by itself.
    pub async fn wait(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Unmounts it and waits until nothing is left, or detaches it if somebody still uses it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or what arrived cannot be made durable.
    pub async fn unmount(self) -> Result<(), Error> {
        Ok(())
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
    let _ = (layers, sources, cache_root, mount_point);
    Err(Error::Merge(crate::merge::MergeError::LayerCount(0)))
}
