//! An image against the one it was converted from: config, platform, tar streams, annotations.

use std::collections::BTreeMap;

use format_spec::{Digest, annotation, signature::SIGNATURE};

use super::{
    CheckError,
    layer::check_ordinary,
    notes::{compare_fields, compare_notes, compare_type},
    report::{Findings, LayerCheck, Part},
};
use crate::{
    blob::thread::read_blob,
    image::stale::{describes_blob, describes_layers},
    image::{
        ImageSource,
        manifest::{Descriptor, media_type},
        platform::{DescriptorPlatform, Platform},
        resolve::{ResolvedImage, resolve_image},
    },
};

/// An image that another one was converted from.
#[derive(Debug)]
pub(super) struct Original<'a> {
    pub(super) at: &'a ImageSource,
    pub(super) image: ResolvedImage,
}

/// Finds the image at `original` that is for the `wanted` platform, by default that of `image`.
pub(super) async fn find<'a>(
    original: &'a ImageSource,
    image: &ResolvedImage,
    wanted: Option<&Platform>,
) -> Result<Original<'a>, CheckError> {
    let own = image.platform.is_stated().then(|| Platform::of(&image.platform));
    let found = resolve_image(original, wanted.or(own.as_ref())).await.map_err(CheckError::Original)?;
    Ok(Original { at: original, image: found })
}

/// Adds a finding for everything in which `image`, whose `layers` were read, is not the original.
pub(super) async fn compare(
    image: &ResolvedImage,
    layers: &[LayerCheck],
    original: &Original<'_>,
    findings: &mut Findings,
) -> Result<(), CheckError> {
    let source = &original.image;
    let (ours, theirs) = (image.manifest.config.digest, source.manifest.config.digest);
    if ours != theirs {
        findings.add(Part::Config, "config", format!("its digest is {ours}, that of the original {theirs}"));
    }
    compare_configs(&image.manifest.config, &source.manifest.config, findings);
    if image.manifest.schema_version != source.manifest.schema_version {
        let (ours, theirs) = (image.manifest.schema_version, source.manifest.schema_version);
        findings.add(Part::Manifest, "manifest, schemaVersion", format!("it is {ours}, in the original {theirs}"));
    }
    let (ours, theirs) = (&image.manifest.media_type, &source.manifest.media_type);
    compare_type("manifest", ours, theirs, registry::media_type::OCI_MANIFEST, findings);
    let (notes, their_notes) = (image.manifest.annotations.as_ref(), source.manifest.annotations.as_ref());
    let blobs = |image: &ResolvedImage| image.manifest.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
    let are_new = blobs(image) != blobs(source);
    compare_notes("manifest", notes, their_notes, |key| are_new && describes_layers(key), &[], findings);
    compare_fields("manifest", &image.manifest.rest, &source.manifest.rest, findings);
    let (our_count, their_count) = (layers.len(), source.manifest.layers.len());
    if our_count != their_count {
        findings.add(Part::Manifest, "manifest", format!("it has {our_count} layers, the original {their_count}"));
    }
    let pairs = image.manifest.layers.iter().zip(layers).zip(source.manifest.layers.iter().zip(&source.diff_ids));
    for (number, ((ours, checked), (theirs, diff_id))) in pairs.enumerate() {
        let place = format!("layer {} {}", number + 1, checked.digest);
        compare_descriptors(&place, ours, theirs, *diff_id, findings);
        if checked.diff_id != *diff_id {
            let problem = format!("its diff ID is {}, that of the original {diff_id}", checked.diff_id);
            findings.add(Part::Config, place.clone(), problem);
        }
        compare_layer(&place, checked, original.at, theirs, findings).await?;
    }
    Ok(())
}

/// The descriptor of the config: its type may become that of OCI, and nothing else changes.
fn compare_configs(ours: &Descriptor, theirs: &Descriptor, findings: &mut Findings) {
    if ours.media_type != theirs.media_type && ours.media_type != media_type::OCI_CONFIG {
        let problem = format!("it is {:?}, in the original {:?}", ours.media_type, theirs.media_type);
        findings.add(Part::Config, "config, mediaType", problem);
    }
    compare_notes("config", ours.annotations.as_ref(), theirs.annotations.as_ref(), |_| false, &[], findings);
    compare_fields("config", &ours.rest, &theirs.rest, findings);
    compare_platforms("config", ours, theirs.platform.as_ref(), findings);
}

/// The descriptor of a layer: of a blob that is another one only the annotations that are true of its content stay.
fn compare_descriptors(place: &str, ours: &Descriptor, theirs: &Descriptor, diff_id: Digest, findings: &mut Findings) {
    let is_new = ours.digest != theirs.digest;
    // A layer that is lazy already may have lost its annotations on the way.
    let origin = SOURCE_NOTES.into_iter().filter(|_| is_new);
    let added: Vec<&str> = annotation::ALL.into_iter().chain([SIGNATURE]).chain(origin).collect();
    let (notes, their_notes) = (ours.annotations.as_ref(), theirs.annotations.as_ref());
    compare_notes(place, notes, their_notes, |key| is_new && describes_blob(key), &added, findings);
    let nothing = BTreeMap::new();
    // The rest of a descriptor is about the blob.
    compare_fields(place, &ours.rest, if is_new { &nothing } else { &theirs.rest }, findings);
    compare_platforms(place, ours, theirs.platform.as_ref().filter(|_| !is_new), findings);
    let expected = if is_new { media_type::OCI_LAYER_ZSTD } else { &theirs.media_type };
    if ours.media_type != expected {
        let problem = format!("it is {:?}, expected {expected:?}", ours.media_type);
        findings.add(Part::Manifest, format!("{place}, mediaType"), problem);
    }
    if is_new {
        compare_origin(place, ours, theirs.digest, diff_id, findings);
    }
}

fn compare_platforms(place: &str, ours: &Descriptor, expected: Option<&DescriptorPlatform>, findings: &mut Findings) {
    if ours.platform.as_ref() != expected {
        findings.add(Part::Manifest, format!("{place}, platform"), "it is not that of the original");
    }
}

/// Reads the original's layer and compares the tar streams.
async fn compare_layer(
    place: &str,
    checked: &LayerCheck,
    original: &ImageSource,
    theirs: &Descriptor,
    findings: &mut Findings,
) -> Result<(), CheckError> {
    // The same bytes have been looked at already.
    if checked.digest == theirs.digest {
        return Ok(());
    }
    let may_change = media_type::CONVERTIBLE_LAYERS.contains(&theirs.media_type.as_str()) && !theirs.is_elsewhere();
    if !may_change {
        let problem = format!("the original has {}, which must stay as it is", theirs.digest);
        findings.add(Part::Manifest, place, problem);
        return Ok(());
    }
    if checked.tar_digest.is_none() && checked.findings.is_empty() {
        findings.add(Part::Tar, place, "it has no tar stream, but the original has");
    }
    let (digest, len) = (theirs.digest, theirs.size);
    let stream = match original.blob_stream(&digest).await {
        Ok(stream) => stream,
        Err(error) => {
            findings.add(Part::Blob, format!("{place}, blob of the original"), error);
            return Ok(());
        }
    };
    let passed = read_blob(stream, digest, len, |mut blob| check_ordinary(&mut blob, true)).await;
    let passed = passed.map_err(|error| CheckError::Aborted { digest, error })?;
    for finding in passed.findings.list {
        findings.add(finding.part, format!("{place}, {} of the original {digest}", finding.place), finding.problem);
    }
    if let (Some(found), Some((expected, _))) = (checked.tar_digest, passed.tar)
        && found != expected
    {
        findings.add(Part::Tar, place, tar_problem(found, expected));
    }
    Ok(())
}

fn tar_problem(found: Digest, expected: Digest) -> String {
    format!("its tar stream has digest {found}, that of the original {expected}")
}

/// The origin that a converted layer claims.
const SOURCE_NOTES: [&str; 3] = [annotation::SOURCE_DIGEST, annotation::SOURCE_DIFF_ID, annotation::SOURCE_OPTIONS];

/// A layer that says from what it was made says the blob and the tar stream that the original has.
fn compare_origin(place: &str, ours: &Descriptor, digest: Digest, diff_id: Digest, findings: &mut Findings) {
    for (key, expected) in [(annotation::SOURCE_DIGEST, digest), (annotation::SOURCE_DIFF_ID, diff_id)] {
        if let Some(said) = ours.annotation(key).filter(|said| *said != expected.to_string()) {
            let problem = format!("it is {said:?}, expected {expected}");
            findings.add(Part::Annotation, format!("{place}, annotation {key}"), problem);
        }
    }
}
