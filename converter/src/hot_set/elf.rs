//! What an ELF file says of a start: its loader and libraries, and which of its bytes are read.
//!
//! Only headers, the dynamic section and single strings are read, in ranges: libraries are large.
//! Record layouts come from `object`; damaged files give less.

use std::{iter, ops::Range};

use object::{
    Endianness, elf,
    pod::slice_from_all_bytes,
    read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader},
};

use super::files::Files;

/// Longest file header: that of 64-bit files.
const HEADER_LEN: usize = size_of::<elf::FileHeader64<Endianness>>();
/// Most bytes of program headers, section headers, section names or dynamic section that are read.
const TABLE_LEN_MAX: u64 = 256 << 10;
/// Longest name or run path.
const STRING_LEN_MAX: u64 = 4096;
/// Files up to this length are hot as a whole: cutting them saves little.
const WHOLE_LEN_MAX: u64 = 64 << 10;
/// Sections of a file that only exceptions and debuggers read.
const COLD_SECTIONS: [&[u8]; 4] = [b".eh_frame", b".eh_frame_hdr", b".gcc_except_table", b".note.stapsdt"];

/// How much of the code and constants of a file is hot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The program that is started, or the library that is all of it: a start runs through most of it.
    Program,
    /// Any other library: of a large one, a start runs few functions.
    Library,
}

impl Part {
    /// Longest section of code or constants that is hot. Measured: a start reads a third to three quarters
    /// of an interpreter, everywhere in it, but 1 to 15 % of libraries beyond a few megabytes.
    fn section_len_max(self) -> u64 {
        match self {
            Self::Program => 32 << 20,
            Self::Library => 8 << 20,
        }
    }
}

/// What is known of an ELF file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ElfFile {
    /// Class, byte order and machine: libraries of a process have the same.
    pub(super) kind: ElfKind,
    /// Path of the dynamic loader.
    pub(super) interpreter: Option<Vec<u8>>,
    /// Names of the libraries it needs, in order.
    pub(super) needed: Vec<Vec<u8>>,
    /// `DT_RPATH`, colons and variables in it.
    pub(super) rpath: Option<Vec<u8>>,
    /// `DT_RUNPATH`; with it `DT_RPATH` does not count.
    pub(super) runpath: Option<Vec<u8>>,
    /// Sections and segments, each with what is known of it.
    regions: Vec<Region>,
    size: u64,
}

/// What files of one process have in common.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ElfKind {
    /// 64-bit pointers.
    pub(super) is_64: bool,
    is_big_endian: bool,
    machine: u16,
}

/// A run of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Region {
    range: Range<u64>,
    /// Whether this is code or constants, rather than what the loader works through.
    is_body: bool,
}

impl ElfFile {
    /// Reads what an ELF file says; `None` if it is none.
    pub(super) fn read(files: &mut Files<'_>, number: u32) -> Option<Self> {
        let head = files.read_head(number, HEADER_LEN)?;
        let ident = head.get(..elf::ELFMAG.len() + 1).filter(|ident| ident.starts_with(&elf::ELFMAG))?;
        let parser = Parser { files, number };
        match ident[elf::ELFMAG.len()] {
            elf::ELFCLASS32 => parser.parse::<elf::FileHeader32<Endianness>>(&head),
            elf::ELFCLASS64 => parser.parse::<elf::FileHeader64<Endianness>>(&head),
            _ => None,
        }
    }

    /// The bytes that a start reads, ascending, as far as the headers tell.
    ///
    /// The loader reads headers, symbols, relocations and what it writes to; of code and constants, `part` says.
    pub(super) fn hot_ranges(&self, part: Part) -> Vec<Range<u64>> {
        if self.size <= WHOLE_LEN_MAX {
            return iter::once(0..self.size).collect();
        }
        let is_hot =
            |region: &&Region| !region.is_body || region.range.end - region.range.start <= part.section_len_max();
        let head = 0..HEADER_LEN as u64;
        iter::once(head).chain(self.regions.iter().filter(is_hot).map(|region| region.range.clone())).collect()
    }
}

struct Parser<'f, 'a> {
    files: &'f mut Files<'a>,
    number: u32,
}

impl Parser<'_, '_> {
    fn parse<H: FileHeader<Endian = Endianness>>(mut self, head: &[u8]) -> Option<ElfFile> {
        let header = H::parse(head).ok()?;
        let endian = header.endian().ok()?;
        let size = self.files.size(self.number);
        let kind = ElfKind {
            is_64: header.is_type_64(),
            is_big_endian: endian == Endianness::Big,
            machine: header.e_machine(endian),
        };
        let mut file = ElfFile { kind, size, ..ElfFile::default() };
        let segments_len = u64::from(header.e_phnum(endian)) * size_of::<H::ProgramHeader>() as u64;
        let segments = self.read(header.e_phoff(endian).into(), segments_len).unwrap_or_default();
        let segments = slice_from_all_bytes::<H::ProgramHeader>(&segments).unwrap_or_default();
        for segment in segments {
            let (offset, len) = segment.file_range(endian);
            match segment.p_type(endian) {
                elf::PT_INTERP => {
                    let path = self.read(offset, len.min(STRING_LEN_MAX));
                    file.interpreter = path.map(|path| until_zero(&path).to_vec());
                }
                elf::PT_DYNAMIC => self.read_dynamic::<H>(&mut file, endian, segments, (offset, len)),
                _ => {}
            }
        }
        file.regions = self.regions::<H>(header, endian, segments);
        Some(file)
    }

    fn read_dynamic<H: FileHeader<Endian = Endianness>>(
        &mut self,
        file: &mut ElfFile,
        endian: Endianness,
        segments: &[H::ProgramHeader],
        (offset, len): (u64, u64),
    ) {
        let Some(bytes) = self.read(offset, len) else { return };
        let Ok(entries) = slice_from_all_bytes::<H::Dyn>(&bytes) else { return };
        let tags = || {
            entries.iter().map_while(|entry| entry.tag32(endian).filter(|tag| *tag != elf::DT_NULL).zip(Some(entry)))
        };
        let Some((_, strings)) = tags().find(|(tag, _)| *tag == elf::DT_STRTAB) else { return };
        let Some(strings) = file_offset::<H>(segments, endian, strings.d_val(endian).into()) else { return };
        for (tag, entry) in tags() {
            if !matches!(tag, elf::DT_NEEDED | elf::DT_RPATH | elf::DT_RUNPATH) {
                continue;
            }
            let offset = strings.checked_add(entry.d_val(endian).into());
            let Some(text) = offset.and_then(|offset| self.read_string(offset)) else { continue };
            match tag {
                elf::DT_NEEDED => file.needed.push(text),
                elf::DT_RPATH => file.rpath = Some(text),
                _ => file.runpath = Some(text),
            }
        }
    }

    /// Sections that are loaded and segments that are written, or all segments of a file without section headers.
    fn regions<H: FileHeader<Endian = Endianness>>(
        &mut self,
        header: &H,
        endian: Endianness,
        segments: &[H::ProgramHeader],
    ) -> Vec<Region> {
        let mut regions = Vec::new();
        let segments_start: u64 = header.e_phoff(endian).into();
        regions.push(Region {
            range: segments_start..segments_start.saturating_add(size_of_val(segments) as u64),
            is_body: false,
        });
        let sections = self.loaded_sections::<H>(header, endian);
        let has_sections = sections.is_some();
        regions.extend(sections.unwrap_or_default());
        for segment in segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD) {
            let (start, len) = segment.file_range(endian);
            let is_body = segment.p_flags(endian) & elf::PF_W == 0;
            if !is_body || !has_sections {
                regions.push(Region { range: start..start.saturating_add(len), is_body });
            }
        }
        regions
    }

    fn loaded_sections<H: FileHeader<Endian = Endianness>>(
        &mut self,
        header: &H,
        endian: Endianness,
    ) -> Option<Vec<Region>> {
        let len = u64::from(header.e_shnum(endian)) * size_of::<H::SectionHeader>() as u64;
        let bytes = self.read(header.e_shoff(endian).into(), len)?;
        let sections = slice_from_all_bytes::<H::SectionHeader>(&bytes).ok()?;
        let names = sections.get(usize::from(header.e_shstrndx(endian)))?;
        let names = self.read(names.sh_offset(endian).into(), names.sh_size(endian).into())?;
        let mut regions = Vec::new();
        for section in sections {
            let flags: u64 = section.sh_flags(endian).into();
            let name = names.get(section.sh_name(endian) as usize..).map(until_zero).unwrap_or_default();
            let Some((start, len)) = section.file_range(endian) else { continue };
            if flags & u64::from(elf::SHF_ALLOC) == 0 || COLD_SECTIONS.contains(&name) {
                continue;
            }
            let is_written = flags & u64::from(elf::SHF_WRITE) != 0;
            let is_body = section.sh_type(endian) == elf::SHT_PROGBITS && !is_written;
            regions.push(Region { range: start..start.saturating_add(len), is_body });
        }
        Some(regions)
    }

    fn read(&mut self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(len).ok().filter(|len| *len as u64 <= TABLE_LEN_MAX)?;
        self.files.read_at(self.number, offset, len)
    }

    fn read_string(&mut self, offset: u64) -> Option<Vec<u8>> {
        let rest = self.files.size(self.number).checked_sub(offset)?;
        let bytes = self.read(offset, rest.min(STRING_LEN_MAX))?;
        Some(until_zero(&bytes).to_vec())
    }
}

/// Where in the file an address lies.
fn file_offset<H: FileHeader<Endian = Endianness>>(
    segments: &[H::ProgramHeader],
    endian: Endianness,
    address: u64,
) -> Option<u64> {
    segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD).find_map(|segment| {
        let distance = address.checked_sub(segment.p_vaddr(endian).into())?;
        let (offset, len) = segment.file_range(endian);
        (distance < len).then(|| offset.checked_add(distance)).flatten()
    })
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}
