//! Manifests, indexes and the few fields of a config that a conversion needs.
//!
//! Fields that are not named here are kept as they are. Maps are sorted, so equal values give equal bytes.
//! Source: OCI image specification, manifest.md, image-index.md, config.md, descriptor.md.

use std::{collections::BTreeMap, fmt, str::FromStr};

use format_spec::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// Points to a blob or manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it points to.
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

/// The platform in a descriptor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DescriptorPlatform {
    /// Processor architecture, in Go's words.
    pub architecture: String,
    /// Operating system, in Go's words.
    pub os: String,
    /// Variant of the architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl fmt::Display for DescriptorPlatform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
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
    pub manifests: Vec<Descriptor>,
    /// Arbitrary notes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl ImageIndex {
    /// The platforms in it, for a message; attestations are none.
    pub fn platforms(&self) -> String {
        let platforms = self.manifests.iter().filter_map(|manifest| manifest.platform.as_ref());
        let known = platforms.filter(|platform| platform.os != "unknown").map(ToString::to_string);
        known.collect::<Vec<_>>().join(", ")
    }
}

/// What a conversion reads of a config.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ImageConfig {
    /// Processor architecture.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// Variant of the architecture.
    #[serde(default)]
    pub variant: Option<String>,
    /// What the layers unpack to.
    pub rootfs: RootFs,
}

/// The layers' content.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RootFs {
    /// Digests of the tar streams, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// A platform as users name it: `os/architecture[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// Linux on the architecture that this program runs on.
    pub fn host() -> Self {
        let architecture = go_architecture(std::env::consts::ARCH).to_owned();
        Self { os: "linux".to_owned(), architecture, variant: None }
    }

    /// Whether an image for `os`, `architecture` and `variant` will do.
    pub fn accepts(&self, os: &str, architecture: &str, variant: Option<&str>) -> bool {
        let default_variant = match self.architecture.as_str() {
            "arm64" => "v8",
            "arm" => "v7",
            "amd64" => "v1",
            _ => "",
        };
        let found = variant.filter(|variant| !variant.is_empty()).unwrap_or(default_variant);
        let fits = self.variant.as_deref().is_none_or(|wanted| wanted == found);
        self.os == os && self.architecture == go_architecture(architecture) && fits
    }
}

/// Architectures have a name of their own in images: Go's.
fn go_architecture(name: &str) -> &str {
    match name {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// A text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no platform: expected os/architecture or os/architecture/variant, for instance linux/arm64")]
pub struct ParsePlatformError(String);

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<_> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (*os, *architecture, None),
            [os, architecture, variant] => (*os, *architecture, Some(*variant)),
            _ => return Err(ParsePlatformError(text.to_owned())),
        };
        if parts.iter().any(|part| part.is_empty()) {
            return Err(ParsePlatformError(text.to_owned()));
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: go_architecture(architecture).to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
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
    fn a_platform_accepts_its_default_variant() {
        let check = |platform: &str, os: &str, architecture: &str, variant: Option<&str>, expected: bool| {
            let platform: Platform = platform.parse().unwrap();
            assert_eq!(platform.accepts(os, architecture, variant), expected, "{platform} {architecture} {variant:?}");
        };
        check("linux/amd64", "linux", "amd64", None, true);
        check("linux/x86_64", "linux", "amd64", Some("v3"), true);
        check("linux/amd64", "windows", "amd64", None, false);
        check("linux/arm64/v8", "linux", "arm64", None, true);
        check("linux/arm64/v9", "linux", "arm64", Some("v8"), false);
        for text in ["", "linux", "linux/", "linux/arm/v7/x"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }
}
