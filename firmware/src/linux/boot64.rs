//! Plans the boot of a bzImage by the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst): entered in long mode
//! over an identity map, with the address of `boot_params` (the "zero page") in RSI.

use super::bzimage::{BzImage, BzImageError, ENTRY_64, SETUP_HEADER_OFFSET};
use super::place::{Given, PlaceError, Plan};
use crate::layout;
use crate::memory_map::e820_entries;
use crate::plan::{LaunchPlan, PAGE_SIZE, Segment, VcpuState};

/// Why a bzImage cannot be booted.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Boot64Error {
    /// Not a bzImage with a 64-bit entry.
    #[error(transparent)]
    Image(#[from] BzImageError),
    /// It does not fit into the pod.
    #[error("kernel: {0}")]
    Place(#[from] PlaceError),
}

/// Offsets in `boot_params` (Linux arch/x86/include/uapi/asm/bootparam.h; Documentation/arch/x86/zero-page.rst).
const ACPI_RSDP_ADDR: usize = 0x70;
const E820_ENTRIES: usize = 0x1E8;
const TYPE_OF_LOADER: usize = 0x210;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21C;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2D0;
/// Entries that `boot_params.e820_table` has room for (E820_MAX_ENTRIES_ZEROPAGE).
const E820_MAX: usize = 128;
/// `type_of_loader` of a loader that has no number.
const LOADER_UNDEFINED: u8 = 0xFF;

/// Bytes that one page directory maps.
const GIB: u64 = 1 << 30;
/// Page table entry: present, writable; and a page of 2 MiB (AMD APM vol. 2, 5.3).
const TABLE: u64 = 3;
const LARGE_PAGE: u64 = 0x83;

/// Plans the boot of `kernel` at its preferred address.
///
/// # Errors
/// [`Boot64Error`].
pub fn plan<'a>(kernel: &'a [u8], given: &Given<'a, '_>) -> Result<LaunchPlan<'a>, Boot64Error> {
    let image = BzImage::read(kernel)?;
    let command_line = given.command_line(image.cmdline_size)?;
    given.need_ram("kernel (pref_address, init_size)", image.pref_address, image.init_size)?;
    let initrd = given.place_initrd(image.end(), image.initrd_addr_max.saturating_add(1))?;

    let mut plan = Plan::new();
    plan.put_all(image.pref_address, image.code);
    if let Some((gpa, bytes)) = initrd {
        plan.put_all(gpa, bytes);
    }
    let initrd = initrd.map(|(gpa, bytes)| (gpa, bytes.len()));
    plan.put_all(layout::ZERO_PAGE_START, zero_page(&image, initrd, given)?);
    plan.put_all(layout::CMDLINE_START, command_line);
    plan.put_all(layout::PML4_START, page_tables(image.end()));
    let gdt: Vec<u8> = [0, 0, GDT_CODE, GDT_DATA]
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    plan.put_all(layout::BOOT_GDT_START, gdt);
    Ok(plan.finish(given.acpi, entry_state(image.pref_address.saturating_add(ENTRY_64))))
}

/// `boot_params`: the kernel's own setup header, and what a loader fills in.
fn zero_page(image: &BzImage<'_>, initrd: Option<(u64, usize)>, given: &Given<'_, '_>) -> Result<Vec<u8>, PlaceError> {
    let entries = given.machine.memory.len();
    let max = E820_MAX;
    let count = u8::try_from(entries).ok().filter(|count| usize::from(*count) <= max);
    let count = count.ok_or(PlaceError::MemoryMap { entries, max })?;
    let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap_or(0)];
    let mut put = |offset: usize, bytes: &[u8]| {
        let room = page.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len()));
        if let Some(room) = room {
            room.copy_from_slice(bytes);
        }
    };
    put(SETUP_HEADER_OFFSET, image.setup_header);
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(CODE32_START, &low_half(image.pref_address));
    put(CMD_LINE_PTR, &low_half(layout::CMDLINE_START));
    let (ramdisk, ramdisk_len) = initrd.unwrap_or_default();
    // Both below 4 GiB: it lies in low memory.
    put(RAMDISK_IMAGE, &low_half(ramdisk));
    put(RAMDISK_SIZE, &low_half(ramdisk_len as u64));
    put(
        ACPI_RSDP_ADDR,
        &given.acpi.map_or(0, |acpi| acpi.rsdp_gpa).to_le_bytes(),
    );
    put(E820_ENTRIES, &[count]);
    put(E820_TABLE, &e820_entries(&given.machine.memory));
    Ok(page)
}

fn low_half(address: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = address.to_le_bytes();
    [a, b, c, d]
}

/// PML4, PDPT, and as many page directories as cover `[0, end)`, at most four: an identity map of 2 MiB pages.
fn page_tables(end: u64) -> Vec<u8> {
    let directories = end.div_ceil(GIB).clamp(1, 4);
    let page = |entries: &mut dyn Iterator<Item = u64>| {
        let mut bytes: Vec<u8> = entries.take(512).flat_map(u64::to_le_bytes).collect();
        bytes.resize(4096, 0);
        bytes
    };
    let mut tables = page(&mut std::iter::once(layout::PDPTE_START | TABLE));
    tables.extend(page(
        &mut (0..directories).map(|i| (layout::PDE_START + i * PAGE_SIZE) | TABLE),
    ));
    for directory in 0..directories {
        tables.extend(page(&mut (0..512).map(|i| (directory * GIB + (i << 21)) | LARGE_PAGE)));
    }
    tables
}

/// __BOOT_CS (0x10), 64-bit code, and __BOOT_DS (0x18), flat data (boot.rst, "64-bit boot protocol").
const GDT_CODE: u64 = 0x00AF_9B00_0000_FFFF;
const GDT_DATA: u64 = 0x00CF_9300_0000_FFFF;

/// Long mode, interrupts off, RSI at the zero page.
fn entry_state(entry: u64) -> VcpuState {
    let data = Segment {
        selector: 0x18,
        attrib: 0xC93,
        limit: u32::MAX,
        base: 0,
    };
    VcpuState {
        rip: entry,
        rsi: layout::ZERO_PAGE_START,
        rsp: layout::BOOT_STACK_POINTER,
        cs: Segment {
            selector: 0x10,
            attrib: 0xA9B,
            ..data
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        // A busy TSS must be in the register; no descriptor in memory is needed for that.
        tr: Segment {
            attrib: 0x8B,
            limit: 0x67,
            ..Segment::default()
        },
        gdtr: Segment {
            limit: 4 * 8 - 1,
            base: layout::BOOT_GDT_START,
            ..Segment::default()
        },
        idtr: Segment::default(),
        // PG, ET, PE.
        cr0: 0x8000_0011,
        cr3: layout::PML4_START,
        // PAE.
        cr4: 0x20,
        // LMA, LME.
        efer: 0x500,
        ..VcpuState::reset()
    }
}

#[cfg(test)]
mod tests;
