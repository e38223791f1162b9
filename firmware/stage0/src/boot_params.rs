//! `boot_params` ("zero page", Linux Documentation/arch/x86/boot.rst and zero-page.rst): what the kernel is told, and the
//! confidential-computing blob beside it.

use crate::manifest::{Image, Range, SETUP_HEADER};
use crate::map::MemoryMap;
use crate::put;
use crate::refusal::Refusal;

/// Bytes of `boot_params`.
pub const LEN: usize = 4096;
/// Most entries of its E820 table.
pub const MAX_E820: usize = 128;

mod at {
    //! Offsets.
    pub(super) const ACPI_RSDP_ADDR: usize = 0x070;
    pub(super) const EXT_RAMDISK_IMAGE: usize = 0x0C0;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const SETUP_DATA: usize = 0x250;
    pub(super) const E820_TABLE: usize = 0x2D0;
}

/// What a range of memory is to Linux (E820).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RAM.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// RAM that is kept for something.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// Where.
    pub range: Range,
    /// What for.
    pub kind: Kind,
}

/// What `boot_params` are filled with.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What is booted.
    pub image: &'a Image<'a>,
    /// The map, checked.
    pub map: &'a MemoryMap,
    /// RAM that is kept; sorted, not overlapping.
    pub kept: &'a [Kept],
    /// GPA of the RSDP.
    pub rsdp: u64,
    /// GPA of the first `setup_data`; 0: none.
    pub setup_data: u64,
}

/// Fills `page`, whatever it held.
///
/// # Errors
/// [`Refusal::BootParams`] when the memory map has too many entries.
pub fn fill(page: &mut [u8; LEN], facts: &Facts<'_>) -> Result<(), Refusal> {
    const ROOM: Refusal = Refusal::BootParams("a field is outside");
    /// The loader is of a kind that has no number.
    const UNKNOWN_LOADER: u8 = 0xFF;
    page.fill(0);
    let image = facts.image;
    put(page, SETUP_HEADER, image.setup_header).ok_or(ROOM)?;
    let low = |value: u64| (value as u32).to_le_bytes();
    let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
    let initrd = image.initrd;
    let dest = if initrd.len == 0 { 0 } else { initrd.dest };
    for (offset, bytes) in [
        (at::CODE32_START, low(image.kernel.dest)),
        (at::RAMDISK_IMAGE, low(dest)),
        (at::RAMDISK_SIZE, low(initrd.len)),
        (at::EXT_RAMDISK_IMAGE, high(dest)),
        (at::EXT_RAMDISK_IMAGE + 4, high(initrd.len)),
        (at::CMD_LINE_PTR, low(image.command_line)),
        (at::EXT_RAMDISK_IMAGE + 8, high(image.command_line)),
    ] {
        put(page, offset, &bytes).ok_or(ROOM)?;
    }
    put(page, at::TYPE_OF_LOADER, &[UNKNOWN_LOADER]).ok_or(ROOM)?;
    put(page, at::ACPI_RSDP_ADDR, &facts.rsdp.to_le_bytes()).ok_or(ROOM)?;
    put(page, at::SETUP_DATA, &facts.setup_data.to_le_bytes()).ok_or(ROOM)?;
    let mut table = E820 { page, count: 0 };
    for (range, ram) in facts.map.ranges() {
        if !ram {
            table.add(*range, Kind::Reserved)?;
            continue;
        }
        let mut from = range.start;
        for kept in facts.kept.iter().filter(|kept| kept.range.meets(range)) {
            table.add(
                Range {
                    start: from,
                    end: kept.range.start,
                },
                Kind::Ram,
            )?;
            table.add(kept.range, kept.kind)?;
            from = kept.range.end;
        }
        table.add(
            Range {
                start: from,
                end: range.end,
            },
            Kind::Ram,
        )?;
    }
    Ok(())
}

struct E820<'a> {
    page: &'a mut [u8; LEN],
    count: u8,
}

impl E820<'_> {
    fn add(&mut self, range: Range, kind: Kind) -> Result<(), Refusal> {
        const TOO_MANY: Refusal = Refusal::BootParams("more than 128 ranges of memory");
        const ENTRY: usize = 20;
        if range.is_empty() {
            return Ok(());
        }
        if usize::from(self.count) >= MAX_E820 {
            return Err(TOO_MANY);
        }
        let offset = at::E820_TABLE + usize::from(self.count) * ENTRY;
        put(self.page, offset, &range.start.to_le_bytes()).ok_or(TOO_MANY)?;
        put(self.page, offset + 8, &range.len().to_le_bytes()).ok_or(TOO_MANY)?;
        put(self.page, offset + 16, &(kind as u32).to_le_bytes()).ok_or(TOO_MANY)?;
        self.count += 1;
        put(self.page, at::E820_ENTRIES, &[self.count]).ok_or(TOO_MANY)
    }
}

/// Writes a `setup_data` of type SETUP_CC_BLOB and the `cc_blob_sev_info` behind it (Linux arch/x86/include/asm/sev.h) into
/// `page`, which lies at GPA `gpa`. Both pages named are the firmware's.
pub fn cc_blob(page: &mut [u8], gpa: u64, secrets: u64, cpuid: u64) -> Option<()> {
    const SETUP_CC_BLOB: u32 = 7;
    const MAGIC: u32 = 0x4544_4D41;
    const BLOB: usize = 32;
    let address = u32::try_from(gpa.checked_add(BLOB as u64)?).ok()?;
    page.get_mut(..BLOB + 40)?.fill(0);
    put(page, 8, &SETUP_CC_BLOB.to_le_bytes())?;
    put(page, 12, &4u32.to_le_bytes())?;
    put(page, 16, &address.to_le_bytes())?;
    put(page, BLOB, &MAGIC.to_le_bytes())?;
    put(page, BLOB + 8, &secrets.to_le_bytes())?;
    put(page, BLOB + 16, &4096u32.to_le_bytes())?;
    put(page, BLOB + 24, &cpuid.to_le_bytes())?;
    put(page, BLOB + 32, &4096u32.to_le_bytes())
}
