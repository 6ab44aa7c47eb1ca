//! Indexes that claim a lot. Alone in its process, whose peak of memory it looks at: one test at a time.

// A failed unwrap is a failed test; the layers are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    time::Duration,
};

use bytes::Bytes;
use format_spec::{
    Digest, FormatError, IndexBuilder, IndexLocation, Inode, LayerData, LazyLayer,
    builder::blank_inode,
    limits::SPACE_LEN_FREE,
    records::{mode, section},
    table,
};
use serde_json::json;
use storage::{Cache, CacheError, CacheOptions};
use test_kit::HonestSource;
use tokio::sync::Mutex;
use zerocopy::IntoBytes;

/// The budget of the openings, and what else a process needs: threads, zstd, this test.
const BUDGET: u64 = 64 << 20;
const SMALL_CHANGE: u64 = 16 << 20;

/// Whose test the memory is.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A layer whose blob is an index that decompresses to `head` and zeros.
fn claim(head: &[u8], plain_len: u64) -> (LazyLayer, Bytes) {
    let zeros = io::repeat(0).take(plain_len - head.len() as u64);
    let compressed: Bytes = zstd::encode_all(head.chain(zeros), 1).unwrap().into();
    let (compressed_len, digest) = (compressed.len() as u64, Digest::of(&compressed));
    let index = IndexLocation { offset: 0, compressed_len, plain_len, digest };
    (LazyLayer { blob: digest, blob_len: compressed_len, index, hot_len: 0 }, compressed)
}

/// Header and section table that promise names of this length, all zeros.
fn head_of_names(len: u64) -> Vec<u8> {
    let (mut hasher, part) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    (0..len >> 20).for_each(|_| hasher.update(&part));
    let entry = table::SectionEntry {
        kind: section::NAMES.into(),
        record_len: 1.into(),
        offset: 96.into(),
        len: len.into(),
        crc32: hasher.finalize().into(),
        delta_words: 0.into(),
    };
    let mut header = table::Header {
        magic: table::MAGIC,
        version: table::VERSION.into(),
        section_count: 1.into(),
        features_compatible: 0.into(),
        features_incompatible: 0.into(),
        tar_len: 0.into(),
        space_len: 0.into(),
        index_len: (96 + len).into(),
        reserved: 0.into(),
        crc32: 0.into(),
    };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..60]);
    hasher.update(entry.as_bytes());
    header.crc32 = hasher.finalize().into();
    [header.as_bytes(), entry.as_bytes()].concat()
}

/// A layer of one file that is a hole, whose index claims a plain address space of this length; one for each owner.
fn hole(space_len: u64, owner: u32) -> (LazyLayer, Bytes) {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    let size = space_len.min(SPACE_LEN_FREE);
    let file = Inode { size: size.into(), uid: owner.into(), ..blank_inode(mode::REGULAR | 0o644) };
    let file = builder.add_inode(file).unwrap();
    builder.add_directory(root, [("hole", file)]).unwrap();
    let index = builder.finish_layer(&LayerData { space_len: size, ..LayerData::default() }).unwrap();
    let mut wire = zstd::decode_all(&index.bytes[..]).unwrap();
    let table_end = 64 + 32 * u32::from_le_bytes(wire[12..16].try_into().unwrap()) as usize;
    wire[40..48].copy_from_slice(&space_len.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&wire[..60]);
    hasher.update(&wire[64..table_end]);
    wire[60..64].copy_from_slice(&hasher.finalize().to_le_bytes());
    claim(&wire, wire.len() as u64)
}

/// Peak of this process's memory since [`reset_peak`], in bytes. The kernel adds it up of counters that it keeps a
/// processor, so it may go back a little.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn reset_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_that_claim_gigabytes_take_no_more_memory_than_their_budget() {
    let _alone = ALONE.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let options = CacheOptions { index_memory: BUDGET, ..CacheOptions::default() };
    let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), options).unwrap();
    // No index at all; and one whose header and checksums are right, which is decompressed to its end.
    let mut claims: Vec<_> = (0..6).map(|number| claim(&[number], 1 << 30)).collect();
    claims.extend((0..3).map(|number| claim(&head_of_names((200 + number) << 20), 96 + ((200 + number) << 20))));
    assert!(claims.iter().all(|(layer, _)| layer.blob_len < 64 << 10));
    reset_peak();
    let before = peak();
    let sources: Vec<_> = claims.iter().map(|(_, blob)| HonestSource::new(blob.clone())).collect();
    let openings = claims.iter().zip(&sources).map(|((layer, _), source)| {
        let (cache, layer, source) = (cache.clone(), *layer, source.clone());
        tokio::spawn(async move { cache.layer(&layer, source, json!(null)).await.map(drop) })
    });
    for opening in openings.collect::<Vec<_>>() {
        let error = opening.await.unwrap().unwrap_err();
        assert!(matches!(error, CacheError::Index { .. }), "{error}");
    }
    let taken = peak().saturating_sub(before);
    assert!(taken < BUDGET + SMALL_CHANGE, "{} MiB", taken >> 20);

    // Their bytes were right, so nobody asks for them again.
    for ((layer, _), source) in claims.iter().zip(&sources) {
        let error = cache.layer(layer, source.clone(), json!(null)).await.unwrap_err();
        assert!(matches!(error, CacheError::Index { .. }), "{error}");
        assert_eq!(source.request_count(), 1);
    }
    for name in ["layers", "incoming"] {
        assert_eq!(fs::read_dir(directory.path().join(name)).unwrap().count(), 0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_few_bytes_with_holes_of_terabytes_take_neither_memory_nor_disk() {
    let _alone = ALONE.lock().await;
    for (space_len, is_allowed) in [(SPACE_LEN_FREE, true), (256 << 30, false), (8 << 40, false)] {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), CacheOptions::default()).unwrap();
        let (layer, blob) = hole(space_len, 0);
        assert!(layer.blob_len < 868);
        reset_peak();
        let before = peak();
        let opened = cache.layer(&layer, HonestSource::new(blob), json!(null)).await;
        match opened {
            Ok(layer) => assert!(is_allowed && layer.index().space_len() == space_len),
            Err(CacheError::Index { error: FormatError::Space { space_len: found, .. }, .. }) => {
                assert!(!is_allowed && found == space_len);
                assert_eq!(fs::read_dir(directory.path().join("layers")).unwrap().count(), 0);
            }
            Err(error) => panic!("{error}"),
        }
        // Opening, and the flush that writes the file `presence`.
        drop(cache);
        let taken = peak().saturating_sub(before);
        assert!(taken < SMALL_CHANGE, "{} MiB for {} GiB", taken >> 20, space_len >> 30);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_many_layers_with_holes_takes_neither_memory_nor_disk() {
    let _alone = ALONE.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::open(directory.path(), tokio::runtime::Handle::current(), CacheOptions::default()).unwrap();
    let claims: Vec<_> = (0..40).map(|owner| hole(15 << 30, owner)).collect();
    reset_peak();
    let before = peak();
    let mut layers = Vec::new();
    for (layer, blob) in claims {
        layers.push(cache.layer(&layer, HonestSource::new(blob), json!(null)).await.unwrap());
    }
    cache.flush().unwrap();
    let taken = peak().saturating_sub(before);
    assert!(taken < SMALL_CHANGE, "{} MiB", taken >> 20);
    for layer in &layers {
        let data = layer.complete_file_within(Duration::from_secs(60)).unwrap();
        let presence = fs::metadata(data.with_file_name("presence")).unwrap();
        assert!(presence.len() < 100, "{} bytes", presence.len());
        assert_eq!((fs::metadata(&data).unwrap().len(), fs::metadata(data).unwrap().blocks()), (15 << 30, 0));
    }
}
