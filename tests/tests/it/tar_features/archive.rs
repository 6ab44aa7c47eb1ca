//! The archive itself: dialects of headers, long names, numbers, sparse files, ends.

use lazuli_tests::{
    RawHeader, RawTar,
    raw_tar::{BLOCK_LEN, Magic, pax_records},
    samples::noise,
};

use super::{Case, Expected, refused, same, same_without_entry};

pub(crate) fn cases() -> Vec<Case> {
    [dialects(), pax(), gnu(), numbers(), sparse(), ends()].into_iter().flatten().collect()
}

/// An entry of each kind with this writer's headers.
fn every_kind(magic: Magic) -> RawTar {
    let with = |header: RawHeader| RawHeader { magic, ..header };
    RawTar::new()
        .header(&with(RawHeader { mtime: 1_000_000_000, ..RawHeader::directory("directory/") }))
        .entry(&with(RawHeader { mode: 0o4751, uid: 12, gid: 34, ..RawHeader::file("directory/file") }), b"content")
        .header(&with(RawHeader::file("directory/empty")))
        .entry(&with(RawHeader::new(0, "directory/old-file")), b"old")
        .header(&with(RawHeader { mode: 0o700, ..RawHeader::new(0, "old-directory/") }))
        .header(&with(RawHeader::symlink("symlink", "directory/file")))
        .header(&with(RawHeader::hard_link("hard-link", "directory/file")))
        .header(&with(RawHeader { mode: 0o600, ..RawHeader::new(b'6', "fifo") }))
}

fn dialects() -> Vec<Case> {
    let device = |kind, path, device| RawHeader { device, mode: 0o660, gid: 6, ..RawHeader::new(kind, path) };
    let (prefix, name) = ("p".repeat(155), "n".repeat(100));
    let prefixed = RawHeader { prefix: prefix.clone().into_bytes(), ..RawHeader::file(name.as_bytes()) };
    vec![
        same("ustar", [every_kind(Magic::Ustar)]),
        same("gnu", [every_kind(Magic::Gnu)]),
        same("before-posix", [every_kind(Magic::Old)]),
        same(
            "ustar-prefix",
            [RawTar::new().entry(&prefixed, b"1").pax(&[("path", &prefix)]).header(&RawHeader::directory("x"))],
        ),
        same_without_entry(
            "star-prefix",
            &["prefix"],
            [RawTar::new().block(&RawHeader::file("name"), b"1", |block| {
                block[345..351].copy_from_slice(b"prefix");
                block[476..500].copy_from_slice(b"00000000001\x0000000000002\0");
                block[508..512].copy_from_slice(b"tar\0");
            })],
        ),
        refused(
            "star-times-malformed",
            &["octal"],
            [RawTar::new().block(&RawHeader::file("name"), b"1", |block| {
                block[476..478].copy_from_slice(b"xx");
                block[508..512].copy_from_slice(b"tar\0");
            })],
        ),
        same_without_entry(
            "gnu-prefix-of-old-go",
            &["prefix"],
            [RawTar::new().block(&RawHeader { magic: Magic::Gnu, ..RawHeader::file("name") }, b"1", |block| {
                block[345..351].copy_from_slice(b"prefix");
            })],
        ),
        same(
            "gnu-times",
            [RawTar::new().block(&RawHeader { magic: Magic::Gnu, ..RawHeader::file("name") }, b"1", |block| {
                block[345..357].copy_from_slice(b"00000000017\0");
            })],
        ),
        same(
            "devices",
            [RawTar::new()
                .header(&device(b'3', "character", (1, 3)))
                .header(&device(b'4', "block", (8, 1)))
                .header(&device(b'4', "large-numbers", (0xabc, 0x12345)))
                .header(&device(b'3', "numbers-that-lose-bits", (0x1001, 0x10_0007)))],
        ),
        same(
            "device-numbers-before-posix-are-ignored",
            [RawTar::new().block(&RawHeader { magic: Magic::Old, ..RawHeader::new(b'4', "d") }, b"", |block| {
                block[329..337].copy_from_slice(b"0000007\0");
            })],
        ),
        refused(
            "device-number-malformed",
            &["octal"],
            [RawTar::new().block(&RawHeader::file("file"), b"", |block| block[329] = b'x')],
        ),
        refused(
            "old-gnu-sparse",
            &["\"s\"", "sparse"],
            [RawTar::new().block(&RawHeader { magic: Magic::Gnu, ..RawHeader::new(b'S', "s") }, b"", |_| {})],
        ),
        refused("contiguous-file", &["\"s\"", "'7'"], [RawTar::new().header(&RawHeader::new(b'7', "s"))]),
        refused("unknown-type", &["\"s\"", "'V'"], [RawTar::new().header(&RawHeader::new(b'V', "s"))]),
        same(
            "links-and-devices-have-no-content",
            [RawTar::new()
                .header(&RawHeader { size: Some(999), ..RawHeader::symlink("s", "t") })
                .header(&RawHeader { size: Some(999), ..RawHeader::directory("d") })
                .header(&RawHeader { size: Some(999), ..RawHeader::new(b'6', "p") })
                .file("after", b"1")],
        ),
    ]
}

fn pax() -> Vec<Case> {
    let long = "long/".repeat(40) + "name";
    let local: [(&str, &[u8]); 9] = [
        ("path", b"from-\xff-pax"),
        ("uid", b"3000000000"),
        ("gid", b"70000"),
        ("size", b"5"),
        ("mtime", b"1234567890.123456789"),
        ("atime", b"5.5"),
        ("ctime", b"6"),
        ("uname", b"nobody"),
        ("comment", b"of no interest"),
    ];
    vec![
        same(
            "pax-local",
            [RawTar::new().pax(&local).entry(&RawHeader { size: Some(0), ..RawHeader::file("x") }, b"12345")],
        ),
        same("pax-link-target", [RawTar::new().pax(&[("linkpath", &long)]).header(&RawHeader::symlink("s", "short"))]),
        same("pax-empty-values", [RawTar::new().pax(&[("path", ""), ("uid", ""), ("mtime", "")]).file("file", b"1")]),
        same(
            "pax-last-value-counts",
            [RawTar::new().pax(&[("uid", "x"), ("uid", "7"), ("path", "a"), ("path", "b")]).file("file", b"1")],
        ),
        same("pax-last-header-counts", [RawTar::new().pax(&[("uid", "9")]).pax(&[("gid", "8")]).file("file", b"1")]),
        same(
            "pax-global",
            [RawTar::new()
                .global_pax("pax_global_header", &[("uid", b"9"), ("mtime", b"1"), ("comment", b"of a commit")])
                .file("file", b"1")],
        ),
        same_without_entry(
            "pax-global-makes-its-parents",
            &["tmp"],
            [RawTar::new().global_pax("tmp/GlobalHead.1", &[("uid", b"9")]).file("file", b"1")],
        ),
        same(
            "pax-global-takes-what-has-its-name",
            [RawTar::new()
                .file("a", b"1")
                .file("b", b"2")
                .global_pax("a", &[])
                .global_pax("x", &[("path", b"b")])
                .file("c", b"3")],
        ),
        refused("pax-malformed", &["PAX"], [RawTar::new().entry(&RawHeader::new(b'x', "x"), b"12 path=ab\n")]),
        refused("pax-zero-byte", &["PAX"], [RawTar::new().pax(&[("path", b"a\0b")]).file("file", b"")]),
        refused("pax-zero-byte-in-user", &["PAX"], [RawTar::new().pax(&[("uname", b"a\0b")]).file("file", b"")]),
        refused("pax-no-key", &["PAX"], [RawTar::new().pax(&[("", b"a")]).file("file", b"")]),
        refused("pax-number-malformed", &["PAX"], [RawTar::new().pax(&[("uid", b"1x")]).file("file", b"")]),
        refused("pax-time-malformed", &["PAX"], [RawTar::new().pax(&[("atime", b"1.x")]).file("file", b"")]),
        refused("pax-size-negative", &["size"], [RawTar::new().pax(&[("size", b"-1")]).file("file", b"")]),
        refused("pax-too-long", &["1 MiB"], [RawTar::new().pax(&[("comment", vec![b'c'; 1 << 20])]).file("file", b"")]),
    ]
}

fn gnu() -> Vec<Case> {
    let long = "d/".to_owned() + &"n".repeat(200);
    let target = "../target/".repeat(30);
    vec![
        same(
            "gnu-long-names",
            [RawTar::new()
                .directory("d")
                .gnu_long(b'L', long.as_bytes())
                .file("short", b"1")
                .gnu_long(b'K', target.as_bytes())
                .gnu_long(b'L', b"link-\xfe")
                .header(&RawHeader::symlink("short", "short"))
                .directory("d")],
        ),
        same(
            "gnu-long-name-beats-pax",
            [RawTar::new().gnu_long(b'L', b"gnu").pax(&[("path", "pax"), ("uid", "5")]).file("short", b"1")],
        ),
        same("gnu-long-name-empty", [RawTar::new().gnu_long(b'L', b"").file("short", b"1")]),
        same("gnu-long-name-slash", [RawTar::new().gnu_long(b'L', b"dir/").header(&RawHeader::new(0, "short"))]),
        refused(
            "gnu-long-name-too-long",
            &["1 MiB"],
            [RawTar::new().gnu_long(b'L', &vec![b'n'; 1 << 20]).file("f", b"")],
        ),
    ]
}

fn numbers() -> Vec<Case> {
    let number = |change: fn(&mut RawHeader)| {
        let mut header = RawHeader::file("file");
        change(&mut header);
        RawTar::new().entry(&header, b"12345")
    };
    vec![
        same("base-256-owner", [number(|header| (header.uid, header.gid) = (0x7654_3210, 0xfeed_beef))]),
        same("base-256-time", [number(|header| header.mtime = 1 << 33)]),
        same(
            "base-256-size",
            [number(|header| header.size = Some(5)).block(&RawHeader::file("g"), b"12345", |block| {
                block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
            })],
        ),
        same("owner-minus-one-changes-nothing", [number(|header| (header.uid, header.gid) = (-1, 0xffff_ffff))]),
        same("owner-negative", [number(|header| (header.uid, header.gid) = (-2, -70_000))]),
        same("owner-of-more-than-32-bits", [RawTar::new().pax(&[("uid", "4294967301"), ("gid", "-1")]).file("f", b"")]),
        same("mode-with-type-bits", [number(|header| header.mode = 0o12_4755)]),
        same("mode-negative", [number(|header| header.mode = -2)]),
        same(
            "numbers-padded",
            [RawTar::new().block(&RawHeader::file("file"), b"", |block| {
                block[100..108].copy_from_slice(b"  755 \0 ");
                block[108..116].copy_from_slice(&[0; 8]);
            })],
        ),
        refused(
            "number-not-octal",
            &["octal"],
            [RawTar::new().block(&RawHeader::file("f"), b"", |block| {
                block[100..108].copy_from_slice(b"00009\0\0\0");
            })],
        ),
        refused(
            "number-too-large",
            &["too large"],
            [RawTar::new().block(&RawHeader::file("f"), b"", |block| {
                block[124..136].copy_from_slice(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            })],
        ),
        refused("size-negative", &["negative"], [number(|header| header.size = Some(-5))]),
        refused(
            "checksum-wrong",
            &["checksum"],
            [RawTar::new().bytes(&{
                let mut bytes = RawTar::new().file("file", b"").unfinished();
                bytes[0] = b'g';
                bytes
            })],
        ),
        same(
            "checksum-of-signed-bytes",
            [RawTar::new().bytes(&{
                let mut bytes = RawTar::new().header(&RawHeader::file(b"\xff\xfe")).unfinished();
                bytes[148..156].fill(b' ');
                let sum: i64 = bytes.iter().map(|byte| i64::from(byte.cast_signed())).sum();
                bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                bytes
            })],
        ),
    ]
}

fn sparse() -> Vec<Case> {
    let version = |major, minor| [("GNU.sparse.major", major), ("GNU.sparse.minor", minor)];
    let data = noise(5, 5000);
    let with_map = |map: &str, data: &[u8]| {
        let mut content = map.as_bytes().to_vec();
        content.resize(content.len().next_multiple_of(BLOCK_LEN), 0);
        [content, data.to_vec()].concat()
    };
    let new = |records: &[(&str, &str)], content: &[u8]| {
        let records = [&version("1", "0")[..], records].concat();
        RawTar::new().pax(&records).entry(&RawHeader::file("GNUSparseFile/file"), content).file("after", b"1")
    };
    let many = (0..5000).map(|number| format!("{}\n1\n", number * 3)).collect::<String>();
    vec![
        same(
            "sparse-0-0",
            [RawTar::new()
                .pax(&[
                    ("GNU.sparse.size", "1000000"),
                    ("GNU.sparse.numblocks", "2"),
                    ("GNU.sparse.offset", "4096"),
                    ("GNU.sparse.numbytes", "4000"),
                    ("GNU.sparse.offset", "900001"),
                    ("GNU.sparse.numbytes", "1000"),
                ])
                .file("file", &data)
                .file("after", b"1")],
        ),
        same(
            "sparse-0-1",
            [RawTar::new()
                .pax(&[
                    ("GNU.sparse.size", "20000"),
                    ("GNU.sparse.numblocks", "3"),
                    ("GNU.sparse.map", "0,1,10000,4999,20000,0"),
                    ("GNU.sparse.name", "renamed"),
                ])
                .file("file", &data)],
        ),
        same(
            "sparse-1-0",
            [new(
                &[("GNU.sparse.name", "file"), ("GNU.sparse.realsize", "3000000")],
                &with_map("2\n5\n3000\n2500000\n2000\n", &data),
            )],
        ),
        same(
            "sparse-1-0-many-segments",
            [new(
                &[("GNU.sparse.name", "file"), ("GNU.sparse.realsize", "15000")],
                &with_map(&format!("5000\n{many}"), &data),
            )],
        ),
        same(
            "sparse-without-data",
            [new(
                &[("GNU.sparse.name", "file"), ("GNU.sparse.realsize", "1000000")],
                &with_map("1\n1000000\n0\n", b""),
            )],
        ),
        same(
            "sparse-without-segments",
            [new(&[("GNU.sparse.name", "file"), ("GNU.sparse.realsize", "70000")], &with_map("0\n", b""))],
        ),
        same(
            "sparse-version-unknown",
            [RawTar::new()
                .pax(&[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "other")])
                .file("file", &data)],
        ),
        refused(
            "sparse-map-lies",
            &["sparse map"],
            [new(
                &[("GNU.sparse.name", "file"), ("GNU.sparse.realsize", "3000")],
                &with_map("2\n5\n3000\n2500\n2000\n", &data),
            )],
        ),
        refused(
            "sparse-map-without-end",
            &["sparse map"],
            [new(&[("GNU.sparse.realsize", "3000")], &with_map("2000\n5\n", b""))],
        ),
        refused(
            "sparse-without-count",
            &["PAX"],
            [RawTar::new().pax(&[("GNU.sparse.size", "20000"), ("GNU.sparse.map", "0,5000")]).file("file", &data)],
        ),
        refused(
            "sparse-directory",
            &["sparse map"],
            [RawTar::new()
                .pax(&[("GNU.sparse.size", "0"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", "0,0")])
                .directory("d")],
        ),
    ]
}

fn ends() -> Vec<Case> {
    let unfinished =
        |name, bytes: Vec<u8>| Case { name, layers: vec![bytes], expected: Expected::Same { without_entry: &[] } };
    let truncated =
        |name, words, bytes: Vec<u8>| Case { name, layers: vec![bytes], expected: Expected::Refused(words) };
    let whole = RawTar::new().file("a", b"1").file("b", b"2").unfinished();
    let extended = RawTar::new().file("a", b"1").entry(&RawHeader::new(b'x', "x"), &pax_records(&[("uid", "1")]));
    vec![
        unfinished("empty-layer", Vec::new()),
        unfinished("end-missing", whole.clone()),
        unfinished("end-of-one-block", [whole.clone(), vec![0; BLOCK_LEN]].concat()),
        unfinished("end-within-padding", whole[..whole.len() - 100].to_vec()),
        unfinished("end-after-pax-header", extended.unfinished()),
        unfinished(
            "something-behind-the-end",
            [whole.clone(), vec![0; 2 * BLOCK_LEN], RawTar::new().file("c", b"3").finish(), vec![7; 100]].concat(),
        ),
        truncated("truncated-content", &["ends"], whole[..whole.len() - BLOCK_LEN].to_vec()),
        truncated("truncated-header", &["ends"], whole[..whole.len() - BLOCK_LEN - 100].to_vec()),
        truncated("one-zero-block", &["zeros"], [vec![0; BLOCK_LEN], whole].concat()),
        truncated("no-tar", &["no tar"], vec![b'x'; 1024]),
    ]
}
