//! An index that was built says what was put in; an index that breaks a rule is refused.

use format_spec::{
    BlobTail, CompressedIndex, Extent, FormatError, Frame, Index, IndexBuilder, Inode,
    builder::{LayerData, blank_inode},
    limits::{INDEX_LEN_MAX, SPACE_LEN_FREE, SPACE_LEN_MAX, SPACE_PER_FRAME_BYTE},
    records::{DedupLocation, WHITEOUT, mode},
    table::{Header, SectionEntry},
};
use proptest::prelude::*;
use zerocopy::FromBytes;

const FILE_LEN: u64 = 5000;

/// `/`: `a` (file), `b` (directory), `c` (whiteout); `/b`: `hard` (the same file), `link` (symlink).
fn sample() -> CompressedIndex {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    let xattrs = builder.add_xattrs(vec![(b"user.k".to_vec(), b"v\0".to_vec())]).unwrap();
    let file = builder
        .add_inode(Inode {
            uid: 7.into(),
            mtime_seconds: (-3i64).cast_unsigned().into(),
            mtime_nanoseconds: 999_999_999.into(),
            size: FILE_LEN.into(),
            xattrs: xattrs.into(),
            ..blank_inode(mode::REGULAR | 0o4755)
        })
        .unwrap();
    let directory = builder.add_inode(blank_inode(mode::DIRECTORY | 0o1777)).unwrap();
    let target = builder.add_string(b"../a").unwrap();
    let link = builder
        .add_inode(Inode { payload: target.into(), size: 4.into(), ..blank_inode(mode::SYMLINK | 0o777) })
        .unwrap();
    builder.add_directory(root, [("a", file), ("b", directory), ("c", WHITEOUT)]).unwrap();
    builder.add_directory(directory, [("hard", file), ("link", link)]).unwrap();
    let extent = Extent { tar_offset: 512.into(), plain_offset: 0.into(), len: FILE_LEN.into() };
    let frames = [(0u64, 0u64, 4096u32, 100u32), (100, 4096, 6144, 200)].map(|(blob, tar, plain, compressed)| Frame {
        blob_offset: blob.into(),
        tar_offset: tar.into(),
        compressed_len: compressed.into(),
        plain_len: plain.into(),
        digest: [u8::try_from(compressed).unwrap(); 32],
    });
    builder
        .finish_layer(&LayerData {
            tar_len: 10240,
            space_len: 8192,
            extents: &[extent],
            frames: &frames,
            ..LayerData::default()
        })
        .unwrap()
}

fn open(compressed: &CompressedIndex) -> Index<Vec<u8>> {
    Index::from_compressed(&compressed.bytes, &compressed.location(300)).unwrap()
}

#[test]
fn shows_what_was_put_in() {
    let index = open(&sample());
    let root = index.inode(0).unwrap();
    assert_eq!(root.nlink, 3);
    let children: Vec<_> = index.children(root).collect();
    assert_eq!(children, [(&b"a"[..], 1), (&b"b"[..], 2), (&b"c"[..], WHITEOUT)]);
    let file = index.inode(index.lookup(root, b"a").unwrap()).unwrap();
    assert_eq!((file.mtime_seconds(), file.nlink.get(), file.parent.get()), (-3, 2, 0));
    assert_eq!(index.xattrs(file).collect::<Vec<_>>(), [(&b"user.k"[..], &b"v\0"[..])]);
    let directory = index.inode(2).unwrap();
    assert_eq!(index.lookup(directory, b"hard"), Some(1));
    assert_eq!(index.lookup(directory, b"none"), None);
    assert_eq!(index.symlink_target(index.inode(index.lookup(directory, b"link").unwrap()).unwrap()), b"../a");
}

#[test]
fn plain_bytes_lead_to_extents_and_frames() {
    let index = open(&sample());
    assert_eq!(index.extents_in_plain(&(4999..5001)), 0..1);
    assert_eq!(index.extents_in_plain(&(5000..8192)), 1..1);
    assert_eq!(index.extents_in_tar(&(0..512)), 0..0);
    assert_eq!(index.extents_in_tar(&(511..513)), 0..1);
    assert_eq!(index.frames_in_tar(&(4095..4096)), 0..1);
    assert_eq!(index.frames_in_tar(&(4095..4097)), 0..2);
    assert_eq!(index.frames_in_tar(&(4096..4096)), 1..1);
}

#[test]
fn equal_calls_give_equal_bytes() {
    assert_eq!(sample().bytes, sample().bytes);
}

#[test]
fn refuses_other_bytes_than_the_digest_names() {
    let compressed = sample();
    let location = compressed.location(0);
    for position in 0..compressed.bytes.len() {
        let mut changed = compressed.bytes.clone();
        changed[position] ^= 1;
        assert!(Index::from_compressed(&changed, &location).is_err(), "{position}");
    }
}

#[test]
fn refuses_frames_that_do_not_cover_the_tar_stream() {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    builder.add_directory(root, std::iter::empty::<(&[u8], u32)>()).unwrap();
    assert!(builder.finish_layer(&LayerData { tar_len: 1024, ..LayerData::default() }).is_err());
}

#[test]
fn refuses_a_dedup_section_beyond_the_limit() {
    let build = |compressed_len: u64, plain_len: u64| {
        let mut builder = IndexBuilder::default();
        let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
        builder.add_directory(root, std::iter::empty::<(&[u8], u32)>()).unwrap();
        let section =
            DedupLocation { compressed_len: compressed_len.into(), plain_len: plain_len.into(), digest: [0; 32] };
        let tail = BlobTail { dedup: &[section], ..BlobTail::default() };
        builder.finish_layer(&LayerData { tail, ..LayerData::default() }).is_ok()
    };
    let limit = INDEX_LEN_MAX;
    let allowed = [(limit, limit), (limit + 1, 1), (1, limit + 1)].map(|(compressed, plain)| build(compressed, plain));
    assert_eq!(allowed, [true, false, false]);
}

#[test]
fn refuses_a_space_that_its_frames_do_not_allow() {
    let build = |compressed_len: u32, space_len: u64| {
        let mut builder = IndexBuilder::default();
        let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
        builder.add_directory(root, Vec::<(&[u8], u32)>::new()).unwrap();
        let frames: Vec<_> = (0..2000u32)
            .map(|number| Frame {
                blob_offset: (u64::from(number) * u64::from(compressed_len)).into(),
                tar_offset: u64::from(number).into(),
                compressed_len: compressed_len.into(),
                plain_len: 1.into(),
                digest: [0; 32],
            })
            .collect();
        builder.finish_layer(&LayerData { tar_len: 2000, space_len, frames: &frames, ..LayerData::default() }).map(drop)
    };
    let refused = |space_len, space_max, frames_len| Err(FormatError::Space { space_len, space_max, frames_len });
    let allowed = SPACE_LEN_FREE + 2_048_000 * SPACE_PER_FRAME_BYTE;
    assert_eq!(build(1024, allowed), Ok(()));
    assert_eq!(build(1024, allowed + 4096), refused(allowed + 4096, allowed, 2_048_000));
    // Lengths of frames are claims too.
    let long = 4 << 20;
    assert_eq!(build(long, SPACE_LEN_MAX), Ok(()));
    assert_eq!(build(long, SPACE_LEN_MAX + 4096), refused(SPACE_LEN_MAX + 4096, SPACE_LEN_MAX, 2000 << 22));
}

#[test]
fn refuses_names_that_no_file_system_has() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
        let mut builder = IndexBuilder::default();
        let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
        let file = builder.add_inode(blank_inode(mode::FIFO)).unwrap();
        assert!(builder.add_directory(root, [(name, file)]).is_err(), "{name:?}");
    }
}

/// A directory that contains itself: the breadth-first rule must refuse it.
#[test]
fn refuses_a_cycle_of_directories() {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    let inner = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    builder.add_directory(root, [("inner", inner)]).unwrap();
    builder.add_directory(inner, [("inner", inner)]).unwrap();
    assert!(builder.finish_layer(&LayerData::default()).is_err());
}

fn rule(what: &'static str, number: u64, rule: &'static str) -> Result<(), FormatError> {
    Err(FormatError::Rule { what, number, rule })
}

/// Empty directories have equal dirents, so their breadth-first order alone would allow it.
#[test]
fn refuses_an_empty_directory_with_two_names() {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    let inner = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    builder.add_directory(root, [("a", inner), ("b", inner)]).unwrap();
    builder.add_directory(inner, Vec::<(&[u8], u32)>::new()).unwrap();
    let refused = builder.finish_layer(&LayerData::default()).map(|_| ());
    assert_eq!(refused, rule("dirent", 1, "names a directory that has a name already"));
}

#[test]
fn refuses_an_inode_without_a_name() {
    let mut builder = IndexBuilder::default();
    let root = builder.add_inode(blank_inode(mode::DIRECTORY | 0o755)).unwrap();
    builder.add_inode(blank_inode(mode::FIFO)).unwrap();
    builder.add_directory(root, Vec::<(&[u8], u32)>::new()).unwrap();
    let refused = builder.finish_layer(&LayerData::default()).map(|_| ());
    assert_eq!(refused, rule("inode", 1, "it has no name"));
}

/// Changes one inode of [`sample`] behind the builder's back and puts the checksums right.
fn check_changed(number: usize, change: impl FnOnce(&mut Inode)) -> Result<(), FormatError> {
    let mut bytes = open(&sample()).as_bytes().to_vec();
    let (_, rest) = Header::mut_from_prefix(&mut bytes).unwrap();
    let (table, _) = <[SectionEntry]>::ref_from_prefix_with_elems(rest, 1).unwrap();
    let start = usize::try_from(table[0].offset.get()).unwrap();
    let len = usize::try_from(table[0].len.get()).unwrap();
    let inodes = <[Inode]>::mut_from_bytes(&mut bytes[start..start + len]).unwrap();
    change(&mut inodes[number]);
    let crc32 = crc32fast::hash(&bytes[start..start + len]);
    bytes[64 + 24..64 + 28].copy_from_slice(&crc32.to_le_bytes());
    let count = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..60]);
    hasher.update(&bytes[64..64 + 32 * count]);
    bytes[60..64].copy_from_slice(&hasher.finalize().to_le_bytes());
    Index::open(bytes)?.check()
}

#[test]
fn refuses_link_counts_and_parents_that_the_names_contradict() {
    assert_eq!(check_changed(1, |_| ()), Ok(()));
    let count = "its link count is not the number of its names";
    assert_eq!(check_changed(1, |file| file.nlink = 3.into()), rule("inode", 1, count));
    assert_eq!(check_changed(0, |root| root.nlink = 2.into()), rule("inode", 0, count));
    let parent = "is the first of an inode with another parent";
    assert_eq!(check_changed(1, |file| file.parent = 2.into()), rule("dirent", 0, parent));
    assert_eq!(check_changed(2, |directory| directory.parent = 2.into()), rule("dirent", 1, parent));
}

#[test]
fn refuses_attributes_that_linux_does_not_store() {
    let check = |xattrs: Vec<(&[u8], usize)>| {
        let mut builder = IndexBuilder::default();
        let xattrs = xattrs.into_iter().map(|(name, len)| (name.to_vec(), vec![0; len])).collect();
        let xattrs = builder.add_xattrs(xattrs).unwrap();
        let root = builder.add_inode(Inode { xattrs: xattrs.into(), ..blank_inode(mode::DIRECTORY | 0o755) }).unwrap();
        builder.add_directory(root, Vec::<(&[u8], u32)>::new()).unwrap();
        builder.finish_layer(&LayerData::default()).map(|_| ())
    };
    assert_eq!(check(vec![(b"user.a", 65536), (b"user.b", 0)]), Ok(()));
    assert_eq!(check(vec![(b"user.a", 65537)]), rule("xattr", 0, "its value is longer than 64 KiB"));
    assert_eq!(check(vec![(b"user.b", 0), (b"user.a", 0)]), rule("xattr set", 0, "its names do not ascend"));
    assert_eq!(check(vec![(b"user.a", 0), (b"user.a", 1)]), rule("xattr set", 0, "its names do not ascend"));
    for name in [&b""[..], b"user.\0", &[b'x'; 256]] {
        assert_eq!(check(vec![(name, 0)]), rule("xattr", 0, "its name is not allowed"), "{name:?}");
    }
}

proptest! {
    /// Any bytes in the open form: looking around returns something or nothing, and never panics.
    #[test]
    fn damaged_indexes_never_panic(changes in proptest::collection::vec((0usize..4096, any::<u8>()), 1..20)) {
        let mut bytes = open(&sample()).as_bytes().to_vec();
        for (position, value) in changes {
            // Header and section table have a checksum: change what lies behind them.
            let position = 64 + 12 * 32 + position % (bytes.len() - 64 - 12 * 32);
            bytes[position] = value;
        }
        let index = Index::open(bytes)?;
        let _ = index.check();
        for inode in index.inodes() {
            let _ = index.children(inode).count();
            let _ = index.lookup(inode, b"b");
            let _ = index.symlink_target(inode);
            let _ = index.xattrs(inode).count();
            let _ = index.extents_in_plain(&inode.plain_range());
            let _ = index.frames_in_tar(&inode.plain_range());
        }
    }
}
