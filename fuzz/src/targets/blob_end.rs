//! What stands at the end of a blob and beside it: footer, dedup section, annotations.

use std::collections::BTreeMap;

use format_spec::{
    Digest, Footer, LazyLayer, dedup, footer::FOOTER_FRAME_LEN, records::DedupLocation, table::FormatError,
};

use super::{choose, one_line, text};
use crate::seal;

/// First byte: footer as it is or put right, dedup section, annotations.
pub(crate) fn run(data: &[u8]) {
    match choose(data, 4) {
        Some((0, rest)) => footer(rest),
        Some((1, rest)) => {
            let mut bytes = rest.to_vec();
            // The checksum covers the content, not the header of the skippable frame.
            if let Some(content) = bytes.get_mut(8..) {
                seal::crc_at_end(content);
            }
            footer(&bytes);
        }
        Some((2, rest)) => dedup_section(rest),
        Some((_, rest)) => annotations(rest),
        None => {}
    }
}

/// First eight bytes: the length that the blob is said to have.
fn footer(data: &[u8]) {
    let Some((frame, blob_len)) = data.split_last_chunk::<8>().map(|(frame, len)| (frame, u64::from_le_bytes(*len)))
    else {
        return;
    };
    match Footer::from_frame(frame, blob_len) {
        Ok(Some((index, hot_len))) => {
            let end = index.range().end.checked_add(hot_len).and_then(|end| end.checked_add(FOOTER_FRAME_LEN));
            assert!(end.is_some_and(|end| end <= blob_len), "everything lies inside the blob");
        }
        Ok(None) => {}
        Err(error) => one_line(&error),
    }
}

/// First four bytes: the plain length; next eight: the length of the plain address space.
fn dedup_section(data: &[u8]) {
    let Some((plain_len, rest)) = data.split_first_chunk::<4>() else { return };
    let Some((space_len, compressed)) = rest.split_first_chunk::<8>() else { return };
    let location = DedupLocation {
        compressed_len: (compressed.len() as u64).into(),
        plain_len: u64::from(u32::from_le_bytes(*plain_len) % (32 << 20)).into(),
        digest: *Digest::of(compressed).as_bytes(),
    };
    let space_len = u64::from_le_bytes(*space_len);
    let pieces = match dedup::decompress(compressed, &location, space_len) {
        Ok(pieces) => pieces,
        Err(error) => return one_line(&error),
    };
    assert!(pieces.iter().all(|piece| piece.plain_range().end <= space_len));
    let again = dedup::compress(&pieces).expect("pieces that were read can be written");
    let location = DedupLocation {
        compressed_len: (again.bytes.len() as u64).into(),
        plain_len: again.plain_len.into(),
        digest: *again.digest.as_bytes(),
    };
    assert_eq!(dedup::decompress(&again.bytes, &location, space_len), Ok::<_, FormatError>(pieces));
}

/// Lines `key=value`.
fn annotations(data: &[u8]) {
    let text = text(data);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let annotations: BTreeMap<&str, &str> = pairs.collect();
    match LazyLayer::from_annotations(|key| annotations.get(key).copied()) {
        Ok(Some(layer)) => {
            let written = layer.to_annotations();
            let again = LazyLayer::from_annotations(|key| written.get(key).map(String::as_str));
            assert_eq!(again, Ok(Some(layer)));
            assert!(layer.index.range().end <= layer.blob_len);
        }
        Ok(None) => {}
        Err(error) => one_line(&error),
    }
}
