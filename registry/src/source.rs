//! One blob of a repository, readable by range.

use std::ops::Range;

use format_spec::Digest;
use storage::{FetchFuture, Source, SourceError};

use crate::{blob::Download, client::Client, reference::Reference};

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
}

impl Source for BlobSource {
    fn fetch(&self, range: Range<u64>) -> FetchFuture<'_> {
        Box::pin(async move {
            if range.start > range.end || range.end > self.len {
                let Self { digest, len, .. } = self;
                return Err(SourceError::refused(format!("bytes {range:?} of {digest}, which has {len}")));
            }
            let download = Download::new(&self.client, &self.reference, self.digest, Some(range), Some(self.len));
            download.into_stream().await.map_err(|error| error.to_source_error())
        })
    }
}
