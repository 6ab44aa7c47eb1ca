//! Whether a file is the image of a tree: what tells a whole one from leftovers of another version.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use format_spec::Digest;
use zerocopy::FromBytes as _;

use super::{
    CHECKSUM_AT, crc32c,
    layout::{BLOCK, BLOCK_LEN, MAGIC, SUPER_OFFSET, SuperBlock},
    uuid_of,
};

/// Whether `file` is an image that this version writes of a tree of these layers, lowest first. Reads one block.
///
/// It covers what can differ among files that were written whole and renamed into place: the writer's version, the
/// layers, the length.
///
/// # Errors
///
/// When the file cannot be read.
pub fn is_image_of(file: &File, layers: &[Digest]) -> io::Result<bool> {
    let mut block = [0; BLOCK];
    let len = file.metadata()?.len();
    if len < BLOCK_LEN {
        return Ok(false);
    }
    file.read_exact_at(&mut block, 0)?;
    let Ok((super_block, _)) = SuperBlock::read_from_prefix(&block[SUPER_OFFSET..]) else { return Ok(false) };
    block[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    Ok(super_block.magic.get() == MAGIC
        && super_block.checksum.get() == crc32c(&block[SUPER_OFFSET..])
        && super_block.uuid == uuid_of(layers)
        && u64::from(super_block.block_count.get()) * BLOCK_LEN == len)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use format_spec::{Index, IndexBuilder, builder::implicit_directory};

    use super::*;

    fn tree(layers: &[Digest]) -> Index<Vec<u8>> {
        let mut builder = IndexBuilder::default();
        builder.add_inode(implicit_directory()).unwrap();
        builder.add_directory(0, std::iter::empty::<(&[u8], u32)>()).unwrap();
        Index::open(builder.finish_tree(layers).unwrap()).unwrap()
    }

    fn is_image(bytes: &[u8], layers: &[Digest]) -> bool {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        is_image_of(&file, layers).unwrap()
    }

    #[test]
    fn an_image_is_known_by_its_layers_its_length_and_its_first_block() {
        let layers = [Digest::of(b"lower"), Digest::of(b"upper")];
        let mut image = Vec::new();
        super::super::write_image(&tree(&layers), &mut image).unwrap();
        assert!(is_image(&image, &layers));
        assert!(!is_image(&image, &[layers[1], layers[0]]));
        assert!(!is_image(&image[..image.len() - BLOCK], &layers));
        assert!(!is_image(&[&image[..], &[0; BLOCK]].concat(), &layers));
        assert!(!is_image(&image[..100], &layers));
        for position in SUPER_OFFSET..BLOCK {
            let mut changed = image.clone();
            changed[position] ^= 1;
            assert!(!is_image(&changed, &layers), "byte {position}");
        }
    }
}
