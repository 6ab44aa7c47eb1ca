//! What refers to an image comes along: signatures, attestations, SBOMs and the like.
//!
//! A conversion makes a new manifest, so whatever was said about the old one by its digest is not said about the
//! new one. Everything is copied byte for byte and still refers to the old manifest: a signature stays valid for what
//! was signed, and who wants to know what an image was made from finds it beside the image. What only describes the
//! content (an SBOM, a scan, a licence) is as true of the new image, whose files are the same: it gets a second
//! manifest, over the same blobs, that refers to the new image. What is signed never does, since no check of it could
//! succeed; sign the new image instead.
//!
//! Source: OCI distribution specification 1.1, "Referrers Tag Schema"; cosign, "Tag-based discovery".

use bytes::Bytes;
use format_spec::Digest;
use serde_json::Value;

use crate::{
    convert::{ConvertError, index::Made, report::ReferrerReport},
    image::{
        ImageDestination, ImageError, ImageSource, StoredManifest,
        copy::copy_blobs,
        layout::find_tag,
        manifest::{Descriptor, ImageIndex},
        resolve::{artifact_kind, parse},
    },
};

/// Referrers of referrers followed at most: a signature of an SBOM is two.
const DEPTH_MAX: usize = 4;
/// Most referrers of one conversion.
const COUNT_MAX: usize = 1000;
/// Parts of media types of what is signed or is a signature: notation, cosign, sigstore bundles, in-toto.
const SIGNED: [&str; 6] = ["signature", "sigstore", "simplesigning", "in-toto", "dsse", "attestation"];
/// Ends of the tags under which cosign stores signatures, attestations and SBOMs.
const COSIGN_ENDS: [&str; 3] = [".sig", ".att", ".sbom"];
/// The end for SBOMs, which describe content.
const COSIGN_SBOM: &str = ".sbom";

/// Copies whatever refers to the originals in `made`; attaches to the new manifests what is true of them too.
///
/// # Errors
///
/// When something cannot be read or written.
pub(crate) async fn carry_referrers(
    source: &ImageSource,
    destination: &ImageDestination,
    made: &Made,
) -> Result<Vec<ReferrerReport>, ConvertError> {
    let mut reports = Vec::new();
    let mut waiting: Vec<(Digest, usize)> = made.order.iter().map(|digest| (*digest, 0)).collect();
    waiting.reverse();
    while let Some((subject, depth)) = waiting.pop() {
        let new = made.descriptors.get(&subject).filter(|new| new.digest != subject);
        for referrer in find_referrers(source, &subject).await? {
            if reports.len() >= COUNT_MAX {
                let reason = format!("more than {COUNT_MAX} referrers");
                return Err(ImageError::Malformed { what: source.name(), reason }.into());
            }
            let stored = source.manifest_of(&referrer).await?;
            let referrer = believe_manifest(referrer, &stored);
            copy_blobs(source, destination, &stored).await?;
            destination.put_referrer(&referrer, &stored.bytes).await?;
            let attached = match new.filter(|_| !is_signed(&stored)) {
                Some(new) => Some(attach(destination, &referrer, &stored, new).await?),
                None => None,
            };
            let kind = artifact_type(&referrer).unwrap_or("of no type").to_owned();
            reports.push(ReferrerReport { subject, digest: stored.digest, kind, attached });
            if depth + 1 < DEPTH_MAX {
                waiting.push((stored.digest, depth + 1));
            }
        }
        carry_cosign(source, destination, &subject, new, &mut reports).await?;
    }
    Ok(reports)
}

/// Copies what cosign keeps under tags made of the subject's digest.
async fn carry_cosign(
    source: &ImageSource,
    destination: &ImageDestination,
    subject: &Digest,
    new: Option<&Descriptor>,
    reports: &mut Vec<ReferrerReport>,
) -> Result<(), ConvertError> {
    for end in COSIGN_ENDS {
        let tag = format!("sha256-{}{end}", subject.hex());
        let Some(stored) = find_tagged(source, &tag).await? else { continue };
        copy_blobs(source, destination, &stored).await?;
        destination.put_tagged(&tag, &stored.media_type, &stored.bytes).await?;
        let new = new.filter(|_| end == COSIGN_SBOM);
        if let Some(new) = new {
            let tag = format!("sha256-{}{end}", new.digest.hex());
            destination.put_tagged(&tag, &stored.media_type, &stored.bytes).await?;
        }
        reports.push(ReferrerReport {
            subject: *subject,
            digest: stored.digest,
            kind: tag,
            attached: new.map(|_| stored.digest),
        });
    }
    Ok(())
}

/// The entry of a referrer with the types that its manifest says: that is what its digest covers.
fn believe_manifest(mut referrer: Descriptor, stored: &StoredManifest) -> Descriptor {
    referrer.media_type.clone_from(&stored.media_type);
    if let Some(kind) = artifact_kind(stored) {
        referrer.rest.insert("artifactType".to_owned(), kind.into());
    }
    referrer
}

/// Stores a second manifest over the same blobs that refers to `new`.
async fn attach(
    destination: &ImageDestination,
    referrer: &Descriptor,
    stored: &StoredManifest,
    new: &Descriptor,
) -> Result<Digest, ConvertError> {
    let mut manifest: Value = parse(stored)?;
    let plain = Descriptor { annotations: None, platform: None, rest: Default::default(), ..new.clone() };
    manifest["subject"] = serde_json::to_value(plain).expect("text keys");
    let bytes = Bytes::from(serde_json::to_vec(&manifest).expect("text keys"));
    let described = Descriptor::of(&stored.media_type, &bytes);
    let descriptor = Descriptor { digest: described.digest, size: described.size, ..referrer.clone() };
    destination.put_referrer(&descriptor, &bytes).await?;
    Ok(descriptor.digest)
}

/// Whether a manifest is a signature, or what it holds is signed.
fn is_signed(stored: &StoredManifest) -> bool {
    let Ok(manifest) = serde_json::from_slice::<Value>(&stored.bytes) else { return true };
    let layers = manifest["layers"].as_array().into_iter().flatten().map(|layer| &layer["mediaType"]);
    let mut types = [&manifest["artifactType"], &manifest["config"]["mediaType"]].into_iter().chain(layers);
    types.any(|name| name.as_str().is_some_and(|name| SIGNED.iter().any(|part| name.contains(part))))
}

fn artifact_type(referrer: &Descriptor) -> Option<&str> {
    referrer.rest.get("artifactType").and_then(Value::as_str)
}

/// What refers to the manifest `subject` at the source.
async fn find_referrers(source: &ImageSource, subject: &Digest) -> Result<Vec<Descriptor>, ConvertError> {
    match source {
        ImageSource::Registry { client, reference } => {
            let found = client.referrers(reference, subject, None).await.map_err(ImageError::from)?;
            Ok(found.into_iter().map(to_descriptor).collect())
        }
        ImageSource::Layout(layout) => {
            let index = layout.index()?;
            let listed = match find_tag(&index, &format!("sha256-{}", subject.hex())) {
                Some(list) => {
                    let list = source.manifest_of(list).await?;
                    if list.is_index() {
                        parse::<ImageIndex>(&list)?.known().cloned().collect()
                    } else {
                        tracing::warn!(%subject, manifest = %list.digest, "the tag of its referrers names no index: nothing is taken from it");
                        Vec::new()
                    }
                }
                None => Vec::new(),
            };
            let mut found: Vec<Descriptor> = Vec::new();
            for entry in listed.into_iter().chain(index.known().cloned()) {
                let is_known = found.iter().any(|known| known.digest == entry.digest);
                if !is_known && let Some(entry) = referring(source, entry, subject).await? {
                    found.push(entry);
                }
            }
            Ok(found)
        }
        // There is no place for them in it.
        ImageSource::DockerArchive(_) => Ok(Vec::new()),
    }
}

/// The entry of a layout without what it says of its own, if the manifest refers to `subject`.
async fn referring(
    source: &ImageSource,
    entry: Descriptor,
    subject: &Digest,
) -> Result<Option<Descriptor>, ConvertError> {
    let stored = source.manifest_of(&entry).await?;
    let manifest: Value = parse(&stored)?;
    if manifest["subject"]["digest"].as_str() != Some(&subject.to_string()) {
        return Ok(None);
    }
    let mut found = Descriptor::of(&stored.media_type, &stored.bytes);
    found.annotations = serde_json::from_value(manifest["annotations"].clone()).unwrap_or_default();
    Ok(Some(found))
}

fn to_descriptor(referrer: registry::Referrer) -> Descriptor {
    let registry::Referrer { media_type, digest, len, artifact_type, annotations } = referrer;
    Descriptor {
        media_type,
        digest,
        size: len,
        annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
        platform: None,
        rest: artifact_type.map(|name| ("artifactType".to_owned(), name.into())).into_iter().collect(),
    }
}

/// The manifest under a tag besides that of the image; `None` where there is none.
async fn find_tagged(source: &ImageSource, tag: &str) -> Result<Option<StoredManifest>, ConvertError> {
    match source {
        ImageSource::Registry { client, reference } => {
            let reference = reference.with_tag(tag).expect("hex digits and known ends make a tag");
            match client.manifest(&reference).await {
                Ok(manifest) => Ok(Some(manifest.into())),
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(ImageError::from(error).into()),
            }
        }
        ImageSource::Layout(layout) => match find_tag(&layout.index()?, tag) {
            Some(entry) => Ok(Some(source.manifest_of(entry).await?)),
            None => Ok(None),
        },
        ImageSource::DockerArchive(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_told_from_what_describes_content() {
        let check = |artifact_type: &str, layer: &str, expected: bool| {
            let manifest = serde_json::json!({
                "artifactType": artifact_type,
                "config": {"mediaType": "application/vnd.oci.empty.v1+json"},
                "layers": [{"mediaType": layer}],
            });
            let bytes: Bytes = manifest.to_string().into();
            let stored = StoredManifest { digest: Digest::of(&bytes), bytes, media_type: String::new() };
            assert_eq!(is_signed(&stored), expected, "{artifact_type} {layer}");
        };
        check("application/vnd.cncf.notary.signature", "application/jose+json", true);
        check("application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.dev.sigstore.bundle.v0.3+json", true);
        check("", "application/vnd.dev.cosign.simplesigning.v1+json", true);
        check("", "application/vnd.dsse.envelope.v1+json", true);
        check("application/vnd.in-toto+json", "application/vnd.in-toto+json", true);
        check("application/spdx+json", "application/spdx+json", false);
        check("application/vnd.cyclonedx+json", "application/vnd.cyclonedx+json", false);
        check("application/sarif+json", "application/json", false);
    }
}
