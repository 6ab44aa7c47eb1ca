//! Profiles: what starts of an image were seen to read, as text and back (`docs/PROFILE.md`).
//!
//! They are no part of the layer format. Whoever records a start, converts an image or fetches ahead reads them; what
//! is made of one is theirs.

use std::{collections::HashMap, fmt::Write as _, ops::Range};

use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::json;

use crate::Digest;

/// The version of the document that this reads.
const VERSION: u32 = 1;

/// Files in the order of first access, with what was read of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    #[serde(rename = "version", deserialize_with = "known_version")]
    _version: u32,
    #[serde(default)]
    origin: Option<Origin>,
    files: Vec<ProfileFile>,
}

/// The start that a node has recorded by itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The repository of its image, with the host.
    pub repository: String,
    /// The tree of its layers, as nodes name it.
    pub tree: Digest,
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
    /// A profile of files in the order of their first access, with the bytes that were read of each.
    pub fn of_files(files: impl IntoIterator<Item = (Vec<u8>, Vec<Range<u64>>)>) -> Self {
        let files = files.into_iter().map(|(path, ranges)| ProfileFile { path, ranges: Some(joined(ranges)) });
        Self { _version: VERSION, origin: None, files: files.collect() }
    }

    /// The start that it is of, if a node has recorded it.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The same files, as those of another start.
    pub fn with_origin(self, origin: Option<Origin>) -> Self {
        Self { origin, ..self }
    }

    /// The files in order, each with the bytes that were read of it; without them, all of it was.
    pub fn files(&self) -> impl Iterator<Item = (&[u8], Option<&[Range<u64>]>)> {
        self.files.iter().map(|file| (file.path.as_slice(), file.ranges.as_deref()))
    }

    /// All that any of `profiles` has. A file stands where the profile that has it first of all has it, by the share of its
    /// files before it.
    pub fn merge(profiles: &[Self]) -> Self {
        let mut places: HashMap<&[u8], (f64, ProfileFile)> = HashMap::new();
        for profile in profiles {
            let count = profile.files.len().max(1) as f64;
            for (number, file) in profile.files.iter().enumerate() {
                let place = number as f64 / count;
                let (first, known) = places.entry(&file.path).or_insert_with(|| (place, file.clone()));
                *first = first.min(place);
                known.add(file);
            }
        }
        let mut files: Vec<_> = places.into_values().collect();
        files.sort_by(|(place, file), (other, that)| place.total_cmp(other).then_with(|| file.path.cmp(&that.path)));
        Self { _version: VERSION, origin: None, files: files.into_iter().map(|(_, file)| file).collect() }
    }

    /// Its files in their order, and behind them those that only `later` has; of files that both have, what either has.
    pub fn followed_by(mut self, later: &Self) -> Self {
        let mut places = HashMap::new();
        for (number, file) in self.files.iter().enumerate() {
            places.entry(file.path.clone()).or_insert(number);
        }
        for file in &later.files {
            let known = places.get(&file.path).and_then(|number| self.files.get_mut(*number));
            match known {
                Some(known) => known.add(file),
                None => {
                    places.insert(file.path.clone(), self.files.len());
                    self.files.push(file.clone());
                }
            }
        }
        self
    }

    /// The files whose path is one that `is_kept`, in their order.
    pub fn filtered(mut self, is_kept: impl Fn(&[u8]) -> bool) -> Self {
        self.files.retain(|file| is_kept(&file.path));
        self
    }

    /// Bytes of all its ranges; files without any count nothing.
    pub fn ranges_len(&self) -> u64 {
        let ranges = self.files.iter().filter_map(|file| file.ranges.as_deref()).flatten();
        ranges.fold(0, |len, range| len.saturating_add(range.end - range.start))
    }

    /// The document, as [`Self::parse`] reads it: a line a file.
    pub fn to_json(&self) -> String {
        self.to_json_within(usize::MAX)
    }

    /// The document with as many of its first files as fit into so many bytes. It takes no more memory than that, and that of
    /// one line.
    pub fn to_json_within(&self, len_max: usize) -> String {
        const END: &str = "\n  ]\n}";
        let origin = self.origin.as_ref().map(|origin| format!("\n  \"origin\": {},", json!(origin)));
        let origin = origin.unwrap_or_default();
        let mut text = format!("{{\n  \"version\": {VERSION},{origin}\n  \"files\": [\n");
        for (number, file) in self.files.iter().enumerate() {
            let separator = if number == 0 { "" } else { ",\n" };
            let line = file.line();
            if text.len() + separator.len() + line.len() + END.len() > len_max {
                break;
            }
            text.push_str(separator);
            text.push_str(&line);
        }
        text.push_str(END);
        text
    }

    /// Reads a profile.
    ///
    /// # Errors
    ///
    /// When it is no JSON, or not of the form that `docs/PROFILE.md` describes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl ProfileFile {
    /// Its line of the document.
    fn line(&self) -> String {
        let mut line = format!("    {{\"path\":{}", json!(encoded(&self.path)));
        if let Some(ranges) = &self.ranges {
            line.push_str(",\"ranges\":[");
            for (number, range) in ranges.iter().enumerate() {
                let separator = if number == 0 { "" } else { "," };
                // Writing to a string does not fail.
                _ = write!(line, "{separator}[{},{}]", range.start, range.end);
            }
            line.push(']');
        }
        line.push('}');
        line
    }

    /// Adds what was read of the same file.
    fn add(&mut self, more: &Self) {
        self.ranges = match (self.ranges.take(), &more.ranges) {
            (Some(known), Some(more)) => Some(joined(known.into_iter().chain(more.iter().cloned()).collect())),
            _ => None,
        };
    }
}

/// Ranges that ascend and do not touch each other.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// A path as text: what is no UTF-8 as `%` and two hex digits, and so is `%` itself.
fn encoded(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        text.push_str(&chunk.valid().replace('%', "%25"));
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// The path of a text that [`encoded`] may have made; `None` where a `%` has no two hex digits behind it.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut path = Vec::with_capacity(text.len());
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    while let Some(byte) = bytes.next() {
        path.push(match byte {
            b'%' => digit(bytes.next()?)? * 16 + digit(bytes.next()?)?,
            _ => byte,
        });
    }
    Some(path)
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
    decoded(&text)
        .ok_or_else(|| D::Error::custom(format!("path {text:?} has a % without two hex digits: write %25 for %")))
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
    use super::*;

    #[test]
    fn a_profile_that_was_written_reads_the_same() {
        let files =
            [(b"/a %\xff/\"x".to_vec(), vec![8192..9000, 0..4096, 4096..5000]), (b"/b".to_vec(), vec![1..2, 5..6])];
        let profile = Profile::of_files(files);
        assert_eq!(Profile::parse(profile.to_json().as_bytes()).unwrap(), profile);
        let read: Vec<_> = profile.files().map(|(path, ranges)| (path.to_vec(), ranges.unwrap().to_vec())).collect();
        assert_eq!(read, [(b"/a %\xff/\"x".to_vec(), vec![0..5000, 8192..9000]), (b"/b".to_vec(), vec![1..2, 5..6])]);
    }

    #[test]
    fn a_merged_profile_has_what_any_has_first_what_is_first() {
        let profile =
            |text: &str| Profile::parse(format!("{{\"version\": 1, \"files\": [{text}]}}").as_bytes()).unwrap();
        let one =
            profile(r#"{"path": "/a", "ranges": [[0, 10]]}, {"path": "/b", "ranges": [[0, 10]]}, {"path": "/c"}"#);
        let other = profile(r#"{"path": "/c", "ranges": [[5, 6]]}, {"path": "/b", "ranges": [[10, 20], [30, 40]]}"#);
        let merged = Profile::merge(&[one, other]);
        let expected = profile(
            r#"{"path": "/a", "ranges": [[0, 10]]}, {"path": "/c"}, {"path": "/b", "ranges": [[0, 20], [30, 40]]}"#,
        );
        assert_eq!(merged, expected);
    }

    #[test]
    fn a_node_says_where_it_recorded_and_later_files_come_behind() {
        let file = |path: &str, range: Range<u64>| (path.as_bytes().to_vec(), vec![range]);
        let origin = Origin { repository: "host:5000/team/app".to_owned(), tree: Digest::of(b"tree") };
        let early = Profile::of_files([file("/b", 0..10), file("/a", 0..10)]).with_origin(Some(origin.clone()));
        assert_eq!(Profile::parse(early.to_json().as_bytes()).unwrap(), early);
        let both = early.followed_by(&Profile::of_files([file("/c", 0..5), file("/a", 5..20)]));
        let expected = Profile::of_files([file("/b", 0..10), file("/a", 0..20), file("/c", 0..5)]);
        assert_eq!(both, expected.clone().with_origin(Some(origin)));
        assert_eq!(both.ranges_len(), 35);
        let kept = both.with_origin(None).filtered(|path| path != b"/b");
        assert_eq!(kept, Profile::of_files([file("/a", 0..20), file("/c", 0..5)]));
    }

    #[test]
    fn a_document_that_may_not_be_so_long_has_fewer_files() {
        let files = ["/a", "/b", "/c"].map(|path| (path.as_bytes().to_vec(), vec![0..10, 20..30]));
        let first = |count| Profile::of_files(files.iter().take(count).cloned());
        let (whole, shorter) = (first(3).to_json(), first(2).to_json());
        assert!(whole.contains("\n    {\"path\":\"/b\",\"ranges\":[[0,10],[20,30]]},\n"), "{whole}");
        assert_eq!(first(3).to_json_within(whole.len()), whole);
        assert_eq!(first(3).to_json_within(whole.len() - 1), shorter);
        assert_eq!(first(3).to_json_within(shorter.len()), shorter);
        assert_eq!(first(3).to_json_within(0), first(0).to_json());
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
