//! The starts that a node has recorded by itself, as they lie below its root.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use control::{
    repository_of,
    root::{STARTS, record_of_starts},
};
use format_spec::profile::Profile;

/// The record of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeRecord {
    /// With the host.
    pub(crate) repository: String,
    /// The files that starts of its images read.
    pub(crate) profile: Profile,
    /// Time since the last of these starts.
    pub(crate) age: Duration,
}

/// Records of starts cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeRecordError {
    /// There is none.
    #[error("{repository}: no start of it is recorded in {}; `lazuli profile node` lists those that are", root.display())]
    None {
        /// The repository.
        repository: String,
        /// The root of the node.
        root: PathBuf,
    },
    /// The disk refuses.
    #[error("{}: {error}", path.display())]
    Disk {
        /// A file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It is not what a node writes.
    #[error("{}: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        problem: String,
    },
}

/// The record of the repository that `named` is, or is an image of.
///
/// # Errors
///
/// When there is none, or it cannot be read.
pub(crate) fn node_record(root: &Path, named: &str) -> Result<NodeRecord, NodeRecordError> {
    let repository = repository_of(named);
    let none = || NodeRecordError::None { repository: repository.to_owned(), root: root.to_owned() };
    read(&root.join(record_of_starts(repository)))?.ok_or_else(none)
}

/// All records and those that cannot be read, each sorted by name; none on a node that has recorded nothing.
///
/// # Errors
///
/// When the directory cannot be listed.
pub(crate) fn node_records(root: &Path) -> Result<(Vec<NodeRecord>, Vec<NodeRecordError>), NodeRecordError> {
    let directory = root.join(STARTS);
    let failed = |error| NodeRecordError::Disk { path: directory.clone(), error };
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        entries => entries.map_err(failed)?,
    };
    let (mut records, mut damaged) = (Vec::new(), Vec::new());
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    paths.sort_unstable();
    for path in paths {
        match read(&path) {
            Ok(record) => records.extend(record),
            Err(error) => damaged.push(error),
        }
    }
    records.sort_by(|one, other| one.repository.cmp(&other.repository));
    Ok((records, damaged))
}

/// Reads a record; `None` if there is none, or no longer.
fn read(path: &Path) -> Result<Option<NodeRecord>, NodeRecordError> {
    let failed = |error| NodeRecordError::Disk { path: path.to_owned(), error };
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes.map_err(failed)?,
    };
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified()).map_err(failed)?;
    let age = SystemTime::now().duration_since(modified).unwrap_or_default();
    let damaged = |problem| NodeRecordError::Damaged { path: path.to_owned(), problem };
    let profile = Profile::parse(&bytes).map_err(|error| damaged(error.to_string()))?;
    let repository = profile.origin().map(|origin| origin.repository.clone());
    let repository = repository.ok_or_else(|| damaged("it does not say of which repository it is".to_owned()))?;
    Ok(Some(NodeRecord { repository, profile: profile.with_origin(None), age }))
}

#[cfg(test)]
mod tests {
    use format_spec::{Digest, profile::Origin};

    use super::*;

    #[test]
    fn records_are_found_by_repository_or_image_and_a_damaged_one_hides_no_other() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(node_records(root.path()).unwrap().0, []);
        fs::create_dir(root.path().join(STARTS)).unwrap();
        let files = || Profile::of_files([(b"/a".to_vec(), vec![std::ops::Range { start: 0, end: 10 }])]);
        for repository in ["host:5000/team/app", "docker.io/library/debian"] {
            let origin = Origin { repository: repository.to_owned(), tree: Digest::of(b"tree") };
            fs::write(root.path().join(record_of_starts(repository)), files().with_origin(Some(origin)).to_json())
                .unwrap();
        }
        fs::write(root.path().join(record_of_starts("broken")), "{").unwrap();
        for named in ["host:5000/team/app", "host:5000/team/app:1.4", "host:5000/team/app@sha256:00"] {
            assert_eq!(node_record(root.path(), named).unwrap().profile, files(), "{named}");
        }
        let none = node_record(root.path(), "host:5000/team/other:1").unwrap_err().to_string();
        assert!(none.starts_with("host:5000/team/other: no start of it is recorded in /"), "{none}");
        let (records, damaged) = node_records(root.path()).unwrap();
        let names: Vec<_> = records.iter().map(|record| record.repository.as_str()).collect();
        assert_eq!((names, damaged.len()), (vec!["docker.io/library/debian", "host:5000/team/app"], 1));
    }
}
