//! Tar streams header by header, for what well-behaved writers do not write.

/// Tar streams are sequences of blocks of this length.
pub const BLOCK_LEN: usize = 512;
/// Seconds of the modification time of entries that do not say otherwise: 2024-07-03.
pub const RAW_TIME: i64 = 1_720_000_000;

/// Which writer's headers an entry has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Magic {
    /// Before POSIX: neither magic number nor devices.
    Old,
    /// POSIX.
    Ustar,
    /// GNU tar.
    Gnu,
}

/// One header block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawHeader {
    /// Name; at most 100 bytes.
    pub path: Vec<u8>,
    /// Path in front of the name; at most 155 bytes, POSIX alone.
    pub prefix: Vec<u8>,
    /// Type flag.
    pub kind: u8,
    /// Permission bits.
    pub mode: i64,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Modification time, in seconds.
    pub mtime: i64,
    /// Length that the header says, where it is not that of the content.
    pub size: Option<i64>,
    /// Target of a link; at most 100 bytes.
    pub target: Vec<u8>,
    /// Major and minor number.
    pub device: (i64, i64),
    /// Writer.
    pub magic: Magic,
}

impl RawHeader {
    /// An entry of this type, mode 0644.
    pub fn new(kind: u8, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            prefix: Vec::new(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: RAW_TIME,
            size: None,
            target: Vec::new(),
            device: (0, 0),
            magic: Magic::Ustar,
        }
    }

    /// A regular file.
    pub fn file(path: impl AsRef<[u8]>) -> Self {
        Self::new(b'0', path)
    }

    /// A directory of mode 0755.
    pub fn directory(path: impl AsRef<[u8]>) -> Self {
        Self { mode: 0o755, ..Self::new(b'5', path) }
    }

    /// A hard link.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { target: target.as_ref().to_vec(), ..Self::new(b'1', path) }
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { target: target.as_ref().to_vec(), ..Self::new(b'2', path) }
    }

    fn to_block(&self, content_len: usize) -> [u8; BLOCK_LEN] {
        let mut block = [0; BLOCK_LEN];
        let mut put = |at: usize, len: usize, bytes: &[u8]| {
            assert!(bytes.len() <= len, "a field of the header is too short for {bytes:?}");
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, 100, &self.path);
        put(100, 8, &number(self.mode, 8));
        put(108, 8, &number(self.uid, 8));
        put(116, 8, &number(self.gid, 8));
        let content_len = i64::try_from(content_len).expect("content is in memory");
        put(124, 12, &number(self.size.unwrap_or(content_len), 12));
        put(136, 12, &number(self.mtime, 12));
        put(156, 1, &[self.kind]);
        put(157, 100, &self.target);
        match self.magic {
            Magic::Old => {}
            Magic::Ustar => put(257, 8, b"ustar\x0000"),
            Magic::Gnu => put(257, 8, b"ustar  \0"),
        }
        if self.magic != Magic::Old {
            put(329, 8, &number(self.device.0, 8));
            put(337, 8, &number(self.device.1, 8));
        }
        put(345, 155, &self.prefix);
        set_checksum(&mut block);
        block
    }
}

/// A number as a field of `len` bytes: octal where it fits, else base 256.
fn number(value: i64, len: usize) -> Vec<u8> {
    let octal = format!("{value:0width$o}\0", width = len - 1);
    if value >= 0 && octal.len() <= len {
        return octal.into_bytes();
    }
    let mut field = vec![if value < 0 { 0xff } else { 0 }; len];
    let bytes = value.to_be_bytes();
    let used = len.min(bytes.len());
    field[len - used..].copy_from_slice(&bytes[bytes.len() - used..]);
    field[0] |= 0x80;
    field
}

/// Sets the checksum of a header block.
pub fn set_checksum(block: &mut [u8; BLOCK_LEN]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A tar stream in the making; entries stand in it in the order of the calls.
#[derive(Debug, Clone, Default)]
pub struct RawTar(Vec<u8>);

impl RawTar {
    /// A stream without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// An entry.
    pub fn entry(self, header: &RawHeader, content: &[u8]) -> Self {
        let block = header.to_block(content.len());
        self.bytes(&block).content(content)
    }

    /// An entry without content.
    pub fn header(self, header: &RawHeader) -> Self {
        self.entry(header, b"")
    }

    /// An entry that has this block as its header, its checksum set here.
    pub fn block(self, header: &RawHeader, content: &[u8], change: impl FnOnce(&mut [u8; BLOCK_LEN])) -> Self {
        let mut block = header.to_block(content.len());
        change(&mut block);
        set_checksum(&mut block);
        self.bytes(&block).content(content)
    }

    /// A regular file of mode 0644.
    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(&RawHeader::file(path), content)
    }

    /// A directory of mode 0755.
    pub fn directory(self, path: &str) -> Self {
        self.header(&RawHeader::directory(path))
    }

    /// A PAX header for the next entry.
    pub fn pax<K: AsRef<[u8]>, V: AsRef<[u8]>>(self, records: &[(K, V)]) -> Self {
        self.entry(&RawHeader::new(b'x', "PaxHeaders/entry"), &pax_records(records))
    }

    /// A global PAX header of this name.
    pub fn global_pax(self, path: &str, records: &[(&str, &[u8])]) -> Self {
        self.entry(&RawHeader::new(b'g', path), &pax_records(records))
    }

    /// A GNU long name (`L`) or long link target (`K`) for the next entry.
    pub fn gnu_long(self, kind: u8, text: &[u8]) -> Self {
        let header = RawHeader { magic: Magic::Gnu, ..RawHeader::new(kind, "././@LongLink") };
        self.entry(&header, &[text, b"\0"].concat())
    }

    /// Any bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn content(mut self, content: &[u8]) -> Self {
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK_LEN), 0);
        self
    }

    /// The stream with its end.
    pub fn finish(self) -> Vec<u8> {
        self.bytes(&[0; 2 * BLOCK_LEN]).0
    }

    /// The stream as it is, without an end.
    pub fn unfinished(self) -> Vec<u8> {
        self.0
    }
}

/// The content of a PAX header.
pub fn pax_records<K: AsRef<[u8]>, V: AsRef<[u8]>>(records: &[(K, V)]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let (key, value) = (key.as_ref(), value.as_ref());
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| len.to_string().len() + rest == *len).expect("some length fits");
        content.extend_from_slice(format!("{len} ").as_bytes());
        content.extend_from_slice(key);
        content.push(b'=');
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    content
}
