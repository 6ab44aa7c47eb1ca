//! What a session says, without mounting it.

use control::RemoteLayer;
use format_spec::{
    IndexBuilder, IndexLocation, Inode, LazyLayer,
    builder::{blank_inode, implicit_directory},
    records::mode,
};

use super::*;

use crate::store::TreeStore;

/// A tree: `/directory/{a..e}`, `/link`; no data, so no layer either.
fn tree(store: &TreeStore, name: &[u8]) -> Arc<Tree> {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(implicit_directory()).unwrap();
    let directory = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    let payload = builder.add_string(b"directory/a").unwrap().into();
    let link = builder.add_inode(Inode { payload, size: 11.into(), ..blank_inode(mode::SYMLINK | 0o777) }).unwrap();
    builder.add_directory(root, [("directory", directory), ("link", link)]).unwrap();
    let xattrs = builder.add_xattrs(vec![(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), vec![])]).unwrap();
    let file = Inode { xattrs: xattrs.into(), ..blank_inode(mode::REGULAR | 0o644) };
    let files: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| (name, builder.add_inode(file).unwrap())).into();
    builder.add_directory(directory, files).unwrap();
    let id = Digest::of(name);
    let index = IndexLocation { offset: 0, compressed_len: 0, plain_len: 0, digest: id };
    let layers = [RemoteLayer { layer: LazyLayer { blob: id, blob_len: 0, index, hot_len: 0 }, image: String::new() }];
    let stored = store.create(id, &layers, &builder.finish_tree(&[id]).unwrap()).unwrap();
    let (slot, index, block_count) = (stored.slot, stored.index, stored.block_count);
    Arc::new(Tree { id, slot, index, layers: Vec::new(), block_count })
}

fn with_store<T>(test: impl FnOnce(&TreeStore) -> T) -> T {
    let directory = tempfile::tempdir().unwrap();
    test(&TreeStore::open(directory.path().to_owned(), storage::disk::Disk::default()).unwrap())
}

fn number(namespace: &Namespace, path: &str) -> u64 {
    path.split('/').filter(|name| !name.is_empty()).fold(1, |parent, name| {
        match namespace.lookup(parent, name.as_bytes()).unwrap() {
            Found::Entry(entry) => entry.number,
            other => panic!("{path}: {other:?}"),
        }
    })
}

/// Names and node numbers of a directory, asked for `at_once` at a time.
fn list(namespace: &Namespace, path: &str, at_once: usize) -> Vec<(String, u64)> {
    let (directory, mut offset, mut listed) = (number(namespace, path), 0, Vec::new());
    loop {
        let (before, start) = (listed.len(), offset);
        let visit = |next: u64, name: &[u8], entry: &Entry| {
            if listed.len() == before + at_once {
                return false;
            }
            listed.push((String::from_utf8(name.to_vec()).unwrap(), entry.number));
            offset = next;
            true
        };
        namespace.read_directory(directory, start, visit).unwrap();
        if listed.len() == before {
            return listed;
        }
    }
}

#[test]
fn a_listing_goes_on_where_it_stopped() {
    with_store(|store| {
        let namespace = Namespace::of_node();
        let tree = tree(store, b"tree");
        namespace.add_tree(&tree);
        let path = format!("trees/{}/directory", tree.id.hex());
        let whole = list(&namespace, &path, 100);
        let names: Vec<&str> = whole.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [".", "..", "a", "b", "c", "d", "e"]);
        assert_eq!(whole[0].1, number(&namespace, &path));
        assert_eq!(whole[1].1, number(&namespace, &format!("trees/{}", tree.id.hex())));
        for at_once in 1..4 {
            assert_eq!(list(&namespace, &path, at_once), whole);
        }
        let root = list(&namespace, &format!("trees/{}", tree.id.hex()), 2);
        assert_eq!(root[1], ("..".to_owned(), Node::Trees.number()));
        let trees: Vec<String> = list(&namespace, "trees", 1).into_iter().map(|(name, _)| name).collect();
        assert_eq!(trees, [".", "..", tree.id.hex().as_str()]);
        let top: Vec<String> = list(&namespace, "", 1).into_iter().map(|(name, _)| name).collect();
        assert_eq!(top, [".", "..", "layers", "trees"]);
    });
}

#[test]
fn trees_come_and_go_and_their_numbers_with_them() {
    with_store(|store| {
        let namespace = Namespace::of_node();
        let (one, two) = (tree(store, b"one"), tree(store, b"two"));
        let trees = number(&namespace, "trees");
        assert_eq!(namespace.lookup(trees, one.id.hex().as_bytes()), Ok(Found::NotYet));
        assert_eq!(namespace.lookup(trees, b"no digest"), Ok(Found::NotYet));
        namespace.add_tree(&one);
        namespace.add_tree(&two);
        let path = |tree: &Tree| format!("trees/{}/directory/a", tree.id.hex());
        let (in_one, in_two) = (number(&namespace, &path(&one)), number(&namespace, &path(&two)));
        assert_ne!(in_one, in_two);
        assert_eq!(namespace.entry(trees).unwrap().attributes.nlink, 4);
        assert_eq!(namespace.statistics(in_one), Statistics { block_count: 0, inode_count: 8 });
        assert_eq!(namespace.statistics(1), Statistics { block_count: 0, inode_count: 16 });
        assert!(namespace.remove_tree(one.id).is_some());
        assert!(namespace.remove_tree(one.id).is_none());
        assert_eq!(namespace.entry(in_one), Err(Errno::STALE));
        assert!(namespace.entry(in_two).is_ok());
        assert_eq!(namespace.lookup(trees, one.id.hex().as_bytes()), Ok(Found::NotYet));
    });
}

#[test]
fn one_tree_is_the_root_itself() {
    with_store(|store| {
        let namespace = Namespace::of_tree(tree(store, b"tree"));
        assert_eq!(list(&namespace, "", 100)[..2], [(".".to_owned(), 1), ("..".to_owned(), 1)]);
        assert_eq!(list(&namespace, "directory", 100)[1], ("..".to_owned(), 1));
        assert_eq!(namespace.lookup(1, b"missing"), Ok(Found::Nothing));
        for node in [Node::Layers.number(), Node::Trees.number(), 1 << 63, 9 << 32, 0] {
            assert_eq!(namespace.entry(node), Err(Errno::STALE), "{node:#x}");
        }
    });
}

#[test]
fn what_a_file_is_not_is_an_error() {
    with_store(|store| {
        let namespace = Namespace::of_tree(tree(store, b"tree"));
        let (root, link, file) = (1, number(&namespace, "link"), number(&namespace, "directory/a"));
        assert_eq!(namespace.read_link(link, <[u8]>::to_vec), Ok(b"directory/a".to_vec()));
        assert_eq!(namespace.read_link(file, <[u8]>::to_vec), Err(Errno::INVAL));
        assert_eq!(namespace.lookup(file, b"below"), Err(Errno::NOTDIR));
        assert_eq!(namespace.read_directory(file, 0, |_, _, _| true), Err(Errno::NOTDIR));
        assert_eq!(namespace.content(root, 0, 1).map(|_| ()), Err(Errno::ISDIR));
        assert_eq!(namespace.content(link, 0, 1).map(|_| ()), Err(Errno::INVAL));
        assert_eq!(namespace.xattr(file, b"user.a", <[u8]>::to_vec), Ok(b"1".to_vec()));
        assert_eq!(namespace.xattr(file, b"user", <[u8]>::to_vec), Err(Errno::NODATA));
        assert_eq!(namespace.xattr_names(file), Ok(b"user.a\0user.b\0".to_vec()));
        assert_eq!(namespace.xattr_names(root), Ok(Vec::new()));
    });
}
