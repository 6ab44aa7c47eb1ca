//! Bytes that layers are made of.

use std::{io::Write as _, path::Path};

use flate2::{Compression, write::GzEncoder};

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    // Marsaglia, Xorshift RNGs, 2003; its state must not be 0.
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// A tar stream of regular files: path, permissions, content.
pub fn tar<P: AsRef<Path>, C: AsRef<[u8]>>(files: impl IntoIterator<Item = (P, u32, C)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, permissions, content) in files {
        let content = content.as_ref();
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(permissions);
        builder.append_data(&mut header, path, content).expect("a path for a tar stream");
    }
    builder.into_inner().expect("in memory")
}

/// One gzip member, compressed fast.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("in memory")
}
