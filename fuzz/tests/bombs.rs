//! Small inputs that would like to become large: each ends with a clear error or with bounded work.
//!
//! The allocator of this crate ends the process of whoever allocates more than `MEMORY_LEN_MAX` bytes at once, so a
//! test that passes has stayed below that.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    fs::File,
    io::{self, Read, Write},
};

use bytes::Bytes;
use converter::{
    blob::{reader::BlobReader, spool::Spool},
    image::manifest::{ImageConfig, ImageManifest},
    layer::{
        LayerError, SpooledLayer,
        compress::{Compressor, FrameOptions},
        spool_layer,
    },
};
use flate2::{Compression, write::GzEncoder};
use format_spec::{
    Digest, Footer, FormatError, Index, IndexBuilder, IndexLocation, LayerData,
    builder::blank_inode,
    footer::FOOTER_FRAME_LEN,
    limits::{TARGET_LEN_MAX, TEXTS_LEN_MAX},
    records::{Frame, mode},
};
use tree::merge::merge;

const MIB: u64 = 1 << 20;

/// The gzip form of `head` and `zero_count` zeros.
fn gzip_of_zeros(head: &[u8], zero_count: u64) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(head).unwrap();
    io::copy(&mut io::repeat(0).take(zero_count), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

fn compressor() -> Compressor {
    Compressor::new(&FrameOptions { level: 1, ..FrameOptions::default() }, 1, 1).unwrap()
}

fn spool(blob: Vec<u8>) -> Result<SpooledLayer, LayerError> {
    let (digest, len) = (Digest::of(&blob), blob.len() as u64);
    let reader = BlobReader::new([Ok::<_, String>(Bytes::from(blob))].into_iter(), digest, len);
    spool_layer(reader, Spool::new(tempfile::tempfile().unwrap()), &compressor())
}

fn refusal(blob: Vec<u8>) -> String {
    spool(blob).map(|_| ()).unwrap_err().to_string()
}

fn file_len(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

/// A tar header in GNU format.
fn header(kind: tar::EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("name").unwrap();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn a_gigabyte_of_zeros_in_a_small_gzip_layer_is_converted_as_it_streams() {
    let blob = gzip_of_zeros(&header(tar::EntryType::Regular, 1 << 30), (1 << 30) + 1024);
    assert!(blob.len() < 8 << 20);
    let spooled = spool(blob).unwrap();
    assert_eq!(spooled.facts.content_len, 1 << 30);
    let frames = spooled.index.frames();
    assert!(frames.len() < 2000 && frames.iter().all(|frame| u64::from(frame.plain_len.get()) <= 4 * MIB));
    let converted = spooled.finish(&[], &compressor()).unwrap();
    assert!(file_len(&converted.file) < MIB);
}

#[test]
fn extended_headers_that_say_gigabytes_are_refused_before_they_are_read() {
    for (kind, len) in [
        (tar::EntryType::XHeader, 8 << 30),
        (tar::EntryType::XGlobalHeader, 8 << 30),
        (tar::EntryType::GNULongName, 1 << 30),
        (tar::EntryType::GNULongLink, 1 << 30),
    ] {
        let message = refusal(header(kind, len));
        assert_eq!(message, "tar entry at byte 0: its extended header is longer than 1 MiB");
    }
}

#[test]
fn a_long_name_of_a_gigabyte_is_not_read_to_its_end() {
    let message = refusal(gzip_of_zeros(&header(tar::EntryType::GNULongName, 1 << 30), 1 << 30));
    assert_eq!(message, "tar entry at byte 0: its extended header is longer than 1 MiB");
}

#[test]
fn a_file_that_says_eight_gigabytes_and_ends_is_truncated() {
    assert!(refusal(header(tar::EntryType::Regular, 8 << 30)).contains("the tar stream ends at byte 512"));
}

/// A layer of entries `name` with this PAX record, as long as containerd reads it.
fn gzip_of_records(key: &str, value_len: usize, entry_count: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    let mut builder = tar::Builder::new(&mut encoder);
    for number in 0..entry_count {
        let key = format!("{key}{number}");
        builder.append_pax_extensions([(key.as_str(), vec![b'x'; value_len].as_slice())]).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o644);
        builder.append_data(&mut header, format!("file{number}"), io::empty()).unwrap();
    }
    builder.finish().unwrap();
    drop(builder);
    encoder.finish().unwrap()
}

#[test]
fn attributes_of_hundreds_of_megabytes_in_a_small_layer_are_refused() {
    let blob = gzip_of_records("SCHILY.xattr.user.a", 60_000, 6000);
    assert!(blob.len() < 8 << 20);
    assert!(!refusal(blob).is_empty());
}

#[test]
fn symbolic_links_in_circles_end() {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, target) in [("a", "b"), ("b", "a")] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, path, target).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    builder.append_data(&mut header, "a/file", io::empty()).unwrap();
    assert!(refusal(builder.into_inner().unwrap()).contains("too many symbolic links"));
}

#[test]
fn hard_links_to_themselves_are_refused() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    builder.append_link(&mut header, "a", "a").unwrap();
    assert!(refusal(builder.into_inner().unwrap()).contains("hard link to \"a\", which this layer lacks"));
}

fn location(compressed: &[u8], plain_len: u64) -> IndexLocation {
    IndexLocation { offset: 0, compressed_len: compressed.len() as u64, plain_len, digest: Digest::of(compressed) }
}

#[test]
fn an_index_that_says_a_gigabyte_allocates_what_arrives() {
    let compressed = zstd::bulk::compress(b"few bytes", 1).unwrap();
    assert_eq!(
        Index::from_compressed(&compressed, &location(&compressed, 1 << 30)).map(|_| ()),
        Err(FormatError::Length { what: "index", expected: 1 << 30, found: 9 })
    );
}

#[test]
fn an_index_that_goes_on_is_read_as_far_as_it_should() {
    let zeros = zstd::encode_all(io::repeat(0).take(2 << 30), 1).unwrap();
    assert!(zeros.len() < 1 << 18);
    assert_eq!(
        Index::from_compressed(&zeros, &location(&zeros, 1000)).map(|_| ()),
        Err(FormatError::Length { what: "index", expected: 1000, found: 1001 })
    );
}

#[test]
fn lengths_beyond_the_limits_are_refused_without_a_look_at_the_bytes() {
    let error = Index::from_compressed(&[], &location(&[], u64::MAX)).map(|_| ()).unwrap_err();
    assert_eq!(error, FormatError::Length { what: "index", expected: 1 << 30, found: u64::MAX });
}

#[test]
fn frames_that_say_too_much_are_refused_with_the_index() {
    let refused = |compressed_len: u32, plain_len: u32| {
        let mut builder = IndexBuilder::default();
        builder.add_inode(blank_inode(mode::DIRECTORY)).unwrap();
        builder.add_directory(0, Vec::<(&[u8], u32)>::new()).unwrap();
        let frame = Frame {
            blob_offset: 0.into(),
            tar_offset: 0.into(),
            compressed_len: compressed_len.into(),
            plain_len: plain_len.into(),
            digest: [0; 32],
        };
        let data = LayerData { tar_len: plain_len.into(), frames: &[frame], ..LayerData::default() };
        builder.finish_layer(&data).is_err()
    };
    assert!(!refused(1, 4 << 20));
    assert!(refused(1, (4 << 20) + 1));
    assert!(refused(u32::MAX, 4 << 20));
    assert!(refused(0, 1));
}

#[test]
fn footer_offsets_past_the_end_are_refused() {
    let index = IndexLocation { offset: 8, compressed_len: 100, plain_len: 200, digest: Digest::of(b"") };
    let blob_len = 108 + FOOTER_FRAME_LEN;
    let check = |index: IndexLocation, hot_len: u64, is_fine: bool| {
        let frame = Footer::new(&index, hot_len, 0).to_frame();
        assert_eq!(Footer::from_frame(&frame, blob_len).is_ok(), is_fine, "{index:?} {hot_len}");
    };
    check(index, 0, true);
    check(IndexLocation { offset: 9, ..index }, 0, false);
    check(IndexLocation { offset: u64::MAX - 50, ..index }, 0, false);
    check(IndexLocation { compressed_len: 101, ..index }, 0, false);
    check(IndexLocation { plain_len: u64::MAX, ..index }, 0, false);
    check(index, 1, false);
}

/// An index whose symbolic links all point into one string.
fn index_of_links(link_count: u32, target_len: u64) -> Result<Vec<u8>, FormatError> {
    let mut builder = IndexBuilder::default();
    builder.add_inode(blank_inode(mode::DIRECTORY)).unwrap();
    let text = vec![b'x'; usize::try_from(target_len).unwrap()];
    let payload = builder.add_string(&text).unwrap();
    let mut children = Vec::new();
    for number in 0..link_count {
        let mut inode = blank_inode(mode::SYMLINK | 0o777);
        inode.payload = payload.into();
        inode.size = target_len.into();
        children.push((format!("{number:08}"), builder.add_inode(inode).unwrap()));
    }
    builder.add_directory(0, children).unwrap();
    builder.layer_bytes(&LayerData::default())
}

#[test]
fn an_index_whose_strings_are_shared_into_gigabytes_is_refused() {
    let count = u32::try_from(TEXTS_LEN_MAX / TARGET_LEN_MAX).unwrap();
    let bytes = index_of_links(count, TARGET_LEN_MAX).unwrap();
    let index = Index::open(bytes).unwrap();
    merge(&[(Digest::of(b""), &index)]).unwrap();
    let rule = |what, number, rule| Err(FormatError::Rule { what, number, rule });
    assert_eq!(
        index_of_links(count + 1, TARGET_LEN_MAX),
        rule("strings", 0, "targets and xattrs have more than 256 MiB together")
    );
    assert_eq!(index_of_links(1, TARGET_LEN_MAX + 1), rule("inode", 1, "its target is longer than 4095 bytes"));
}

#[test]
fn nested_json_is_an_error_and_no_overflow_of_the_stack() {
    let nested = "[".repeat(1 << 20);
    for text in [nested.clone(), format!("{{\"config\":{nested}"), format!("{{\"x\":{nested}")] {
        assert!(serde_json::from_str::<ImageManifest>(&text).is_err());
        assert!(serde_json::from_str::<ImageConfig>(&text).is_err());
        assert!(serde_json::from_str::<control::Request>(&text).is_err());
        assert!(registry::fuzzing::referrers(text.as_bytes()).is_err());
    }
    assert!(snapshotter::config::Settings::parse(&format!("address = {nested}")).is_err());
    assert!(registry::fuzzing::hosts_toml(&format!("ca = {nested}"), "/".as_ref()).is_err());
}
