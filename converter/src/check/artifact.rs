//! Entries of an index that are no images: every blob is read. Conversion copies it, so it is the original's.

use format_spec::{Digest, DigestHasher};
use futures_util::StreamExt;

use super::{
    Check, check_embedded,
    report::{ArtifactCheck, Findings, Part},
};
use crate::{
    image::copy::Blobs,
    image::{
        ImageError, ImageSource, StoredManifest,
        manifest::Descriptor,
        resolve::{artifact_kind, parse},
    },
};

impl Check<'_> {
    /// Checks what is no image; `theirs` is what the original has in its place.
    pub(super) async fn artifact(&mut self, ours: &StoredManifest, theirs: Option<&StoredManifest>) {
        let mut findings = Findings::default();
        if let Some(theirs) = theirs.filter(|theirs| theirs.digest != ours.digest) {
            let problem = format!("the original has {}, which must stay as it is", theirs.digest);
            findings.add(Part::Artifact, "manifest", problem);
        }
        let mut blob_count = 0;
        match parse::<Blobs>(ours) {
            Err(error) => findings.add(Part::Artifact, "manifest", error),
            Ok(blobs) => {
                for blob in blobs.iter() {
                    let place = format!("blob {}", blob.digest);
                    check_embedded(&place, blob, &mut findings);
                    if blob.is_elsewhere() {
                        findings.skip(format!("{place}, since it lies elsewhere"));
                    } else if let Err(problem) = check_blob(self.source, blob).await {
                        findings.add(Part::Blob, place, problem);
                    }
                    blob_count += 1;
                }
            }
        }
        self.done.artifacts.push(ArtifactCheck {
            digest: ours.digest,
            kind: artifact_kind(ours).unwrap_or_default(),
            blob_count,
            findings: findings.list,
            further_finding_count: findings.further,
            not_checked: findings.not_checked,
        });
    }
}

/// Reads a blob and compares digest and length; says what is wrong.
async fn check_blob(source: &ImageSource, blob: &Descriptor) -> Result<(), String> {
    // As a conversion does: what the descriptor brings along need not be there.
    if blob.embedded().is_some() {
        return Ok(());
    }
    let Descriptor { digest, size, .. } = blob;
    let mut stream = source.blob_stream(digest).await.map_err(|error: ImageError| error.to_string())?;
    let (mut hasher, mut len) = (DigestHasher::default(), 0);
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| error.message)?;
        hasher.update(&piece);
        len += piece.len() as u64;
        if len > *size {
            return Err(format!("it is longer than the {size} bytes that its descriptor says"));
        }
    }
    let found: Digest = hasher.finish();
    match (found == *digest, len == *size) {
        (true, true) => Ok(()),
        (true, false) => Err(format!("it has {len} bytes, its descriptor says {size}")),
        (false, _) => Err(format!("its digest is {found}")),
    }
}
