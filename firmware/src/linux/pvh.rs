//! Plans the boot of a PVH kernel: an ELF file with a Xen PHYS32_ENTRY note, entered in 32-bit protected mode with
//! the address of an `hvm_start_info` in EBX (Xen docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h).

use zerocopy::{Immutable, IntoBytes};

use super::elf::{Elf, ElfError};
use super::place::{Given, PlaceError, Plan};
use crate::layout;
use crate::machine::MachineDescription;
use crate::memory_map::pvh_entries;
use crate::plan::{LaunchPlan, Segment, VcpuState};

/// Type of the note that holds the 32-bit entry point (Xen public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// `hvm_start_info.magic`.
const START_INFO_MAGIC: u32 = 0x336E_C578;

/// Why an ELF kernel cannot be booted.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PvhError {
    /// A malformed ELF file.
    #[error("kernel: {0}")]
    Elf(#[from] ElfError),
    /// No PVH entry.
    #[error("the kernel has no PVH entry (Xen note PHYS32_ENTRY); build it with CONFIG_PVH")]
    NoEntry,
    /// The entry is not in the kernel.
    #[error("the kernel's PVH entry {0:#x} lies in none of its segments")]
    Entry(u64),
    /// A segment that cannot be where it wants to be.
    #[error("kernel segment {start:#x}+{len:#x} {rule}")]
    Segment {
        /// First byte.
        start: u64,
        /// Length.
        len: u64,
        /// What it breaks.
        rule: &'static str,
    },
    /// It does not fit into the pod.
    #[error("kernel: {0}")]
    Place(#[from] PlaceError),
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// Plans the boot of `kernel`.
///
/// # Errors
/// [`PvhError`].
pub fn plan<'a>(kernel: &'a [u8], given: &Given<'a, '_>) -> Result<LaunchPlan<'a>, PvhError> {
    let command_line = given.command_line(usize::MAX)?;
    let elf = Elf::read(kernel)?;
    let entry = entry(&elf)?;
    let low_start = given
        .acpi
        .map_or(layout::EBDA_START, |t| t.gpa.saturating_add(t.bytes.len() as u64));
    let kernel_end = check_segments(&elf, entry, low_start, given.machine)?;
    let initrd = given.place_initrd(kernel_end, u64::MAX)?;

    let mut plan = Plan::new();
    for segment in &elf.segments {
        plan.put(segment.paddr, segment.memsz, segment.data);
    }
    if let Some((gpa, bytes)) = initrd {
        plan.put_all(gpa, bytes);
    }
    let module = initrd.map(|(gpa, bytes)| [gpa, bytes.len() as u64, 0, 0]);
    for (gpa, bytes) in boot_information(module, command_line, given)? {
        plan.put_all(gpa, bytes);
    }
    Ok(plan.finish(given.acpi, entry_state(entry)))
}

fn entry(elf: &Elf<'_>) -> Result<u64, PvhError> {
    let note = elf.note(b"Xen", XEN_ELFNOTE_PHYS32_ENTRY).ok_or(PvhError::NoEntry)?;
    match (<[u8; 4]>::try_from(note.desc), <[u8; 8]>::try_from(note.desc)) {
        (Ok(word), _) => Ok(u64::from(u32::from_le_bytes(word))),
        (_, Ok(word)) => Ok(u64::from_le_bytes(word)),
        _ => Err(PvhError::NoEntry),
    }
}

/// Segments must be in RAM from 1 MiB on, apart from each other, and hold the entry. Returns their end.
fn check_segments(elf: &Elf<'_>, entry: u64, low_start: u64, machine: &MachineDescription) -> Result<u64, PvhError> {
    let mut ranges: Vec<(u64, u64)> = elf
        .segments
        .iter()
        .map(|segment| (segment.paddr, segment.memsz))
        .collect();
    ranges.sort_unstable();
    let mut end = layout::HIGH_RAM_START;
    for (start, len) in &ranges {
        let (start, len) = (*start, *len);
        let refuse = |rule| Err(PvhError::Segment { start, len, rule });
        // Linkers put the ELF headers into a page below a kernel at 1 MiB; there is memory behind the ACPI tables.
        if start < layout::HIGH_RAM_START {
            if start < low_start || start.saturating_add(len) > layout::HIGH_RAM_START {
                return refuse("must start at or above 1 MiB, behind the boot information");
            }
            continue;
        }
        if start < end {
            return refuse("overlaps another segment");
        }
        if !machine.is_ram(start, len) {
            return refuse("is not in the pod's RAM; give the pod more memory");
        }
        end = start.saturating_add(len);
    }
    let holds = |(start, len): &(u64, u64)| entry >= *start && entry - start < *len;
    if entry > u64::from(u32::MAX) || !ranges.iter().any(holds) {
        return Err(PvhError::Entry(entry));
    }
    Ok(end)
}

/// GDT, start info, module list, memory map and command line, at their places.
fn boot_information(
    module: Option<[u64; 4]>,
    command_line: Vec<u8>,
    given: &Given<'_, '_>,
) -> Result<Vec<(u64, Vec<u8>)>, PlaceError> {
    let memmap = pvh_entries(&given.machine.memory);
    let entries = given.machine.memory.len();
    let room = layout::PML4_START - layout::PVH_MEMMAP_START;
    let max = usize::try_from(room / 24).unwrap_or(0);
    let memmap_entries = u32::try_from(entries).ok().filter(|_| entries <= max);
    let memmap_entries = memmap_entries.ok_or(PlaceError::MemoryMap { entries, max })?;
    let start_info = StartInfo {
        magic: START_INFO_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { layout::PVH_MODLIST_START } else { 0 },
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: given.acpi.map_or(0, |acpi| acpi.rsdp_gpa),
        memmap_paddr: layout::PVH_MEMMAP_START,
        memmap_entries,
        reserved: 0,
    };
    let gdt: Vec<u8> = [0, GDT_CODE, GDT_DATA, GDT_TSS]
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    let mut placed = vec![
        (layout::BOOT_GDT_START, gdt),
        (layout::BOOT_IDT_START, vec![0; 8]),
        (layout::PVH_INFO_START, start_info.as_bytes().to_vec()),
        (layout::PVH_MEMMAP_START, memmap),
        (layout::CMDLINE_START, command_line),
    ];
    placed.extend(module.map(|module| (layout::PVH_MODLIST_START, module.as_bytes().to_vec())));
    Ok(placed)
}

/// Flat 32-bit code, flat data, and a busy TSS of 104 bytes (SDM vol. 3, 3.4.5).
const GDT_CODE: u64 = 0x00CF_9B00_0000_FFFF;
const GDT_DATA: u64 = 0x00CF_9300_0000_FFFF;
const GDT_TSS: u64 = 0x0000_8B00_0000_0067;

/// 32-bit protected mode, paging off, EBX at the start info.
fn entry_state(entry: u64) -> VcpuState {
    let data = Segment {
        selector: 0x10,
        attrib: 0xC93,
        limit: u32::MAX,
        base: 0,
    };
    VcpuState {
        rip: entry,
        rbx: layout::PVH_INFO_START,
        cs: Segment {
            selector: 0x08,
            attrib: 0xC9B,
            ..data
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        tr: Segment {
            selector: 0x18,
            attrib: 0x8B,
            limit: 0x67,
            base: 0,
        },
        gdtr: Segment {
            limit: 4 * 8 - 1,
            base: layout::BOOT_GDT_START,
            ..Segment::default()
        },
        idtr: Segment {
            limit: 7,
            base: layout::BOOT_IDT_START,
            ..Segment::default()
        },
        // PE and ET.
        cr0: 0x11,
        ..VcpuState::reset()
    }
}

#[cfg(test)]
pub(crate) mod tests;
