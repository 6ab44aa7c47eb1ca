//! The directory in which a user keeps what was converted: an entry for each layer, as a file.
//!
//! An entry is believed that carries a code made with the key of the directory, which nobody but its owner can read.
//! So whoever can write into the directory, or had it before, can at most take entries away.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use format_spec::{Digest, DigestHasher};
use serde::{Deserialize, Serialize};

use crate::convert::cache::{ConversionKey, Known};

/// Longest entry that is read; they have a kilobyte.
const ENTRY_LEN_MAX: u64 = 64 << 10;
/// Length of a key, in bytes: that of the code.
const KEY_LEN: usize = 32;
/// The bytes that SHA-256 takes at a time. Source: RFC 2104 2.
const BLOCK_LEN: usize = 64;
const KEY_NAME: &str = "key";

/// A directory of entries; made when the first one is written.
#[derive(Debug)]
pub(crate) struct CacheDirectory(PathBuf);

/// A file of the directory.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: ConversionKey,
    known: Known,
    /// Over the other two.
    code: Digest,
}

impl CacheDirectory {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The entry of `key`; a file that cannot be read, understood or believed is none.
    pub(crate) fn read(&self, key: &ConversionKey) -> Option<Known> {
        let secret = self.secret()?;
        let bytes = read_bounded(&self.entry_path(key), ENTRY_LEN_MAX).ok()?;
        let entry: Entry = serde_json::from_slice(&bytes).ok()?;
        let is_ours = entry.code == code(&secret, &message(&entry.key, &entry.known));
        (is_ours && entry.key == *key).then_some(entry.known)
    }

    /// Remembers what `key` became.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written, or its key belongs to somebody else.
    pub(crate) fn write(&self, key: &ConversionKey, known: &Known) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        let secret = match self.secret() {
            Some(secret) => secret,
            None => self.make_secret()?,
        };
        let code = code(&secret, &message(key, known));
        let entry = Entry { key: key.clone(), known: known.clone(), code };
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        serde_json::to_writer(&mut file, &entry)?;
        file.persist(self.entry_path(key))?;
        Ok(())
    }

    /// Forgets what `key` became.
    pub(crate) fn remove(&self, key: &ConversionKey) {
        if let Err(error) = fs::remove_file(self.entry_path(key)) {
            tracing::debug!(%error, "entry of the conversion cache not removed");
        }
    }

    fn entry_path(&self, key: &ConversionKey) -> PathBuf {
        let name = Digest::of(&serde_json::to_vec(key).expect("texts")).hex();
        self.0.join(name + ".json")
    }

    /// The directory's key, if it has one that only this user knows.
    fn secret(&self) -> Option<[u8; KEY_LEN]> {
        let path = self.0.join(KEY_NAME);
        let metadata = fs::symlink_metadata(&path).ok()?;
        let is_ours = metadata.uid() == rustix::process::geteuid().as_raw();
        if !metadata.is_file() || !is_ours || metadata.mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "others can read or write this key: the conversion cache is not used");
            return None;
        }
        read_bounded(&path, KEY_LEN as u64).ok()?.try_into().ok()
    }

    fn make_secret(&self) -> io::Result<[u8; KEY_LEN]> {
        let mut secret = [0; KEY_LEN];
        File::open("/dev/urandom")?.read_exact(&mut secret)?;
        // Temporary files can be read by their owner alone.
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        file.write_all(&secret)?;
        match file.persist_noclobber(self.0.join(KEY_NAME)) {
            Ok(_) => Ok(secret),
            // Another process was first; or there is one that must not be used.
            Err(error) => self.secret().ok_or(error.error),
        }
    }
}

/// The bytes that the code of an entry is made over.
fn message(key: &ConversionKey, known: &Known) -> Vec<u8> {
    serde_json::to_vec(&(key, known)).expect("texts and numbers")
}

/// HMAC-SHA256 of `message`, RFC 2104; `key` is no longer than a block.
fn code(key: &[u8], message: &[u8]) -> Digest {
    let pad = |byte: u8| {
        let mut block = [byte; BLOCK_LEN];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let hash = |start: [u8; BLOCK_LEN], rest: &[u8]| {
        let mut hasher = DigestHasher::default();
        hasher.update(&start);
        hasher.update(rest);
        hasher.finish()
    };
    hash(pad(0x5c), hash(pad(0x36), message).as_bytes())
}

/// A regular file of at most `len_max` bytes.
fn read_bounded(path: &Path, len_max: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(len_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > len_max { Err(io::Error::other("too long")) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use format_spec::{IndexLocation, LazyLayer};

    use super::*;

    fn known() -> Known {
        let index = IndexLocation { offset: 1, compressed_len: 2, plain_len: 3, digest: Digest::of(b"index") };
        let layer = LazyLayer { blob: Digest::of(b"blob"), blob_len: 4, index, hot_len: 0 };
        Known { layer, repositories: vec!["registry.example/lazy".to_owned()] }
    }

    fn key(options: &str) -> ConversionKey {
        ConversionKey { source: Digest::of(b"source"), diff_id: Digest::of(b"tar"), options: options.to_owned() }
    }

    #[test]
    fn the_code_is_that_of_the_standard() {
        // RFC 4231 4.2.
        let expected = "sha256:b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7";
        assert_eq!(code(&[0x0b; 20], b"Hi There").to_string(), expected);
    }

    #[test]
    fn only_entries_of_this_user_are_believed() {
        let directory = tempfile::tempdir().unwrap();
        let cache = |name: &str| CacheDirectory::new(directory.path().join(name));
        let (ours, theirs) = (cache("ours"), cache("theirs"));
        assert_eq!(ours.read(&key("a")), None);
        ours.write(&key("a"), &known()).unwrap();
        assert_eq!((ours.read(&key("a")), ours.read(&key("b"))), (Some(known()), None));

        // An entry made with another key; one with another content; one for another layer; damage.
        theirs.write(&key("b"), &known()).unwrap();
        fs::copy(theirs.entry_path(&key("b")), ours.entry_path(&key("b"))).unwrap();
        assert_eq!(ours.read(&key("b")), None);
        let text = fs::read_to_string(ours.entry_path(&key("a"))).unwrap();
        let path = ours.entry_path(&key("c"));
        for changed in [text.replace("lazy", "evil"), text.clone(), "{".to_owned(), " ".repeat(100_000)] {
            fs::write(&path, changed).unwrap();
            assert_eq!(ours.read(&key("c")), None);
        }
        fs::write(ours.entry_path(&key("a")), text.replace("lazy", "evil")).unwrap();
        assert_eq!(ours.read(&key("a")), None);
        fs::write(ours.entry_path(&key("a")), text).unwrap();
        assert_eq!(ours.read(&key("a")), Some(known()));

        // A key that others can read is no secret.
        let path = directory.path().join("ours").join(KEY_NAME);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(ours.read(&key("a")), None);
        assert!(ours.write(&key("a"), &known()).is_err());
    }
}
