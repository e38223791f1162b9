//! As much of ELF (32 and 64 bit, little-endian, x86) as loading a kernel takes: loadable segments and notes. Every
//! offset is checked; nothing is copied.

use zerocopy::{FromBytes, Immutable, KnownLayout};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// An ELF file that cannot be loaded.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// Not ELF, or not for this machine.
    #[error("ELF header: {field} is {value:#x}: {rule}")]
    Header {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// Something lies outside the file.
    #[error("ELF {what} {index} ({start:#x}+{len:#x}) lies outside the file of {file_len:#x} bytes")]
    Outside {
        /// What.
        what: &'static str,
        /// Which.
        index: usize,
        /// Offset in the file.
        start: u64,
        /// Length.
        len: u64,
        /// Length of the file.
        file_len: usize,
    },
    /// A segment with more bytes in the file than in memory.
    #[error("ELF program header {index}: p_filesz {filesz:#x} is larger than p_memsz {memsz:#x}")]
    FileSize {
        /// Which.
        index: usize,
        /// Bytes in the file.
        filesz: u64,
        /// Bytes in memory.
        memsz: u64,
    },
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Ident {
    magic: [u8; 4],
    class: u8,
    data: u8,
    version: u8,
    abi: [u8; 9],
    e_type: u16,
    machine: u16,
    e_version: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Rest64 {
    entry: u64,
    phoff: u64,
    shoff: u64,
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    sections: [u16; 3],
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Rest32 {
    entry: u32,
    phoff: u32,
    shoff: u32,
    flags: u32,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    sections: [u16; 3],
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Phdr64 {
    typ: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Phdr32 {
    typ: u32,
    offset: u32,
    vaddr: u32,
    paddr: u32,
    filesz: u32,
    memsz: u32,
    flags: u32,
    align: u32,
}

/// A segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSegment<'a> {
    /// Physical address.
    pub paddr: u64,
    /// Bytes in memory, at least as many as in the file.
    pub memsz: u64,
    /// Contents; the rest is zero.
    pub data: &'a [u8],
}

/// One note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note<'a> {
    /// Name, without its NUL.
    pub name: &'a [u8],
    /// Type.
    pub typ: u32,
    /// Descriptor.
    pub desc: &'a [u8],
}

/// The parts of an ELF file that a loader reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf<'a> {
    /// Segments to load, in file order; empty ones are left out.
    pub segments: Vec<LoadSegment<'a>>,
    /// Contents and alignment of note segments.
    notes: Vec<(&'a [u8], usize)>,
}

impl<'a> Elf<'a> {
    /// Reads headers and finds the segments.
    ///
    /// # Errors
    /// [`ElfError`].
    pub fn read(file: &'a [u8]) -> Result<Self, ElfError> {
        let (is_64, phoff, phentsize, phnum) = header(file)?;
        let mut elf = Self {
            segments: Vec::new(),
            notes: Vec::new(),
        };
        for index in 0..usize::from(phnum) {
            let start = phoff.saturating_add(index as u64 * u64::from(phentsize));
            let raw = bytes(file, "program header", index, start, u64::from(phentsize))?;
            let Some(phdr) = program_header(raw, is_64) else {
                continue;
            };
            if phdr.typ != PT_LOAD && phdr.typ != PT_NOTE {
                continue;
            }
            let data = bytes(file, "segment", index, phdr.offset, phdr.filesz)?;
            if phdr.typ == PT_NOTE {
                elf.notes.push((data, if phdr.align == 8 { 8 } else { 4 }));
                continue;
            }
            if phdr.filesz > phdr.memsz {
                return Err(ElfError::FileSize {
                    index,
                    filesz: phdr.filesz,
                    memsz: phdr.memsz,
                });
            }
            if phdr.memsz > 0 {
                elf.segments.push(LoadSegment {
                    paddr: phdr.paddr,
                    memsz: phdr.memsz,
                    data,
                });
            }
        }
        Ok(elf)
    }

    /// The first note of this name and type. A malformed note ends the search of its segment.
    #[must_use]
    pub fn note(&self, name: &[u8], typ: u32) -> Option<Note<'a>> {
        self.notes.iter().find_map(|(data, align)| {
            Notes {
                rest: data,
                align: *align,
            }
            .find(|note| note.name == name && note.typ == typ)
        })
    }
}

struct Notes<'a> {
    rest: &'a [u8],
    align: usize,
}

impl<'a> Iterator for Notes<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        let ([namesz, descsz, typ], _) = <[u32; 3]>::read_from_prefix(self.rest).ok()?;
        let name_end = 12usize.checked_add(namesz as usize)?;
        let name = self.rest.get(12..name_end)?;
        let desc_start = name_end.checked_next_multiple_of(self.align)?;
        let desc_end = desc_start.checked_add(descsz as usize)?;
        let desc = self.rest.get(desc_start..desc_end)?;
        let next = desc_end.checked_next_multiple_of(self.align)?;
        self.rest = self.rest.get(next..).unwrap_or_default();
        Some(Note {
            name: name.strip_suffix(&[0]).unwrap_or(name),
            typ,
            desc,
        })
    }
}

/// Class, offset, size and count of the program headers.
fn header(file: &[u8]) -> Result<(bool, u64, u16, u16), ElfError> {
    let refuse = |field, value, rule| Err(ElfError::Header { field, value, rule });
    let short = |len| refuse("length of the file", file.len() as u64, len);
    let Ok((ident, rest)) = Ident::read_from_prefix(file) else {
        return short("too short for an ELF header");
    };
    if &ident.magic != b"\x7FELF" {
        return refuse(
            "magic",
            u64::from(u32::from_be_bytes(ident.magic)),
            "must be 7F 45 4C 46",
        );
    }
    if ident.data != 1 {
        return refuse("EI_DATA", u64::from(ident.data), "must be 1 (little-endian)");
    }
    // A 32-bit file may be for either; some kernels are 64-bit code in it.
    let (is_64, machines) = match ident.class {
        1 => (false, &[EM_386, EM_X86_64][..]),
        2 => (true, &[EM_X86_64][..]),
        other => return refuse("EI_CLASS", u64::from(other), "must be 1 or 2"),
    };
    if !machines.contains(&ident.machine) {
        return refuse("e_machine", u64::from(ident.machine), "must be 3 (386) or 62 (x86-64)");
    }
    let (phoff, phentsize, phnum, needed) = if is_64 {
        let Ok((h, _)) = Rest64::read_from_prefix(rest) else {
            return short("too short for an ELF header");
        };
        (h.phoff, h.phentsize, h.phnum, size_of::<Phdr64>())
    } else {
        let Ok((h, _)) = Rest32::read_from_prefix(rest) else {
            return short("too short for an ELF header");
        };
        (u64::from(h.phoff), h.phentsize, h.phnum, size_of::<Phdr32>())
    };
    if usize::from(phentsize) != needed {
        return refuse("e_phentsize", u64::from(phentsize), "must be 32 (ELF32) or 56 (ELF64)");
    }
    Ok((is_64, phoff, phentsize, phnum))
}

fn program_header(raw: &[u8], is_64: bool) -> Option<Phdr64> {
    if is_64 {
        return Phdr64::read_from_bytes(raw).ok();
    }
    let p = Phdr32::read_from_bytes(raw).ok()?;
    Some(Phdr64 {
        typ: p.typ,
        flags: p.flags,
        offset: u64::from(p.offset),
        vaddr: u64::from(p.vaddr),
        paddr: u64::from(p.paddr),
        filesz: u64::from(p.filesz),
        memsz: u64::from(p.memsz),
        align: u64::from(p.align),
    })
}

fn bytes<'a>(file: &'a [u8], what: &'static str, index: usize, start: u64, len: u64) -> Result<&'a [u8], ElfError> {
    let slice = usize::try_from(start)
        .ok()
        .zip(start.checked_add(len).and_then(|end| usize::try_from(end).ok()))
        .and_then(|(start, end)| file.get(start..end));
    slice.ok_or(ElfError::Outside {
        what,
        index,
        start,
        len,
        file_len: file.len(),
    })
}
