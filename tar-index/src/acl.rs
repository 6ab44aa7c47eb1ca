//! POSIX access control lists as extended attributes, and what Linux makes of them while a layer is unpacked.
//!
//! A list that says no more than the permission bits is not stored; permission bits that are set later
//! change the list; what is created in a directory with a default list inherits it.
//! Source: Linux include/uapi/linux/posix_acl_xattr.h, fs/posix_acl.c; acl(5).

/// Attribute with the list that guards a file.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Attribute with the list that a directory hands down.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const ENTRY_LEN: usize = 8;
/// The identifier of entries that name nobody.
const NO_ID: u32 = u32::MAX;

const USER_OBJECT: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJECT: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An access control list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// Why a value is no list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AclError {
    /// Linux does not know its version, and says that it stores no such attributes.
    Version,
    /// It breaks a rule.
    Malformed,
}

impl Acl {
    /// Reads an attribute's value; `None` for a list without entries, which removes one.
    pub(crate) fn parse(value: &[u8]) -> Result<Option<Self>, AclError> {
        let Some((version, rest)) = value.split_first_chunk::<4>() else {
            return if value.is_empty() { Ok(None) } else { Err(AclError::Malformed) };
        };
        if u32::from_le_bytes(*version) != VERSION {
            return Err(AclError::Version);
        }
        let (entries, rest) = rest.as_chunks::<ENTRY_LEN>();
        let acl = Self(entries.iter().map(Entry::decode).collect());
        match (acl.0.is_empty(), rest.is_empty() && acl.is_valid()) {
            (true, _) if rest.is_empty() => Ok(None),
            (_, true) => Ok(Some(acl)),
            _ => Err(AclError::Malformed),
        }
    }

    /// Owner, users, group, groups, mask, others: in this order, and a mask wherever somebody is named.
    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let is_named = count(USER) + count(GROUP) > 0;
        let mask_count = count(MASK);
        self.0.is_sorted_by_key(|entry| entry.tag)
            && [USER_OBJECT, GROUP_OBJECT, OTHER].into_iter().all(|tag| count(tag) == 1)
            && (mask_count == 1 || (mask_count == 0 && !is_named))
            && self.0.iter().all(Entry::is_valid)
    }

    /// Whether it says more than permission bits can.
    pub(crate) fn is_extended(&self) -> bool {
        self.0.iter().any(|entry| matches!(entry.tag, USER | GROUP | MASK))
    }

    /// Takes over permission bits, as chmod(2) makes it.
    pub(crate) fn set_permissions(&mut self, mode: u32) {
        let group = if self.0.iter().any(|entry| entry.tag == MASK) { MASK } else { GROUP_OBJECT };
        for entry in &mut self.0 {
            let shift = match entry.tag {
                USER_OBJECT => 6,
                OTHER => 0,
                tag if tag == group => 3,
                _ => continue,
            };
            entry.permissions = u16::try_from(mode >> shift & 7).expect("three bits");
        }
    }

    /// The attribute's value.
    pub(crate) fn to_value(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            let id = if matches!(entry.tag, USER | GROUP) { entry.id } else { NO_ID };
            value.extend_from_slice(&entry.tag.to_le_bytes());
            value.extend_from_slice(&entry.permissions.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        value
    }
}

impl Entry {
    fn decode(bytes: &[u8; ENTRY_LEN]) -> Self {
        let [tag0, tag1, permissions0, permissions1, id @ ..] = *bytes;
        Self {
            tag: u16::from_le_bytes([tag0, tag1]),
            permissions: u16::from_le_bytes([permissions0, permissions1]),
            id: u32::from_le_bytes(id),
        }
    }

    fn is_valid(&self) -> bool {
        let is_named = matches!(self.tag, USER | GROUP);
        let is_known = is_named || matches!(self.tag, USER_OBJECT | GROUP_OBJECT | MASK | OTHER);
        is_known && self.permissions <= 7 && !(is_named && self.id == NO_ID)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entry = |(tag, permissions, id): &(u16, u16, u32)| {
            [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        [VERSION.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()].concat()
    }

    const NAMED: [(u16, u16, u32); 5] =
        [(USER_OBJECT, 7, NO_ID), (USER, 6, 1000), (GROUP_OBJECT, 5, NO_ID), (MASK, 7, NO_ID), (OTHER, 0, NO_ID)];

    #[test]
    fn permission_bits_change_the_mask_and_not_the_group() {
        let mut acl = Acl::parse(&value(&NAMED)).unwrap().unwrap();
        assert!(acl.is_extended());
        acl.set_permissions(0o641);
        let expected =
            [(USER_OBJECT, 6, NO_ID), (USER, 6, 1000), (GROUP_OBJECT, 5, NO_ID), (MASK, 4, NO_ID), (OTHER, 1, NO_ID)];
        assert_eq!(acl.to_value(), value(&expected));
    }

    #[test]
    fn a_list_may_say_no_more_than_permission_bits() {
        let acl = Acl::parse(&value(&[(USER_OBJECT, 7, 0), (GROUP_OBJECT, 5, 0), (OTHER, 0, 0)])).unwrap().unwrap();
        assert!(!acl.is_extended());
        assert_eq!(Acl::parse(&value(&[])), Ok(None));
        assert_eq!(Acl::parse(&[]), Ok(None));
    }

    #[test]
    fn refuses_what_linux_refuses() {
        let without = |tag| NAMED.into_iter().filter(|entry| entry.0 != tag).collect::<Vec<_>>();
        let mut swapped = NAMED;
        swapped.swap(0, 1);
        let nobody = NAMED.map(|(tag, permissions, _)| (tag, permissions, NO_ID));
        let too_much = NAMED.map(|(tag, _, id)| (tag, 8, id));
        let lists =
            [without(USER_OBJECT), without(MASK), without(OTHER), swapped.into(), nobody.into(), too_much.into()];
        for list in lists {
            assert_eq!(Acl::parse(&value(&list)), Err(AclError::Malformed), "{list:?}");
        }
        assert_eq!(Acl::parse(&value(&NAMED)[..9]), Err(AclError::Malformed));
        assert_eq!(Acl::parse(&[1, 0, 0, 0]), Err(AclError::Version));
    }
}
