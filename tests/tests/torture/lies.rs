//! Images that lie: about chain IDs, hot packs, what other layers hold, and the size of an index.

use std::{fs, io::Read as _};

use format_spec::{
    Digest, IndexLocation, LazyLayer,
    dedup::DedupPiece,
    footer::{SKIPPABLE_HEADER_LEN, SkippableKind, skippable_header},
};
use lazuli_tests::{
    Compression, ImageBuilder, LazyBlob, Result, Scratch, TarLayer,
    error::Context as _,
    image::{layout_blob, layout_manifest, replace_layer},
    registry_server::{digest_in, push_to},
    samples::noise,
};

use crate::{images::write_lazy, snapshots::lazy_layer};

/// The content of `/etc/msg` in an honest image.
pub(crate) const GOOD: &[u8] = b"GOOD\n";
/// Its content in an image that lies.
pub(crate) const EVIL: &[u8] = b"EVIL\n";
/// Length of `/data` in the private image, and in the one that claims it.
pub(crate) const CLAIMED_LEN: usize = 64 << 10;

/// `/data` of the private image.
pub(crate) fn secret() -> Vec<u8> {
    noise(501, CLAIMED_LEN)
}

/// `/data` of the image that claims it, in truth.
pub(crate) fn own() -> Vec<u8> {
    noise(502, CLAIMED_LEN)
}

/// The blob of layer `number` of a layout, and what its descriptor says of it.
fn blob_of(layout: &str, number: usize) -> Result<(Vec<u8>, LazyLayer)> {
    let descriptor = &layout_manifest(layout)?["layers"][number];
    let path = layout_blob(layout, digest_in(descriptor)?);
    Ok((fs::read(&path).at("reading", &path)?, lazy_layer(descriptor)?))
}

/// A layer with `/etc/msg`.
pub(crate) fn message(text: &[u8]) -> Result<Vec<u8>> {
    TarLayer::new().directory("etc").file("etc/msg", text).finish()
}

/// `good:1`, honest and ordinary; `good:lazy`, the same converted; and `evil:trap`, with the config of `good` and the
/// layer of another image.
pub(crate) fn publish_trap(scratch: &Scratch, registry: &str) -> Result<()> {
    let original = ImageBuilder::new().layer(message(GOOD)?, Compression::Gzip).write(scratch, "good")?;
    push_to(registry, &original, "good:1")?;
    let good = write_lazy(scratch, "good-lazy", vec![message(GOOD)?])?;
    push_to(registry, &good, "good:lazy")?;
    let evil = write_lazy(scratch, "evil", vec![message(EVIL)?])?;
    let (blob, described) = blob_of(&evil, 0)?;
    replace_layer(&good, 0, &blob, &described)?;
    push_to(registry, &good, "evil:trap").map(drop)
}

/// `hot-lies:lazy`, whose hot pack holds other bytes of `/etc/msg` than its frames.
pub(crate) fn publish_hot_lie(scratch: &Scratch, registry: &str) -> Result<()> {
    let layout = write_lazy(scratch, "hot", vec![message(GOOD)?])?;
    let mut blob = LazyBlob::open(&blob_of(&layout, 0)?.0)?;
    blob.add_hot("/etc/msg", GOOD.len() as u64, 0)?;
    for (_, content) in &mut blob.hot {
        *content = EVIL.to_vec();
    }
    let (bytes, described) = blob.assemble(|_, _| {})?;
    replace_layer(&layout, 0, &bytes, &described)?;
    push_to(registry, &layout, "hot-lies:lazy").map(drop)
}

/// `secret:lazy`, and `claims:lazy`, whose dedup section says that its file is the other's.
pub(crate) fn publish_claims(scratch: &Scratch, registry: &str) -> Result<()> {
    let private = write_lazy(scratch, "secret", vec![TarLayer::new().file("data", secret()).finish()?])?;
    push_to(registry, &private, "secret:lazy")?;
    let layout = write_lazy(scratch, "claims", vec![TarLayer::new().file("data", own()).finish()?])?;
    let mut blob = LazyBlob::open(&blob_of(&layout, 0)?.0)?;
    let inode = blob.inode_at("/data")?;
    let range = blob.index.inode(inode).map(|inode| inode.plain_range()).unwrap_or_default();
    let digest = *Digest::of(&secret()).as_bytes();
    blob.dedup = vec![DedupPiece { plain_offset: range.start.into(), len: (CLAIMED_LEN as u64).into(), digest }];
    let (bytes, described) = blob.assemble(|_, _| {})?;
    replace_layer(&layout, 0, &bytes, &described)?;
    push_to(registry, &layout, "claims:lazy").map(drop)
}

/// `hostile:lazy`, with this many layers whose indexes are a few KiB that become a gigabyte.
pub(crate) fn publish_hostile_index(scratch: &Scratch, registry: &str, layers: u64) -> Result<()> {
    const PLAIN_LEN: u64 = 1 << 30;
    let tars = (0..layers).map(|number| message(format!("{number}\n").as_bytes())).collect::<Result<Vec<_>>>()?;
    let layout = write_lazy(scratch, "hostile", tars)?;
    for number in 0..layers {
        let at = usize::try_from(number).unwrap_or_default();
        let (mut blob, _) = blob_of(&layout, at)?;
        let plain_len = PLAIN_LEN - number;
        let compressed =
            zstd::encode_all(std::io::repeat(0).take(plain_len), 1).context("compressing a gigabyte of zeros")?;
        let offset = blob.len() as u64 + SKIPPABLE_HEADER_LEN;
        let compressed_len = compressed.len() as u64;
        let index = IndexLocation { offset, compressed_len, plain_len, digest: Digest::of(&compressed) };
        blob.extend(skippable_header(SkippableKind::Index, compressed_len).unwrap_or_default());
        blob.extend(compressed);
        let described = LazyLayer { blob: Digest::of(&blob), blob_len: blob.len() as u64, index, hot_len: 0 };
        replace_layer(&layout, at, &blob, &described)?;
    }
    push_to(registry, &layout, "hostile:lazy").map(drop)
}
