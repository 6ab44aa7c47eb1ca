//! One layer of any kind: its blob read once, and what annotations and footer say of it.

use std::{io::Read, sync::Arc, thread};

use bytes::Bytes;
use format_spec::{
    Digest, DigestHasher, Footer, Index, LazyLayer, PublicKey,
    annotation::{self, AnnotationError},
    footer::FOOTER_FRAME_LEN,
    signature::SIGNATURE,
};

use super::{
    CheckError,
    lazy::{OpenLayer, Passed, check_blob, open_pieces},
    notes::note_unread,
    report::{Findings, LayerCheck, Part},
};
use crate::{
    blob::{
        reader::{BlobReader, plain_len_max},
        stages::ReadAhead,
        thread::read_blob,
    },
    image::{
        ImageError, ImageSource,
        manifest::{Descriptor, media_type},
    },
    layer::{
        lazy::dedup_range,
        sign::{SignatureFacts, signature_facts, signatures_of},
    },
};

/// Checks one layer of any kind.
pub(crate) async fn check_layer(
    source: &ImageSource,
    descriptor: &Descriptor,
    diff_id: Digest,
    keys: &[PublicKey],
) -> Result<LayerCheck, CheckError> {
    let mut findings = Findings::default();
    let open = open_layer(source, descriptor, &mut findings).await;
    let is_lazy = open.is_lazy;
    let index = open.layer.as_ref().map(|layer| layer.lazy.index.digest);
    let signatures = match is_lazy {
        true => check_signatures(descriptor, index, diff_id, keys, &mut findings),
        false => Vec::new(),
    };
    let passed = read_layer(source, descriptor, is_lazy, open.layer).await?;
    findings.append(passed.findings);
    if let Some((found, _)) = passed.tar
        && found != diff_id
    {
        findings.add(Part::Tar, "tar stream", format!("its digest is {found}, the diff ID in the config is {diff_id}"));
    }
    Ok(LayerCheck {
        digest: descriptor.digest,
        diff_id,
        media_type: descriptor.media_type.clone(),
        compressed_len: descriptor.size,
        is_lazy,
        signatures,
        tar_digest: passed.tar.map(|(digest, _)| digest),
        plain_len: passed.tar.map(|(_, len)| len),
        counts: passed.counts,
        findings: findings.list,
        further_finding_count: findings.further,
        not_checked: findings.not_checked,
    })
}

/// Reads the blob of a layer to its end.
async fn read_layer(
    source: &ImageSource,
    descriptor: &Descriptor,
    is_lazy: bool,
    open: Option<OpenLayer>,
) -> Result<Passed, CheckError> {
    let (digest, len) = (descriptor.digest, descriptor.size);
    // Those that must not be redistributed are unpacked as any others.
    let is_tar = media_type::is_file_system(&descriptor.media_type);
    let mut passed = Passed::default();
    // A layer that lies elsewhere, as those of Windows do, need not be here. A lazy one is: a node reads it here.
    if descriptor.is_elsewhere() && !is_lazy {
        passed.findings.skip(format!("the blob, since it lies elsewhere: {}", descriptor.media_type));
        return Ok(passed);
    }
    let stream = match source.blob_stream(&digest).await {
        Ok(stream) => stream,
        Err(error) => {
            passed.findings.add(Part::Blob, "blob", error);
            return Ok(passed);
        }
    };
    let work = move |mut blob: BlobReader<_>| match open {
        Some(layer) => check_blob(&mut blob, &layer),
        None => check_ordinary(&mut blob, is_tar),
    };
    read_blob(stream, digest, len, work).await.map_err(|error| CheckError::Aborted { digest, error })
}

/// A layer that is not lazy, or whose index cannot be read.
pub(super) fn check_ordinary<P: Iterator<Item = Result<Bytes, String>> + Send>(
    blob: &mut BlobReader<P>,
    is_tar: bool,
) -> Passed {
    let mut passed = Passed::default();
    let plain = if is_tar { hash_plain(blob).map(Some) } else { Ok(None) };
    match (plain, blob.finish()) {
        (_, Err(error)) => passed.findings.add(Part::Blob, "blob", error),
        (Err(error), Ok(())) => {
            passed.findings.add(Part::Tar, "tar stream", format!("it cannot be decompressed: {error}"))
        }
        (Ok(tar), Ok(())) => passed.tar = tar,
    }
    passed
}

/// Digest and length of what a blob decompresses to, which another thread does.
fn hash_plain<P: Iterator<Item = Result<Bytes, String>> + Send>(
    blob: &mut BlobReader<P>,
) -> std::io::Result<(Digest, u64)> {
    thread::scope(|scope| {
        let mut plain = ReadAhead::start(scope, || blob.decompress());
        let (mut hasher, mut len) = (DigestHasher::default(), 0);
        let mut buffer = vec![0; 128 << 10];
        loop {
            match plain.read(&mut buffer)? {
                0 => return Ok((hasher.finish(), len)),
                read => {
                    hasher.update(&buffer[..read]);
                    len += read as u64;
                }
            }
        }
    })
}

/// The parts of a layer that could be opened.
struct Opened {
    /// Whether annotations or footer say that it is lazy.
    is_lazy: bool,
    layer: Option<OpenLayer>,
}

/// Fetches index and dedup section of a lazy layer: where its annotations say, or where its footer does.
async fn open_layer(source: &ImageSource, descriptor: &Descriptor, findings: &mut Findings) -> Opened {
    // A footer that cannot be read here is named by the pass over the blob.
    let in_footer = read_footer(source, descriptor).await.ok().flatten();
    let annotated = annotated_layer(descriptor, in_footer.as_ref(), findings);
    let is_annotated = descriptor.annotation(annotation::VERSION).is_some();
    let is_lazy = is_annotated || in_footer.is_some();
    let mut layer = None;
    for (who, lazy) in [("annotations", annotated), ("footer", in_footer.filter(|found| Some(*found) != annotated))] {
        let Some(lazy) = lazy.filter(|_| layer.is_none()) else { continue };
        match open_index(source, descriptor, &lazy).await {
            Ok(index) => layer = Some((lazy, index)),
            Err(problem) => findings.add(Part::Index, format!("index where the {who} say"), problem),
        }
    }
    let Some((lazy, index)) = layer else {
        if is_lazy {
            findings.skip("frames, files, hot pack and dedup section, since no index can be read");
        }
        return Opened { is_lazy, layer: None };
    };
    note_unread("index", Part::Index, index.unread(), findings);
    if index.tar_len() > plain_len_max(lazy.blob_len) {
        let problem = format!("it says {} bytes of tar, more than any layer has that is so short", index.tar_len());
        findings.add(Part::Index, "index", problem);
        return Opened { is_lazy, layer: None };
    }
    if index.layers().len() > 0 {
        findings.add(Part::Index, "index", "it names layers, as only the merged tree of a node does");
    }
    // Everything behind the index is where the index says.
    if lazy.hot_len != index.hot_len() && findings.list.iter().all(|finding| finding.part != Part::Annotation) {
        let problem = format!("it is {}, the hot pack has {} bytes", lazy.hot_len, index.hot_len());
        findings.add(Part::Annotation, format!("annotation {}", annotation::HOT_LEN), problem);
    }
    let lazy = LazyLayer { hot_len: index.hot_len(), ..lazy };
    let pieces = match dedup_range(&lazy, &index) {
        None => Vec::new(),
        Some(range) => match source.blob_range(descriptor, range).await {
            Ok(compressed) => open_pieces(&compressed, &index, findings),
            Err(error) => {
                findings.add(Part::Dedup, "dedup section", error);
                Vec::new()
            }
        },
    };
    Opened { is_lazy, layer: Some(OpenLayer { lazy, index: Arc::new(index), pieces: pieces.into() }) }
}

/// The layer that the annotations describe. Mistakes in them are findings: by what the footer says, where it
/// can be read.
fn annotated_layer(
    descriptor: &Descriptor,
    in_footer: Option<&LazyLayer>,
    findings: &mut Findings,
) -> Option<LazyLayer> {
    let parsed = LazyLayer::from_annotations(|key| descriptor.annotation(key));
    let of_descriptor = |lazy| LazyLayer { blob: descriptor.digest, blob_len: descriptor.size, ..lazy };
    let annotated = parsed.as_ref().ok().copied().flatten().map(of_descriptor);
    match (in_footer, &parsed) {
        (Some(_), Ok(None)) => {
            let problem =
                "it is missing: the layer is lazy by its footer, but no node will know; convert the image again";
            findings.add(Part::Annotation, format!("annotation {}", annotation::VERSION), problem);
        }
        (Some(expected), _) => compare_annotations(descriptor, expected, findings),
        (None, Ok(_)) => {
            annotated.iter().for_each(|expected| compare_annotations(descriptor, expected, findings));
        }
        (None, Err(error)) => {
            let key = match error {
                AnnotationError::Missing(key) | AnnotationError::Malformed { key, .. } => *key,
                AnnotationError::Version(_) => annotation::VERSION,
            };
            findings.add(Part::Annotation, format!("annotation {key}"), error);
        }
    }
    annotated
}

/// Adds a finding for every annotation that is not that of the layer `expected`.
fn compare_annotations(descriptor: &Descriptor, expected: &LazyLayer, findings: &mut Findings) {
    let expected = expected.to_annotations();
    for key in annotation::ALL {
        let (found, expected) = (descriptor.annotation(key), expected.get(key).map(String::as_str));
        if found != expected {
            let [found, expected] = [found, expected].map(|value| value.unwrap_or("nothing"));
            findings.add(Part::Annotation, format!("annotation {key}"), format!("it is {found}, expected {expected}"));
        }
    }
}

/// The signatures of a lazy layer. Those of other keys than the given ones prove nothing and are no finding.
fn check_signatures(
    descriptor: &Descriptor,
    index: Option<Digest>,
    diff_id: Digest,
    keys: &[PublicKey],
    findings: &mut Findings,
) -> Vec<SignatureFacts> {
    let mut add = |problem: String| findings.add(Part::Signature, format!("annotation {SIGNATURE}"), problem);
    let missing = || "there is no signature of the given keys".to_owned();
    let (signed, index) = match (signatures_of(descriptor), index) {
        (Some(Ok(signed)), Some(index)) => (signed, index),
        (Some(Err(error)), _) => {
            add(error.to_string());
            return Vec::new();
        }
        (None, _) | (_, None) => {
            if !keys.is_empty() {
                add(missing());
            }
            return Vec::new();
        }
    };
    if signed.tar != diff_id {
        add(format!("it is about the tar stream {}, the diff ID in the config is {diff_id}", signed.tar));
    }
    let facts = signature_facts(&signed, &index, keys);
    for wrong in facts.iter().filter(|facts| facts.is_verified == Some(false)) {
        add(format!("that of key {} does not verify", wrong.key));
    }
    if !keys.is_empty() && facts.iter().all(|facts| facts.is_verified.is_none()) {
        add(missing());
    }
    facts
}

/// The layer that the last bytes of a zstd blob describe.
async fn read_footer(source: &ImageSource, descriptor: &Descriptor) -> Result<Option<LazyLayer>, ImageError> {
    let is_zstd = media_type::ZSTD_LAYERS.contains(&descriptor.media_type.as_str());
    let Some(start) = descriptor.size.checked_sub(FOOTER_FRAME_LEN).filter(|_| is_zstd) else { return Ok(None) };
    let frame = source.blob_range(descriptor, start..descriptor.size).await?;
    let found = Footer::from_frame(&frame, descriptor.size).ok().flatten();
    let (blob, blob_len) = (descriptor.digest, descriptor.size);
    Ok(found.map(|(index, hot_len)| LazyLayer { blob, blob_len, index, hot_len }))
}

async fn open_index(source: &ImageSource, descriptor: &Descriptor, lazy: &LazyLayer) -> Result<Index<Vec<u8>>, String> {
    let compressed = source.blob_range(descriptor, lazy.index.range()).await.map_err(|error| error.to_string())?;
    Index::from_compressed(&compressed, &lazy.index).map_err(|error| error.to_string())
}
