//! Tests of the tree: each rule of unpacking with the smallest layer that shows it.

use std::collections::BTreeMap;

use format_spec::{Index, IndexLocation, Inode, LayerData, records::WHITEOUT};

use super::*;
use crate::{layer_index::build_index, walker::Segment};

fn entry(kind: EntryKind, path: &str) -> Entry {
    Entry {
        start: 0,
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o640,
        uid: 1,
        gid: 2,
        mtime: Time { seconds: 100, nanoseconds: 5 },
        link_target: Vec::new(),
        device: (0, 0),
        xattrs: BTreeMap::new(),
        size: 0,
        segments: None,
        stored_len: 0,
        padding_len: 0,
    }
}

fn file(path: &str) -> Entry {
    entry(EntryKind::Regular, path)
}

fn sized(path: &str, size: u64) -> Entry {
    Entry { size, stored_len: size, ..file(path) }
}

fn directory(path: &str) -> Entry {
    Entry { mode: 0o700, ..entry(EntryKind::Directory, path) }
}

fn link(kind: EntryKind, path: &str, target: &str) -> Entry {
    Entry { link_target: target.as_bytes().to_vec(), ..entry(kind, path) }
}

fn symlink(path: &str, target: &str) -> Entry {
    link(EntryKind::Symlink, path, target)
}

fn hard_link(path: &str, target: &str) -> Entry {
    link(EntryKind::HardLink, path, target)
}

/// The index of a layer with these entries, whose content lies at 1000, 2000 and so on.
fn index(entries: Vec<Entry>) -> Index<Vec<u8>> {
    let mut tree = LayerTree::default();
    for (number, entry) in (1..).zip(entries) {
        tree.apply(entry, number * 1000).unwrap();
    }
    tree.finish().unwrap();
    let built = build_index(tree).unwrap();
    let frame = format_spec::Frame {
        blob_offset: 0.into(),
        tar_offset: 0.into(),
        compressed_len: 1.into(),
        plain_len: (1 << 20).into(),
        digest: [0; 32],
    };
    let compressed = built
        .builder
        .finish_layer(&LayerData {
            tar_len: 1 << 20,
            space_len: built.space_len,
            extents: &built.extents,
            frames: &[frame],
            ..LayerData::default()
        })
        .unwrap();
    let location: IndexLocation = compressed.location(0);
    Index::from_compressed(&compressed.bytes, &location).unwrap()
}

fn refusal(entries: Vec<Entry>) -> String {
    let mut tree = LayerTree::default();
    let mut results: Vec<_> = entries.into_iter().map(|entry| tree.apply(entry, 0)).collect();
    results.push(tree.finish());
    results.into_iter().find_map(Result::err).expect("refused").to_string()
}

/// All paths, sorted; directories end with a slash, whiteouts with `!`, symlinks show their target,
/// opaque directories end with `//`, implicit ones with `/?`.
fn listing(index: &Index<Vec<u8>>) -> Vec<String> {
    fn walk(index: &Index<Vec<u8>>, inode: &Inode, path: &str, lines: &mut Vec<String>) {
        for (name, number) in index.children(inode) {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            if number == WHITEOUT {
                lines.push(format!("{path}!"));
                continue;
            }
            let child = index.inode(number).unwrap();
            match child.file_type() {
                mode::DIRECTORY => {
                    let opaque = if child.flags.get() & flag::OPAQUE != 0 { "/" } else { "" };
                    let implicit = if child.flags.get() & flag::IMPLICIT != 0 { "?" } else { "" };
                    lines.push(format!("{path}/{opaque}{implicit}"));
                    walk(index, child, &format!("{path}/"), lines);
                }
                mode::SYMLINK => {
                    lines.push(format!("{path} -> {}", String::from_utf8_lossy(index.symlink_target(child))));
                }
                _ => lines.push(path),
            }
        }
    }
    let mut lines = Vec::new();
    walk(index, &index.inodes()[0], "", &mut lines);
    lines
}

fn check(entries: Vec<Entry>, expected: &[&str]) {
    assert_eq!(listing(&index(entries)), expected);
}

fn find(index: &Index<Vec<u8>>, path: &str) -> Inode {
    let number = path
        .split('/')
        .fold(0, |number, name| index.lookup(index.inode(number).unwrap(), name.as_bytes()).expect("the path exists"));
    *index.inode(number).unwrap()
}

#[test]
fn paths_are_cleaned_and_stay_inside() {
    let paths = ["./a", "/b", "c//d", "../../e", "f/../g", "h/./i/"];
    check(paths.map(file).into(), &["a", "b", "c/?", "c/d", "e", "g", "h/?", "h/i"]);
}

#[test]
fn directories_merge_and_the_last_metadata_holds() {
    let first = Entry { xattrs: [(b"user.a".to_vec(), b"1".to_vec())].into(), ..directory("d") };
    let second = Entry { uid: 9, xattrs: [(b"user.b".to_vec(), b"2".to_vec())].into(), ..directory("d/") };
    let index = index(vec![first, file("d/f"), second]);
    assert_eq!(listing(&index), ["d/", "d/f"]);
    let found = find(&index, "d");
    assert_eq!((found.uid.get(), found.mode.get() & 0o7777), (9, 0o700));
    assert_eq!(index.xattrs(&found).map(|(name, _)| name.to_vec()).collect::<Vec<_>>(), [b"user.a", b"user.b"]);
}

#[test]
fn a_directory_may_follow_its_content() {
    let index = index(vec![file("d/e/f"), directory("d")]);
    assert_eq!(listing(&index), ["d/", "d/e/?", "d/e/f"]);
    let implicit = find(&index, "d/e");
    assert_eq!((implicit.mode.get(), implicit.uid.get(), implicit.mtime_seconds()), (0o40755, 0, 0));
}

#[test]
fn later_entries_replace_earlier_ones() {
    check(vec![file("a"), symlink("a", "x")], &["a -> x"]);
    check(vec![directory("a"), file("a/b"), file("a")], &["a"]);
    check(vec![file("a"), directory("a"), file("a/b")], &["a/", "a/b"]);
}

#[test]
fn a_replaced_file_leaves_no_inode_and_no_content() {
    let index = index(vec![sized("a", 10), sized("b", 20), sized("a", 30)]);
    let extents: Vec<_> = index.extents().iter().map(|extent| (extent.tar_offset.get(), extent.len.get())).collect();
    assert_eq!(extents, [(2000, 20), (3000, 30)]);
    assert_eq!(index.inodes().len(), 3);
    assert_eq!(find(&index, "b").plain_range(), 0..20);
    assert_eq!(find(&index, "a").plain_range(), 4096..4126);
}

#[test]
fn hard_links_share_an_inode_and_bring_their_metadata() {
    let late = Entry { uid: 7, ..hard_link("b", "./a") };
    let index = index(vec![sized("a", 10), late, file("c")]);
    assert_eq!(find(&index, "a"), find(&index, "b"));
    assert_eq!((find(&index, "a").uid.get(), find(&index, "a").nlink.get(), find(&index, "a").size.get()), (7, 2, 10));
}

#[test]
fn a_hard_link_keeps_what_its_first_name_loses() {
    let index = index(vec![sized("a", 10), hard_link("b", "a"), sized("a", 20)]);
    assert_eq!((find(&index, "b").size.get(), find(&index, "b").nlink.get()), (10, 1));
    assert_eq!(find(&index, "a").plain_range(), 4096..4116);
}

#[test]
fn a_hard_link_to_a_symlink_is_that_symlink() {
    check(vec![file("f"), symlink("s", "f"), hard_link("h", "s")], &["f", "h -> f", "s -> f"]);
}

#[test]
fn hard_links_need_a_file_of_the_layer() {
    let message = refusal(vec![hard_link("b", "a")]);
    assert_eq!(message, r#"tar entry "b": it is a hard link to "a", which this layer lacks"#);
    assert!(refusal(vec![file("a"), hard_link("a", "a")]).contains("lacks"));
    assert!(refusal(vec![directory("a"), hard_link("b", "a")]).contains("a directory"));
    assert!(refusal(vec![hard_link("b", "/")]).contains("root directory"));
}

#[test]
fn a_hard_link_to_a_whiteout_is_a_whiteout() {
    check(vec![file(".wh.a"), hard_link("b", "a")], &["a!", "b!"]);
}

#[test]
fn whiteouts_come_before_what_has_their_name() {
    check(vec![file("d/.wh.a"), file(".wh.b")], &["b!", "d/?", "d/a!"]);
    check(vec![file(".wh.a"), file("a")], &["a"]);
    check(vec![file(".wh.a"), directory("a")], &["a/"]);
    check(vec![entry(EntryKind::Character, "a")], &["a!"]);
    for existing in [file("a"), directory("a"), symlink("a", "b"), file(".wh.a")] {
        let message = refusal(vec![existing, file(".wh.a")]);
        assert_eq!(message, r#"tar entry ".wh.a": it is a whiteout of what the same layer has already"#);
    }
    assert!(refusal(vec![file(".wh.a"), file("a/b")]).contains("is a whiteout"));
}

#[test]
fn opaque_whiteouts_mark_their_directory() {
    check(vec![directory("d"), file("d/f"), file("d/.wh..wh..opq")], &["d//", "d/f"]);
    check(vec![file("d/.wh..wh..opq"), directory("d")], &["d//"]);
    check(vec![file("d/.wh..wh..opq")], &["d//?"]);
    let root = index(vec![file(".wh..wh..opq")]).inodes()[0];
    assert_eq!(root.flags.get(), flag::IMPLICIT, "overlayfs stacks roots whatever they say");
}

#[test]
fn names_that_aufs_keeps_are_names() {
    check(vec![directory(".wh..wh.plnk"), file(".wh..wh.aufs")], &[".wh.aufs!", ".wh.plnk!"]);
    check(vec![file(".wh..wh.plnk/1.2")], &[".wh..wh.plnk/?", ".wh..wh.plnk/1.2"]);
}

#[test]
fn refuses_whiteouts_of_no_name() {
    for path in [".wh.", ".wh..", "d/.wh..."] {
        assert!(refusal(vec![file(path)]).contains("whiteout of no possible name"), "{path}");
    }
}

#[test]
fn symlinks_of_the_layer_are_followed_to_a_parent() {
    let usr = || vec![directory("usr"), directory("usr/lib")];
    let with = |entries: Vec<Entry>| usr().into_iter().chain(entries).collect::<Vec<_>>();
    check(with(vec![symlink("lib", "usr/lib"), file("lib/a")]), &["lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/a"]);
    check(with(vec![symlink("lib", "/usr/lib"), file("lib/a")]), &["lib -> /usr/lib", "usr/", "usr/lib/", "usr/lib/a"]);
    check(vec![symlink("s", "../../out"), file("s/a")], &["out/?", "out/a", "s -> ../../out"]);
    check(
        with(vec![symlink("usr/s", "lib"), symlink("t", "usr/s"), file("t/a")]),
        &["t -> usr/s", "usr/", "usr/lib/", "usr/lib/a", "usr/s -> lib"],
    );
    check(
        with(vec![file("usr/lib/a"), symlink("lib", "usr/lib"), hard_link("b", "lib/a")]),
        &["b", "lib -> usr/lib", "usr/", "usr/lib/", "usr/lib/a"],
    );
}

#[test]
fn refuses_ways_that_lead_nowhere() {
    assert!(refusal(vec![symlink("a", "b"), symlink("b", "a"), file("a/f")]).contains("too many symbolic links"));
    assert!(refusal(vec![file("a"), file("a/b")]).contains("is no directory"));
    assert!(refusal(vec![file(&"n".repeat(256))]).contains("longer than 255"));
    assert!(refusal(vec![symlink("s", "")]).contains("target of 0 bytes"));
    assert!(refusal(vec![entry(EntryKind::Other(b'S'), "s")]).contains("old GNU sparse"));
    assert!(refusal(vec![entry(EntryKind::Other(b'7'), "s")]).contains("type '7'"));
    assert!(refusal(vec![directory("a"), directory("a/b"), file("a")]).contains("takes this directory away"));
    assert!(refusal(vec![file(&"0123456789/".repeat(400))]).contains("longer than 4095"));
}

#[test]
fn directories_get_their_times_last() {
    let timed = |seconds, entry| Entry { mtime: Time { seconds, nanoseconds: 0 }, ..entry };
    let entries = vec![timed(1, directory("a")), timed(2, directory("b")), timed(3, symlink("b", "a"))];
    let index = index(entries);
    assert_eq!((find(&index, "a").mtime_seconds(), find(&index, "b").mtime_seconds()), (2, 3));
}

#[test]
fn a_layer_of_too_many_entries_is_refused_before_memory_runs_out() {
    let mut tree = LayerTree::default();
    let refused = (0..u64::MAX).find_map(|number| tree.apply(file(&format!("{number:08}")), 0).err()).unwrap();
    assert!(
        refused.to_string().ends_with("the layer's metadata takes more than 256 MiB: split it into several layers")
    );
    assert!(tree.node_count() > 1_000_000, "{}", tree.node_count());
}

/// An extent and a piece of the dedup section are made of each: a layer of six million took 2 GB.
#[test]
fn a_layer_of_sparse_files_in_too_many_pieces_is_refused_before_memory_runs_out() {
    let mut tree = LayerTree::default();
    let segments: Vec<_> = (0..100_000).map(|number| Segment { offset: 2 * number, len: 1 }).collect();
    let sparse = |number: u64| Entry {
        size: 200_000,
        stored_len: 100_000,
        segments: Some(segments.clone()),
        ..file(&number.to_string())
    };
    let refused = (0..160).find_map(|number| tree.apply(sparse(number), 0).err()).unwrap();
    assert!(refused.to_string().contains("takes more than 256 MiB"), "{refused}");
    assert!(tree.node_count() > 10, "{}", tree.node_count());
}

#[test]
fn global_headers_take_what_has_their_name_and_make_their_parents() {
    check(vec![file("a"), entry(EntryKind::Global, "a"), entry(EntryKind::Global, "d/g")], &["d/?"]);
}

#[test]
fn numbers_lose_the_bits_that_linux_drops() {
    let owned = |uid, gid| {
        let found = find(&index(vec![Entry { uid, gid, ..file("f") }]), "f");
        (found.uid.get(), found.gid.get())
    };
    assert_eq!(owned(-2, 1 << 32 | 5), (u32::MAX - 1, 5));
    assert_eq!(owned(-1, i64::from(u32::MAX)), (0, 0), "changes nothing");
    let device = |device| find(&index(vec![Entry { device, ..entry(EntryKind::Block, "d") }]), "d").payload.get();
    assert_eq!(device((0x1001, 0x10_0007)), 1 << 8 | 7);
    check(vec![Entry { device: (0x1000, 1 << 20), ..entry(EntryKind::Character, "d") }], &["d!"]);
}

#[test]
fn a_directory_with_set_group_id_hands_its_group_down() {
    let parent = Entry { mode: 0o2775, gid: 50, ..directory("d") };
    let index = index(vec![parent, file("d/made/f"), Entry { gid: -1, ..file("d/g") }]);
    let made = find(&index, "d/made");
    assert_eq!((made.gid.get(), made.mode.get(), find(&index, "d/g").gid.get()), (50, 0o40755, 50));
}

#[test]
fn the_root_keeps_owner_and_mode() {
    let root = index(vec![directory("./")]).inodes()[0];
    let found = (root.mode.get(), root.uid.get(), root.flags.get(), root.mtime_seconds());
    assert_eq!(found, (0o40755, 0, 0, 100));
}

#[test]
fn times_that_containerd_gives_up_become_1970() {
    let time = |seconds| Entry { mtime: Time { seconds, nanoseconds: 5 }, ..file("f") };
    let last = 9_223_372_036;
    for (seconds, expected) in
        [(-1, (0, 0)), (0, (0, 5)), (1 << 33, (1 << 33, 5)), (last, (last, 5)), (last + 1, (0, 0))]
    {
        let found = find(&index(vec![time(seconds)]), "f");
        assert_eq!((found.mtime_seconds(), found.mtime_nanoseconds.get()), expected, "{seconds}");
    }
}

#[test]
fn metadata_survives() {
    let device = Entry { device: (0x123, 0x45678), mode: 0o4755, ..entry(EntryKind::Block, "d") };
    let index = index(vec![device, symlink("s", "t"), entry(EntryKind::Fifo, "p")]);
    let found = find(&index, "d");
    // new_encode_dev: the minor number's low byte, the major number, the rest of the minor number.
    assert_eq!(found.payload.get(), 0x4561_2378);
    assert_eq!((found.mode.get(), found.uid.get(), found.gid.get()), (0o64755, 1, 2));
    assert_eq!((find(&index, "s").mode.get(), find(&index, "p").mode.get()), (0o120777, 0o10640));
}

fn with_xattrs(entry: Entry, xattrs: &[(&str, &[u8])]) -> Entry {
    let xattrs = xattrs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect();
    Entry { xattrs, ..entry }
}

fn xattr_names(index: &Index<Vec<u8>>, path: &str) -> Vec<String> {
    let inode = find(index, path);
    index.xattrs(&inode).map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

const CAPABILITY: (&str, &[u8]) =
    ("security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

#[test]
fn xattrs_are_those_that_containerd_sets() {
    let all = [("user.a", &b"1"[..]), ("trusted.b", b"2"), ("security.c", b"\0"), ("other.d", b"3"), ("user.e", b"")];
    let entries = [file("f"), directory("d"), symlink("s", "t"), entry(EntryKind::Fifo, "p")];
    let index = index(entries.map(|entry| with_xattrs(entry, &all)).into());
    for (path, names) in
        [("f", &["security.c", "user.a", "user.e"][..]), ("s", &["security.c"]), ("p", &["security.c"])]
    {
        assert_eq!(xattr_names(&index, path), names, "{path}");
    }
    assert_eq!(xattr_names(&index, "d"), xattr_names(&index, "f"));
}

#[test]
fn refuses_xattrs_that_linux_refuses() {
    let long = "user.".to_owned() + &"n".repeat(251);
    for (name, value) in [("", &b"1"[..]), ("user.", b"1"), (&long, b"1"), ("security.capability", b"1")] {
        let message = refusal(vec![with_xattrs(file("f"), &[(name, value)])]);
        assert!(message.contains(&format!("Linux refuses its attribute {name:?}")), "{message}");
    }
}

#[test]
fn a_hard_link_loses_capabilities_that_it_does_not_bring() {
    let capable = || with_xattrs(file("a"), &[CAPABILITY]);
    assert_eq!(xattr_names(&index(vec![capable(), hard_link("b", "a")]), "a"), [] as [&str; 0]);
    let index = index(vec![capable(), with_xattrs(hard_link("b", "a"), &[CAPABILITY])]);
    assert_eq!(xattr_names(&index, "a"), ["security.capability"]);
}

#[test]
fn holes_have_no_extents() {
    let segments =
        vec![Segment { offset: 4096, len: 10 }, Segment { offset: 9000, len: 5 }, Segment { offset: 10000, len: 0 }];
    let sparse = Entry { size: 10000, stored_len: 15, segments: Some(segments), ..file("s") };
    let index = index(vec![sized("f", 1), sparse, sized("g", 1)]);
    let extents = index.extents().iter().map(|extent| (extent.tar_offset.get(), extent.plain_range()));
    assert_eq!(
        extents.collect::<Vec<_>>(),
        [(1000, 0..1), (2000, 8192..8202), (2010, 13096..13101), (3000, 16384..16385)]
    );
    assert_eq!(index.space_len(), 20480);
}
