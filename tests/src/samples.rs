//! Layers that show a lot in a few bytes, used by several tests.

use format_spec::Digest;
pub use test_kit::noise;

use crate::{
    error::Result,
    image::{Compression, ImageBuilder},
    programs::lazuli_ok,
    real_images::busybox,
    registry_server::TestRegistry,
    scratch::Scratch,
    tar_layer::{Attributes, DEFAULT_TIME, TarLayer},
};

/// Length of the large files in [`readable_layers`].
pub const LARGE_FILE_LEN: usize = 2 << 20;
/// How many of them there are.
pub const LARGE_FILE_COUNT: usize = 6;
/// Bytes of the large files together, which do not compress.
pub const LARGE_FILES_LEN: u64 = (LARGE_FILE_LEN * LARGE_FILE_COUNT) as u64;

/// The content of large file `index` of [`readable_layers`].
pub fn large_file(index: usize) -> Vec<u8> {
    noise(index as u64 + 1, LARGE_FILE_LEN)
}

/// What `sha256sum` prints for large file `index`.
pub fn checksum_line(index: usize) -> String {
    format!("{}  /large/{index}\n", Digest::of(&large_file(index)).hex())
}

/// Three layers: a shell, a few small files, and `/large/0`, `/large/1`, ... that fill many frames.
///
/// # Errors
///
/// When the shell cannot be had.
pub fn readable_layers() -> Result<Vec<Vec<u8>>> {
    let mut programs = TarLayer::new().directory("bin").program("bin/busybox", busybox()?);
    for name in ["sh", "cat", "sleep", "sha256sum", "cut", "echo", "rm", "ls", "stat", "mkdir", "tail"] {
        programs = programs.symlink(&format!("bin/{name}"), "busybox");
    }
    let small = TarLayer::new()
        .directory("etc")
        .file("etc/greeting", "good morning\n")
        .file("etc/obsolete", "from the second layer\n")
        .directory_with("tmp", &Attributes::of_mode(0o1777));
    let mut large = TarLayer::new().directory("large").directory("etc").whiteout("etc", "obsolete");
    for index in 0..LARGE_FILE_COUNT {
        large = large.file(&format!("large/{index}"), large_file(index));
    }
    [programs, small, large].into_iter().map(TarLayer::finish).collect()
}

/// Three layers with every kind of entry and every overlay rule that containerd 1.6 accepts.
///
/// Every directory has an entry in every layer that has something in it: containerd gives one without
/// the time of its unpacking.
///
/// # Errors
///
/// When a tar stream cannot be written.
pub fn eventful_layers() -> Result<Vec<Vec<u8>>> {
    let mode = Attributes::of_mode;
    let at = |time: (u64, u32)| Attributes { time, ..mode(0o644) };
    let owned = |user, group| Attributes { owner: (user, group), ..mode(0o640) };
    let marked = |xattrs: &[(&'static str, &[u8])]| Attributes {
        xattrs: xattrs.iter().map(|(name, value)| (*name, value.to_vec())).collect(),
        ..mode(0o755)
    };
    // A capability set of version 2: effective, permitted cap_net_bind_service.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long_name = "n".repeat(255);
    let root = |nanoseconds| Attributes { time: (DEFAULT_TIME, nanoseconds), ..mode(0o755) };

    let mut lowest = TarLayer::new().directory_with("", &root(1));
    let mut deep_path = "deep".to_owned();
    for level in 0..12 {
        lowest = lowest.directory(&deep_path);
        deep_path += &format!("/level-{level}-of-a-deep-path");
    }
    let lowest = lowest
        .directory(&deep_path)
        .file(&format!("{deep_path}/file"), "deep")
        .directory("files")
        .file("files/empty", "")
        .file("files/small", "small\n")
        .file("files/of-one-page", noise(1, 4096))
        .file("files/of-one-page-and-a-byte", noise(2, 4097))
        .file("files/large", noise(3, 3 << 20))
        .file("files/compressible", vec![b'a'; 5 << 20])
        .file_with("files/setuid", &mode(0o4755), "setuid")
        .file_with("files/setgid", &mode(0o2755), "setgid")
        .file_with("files/unreadable", &mode(0), "unreadable")
        .file_with("files/owned", &owned(1000, 2000), "owned")
        .file_with("files/owned-high", &owned(2_000_000, 70_000), "owned by a high number")
        .file_with("files/nanoseconds", &at((DEFAULT_TIME, 123_456_789)), "nanoseconds")
        .file_with("files/epoch", &at((0, 0)), "epoch")
        .file_with("files/future", &at((4_102_444_800, 999_999_999)), "future")
        .file_bytes(b"files/not-utf-8-\xff\xfe", "name of any bytes")
        .file(&format!("files/{long_name}"), "long name")
        .directory("links")
        .hard_link("links/small", "files/small")
        .hard_link("links/small-again", "files/small")
        .symlink("links/relative", "../files/small")
        .symlink("links/dangling", "/nowhere")
        .symlink("links/long", &"target/".repeat(40))
        .directory("special")
        .fifo("special/fifo")
        .character_device("special/null", 1, 3)
        .directory("xattrs")
        .file_with("xattrs/capable", &marked(&[("security.capability", &capability)]), "capable")
        .file_with("xattrs/user", &marked(&[("user.a", b"1"), ("user.binary", b"\x00\xff")]), "user")
        .directory_with("xattrs/directory", &marked(&[("user.on.directory", b"yes")]))
        .directory_with("sticky", &Attributes { time: (DEFAULT_TIME, 5), ..mode(0o1777) })
        .directory("changes")
        .file("changes/deleted", "deleted")
        .file("changes/replaced", "old content")
        .file("changes/to-directory", "file")
        .file("changes/to-symlink", "file")
        .directory("changes/to-file")
        .file("changes/to-file/inside", "inside")
        .directory("changes/opaque")
        .file("changes/opaque/hidden", "hidden")
        .directory("changes/opaque/hidden-directory")
        .directory("changes/deleted-directory")
        .file("changes/deleted-directory/inside", "inside")
        .directory("changes/merged")
        .file("changes/merged/from-below", "from below")
        .directory("changes/deleted-and-made-again")
        .file("changes/deleted-and-made-again/old", "old");
    let middle = TarLayer::new()
        .directory_with("", &root(2))
        .directory_with("changes", &Attributes { time: (DEFAULT_TIME + 1, 7), ..mode(0o750) })
        .whiteout("changes", "deleted")
        .file_with("changes/replaced", &owned(5, 6), "new and longer content")
        .whiteout("changes", "to-directory")
        .directory("changes/to-directory")
        .file("changes/to-directory/inside", "inside")
        .symlink("changes/to-symlink", "replaced")
        .whiteout("changes", "to-file")
        .file("changes/to-file", "now a file")
        .directory("changes/opaque")
        .opaque("changes/opaque")
        .file("changes/opaque/shown", "shown")
        .whiteout("changes", "deleted-directory")
        .directory_with("changes/merged", &Attributes { owner: (3, 4), ..mode(0o711) })
        .file("changes/merged/from-above", "from above")
        .whiteout("changes", "deleted-and-made-again");
    let top = TarLayer::new()
        .directory_with("", &root(3))
        .directory("changes")
        .directory("changes/opaque")
        .file("changes/opaque/shown-by-the-top", "top")
        .file("changes/deleted", "made again")
        .directory("changes/deleted-and-made-again")
        .file("changes/deleted-and-made-again/new", "new")
        .file("links-of-the-top-a", "hard linked")
        .hard_link("links-of-the-top-b", "links-of-the-top-a");
    [lowest, middle, top].into_iter().map(TarLayer::finish).collect()
}

/// A registry with [`readable_layers`] as `sample:original`, an image with a shell that prints its greeting, and
/// converted as `sample:lazy`.
///
/// # Errors
///
/// When a program is missing or fails.
pub fn publish_sample(scratch: &Scratch) -> Result<TestRegistry> {
    let registry = TestRegistry::start(scratch)?;
    let image = ImageBuilder::new().command(&["/bin/cat", "/etc/greeting"]);
    let image = readable_layers()?.into_iter().fold(image, |image, tar| image.layer(tar, Compression::Gzip));
    let original = registry.push(&image.write(scratch, "image")?, "sample:original")?;
    lazuli_ok(["convert", &original, &registry.reference("sample:lazy")])?;
    Ok(registry)
}
