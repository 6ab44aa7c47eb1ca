//! Two documents beside each other: annotations and other fields are the same on both sides, but for those that a
//! conversion adds and removes. Beside that, bytes of a part that nobody reads.

use std::collections::{BTreeMap, BTreeSet};

use format_spec::{FormatError, Unread};
use serde_json::Value;

use super::report::{Findings, Part};

type Notes = BTreeMap<String, String>;

/// Compares annotations. Those for which `is_stale` say something of bytes that were replaced, and are gone; `added`
/// may be there, whatever the original says there. All others are the same.
pub(super) fn compare_notes(
    place: &str,
    ours: Option<&Notes>,
    theirs: Option<&Notes>,
    is_stale: impl Fn(&str) -> bool,
    added: &[&str],
    findings: &mut Findings,
) {
    let keys: BTreeSet<&String> = ours.into_iter().chain(theirs).flat_map(BTreeMap::keys).collect();
    for key in keys.into_iter().filter(|key| !added.contains(&key.as_str())) {
        let [found, expected] = [ours, theirs].map(|notes| notes.and_then(|notes| notes.get(key)));
        let is_stale = is_stale(key) && expected.is_some();
        if found == expected.filter(|_| !is_stale) {
            continue;
        }
        let describe = |value: Option<&String>| value.map_or("nothing".to_owned(), |value| format!("{value:?}"));
        let problem = match is_stale {
            true => "it describes the original's bytes, which are not those of this image".to_owned(),
            false => format!("it is {}, in the original {}", describe(found), describe(expected)),
        };
        findings.add(Part::Annotation, format!("{place}, annotation {key}"), problem);
    }
}

/// The other fields of a document, like the subject of a manifest: the same on both sides, and nothing more.
pub(super) fn compare_fields(
    place: &str,
    ours: &BTreeMap<String, Value>,
    theirs: &BTreeMap<String, Value>,
    findings: &mut Findings,
) {
    let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    for key in keys {
        let (found, expected) = (ours.get(key), theirs.get(key));
        if found != expected {
            let [found, expected] = [found, expected].map(|value| value.map_or("nothing".to_owned(), Value::to_string));
            let problem = format!("it is {found}, in the original {expected}");
            findings.add(Part::Manifest, format!("{place}, {key}"), problem);
        }
    }
}

/// Bytes that no reader looks at: those that must be 0 are, and what a later version may say cannot be checked.
pub(super) fn note_unread(place: &str, part: Part, unread: Result<Unread, FormatError>, findings: &mut Findings) {
    match unread {
        Err(error) => findings.add(part, place, error),
        Ok(Unread { features, kinds, has_stray_bytes }) => {
            if has_stray_bytes {
                findings.add(part, place, "bytes that must be 0 are not");
            }
            if features != 0 {
                findings.skip(format!("what the unknown features {features:#x} of the {place} mean"));
            }
            if !kinds.is_empty() {
                findings.skip(format!("sections of unknown kinds in the {place}: {kinds:?}"));
            }
        }
    }
}

/// A document has the type that it had, or that which conversion gives it.
pub(super) fn compare_type(
    place: &str,
    ours: &Option<String>,
    theirs: &Option<String>,
    converted: &str,
    findings: &mut Findings,
) {
    if ours != theirs && ours.as_deref() != Some(converted) {
        let problem = format!("it is {ours:?}, in the original {theirs:?}");
        findings.add(Part::Manifest, format!("{place}, mediaType"), problem);
    }
}
