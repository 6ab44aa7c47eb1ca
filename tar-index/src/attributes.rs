//! Times and extended attributes as an unpack by containerd leaves them on a Linux file system.
//!
//! Source: containerd's `archive` package; Linux fs/xattr.c, security/commoncap.c; ext4 as the file system.

use std::collections::BTreeMap;

use format_spec::{Inode, records::mode};

use crate::{
    acl::{self, Acl, AclError},
    pax::Time,
};

/// Extended attributes by full name.
pub(crate) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

const CAPABILITY: &[u8] = b"security.capability";
/// Longest name and longest value (Linux `XATTR_NAME_MAX`, `XATTR_SIZE_MAX`).
const NAME_LEN_MAX: usize = 255;
const VALUE_LEN_MAX: usize = 65536;
/// What 64 bits of nanoseconds can say; containerd gives other times up.
const MTIME_MAX: Time = Time { seconds: 9_223_372_036, nanoseconds: 854_775_807 };

/// Sets the modification time.
pub(crate) fn set_mtime(inode: &mut Inode, time: Time) {
    let is_kept = time.seconds >= 0 && (time.seconds, time.nanoseconds) <= (MTIME_MAX.seconds, MTIME_MAX.nanoseconds);
    let time = if is_kept { time } else { Time::default() };
    inode.mtime_seconds = time.seconds.cast_unsigned().into();
    inode.mtime_nanoseconds = time.nanoseconds.into();
}

/// Sets the attributes of an entry on an inode of this type, beside those that it has.
///
/// # Errors
///
/// When Linux refuses one and containerd therefore the entry.
pub(crate) fn set(xattrs: &mut Xattrs, new: Xattrs, file_type: u32) -> Result<(), String> {
    for (name, value) in new {
        let refused = |why| format!("Linux refuses its attribute {:?}: {why}", String::from_utf8_lossy(&name));
        match stored_value(&name, value, file_type).map_err(refused)? {
            Stored::Value(value) => {
                xattrs.insert(name, value);
            }
            Stored::Nothing => {
                xattrs.remove(&name);
            }
            Stored::Ignored => {}
        }
    }
    Ok(())
}

/// What becomes of an attribute that is set.
enum Stored {
    Value(Vec<u8>),
    /// It is removed.
    Nothing,
    /// containerd goes on without it.
    Ignored,
}

fn stored_value(name: &[u8], value: Vec<u8>, file_type: u32) -> Result<Stored, &'static str> {
    if name.starts_with(b"trusted.") {
        return Ok(Stored::Ignored);
    }
    if name.is_empty() || name.len() > NAME_LEN_MAX {
        return Err("its name is empty or too long");
    }
    if value.len() > VALUE_LEN_MAX {
        return Err("its value is too long");
    }
    let is_suffixed = |prefix: &[u8]| name.len() > prefix.len();
    let has_user_xattrs = matches!(file_type, mode::REGULAR | mode::DIRECTORY);
    match name {
        acl::ACCESS | acl::DEFAULT => stored_acl(name, &value, file_type),
        CAPABILITY if !is_capability(&value) => Err("its value is no set of capabilities"),
        _ if name.starts_with(b"user.") && !has_user_xattrs => Ok(Stored::Ignored),
        _ if name.starts_with(b"user.") && is_suffixed(b"user.") => Ok(Stored::Value(value)),
        _ if name.starts_with(b"security.") && is_suffixed(b"security.") => Ok(Stored::Value(value)),
        b"user." | b"security." => Err("its name ends too early"),
        _ => Ok(Stored::Ignored),
    }
}

fn stored_acl(name: &[u8], value: &[u8], file_type: u32) -> Result<Stored, &'static str> {
    if file_type == mode::SYMLINK {
        return Ok(Stored::Ignored);
    }
    let acl = match Acl::parse(value) {
        Err(AclError::Version) => return Ok(Stored::Ignored),
        Err(AclError::Malformed) => return Err("its value is no access control list"),
        Ok(acl) => acl,
    };
    if name == acl::DEFAULT {
        return match acl {
            Some(_) if file_type != mode::DIRECTORY => Err("only directories have a default list"),
            Some(acl) => Ok(Stored::Value(acl.to_value())),
            None => Ok(Stored::Nothing),
        };
    }
    // A list that permission bits can say is turned into them, and the entry's bits follow.
    Ok(acl.filter(Acl::is_extended).map_or(Stored::Nothing, |acl| Stored::Value(acl.to_value())))
}

/// Whether Linux stores this as `security.capability`: revision 2 or 3 at its length.
fn is_capability(value: &[u8]) -> bool {
    matches!((value.len(), value.get(3)), (20, Some(2)) | (24, Some(3)))
}

/// Brings the access control list in line with permission bits that are set.
pub(crate) fn set_permissions(xattrs: &mut Xattrs, permissions: u32) {
    if let Some(value) = xattrs.get_mut(acl::ACCESS)
        && let Ok(Some(mut acl)) = Acl::parse(value)
    {
        acl.set_permissions(permissions);
        *value = acl.to_value();
    }
}

/// Gives an inode what it gets by being created in a directory with a default access control list.
pub(crate) fn inherit(xattrs: &mut Xattrs, parent: &Xattrs, inode: &Inode) {
    let Some(value) = parent.get(acl::DEFAULT).filter(|_| !inode.is_symlink()) else { return };
    if inode.is_directory() {
        xattrs.insert(acl::DEFAULT.to_vec(), value.clone());
    }
    if let Ok(Some(mut acl)) = Acl::parse(value)
        && acl.is_extended()
    {
        acl.set_permissions(inode.mode.get());
        xattrs.insert(acl::ACCESS.to_vec(), acl.to_value());
    }
}

/// What chown(2), which containerd calls for every hard link too, takes from a file.
pub(crate) fn forget_capability(xattrs: &mut Xattrs) {
    xattrs.remove(CAPABILITY);
}
