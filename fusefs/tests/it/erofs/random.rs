//! Random trees for proptest.

use format_spec::{
    Inode,
    records::mode::{BLOCK, CHARACTER, FIFO, SOCKET},
};
use proptest::{collection::vec, prelude::*, sample::Index as Pick};

use super::tree::{Tree, directory, file, inode};

/// Layers of a random tree.
const LAYER_COUNT: u32 = 4;
/// Directories deeper than this get no subdirectories: paths stay short enough for `stat`.
const DEPTH_MAX: usize = 6;

/// A POSIX access control list that the kernel gives back byte for byte.
pub(crate) fn access_list(user: u32, permissions: u16) -> Vec<u8> {
    let entry = |tag: u16, permissions: u16, id: u32| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes()[..], &id.to_le_bytes()[..]].concat()
    };
    let entries = [
        entry(0x01, 7, u32::MAX),
        entry(0x02, permissions & 7, user),
        entry(0x04, 5, u32::MAX),
        entry(0x10, 7, u32::MAX),
        entry(0x20, 1, u32::MAX),
    ];
    [2u32.to_le_bytes().to_vec(), entries.concat()].concat()
}

/// `security.capability`, version 2.
pub(crate) fn capability(permitted: u32) -> Vec<u8> {
    [0x0200_0001, permitted, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect()
}

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    File { layer: u32, len: u64 },
    Symlink(Vec<u8>),
    Special { file_type: u32, device: u32 },
    HardLink(Pick),
}

fn kind() -> impl Strategy<Value = Kind> {
    let len = prop_oneof![Just(0), 1..100u64, Just(4096), 4000..20_000u64, Just(1 << 20), (1u64 << 32)..(1 << 34)];
    let target = prop_oneof![vec(1..=255u8, 1..80), vec(1..=255u8, 3900..4096)];
    let file_type = prop_oneof![Just(BLOCK), Just(CHARACTER), Just(FIFO), Just(SOCKET)];
    prop_oneof![
        3 => Just(Kind::Directory),
        4 => (0..LAYER_COUNT, len).prop_map(|(layer, len)| Kind::File { layer, len }),
        1 => target.prop_map(Kind::Symlink),
        1 => (file_type, any::<u32>()).prop_map(|(file_type, device)| Kind::Special { file_type, device }),
        1 => any::<Pick>().prop_map(Kind::HardLink),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = || any::<u8>().prop_map(|byte| if matches!(byte, 0 | b'/') { b'.' } else { byte });
    prop_oneof![9 => vec(byte(), 1..20), 1 => vec(byte(), 250..256)]
        .prop_filter("reserved", |name| name != b"." && name != b"..")
}

fn xattrs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let text = prop_oneof![Just(b"user.".to_vec()), Just(b"trusted.".to_vec()), Just(b"security.x-".to_vec())];
    let value = prop_oneof![4 => vec(any::<u8>(), 0..40), 1 => vec(any::<u8>(), 3000..9000)];
    let free =
        (text, vec(b'!'..=b'~', 1..30), value).prop_map(|(prefix, rest, value)| ([prefix, rest].concat(), value));
    let common = (0..3u8).prop_map(|n| (b"user.common".to_vec(), vec![n; 20]));
    let capability = any::<u32>().prop_map(|bits| (b"security.capability".to_vec(), capability(bits)));
    let acl = (any::<u32>(), 0..8u16)
        .prop_map(|(user, permissions)| (b"system.posix_acl_access".to_vec(), access_list(user >> 1, permissions)));
    prop_oneof![3 => Just(Vec::new()).boxed(), 2 => vec(prop_oneof![free, common, capability, acl], 0..4).boxed()]
}

fn metadata() -> impl Strategy<Value = Inode> {
    let id = || prop_oneof![Just(0), 0..70_000u32, any::<u32>().prop_map(|id| id >> 1)];
    let time = prop_oneof![Just((1_700_000_000, 0)), (any::<i64>().prop_map(|time| time >> 20), 0..1_000_000_000u32)];
    (0..0o10000u32, id(), id(), time).prop_map(|(permissions, uid, gid, (seconds, nanoseconds))| Inode {
        uid: uid.into(),
        gid: gid.into(),
        mtime_seconds: seconds.cast_unsigned().into(),
        mtime_nanoseconds: nanoseconds.into(),
        ..inode(permissions)
    })
}

/// A tree with all there is, over four layers.
pub(crate) fn tree() -> impl Strategy<Value = Tree> {
    let node = (any::<Pick>(), name(), kind(), metadata(), xattrs());
    vec(node, 0..60).prop_map(|nodes| {
        let mut tree = Tree::new(LAYER_COUNT as usize);
        let mut directories = vec![(0, 0)];
        let mut others = Vec::new();
        let mut names = std::collections::HashSet::new();
        for (parent, name, kind, metadata, xattrs) in nodes {
            let (parent, depth) = *parent.get(&directories);
            if !names.insert((parent, name.clone())) {
                continue;
            }
            let own = |node: Inode| Inode {
                mode: (node.mode.get() & !0o7777 | metadata.mode.get()).into(),
                uid: metadata.uid,
                gid: metadata.gid,
                mtime_seconds: metadata.mtime_seconds,
                mtime_nanoseconds: metadata.mtime_nanoseconds,
                ..node
            };
            let node = match kind {
                Kind::Directory if depth < DEPTH_MAX => {
                    let node = tree.add(parent, name, own(directory()));
                    directories.push((node, depth + 1));
                    node
                }
                Kind::Directory => continue,
                Kind::File { layer, len } => tree.add(parent, name, own(file(layer, len))),
                Kind::Symlink(target) => {
                    others.push(tree.add_symlink(parent, name, &target));
                    continue;
                }
                Kind::Special { file_type, device } => {
                    let device = if matches!(file_type, BLOCK | CHARACTER) { device } else { 0 };
                    others.push(tree.add(parent, name, own(Inode { payload: device.into(), ..inode(file_type) })));
                    continue;
                }
                Kind::HardLink(pick) => {
                    if !others.is_empty() {
                        tree.link(parent, name, *pick.get(&others));
                    }
                    continue;
                }
            };
            if !directories.iter().any(|(directory, _)| *directory == node) {
                others.push(node);
            }
            for (name, value) in xattrs {
                tree.set_xattr(node, name, &value);
            }
        }
        tree
    })
}
