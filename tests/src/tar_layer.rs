//! Tar streams of layers, made in memory, with every kind of entry.

use std::{ffi::OsStr, io::Read, os::unix::ffi::OsStrExt as _, path::Path};

use tar::{Builder, EntryType, Header};

use crate::error::{Context as _, Result};

/// Seconds of the modification time of entries that do not say otherwise: 2025-01-01.
pub const DEFAULT_TIME: u64 = 1_735_689_600;

/// A layer in the making; entries stand in the tar in the order of the calls.
///
/// Calls can be chained; the first failure is reported by [`Self::finish`].
pub struct TarLayer {
    builder: Builder<Vec<u8>>,
    failure: Option<std::io::Error>,
}

/// What an entry says about itself beside its name and content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u64, u64),
    /// Modification time, in seconds and nanoseconds.
    pub time: (u64, u32),
    /// Extended attributes: full names and values.
    pub xattrs: Vec<(&'static str, Vec<u8>)>,
}

impl Attributes {
    /// Those of root's file of this mode.
    pub fn of_mode(mode: u32) -> Self {
        Self { mode, owner: (0, 0), time: (DEFAULT_TIME, 0), xattrs: Vec::new() }
    }
}

impl Default for TarLayer {
    fn default() -> Self {
        Self { builder: Builder::new(Vec::new()), failure: None }
    }
}

impl TarLayer {
    /// An empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory of mode 0755.
    pub fn directory(self, path: &str) -> Self {
        self.directory_with(path, &Attributes::of_mode(0o755))
    }

    /// A directory.
    pub fn directory_with(self, path: &str, attributes: &Attributes) -> Self {
        // The root itself is called `./`.
        let path = if path.is_empty() { "./" } else { path };
        self.append(path, EntryType::Directory, attributes, None, &[])
    }

    /// A regular file of mode 0644.
    pub fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.file_with(path, &Attributes::of_mode(0o644), content)
    }

    /// A regular file of mode 0644 whose name need not be UTF-8.
    pub fn file_bytes(self, path: &[u8], content: impl AsRef<[u8]>) -> Self {
        let path = Path::new(OsStr::from_bytes(path));
        self.append(path, EntryType::Regular, &Attributes::of_mode(0o644), None, content.as_ref())
    }

    /// An executable file of mode 0755.
    pub fn program(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.file_with(path, &Attributes::of_mode(0o755), content)
    }

    /// A regular file.
    pub fn file_with(self, path: &str, attributes: &Attributes, content: impl AsRef<[u8]>) -> Self {
        self.append(path, EntryType::Regular, attributes, None, content.as_ref())
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.append(path, EntryType::Symlink, &Attributes::of_mode(0o777), Some(target), &[])
    }

    /// A further name of the file at `target`, which is relative to the root of the layer.
    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.append(path, EntryType::Link, &Attributes::of_mode(0o644), Some(target), &[])
    }

    /// A named pipe.
    pub fn fifo(self, path: &str) -> Self {
        self.append(path, EntryType::Fifo, &Attributes::of_mode(0o600), None, &[])
    }

    /// A character device.
    pub fn character_device(mut self, path: &str, major: u32, minor: u32) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Char);
        let numbers = header.set_device_major(major).and_then(|()| header.set_device_minor(minor));
        self.note(numbers);
        self.append_header(header, path, &Attributes::of_mode(0o666), None, &[])
    }

    /// Deletes `name` of lower layers from `directory`, which is empty for the root.
    pub fn whiteout(self, directory: &str, name: &str) -> Self {
        self.file_with(&join(directory, &format!(".wh.{name}")), &Attributes::of_mode(0), [])
    }

    /// Hides everything that lower layers have in `directory`.
    pub fn opaque(self, directory: &str) -> Self {
        self.file_with(&join(directory, ".wh..wh..opq"), &Attributes::of_mode(0), [])
    }

    /// The bytes of the tar stream.
    ///
    /// # Errors
    ///
    /// When an entry could not be written, for example because a name has a NUL byte.
    pub fn finish(self) -> Result<Vec<u8>> {
        match self.failure {
            Some(error) => Err(error).context("writing a tar entry"),
            None => self.builder.into_inner().context("ending a tar stream"),
        }
    }

    fn append(
        self,
        path: impl AsRef<Path>,
        entry_type: EntryType,
        attributes: &Attributes,
        link: Option<&str>,
        content: &[u8],
    ) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(entry_type);
        self.append_header(header, path, attributes, link, content)
    }

    fn append_header(
        mut self,
        mut header: Header,
        path: impl AsRef<Path>,
        attributes: &Attributes,
        link: Option<&str>,
        content: &[u8],
    ) -> Self {
        header.set_mode(attributes.mode);
        header.set_uid(attributes.owner.0);
        header.set_gid(attributes.owner.1);
        header.set_mtime(attributes.time.0);
        header.set_size(content.len() as u64);
        let written = self.append_extensions(attributes).and_then(|()| match link {
            Some(target) => self.builder.append_link(&mut header, path.as_ref(), Path::new(target)),
            None => self.builder.append_data(&mut header, path, content.take(content.len() as u64)),
        });
        self.note(written);
        self
    }

    /// Writes the PAX header of what a plain header has no room for.
    fn append_extensions(&mut self, attributes: &Attributes) -> std::io::Result<()> {
        let (seconds, nanoseconds) = attributes.time;
        let time = format!("{seconds}.{nanoseconds:09}");
        let xattrs = attributes.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()));
        let mut extensions: Vec<(String, &[u8])> = xattrs.collect();
        if nanoseconds != 0 {
            extensions.push(("mtime".to_owned(), time.as_bytes()));
        }
        if extensions.is_empty() {
            return Ok(());
        }
        self.builder.append_pax_extensions(extensions.iter().map(|(key, value)| (key.as_str(), *value)))
    }

    fn note(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }
}

fn join(directory: &str, name: &str) -> String {
    match directory {
        "" => name.to_owned(),
        directory => format!("{directory}/{name}"),
    }
}
