//! An image against the one it was converted from: config, platform, tar streams, annotations.

use std::collections::{BTreeMap, BTreeSet};

use format_spec::{Digest, annotation, signature::SIGNATURE};
use serde_json::Value;

use super::{
    CheckError, LayerCheck, check_ordinary,
    report::{Findings, Part},
};
use crate::{
    blob_thread::read_blob,
    image::ImageSource,
    manifest::{Descriptor, media_type},
    platform::Platform,
    resolve::{ResolvedImage, resolve_image},
    stale::{describes_blob, describes_layers},
};

/// An image that another one was converted from.
#[derive(Debug)]
pub(crate) struct Original<'a> {
    at: &'a ImageSource,
    image: ResolvedImage,
}

/// Finds the image at `original` that is for the `wanted` platform, by default that of `image`.
pub(crate) async fn find<'a>(
    original: &'a ImageSource,
    image: &ResolvedImage,
    wanted: Option<&Platform>,
) -> Result<Original<'a>, CheckError> {
    let own = image.platform.is_stated().then(|| Platform::of(&image.platform));
    let found = resolve_image(original, wanted.or(own.as_ref())).await.map_err(CheckError::Original)?;
    Ok(Original { at: original, image: found })
}

/// Adds a finding for everything in which `image`, whose `layers` were read, is not the original.
pub(crate) async fn compare(
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
    let (notes, their_notes) = (image.manifest.annotations.as_ref(), source.manifest.annotations.as_ref());
    let blobs = |image: &ResolvedImage| image.manifest.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
    let are_new = blobs(image) != blobs(source);
    compare_notes("manifest", notes, their_notes, |key| are_new && describes_layers(key), findings);
    compare_fields("manifest", &image.manifest.rest, &source.manifest.rest, findings);
    let (our_count, their_count) = (layers.len(), source.manifest.layers.len());
    if our_count != their_count {
        findings.add(Part::Manifest, "manifest", format!("it has {our_count} layers, the original {their_count}"));
    }
    let pairs = image.manifest.layers.iter().zip(layers).zip(source.manifest.layers.iter().zip(&source.diff_ids));
    for (number, ((ours, checked), (theirs, diff_id))) in pairs.enumerate() {
        let place = format!("layer {} {}", number + 1, checked.digest);
        let is_new = ours.digest != theirs.digest;
        let may_be_gone = |key: &str| is_new && describes_blob(key);
        compare_notes(&place, ours.annotations.as_ref(), theirs.annotations.as_ref(), may_be_gone, findings);
        compare_origin(&place, ours, *diff_id, findings);
        if is_new {
            // The rest of a descriptor is about the blob, and that is another one.
            compare_fields(&place, &ours.rest, &BTreeMap::new(), findings);
        } else {
            compare_fields(&place, &ours.rest, &theirs.rest, findings);
        }
        if checked.diff_id != *diff_id {
            let problem = format!("its diff ID is {}, that of the original {diff_id}", checked.diff_id);
            findings.add(Part::Config, place.clone(), problem);
        }
        compare_layer(&place, checked, original.at, theirs, findings).await?;
    }
    Ok(())
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

type Notes = BTreeMap<String, String>;

/// Annotations of the original are carried over as they are, but for those that describe bytes which were replaced:
/// of these none may be left. Conversion adds those of this format, and no others.
fn compare_notes(
    place: &str,
    ours: Option<&Notes>,
    theirs: Option<&Notes>,
    may_be_gone: impl Fn(&str) -> bool,
    findings: &mut Findings,
) {
    for (key, expected) in theirs.into_iter().flatten() {
        // A lazy original may have been converted again.
        if key.starts_with(LAZULI_PREFIX) {
            continue;
        }
        let found = ours.and_then(|ours| ours.get(key));
        if may_be_gone(key) {
            if found.is_some() {
                let problem = "it describes the original's bytes, which are not those of this image";
                findings.add(Part::Annotation, format!("{place}, annotation {key}"), problem);
            }
        } else if found != Some(expected) {
            let found = found.map_or("nothing".to_owned(), |found| format!("{found:?}"));
            let problem = format!("it is {found}, in the original {expected:?}");
            findings.add(Part::Annotation, format!("{place}, annotation {key}"), problem);
        }
    }
    let is_of_this_format =
        |key: &str| annotation::ALL.contains(&key) || SOURCE_NOTES.contains(&key) || key == SIGNATURE;
    for (key, found) in ours.into_iter().flatten() {
        let is_theirs = theirs.is_some_and(|theirs| theirs.contains_key(key));
        if !is_theirs && !is_of_this_format(key) {
            let problem = format!("it is {found:?}, in the original nothing");
            findings.add(Part::Annotation, format!("{place}, annotation {key}"), problem);
        }
    }
}

/// The origin that a converted layer claims.
const SOURCE_NOTES: [&str; 3] = [annotation::SOURCE_DIGEST, annotation::SOURCE_DIFF_ID, annotation::SOURCE_OPTIONS];

/// Annotations of this format.
const LAZULI_PREFIX: &str = "containerd.io/snapshot/lazuli/";

/// A layer that says from what it was made says the tar stream that it has.
fn compare_origin(place: &str, ours: &Descriptor, diff_id: Digest, findings: &mut Findings) {
    let said = ours.annotation(annotation::SOURCE_DIFF_ID);
    if let Some(said) = said.filter(|said| *said != diff_id.to_string()) {
        let problem = format!("it is {said:?}, the diff ID is {diff_id}");
        findings.add(Part::Annotation, format!("{place}, annotation {}", annotation::SOURCE_DIFF_ID), problem);
    }
}

/// What else stands in a document, like the subject of a manifest: the same on both sides, and nothing more.
fn compare_fields(
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
