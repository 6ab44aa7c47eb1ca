//! PAX extended headers: the records in front of an entry that say what its header block cannot.
//!
//! Source: POSIX.1-2024 pax, "pax Extended Header"; GNU tar manual, "Storing Sparse Files" (PAX formats).

use std::collections::BTreeMap;

/// Prefix of records that hold extended attributes, the one that containerd reads.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// A point in time; `nanoseconds` count forward from `seconds`, also before 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What the records say; `None` where the header block's own value holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_target: Option<Vec<u8>>,
    pub(crate) size: Option<i64>,
    pub(crate) uid: Option<i64>,
    pub(crate) gid: Option<i64>,
    pub(crate) mtime: Option<Time>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) sparse: PaxSparse,
}

/// The records of GNU sparse files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct PaxSparse {
    pub(crate) major: Option<i64>,
    pub(crate) minor: Option<i64>,
    pub(crate) name: Option<Vec<u8>>,
    /// Length of the file with its holes.
    pub(crate) real_size: Option<i64>,
    /// Offsets and lengths by turns, formats 0.0 and 0.1.
    pub(crate) map: Option<Vec<u64>>,
}

impl Pax {
    /// Reads the content of an extended header.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = next_record(bytes).ok_or("its PAX header is malformed")?;
            pax.set(key, value)?;
            bytes = rest;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if key.contains(&0) || (matches!(key, b"path" | b"linkpath") && value.contains(&0)) {
            return Err("its PAX header has a zero byte in a name");
        }
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            self.xattrs.insert(name.to_vec(), value.to_vec());
            return Ok(());
        }
        // An empty value withdraws an earlier record.
        let integer = || match value {
            b"" => Ok(None),
            _ => integer(value).map(Some),
        };
        let text = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link_target = text(),
            b"size" => self.size = integer()?,
            b"uid" => self.uid = integer()?,
            b"gid" => self.gid = integer()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = integer()?,
            b"GNU.sparse.minor" => self.sparse.minor = integer()?,
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = integer()?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let map = self.sparse.map.get_or_insert_default();
                if map.len() % 2 != usize::from(key == b"GNU.sparse.numbytes") {
                    return Err("its sparse map is malformed");
                }
                map.push(unsigned(value)?);
            }
            b"GNU.sparse.map" if value.is_empty() => self.sparse.map = Some(Vec::new()),
            b"GNU.sparse.map" => {
                self.sparse.map = Some(value.split(|byte| *byte == b',').map(unsigned).collect::<Result<_, _>>()?);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Splits `LENGTH KEY=VALUE\n` off; the length counts the whole record.
fn next_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(unsigned(&bytes[..space]).ok()?).ok()?;
    let record = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[len..]))
}

fn integer(text: &[u8]) -> Result<i64, &'static str> {
    let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    parsed.ok_or("a number of its PAX header is malformed")
}

/// A decimal number without a sign.
pub(crate) fn unsigned(text: &[u8]) -> Result<u64, &'static str> {
    let value = integer(text)?;
    u64::try_from(value).map_err(|_| "a number of its PAX header is negative")
}

/// `-?SECONDS[.FRACTION]`; digits below the nanosecond are dropped.
fn time(text: &[u8]) -> Result<Time, &'static str> {
    const MALFORMED: &str = "a time of its PAX header is malformed";
    let (seconds_text, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &[][..]),
    };
    let seconds = integer(seconds_text).map_err(|_| MALFORMED)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(MALFORMED);
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    if nanoseconds == 0 || !seconds_text.starts_with(b"-") {
        return Ok(Time { seconds, nanoseconds });
    }
    Ok(Time { seconds: seconds.checked_sub(1).ok_or(MALFORMED)?, nanoseconds: 1_000_000_000 - nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| len.to_string().len() + rest == *len).unwrap();
        [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn reads_records_and_the_last_one_wins() {
        let bytes = [
            record("path", b"old"),
            record("path", b"n\xe4me"),
            record("size", b"8589934592"),
            record("uid", b"3000000000"),
            record("SCHILY.xattr.user.a", b"\0=\n"),
            record("comment", b"of no interest"),
            record("gid", b"7"),
            record("gid", b""),
        ]
        .concat();
        let pax = Pax::parse(&bytes).unwrap();
        let expected = Pax {
            path: Some(b"n\xe4me".to_vec()),
            size: Some(8_589_934_592),
            uid: Some(3_000_000_000),
            xattrs: [(b"user.a".to_vec(), b"\0=\n".to_vec())].into(),
            ..Pax::default()
        };
        assert_eq!(pax, expected);
    }

    #[test]
    fn refuses_malformed_records() {
        for bytes in [
            b"12 path=ab\n".as_slice(),
            b"x path=a\n",
            b"9 path=ab",
            b"9 path=a\n9 path",
            b"7 path\n",
            b"99999999999999999999 a=b\n",
            b"10 path=\0\n\n",
            b"0 a=b\n",
            b"-5 a=b\n",
            b"9 size=x\n",
            b"10 mtime=\n\n",
        ] {
            assert!(Pax::parse(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn reads_times_to_the_nanosecond() {
        let check = |text: &str, seconds, nanoseconds| {
            assert_eq!(time(text.as_bytes()), Ok(Time { seconds, nanoseconds }), "{text}");
        };
        check("0", 0, 0);
        check("1700000000.123456789", 1_700_000_000, 123_456_789);
        check("1.0300000009", 1, 30_000_000);
        check("-1", -1, 0);
        check("-1.5", -2, 500_000_000);
        check("-0.25", -1, 750_000_000);
        check("5.", 5, 0);
        for text in ["", ".5", "1.x", "1e3", "--1"] {
            assert!(time(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn reads_sparse_maps_of_both_old_formats() {
        let old = [
            record("GNU.sparse.size", b"10"),
            record("GNU.sparse.offset", b"1"),
            record("GNU.sparse.numbytes", b"2"),
            record("GNU.sparse.offset", b"8"),
            record("GNU.sparse.numbytes", b"1"),
        ];
        let new = [record("GNU.sparse.size", b"10"), record("GNU.sparse.map", b"1,2,8,1")];
        assert_eq!(Pax::parse(&old.concat()), Pax::parse(&new.concat()));
        assert_eq!(Pax::parse(&new.concat()).unwrap().sparse.map, Some(vec![1, 2, 8, 1]));
        assert!(Pax::parse(&record("GNU.sparse.numbytes", b"1")).is_err());
    }
}
