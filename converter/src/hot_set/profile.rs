//! A recorded profile: what starts of an image were seen to read (`docs/PROFILE.md`).

use std::ops::Range;

use format_spec::{Index, Inode, records::hot_reason};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer, de::Error};

use super::{HotRange, HotSet, files};

/// The version of the document that this reads.
const VERSION: u32 = 1;

/// Files in the order of first access, with what was read of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    #[serde(rename = "version", deserialize_with = "known_version")]
    _version: u32,
    files: Vec<ProfileFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    #[serde(deserialize_with = "absolute_path")]
    path: Vec<u8>,
    /// Bytes that were read; without them, all of the file.
    #[serde(default, deserialize_with = "byte_ranges")]
    ranges: Option<Vec<Range<u64>>>,
}

/// A profile is no document as `docs/PROFILE.md` describes it; the message ends with line and column.
#[derive(Debug, thiserror::Error)]
#[error("profile: {0}")]
pub struct ProfileError(#[from] serde_json::Error);

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    ///
    /// When it is no JSON, or not of the form that `docs/PROFILE.md` describes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// What the profile names, as far as the image has it; ranges of one file follow each other.
    pub fn hot_set<B: AsRef<[u8]>>(&self, tree: &Index<B>) -> Vec<HotRange> {
        let mut hot = HotSet::default();
        for file in &self.files {
            let Some((number, inode)) = file.find(tree) else { continue };
            let size = inode.size.get();
            let ranges = file.ranges.clone().unwrap_or_else(|| vec![Range { start: 0, end: size }]);
            hot.add(number, size, ranges, hot_reason::PROFILE);
        }
        hot.finish()
    }

    /// How many of its files the image does not have: it may be a profile of another version.
    pub fn unknown_count<B: AsRef<[u8]>>(&self, tree: &Index<B>) -> usize {
        self.files.iter().filter(|file| file.find(tree).is_none()).count()
    }
}

impl ProfileFile {
    fn find<'t, B: AsRef<[u8]>>(&self, tree: &'t Index<B>) -> Option<(u32, &'t Inode)> {
        let number = files::find(tree, &self.path)?.inode;
        tree.inode(number).filter(|inode| inode.is_regular()).map(|inode| (number, inode))
    }
}

fn known_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let version = u32::deserialize(deserializer)?;
    if version != VERSION {
        return Err(D::Error::custom(format!("version {version} is not known, expected {VERSION}: record it again")));
    }
    Ok(version)
}

fn absolute_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if !text.starts_with('/') {
        return Err(D::Error::custom(format!("path {text:?} is not absolute")));
    }
    let is_hex = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_hexdigit);
    let mut parts = text.as_bytes().split(|byte| *byte == b'%').skip(1);
    if !parts.all(|part| is_hex(part.first()) && is_hex(part.get(1))) {
        return Err(D::Error::custom(format!("path {text:?} has a % without two hex digits: write %25 for %")));
    }
    Ok(percent_decode_str(&text).collect())
}

fn byte_ranges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Range<u64>>>, D::Error> {
    let pairs = Vec::<(u64, u64)>::deserialize(deserializer)?;
    let mut ranges = Vec::with_capacity(pairs.len());
    for (start, end) in pairs {
        if start >= end {
            return Err(D::Error::custom(format!("range [{start}, {end}] is empty")));
        }
        ranges.push(start..end);
    }
    Ok(Some(ranges))
}

#[cfg(test)]
mod tests {
    use super::{super::test_image::TestImage, *};

    fn hot(image: &TestImage, profile: &str) -> Vec<(String, Range<u64>)> {
        let profile = Profile::parse(profile.as_bytes()).unwrap();
        let ranges = profile.hot_set(&image.tree());
        ranges.into_iter().map(|hot| (image.path(hot.inode), hot.range)).collect()
    }

    #[test]
    fn files_keep_their_order_and_ranges_become_blocks() {
        let image = TestImage::new().file("/a", [0; 100_000]).file("/b", [0; 10]).symlink("/c", "b");
        let profile =
            r#"{"version": 1, "files": [{"path": "/c"}, {"path": "/a", "ranges": [[90000, 95000], [1, 2]]}]}"#;
        let expected = [("/b".to_owned(), 0..10), ("/a".to_owned(), 0..4096), ("/a".to_owned(), 86_016..98_304)];
        assert_eq!(hot(&image, profile), expected);
    }

    #[test]
    fn names_that_are_no_text_are_percent_encoded() {
        let image = TestImage::new().file(b"/\xff%".as_slice(), b"x");
        let profile = r#"{"version": 1, "files": [{"path": "/%ff%25"}]}"#;
        assert_eq!(hot(&image, profile).len(), 1);
    }

    #[test]
    fn files_that_the_image_has_not_are_counted() {
        let image = TestImage::new().file("/d/a", b"x");
        let profile = r#"{"version": 1, "files": [{"path": "/b"}, {"path": "/d"}, {"path": "/d/a"}]}"#;
        assert_eq!(hot(&image, profile), [("/d/a".to_owned(), 0..1)]);
        assert_eq!(Profile::parse(profile.as_bytes()).unwrap().unknown_count(&image.tree()), 2);
    }

    #[test]
    fn ranges_behind_the_end_of_a_file_are_cut() {
        let image = TestImage::new().file("/a", [0; 5000]);
        let ranges = format!(r#"[[4999, {}], [8192, 9000]]"#, u64::MAX);
        let profile = format!(r#"{{"version": 1, "files": [{{"path": "/a", "ranges": {ranges}}}]}}"#);
        assert_eq!(hot(&image, &profile), [("/a".to_owned(), 4096..5000)]);
    }

    #[test]
    fn errors_say_what_and_where() {
        let error = |profile: &str| Profile::parse(profile.as_bytes()).unwrap_err().to_string();
        let in_files = |file: &str| error(&format!("{{\"version\": 1,\n \"files\": [{file}]}}"));
        assert_eq!(
            error(r#"{"version": 2, "files": []}"#),
            "profile: version 2 is not known, expected 1: record it again at line 1 column 13"
        );
        assert_eq!(in_files(r#"{"path": "a"}"#), "profile: path \"a\" is not absolute at line 2 column 24");
        assert_eq!(
            in_files(r#"{"path": "/%2"}"#),
            "profile: path \"/%2\" has a % without two hex digits: write %25 for % at line 2 column 26"
        );
        assert_eq!(
            in_files(r#"{"path": "/a", "ranges": [[2, 2]]}"#),
            "profile: range [2, 2] is empty at line 2 column 45"
        );
        assert!(error(r#"{"version": 1, "files": [], "more": 1}"#).contains("unknown field `more`"));
        assert!(error("{").contains("line 1 column 1"));
    }
}
