//! Where the sources of layers come from: the seam that keeps HTTP out of this crate.

use std::{
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use control::RemoteLayer;
use futures_util::Stream;
use storage::{ByteStream, FetchFuture, FetchWideFuture, Source, SourceError, WideStream};
use tokio::runtime::Handle;

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

/// A source whose requests belong to another runtime than whoever waits for them.
///
/// A request gets from there the threads that may block (names to be resolved, credentials to be looked up): a resolver
/// that hangs takes none of the threads on which frames are decoded and written.
pub fn on_runtime(source: Arc<dyn Source>, runtime: Handle) -> Arc<dyn Source> {
    Arc::new(OnRuntime { source, runtime })
}

struct OnRuntime {
    source: Arc<dyn Source>,
    runtime: Handle,
}

impl OnRuntime {
    fn within<T>(&self, inner: T) -> Within<T> {
        Within { runtime: self.runtime.clone(), inner }
    }
}

impl Source for OnRuntime {
    fn origin(&self) -> Option<String> {
        self.source.origin()
    }

    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        let fetched = self.within(self.source.fetch(range));
        Box::pin(async move { Ok(Box::pin(self.within(fetched.await?)) as ByteStream) })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        let fetched = self.within(self.source.fetch_wide(range));
        Box::pin(async move {
            let WideStream { range, stream } = fetched.await?;
            Ok(WideStream { range, stream: Box::pin(self.within(stream)) })
        })
    }
}

/// Something that is polled by anybody, but starts and registers what it needs on a runtime of its own.
struct Within<T> {
    runtime: Handle,
    inner: T,
}

impl<F: Future + Unpin> Future for Within<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let _entered = this.runtime.enter();
        Pin::new(&mut this.inner).poll(context)
    }
}

impl Stream for Within<ByteStream> {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let _entered = this.runtime.enter();
        this.inner.as_mut().poll_next(context)
    }
}
