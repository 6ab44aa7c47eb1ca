//! From compressed bytes of a stranger to plain ones: the digest first, then the decompressor.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, Weak},
};

use format_spec::{Digest, limits::FRAME_PLAIN_LEN_MAX};
use zstd::bulk::Decompressor;

use crate::sync::{Mutex, lock};

/// Workspaces that wait to be used again.
const SPARE_MAX: usize = 4;
/// Longest plain content whose memory is used again, in bytes.
const SPARE_LEN_MAX: usize = 4 << 20;

/// Why bytes are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// They are not those that the index names.
    #[error("digest {found}, expected {expected}")]
    Digest {
        /// By the index.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// They are, but do not decompress to what the index says.
    #[error("{0}")]
    Content(String),
}

/// The workspaces of all who decode; there are none as long as nobody does.
#[derive(Debug, Default)]
pub(crate) struct SharedWorkspaces(Mutex<Weak<Workspaces>>);

impl SharedWorkspaces {
    /// Those of whoever decodes at the moment. Hold them from the first frame to the last.
    pub(crate) fn get(&self) -> Arc<Workspaces> {
        let mut known = lock(&self.0);
        known.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Workspaces::default());
            *known = Arc::downgrade(&new);
            new
        })
    }
}

/// Decompressors with memory for what they bring.
///
/// The process gives memory of this size back to the system when it is freed, and taking it anew costs a good part of what
/// decompressing does. So it is used again until the last holder is gone.
#[derive(Default)]
pub(crate) struct Workspaces(Mutex<Vec<Workspace>>);

struct Workspace {
    decompressor: Decompressor<'static>,
    content: Vec<u8>,
}

/// The plain bytes of a frame.
pub(crate) struct Plain {
    workspace: Option<Workspace>,
    home: Arc<Workspaces>,
}

impl Workspaces {
    /// The plain bytes of a frame: exactly `plain_len`, from exactly the bytes that `digest` names.
    pub(crate) fn decode(
        self: &Arc<Self>,
        compressed: &[u8],
        digest: Digest,
        plain_len: u32,
    ) -> Result<Plain, DecodeError> {
        let found = Digest::of(compressed);
        if found != digest {
            return Err(DecodeError::Digest { expected: digest, found });
        }
        if plain_len > FRAME_PLAIN_LEN_MAX {
            return Err(DecodeError::Content(format!("frames hold at most {FRAME_PLAIN_LEN_MAX} bytes")));
        }
        let plain_len = plain_len as usize;
        let failed = |error: std::io::Error| DecodeError::Content(error.to_string());
        let spare = lock(&self.0).pop();
        let mut workspace = match spare {
            Some(spare) => spare,
            None => Workspace { decompressor: Decompressor::new().map_err(failed)?, content: Vec::new() },
        };
        let Workspace { decompressor, content } = &mut workspace;
        content.clear();
        content.reserve_exact(plain_len);
        decompressor.decompress_to_buffer(compressed, content).map_err(failed)?;
        if content.len() != plain_len {
            return Err(DecodeError::Content(format!("it has {} bytes", content.len())));
        }
        Ok(Plain { workspace: Some(workspace), home: self.clone() })
    }
}

impl Deref for Plain {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.workspace.as_ref().map_or(&[], |workspace| &workspace.content)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let spare = self.workspace.take().filter(|workspace| workspace.content.capacity() <= SPARE_LEN_MAX);
        let mut spares = lock(&self.home.0);
        if spares.len() < SPARE_MAX {
            spares.extend(spare);
        }
    }
}

impl fmt::Debug for Workspaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspaces").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(content: &[u8]) -> (Vec<u8>, Digest) {
        let bytes = zstd::bulk::compress(content, 1).unwrap();
        let digest = Digest::of(&bytes);
        (bytes, digest)
    }

    #[test]
    fn a_workspace_of_a_longer_frame_or_a_failed_one_brings_exactly_what_it_should() {
        let workspaces = SharedWorkspaces::default().get();
        let (long, short) = (vec![7; 300_000], b"short".to_vec());
        let (long_bytes, long_digest) = compressed(&long);
        let (short_bytes, short_digest) = compressed(&short);
        for _ in 0..2 {
            assert_eq!(*workspaces.decode(&long_bytes, long_digest, 300_000).unwrap(), long[..]);
            assert_eq!(*workspaces.decode(&short_bytes, short_digest, 5).unwrap(), short[..]);
            // There is room for the frame, which is longer than the index says.
            assert!(matches!(workspaces.decode(&long_bytes, long_digest, 5), Err(DecodeError::Content(_))));
            let cut = &long_bytes[..long_bytes.len() - 3];
            assert!(matches!(workspaces.decode(cut, Digest::of(cut), 300_000), Err(DecodeError::Content(_))));
            assert!(matches!(workspaces.decode(cut, long_digest, 300_000), Err(DecodeError::Digest { .. })));
        }
    }

    #[test]
    fn memory_is_kept_as_long_as_somebody_decodes() {
        let shared = SharedWorkspaces::default();
        let (bytes, digest) = compressed(&[1; 10]);
        let holder = shared.get();
        drop(holder.decode(&bytes, digest, 10).unwrap());
        assert_eq!(lock(&shared.get().0).len(), 1);
        let many: Vec<_> = (0..SPARE_MAX + 3).map(|_| holder.decode(&bytes, digest, 10).unwrap()).collect();
        drop(many);
        assert_eq!(lock(&holder.0).len(), SPARE_MAX);
        drop(holder);
        assert!(lock(&shared.get().0).is_empty());
    }
}
