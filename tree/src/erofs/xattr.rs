//! Extended attributes of an image: which the kernel can show, which inodes share, and how both are stored.
//!
//! An attribute is *shared* when inodes have its set in common: it is stored once, inodes hold its number.
//! Everything else is *inline*: it follows its inode.

use std::collections::HashMap;

use format_spec::{
    Index, Inode,
    records::{NO_XATTRS, mode},
};
use zerocopy::{IntoBytes, little_endian::U32};

use super::layout::{SHARED_XATTRS_MAX, XattrEntry, XattrHeader};

/// Names the kernel can show start with one of these, by the number of the prefix
/// (`EROFS_XATTR_INDEX_*`). Those of access control lists are whole names.
const PREFIXES: [(&[u8], u8); 5] =
    [(b"user.", 1), (ACL_ACCESS, 2), (ACL_DEFAULT, 3), (b"trusted.", 4), (b"security.", 6)];
const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// Longest name of an attribute (Linux `XATTR_NAME_MAX`).
const NAME_LEN_MAX: usize = 255;
/// Longest attributes an inode can have in all: its count of 4 bytes has 16 bits.
const BODY_LEN_MAX: usize = size_of::<XattrHeader>() + 4 * (u16::MAX as usize - 1);
/// Inodes that must have a set in common to share it.
const SHARING_INODES_MIN: u32 = 2;

/// The shared attributes of an image, and what follows each inode.
#[derive(Debug)]
pub(super) struct XattrWriter<'a, B> {
    tree: &'a Index<B>,
    /// How many inodes have a set.
    set_uses: HashMap<u32, u32>,
    /// Numbers of the shared attributes: their offset in `shared`, divided by 4.
    numbers: HashMap<(&'a [u8], &'a [u8]), u32>,
    /// The shared attributes as they are stored.
    shared: Vec<u8>,
    dropped_count: u64,
}

impl<'a, B: AsRef<[u8]>> XattrWriter<'a, B> {
    /// Counts which sets inodes have in common.
    pub(super) fn new(tree: &'a Index<B>) -> Self {
        let mut set_uses = HashMap::new();
        for inode in tree.inodes().iter().filter(|inode| inode.xattrs.get() != NO_XATTRS) {
            *set_uses.entry(inode.xattrs.get()).or_insert(0) += 1;
        }
        Self { tree, set_uses, numbers: HashMap::new(), shared: Vec::new(), dropped_count: 0 }
    }

    /// The shared attributes of all inodes encoded so far.
    pub(super) fn shared(&self) -> &[u8] {
        &self.shared
    }

    /// How many attributes were left out because the kernel could not show them.
    pub(super) fn dropped_count(&self) -> u64 {
        self.dropped_count
    }

    /// Appends what follows an inode: nothing, or header, numbers of shared attributes and inline ones.
    ///
    /// Encoding an inode again gives the same bytes.
    ///
    /// # Errors
    ///
    /// The limit that its attributes break.
    pub(super) fn encode(&mut self, inode: &Inode, output: &mut Vec<u8>) -> Result<(), &'static str> {
        if inode.xattrs.get() == NO_XATTRS {
            return Ok(());
        }
        let is_common = self.set_uses.get(&inode.xattrs.get()).is_some_and(|uses| *uses >= SHARING_INODES_MIN);
        let (mut numbers, mut inline) = (Vec::new(), Vec::new());
        for (name, value) in self.tree.xattrs(inode) {
            if split_name(name, inode.file_type()).is_none() {
                self.dropped_count += 1;
            } else if is_common && numbers.len() < SHARED_XATTRS_MAX {
                numbers.push(self.share(name, value, inode.file_type())?);
            } else {
                append_entry(name, value, inode.file_type(), &mut inline)?;
            }
        }
        if numbers.is_empty() && inline.is_empty() {
            return Ok(());
        }
        let shared_count = u8::try_from(numbers.len()).expect("bounded by SHARED_XATTRS_MAX");
        let header = XattrHeader { name_filter: 0.into(), shared_count, reserved: [0; 7] };
        if size_of_val(&header) + 4 * numbers.len() + inline.len() > BODY_LEN_MAX {
            return Err("its attributes are longer than 256 KiB");
        }
        output.extend_from_slice(header.as_bytes());
        output.extend_from_slice(numbers.as_bytes());
        output.extend_from_slice(&inline);
        Ok(())
    }

    fn share(&mut self, name: &'a [u8], value: &'a [u8], file_type: u32) -> Result<U32, &'static str> {
        if let Some(number) = self.numbers.get(&(name, value)) {
            return Ok(U32::new(*number));
        }
        let number = u32::try_from(self.shared.len() / 4).map_err(|_| "there are 16 GiB of shared attributes")?;
        append_entry(name, value, file_type, &mut self.shared)?;
        self.numbers.insert((name, value), number);
        Ok(U32::new(number))
    }
}

/// What the inode says of the length of its attributes: 0 for none.
pub(super) fn count_of(body: &[u8]) -> u16 {
    let count = body.len().checked_sub(size_of::<XattrHeader>()).map_or(0, |entries_len| 1 + entries_len / 4);
    u16::try_from(count).expect("bounded by BODY_LEN_MAX")
}

/// Number of the prefix and the rest of the name; `None` for what the kernel would not show.
///
/// Dropped is what `setxattr` refuses on a native file system too, so that no unpacked image has it: other
/// prefixes, user attributes of anything but files and directories, access control lists of symbolic links,
/// default ones of anything but directories.
fn split_name(name: &[u8], file_type: u32) -> Option<(u8, &[u8])> {
    let (prefix, index) = PREFIXES.into_iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let rest = &name[prefix.len()..];
    let is_list = prefix == ACL_ACCESS || prefix == ACL_DEFAULT;
    let is_applicable = match prefix {
        b"user." => matches!(file_type, mode::REGULAR | mode::DIRECTORY),
        ACL_DEFAULT => file_type == mode::DIRECTORY,
        ACL_ACCESS => file_type != mode::SYMLINK,
        _ => true,
    };
    (is_applicable && rest.is_empty() == is_list && name.len() <= NAME_LEN_MAX && !name.contains(&0))
        .then_some((index, rest))
}

fn append_entry(name: &[u8], value: &[u8], file_type: u32, output: &mut Vec<u8>) -> Result<(), &'static str> {
    let (name_index, rest) = split_name(name, file_type).expect("checked by the caller");
    let value_len = u16::try_from(value.len()).map_err(|_| "an attribute is longer than 65535 bytes")?;
    let name_len = u8::try_from(rest.len()).expect("bounded by NAME_LEN_MAX");
    output.extend_from_slice(XattrEntry { name_len, name_index, value_len: value_len.into() }.as_bytes());
    output.extend_from_slice(rest);
    output.extend_from_slice(value);
    output.resize(output.len().next_multiple_of(4), 0);
    Ok(())
}
