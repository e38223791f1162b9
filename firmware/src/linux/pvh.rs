//! Plans the boot of a PVH kernel: an ELF file with a Xen PHYS32_ENTRY note, entered in 32-bit protected mode with
//! the address of an `hvm_start_info` in EBX (Xen docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h).

use std::borrow::Cow;

use zerocopy::{Immutable, IntoBytes};

use super::elf::{Elf, ElfError};
use super::{ImageKind, detect};
use crate::acpi::AcpiTables;
use crate::layout;
use crate::machine::MachineDescription;
use crate::memory_map::pvh_entries;
use crate::plan::{LaunchPlan, PAGE_SIZE, PageKind, Platform, Segment, Step, VcpuState, VpContext};

/// Type of the note that holds the 32-bit entry point (Xen public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// `hvm_start_info.magic`.
const START_INFO_MAGIC: u32 = 0x336E_C578;

/// Why a kernel cannot be booted.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PvhError {
    /// Not an ELF file.
    #[error("the kernel is {0}; an uncompressed ELF kernel (vmlinux) with a PVH entry is needed")]
    Format(&'static str),
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
    /// The initrd has no room between kernel and end of low memory.
    #[error("an initrd of {len} bytes does not fit between the kernel's end {kernel_end:#x} and {ram_end:#x}")]
    Initrd {
        /// Its length.
        len: usize,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where low memory ends.
        ram_end: u64,
    },
    /// A command line that the kernel could not read whole.
    #[error("a command line of {0} bytes: at most 65535, and no NUL")]
    CommandLine(usize),
    /// A memory map with more entries than there is room for.
    #[error("a memory map of {0} entries: at most 341")]
    MemoryMap(usize),
    /// The pod's memory does not hold what the boot needs there.
    #[error("{what} needs RAM at {start:#x}+{len:#x}, which the pod does not have")]
    NoRam {
        /// What.
        what: &'static str,
        /// First byte.
        start: u64,
        /// Length.
        len: u64,
    },
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

/// Plans the boot of `kernel` on the native platform, with an initrd high in low memory, and the ACPI tables if
/// there are any. The command line is the argument's; that of `machine` is for IGVM.
///
/// # Errors
/// [`PvhError`].
pub fn plan<'a>(
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    cmdline: &str,
    machine: &MachineDescription,
    acpi: Option<&AcpiTables>,
) -> Result<LaunchPlan<'a>, PvhError> {
    match detect(kernel) {
        ImageKind::Elf => {}
        ImageKind::BzImage => {
            return Err(PvhError::Format(
                "a bzImage (compressed kernel), which is not supported",
            ));
        }
        ImageKind::Igvm => return Err(PvhError::Format("an IGVM file")),
        ImageKind::Unknown => return Err(PvhError::Format("of no known format")),
    }
    if cmdline.len() >= layout::CMDLINE_MAX_SIZE || cmdline.contains('\0') {
        return Err(PvhError::CommandLine(cmdline.len()));
    }
    let elf = Elf::read(kernel)?;
    let entry = entry(&elf)?;
    let low_start = acpi.map_or(layout::EBDA_START, |t| t.gpa.saturating_add(t.bytes.len() as u64));
    let kernel_end = check_segments(&elf, entry, low_start, machine)?;
    let low = GPA_LOW_END.max(layout::CMDLINE_START + layout::CMDLINE_MAX_SIZE as u64);
    if !machine.is_ram(0, low) {
        return Err(PvhError::NoRam {
            what: "boot information",
            start: 0,
            len: low,
        });
    }

    let mut plan = LaunchPlan::new(Platform::Native);
    let mut put = |gpa, len, data: Cow<'a, [u8]>| {
        plan.steps.push(Step::Pages {
            gpa,
            len,
            kind: PageKind::Normal,
            data,
        });
    };
    for segment in &elf.segments {
        put(segment.paddr, segment.memsz, Cow::Borrowed(segment.data));
    }
    let module = match initrd {
        Some(initrd) => {
            let gpa = place_initrd(initrd.len(), kernel_end, machine)?;
            put(gpa, initrd.len() as u64, Cow::Borrowed(initrd));
            Some([gpa, initrd.len() as u64, 0, 0])
        }
        None => None,
    };
    for (gpa, bytes) in boot_information(module, cmdline, machine, acpi)? {
        put(gpa, bytes.len() as u64, Cow::Owned(bytes));
    }
    if let Some(acpi) = acpi {
        put(acpi.gpa, acpi.bytes.len() as u64, Cow::Owned(acpi.bytes.clone()));
    }
    plan.steps.push(Step::Vcpu { vp: 0 });
    plan.vps.push(VpContext {
        index: 0,
        gpa: 0,
        state: entry_state(entry),
        vmsa: Cow::Borrowed(&[]),
    });
    Ok(plan)
}

/// Where GDT, start info, module list and memory map end at most.
const GPA_LOW_END: u64 = layout::PML4_START;

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

fn place_initrd(len: usize, kernel_end: u64, machine: &MachineDescription) -> Result<u64, PvhError> {
    let ram_end = machine
        .ram_range(layout::HIGH_RAM_START)
        .map_or(layout::HIGH_RAM_START, |range| range.start.saturating_add(range.len))
        .min(layout::MEM_32BIT_RESERVED_START);
    // The kernel's end counts when it is in low memory only.
    let kernel_end = if kernel_end > layout::RAM_64BIT_START {
        layout::HIGH_RAM_START
    } else {
        kernel_end
    };
    let gpa = ram_end.checked_sub(len as u64).map(|start| start - start % PAGE_SIZE);
    gpa.filter(|start| *start >= kernel_end).ok_or(PvhError::Initrd {
        len,
        kernel_end,
        ram_end,
    })
}

/// GDT, start info, module list, memory map and command line, at their places.
fn boot_information(
    module: Option<[u64; 4]>,
    cmdline: &str,
    machine: &MachineDescription,
    acpi: Option<&AcpiTables>,
) -> Result<Vec<(u64, Vec<u8>)>, PvhError> {
    let memmap = pvh_entries(&machine.memory);
    let entries = machine.memory.len();
    if memmap.len() as u64 > layout::PML4_START - layout::PVH_MEMMAP_START {
        return Err(PvhError::MemoryMap(entries));
    }
    let start_info = StartInfo {
        magic: START_INFO_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { layout::PVH_MODLIST_START } else { 0 },
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: acpi.map_or(0, |acpi| acpi.rsdp_gpa),
        memmap_paddr: layout::PVH_MEMMAP_START,
        memmap_entries: u32::try_from(entries).map_err(|_| PvhError::MemoryMap(entries))?,
        reserved: 0,
    };
    let gdt: Vec<u8> = [0, GDT_CODE, GDT_DATA, GDT_TSS]
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    let mut command_line = cmdline.as_bytes().to_vec();
    command_line.push(0);
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
mod tests;
