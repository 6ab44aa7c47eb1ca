//! Whiteouts and opaque directories, in every order.

use lazuli_tests::{RawHeader, RawTar};

use super::{Case, refused, same, same_without_entry};

const OPAQUE: &str = "d/.wh..wh..opq";

/// A layer with a bit of everything to be hidden.
fn below() -> RawTar {
    RawTar::new()
        .directory("d")
        .file("d/a", b"a")
        .file("d/b", b"b")
        .directory("d/e")
        .file("d/e/f", b"f")
        .header(&RawHeader::symlink("s", "d"))
        .file("file", b"file")
        .directory("d/e")
        .directory("d")
}

fn over(tar: RawTar) -> [RawTar; 2] {
    [below(), tar]
}

pub(crate) fn cases() -> Vec<Case> {
    let d = || RawTar::new().directory("d");
    let device = |path| RawHeader::new(b'3', path);
    let name = ".wh.".to_owned() + &"n".repeat(255);
    vec![
        same("whiteout-of-a-file", over(d().file("d/.wh.a", b"").file(".wh.file", b"").directory("d"))),
        same("whiteout-of-a-directory", over(d().file("d/.wh.e", b"").directory("d"))),
        same("whiteout-of-a-symlink", over(RawTar::new().file(".wh.s", b""))),
        same("whiteout-of-the-missing", over(d().file("d/.wh.missing", b"").file(".wh.missing", b"").directory("d"))),
        same("whiteout-in-a-new-directory", over(RawTar::new().directory("n").file("n/.wh.x", b"").directory("n"))),
        same_without_entry("whiteout-without-its-directory", &["d"], over(RawTar::new().file("d/.wh.a", b""))),
        same(
            "whiteout-of-any-kind-and-content",
            over(
                d().file("d/.wh.a", b"content")
                    .header(&RawHeader::directory("d/.wh.b"))
                    .header(&RawHeader::new(b'V', ".wh.file"))
                    .directory("d"),
            ),
        ),
        same(
            "whiteout-of-a-name-of-255-bytes",
            [
                RawTar::new().pax(&[("path", &name[4..])]).file("x", b"1"),
                RawTar::new().pax(&[("path", &name)]).file("x", b""),
            ],
        ),
        same("whiteout-before-a-file", over(d().file("d/.wh.a", b"").file("d/a", b"new").directory("d"))),
        same(
            "whiteout-before-a-directory",
            over(d().file("d/.wh.e", b"").directory("d/e").file("d/e/new", b"1").directory("d/e").directory("d")),
        ),
        same(
            "whiteout-before-a-symlink",
            over(RawTar::new().file(".wh.file", b"").header(&RawHeader::symlink("file", "d"))),
        ),
        refused(
            "whiteout-after-a-file",
            &["\"d/.wh.a\"", "same layer"],
            over(d().file("d/a", b"new").file("d/.wh.a", b"")),
        ),
        refused(
            "whiteout-after-a-directory",
            &["\"d/.wh.e\"", "same layer"],
            over(d().directory("d/e").file("d/.wh.e", b"")),
        ),
        refused(
            "whiteout-after-a-symlink",
            &["\".wh.s\"", "same layer"],
            over(RawTar::new().header(&RawHeader::symlink("s", "x")).file(".wh.s", b"")),
        ),
        refused(
            "whiteout-twice",
            &["\".wh.file\"", "same layer"],
            over(RawTar::new().file(".wh.file", b"").file(".wh.file", b"")),
        ),
        same(
            "whiteout-through-a-symlink",
            over(d().header(&RawHeader::symlink("t", "d")).file("t/.wh.a", b"").directory("d")),
        ),
        same(
            "whiteout-then-made-again-above",
            [
                below(),
                d().file("d/.wh.e", b"").directory("d"),
                d().directory("d/e").file("d/e/new", b"1").directory("d/e").directory("d"),
            ],
        ),
        same(
            "whiteout-of-what-a-middle-layer-made",
            [
                below(),
                d().file("d/new", b"1").directory("d"),
                d().file("d/.wh.new", b"").file("d/.wh.a", b"").directory("d"),
            ],
        ),
        refused("whiteout-of-no-name", &["\".wh.\"", "no possible name"], over(RawTar::new().file(".wh.", b""))),
        refused("whiteout-of-dot", &["\"d/.wh..\"", "no possible name"], over(d().file("d/.wh..", b""))),
        refused("whiteout-of-dot-dot", &["\"d/.wh...\"", "no possible name"], over(d().file("d/.wh...", b""))),
        same("opaque-first", over(d().file(OPAQUE, b"").file("d/new", b"1").directory("d"))),
        same("opaque-after-children", over(d().file("d/new", b"1").file("d/a", b"2").file(OPAQUE, b"").directory("d"))),
        same("opaque-before-its-directory", over(RawTar::new().file(OPAQUE, b"").file("d/new", b"1").directory("d"))),
        same("opaque-twice", over(d().file(OPAQUE, b"").file(OPAQUE, b"").directory("d"))),
        same(
            "opaque-with-whiteouts",
            over(d().file("d/.wh.a", b"").file(OPAQUE, b"").file("d/.wh.b", b"").directory("d")),
        ),
        same_without_entry("opaque-alone", &["d"], over(RawTar::new().file(OPAQUE, b""))),
        same(
            "opaque-of-a-new-directory",
            over(RawTar::new().directory("n").file("n/.wh..wh..opq", b"").directory("n")),
        ),
        same(
            "opaque-over-a-file",
            over(RawTar::new().directory("file").file("file/.wh..wh..opq", b"").directory("file")),
        ),
        same(
            "opaque-lost-with-its-directory",
            over(
                RawTar::new()
                    .file(OPAQUE, b"")
                    .file("d", b"a file for a while")
                    .directory("d")
                    .file("d/new", b"1")
                    .directory("d"),
            ),
        ),
        same(
            "opaque-in-a-middle-layer",
            [
                below(),
                d().file(OPAQUE, b"").file("d/middle", b"1").directory("d"),
                d().file("d/top", b"1").directory("d"),
            ],
        ),
        same("opaque-root", over(RawTar::new().file(".wh..wh..opq", b"").file("new", b"1"))),
        same("device-0-0-is-a-whiteout", over(d().header(&device("d/a")).header(&device("file")).directory("d"))),
        same("device-0-0-may-be-replaced", over(d().header(&device("d/a")).file("d/a", b"new").directory("d"))),
        same(
            "names-that-aufs-keeps-are-whiteouts",
            over(RawTar::new().directory(".wh..wh.plnk").file(".wh..wh.aufs", b"")),
        ),
        same_without_entry(
            "directories-that-aufs-keeps-are-directories",
            &[".wh..wh.orph"],
            over(RawTar::new().file(".wh..wh.orph/x", b"1").header(&RawHeader::hard_link("y", ".wh..wh.orph/x"))),
        ),
    ]
}
