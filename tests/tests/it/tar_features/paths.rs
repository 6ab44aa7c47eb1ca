//! Where entries go: paths, parents, links, several entries for one path.

use lazuli_tests::{RawHeader, RawTar};

use super::{Case, Expected, refused, same, same_without_entry};

pub(crate) fn cases() -> Vec<Case> {
    [names(), parents(), symlinks(), hard_links(), duplicates()].into_iter().flatten().collect()
}

fn pax_path(tar: RawTar, path: &[u8], header: &RawHeader) -> RawTar {
    tar.pax(&[("path", path)]).header(header)
}

fn names() -> Vec<Case> {
    let name = vec![b'n'; 255];
    let deep = |count| b"0123456789/".repeat(count);
    let strange =
        [&b"new\nline"[..], b" space ", b"\xff\xfe\x80", b"colon:", b"back\\slash", b"\"", b"...", b"-", b".wh"];
    let strange = strange.iter().fold(RawTar::new(), |tar, name| tar.entry(&RawHeader::file(name), name));
    let mut long = RawTar::new();
    for count in 1..=300 {
        long = pax_path(long, &deep(count), &RawHeader::directory("x"));
    }
    vec![
        same("name-of-255-bytes", [pax_path(RawTar::new(), &name, &RawHeader::file("x"))]),
        refused("name-of-256-bytes", &["255"], [pax_path(RawTar::new(), &[b'n'; 256], &RawHeader::file("x"))]),
        same("path-of-3300-bytes", [long]),
        refused("path-beyond-4096-bytes", &["4095"], [pax_path(RawTar::new(), &deep(400), &RawHeader::file("x"))]),
        same("names-of-any-bytes", [strange]),
        same(
            "paths-are-cleaned",
            [RawTar::new()
                .directory("d")
                .file("./a", b"1")
                .file("/b", b"2")
                .file("d//c", b"3")
                .file("../../e", b"4")
                .file("d/../g", b"5")
                .file("d/./i/", b"6")
                .directory("d/")],
        ),
        same(
            "root-entries-do-nothing",
            [RawTar::new()
                .header(&RawHeader { mode: 0o700, uid: 7, ..RawHeader::directory("./") })
                .file("..", b"1")
                .header(&RawHeader::symlink("a/..", "x"))
                .file("f", b"1")],
        ),
    ]
}

fn parents() -> Vec<Case> {
    let owned = |path: &str| RawHeader { mode: 0o2750, uid: 5, gid: 6, mtime: 1000, ..RawHeader::directory(path) };
    let below = || RawTar::new().header(&owned("d")).header(&owned("d/e")).file("d/e/below", b"1");
    vec![
        same_without_entry("parents-missing", &["a", "a/b"], [RawTar::new().file("a/b/c", b"1")]),
        same(
            "directory-after-its-content",
            [RawTar::new()
                .file("a/b/c", b"1")
                .header(&RawHeader { mode: 0o711, uid: 3, ..RawHeader::directory("a/b") })
                .header(&RawHeader { mode: 0o1777, ..RawHeader::directory("a") })],
        ),
        same_without_entry("parents-of-a-lower-layer", &["d", "d/e"], [below(), RawTar::new().file("d/e/f", b"2")]),
        same_without_entry(
            "parents-of-the-layer-but-one",
            &["d", "d/e"],
            [below(), RawTar::new().file("d/e/f", b"2"), RawTar::new().file("d/e/g", b"3")],
        ),
        same_without_entry(
            "parents-hidden-by-a-whiteout",
            &["d"],
            [below(), RawTar::new().file(".wh.d", b""), RawTar::new().file("d/g", b"3")],
        ),
        same_without_entry(
            "parents-opaque",
            &["d", "d/e"],
            [below(), RawTar::new().file("d/e/.wh..wh..opq", b"").file("d/e/g", b"3")],
        ),
        same_without_entry(
            "parents-below-an-opaque-directory",
            &["d", "d/e"],
            [below(), RawTar::new().header(&owned("d")).file("d/.wh..wh..opq", b""), RawTar::new().file("d/e/g", b"3")],
        ),
        same_without_entry(
            "parents-with-set-group-id",
            &["d/made", "d/made/below"],
            [RawTar::new()
                .header(&RawHeader { mode: 0o2775, gid: 50, ..RawHeader::directory("d") })
                .file("d/made/below/file", b"1")
                .header(&RawHeader { gid: -1, ..RawHeader::file("d/inherits") })
                .header(&RawHeader { mode: 0o2775, gid: 50, ..RawHeader::directory("d") })],
        ),
        same_without_entry(
            "parents-of-a-lower-layer-below-set-group-id",
            &["d/made"],
            [
                RawTar::new().file("d/made/file", b"1"),
                RawTar::new()
                    .header(&RawHeader { mode: 0o2775, gid: 50, ..RawHeader::directory("d") })
                    .file("d/made/other", b"2"),
            ],
        ),
        refused("parent-is-a-file", &["\"a/b\"", "no directory"], [RawTar::new().file("a", b"").file("a/b", b"")]),
        refused("parent-is-a-whiteout", &["\"a/b\"", "whiteout"], [RawTar::new().file(".wh.a", b"").file("a/b", b"")]),
    ]
}

fn symlinks() -> Vec<Case> {
    let usr = || RawTar::new().directory("usr").directory("usr/lib");
    let (long, too_long) = ("t".repeat(4095), "t".repeat(4096));
    let link = |target: &str| RawTar::new().pax(&[("linkpath", target)]).header(&RawHeader::symlink("s", "x"));
    let end = |tar: RawTar| tar.directory("usr").directory("usr/lib");
    vec![
        same(
            "symlinked-parent",
            [end(usr()
                .header(&RawHeader::symlink("lib", "usr/lib"))
                .header(&RawHeader::symlink("absolute", "/usr/lib"))
                .header(&RawHeader::symlink("twice", "lib"))
                .header(&RawHeader::symlink("usr/up", "../../../usr/lib/../lib"))
                .file("lib/a", b"1")
                .file("absolute/b", b"2")
                .file("twice/c", b"3")
                .file("usr/up/d", b"4")
                .directory("twice/e"))],
        ),
        same_without_entry(
            "symlink-to-nothing-as-parent",
            &["out"],
            [RawTar::new().header(&RawHeader::symlink("s", "../../out")).file("s/a", b"1")],
        ),
        same_without_entry(
            "symlink-of-a-lower-layer-is-replaced",
            &["lib"],
            [
                usr().file("usr/lib/a", b"1").directory("usr/lib").header(&RawHeader::symlink("lib", "usr/other")),
                RawTar::new().file("lib/b", b"2"),
            ],
        ),
        refused(
            "symlink-cycle",
            &["\"a/f\"", "symbolic links"],
            [RawTar::new()
                .header(&RawHeader::symlink("a", "b"))
                .header(&RawHeader::symlink("b", "a"))
                .file("a/f", b"")],
        ),
        same("symlink-target-of-4095-bytes", [link(&long)]),
        refused("symlink-target-of-4096-bytes", &["\"s\"", "4096"], [link(&too_long)]),
        refused("symlink-target-empty", &["\"s\"", "0 bytes"], [RawTar::new().header(&RawHeader::symlink("s", ""))]),
    ]
}

fn hard_links() -> Vec<Case> {
    let file = || RawTar::new().directory("d").directory("e").file("d/a", b"content");
    let end = |tar: RawTar| tar.directory("d").directory("e");
    let link = |path, target| RawHeader::hard_link(path, target);
    let hidden = file().header(&link("e/b", "d/a")).header(&link("e/c", "d/a"));
    vec![
        same(
            "hard-link-across-directories",
            [end(file().header(&RawHeader { mode: 0o4600, uid: 5, gid: 6, mtime: 77, ..link("e/b", "d/a") }))],
        ),
        same(
            "hard-link-through-symlink",
            [end(file()
                .header(&RawHeader::symlink("s", "d"))
                .header(&link("b", "s/a"))
                .header(&link("c", "/d/../d/./a")))],
        ),
        same(
            "hard-link-to-symlink",
            [RawTar::new().header(&RawHeader::symlink("s", "nowhere")).header(&RawHeader {
                uid: 3,
                mtime: 5,
                ..link("t", "s")
            })],
        ),
        same(
            "hard-link-to-fifo-and-device",
            [RawTar::new()
                .header(&RawHeader::new(b'6', "p"))
                .header(&RawHeader { device: (1, 3), ..RawHeader::new(b'3', "d") })
                .header(&link("q", "p"))
                .header(&link("e", "d"))],
        ),
        same(
            "hard-link-to-a-replaced-file",
            [RawTar::new().file("a", b"old").header(&link("b", "a")).file("a", b"new and longer")],
        ),
        same(
            "hard-link-to-a-whiteout",
            [RawTar::new().file("a", b"1").file("b", b"2"), RawTar::new().file(".wh.a", b"").header(&link("b", "a"))],
        ),
        Case {
            name: "hard-link-to-a-hidden-name",
            layers: vec![hidden.clone().finish(), RawTar::new().directory("d").file("d/.wh.a", b"").finish()],
            expected: Expected::SameButLinkCounts,
        },
        Case {
            name: "hard-link-whose-metadata-an-upper-layer-hides",
            layers: vec![hidden.finish(), RawTar::new().directory("e").file("e/b", b"other").finish()],
            expected: Expected::SameButLinkCounts,
        },
        refused(
            "hard-link-to-a-lower-layer",
            &["\"e/b\"", "\"d/a\"", "lacks"],
            [file(), RawTar::new().directory("e").header(&link("e/b", "d/a"))],
        ),
        refused("hard-link-to-nothing", &["\"b\"", "\"a\"", "lacks"], [RawTar::new().header(&link("b", "a"))]),
        refused("hard-link-to-itself", &["\"a\"", "lacks"], [RawTar::new().file("a", b"").header(&link("a", "a"))]),
        refused(
            "hard-link-to-a-directory",
            &["\"b\"", "directory"],
            [RawTar::new().directory("d").header(&link("b", "d"))],
        ),
        refused("hard-link-to-the-root", &["\"b\"", "root"], [RawTar::new().header(&link("b", "/"))]),
        refused(
            "hard-link-ahead-of-its-target",
            &["\"b\"", "lacks"],
            [RawTar::new().header(&link("b", "a")).file("a", b"")],
        ),
    ]
}

fn duplicates() -> Vec<Case> {
    let timed = |path: &str, mtime| RawHeader { mtime, ..RawHeader::directory(path) };
    vec![
        same(
            "file-twice",
            [RawTar::new()
                .file("a", b"first and long")
                .entry(&RawHeader { uid: 3, mtime: 9, ..RawHeader::file("a") }, b"second")],
        ),
        same(
            "directory-twice",
            [RawTar::new()
                .pax(&[("SCHILY.xattr.user.a", "1")])
                .header(&RawHeader { mode: 0o700, ..timed("d", 5) })
                .file("d/f", b"1")
                .pax(&[("SCHILY.xattr.user.b", "2")])
                .header(&RawHeader { mode: 0o711, uid: 4, ..timed("d", 6) })],
        ),
        same("file-then-directory", [RawTar::new().file("a", b"1").directory("a").file("a/b", b"2").directory("a")]),
        same(
            "directory-then-file",
            [RawTar::new()
                .header(&timed("a", 1000))
                .file("a/b", b"1")
                .entry(&RawHeader { mtime: 2000, ..RawHeader::file("a") }, b"2")],
        ),
        same(
            "directory-then-symlink",
            [RawTar::new()
                .header(&timed("e", 1000))
                .header(&timed("a", 2000))
                .header(&RawHeader { mtime: 3000, ..RawHeader::symlink("a", "e") })],
        ),
        same(
            "symlink-then-directory",
            [RawTar::new()
                .directory("e")
                .header(&RawHeader::symlink("a", "e"))
                .directory("a")
                .file("a/f", b"1")
                .directory("a")],
        ),
        refused(
            "directory-taken-away",
            &["\"a/b\"", "takes this directory away"],
            [RawTar::new().directory("a").directory("a/b").file("a", b"1")],
        ),
        refused(
            "directory-replaced-by-a-symlink-to-nothing",
            &["\"a\"", "takes this directory away"],
            [RawTar::new().directory("a").header(&RawHeader::symlink("a", "nowhere"))],
        ),
    ]
}
