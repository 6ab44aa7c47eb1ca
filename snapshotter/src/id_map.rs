//! User namespaces: what a snapshot's labels say of whom its files shall belong to, pure.
//!
//! A container of a user namespace sees its files through id-mapped mounts. containerd makes them of the
//! mounts that it is given, by the options `uidmap` and `gidmap`; nothing is copied or changed on disk. It
//! asks for that by two labels when it is told that the snapshotter has the capability `remap-ids`.

use crate::metadata::Labels;

/// Which users of the container are which of the host: `CONTAINER:HOST:COUNT`, several with commas between.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// The same for groups.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The mappings of a snapshot whose files are shown with other owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    options: [String; 2],
    /// User and group of the host that the container's root is.
    pub root: (u32, u32),
}

/// A mapping is none, or maps no root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("label {label}={value:?}: {problem}")]
pub struct IdMapError {
    label: &'static str,
    value: String,
    problem: &'static str,
}

impl IdMap {
    /// What the labels say, `None` when they say nothing.
    ///
    /// # Errors
    ///
    /// When only one of the two is there, or one is malformed or leaves root out.
    pub fn from_labels(labels: &Labels) -> Result<Option<Self>, IdMapError> {
        if !labels.contains_key(UID_MAPPING) && !labels.contains_key(GID_MAPPING) {
            return Ok(None);
        }
        let value = |label: &'static str| labels.get(label).map(String::as_str).unwrap_or_default();
        let (users, groups) = (value(UID_MAPPING), value(GID_MAPPING));
        let root = (root_of(UID_MAPPING, users)?, root_of(GID_MAPPING, groups)?);
        Ok(Some(Self { options: [format!("uidmap={users}"), format!("gidmap={groups}")], root }))
    }

    /// The mount options that say so to containerd.
    pub fn options(&self) -> &[String] {
        &self.options
    }
}

/// The id of the host that 0 is mapped to.
fn root_of(label: &'static str, value: &str) -> Result<u32, IdMapError> {
    let refuse = |problem| IdMapError { label, value: value.to_owned(), problem };
    let mut root = None;
    for mapping in value.split(',') {
        let numbers: Result<Vec<u32>, _> = mapping.split(':').map(str::parse).collect();
        let Ok([container, host, count]) = numbers.as_deref() else {
            return Err(refuse("expected CONTAINER:HOST:COUNT, several with commas between"));
        };
        if *count > 0 && *container == 0 {
            root = Some(*host);
        }
    }
    root.ok_or_else(|| refuse("root of the container is not mapped"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(users: Option<&str>, groups: Option<&str>) -> Result<Option<IdMap>, String> {
        let pairs = [(UID_MAPPING, users), (GID_MAPPING, groups)];
        let labels = pairs.into_iter().filter_map(|(label, value)| Some((label.to_owned(), value?.to_owned())));
        IdMap::from_labels(&labels.collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn labels_become_mount_options_and_the_owner_of_the_root_directory() {
        let map = parse(Some("0:100000:65536"), Some("1:5:1,0:200000:65536")).unwrap().unwrap();
        assert_eq!(map.options(), ["uidmap=0:100000:65536", "gidmap=1:5:1,0:200000:65536"]);
        assert_eq!(map.root, (100_000, 200_000));
        assert_eq!(parse(None, None), Ok(None));
    }

    #[test]
    fn refuses_mappings_that_cannot_be_used() {
        let good = Some("0:1:1");
        for users in [None, Some(""), Some("0:1"), Some("0:1:1:1"), Some("0:-1:1"), Some("1:1:1"), Some("0:1:0")] {
            assert!(parse(users, good).is_err() && parse(good, users).is_err(), "{users:?}");
        }
        // It would add options of its own to the mount.
        assert!(parse(Some("0:1:1,upperdir=/etc"), good).is_err());
    }
}
