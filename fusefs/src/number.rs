//! Node numbers: the 64 bits by which the kernel names a file in every request.
//!
//! They mean the same to every process that serves the same root directory: the number of an inode in a
//! tree follows from the tree's *slot*, which is kept on disk and never used again, and its number in the
//! tree; the number of a layer follows from its digest. So what the kernel remembers outlives a process.

use std::num::NonZeroU32;

use format_spec::LayerId;

/// Bit that marks the number of a layer.
const LAYER: u64 = 1 << 63;
/// Largest slot: its numbers end below [`LAYER`].
const SLOT_MAX: u32 = (1 << 31) - 1;

/// The place of a tree among the node numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(NonZeroU32);

impl Slot {
    /// The first one.
    pub(crate) const FIRST: Self = Self(NonZeroU32::MIN);

    /// `None` if the number is 0 or beyond the last slot.
    pub(crate) fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).filter(|number| number.get() <= SLOT_MAX).map(Self)
    }

    /// The number.
    pub(crate) fn number(self) -> u32 {
        self.0.get()
    }
}

/// What a node number names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Node {
    /// The root of the session.
    Root,
    /// The directory of layers.
    Layers,
    /// The directory of trees.
    Trees,
    /// A layer, by [`layer_number`].
    Layer(u64),
    /// An inode of a tree.
    Inode {
        /// The tree.
        slot: Slot,
        /// Its number in the tree.
        inode: u32,
    },
}

impl Node {
    /// The node with this number; `None` for numbers that were never given out.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Root),
            2 => Some(Self::Layers),
            3 => Some(Self::Trees),
            _ if number & LAYER != 0 => Some(Self::Layer(number)),
            _ => {
                let high = u32::try_from(number >> 32).expect("32 bits are left");
                let inode = u32::try_from(number & u64::from(u32::MAX)).expect("masked");
                Slot::new(high).map(|slot| Self::Inode { slot, inode })
            }
        }
    }

    /// Its number.
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Root => 1,
            Self::Layers => 2,
            Self::Trees => 3,
            Self::Layer(number) => number,
            Self::Inode { slot, inode } => u64::from(slot.number()) << 32 | u64::from(inode),
        }
    }
}

/// The node number of a layer: 63 bits of its digest.
pub(crate) fn layer_number(id: &LayerId) -> u64 {
    let bytes = id.as_bytes().first_chunk().expect("a digest has 32 bytes");
    u64::from_be_bytes(*bytes) | LAYER
}

#[cfg(test)]
mod tests {
    use format_spec::Digest;

    use super::*;

    #[test]
    fn numbers_name_one_node_each() {
        let last = Slot::new(SLOT_MAX).unwrap();
        for node in [
            Node::Root,
            Node::Layers,
            Node::Trees,
            Node::Layer(layer_number(&Digest::of(b"a"))),
            Node::Layer(layer_number(&Digest::from_bytes([0; 32]))),
            Node::Inode { slot: Slot::FIRST, inode: 0 },
            Node::Inode { slot: last, inode: u32::MAX },
        ] {
            assert_eq!(Node::from_number(node.number()), Some(node));
        }
        assert_eq!(Slot::new(0), None);
        assert_eq!(Slot::new(SLOT_MAX + 1), None);
        assert_eq!(Node::from_number(0), None);
        assert_eq!(Node::from_number(4), None);
    }
}
