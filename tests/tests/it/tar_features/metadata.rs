//! What entries say of themselves: modes, times, extended attributes, access control lists, sizes.

use lazuli_tests::{RawHeader, RawTar};

use super::{Case, refused, same};

pub(crate) fn cases() -> Vec<Case> {
    [modes_and_times(), xattrs(), access_control_lists()].into_iter().flatten().collect()
}

fn with_xattrs(tar: RawTar, header: &RawHeader, xattrs: &[(&str, &[u8])]) -> RawTar {
    let records: Vec<_> = xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value)).collect();
    tar.pax(&records).header(header)
}

fn file_with(xattrs: &[(&str, &[u8])]) -> RawTar {
    with_xattrs(RawTar::new(), &RawHeader::file("file"), xattrs)
}

fn modes_and_times() -> Vec<Case> {
    let modes = [0, 0o7777, 0o4000, 0o2000, 0o1000, 0o644];
    let all_modes = modes.into_iter().fold(RawTar::new(), |tar, mode| {
        tar.header(&RawHeader { mode, uid: 9, ..RawHeader::file(format!("file-{mode:o}")) })
            .header(&RawHeader { mode, gid: 9, ..RawHeader::directory(format!("directory-{mode:o}")) })
            .header(&RawHeader { mode, ..RawHeader::new(b'6', format!("fifo-{mode:o}")) })
            .header(&RawHeader { mode, uid: 8, ..RawHeader::symlink(format!("symlink-{mode:o}"), "target") })
    });
    let times = [
        "0",
        "0.000000001",
        "-0.5",
        "-1",
        "-1.25",
        "-9223372036854775808",
        "1.0300000009",
        "2147483648",
        "8589934592",
        "9223372036.854775807",
        "9223372036.854775808",
        "9223372037",
        "1099511627776",
        "9223372036854775807",
        "5.",
        "+5",
    ];
    let all_times = times.into_iter().enumerate().fold(RawTar::new(), |tar, (number, time)| {
        tar.pax(&[("mtime", time)])
            .file(&format!("file-{number}"), b"")
            .pax(&[("mtime", time)])
            .directory(&format!("directory-{number}"))
            .pax(&[("mtime", time)])
            .header(&RawHeader::symlink(format!("symlink-{number}"), "target"))
    });
    let negative = RawHeader { mtime: -5, ..RawHeader::file("negative") };
    vec![
        same("modes", [all_modes]),
        same("times", [all_times.header(&negative).header(&RawHeader { mtime: 1 << 62, ..RawHeader::file("huge") })]),
        same(
            "files-of-any-size",
            [[0, 1, 511, 512, 513, 4095, 4096, 4097, 70_000, 700_000].into_iter().fold(RawTar::new(), |tar, len| {
                tar.file(&format!("file-{len}"), &lazuli_tests::samples::noise(len as u64, len))
            })],
        ),
    ]
}

/// Effective and permitted cap_net_bind_service, revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn xattrs() -> Vec<Case> {
    let rooted = |root: u8| [&[1, 0, 0, 3][..], &CAPABILITY[4..], &[root, 0, 0, 0]].concat();
    let fifo = RawHeader::new(b'6', "fifo");
    let symlink = RawHeader::symlink("symlink", "target");
    let directory = RawHeader::directory("directory");
    let all: [(&str, &[u8]); 3] = [("user.a", b"1"), ("security.x", b"\0\xff\n="), ("trusted.b", b"2")];
    let long = vec![b'v'; 2000];
    let name = "user.".to_owned() + &"n".repeat(250);
    let capable = || file_with(&[("security.capability", &CAPABILITY)]);
    vec![
        same("capability", [capable()]),
        same("capability-of-a-namespace", [file_with(&[("security.capability", &rooted(0))])]),
        refused(
            "capability-malformed",
            &["\"file\"", "security.capability"],
            [file_with(&[("security.capability", b"x")])],
        ),
        same("capability-lost-by-a-hard-link", [capable().header(&RawHeader::hard_link("link", "file"))]),
        same(
            "capability-kept-by-a-hard-link-that-has-it",
            [with_xattrs(capable(), &RawHeader::hard_link("link", "file"), &[("security.capability", &CAPABILITY)])],
        ),
        same("xattrs-of-files-and-directories", [with_xattrs(file_with(&all), &directory, &all)]),
        same("xattrs-of-links-and-pipes", [with_xattrs(with_xattrs(RawTar::new(), &fifo, &all), &symlink, &all)]),
        same(
            "xattrs-of-unknown-kinds",
            [file_with(&[
                ("other.a", b"1"),
                ("system.a", b"2"),
                ("user", b"3"),
                ("trusted.overlay.opaque", b"y"),
                ("nodots", b"4"),
            ])],
        ),
        same("xattrs-empty-and-long", [file_with(&[("user.empty", b""), ("user.long", &long), (&name, b"1")])]),
        same("xattrs-in-another-form", [RawTar::new().pax(&[("LIBARCHIVE.xattr.user.a", "MQ==")]).file("file", b"")]),
        refused("xattr-name-empty", &["\"file\"", "name"], [file_with(&[("", b"1")])]),
        refused("xattr-name-too-short", &["\"file\"", "\"user.\""], [file_with(&[("user.", b"1")])]),
        refused("xattr-name-too-long", &["\"file\"", "too long"], [file_with(&[(&format!("{name}n"), b"1")])]),
        refused("xattr-value-too-long", &["\"file\"", "too long"], [file_with(&[("user.a", &vec![1; 65537])])]),
    ]
}

/// A list of tag, permissions and identifier.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let entry = |(tag, permissions, id): &(u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [2u32.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn access_control_lists() -> Vec<Case> {
    let none = u32::MAX;
    let named = acl(&[(1, 7, none), (2, 6, 1000), (4, 5, none), (8, 4, 2000), (16, 7, none), (32, 1, none)]);
    let plain = acl(&[(1, 7, none), (4, 5, none), (32, 0, none)]);
    let unordered = acl(&[(4, 5, none), (1, 7, none), (32, 0, none)]);
    let directory = |mode| RawHeader { mode, ..RawHeader::directory("d") };
    vec![
        same("acl", [with_xattrs(file_with(&[(ACCESS, &named)]), &directory(0o750), &[(ACCESS, &named)])]),
        same("acl-that-the-mode-says", [file_with(&[(ACCESS, &plain)])]),
        same("acl-empty", [file_with(&[(ACCESS, &acl(&[]))])]),
        same(
            "acl-of-links-and-pipes",
            [with_xattrs(
                with_xattrs(RawTar::new(), &RawHeader::new(b'6', "p"), &[(ACCESS, &named)]),
                &RawHeader::symlink("s", "t"),
                &[(ACCESS, &named)],
            )],
        ),
        same("acl-of-an-unknown-version", [file_with(&[(ACCESS, &[1, 0, 0, 0])])]),
        same(
            "acl-after-a-mode",
            [with_xattrs(RawTar::new(), &directory(0o750), &[(ACCESS, &named)]).header(&directory(0o701))],
        ),
        same(
            "acl-default-is-inherited",
            [with_xattrs(RawTar::new(), &directory(0o750), &[(DEFAULT, &named)])
                .header(&RawHeader { mode: 0o640, ..RawHeader::file("d/file") })
                .header(&RawHeader { mode: 0o711, ..RawHeader::directory("d/e") })
                .file("d/e/file", b"1")
                .header(&RawHeader::symlink("d/symlink", "t"))
                .header(&RawHeader { mode: 0o600, ..RawHeader::new(b'6', "d/fifo") })
                .pax(&[(format!("SCHILY.xattr.{ACCESS}"), &plain)])
                .header(&RawHeader::file("d/plain"))
                .header(&RawHeader { mode: 0o711, ..RawHeader::directory("d/e") })
                .header(&directory(0o750))],
        ),
        same(
            "acl-default-that-a-mode-says",
            [with_xattrs(RawTar::new(), &directory(0o750), &[(DEFAULT, &plain)])
                .file("d/file", b"1")
                .header(&directory(0o750))],
        ),
        refused("acl-malformed", &["\"file\"", ACCESS], [file_with(&[(ACCESS, &unordered)])]),
        refused("acl-default-of-a-file", &["\"file\"", DEFAULT], [file_with(&[(DEFAULT, &named)])]),
    ]
}
