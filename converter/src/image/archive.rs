//! A tar file with an image in it: where its members are, so that each can be read by range.
//!
//! The archive is walked once and not unpacked. One that is compressed has no ranges: it is decompressed into a
//! temporary file first.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tar_index::walker::{Entry, EntryKind, TarError, TarInput, next_entry};

use crate::{
    blob::{
        file_source::FileSource,
        reader::{Compression, MAGIC_LEN},
    },
    image::ImageError,
};

/// Most members of an archive; real ones have a few for each layer.
const MEMBER_COUNT_MAX: usize = 100_000;
/// Longest tar stream in a compressed archive: more than any image, and less than most disks have.
const PLAIN_LEN_MAX: u64 = 128 << 30;
/// Bytes read at once of a compressed archive.
const READ_LEN: usize = 128 << 10;
/// Links followed from one member to another; `docker save` makes one step.
const LINK_DEPTH_MAX: usize = 8;

/// An archive whose members are known.
#[derive(Debug)]
pub struct Archive {
    /// As users know it.
    path: PathBuf,
    /// Its plain tar stream.
    tar: FileSource,
    members: HashMap<String, Member>,
}

#[derive(Debug, Clone)]
enum Member {
    /// Its bytes in the archive.
    File(Range<u64>),
    /// Another name of a member.
    Link(String),
}

impl Archive {
    /// Finds the members of the archive at `path`; decompresses into a file in `spool_directory` if it must.
    ///
    /// Blocks.
    ///
    /// # Errors
    ///
    /// When it cannot be read, is no archive, or ends early.
    pub fn open(path: &Path, spool_directory: &Path) -> Result<Self, ImageError> {
        let failed = |error| ImageError::File { path: path.to_owned(), error };
        let refuse = |reason: String| ImageError::Archive { path: path.to_owned(), reason };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(refuse("a directory, where an archive is expected; name a directory as oci:DIR".to_owned()));
        }
        let mut start = [0; MAGIC_LEN];
        let start_len = file.read_at(&mut start, 0).map_err(failed)?;
        let compression = Compression::of(&start[..start_len]);
        let (tar, file) = if compression != Compression::None {
            let plain = decompress(&file, compression, spool_directory, PLAIN_LEN_MAX).map_err(refuse)?;
            let plain = Arc::new(plain);
            (FileSource::unnamed(Arc::clone(&plain)), plain)
        } else {
            (FileSource::new(path.to_owned()), Arc::new(file))
        };
        let members = find_members(&file).map_err(refuse)?;
        Ok(Self { path: path.to_owned(), tar, members })
    }

    /// The archive's path, as users know it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the member `name` is in the tar stream, links followed; `None` where there is none.
    pub fn find(&self, name: &str) -> Option<Range<u64>> {
        let mut name = name;
        for _ in 0..=LINK_DEPTH_MAX {
            match self.members.get(name)? {
                Member::File(range) => return Some(range.clone()),
                Member::Link(target) => name = target,
            }
        }
        None
    }

    /// The bytes `range` of the tar stream.
    pub fn part(&self, range: Range<u64>) -> FileSource {
        self.tar.part(range)
    }

    /// The whole member `name`; `None` where there is none. Blocks.
    ///
    /// # Errors
    ///
    /// When it has more than `len_max` bytes or cannot be read.
    pub fn read(&self, name: &str, len_max: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(range) = self.find(name) else { return Ok(None) };
        let len = range.end - range.start;
        if len > len_max {
            let reason = format!("{name} in it has {len} bytes, allowed are {len_max}");
            return Err(ImageError::Archive { path: self.path.clone(), reason });
        }
        let mut bytes = Vec::new();
        self.reader(range).and_then(|mut reader| reader.read_to_end(&mut bytes)).map_err(|error| self.failed(error))?;
        Ok(Some(bytes))
    }

    /// Reads the bytes `range` of the tar stream. Blocks.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened.
    pub fn reader(&self, range: Range<u64>) -> io::Result<impl Read> {
        let file = File::open(self.tar.path())?;
        Ok(PartReader { file, range })
    }

    /// An error of reading it.
    pub fn failed(&self, error: io::Error) -> ImageError {
        ImageError::File { path: self.path.clone(), error }
    }
}

/// Reads a part of a file.
struct PartReader {
    file: File,
    range: Range<u64>,
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let len = buffer.len().min(left);
        let read_len = self.file.read_at(&mut buffer[..len], self.range.start)?;
        if read_len == 0 && len > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.range.start += read_len as u64;
        Ok(read_len)
    }
}

/// The plain stream of a compressed archive, of at most `len_max` bytes, in a file without a name.
fn decompress(file: &File, compression: Compression, spool_directory: &Path, len_max: u64) -> Result<File, String> {
    let mut plain = tempfile::tempfile_in(spool_directory)
        .map_err(|error| format!("no temporary file in {}: {error}", spool_directory.display()))?;
    let broken = |error: io::Error| format!("decompressing into {}: {error}", spool_directory.display());
    let decoder = compression.reader(BufReader::with_capacity(READ_LEN, file)).map_err(broken)?;
    let len = io::copy(&mut decoder.take(len_max + 1), &mut plain).map_err(broken)?;
    if len > len_max {
        return Err(format!("it decompresses to more than {len_max} bytes: decompress it yourself"));
    }
    Ok(plain)
}

/// Walks the archive; keeps regular files and links by their names.
fn find_members(file: &File) -> Result<HashMap<String, Member>, String> {
    let len = file.metadata().map_err(|error| error.to_string())?.len();
    let mut input = FileInput { file, position: 0, window: [0; WINDOW_LEN] };
    let mut members = HashMap::new();
    while let Some(entry) = next_entry(&mut input).map_err(describe)? {
        let range = input.position..input.position.saturating_add(entry.stored_len);
        let name = normal_name(&entry.path);
        if range.end > len {
            return Err(format!("truncated: it ends within {name}"));
        }
        input.position = range.end.saturating_add(entry.padding_len);
        if let Some(member) = to_member(&entry, &name, range) {
            members.insert(name, member);
        }
        if members.len() > MEMBER_COUNT_MAX {
            return Err(format!("more than {MEMBER_COUNT_MAX} members: no archive of an image"));
        }
    }
    Ok(members)
}

fn describe(error: TarError) -> String {
    match error {
        TarError::Io(error) => error.to_string(),
        TarError::Truncated(position) => format!("truncated: it ends at byte {position}, within an entry"),
        TarError::Malformed { start: 0, reason } => format!("no tar archive: {reason}"),
        error => error.to_string(),
    }
}

fn to_member(entry: &Entry, name: &str, range: Range<u64>) -> Option<Member> {
    let target = || String::from_utf8_lossy(&entry.link_target).into_owned();
    match entry.kind {
        // Nobody writes images as sparse files; such a member would be read wrongly.
        EntryKind::Regular if entry.segments.is_none() => Some(Member::File(range)),
        EntryKind::HardLink => Some(Member::Link(normal_name(target().as_bytes()))),
        EntryKind::Symlink => {
            let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
            Some(Member::Link(normal_name(format!("{directory}/{}", target()).as_bytes())))
        }
        _ => None,
    }
}

/// A member's name without `.`, `..` and slashes at the ends.
fn normal_name(path: &[u8]) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let path = String::from_utf8_lossy(path);
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// What the walker looks at, at most.
const WINDOW_LEN: usize = 1024;

/// A file for the walker, which reads headers only.
struct FileInput<'a> {
    file: &'a File,
    position: u64,
    window: [u8; WINDOW_LEN],
}

impl TarInput for FileInput<'_> {
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        let len = len.min(WINDOW_LEN);
        let mut filled = 0;
        while filled < len {
            match self.file.read_at(&mut self.window[filled..len], self.position + filled as u64) {
                Ok(0) => break,
                Ok(read_len) => filled += read_len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&self.window[..filled])
    }

    fn consume(&mut self, len: usize) -> io::Result<()> {
        self.position += len as u64;
        Ok(())
    }

    fn position(&self) -> u64 {
        self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive with a file, a long name, a symbolic and a hard link, and a link to nowhere.
    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        builder.append_data(&mut header.clone(), "./a/layer.tar", &b"hello"[..]).unwrap();
        builder.append_data(&mut header, format!("{}/x", "long".repeat(40)), &b"world"[..]).unwrap();
        let mut link = tar::Header::new_gnu();
        link.set_size(0);
        link.set_entry_type(tar::EntryType::Symlink);
        builder.append_link(&mut link.clone(), "b/layer.tar", "../a/layer.tar").unwrap();
        builder.append_link(&mut link.clone(), "c/layer.tar", "../c/layer.tar").unwrap();
        link.set_entry_type(tar::EntryType::Link);
        builder.append_link(&mut link, "d/layer.tar", "a/layer.tar").unwrap();
        builder.into_inner().unwrap()
    }

    fn open(bytes: &[u8]) -> Result<Archive, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("archive");
        std::fs::write(&path, bytes).unwrap();
        let archive = Archive::open(&path, directory.path());
        archive.map_err(|error| error.to_string().replace(&path.display().to_string(), "FILE"))
    }

    #[test]
    fn members_are_found_through_links_whatever_the_compression() {
        let zstd = zstd::encode_all(&sample()[..], 0).unwrap();
        // As pzstd writes it: a skippable frame before each frame says how long that is.
        let length = u32::try_from(zstd.len()).unwrap().to_le_bytes();
        let pzstd = [&0x184D_2A50u32.to_le_bytes()[..], &4u32.to_le_bytes(), &length, &zstd].concat();
        let directory = tempfile::tempdir().unwrap();
        for bytes in [sample(), test_kit::gzip(&sample()), zstd, pzstd] {
            let path = directory.path().join("archive");
            std::fs::write(&path, bytes).unwrap();
            let archive = Archive::open(&path, directory.path()).unwrap();
            let read = |name: &str| archive.read(name, 5).unwrap();
            for name in ["a/layer.tar", "b/layer.tar", "d/layer.tar"] {
                assert_eq!(read(name).as_deref(), Some(&b"hello"[..]), "{name}");
            }
            assert_eq!(read(&format!("{}/x", "long".repeat(40))).as_deref(), Some(&b"world"[..]));
            assert_eq!((read("c/layer.tar"), read("e")), (None, None));
            let error = archive.read("a/layer.tar", 4).unwrap_err().to_string();
            assert!(error.ends_with("a/layer.tar in it has 5 bytes, allowed are 4"), "{error}");
        }
    }

    #[test]
    fn a_compressed_archive_takes_bounded_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("archive");
        std::fs::write(&path, zstd::encode_all(&sample()[..], 0).unwrap()).unwrap();
        let len = sample().len() as u64;
        let decompress =
            |len_max| decompress(&File::open(&path).unwrap(), Compression::Zstd, directory.path(), len_max);
        assert_eq!(decompress(len).unwrap().metadata().unwrap().len(), len);
        let error = decompress(len - 1).unwrap_err();
        assert_eq!(error, format!("it decompresses to more than {} bytes: decompress it yourself", len - 1));
    }

    #[test]
    fn what_is_no_archive_or_is_cut_is_refused_in_one_line() {
        let check = |bytes: &[u8], expected: &str| {
            let error = open(bytes).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        };
        check(&[b'x'; 600], "FILE: no tar archive: ");
        check(b"short", "FILE: no tar archive: the stream ends within a header");
        check(&sample()[..514], "FILE: truncated: it ends within a/layer.tar");
        check(&sample()[..1100], "FILE: ");
        let odd = test_kit::tar([("a\nb\u{1b}[1m", 0o644, "hello")]);
        check(&odd[..514], "FILE: truncated: it ends within a b [1m");
        check(b"\x1f\x8bnothing", "FILE: decompressing into ");
        check(b"\x28\xb5\x2f\xfdnothing", "FILE: decompressing into ");
        assert!(open(b"").unwrap().members.is_empty());
    }
}
