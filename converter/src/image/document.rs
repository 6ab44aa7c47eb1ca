//! Documents of strangers: JSON that says the same to everybody who reads it.
//!
//! Go's reader takes keys without regard to case, and of several the last: behind `"layers"` another list as
//! `"Layers"` is the one that containerd and skopeo see. A document that programs may read in two ways is refused,
//! or what was checked is not what runs.

use std::{collections::HashMap, fmt};

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The keys by which a document is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A manifest, an index, or a list of images in an archive.
    Manifest,
    /// The config of an image.
    Config,
}

impl Kind {
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Manifest => &[
                "schemaVersion",
                "mediaType",
                "artifactType",
                "config",
                "layers",
                "manifests",
                "blobs",
                "digest",
                "size",
                "urls",
                "data",
                "platform",
                "subject",
                "annotations",
            ],
            Self::Config => &["architecture", "os", "variant", "rootfs", "diff_ids", "history"],
        }
    }
}

/// Objects whose keys are anybody's words: labels of images differ in case alone, and no program minds.
const FREE_OBJECTS: [&str; 5] = ["annotations", "Annotations", "Labels", "ExposedPorts", "Volumes"];

/// Understands a document.
///
/// # Errors
///
/// When it is none of its kind, or programs may understand it in two ways: one line.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], kind: Kind) -> Result<T, String> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let walk = Walk { keys: kind.keys(), is_free: false };
    walk.deserialize(&mut reader).map_err(|error| error.to_string())?;
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// Goes through a value and looks at its keys.
#[derive(Clone, Copy)]
struct Walk {
    keys: &'static [&'static str],
    is_free: bool,
}

/// A key as Go compares it: simple folding of case, which takes the long s and the sign for Kelvin as letters too.
fn fold(key: &str) -> String {
    key.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect()
}

impl Walk {
    /// The rule that a key breaks beside the keys before it.
    fn problem(self, key: &str, seen: &mut HashMap<String, String>) -> Option<String> {
        let folded = if self.is_free { key.to_owned() } else { fold(key) };
        if let Some(meant) = self.keys.iter().find(|meant| !self.is_free && **meant != key && fold(meant) == folded) {
            return Some(format!("some programs take the key {key:?} for {meant:?}"));
        }
        let other = seen.insert(folded, key.to_owned())?;
        Some(format!("programs take one of the keys {other:?} and {key:?}, not all the same"))
    }
}

impl<'de> DeserializeSeed<'de> for Walk {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Some(problem) = self.problem(&key, &mut seen) {
                return Err(A::Error::custom(problem));
            }
            let is_free = self.is_free || FREE_OBJECTS.contains(&key.as_str());
            map.next_value_seed(Self { is_free, ..self })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde::de::IgnoredAny;

    use super::*;

    fn problem(document: &str, kind: Kind) -> Option<String> {
        parse::<IgnoredAny>(document.as_bytes(), kind).err()
    }

    #[test]
    fn what_programs_read_in_two_ways_is_refused() {
        let check = |document: &str, kind: Kind, expected: &str| {
            let problem = problem(document, kind).unwrap_or_default();
            assert!(problem.contains(expected), "{document}: {problem}");
        };
        let twice = "programs take one of the keys";
        check(r#"{"layers":[],"layers":[1]}"#, Kind::Manifest, twice);
        check(r#"{"layers":[],"Layers":[1]}"#, Kind::Manifest, r#"the key "Layers" for "layers""#);
        check(r#"{"Layers":[1]}"#, Kind::Manifest, r#"the key "Layers" for "layers""#);
        check("{\"layer\u{17f}\":[1]}", Kind::Manifest, "for \"layers\"");
        check("{\"\u{212a}ey\":1,\"key\":2}", Kind::Manifest, twice);
        check(r#"{"layers":[{"digest":"a","Digest":"b"}]}"#, Kind::Manifest, r#"the key "Digest" for "digest""#);
        check(r#"{"annotations":{"a":"1","a":"2"}}"#, Kind::Manifest, twice);
        check(r#"{"rootfs":{"Diff_IDs":[]}}"#, Kind::Config, r#"the key "Diff_IDs" for "diff_ids""#);
        check(r#"{"config":{"Cmd":["a"],"cmd":["b"]}}"#, Kind::Config, twice);
        check("{", Kind::Config, "EOF");
    }

    #[test]
    fn labels_are_anybodys_words() {
        for document in [
            r#"{"annotations":{"Name":"a","name":"b","Size":"1","size":"2"},"layers":[{"annotations":{"Digest":"x"}}]}"#,
            r#"{"a":1,"b":[true,null,1.5,-1,"text",{"c":{}}]}"#,
        ] {
            assert_eq!(problem(document, Kind::Manifest), None, "{document}");
        }
        // As docker and builders write it.
        let config = r#"{"architecture":"amd64","config":{"Labels":{"Name":"a","name":"b"},"Image":"x"},"Size":1,
            "container_config":{"Cmd":[]},"os":"linux","history":[{"created_by":"a"}],"rootfs":{"type":"layers","diff_ids":[]}}"#;
        assert_eq!(problem(config, Kind::Config), None);
    }
}
