//! The overlay rules against a model that applies one layer after the other to a map of paths.
//!
//! Random stacks of small layers over few names, so that entries of different layers meet often: `merge`
//! must show exactly the paths, kinds, metadata and hard links of the model. What it found wrong once, and
//! what the rules are made for, stands below as tests of its own.

use std::collections::BTreeMap;

use format_spec::builder::{blank_inode, implicit_directory};
use proptest::prelude::*;

use super::*;

type Path = Vec<&'static str>;

/// An entry of a layer. The number tells inodes apart: it becomes the modification time.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory {
        metadata: Option<u32>,
        is_opaque: bool,
        children: BTreeMap<&'static str, Node>,
    },
    File(u32),
    /// One of several names of a file.
    Link(u32),
    Symlink(u32),
    Whiteout,
}

/// An entry of the merged tree.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    kind: u32,
    /// `None` for a directory that no layer names itself.
    metadata: Option<u32>,
    /// The layer that the inode is from.
    layer: u32,
    nlink: u32,
}

fn directory(children: impl IntoIterator<Item = (&'static str, Node)>) -> Node {
    Node::Directory { metadata: None, is_opaque: false, children: children.into_iter().collect() }
}

fn named_directory(metadata: u32, children: impl IntoIterator<Item = (&'static str, Node)>) -> Node {
    Node::Directory { metadata: Some(metadata), is_opaque: false, children: children.into_iter().collect() }
}

fn opaque_directory(metadata: u32, children: impl IntoIterator<Item = (&'static str, Node)>) -> Node {
    Node::Directory { metadata: Some(metadata), is_opaque: true, children: children.into_iter().collect() }
}

/// The index of a layer. Numbers of files that end in 5 have extended attributes.
fn index_of(root: &Node) -> Index<Vec<u8>> {
    let mut builder = IndexBuilder::default();
    let mut links = BTreeMap::new();
    let root_number = add_inode(&mut builder, root, &mut links);
    let mut queue = VecDeque::from([(root_number, root)]);
    while let Some((number, node)) = queue.pop_front() {
        let Node::Directory { children, .. } = node else { unreachable!("only directories are queued") };
        let mut entries = Vec::new();
        for (name, child) in children {
            let child_number = add_inode(&mut builder, child, &mut links);
            if matches!(child, Node::Directory { .. }) {
                queue.push_back((child_number, child));
            }
            entries.push((name, child_number));
        }
        builder.add_directory(number, entries).unwrap();
    }
    Index::open(builder.finish_tree(&[]).unwrap()).unwrap()
}

fn add_inode(builder: &mut IndexBuilder, node: &Node, links: &mut BTreeMap<u32, u32>) -> u32 {
    let inode = match node {
        Node::Whiteout => return WHITEOUT,
        Node::Link(number) => {
            if let Some(inode) = links.get(number) {
                return *inode;
            }
            file_inode(builder, *number)
        }
        Node::File(number) => file_inode(builder, *number),
        Node::Symlink(number) => {
            let target = format!("target {number}");
            let payload = builder.add_string(target.as_bytes()).unwrap();
            Inode {
                mtime_seconds: u64::from(*number).into(),
                payload: payload.into(),
                size: (target.len() as u64).into(),
                ..blank_inode(mode::SYMLINK | 0o640)
            }
        }
        Node::Directory { metadata, is_opaque, .. } => {
            let inode = match metadata {
                Some(number) => {
                    Inode { mtime_seconds: u64::from(*number).into(), ..blank_inode(mode::DIRECTORY | 0o700) }
                }
                None => implicit_directory(),
            };
            let opaque = if *is_opaque { flag::OPAQUE } else { 0 };
            Inode { flags: (inode.flags.get() | opaque).into(), ..inode }
        }
    };
    let number = builder.add_inode(inode).unwrap();
    if let Node::Link(link) = node {
        links.insert(*link, number);
    }
    number
}

fn file_inode(builder: &mut IndexBuilder, number: u32) -> Inode {
    let xattrs = if number % 10 == 5 { xattrs_of(number, true) } else { Vec::new() };
    Inode {
        mtime_seconds: u64::from(number).into(),
        xattrs: builder.add_xattrs(xattrs).unwrap().into(),
        ..blank_inode(mode::REGULAR | 0o644)
    }
}

fn xattrs_of(number: u32, with_private: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let private = with_private.then(|| (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()));
    private.into_iter().chain([(b"user.number".to_vec(), number.to_string().into_bytes())]).collect()
}

/// What a container sees, by applying layer after layer.
fn model(layers: &[Node]) -> BTreeMap<Path, Shown> {
    let mut shown = BTreeMap::new();
    // Which inode stands under a path: link counts come from here.
    let mut identities = BTreeMap::new();
    for (layer, root) in (0..).zip(layers) {
        apply(&mut shown, &mut identities, &layers[..layer as usize], Path::new(), root);
    }
    identities.retain(|path, _| shown.contains_key(path));
    let paths: Vec<Path> = shown.keys().cloned().collect();
    for path in paths {
        let nlink = match identities.get(&path) {
            Some(identity) => identities.values().filter(|other| *other == identity).count(),
            None => {
                let is_child = |other: &Path| other.len() == path.len() + 1 && other.starts_with(&path);
                2 + shown.iter().filter(|(other, child)| is_child(other) && child.kind == mode::DIRECTORY).count()
            }
        };
        shown.get_mut(&path).unwrap().nlink = u32::try_from(nlink).unwrap();
    }
    shown
}

fn apply(
    shown: &mut BTreeMap<Path, Shown>,
    identities: &mut BTreeMap<Path, (u32, u32)>,
    below: &[Node],
    path: Path,
    node: &Node,
) {
    let layer = u32::try_from(below.len()).unwrap();
    let is_merging = matches!(node, Node::Directory { is_opaque: false, .. })
        && shown.get(&path).is_some_and(|below| below.kind == mode::DIRECTORY);
    if !is_merging {
        shown.retain(|other, _| !other.starts_with(&path));
        identities.retain(|other, _| !other.starts_with(&path));
    }
    let (kind, metadata) = match node {
        Node::Whiteout => return,
        Node::Directory { metadata: None, .. } if inherited(below, &path).is_some() => {
            (mode::DIRECTORY, inherited(below, &path))
        }
        Node::Directory { metadata, .. } => (mode::DIRECTORY, Some((*metadata, layer))),
        Node::File(number) | Node::Link(number) => (mode::REGULAR, Some((Some(*number), layer))),
        Node::Symlink(number) => (mode::SYMLINK, Some((Some(*number), layer))),
    };
    let (metadata, from) = metadata.unwrap();
    shown.insert(path.clone(), Shown { kind, metadata, layer: from, nlink: 0 });
    match node {
        Node::Directory { children, .. } => {
            for (name, child) in children {
                let path = path.iter().copied().chain([*name]).collect();
                apply(shown, identities, below, path, child);
            }
        }
        Node::File(number) | Node::Link(number) | Node::Symlink(number) => {
            identities.insert(path, (layer, *number));
        }
        Node::Whiteout => {}
    }
}

/// Metadata for a directory that a layer only passes through: that of the uppermost layer below which names
/// it, unless one between them has something else there or on the way; where none does, of the lowest.
fn inherited(below: &[Node], path: &[&str]) -> Option<(Option<u32>, u32)> {
    let mut lowest = None;
    for (layer, root) in below.iter().enumerate().rev() {
        let mut node = Some(root);
        for name in path {
            node = match node {
                Some(Node::Directory { children, .. }) => children.get(name),
                Some(_) => return lowest,
                None => None,
            };
        }
        let layer = u32::try_from(layer).unwrap();
        match node {
            Some(Node::Directory { metadata: Some(metadata), .. }) => return Some((Some(*metadata), layer)),
            Some(Node::Directory { metadata: None, .. }) => lowest = Some((None, layer)),
            None => {}
            Some(_) => return lowest,
        }
    }
    lowest
}

fn merged(layers: &[Node]) -> Index<Vec<u8>> {
    let indexes: Vec<_> = layers.iter().map(index_of).collect();
    let layers: Vec<_> = (0u8..).zip(&indexes).map(|(number, index)| (Digest::of(&[number]), index)).collect();
    let tree = Index::open(merge(&layers).unwrap()).unwrap();
    tree.check().unwrap();
    assert!(tree.layers().eq(layers.iter().map(|(digest, _)| *digest)));
    tree
}

/// What the merged tree shows.
fn walk(tree: &Index<Vec<u8>>) -> BTreeMap<Path, Shown> {
    let mut shown = BTreeMap::new();
    let mut inodes_seen = BTreeMap::new();
    let mut queue = VecDeque::from([(Path::new(), 0)]);
    while let Some((path, number)) = queue.pop_front() {
        let inode = tree.inode(number).unwrap();
        let seconds = u32::try_from(inode.mtime_seconds()).unwrap();
        let metadata = (!inode.is_directory() || seconds != 0).then_some(seconds);
        let (kind, layer, nlink) = (inode.file_type(), inode.layer.get(), inode.nlink.get());
        shown.insert(path.clone(), Shown { kind, metadata, layer, nlink });
        if !inode.is_directory() {
            let identity = inodes_seen.entry((layer, seconds)).or_insert(number);
            assert_eq!(*identity, number, "{path:?} has an inode of its own");
        }
        let xattrs: Vec<_> = tree.xattrs(inode).map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        let has_xattrs = inode.is_regular() && seconds % 10 == 5;
        assert_eq!(xattrs, if has_xattrs { xattrs_of(seconds, false) } else { Vec::new() }, "{path:?}");
        if inode.is_symlink() {
            assert_eq!(inode.mode, mode::SYMLINK | 0o777, "{path:?}");
            assert_eq!(tree.symlink_target(inode), format!("target {seconds}").as_bytes());
        }
        assert_eq!(inode.flags, 0, "{path:?}");
        for (name, child) in tree.children(inode) {
            let name = NAMES.into_iter().find(|other| other.as_bytes() == name).unwrap();
            queue.push_back((path.iter().copied().chain([name]).collect(), child));
        }
    }
    shown
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        3 => (100u32..200).prop_map(Node::File),
        // Three files a layer may have several names.
        2 => (0u32..3).prop_map(|link| Node::Link(1005 + link)),
        1 => (300u32..400).prop_map(Node::Symlink),
        2 => Just(Node::Whiteout),
    ];
    leaf.prop_recursive(3, 24, 4, |child| directory_of(child).boxed())
}

fn directory_of(child: impl Strategy<Value = Node>) -> impl Strategy<Value = Node> {
    let children = proptest::collection::btree_map(proptest::sample::select(&NAMES[..]), child, 0..4);
    (proptest::option::of(1u32..100), proptest::bool::weighted(0.2), children)
        .prop_map(|(metadata, is_opaque, children)| Node::Directory { metadata, is_opaque, children })
}

/// Numbers tell inodes apart, so no two inodes of a layer may have the same.
fn renumber(node: &mut Node, next: &mut u32) {
    match node {
        Node::File(number) | Node::Symlink(number) => {
            *number = *next;
            *next += 1;
        }
        Node::Directory { metadata, children, .. } => {
            if let Some(number) = metadata {
                *number = *next;
                *next += 1;
            }
            children.values_mut().for_each(|child| renumber(child, next));
        }
        Node::Link(_) | Node::Whiteout => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn merge_shows_what_the_model_shows(mut layers in proptest::collection::vec(directory_of(node()), 1..5)) {
        for layer in &mut layers {
            renumber(layer, &mut 1);
        }
        prop_assert_eq!(walk(&merged(&layers)), model(&layers));
    }
}

/// `expected`: path, metadata number and link count of everything below the root.
fn check(layers: &[Node], expected: &[(&str, Option<u32>, u32)]) {
    let shown: Vec<_> = walk(&merged(layers))
        .into_iter()
        .skip(1)
        .map(|(path, shown)| (path.join("/"), shown.metadata, shown.nlink))
        .collect();
    let expected: Vec<_> =
        expected.iter().map(|(path, metadata, nlink)| ((*path).to_owned(), *metadata, *nlink)).collect();
    assert_eq!(shown, expected);
}

#[test]
fn a_whiteout_hides_a_file_and_a_directory() {
    let below = directory([("a", Node::File(1)), ("b", directory([("c", Node::File(2))])), ("d", Node::File(3))]);
    check(&[below, directory([("a", Node::Whiteout), ("b", Node::Whiteout)])], &[("d", Some(3), 1)]);
}

#[test]
fn what_lies_above_a_whiteout_shows_without_what_lies_below() {
    let below = directory([("a", named_directory(1, [("b", Node::File(2))]))]);
    let above = directory([("a", directory([("c", Node::File(3))]))]);
    check(&[below, directory([("a", Node::Whiteout)]), above], &[("a", None, 2), ("a/c", Some(3), 1)]);
}

#[test]
fn an_opaque_directory_hides_only_what_lies_below_it() {
    let below = directory([("a", named_directory(1, [("b", Node::File(2))]))]);
    let opaque = directory([("a", opaque_directory(3, [("c", Node::File(4))]))]);
    let above = directory([("a", directory([("d", Node::File(5))]))]);
    check(&[below, opaque, above], &[("a", Some(3), 2), ("a/c", Some(4), 1), ("a/d", Some(5), 1)]);
}

#[test]
fn a_file_replaces_a_directory_and_the_other_way_round() {
    let below = directory([("a", named_directory(1, [("b", Node::File(2))])), ("c", Node::File(3))]);
    let above = directory([("a", Node::File(4)), ("c", named_directory(5, [("d", Node::Symlink(6))]))]);
    check(&[below, above], &[("a", Some(4), 1), ("c", Some(5), 2), ("c/d", Some(6), 1)]);
}

#[test]
fn a_directory_that_a_layer_only_passes_through_keeps_its_metadata() {
    let below = directory([("a", named_directory(1, []))]);
    let above = directory([("a", directory([("b", Node::File(2))]))]);
    check(&[below, above], &[("a", Some(1), 2), ("a/b", Some(2), 1)]);
    let above = directory([("a", named_directory(3, []))]);
    check(&[directory([("a", named_directory(1, []))]), above], &[("a", Some(3), 2)]);
}

#[test]
fn an_opaque_directory_that_a_layer_only_passes_through_keeps_its_metadata() {
    let below = directory([("a", named_directory(1, [("b", named_directory(2, [("c", Node::File(3))]))]))]);
    let passed = Node::Directory { metadata: None, is_opaque: true, children: [("d", Node::File(4))].into() };
    let above = directory([("a", directory([("b", passed)]))]);
    check(&[below.clone(), above], &[("a", Some(1), 3), ("a/b", Some(2), 2), ("a/b/d", Some(4), 1)]);
    // containerd looks for it in each layer, whatever upper layers hide.
    let opaque = directory([("a", opaque_directory(5, []))]);
    let above = directory([("a", directory([("b", directory([("d", Node::File(6))]))]))]);
    check(&[below, opaque, above], &[("a", Some(5), 3), ("a/b", Some(2), 2), ("a/b/d", Some(6), 1)]);
}

#[test]
fn link_counts_are_those_of_the_names_that_show() {
    let below = directory([("a", Node::Link(1005)), ("b", Node::Link(1005)), ("c", Node::Link(1005))]);
    let above = directory([("b", Node::Whiteout), ("d", directory([]))]);
    check(&[below, above], &[("a", Some(1005), 2), ("c", Some(1005), 2), ("d", None, 2)]);
}

#[test]
fn refuses_no_layers_and_too_many() {
    let index = index_of(&directory([]));
    let layers = vec![(Digest::of(b""), &index); LAYER_COUNT_MAX + 1];
    assert_eq!(merge(&layers), Err(MergeError::LayerCount(LAYER_COUNT_MAX + 1)));
    assert_eq!(merge::<Vec<u8>>(&[]), Err(MergeError::LayerCount(0)));
    assert!(merge(&layers[1..]).is_ok());
}

#[test]
fn a_hundred_thousand_files_merge_in_a_moment() {
    // 300 ms is what a mount may take; the bound leaves room for a busy machine.
    let names: Vec<String> = (0..100_000).map(|number| format!("{number:06}")).collect();
    let layer = |first: usize| {
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        let directories = names[first..first + 1000].iter().step_by(10);
        let directories: Vec<_> =
            directories.map(|name| (name, builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap())).collect();
        builder.add_directory(0, directories.iter().copied()).unwrap();
        for (_, directory) in &directories {
            let children: Vec<_> = names[..500]
                .iter()
                .map(|name| (name, builder.add_inode(blank_inode(mode::REGULAR | 0o644)).unwrap()))
                .collect();
            builder.add_directory(*directory, children).unwrap();
        }
        Index::open(builder.finish_tree(&[]).unwrap()).unwrap()
    };
    let (lower, upper) = (layer(0), layer(1000));
    let started = std::time::Instant::now();
    let tree = merge(&[(Digest::of(b"lower"), &lower), (Digest::of(b"upper"), &upper)]).unwrap();
    let elapsed = started.elapsed();
    assert_eq!(Index::open(tree).unwrap().inodes().len(), 100_201);
    assert!(elapsed.as_millis() < 1000, "{elapsed:?}");
    eprintln!("100,201 inodes merged in {elapsed:?}");
}
