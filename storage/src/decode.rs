//! From compressed bytes of a stranger to plain ones: the digest first, then the decompressor.

use format_spec::{Digest, index::FRAME_PLAIN_LEN_MAX};

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

/// The plain bytes of a frame: exactly `plain_len`, from exactly the bytes that `digest` names.
pub(crate) fn decode(compressed: &[u8], digest: Digest, plain_len: u32) -> Result<Vec<u8>, DecodeError> {
    let found = Digest::of(compressed);
    if found != digest {
        return Err(DecodeError::Digest { expected: digest, found });
    }
    if plain_len > FRAME_PLAIN_LEN_MAX {
        return Err(DecodeError::Content(format!("frames hold at most {FRAME_PLAIN_LEN_MAX} bytes")));
    }
    let plain_len = plain_len as usize;
    let content =
        zstd::bulk::decompress(compressed, plain_len).map_err(|error| DecodeError::Content(error.to_string()))?;
    if content.len() != plain_len {
        return Err(DecodeError::Content(format!("it has {} bytes", content.len())));
    }
    Ok(content)
}
