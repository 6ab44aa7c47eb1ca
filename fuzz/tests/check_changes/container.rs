//! A container of the format (SPEC.md 4) taken apart, without asking whether it obeys a rule.

use format_spec::{
    Index,
    table::{Header, SectionEntry},
};
use lazuli_fuzz::seal;
use zerocopy::{FromBytes, IntoBytes};

#[derive(Clone)]
pub(crate) struct Section {
    pub(crate) kind: u32,
    pub(crate) record_len: usize,
    delta_words: u32,
    pub(crate) bytes: Vec<u8>,
}

/// An index or dedup section in open form.
#[derive(Clone)]
pub(crate) struct Container {
    header: Header,
    pub(crate) sections: Vec<Section>,
}

impl Container {
    pub(crate) fn parse(open: &[u8]) -> Self {
        let (header, rest) = Header::read_from_prefix(open).unwrap();
        let count = header.section_count.get() as usize;
        let (entries, _) = <[SectionEntry]>::ref_from_prefix_with_elems(rest, count).unwrap();
        let sections = entries.iter().map(|entry| {
            let start = usize::try_from(entry.offset.get()).unwrap();
            Section {
                kind: entry.kind.get(),
                record_len: entry.record_len.get() as usize,
                delta_words: entry.delta_words.get(),
                bytes: open[start..start + usize::try_from(entry.len.get()).unwrap()].to_vec(),
            }
        });
        Self { header, sections: sections.collect() }
    }

    /// The open form, with checksums.
    pub(crate) fn to_open(&self) -> Vec<u8> {
        let mut header = self.header;
        header.section_count = u32::try_from(self.sections.len()).unwrap().into();
        let mut bytes = vec![0; size_of::<Header>() + self.sections.len() * size_of::<SectionEntry>()];
        let mut table = Vec::new();
        for section in &self.sections {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            table.push(SectionEntry {
                kind: section.kind.into(),
                record_len: u32::try_from(section.record_len).unwrap().into(),
                offset: (bytes.len() as u64).into(),
                len: (section.bytes.len() as u64).into(),
                crc32: 0.into(),
                delta_words: section.delta_words.into(),
            });
            bytes.extend(&section.bytes);
        }
        bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
        bytes[size_of::<Header>()..][..size_of_val(table.as_slice())].copy_from_slice(table.as_bytes());
        seal::index(&mut bytes);
        bytes
    }

    pub(crate) fn section(&mut self, kind: u32) -> &mut Vec<u8> {
        &mut self.sections.iter_mut().find(|section| section.kind == kind).unwrap().bytes
    }

    /// Takes over the sections of a tree.
    pub(crate) fn put_tree(&mut self, other: &[u8]) {
        for section in Self::parse(other).sections.into_iter().filter(|section| section.kind <= 6) {
            *self.section(section.kind) = section.bytes;
        }
    }

    pub(crate) fn to_index(&self) -> Option<Index<Vec<u8>>> {
        Index::open(self.to_open()).ok()
    }
}
