//! Records of starts on disk: for each repository a profile (`docs/PROFILE.md`) of what its last starts read.
//!
//! A record has its name when all of it is written, and nothing is made durable: one that a machine loses as it goes down
//! costs the next start its help and nothing else.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::SystemTime,
};

use control::root::{STARTS, record_of_starts};
use format_spec::profile::{Origin, Profile};
use storage::create_private_directory;
use tracing::{debug, warn};

use crate::sync::lock;

/// Repositories with a record.
const RECORD_COUNT_MAX: usize = 256;
/// Bytes of all records: those of 32 starts as large as can be.
const RECORDS_LEN_MAX: u64 = 32 << 20;
/// Bytes of one: a line of a file has some hundred, so these are the files of a large start.
pub(super) const RECORD_LEN_MAX: usize = 1 << 20;
/// A record says within so many bytes whose it is: the names of host and repository are far shorter.
const HEAD_LEN: u64 = 8 << 10;
/// A cold start takes the place of what is known if it read at least this share of it: one that failed did not.
const REPLACING_SHARE: u64 = 4;
/// Length of a record's name.
const NAME_LEN: usize = 64;

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Records {
    root: PathBuf,
    /// Held while a record is read, put together with a start and written.
    writing: Mutex<()>,
}

impl Records {
    /// Opens the directory below `root`, making it if needed.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let records = Self { root: root.to_owned(), writing: Mutex::default() };
        create_private_directory(&records.directory())?;
        for entry in fs::read_dir(records.directory())? {
            let entry = entry?;
            // A write that was broken off.
            if !is_name(&entry) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(records)
    }

    /// The directory.
    pub(crate) fn directory(&self) -> PathBuf {
        self.root.join(STARTS)
    }

    /// The record of a repository; one that is damaged is none.
    pub(crate) fn load(&self, repository: &str) -> Option<Profile> {
        let path = self.root.join(record_of_starts(repository));
        match read(&path, repository) {
            Ok(record) => record,
            Err(error) => {
                warn!(path = %path.display(), error, "record of a start ignored");
                None
            }
        }
    }

    /// Keeps what a start read, which says where it is from; `was_cold` says that all of it was seen, `has_file` which
    /// paths its tree has.
    ///
    /// # Errors
    ///
    /// When the disk refuses.
    pub(crate) fn keep(&self, start: Profile, was_cold: bool, has_file: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        let Some(repository) = start.origin().map(|origin| origin.repository.clone()) else { return Ok(()) };
        let _writing = lock(&self.writing);
        let record = with_start(self.load(&repository), start, was_cold, has_file);
        let text = record.to_json_within(RECORD_LEN_MAX);
        let path = self.root.join(record_of_starts(&repository));
        // Somebody may have removed all records.
        create_private_directory(&self.directory())?;
        let mut file = tempfile::NamedTempFile::new_in(self.directory())?;
        file.write_all(text.as_bytes())?;
        file.persist(&path).map_err(|error| error.error)?;
        debug!(repository, bytes = text.len(), "record of a start written");
        self.remove_oldest(RECORD_COUNT_MAX, RECORDS_LEN_MAX)
    }

    /// Removes records until so many are left: the oldest one of the owner who holds most, of those who hold as much the one
    /// with the oldest record. So who has many goes before who has few, whenever they came.
    fn remove_oldest(&self, count_max: usize, len_max: u64) -> io::Result<()> {
        let mut records = Vec::new();
        for entry in fs::read_dir(self.directory())? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            records.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), entry.path()));
        }
        let len: u64 = records.iter().fold(0, |len, (_, more, _)| len.saturating_add(*more));
        if records.len() <= count_max && len <= len_max {
            return Ok(());
        }
        records.sort_unstable();
        let mut owners: HashMap<String, Held> = HashMap::new();
        for (modified, len, path) in records {
            owners.entry(owner_of_record(&path)).or_default().records.push_back((modified, len, path));
        }
        loop {
            let count: usize = owners.values().map(|held| held.records.len()).sum();
            let is_too_long = owners.values().fold(0, |len, held| held.len().saturating_add(len)) > len_max;
            let most = match (count > count_max, is_too_long) {
                (true, _) => owners.values_mut().max_by_key(|held| (held.records.len(), held.age())),
                (false, true) => owners.values_mut().max_by_key(|held| (held.len(), held.age())),
                (false, false) => return Ok(()),
            };
            let Some((.., path)) = most.and_then(|held| held.records.pop_front()) else { return Ok(()) };
            fs::remove_file(path)?;
        }
    }
}

/// The records of one owner, oldest first: when they were written, their lengths and paths.
#[derive(Debug, Default)]
struct Held {
    records: VecDeque<(SystemTime, u64, PathBuf)>,
}

impl Held {
    fn len(&self) -> u64 {
        self.records.iter().fold(0, |len, (_, more, _)| len.saturating_add(*more))
    }

    /// Greater the older its oldest record is; nobody's is none.
    fn age(&self) -> Option<Reverse<SystemTime>> {
        self.records.front().map(|(modified, ..)| Reverse(*modified))
    }
}

/// The registry host and the first part of the repository's path: whoever pushes there has all of that, as a rule. Damaged
/// records have one owner together.
fn owner_of_record(path: &Path) -> String {
    let mut head = Vec::new();
    // Whatever cannot be read tells nothing.
    _ = File::open(path).and_then(|file| file.take(HEAD_LEN).read_to_end(&mut head));
    let line = head.split(|byte| *byte == b'\n').find_map(|line| line.trim_ascii().strip_prefix(b"\"origin\":"));
    let origin = line.and_then(|line| serde_json::from_slice::<Origin>(line.strip_suffix(b",")?).ok());
    let repository = origin.map(|origin| origin.repository).unwrap_or_default();
    repository.split('/').take(2).collect::<Vec<_>>().join("/")
}

fn is_name(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    name.len() == NAME_LEN && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit)
}

/// Reads a record; `None` if there is none.
fn read(path: &Path, repository: &str) -> Result<Option<Profile>, String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|error| error.to_string())?,
    };
    let mut bytes = Vec::new();
    file.take(RECORD_LEN_MAX as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() > RECORD_LEN_MAX {
        return Err(format!("it has more than {RECORD_LEN_MAX} bytes"));
    }
    let record = Profile::parse(&bytes).map_err(|error| error.to_string())?;
    match record.origin() {
        Some(origin) if origin.repository == repository => Ok(Some(record)),
        _ => Err("it is of another repository".to_owned()),
    }
}

/// The record of a repository after a start; `known` is the one before it.
///
/// Of a tree that was started before a start only adds: much of it may be in page caches, which tell nothing. A start of
/// another tree takes the place of the record if all that it read was seen. Else it adds to it, and files that the tree
/// has not are left out: so no record grows with the versions of an image.
fn with_start(known: Option<Profile>, start: Profile, was_cold: bool, has_file: impl Fn(&[u8]) -> bool) -> Profile {
    let Some(known) = known else { return start };
    let tree_of = |profile: &Profile| profile.origin().map(|origin| origin.tree);
    if tree_of(&known) == tree_of(&start) {
        return known.followed_by(&start);
    }
    let known = known.filtered(has_file);
    if was_cold && start.ranges_len() >= known.ranges_len() / REPLACING_SHARE {
        return start;
    }
    let origin = start.origin().cloned();
    known.followed_by(&start).with_origin(origin)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use format_spec::Digest;

    use super::*;

    fn start(repository: &str, tree: &[u8], files: &[(&str, u64)]) -> Profile {
        let files =
            files.iter().map(|(path, len)| (path.as_bytes().to_vec(), vec![std::ops::Range { start: 0, end: *len }]));
        Profile::of_files(files).with_origin(Some(Origin { repository: repository.to_owned(), tree: Digest::of(tree) }))
    }

    fn has_all(_: &[u8]) -> bool {
        true
    }

    #[test]
    fn a_start_that_was_not_seen_whole_only_adds_to_the_record() {
        let known = || Some(start("host/app", b"1", &[("/a", 100), ("/gone", 100)]));
        let again = start("host/app", b"1", &[("/b", 10)]);
        for was_cold in [false, true] {
            let record = with_start(known(), again.clone(), was_cold, has_all);
            assert_eq!(record, start("host/app", b"1", &[("/a", 100), ("/gone", 100), ("/b", 10)]));
        }
        let next = start("host/app", b"2", &[("/b", 50), ("/a", 10)]);
        let has_file = |path: &[u8]| path != b"/gone";
        assert_eq!(with_start(known(), next.clone(), true, has_file), next);
        let warm = with_start(known(), next.clone(), false, has_file);
        assert_eq!(warm, start("host/app", b"2", &[("/a", 100), ("/b", 50)]));
        let failed = start("host/app", b"2", &[("/b", 1)]);
        let record = with_start(known(), failed, true, has_file);
        assert_eq!(record, start("host/app", b"2", &[("/a", 100), ("/b", 1)]), "a start that failed replaces nothing");
        assert_eq!(with_start(None, next.clone(), false, has_all), next);
    }

    #[test]
    fn records_are_by_repository_and_a_damaged_one_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let (one, other) = (start("host/app", b"1", &[("/a", 1)]), start("other/app", b"1", &[("/b", 1)]));
        for start in [&one, &other] {
            records.keep(start.clone(), true, has_all).unwrap();
        }
        assert_eq!(
            [records.load("host/app"), records.load("other/app"), records.load("host")],
            [Some(one), Some(other), None]
        );
        let path = |repository| directory.path().join(record_of_starts(repository));
        fs::copy(path("host/app"), path("other/app")).unwrap();
        assert_eq!(records.load("other/app"), None, "it says whose it is");
        let whole = fs::read(path("host/app")).unwrap();
        for len in 0..whole.len() {
            fs::write(path("host/app"), &whole[..len]).unwrap();
            assert_eq!(records.load("host/app"), None, "{len} bytes of it");
        }
        File::create(path("host/app")).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(records.load("host/app"), None, "of a terabyte little is read");
        let start = start("host/app", b"1", &[("/a", 1)]);
        records.keep(start.clone(), true, has_all).unwrap();
        assert_eq!(records.load("host/app"), Some(start), "a damaged one is replaced");
    }

    #[test]
    fn the_oldest_records_go_first_and_so_do_broken_writes() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let names: Vec<_> = (0..5).map(|number| format!("host/{number}")).collect();
        for (name, hours) in names.iter().zip([3, 1, 5, 2, 4]) {
            records.keep(start(name, b"1", &[("/a", 1)]), true, has_all).unwrap();
            let file = File::open(directory.path().join(record_of_starts(name))).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
        }
        let left = || names.iter().map(|name| records.load(name).is_some()).collect::<Vec<_>>();
        records.remove_oldest(3, u64::MAX).unwrap();
        assert_eq!(left(), [true, true, false, true, false]);
        let len = fs::metadata(directory.path().join(record_of_starts("host/1"))).unwrap().len();
        records.remove_oldest(3, 2 * len).unwrap();
        assert_eq!(left(), [false, true, false, true, false]);
        fs::write(records.directory().join(".tmpx"), "").unwrap();
        Records::open(directory.path()).unwrap();
        assert_eq!(fs::read_dir(records.directory()).unwrap().count(), 2);
    }

    #[test]
    fn owners_of_many_records_lose_theirs_before_others_do() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        // Oldest first.
        let names = ["host/team/app", "other/x", "host/evil/1", "host/evil/2", "host/evil/3", "host/evil/4"];
        for (name, hours) in names.iter().zip([9, 8, 7, 6, 5, 4]) {
            records.keep(start(name, b"1", &[("/a", 1)]), true, has_all).unwrap();
            let file = File::open(directory.path().join(record_of_starts(name))).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
        }
        let left = || names.iter().map(|name| records.load(name).is_some()).collect::<Vec<_>>();
        records.remove_oldest(4, u64::MAX).unwrap();
        assert_eq!(left(), [true, true, false, false, true, true]);
        let len = fs::metadata(directory.path().join(record_of_starts("host/team/app"))).unwrap().len();
        records.remove_oldest(4, 3 * len).unwrap();
        assert_eq!(left(), [true, true, false, false, false, true], "by bytes as by number");
        records.remove_oldest(2, u64::MAX).unwrap();
        assert_eq!(left(), [false, true, false, false, false, true], "the oldest of those who have as many");
    }

    #[test]
    fn no_record_is_longer_than_a_thirty_second_of_all() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let names: Vec<_> = (0..20_000).map(|number| format!("/{number:0100}")).collect();
        let files: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
        records.keep(start("host/app", b"1", &files), true, has_all).unwrap();
        let count = records.load("host/app").unwrap().files().count();
        assert!((7000..9000).contains(&count), "{count} of the first files");
        assert!(fs::metadata(directory.path().join(record_of_starts("host/app"))).unwrap().len() <= 1 << 20);
    }
}
