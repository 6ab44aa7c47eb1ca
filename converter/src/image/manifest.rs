//! Manifests, indexes and the few fields of a config that a conversion needs.
//!
//! Fields that are not named here are kept as they are. Maps are sorted, so equal values give equal bytes.
//! Source: OCI image specification, manifest.md, image-index.md, config.md, descriptor.md.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use format_spec::Digest;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::image::platform::DescriptorPlatform;

/// In an index of buildkit: the image that an attestation is about. Source: buildkit, docs/attestations.
pub(crate) const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// Media types of layers and configs; those of manifests are in `registry::media_type`.
pub mod media_type {
    /// A layer as tar, zstd-compressed: what conversion makes.
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// The same, in docker's words.
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    /// Config of an OCI image.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Config of a docker image: the same content.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// A layer as docker keeps it on a disk: tar.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// A layer as docker pushes it: tar, gzip-compressed.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Names that docker 1.10 and some registries give a config, which say nothing of its kind. Source: moby,
    /// distribution/pull_v2.go, and answers that registries were seen to give.
    const UNSAID_CONFIGS: [&str; 5] = ["", "application/octet-stream", "text/html", "text/plain", "application/json"];

    /// The meaning of a config's type.
    pub fn config_kind(media_type: &str) -> super::ConfigKind {
        match media_type.split(';').next().unwrap_or_default().trim() {
            OCI_CONFIG | DOCKER_CONFIG => super::ConfigKind::Image,
            other if UNSAID_CONFIGS.contains(&other) => super::ConfigKind::Unsaid,
            _ => super::ConfigKind::Other,
        }
    }

    /// Layers that must not be redistributed have types that begin like this.
    const FOREIGN_LAYERS: [&str; 2] =
        ["application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.diff.tar"];

    /// Whether a layer of this type is part of a file system.
    pub fn is_file_system(media_type: &str) -> bool {
        CONVERTIBLE_LAYERS.contains(&media_type) || FOREIGN_LAYERS.iter().any(|start| media_type.starts_with(start))
    }

    /// The layers that can be converted.
    pub const CONVERTIBLE_LAYERS: [&str; 6] = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        OCI_LAYER_ZSTD,
        DOCKER_LAYER,
        DOCKER_LAYER_GZIP,
        DOCKER_LAYER_ZSTD,
    ];
    /// The layers that may be lazy.
    pub const ZSTD_LAYERS: [&str; 2] = [OCI_LAYER_ZSTD, DOCKER_LAYER_ZSTD];
}

/// The meaning of a config's media type for the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigKind {
    /// It is that of an image.
    Image,
    /// Nothing: it may be that of an image.
    Unsaid,
    /// It is that of something else.
    Other,
}

/// Points to a blob or manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The target.
    pub media_type: String,
    /// The content's digest.
    pub digest: Digest,
    /// The content's length, in bytes.
    pub size: u64,
    /// Arbitrary notes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// In an index: the platform that the image is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<DescriptorPlatform>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl Descriptor {
    /// A descriptor of `content`.
    pub fn of(media_type: &str, content: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(content),
            size: content.len() as u64,
            annotations: None,
            platform: None,
            rest: BTreeMap::new(),
        }
    }

    /// The content where the descriptor itself brings it, and it is what the digest says. Source: OCI image
    /// specification, descriptor.md, "Embedded Content".
    pub fn embedded(&self) -> Option<Bytes> {
        let content = BASE64_STANDARD.decode(self.rest.get("data")?.as_str()?).ok()?;
        let is_right = content.len() as u64 == self.size && Digest::of(&content) == self.digest;
        is_right.then(|| content.into())
    }

    /// Whether the content lies at addresses of its own, as layers of Windows do, and not beside the manifest.
    pub fn is_elsewhere(&self) -> bool {
        self.rest.get("urls").and_then(Value::as_array).is_some_and(|urls| !urls.is_empty())
    }

    /// The platform, for people.
    pub fn describe_platform(&self) -> String {
        self.platform.as_ref().map_or_else(|| "image".to_owned(), ToString::to_string)
    }

    /// The annotation `key`.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }
}

/// The manifest of one image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageManifest {
    /// 2.
    pub schema_version: u32,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The config: its digest is the image ID.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub layers: Vec<Descriptor>,
    /// Arbitrary notes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// A list of manifests; also the `index.json` of an OCI layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageIndex {
    /// 2.
    pub schema_version: u32,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub manifests: Vec<IndexEntry>,
    /// Arbitrary notes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// An entry of an index.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum IndexEntry {
    /// It points to something.
    Known(Descriptor),
    /// It cannot be understood, for instance for its kind of digest. It is kept as it is.
    Odd(Value),
}

impl<'de> Deserialize<'de> for IndexEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(Descriptor::deserialize(&value).map_or(Self::Odd(value), Self::Known))
    }
}

impl IndexEntry {
    /// The target.
    ///
    /// # Errors
    ///
    /// When that cannot be understood: why not.
    pub fn descriptor(&self) -> Result<&Descriptor, String> {
        match self {
            Self::Known(descriptor) => Ok(descriptor),
            Self::Odd(value) => Err(match Descriptor::deserialize(value) {
                Err(error) => error.to_string(),
                Ok(_) => "it cannot be understood".to_owned(),
            }),
        }
    }

    /// The platform that it says, as far as that can be understood.
    pub fn platform(&self) -> Option<DescriptorPlatform> {
        let platform = match self {
            Self::Known(descriptor) => descriptor.platform.clone(),
            Self::Odd(value) => DescriptorPlatform::deserialize(value.get("platform")?).ok(),
        };
        platform.filter(DescriptorPlatform::is_stated)
    }

    /// The annotation `key`.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        match self {
            Self::Known(descriptor) => descriptor.annotation(key),
            Self::Odd(value) => value.get("annotations")?.get(key)?.as_str(),
        }
    }
}

impl ImageIndex {
    /// The entries that point to something.
    pub fn known(&self) -> impl Iterator<Item = &Descriptor> {
        self.manifests.iter().filter_map(|entry| match entry {
            IndexEntry::Known(descriptor) => Some(descriptor),
            IndexEntry::Odd(_) => None,
        })
    }
}

/// Go writes `null` for a list that has nothing in it, and reads it so.
pub(crate) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// What a conversion reads of a config.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ImageConfig {
    /// Processor architecture.
    #[serde(default)]
    pub architecture: Option<String>,
    /// Operating system.
    #[serde(default)]
    pub os: Option<String>,
    /// Variant of the architecture.
    #[serde(default)]
    pub variant: Option<String>,
    /// What the layers unpack to.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub rootfs: RootFs,
}

/// The layers' content.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct RootFs {
    /// Digests of the tar streams, lowest first.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub diff_ids: Vec<Digest>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keeps_fields_that_it_does_not_know() {
        let text = concat!(
            r#"{"schemaVersion":2,"mediaType":"m","config":{"mediaType":"c","digest":"#,
            r#""sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0,"urls":["u"]},"#,
            r#""layers":[],"annotations":{"a":"1","b":"2"},"artifactType":"t"}"#,
        );
        let manifest: ImageManifest = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&manifest).unwrap(), text);
    }

    #[test]
    fn embedded_content_is_used_where_it_is_the_right_one() {
        let check = |data: Value, content: &[u8], expected: Option<&[u8]>| {
            let mut descriptor = Descriptor::of("m", content);
            descriptor.rest.insert("data".to_owned(), data.clone());
            assert_eq!(descriptor.embedded().as_deref(), expected, "{data}");
        };
        check("e30=".into(), b"{}", Some(b"{}"));
        check("".into(), b"", Some(b""));
        check("e30=".into(), b"[]", None);
        check("e30".into(), b"{}", None);
        check("{}".into(), b"{}", None);
        check(5.into(), b"{}", None);
        assert_eq!(Descriptor::of("m", b"{}").embedded(), None);
    }

    #[test]
    fn null_is_an_empty_list() {
        let config = r#""config":{"mediaType":"c","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}"#;
        for layers in ["", r#","layers":null"#, r#","layers":[]"#] {
            let manifest = format!(r#"{{"schemaVersion":2,{config}{layers}}}"#);
            assert_eq!(serde_json::from_str::<ImageManifest>(&manifest).unwrap().layers, [], "{layers}");
        }
        for index in [r#"{"schemaVersion":2}"#, r#"{"schemaVersion":2,"manifests":null}"#] {
            assert_eq!(serde_json::from_str::<ImageIndex>(index).unwrap().manifests, [], "{index}");
        }
        for config in ["{}", r#"{"rootfs":null,"os":null}"#, r#"{"rootfs":{"type":"layers","diff_ids":null}}"#] {
            assert_eq!(serde_json::from_str::<ImageConfig>(config).unwrap().rootfs.diff_ids, [], "{config}");
        }
    }

    /// One entry that nobody can use is no reason not to use the others.
    #[test]
    fn an_odd_entry_does_not_spoil_an_index_and_is_kept() {
        let good = json!({"mediaType": "m", "digest": Digest::of(b""), "size": 1, "platform": {"architecture": "arm64", "os": "linux"}});
        let with = |change: fn(&mut Value)| {
            let mut entry = good.clone();
            change(&mut entry);
            entry
        };
        let odd = [
            with(|entry| entry["digest"] = format!("sha512:{}", "ab".repeat(64)).into()),
            with(|entry| entry["size"] = (-1).into()),
            with(|entry| entry["size"] = 1.5.into()),
            with(|entry| entry["annotations"] = json!({"number": 5})),
            with(|entry| entry["platform"]["variant"] = 7.into()),
            with(|entry| drop(entry.as_object_mut().unwrap().remove("mediaType"))),
            json!("text"),
            json!(null),
        ];
        let known = [
            good.clone(),
            with(|entry| entry["platform"] = json!({})),
            with(|entry| entry["platform"] = json!({"os": "linux"})),
        ];
        let entries: Vec<_> = odd.iter().chain(&known).cloned().collect();
        let document = json!({"schemaVersion": 2, "manifests": entries});
        let index: ImageIndex = serde_json::from_value(document.clone()).unwrap();
        assert_eq!(index.known().count(), known.len());
        assert_eq!(serde_json::to_value(&index).unwrap(), document);
        let platforms: Vec<_> =
            index.manifests.iter().filter_map(IndexEntry::platform).map(|platform| platform.to_string()).collect();
        assert_eq!(platforms, ["linux/arm64"; 6]);
    }
}
