//! Seeds made from real structures: what the writers of this project write, and what registries and users send.
//!
//! `cargo run -p lazuli-fuzz --example seeds` writes them into `corpus/`. Inputs that libFuzzer found stand there
//! beside them, under names of their own.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use format_spec::{Digest, Footer, Index, IndexLocation, LazyLayer, dedup, dedup::DedupPiece};
use tar::{Builder, EntryType, Header};
use test_kit::noise;
use tree::merge::merge;

use crate::targets::{cache, layer::convert, start::SEPARATOR};

/// The seeds of a target: names and bytes.
///
/// # Panics
///
/// When a writer of this project fails.
pub fn of(target: &str) -> Vec<(String, Vec<u8>)> {
    let seeds = match target {
        "tar" => with_choices(&[0, 1], tars()),
        "layer" => layers(),
        "index" => indexes(),
        "trees" => (1..=6).map(|number| (format!("noise-{number}"), noise(number, 300))).collect(),
        "blob_end" => blob_ends(),
        "manifest" => manifests(),
        "archive" => archives(),
        "start" => starts(),
        "names" => names(),
        "registry" => answers(),
        "node" => node(),
        "cache" => damaged_files(),
        _ => Vec::new(),
    };
    seeds.into_iter().map(|(name, bytes)| (format!("seed-{name}"), bytes)).collect()
}

type Seeds = Vec<(String, Vec<u8>)>;

fn seed(name: &str, choice: u8, bytes: impl AsRef<[u8]>) -> (String, Vec<u8>) {
    (name.to_owned(), [&[choice], bytes.as_ref()].concat())
}

fn with_choices(choices: &[u8], seeds: Seeds) -> Seeds {
    let each = |choice: u8| seeds.iter().map(move |(name, bytes)| seed(&format!("{name}-{choice}"), choice, bytes));
    choices.iter().flat_map(|choice| each(*choice)).collect()
}

/// Path, type, target of a link, PAX records, content.
type Entry<'a> = (&'a str, EntryType, &'a str, &'a [(&'a str, &'a [u8])], &'a [u8]);

fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, kind, target, records, content) in entries {
        if !records.is_empty() {
            builder.append_pax_extensions(records.iter().copied()).expect("in memory");
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        if kind.is_character_special() || kind.is_block_special() {
            header.set_device_major(8).and_then(|()| header.set_device_minor(1)).expect("a header with devices");
        }
        let appended = match kind {
            EntryType::Link | EntryType::Symlink => builder.append_link(&mut header, path, target),
            _ => builder.append_data(&mut header, path, *content),
        };
        appended.expect("in memory");
    }
    builder.into_inner().expect("in memory")
}

fn tars() -> Seeds {
    use EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};
    let long = "directory/".repeat(20) + "file";
    let sparse: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"20000"),
    ];
    let mut map = b"2\n0\n3\n10000\n2\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"abcde");
    let old_sparse: &[(&str, &[u8])] = &[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"1,2,50,3")];
    let named = |name: &str, bytes| (name.to_owned(), bytes);
    vec![
        named("empty", archive(&[])),
        named("file", archive(&[("etc/passwd", Regular, "", &[], b"root:x:0:0")])),
        named(
            "kinds",
            archive(&[
                ("a", Directory, "", &[], b""),
                ("a/b", Regular, "", &[], b"content"),
                ("a/c", Link, "a/b", &[], b""),
                ("l", Symlink, "a", &[], b""),
                ("l/through", Regular, "", &[], b""),
                ("p", Fifo, "", &[], b""),
                ("c", Char, "", &[], b""),
                ("d", Block, "", &[], b""),
            ]),
        ),
        named(
            "whiteouts",
            archive(&[
                ("a/.wh.b", Regular, "", &[], b""),
                ("a/.wh..wh..opq", Regular, "", &[], b""),
                (".wh.a", Regular, "", &[], b""),
                ("a", Directory, "", &[], b""),
            ]),
        ),
        named(
            "pax",
            archive(&[(
                "a",
                Regular,
                "",
                &[
                    ("path", b"x/\xff"),
                    ("mtime", b"1.5"),
                    ("uid", b"3000000000"),
                    ("SCHILY.xattr.user.a", b"\0=\n"),
                    ("SCHILY.xattr.security.capability", b"\x01\x00\x00\x02"),
                ],
                b"x",
            )]),
        ),
        named("long", archive(&[(&long, Regular, "", &[], b"x"), ("l", Symlink, &long, &[], b"")])),
        named("sparse", archive(&[("a", Regular, "", sparse, &map), ("b", Regular, "", old_sparse, b"abcde")])),
        named(
            "links",
            archive(&[("a", Symlink, "b", &[], b""), ("b", Symlink, "a", &[], b""), ("a/c", Directory, "", &[], b"")]),
        ),
    ]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("in memory")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).expect("in memory")
}

fn layers() -> Seeds {
    let piece = |bytes: Vec<u8>| [&[200], bytes.as_slice()].concat();
    let mut seeds = Vec::new();
    for (name, tar) in tars() {
        let half = tar.len() / 2;
        seeds.push(seed(&format!("{name}-gzip"), 0, piece(gzip(&tar))));
        seeds.push(seed(&format!("{name}-members"), 0x80, piece([gzip(&tar[..half]), gzip(&tar[half..])].concat())));
        seeds.push(seed(&format!("{name}-zstd"), 0x80, piece([zstd(&tar[..half]), zstd(&tar[half..])].concat())));
        seeds.push(seed(&format!("{name}-in-gzip"), 2, piece(tar)));
    }
    seeds
}

fn converted(tar: &[u8]) -> (LazyLayer, Vec<u8>, Index<Vec<u8>>) {
    let (_, layer, blob) = convert(tar, 1 << 20).expect("a tar stream");
    let index = Index::from_compressed(compressed_index(&blob, &layer.index), &layer.index);
    (layer, blob, index.expect("an index that was just written"))
}

fn compressed_index<'a>(blob: &'a [u8], location: &IndexLocation) -> &'a [u8] {
    let at = |offset: u64| usize::try_from(offset).expect("inside the blob");
    &blob[at(location.range().start)..at(location.range().end)]
}

fn convertible() -> impl Iterator<Item = (String, Vec<u8>)> {
    tars().into_iter().filter(|(name, _)| name != "links")
}

fn indexes() -> Seeds {
    let mut seeds = Vec::new();
    for (name, tar) in convertible() {
        let (layer, blob, index) = converted(&tar);
        seeds.push(seed(&format!("{name}-open"), 1, index.as_bytes()));
        let plain_len = u32::try_from(layer.index.plain_len).expect("small").to_le_bytes();
        let wire = [&plain_len, compressed_index(&blob, &layer.index)].concat();
        seeds.push(seed(&format!("{name}-wire"), 3, wire));
        let tree = merge(&[(Digest::of(b"lower"), &index), (Digest::of(b"upper"), &index)]).expect("a tree");
        seeds.push(seed(&format!("{name}-tree"), 1, tree));
    }
    seeds
}

fn blob_ends() -> Seeds {
    let (layer, blob, _) = converted(&tars()[2].1);
    let piece = |offset: u64, len: u64| DedupPiece {
        plain_offset: offset.into(),
        len: len.into(),
        digest: *Digest::of(b"content").as_bytes(),
    };
    let section = dedup::compress(&[piece(0, 5000), piece(8192, 1)]).expect("in memory");
    let plain_len = u32::try_from(section.plain_len).expect("small").to_le_bytes();
    let section = [&plain_len, 12288u64.to_le_bytes().as_slice(), &section.bytes].concat();
    let footer = |hot_len, dedup_len| {
        let frame = Footer::new(&layer.index, hot_len, dedup_len).to_frame();
        [frame, (blob.len() as u64 + hot_len + dedup_len + 16).to_le_bytes().to_vec()].concat()
    };
    let lines = |layer: LazyLayer| {
        let pairs = layer.to_annotations();
        pairs.iter().map(|(key, value)| format!("{key}={value}\n")).collect::<String>()
    };
    vec![
        seed("footer", 1, footer(0, 0)),
        seed("footer-hot", 1, footer(100, 50)),
        seed("dedup", 2, section),
        seed("annotations", 3, lines(layer)),
        seed("annotations-hot", 3, lines(LazyLayer { hot_len: 9, ..layer })),
    ]
}

fn manifests() -> Seeds {
    let digest = Digest::of(b"");
    let descriptor =
        |kind: &str| format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":2}}"#);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}],"annotations":{{"a":"b"}},"subject":{}}}"#,
        descriptor("config.v1+json"),
        descriptor("layer.v1.tar+gzip"),
        descriptor("manifest.v1+json"),
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{digest}","size":1,"platform":{{"architecture":"arm64","os":"linux","variant":"v8","os.version":"1"}},"annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#
    );
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["sh"],"Env":["PATH=/bin"]}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}},"history":[{{"empty_layer":true}}]}}"#
    );
    vec![seed("manifest", 0, manifest), seed("index", 1, index), seed("config", 2, config)]
}

fn archives() -> Seeds {
    use EntryType::{Link, Regular, Symlink};
    let config =
        format!(r#"{{"architecture":"amd64","os":"linux","rootfs":{{"diff_ids":["{}"]}}}}"#, Digest::of(b"tar"));
    let manifest = r#"[{"Config":"c.json","RepoTags":["a:v1"],"Layers":["l/layer.tar"]}]"#;
    let docker = archive(&[
        ("a/layer.tar", Regular, "", &[], b"tar"),
        ("l/layer.tar", Symlink, "../a/layer.tar", &[], b""),
        ("x", Link, "y", &[], b""),
        ("y", Symlink, "x", &[], b""),
        ("c.json", Regular, "", &[], config.as_bytes()),
        ("manifest.json", Regular, "", &[], manifest.as_bytes()),
    ]);
    let blob = Digest::of(b"{}");
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{blob}","size":2,"annotations":{{"org.opencontainers.image.ref.name":"a:v1"}}}}]}}"#
    );
    let path = format!("blobs/sha256/{}", blob.hex());
    let layout = archive(&[
        ("oci-layout", Regular, "", &[], br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", Regular, "", &[], index.as_bytes()),
        (&path, Regular, "", &[], b"{}"),
    ]);
    vec![
        seed("docker", 1, &docker),
        seed("docker-named", 3, docker),
        seed("layout", 1, &layout),
        seed("layout-named", 3, layout),
    ]
}

/// An ELF file of 64 bits with an interpreter, a library and a run path.
fn elf() -> Vec<u8> {
    const HEADER_LEN: u64 = 64;
    const SEGMENT_LEN: u64 = 56;
    let interpreter = b"/lib64/ld-linux-x86-64.so.2\0";
    let strings = b"\0libc.so.6\0$ORIGIN/../lib\0";
    let interpreter_at = HEADER_LEN + 3 * SEGMENT_LEN;
    let dynamic_at = interpreter_at + interpreter.len() as u64;
    let dynamic = [(1, 1), (29, 11), (5, dynamic_at + 5 * 16), (10, strings.len() as u64), (0, 0)];
    let len = dynamic_at + 5 * 16 + strings.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    for half in [3u16, 62] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1u32.to_le_bytes());
    for word in [0, HEADER_LEN, 0] {
        bytes.extend(u64::to_le_bytes(word));
    }
    bytes.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 3, 64, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    let segments =
        [(1u32, 0, len), (3, interpreter_at, interpreter.len() as u64), (2, dynamic_at, dynamic.len() as u64 * 16)];
    for (kind, offset, len) in segments {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(4u32.to_le_bytes());
        for word in [offset, offset, offset, len, len, 8] {
            bytes.extend(u64::to_le_bytes(word));
        }
    }
    bytes.extend_from_slice(interpreter);
    for (tag, value) in dynamic {
        bytes.extend(u64::to_le_bytes(tag));
        bytes.extend(u64::to_le_bytes(value));
    }
    bytes.extend_from_slice(strings);
    bytes
}

/// `ld.so.cache` of one library.
fn loader_cache() -> Vec<u8> {
    let strings = b"libc.so.6\0/lib/libc.so.6\0";
    let mut bytes = b"glibc-ld.so.cache1.1".to_vec();
    for word in [1u32, u32::try_from(strings.len()).expect("short"), 2, 0, 0, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [3u32, 72, 82, 0, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend_from_slice(strings);
    bytes
}

fn starts() -> Seeds {
    let parts = |parts: &[&[u8]]| parts.join(SEPARATOR);
    let (elf, cache) = (elf(), loader_cache());
    let profile = r#"{"version":1,"files":[{"path":"/bin/app","ranges":[[0,5],[6,8]]},{"path":"/lib/libc.so.6"},{"path":"/%ff"}]}"#;
    let config = r#"{"config":{"Entrypoint":["app"],"Cmd":["-x"],"Env":["PATH=/bin"],"WorkingDir":"/app"}}"#;
    let python = b"#!/usr/bin/python3\nimport pkg, os.path as path\nfrom pkg.a import (b,\n    c)\n".as_slice();
    let node = b"const a = require('a'); import x from './b.js'; import('a/a.js')".as_slice();
    let package = br#"{"name":"a","main":"a.js","exports":{".":{"require":"./a.js"}},"type":"module"}"#.as_slice();
    let jar = b"PK\x03\x04META-INF/MANIFEST.MF".as_slice();
    vec![
        seed("elf", 0, parts(&[&elf, &elf, &cache, &elf])),
        seed(
            "script",
            1,
            parts(&[b"#!/bin/sh -e\nset -e\nexec other \"$@\"\n", &elf, &elf, b"include /etc/*.conf\n/lib\n"]),
        ),
        seed("python", 2, parts(&[python, b"import sys\n", b"from . import a\n", b"home = /usr/bin\n", &elf])),
        seed("node", 3, parts(&[node, package, package, b"module.exports = require('./b')", &elf])),
        seed("java", 4, parts(&[jar, b"modules", b"JAVA_VERSION=\"17\"", &elf])),
        seed("ruby", 5, parts(&[b"require 'json'\nrequire_relative 'a'\n", b"x", b"GEM\n", &elf])),
        seed("profile", 6, profile),
        seed("config", 7, config),
    ]
}

fn names() -> Seeds {
    let digest = Digest::of(b"");
    vec![
        seed("reference", 0, format!("127.0.0.1:5000/a/b-c__d.e:v1.0@{digest}")),
        seed("reference-ip6", 0, "[::1]:5000/a"),
        seed("reference-hub", 0, "docker.io/debian:12"),
        seed("location-oci", 1, "oci:/var/images/a:v1"),
        seed("location-archive", 1, "oci-archive:a.tar:v1"),
        seed("location-docker", 1, "docker-archive:a.tar:host/name:v1"),
        seed("platform", 2, "linux/arm64/v8"),
        seed("digest", 3, digest.to_string()),
    ]
}

fn answers() -> Seeds {
    let digest = Digest::of(b"");
    let hosts = r#"
server = "registry.example"
[host."https://mirror.example/v2"]
  capabilities = ["pull", "resolve"]
  ca = ["a.pem"]
  client = [["a.cert", "a.key"]]
  skip_verify = true
  override_path = true
  dial_timeout = "1m30s"
  proxy = "http://proxy.example:3128"
  [host."https://mirror.example/v2".header]
    x-a = ["1", "2"]
"#;
    let referrers = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{digest}","size":1,"artifactType":"a","annotations":{{"k":"v"}}}}]}}"#
    );
    vec![
        seed(
            "challenge",
            0,
            "Bearer realm=\"https://auth.example/token\",service=\"r\",scope=\"repository:a:pull\"\nBasic realm=x",
        ),
        seed("token", 1, r#"{"token":"a.b","access_token":"c","expires_in":300}"#),
        seed("content-range", 2, "bytes 5-9/20"),
        seed("upload-range", 3, "bytes=0-99"),
        seed("hosts", 4, hosts),
        seed("docker-config", 5, r#"{"auths":{"registry.example:5000":{"auth":"YWxhZGRpbjpvcGVuIHNlc2FtZQ=="}}}"#),
        seed("referrers", 6, referrers),
        seed("link", 7, "</v2/a/referrers/x?n=2&last=y>; rel=\"next\""),
        seed("retry-after", 8, "Sun, 06 Nov 1994 08:49:47 GMT"),
        seed("refusal", 9, r#"{"errors":[{"code":"DENIED","message":"no\u001b[1m","detail":{}}]}"#),
        seed("refusal-html", 9, "<!DOCTYPE html><html>"),
    ]
}

fn node() -> Seeds {
    let (layer, _, _) = converted(&tars()[1].1);
    let annotations = layer.to_annotations();
    let lines: String = annotations.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    let chain = Digest::of(b"chain");
    let labels = format!(
        "{lines}containerd.io/snapshot.ref={chain}\ncontainerd.io/snapshot/cri.image-ref=host/a:v1\ncontainerd.io/snapshot/cri.layer-digest={}\n",
        layer.blob
    );
    let remote = serde_json::json!({"layer": layer, "image": "host.example/a:v1"});
    let line = |value: serde_json::Value| value.to_string();
    vec![
        seed("labels", 0, labels),
        seed("filter", 1, "labels.\"plain\"==\"a\\x20\\u0062\",kind~=/^(active|view)$/\nname!=x"),
        seed("config", 2, "address = '/a.sock'\nroot = '/b'\nplain_http = true\n"),
        seed("announce", 3, line(serde_json::json!({"request": "announce_layer", "layer": remote}))),
        seed("mount", 3, line(serde_json::json!({"request": "mount_tree", "layers": [remote, remote]}))),
        seed("release", 3, line(serde_json::json!({"request": "release_tree", "tree": chain}))),
        seed("status", 3, r#"{"request":"status"}"#),
        seed("usage", 4, r#"{"response":"usage","bytes":17}"#),
        seed("error", 4, r#"{"response":"error","message":"no"}"#),
    ]
}

fn damaged_files() -> Seeds {
    let mut seeds = vec![seed("data-short", 4, [0; 100])];
    for (choice, name) in (0..).zip(cache::FILES) {
        seeds.extend(cache::pristine_file(name).map(|bytes| seed(name, choice, bytes)));
    }
    seeds
}
