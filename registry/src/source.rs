//! One blob of a repository, readable by range.

use std::ops::Range;

use format_spec::Digest;
use storage::{FetchFuture, FetchWideFuture, Source, SourceError};

use crate::{client::Client, download::Download, reference::Reference};

/// Where `storage` fetches a layer blob from: a registry.
#[derive(Debug, Clone)]
pub struct BlobSource {
    client: Client,
    reference: Reference,
    digest: Digest,
    len: u64,
}

impl BlobSource {
    /// The blob `digest` of `len` bytes in the repository of `reference`.
    pub fn new(client: Client, reference: Reference, digest: Digest, len: u64) -> Self {
        Self { client, reference, digest, len }
    }

    fn download(&self, range: Range<u64>) -> Result<Download, SourceError> {
        let Self { client, reference, digest, len } = self;
        if range.start > range.end || range.end > *len {
            return Err(SourceError::refused(format!("bytes {range:?} of {digest}, which has {len}")));
        }
        Ok(Download::new(client, reference, *digest, Some(range), Some(*len)))
    }
}

impl Source for BlobSource {
    /// The registry, as references name it: its mirrors answer for it.
    fn origin(&self) -> Option<String> {
        Some(self.reference.host().to_owned())
    }

    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        Box::pin(async move { self.download(range)?.into_stream().await.map_err(|error| error.to_source_error()) })
    }

    fn fetch_wide(&self, range: Range<u64>) -> FetchWideFuture<'_> {
        Box::pin(async move { self.download(range)?.into_wide_stream().await.map_err(|error| error.to_source_error()) })
    }
}
