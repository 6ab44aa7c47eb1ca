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

/// The records of an extended header by keyword; of several for one, the last. What a value means is only
/// looked at when somebody asks for it, as containerd's tar reader does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

/// What the records say of a GNU sparse file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sparse {
    pub(crate) name: Option<Vec<u8>>,
    /// Length of the file with its holes.
    pub(crate) real_size: Option<i64>,
    pub(crate) map: SparseMap,
}

/// Where the map of a sparse file stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SparseMap {
    /// In the records (formats 0.0 and 0.1): offsets and lengths by turns.
    Known(Vec<u64>),
    /// In front of the content (format 1.0).
    InContent,
}

const SPARSE_MAP: &[u8] = b"GNU.sparse.map";

impl Records {
    /// Reads the content of an extended header.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let mut records = BTreeMap::new();
        // Format 0.0 says piece by piece what 0.1 says in one record.
        let mut sparse_map: Vec<&[u8]> = Vec::new();
        while !bytes.is_empty() {
            let (key, value, rest) = next_record(bytes).ok_or("its PAX header is malformed")?;
            bytes = rest;
            if key.contains(&0) || (matches!(key, b"path" | b"linkpath" | b"uname" | b"gname") && value.contains(&0)) {
                return Err("its PAX header has a zero byte in a name");
            }
            if !matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                records.insert(key.to_vec(), value.to_vec());
                continue;
            }
            let is_length = key == b"GNU.sparse.numbytes";
            if is_length == sparse_map.len().is_multiple_of(2) || value.contains(&b',') {
                return Err("its sparse map is malformed");
            }
            sparse_map.push(value);
        }
        if !sparse_map.is_empty() {
            records.insert(SPARSE_MAP.to_vec(), sparse_map.join(&b','));
        }
        Ok(Self(records))
    }

    /// A value; an empty one says that the header block's own holds.
    pub(crate) fn text(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }

    /// A whole number.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>, &'static str> {
        self.text(key).map(integer).transpose()
    }

    /// A point in time.
    pub(crate) fn time(&self, key: &str) -> Result<Option<Time>, &'static str> {
        self.text(key).map(time).transpose()
    }

    /// Extended attributes by full name; empty values are values.
    pub(crate) fn xattrs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let records = self.0.range(XATTR_PREFIX.to_vec()..);
        let xattrs = records.map_while(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value)));
        xattrs.map(|(key, value)| (key.to_vec(), value.clone())).collect()
    }

    /// What they say of a sparse file; `None` for one without holes, and for formats that nobody knows.
    pub(crate) fn sparse(&self) -> Result<Option<Sparse>, &'static str> {
        let is_in_content = match (self.text("GNU.sparse.major"), self.text("GNU.sparse.minor")) {
            (Some(b"1"), Some(b"0")) => true,
            (Some(b"0"), Some(b"0" | b"1")) => false,
            (None, None) if self.text("GNU.sparse.map").is_some() => false,
            _ => return Ok(None),
        };
        let real_size = match self.integer("GNU.sparse.size")? {
            None => self.integer("GNU.sparse.realsize")?,
            size => size,
        };
        let name = self.text("GNU.sparse.name").map(<[u8]>::to_vec);
        let map = if is_in_content { SparseMap::InContent } else { SparseMap::Known(self.sparse_map()?) };
        Ok(Some(Sparse { name, real_size, map }))
    }

    fn sparse_map(&self) -> Result<Vec<u64>, &'static str> {
        let numbers = self.text("GNU.sparse.map").into_iter().flat_map(|map| map.split(|byte| *byte == b','));
        let map: Vec<_> = numbers.map(unsigned).collect::<Result<_, _>>()?;
        let count = unsigned(self.text("GNU.sparse.numblocks").unwrap_or_default())?;
        if (map.len() as u64).is_multiple_of(2) && map.len() as u64 / 2 == count {
            Ok(map)
        } else {
            Err("its sparse map is malformed")
        }
    }
}

/// Splits `LENGTH KEY=VALUE\n` off; the length counts the whole record.
fn next_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(unsigned(bytes.get(..space)?).ok()?).ok()?;
    let record = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    let (key, value) = split_at_byte(record, b'=')?;
    (!key.is_empty()).then_some((key, value, bytes.get(len..)?))
}

/// The parts before and behind the first such byte.
fn split_at_byte(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|found| *found == byte)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
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
    let (seconds_text, fraction) = split_at_byte(text, b'.').unwrap_or((text, &[]));
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
            record("size", b"of no interest, as another one follows"),
            record("size", b"8589934592"),
            record("SCHILY.xattr.user.a", b"\0=\n"),
            record("SCHILY.xattr.user.b", b""),
            record("gid", b"7"),
            record("gid", b""),
        ]
        .concat();
        let records = Records::parse(&bytes).unwrap();
        assert_eq!(records.text("path"), Some(&b"n\xe4me"[..]));
        assert_eq!((records.integer("size"), records.integer("gid")), (Ok(Some(8_589_934_592)), Ok(None)));
        let xattrs = [(b"user.a".to_vec(), b"\0=\n".to_vec()), (b"user.b".to_vec(), Vec::new())];
        assert_eq!(records.xattrs(), xattrs.into());
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
            b"11 uname=\0\n",
            b"0 a=b\n",
            b"-5 a=b\n",
            b"6 =ab\n",
        ] {
            assert!(Records::parse(bytes).is_err(), "{bytes:?}");
        }
        let records = Records::parse(&[record("size", b"x"), record("mtime", b"\n")].concat()).unwrap();
        assert!(records.integer("size").is_err() && records.time("mtime").is_err());
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
            record("GNU.sparse.numblocks", b"2"),
            record("GNU.sparse.offset", b"1"),
            record("GNU.sparse.numbytes", b"2"),
            record("GNU.sparse.offset", b"8"),
            record("GNU.sparse.numbytes", b"1"),
        ];
        let new = [
            record("GNU.sparse.size", b"10"),
            record("GNU.sparse.numblocks", b"2"),
            record("GNU.sparse.map", b"1,2,8,1"),
        ];
        assert_eq!(Records::parse(&old.concat()), Records::parse(&new.concat()));
        let sparse = Records::parse(&new.concat()).unwrap().sparse().unwrap().unwrap();
        assert_eq!((sparse.real_size, sparse.map), (Some(10), SparseMap::Known(vec![1, 2, 8, 1])));
        assert!(Records::parse(&record("GNU.sparse.numbytes", b"1")).is_err());
        let without_count = Records::parse(&record("GNU.sparse.map", b"1,2")).unwrap();
        assert_eq!(without_count.sparse(), Err("a number of its PAX header is malformed"));
    }
}
