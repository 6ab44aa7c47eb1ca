//! Annotations that say something about bytes which a conversion replaces.
//!
//! They would be lies about the new bytes: who believes them, as podman believes what stands there of zstd:chunked
//! layers, refuses the image. An annotation about the content is as true as before and stays.

use std::collections::BTreeMap;

/// Beginnings of annotations that describe one blob. Sources: containers/storage, pkg/chunked; stargz-snapshotter,
/// docs/estargz.md; accelerated-container-image, docs; nydus-snapshotter, pkg/label.
const OF_A_BLOB: [&str; 7] = [
    "io.github.containers.zstd-chunked.",
    // As podman 4 and 5 wrote it first.
    "io.containers.zstd-chunked.",
    "io.containers.estargz.",
    "containerd.io/snapshot/stargz/",
    "containerd.io/snapshot/overlaybd/",
    "containerd.io/snapshot/nydus-",
    // Our own words about a blob that is not this one: those about the new blob come after.
    "containerd.io/snapshot/lazuli/",
];
/// Annotations of manifests, and of what points to them, that name an index over the blobs of their layers.
/// Source: soci-snapshotter, docs/soci-index-manifest-v2.md.
const OF_A_MANIFEST: [&str; 1] = ["com.amazon.soci."];

type Notes = BTreeMap<String, String>;

/// Whether the annotation of a layer describes the blob, not what is in it.
pub(crate) fn describes_blob(key: &str) -> bool {
    OF_A_BLOB.iter().any(|start| key.starts_with(start))
}

/// Whether the annotation of a manifest describes the blobs of its layers.
pub(crate) fn describes_layers(key: &str) -> bool {
    OF_A_MANIFEST.iter().any(|start| key.starts_with(start))
}

/// The annotations that a layer keeps when it gets another blob.
pub(crate) fn for_new_blob(notes: Option<Notes>) -> Notes {
    let mut notes = notes.unwrap_or_default();
    notes.retain(|key, _| !describes_blob(key));
    notes
}

/// The same for a manifest, or an entry that points to it, whose layers get other blobs.
pub(crate) fn for_new_layers(notes: &mut Option<Notes>) {
    let Some(kept) = notes else { return };
    let before = kept.len();
    kept.retain(|key, _| !describes_layers(key));
    // An empty map that was there stays; one that this makes goes.
    if kept.is_empty() && before > 0 {
        *notes = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(keys: &[&str]) -> Option<Notes> {
        Some(keys.iter().map(|key| ((*key).to_owned(), "value".to_owned())).collect())
    }

    #[test]
    fn what_describes_the_old_blob_goes_and_the_rest_stays() {
        let stale = [
            "io.github.containers.zstd-chunked.manifest-checksum",
            "io.github.containers.zstd-chunked.tarsplit-position",
            "io.containers.zstd-chunked.manifest-position",
            "containerd.io/snapshot/stargz/toc.digest",
            "io.containers.estargz.uncompressed-size",
            "containerd.io/snapshot/overlaybd/blob-digest",
            "containerd.io/snapshot/nydus-bootstrap",
            "containerd.io/snapshot/lazuli/hot.len",
        ];
        let kept =
            ["org.example.note", "containerd.io/uncompressed", "containerd.io/snapshot/other", "buildkit/createdat"];
        assert_eq!(for_new_blob(notes(&[&stale[..], &kept].concat())), notes(&kept).unwrap());
        assert_eq!(for_new_blob(None), Notes::new());
    }

    #[test]
    fn an_index_over_the_old_layers_is_named_no_longer() {
        let mut found = notes(&["com.amazon.soci.index-digest", "note"]);
        for_new_layers(&mut found);
        assert_eq!(found, notes(&["note"]));
        let mut found = notes(&["com.amazon.soci.index-digest"]);
        for_new_layers(&mut found);
        assert_eq!(found, None);
        let mut found = notes(&[]);
        for_new_layers(&mut found);
        assert_eq!(found, notes(&[]));
    }
}
