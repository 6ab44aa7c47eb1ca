//! Where the sources of layers come from: the seam that keeps HTTP out of this crate.

use std::sync::Arc;

use storage::{Source, SourceError};

use crate::control::RemoteLayer;

/// Makes a [`Source`] from what a client says about a layer. Any closure of that form is one.
///
/// Called when a layer is opened; does no I/O, so that a registry that is down does not keep a layer
/// from being used that has arrived already.
pub trait SourceFactory: Send + Sync + 'static {
    /// The source of the layer's blob.
    ///
    /// # Errors
    ///
    /// When the image reference cannot be understood.
    fn source(&self, layer: &RemoteLayer) -> Result<Arc<dyn Source>, SourceError>;
}

impl<F> SourceFactory for F
where
    F: Fn(&RemoteLayer) -> Result<Arc<dyn Source>, SourceError> + Send + Sync + 'static,
{
    fn source(&self, layer: &RemoteLayer) -> Result<Arc<dyn Source>, SourceError> {
        self(layer)
    }
}
