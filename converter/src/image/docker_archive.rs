//! What `docker save` and `skopeo copy ... docker-archive:` write: a tar of layer tars, a config for each image
//! and a `manifest.json` that says which belong together.
//!
//! There is no image manifest in it, so one is made here. Layers are plain tars: what names them is their diff ID,
//! which the config says and whoever reads a layer verifies. Only layers that are compressed are hashed here.

use std::{collections::HashMap, io, ops::Range, sync::Arc};

use format_spec::{Digest, DigestHasher, limits::LAYER_COUNT_MAX};
use registry::MANIFEST_LEN_MAX;
use serde::Deserialize;

use crate::{
    blob::{
        file_source::FileSource,
        reader::{Compression, MAGIC_LEN},
    },
    image::{
        CONFIG_LEN_MAX, ImageError, StoredManifest,
        archive::Archive,
        document,
        manifest::{Descriptor, ImageConfig, ImageManifest, media_type},
    },
};

const MANIFEST_NAME: &str = "manifest.json";

/// One image of an entry of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Entry {
    /// Go writes `null` for a list that has nothing in it.
    fn layers(&self) -> &[String] {
        self.layers.as_deref().unwrap_or_default()
    }
}

/// One image in an archive of docker.
#[derive(Debug, Clone)]
pub struct DockerArchive {
    archive: Arc<Archive>,
    manifest: StoredManifest,
    blobs: Arc<HashMap<Digest, Range<u64>>>,
}

impl DockerArchive {
    /// Finds the image `name`, or the only one. Blocks.
    ///
    /// # Errors
    ///
    /// When it is not there, or the archive lacks a part of it.
    pub fn open(archive: Arc<Archive>, name: Option<&str>) -> Result<Self, ImageError> {
        let refuse = |reason: String| ImageError::Archive { path: archive.path().to_owned(), reason };
        let missing = |member: &str| refuse(format!("{member} is not in this archive"));
        let entries = archive.read(MANIFEST_NAME, MANIFEST_LEN_MAX)?.ok_or_else(|| {
            refuse(format!(
                "no {MANIFEST_NAME} in this archive: docker has not written it; name others as oci-archive:FILE"
            ))
        })?;
        let entries: Vec<Entry> =
            serde_json::from_slice(&entries).map_err(|error| refuse(format!("{MANIFEST_NAME}: {error}")))?;
        let entry = find_entry(&entries, name).map_err(refuse)?;
        let config_bytes = archive.read(&entry.config, CONFIG_LEN_MAX)?.ok_or_else(|| missing(&entry.config))?;
        let config: ImageConfig = document::parse(&config_bytes, document::Kind::Config)
            .map_err(|error| refuse(format!("{}: {error}", entry.config)))?;
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != entry.layers().len() || diff_ids.len() > LAYER_COUNT_MAX {
            let (layers, diff_ids) = (entry.layers().len(), diff_ids.len());
            return Err(refuse(format!("{MANIFEST_NAME} lists {layers} layers, the config says {diff_ids}")));
        }
        let mut blobs = HashMap::new();
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (member, diff_id) in entry.layers().iter().zip(diff_ids) {
            let range = archive.find(member).ok_or_else(|| missing(member))?;
            let descriptor = describe_layer(&archive, range.clone(), diff_id).map_err(|error| archive.failed(error))?;
            blobs.insert(descriptor.digest, range);
            layers.push(descriptor);
        }
        let config = Descriptor::of(media_type::DOCKER_CONFIG, &config_bytes);
        let config_range = archive.find(&entry.config).ok_or_else(|| missing(&entry.config))?;
        blobs.insert(config.digest, config_range);
        let manifest = make_manifest(config, layers);
        Ok(Self { archive, manifest, blobs: Arc::new(blobs) })
    }

    /// The archive's name, as users write it.
    pub fn name(&self) -> String {
        format!("docker-archive:{}", self.archive.path().display())
    }

    /// The manifest that the image would have in a registry.
    pub fn manifest(&self) -> &StoredManifest {
        &self.manifest
    }

    /// The blob `digest`.
    ///
    /// # Errors
    ///
    /// When it is no part of the image.
    pub fn blob(&self, digest: &Digest) -> Result<FileSource, ImageError> {
        let range = self.blobs.get(digest).cloned().ok_or_else(|| ImageError::Archive {
            path: self.archive.path().to_owned(),
            reason: format!("blob {digest} is not in this archive"),
        })?;
        Ok(self.archive.part(range))
    }
}

/// The entry that is called `name`, or the only one.
fn find_entry<'a>(entries: &'a [Entry], name: Option<&str>) -> Result<&'a Entry, String> {
    let tags = |entry: &'a Entry| entry.repo_tags.iter().flatten().map(String::as_str);
    let present = || {
        let names: Vec<_> = entries.iter().flat_map(tags).collect();
        if names.is_empty() { "images without names, @0 and so on".to_owned() } else { names.join(", ") }
    };
    match (name, entries) {
        (_, []) => Err("no image in this archive".to_owned()),
        (None, [only]) => Ok(only),
        (None, _) => {
            Err(format!("{} images: choose one with docker-archive:FILE:NAME; there is: {}", entries.len(), present()))
        }
        (Some(name), _) if name.starts_with('@') => {
            let number = name[1..].parse::<usize>().ok();
            let found = number.and_then(|number| entries.get(number));
            found.ok_or_else(|| format!("no image {name}; there are {}, from @0 on", entries.len()))
        }
        (Some(name), _) => {
            let is_meant = |tag: &str| full_name(tag) == full_name(name);
            let found = entries.iter().find(|entry| tags(entry).any(is_meant));
            found.ok_or_else(|| format!("no image named {name}; there is: {}", present()))
        }
    }
}

/// A name with what docker leaves out of it.
fn full_name(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    let tagged = if last.contains([':', '@']) { name.to_owned() } else { format!("{name}:latest") };
    let short = tagged.strip_prefix("docker.io/").unwrap_or(&tagged);
    short.strip_prefix("library/").unwrap_or(short).to_owned()
}

/// The descriptor of the layer at `range`.
fn describe_layer(archive: &Archive, range: Range<u64>, diff_id: &Digest) -> io::Result<Descriptor> {
    let size = range.end - range.start;
    let mut start = [0; MAGIC_LEN];
    let start_len = usize::try_from(size).map_or(start.len(), |size| size.min(start.len()));
    io::Read::read_exact(&mut archive.reader(range.clone())?, &mut start[..start_len])?;
    let (media_type, digest) = match Compression::of(&start[..start_len]) {
        Compression::Gzip => (media_type::DOCKER_LAYER_GZIP, hash(archive, range)?),
        Compression::Zstd => (media_type::OCI_LAYER_ZSTD, hash(archive, range)?),
        Compression::None => (media_type::DOCKER_LAYER, *diff_id),
    };
    Ok(Descriptor { digest, size, ..Descriptor::of(media_type, b"") })
}

fn hash(archive: &Archive, range: Range<u64>) -> io::Result<Digest> {
    let mut reader = archive.reader(range)?;
    let mut hasher = DigestHasher::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match io::Read::read(&mut reader, &mut buffer)? {
            0 => return Ok(hasher.finish()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

fn make_manifest(config: Descriptor, layers: Vec<Descriptor>) -> StoredManifest {
    let media_type = registry::media_type::DOCKER_MANIFEST.to_owned();
    let manifest = ImageManifest {
        schema_version: 2,
        media_type: Some(media_type.clone()),
        config,
        layers,
        annotations: None,
        rest: Default::default(),
    };
    let bytes = serde_json::to_vec(&manifest).expect("maps with text keys");
    StoredManifest { digest: Digest::of(&bytes), bytes: bytes.into(), media_type }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_as_docker_means_them() {
        let entry = |tags: &[&str]| Entry {
            config: tags.concat(),
            repo_tags: Some(tags.iter().map(|&tag| tag.to_owned()).collect()),
            layers: None,
        };
        let entries = [entry(&["debian:12", "debian:latest"]), entry(&["localhost:5000/a/b:v1"]), entry(&[])];
        let find = |name: &str| find_entry(&entries, Some(name)).map(|entry| entry.config.clone());
        for name in ["debian", "debian:12", "docker.io/library/debian:12", "library/debian"] {
            assert_eq!(find(name), Ok("debian:12debian:latest".to_owned()), "{name}");
        }
        assert_eq!(find("localhost:5000/a/b:v1"), Ok("localhost:5000/a/b:v1".to_owned()));
        let present = "debian:12, debian:latest, localhost:5000/a/b:v1";
        assert_eq!(find("a/b:v1"), Err(format!("no image named a/b:v1; there is: {present}")));
        let several = find_entry(&entries, None).map(|_| ());
        let expected = format!("3 images: choose one with docker-archive:FILE:NAME; there is: {present}");
        assert_eq!(several, Err(expected));
        assert!(find_entry(&entries[2..], None).is_ok());
        assert_eq!(find("@1"), Ok("localhost:5000/a/b:v1".to_owned()));
        assert_eq!(find("@3"), Err("no image @3; there are 3, from @0 on".to_owned()));
        let unnamed = find_entry(&[entry(&[]), entry(&[])], None).map(|_| ());
        let expected =
            "2 images: choose one with docker-archive:FILE:NAME; there is: images without names, @0 and so on";
        assert_eq!(unnamed, Err(expected.to_owned()));
        assert_eq!(find_entry(&[], None).map(|_| ()), Err("no image in this archive".to_owned()));
    }
}
