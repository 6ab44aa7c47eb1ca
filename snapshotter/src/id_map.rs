//! User namespaces: what a snapshot's labels say of whom its files shall belong to, pure.
//!
//! A container of a user namespace sees its files through id-mapped mounts (`id_mapped.rs`); nothing is copied or
//! changed on disk. containerd asks for that by two labels when it is told that the snapshotter has the capability
//! `remap-ids`.

use std::fmt::Write as _;

use crate::names::Labels;

/// Which users of the container are which of the host: `CONTAINER:HOST:COUNT`, several with commas between.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// The same for groups.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The mappings of a snapshot whose files are shown with other owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    users: Ranges,
    groups: Ranges,
}

/// A mapping is none, or maps no root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("label {label}={value:?}: {problem}")]
pub struct IdMapError {
    label: &'static str,
    value: String,
    problem: &'static str,
}

/// Ids of the container and ids of the host, root of the container among them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ranges {
    ranges: Vec<Range>,
    /// The id of the host that 0 is.
    root: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    container: u32,
    host: u32,
    count: u32,
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
        let ranges = |label: &'static str| Ranges::parse(label, labels.get(label).map_or("", String::as_str));
        Ok(Some(Self { users: ranges(UID_MAPPING)?, groups: ranges(GID_MAPPING)? }))
    }

    /// User and group of the host that the container's root is.
    pub fn root(&self) -> (u32, u32) {
        (self.users.root, self.groups.root)
    }

    /// User and group of the host that files of `user` and `group` are shown to belong to; `None` where there is none.
    pub fn owner(&self, user: u32, group: u32) -> (Option<u32>, Option<u32>) {
        (self.users.host(user), self.groups.host(group))
    }

    /// What `/proc/PID/uid_map` of a process in the user namespace gets (user_namespaces(7)).
    pub fn user_table(&self) -> String {
        self.users.table()
    }

    /// What `/proc/PID/gid_map` gets.
    pub fn group_table(&self) -> String {
        self.groups.table()
    }
}

impl Ranges {
    fn parse(label: &'static str, value: &str) -> Result<Self, IdMapError> {
        let refuse = |problem| IdMapError { label, value: value.to_owned(), problem };
        let mut ranges = Vec::new();
        for mapping in value.split(',') {
            let numbers: Result<Vec<u32>, _> = mapping.split(':').map(str::parse).collect();
            let Ok(&[container, host, count]) = numbers.as_deref() else {
                return Err(refuse("expected CONTAINER:HOST:COUNT, several with commas between"));
            };
            if count == 0 || container.checked_add(count).is_none() || host.checked_add(count).is_none() {
                return Err(refuse("a range is empty, or goes beyond what ids there are"));
            }
            ranges.push(Range { container, host, count });
        }
        let root = ranges.iter().find_map(|range| range.host(0));
        let root = root.ok_or_else(|| refuse("root of the container is not mapped"))?;
        Ok(Self { ranges, root })
    }

    fn host(&self, id: u32) -> Option<u32> {
        self.ranges.iter().find_map(|range| range.host(id))
    }

    fn table(&self) -> String {
        self.ranges.iter().fold(String::new(), |mut table, Range { container, host, count }| {
            writeln!(table, "{container} {host} {count}").expect("writing to a string does not fail");
            table
        })
    }
}

impl Range {
    fn host(&self, id: u32) -> Option<u32> {
        let distance = id.checked_sub(self.container).filter(|distance| *distance < self.count)?;
        Some(self.host + distance)
    }
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
    fn labels_say_who_is_who() {
        let map = parse(Some("0:100000:65536"), Some("1:5:1,0:200000:1,7:300000:10")).unwrap().unwrap();
        assert_eq!(map.root(), (100_000, 200_000));
        assert_eq!(map.owner(65_535, 16), (Some(165_535), Some(300_009)));
        assert_eq!(map.owner(65_536, 17), (None, None));
        assert_eq!(
            (map.user_table().as_str(), map.group_table().as_str()),
            ("0 100000 65536\n", "1 5 1\n0 200000 1\n7 300000 10\n")
        );
        assert_eq!(parse(None, None), Ok(None));
    }

    #[test]
    fn refuses_mappings_that_cannot_be_used() {
        let good = Some("0:1:1");
        let bad = ["", "0:1", "0:1:1:1", "0:-1:1", "1:1:1", "0:1:0", "0:1:4294967295", "0:1:1,upperdir=/etc"];
        for users in [None].into_iter().chain(bad.map(Some)) {
            assert!(parse(users, good).is_err() && parse(good, users).is_err(), "{users:?}");
        }
    }
}
