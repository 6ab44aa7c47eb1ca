//! The index of a layer or merged tree: open form, wire form, and what is made of one that passed its check.

use format_spec::{Digest, Index, IndexLocation};
use tree::{erofs::write_image, merge::merge};

use super::{choose, one_line};
use crate::{
    seal,
    tree_rules::{assert_tree, look_at_everything},
};

/// Longest plain length that is claimed here; the format's own limit has a test.
const PLAIN_LEN_MAX: u32 = 32 << 20;

/// First byte: open form as it is, open form put right, or the compressed wire form with its length in front.
pub(crate) fn run(data: &[u8]) {
    match choose(data, 4) {
        Some((0, rest)) => open_form(rest),
        Some((1 | 2, rest)) => {
            let mut bytes = rest.to_vec();
            seal::index(&mut bytes);
            open_form(&bytes);
        }
        Some((_, rest)) => wire_form(rest),
        None => {}
    }
}

fn open_form(bytes: &[u8]) {
    match Index::open(bytes) {
        Ok(index) => {
            look_at_everything(&index);
            match index.check() {
                Ok(()) => checked(&index),
                Err(error) => one_line(&error),
            }
        }
        Err(error) => one_line(&error),
    }
}

fn wire_form(data: &[u8]) {
    let Some((plain_len, compressed)) = data.split_first_chunk() else { return };
    let location = IndexLocation {
        offset: 0,
        compressed_len: compressed.len() as u64,
        plain_len: (u32::from_le_bytes(*plain_len) % PLAIN_LEN_MAX).into(),
        digest: Digest::of(compressed),
    };
    match Index::from_compressed(compressed, &location) {
        Ok(index) => checked(&index),
        Err(error) => one_line(&error),
    }
}

/// What a node does with it.
fn checked<B: AsRef<[u8]>>(index: &Index<B>) {
    assert_tree(index);
    if index.layers().len() > 0 {
        erofs(index);
        return;
    }
    let (lower, upper) = (Digest::of(b"lower"), Digest::of(b"upper"));
    for layers in [&[(lower, index)][..], &[(lower, index), (upper, index)]] {
        let bytes = merge(layers).expect("indexes that passed the check merge");
        let tree = Index::open(bytes.as_slice()).expect("a tree");
        assert_eq!(tree.check(), Ok(()));
        assert_tree(&tree);
        assert_eq!(tree.layers().len(), layers.len());
        erofs(&tree);
    }
}

fn erofs<B: AsRef<[u8]>>(tree: &Index<B>) {
    let mut image = Vec::new();
    match write_image(tree, &mut image) {
        Ok(summary) => assert_eq!(summary.image_len, image.len() as u64),
        Err(error) => one_line(&error),
    }
}
