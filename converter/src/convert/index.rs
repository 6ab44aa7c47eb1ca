//! Converts what a name points to: one image, or an index with all that it lists.
//!
//! Images are converted. Everything else (attestations, signatures, Wasm modules, charts) is copied as it is. An
//! index keeps its order, platforms, annotations and what else it says; its entries point to what was made of them.

use std::{collections::HashMap, pin::Pin};

use bytes::Bytes;
use format_spec::Digest;

use crate::{
    convert::{
        Conversion, ConvertError,
        report::{ArtifactReport, ImageReport},
    },
    image::{
        ImageError, StoredManifest,
        copy::copy_blobs,
        manifest::{Descriptor, ImageIndex, IndexEntry, REFERENCE_DIGEST},
        resolve::{INDEX_DEPTH_MAX, ResolveError, artifact_kind, parse, read_image},
        stale::for_new_layers,
    },
};

/// A manifest or index as it shall be stored.
#[derive(Debug, Clone)]
pub(crate) struct NewManifest {
    pub(crate) media_type: String,
    pub(crate) bytes: Bytes,
}

impl NewManifest {
    /// The same bytes as before.
    fn same(stored: &StoredManifest) -> Self {
        Self { media_type: stored.media_type.clone(), bytes: stored.bytes.clone() }
    }

    /// What points to it.
    pub(crate) fn descriptor(&self) -> Descriptor {
        Descriptor::of(&self.media_type, &self.bytes)
    }
}

/// What a conversion has made.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) images: Vec<ImageReport>,
    pub(crate) artifacts: Vec<ArtifactReport>,
    /// What points now to what was made of a manifest or index, by the digest of the original.
    pub(crate) descriptors: HashMap<Digest, Descriptor>,
    /// The originals in the order in which they were converted.
    pub(crate) order: Vec<Digest>,
}

impl Conversion<'_> {
    /// Converts a manifest or index and all that it points to; stores everything but the manifest itself.
    pub(crate) fn convert_manifest<'a>(
        &'a self,
        stored: StoredManifest,
        depth: usize,
        made: &'a mut Made,
    ) -> Pin<Box<dyn Future<Output = Result<NewManifest, ConvertError>> + Send + 'a>> {
        Box::pin(async move {
            let digest = stored.digest;
            let new = if stored.is_index() {
                self.convert_index(&stored, depth, made).await?
            } else if let Some(image) = read_image(self.source, &stored).await? {
                image.check_platform(self.platform)?;
                let (new, report) = self.convert_image(image).await?;
                made.images.push(report);
                new
            } else {
                let copied_len = copy_blobs(self.source, self.destination, &stored).await?;
                let kind = artifact_kind(&stored).unwrap_or_default();
                made.artifacts.push(ArtifactReport { digest, copied_bytes: copied_len, kind });
                NewManifest::same(&stored)
            };
            made.descriptors.insert(digest, new.descriptor());
            made.order.push(digest);
            Ok(new)
        })
    }

    async fn convert_index(
        &self,
        stored: &StoredManifest,
        depth: usize,
        made: &mut Made,
    ) -> Result<NewManifest, ConvertError> {
        if depth >= INDEX_DEPTH_MAX {
            let reason = format!("more than {INDEX_DEPTH_MAX} indexes within one another");
            return Err(ResolveError::NoImage { digest: stored.digest, reason }.into());
        }
        let mut index: ImageIndex = parse(stored)?;
        let about =
            |number: usize| move |reason| ResolveError::Entry { index: stored.digest, number: number + 1, reason };
        for (number, entry) in index.manifests.iter().enumerate() {
            let entry = entry.descriptor().map_err(about(number))?;
            if made.descriptors.contains_key(&entry.digest) {
                continue;
            }
            let child = self.source.manifest_of(entry).await?;
            if !child.is_index() {
                self.observer.image_starts(&entry.describe_platform());
            }
            let new = self.convert_manifest(child, depth + 1, made).await.map_err(|error| match error {
                // Which one that is, and that the others can be had without it.
                ConvertError::Image(error @ ImageError::Malformed { .. })
                | ConvertError::Resolve(ResolveError::Image(error @ ImageError::Malformed { .. })) => {
                    about(number)(format!("{error}; convert one image with --platform")).into()
                }
                error => error,
            })?;
            self.destination.put_manifest(&new.media_type, &new.bytes).await?;
        }
        rewrite(&mut index, &made.descriptors);
        let bytes = serde_json::to_vec(&index).expect("maps with text keys").into();
        Ok(NewManifest { media_type: registry::media_type::OCI_INDEX.to_owned(), bytes })
    }
}

/// Makes every entry of an index point to what was made of it. What it says of itself stays.
fn rewrite(index: &mut ImageIndex, made: &HashMap<Digest, Descriptor>) {
    index.media_type = Some(registry::media_type::OCI_INDEX.to_owned());
    for entry in &mut index.manifests {
        let IndexEntry::Known(entry) = entry else { continue };
        if let Some(new) = made.get(&entry.digest).filter(|new| new.digest != entry.digest) {
            entry.media_type.clone_from(&new.media_type);
            (entry.digest, entry.size) = (new.digest, new.size);
            // The old manifest, or where it can be had.
            entry.rest.remove("data");
            entry.rest.remove("urls");
            for_new_layers(&mut entry.annotations);
        }
        if let Some(about) = entry.annotations.as_mut().and_then(|annotations| annotations.get_mut(REFERENCE_DIGEST))
            && let Ok(old) = about.parse::<Digest>()
            && let Some(new) = made.get(&old)
        {
            *about = new.digest.to_string();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn entries_follow_what_they_point_to_and_keep_what_they_say() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let old = json!({
            "schemaVersion": 2,
            "mediaType": registry::media_type::DOCKER_LIST,
            "manifests": [
                {
                    "mediaType": registry::media_type::DOCKER_MANIFEST, "digest": digest("image"), "size": 1,
                    "platform": {"architecture": "arm", "os": "linux", "variant": "v7", "os.features": ["x"]},
                    "annotations": {"note": "kept", "com.amazon.soci.index-digest": "gone"}, "data": "b2xk", "artifactType": "kept",
                },
                {
                    "mediaType": registry::media_type::OCI_MANIFEST, "digest": digest("attestation"), "size": 2,
                    "platform": {"architecture": "unknown", "os": "unknown"},
                    "annotations": {"vnd.docker.reference.digest": digest("image"), "vnd.docker.reference.type": "attestation-manifest"},
                },
            ],
            "annotations": {"of": "the index"},
            "subject": {"odd": true},
        });
        let mut expected = old.clone();
        let new = Descriptor::of(registry::media_type::OCI_MANIFEST, b"new");
        expected["mediaType"] = registry::media_type::OCI_INDEX.into();
        expected["manifests"][0]["mediaType"] = new.media_type.clone().into();
        expected["manifests"][0]["digest"] = new.digest.to_string().into();
        expected["manifests"][0]["size"] = new.size.into();
        expected["manifests"][0].as_object_mut().unwrap().remove("data");
        expected["manifests"][0]["annotations"] = json!({"note": "kept"});
        expected["manifests"][1]["annotations"]["vnd.docker.reference.digest"] = new.digest.to_string().into();
        let same = Descriptor { digest: digest("attestation"), ..Descriptor::of("m", b"") };
        let mut index: ImageIndex = serde_json::from_value(old).unwrap();
        rewrite(&mut index, &[(digest("image"), new), (digest("attestation"), same)].into());
        assert_eq!(serde_json::to_value(&index).unwrap(), expected);
    }
}
