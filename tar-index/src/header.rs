//! One 512-byte tar header: bytes to values, nothing about what they mean together.
//!
//! Source: POSIX.1-2024 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". Where they
//! leave a choice, this reads what containerd's tar reader (Go's archive/tar) reads.

use std::ops::Range;

/// Tar streams are sequences of blocks of this length.
pub(crate) const BLOCK_LEN: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE_FLAG: usize = 156;
const LINK_NAME: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const VERSION: Range<usize> = 263..265;
const DEVICE_MAJOR: Range<usize> = 329..337;
const DEVICE_MINOR: Range<usize> = 337..345;
const USTAR_PREFIX: Range<usize> = 345..500;
const STAR_PREFIX: Range<usize> = 345..476;
const STAR_TIMES: [Range<usize>; 2] = [476..488, 488..500];
const STAR_TRAILER: Range<usize> = 508..512;
const GNU_TIMES: [Range<usize>; 2] = [345..357, 357..369];

/// The fields of a header block as they stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) path: Vec<u8>,
    pub(crate) link_target: Vec<u8>,
    pub(crate) type_flag: u8,
    pub(crate) mode: i64,
    pub(crate) uid: i64,
    pub(crate) gid: i64,
    pub(crate) size: i64,
    pub(crate) mtime_seconds: i64,
    pub(crate) device_major: i64,
    pub(crate) device_minor: i64,
}

impl Header {
    /// Decodes a block.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn decode(block: &[u8; BLOCK_LEN]) -> Result<Self, &'static str> {
        check_checksum(block)?;
        let is_gnu = &block[MAGIC] == b"ustar " && &block[VERSION] == b" \0";
        let is_ustar = &block[MAGIC] == b"ustar\0";
        let is_star = is_ustar && &block[STAR_TRAILER] == b"tar\0";
        let prefix = match (is_ustar, is_star, is_gnu) {
            (_, true, _) => {
                STAR_TIMES.into_iter().try_for_each(|field| number(block.get(field).unwrap_or_default()).map(drop))?;
                text(&block[STAR_PREFIX])
            }
            (true, ..) => text(&block[USTAR_PREFIX]),
            (_, _, true) => gnu_prefix(block),
            _ => &[],
        };
        let mut path = prefix.to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(text(&block[NAME]));
        // Archives older than POSIX have arbitrary bytes here.
        let device = |field| if is_gnu || is_ustar { number(block.get(field).unwrap_or_default()) } else { Ok(0) };
        Ok(Self {
            path,
            link_target: text(&block[LINK_NAME]).to_vec(),
            type_flag: block[TYPE_FLAG],
            mode: number(&block[MODE])?,
            uid: number(&block[UID])?,
            gid: number(&block[GID])?,
            size: number(&block[SIZE])?,
            mtime_seconds: number(&block[MTIME])?,
            device_major: device(DEVICE_MAJOR)?,
            device_minor: device(DEVICE_MINOR)?,
        })
    }
}

/// GNU headers have times where others have a prefix. Go up to 1.7 wrote a prefix into them all the same,
/// and its reader still takes what is no time for that.
fn gnu_prefix(block: &[u8; BLOCK_LEN]) -> &[u8] {
    let is_time = |field: Range<usize>| {
        let field = block.get(field).unwrap_or_default();
        field.first() == Some(&0) || number(field).is_ok()
    };
    let prefix = text(&block[USTAR_PREFIX]);
    if GNU_TIMES.into_iter().all(is_time) || !prefix.is_ascii() { &[] } else { prefix }
}

/// The sum of all bytes, those of the checksum counted as spaces; some old writers summed signed bytes.
fn check_checksum(block: &[u8; BLOCK_LEN]) -> Result<(), &'static str> {
    let stored = octal(&block[CHECKSUM]).map_err(|_| "its header has no checksum: this is no tar stream")?;
    let counted = block.iter().enumerate().map(|(at, byte)| if CHECKSUM.contains(&at) { b' ' } else { *byte });
    let (unsigned, signed) = counted.fold((0i64, 0i64), |(unsigned, signed), byte| {
        (unsigned + i64::from(byte), signed + i64::from(byte.cast_signed()))
    });
    if stored == unsigned || stored == signed { Ok(()) } else { Err("the checksum of its header does not match") }
}

/// The bytes up to the first zero.
pub(crate) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number, in octal digits or, with the top bit set, in two's complement, big endian.
fn number(field: &[u8]) -> Result<i64, &'static str> {
    let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) else {
        return octal(field);
    };
    // The top bit marks the encoding; the one below it is the sign.
    let start = i64::from((first << 1).cast_signed() >> 1);
    rest.iter().try_fold(start, |value, byte| {
        let shifted = value.checked_mul(256).ok_or("a number of its header is too large")?;
        Ok(shifted | i64::from(*byte))
    })
}

fn octal(field: &[u8]) -> Result<i64, &'static str> {
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_padding(byte)).unwrap_or(field.len());
    let end = field.iter().rposition(|byte| !is_padding(byte)).map_or(start, |last| last + 1);
    text(field.get(start..end).unwrap_or_default()).iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => Ok(value * 8 + i64::from(digit - b'0')),
        _ => Err("a number of its header is not octal"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_numbers_in_both_encodings() {
        let check = |field: &[u8], expected: Result<i64, &str>| assert_eq!(number(field), expected, "{field:?}");
        check(b"0000644\0", Ok(0o644));
        check(b"  755 \0 ", Ok(0o755));
        check(b"\0\0\0\0", Ok(0));
        check(b"77777777777\0", Ok(0o77_777_777_777));
        check(b"12a\0", Err("a number of its header is not octal"));
        check(b"-1\0", Err("a number of its header is not octal"));
        check(&[0x80, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], Ok(1 << 24));
        check(&[0x80, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0], Err("a number of its header is too large"));
        check(&[0x80, 0, 0, 0, 0x7f, 255, 255, 255, 255, 255, 255, 255], Ok(i64::MAX));
        check(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0], Err("a number of its header is too large"));
        check(&[255; 12], Ok(-1));
        check(&[0xff, 0xff, 0xfe, 0], Ok(-512));
    }

    #[test]
    fn reads_prefix_and_refuses_a_wrong_checksum() {
        let mut header = tar::Header::new_ustar();
        let path = format!("{}/{}", "d".repeat(120), "f".repeat(80));
        header.set_path(&path).unwrap();
        header.set_size(7);
        header.set_cksum();
        let mut block = *header.as_bytes();
        let decoded = Header::decode(&block).unwrap();
        assert_eq!((decoded.path, decoded.size, decoded.type_flag), (path.into_bytes(), 7, 0));
        block[0] ^= 1;
        assert_eq!(Header::decode(&block), Err("the checksum of its header does not match"));
    }
}
