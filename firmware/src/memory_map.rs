//! Which guest physical addresses are RAM: the map of a pod from its memory size, and the forms in which a guest
//! is told (PVH table, IGVM parameter) and in which the monitor maps it (RAM ranges).

use igvm_defs::{IGVM_VHS_MEMORY_MAP_ENTRY, MemoryMapEntryType};
use zerocopy::IntoBytes;

use crate::layout;
use crate::plan::{GpaRange, PAGE_SIZE};

/// What a range of guest physical memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// RAM the guest may use.
    Ram,
    /// Not RAM, or not the guest's to use.
    Reserved,
    /// Persistent memory.
    Persistent,
    /// RAM the guest should keep for a purpose (igvm_defs `SPECIFIC_PURPOSE`).
    SpecificPurpose,
}

impl MemoryKind {
    /// The type in an E820 or PVH memory map (ACPI 6.5, table 15.4).
    #[must_use]
    pub fn e820_type(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Persistent => 7,
            Self::SpecificPurpose => 0xEFFF_FFFF,
        }
    }

    fn igvm_type(self) -> MemoryMapEntryType {
        match self {
            Self::Ram => MemoryMapEntryType::MEMORY,
            Self::Reserved => MemoryMapEntryType::PLATFORM_RESERVED,
            Self::Persistent => MemoryMapEntryType::PERSISTENT,
            Self::SpecificPurpose => MemoryMapEntryType::SPECIFIC_PURPOSE,
        }
    }
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// A memory size that cannot be mapped.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryMapError {
    /// Not whole pages, or too little to boot from.
    #[error("memory of {0} bytes: it must be a multiple of 4096, and at least 2 MiB")]
    Size(u64),
    /// RAM would reach into the 64-bit device window.
    #[error("memory of {size} bytes reaches {end:#x}; RAM must end at or below {limit:#x}")]
    TooLarge {
        /// Memory asked for.
        size: u64,
        /// Where it would end.
        end: u64,
        /// Where it may end.
        limit: u64,
    },
}

/// Where the RAM of a pod of `size` bytes is: below the 32-bit hole, and from 4 GiB on.
///
/// # Errors
/// [`MemoryMapError`]; `limit` is the start of the 64-bit device window.
pub fn ram_ranges(size: u64, limit: u64) -> Result<Vec<GpaRange>, MemoryMapError> {
    if !size.is_multiple_of(PAGE_SIZE) || size < 2 << 20 {
        return Err(MemoryMapError::Size(size));
    }
    let low = size.min(layout::MEM_32BIT_RESERVED_START);
    let mut ranges = vec![GpaRange { start: 0, len: low }];
    let high = size.saturating_sub(low);
    if high > 0 {
        let end = layout::RAM_64BIT_START.saturating_add(high);
        if end > limit {
            return Err(MemoryMapError::TooLarge { size, end, limit });
        }
        ranges.push(GpaRange {
            start: layout::RAM_64BIT_START,
            len: high,
        });
    }
    Ok(ranges)
}

/// The map a guest is told, sorted: RAM without the hole at 640 KiB (where the ACPI tables are), and the PCI
/// configuration window as reserved.
///
/// # Errors
/// As [`ram_ranges`].
pub fn memory_map(size: u64, limit: u64) -> Result<Vec<MemoryRange>, MemoryMapError> {
    let mut map = vec![MemoryRange {
        start: 0,
        len: layout::EBDA_START,
        kind: MemoryKind::Ram,
    }];
    let mut ecam = Some(MemoryRange {
        start: layout::PCI_MMCONFIG_START,
        len: 256 << 20,
        kind: MemoryKind::Reserved,
    });
    for range in ram_ranges(size, limit)? {
        let start = range.start.max(layout::HIGH_RAM_START);
        if range.start > layout::PCI_MMCONFIG_START {
            map.extend(ecam.take());
        }
        let len = range.len.saturating_sub(start.saturating_sub(range.start));
        map.push(MemoryRange {
            start,
            len,
            kind: MemoryKind::Ram,
        });
    }
    map.extend(ecam);
    Ok(map)
}

/// The map as PVH's `hvm_memmap_table_entry` array (Xen public/arch-x86/hvm/start_info.h).
#[must_use]
pub fn pvh_entries(map: &[MemoryRange]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(map.len().saturating_mul(24));
    for range in map {
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.len.to_le_bytes());
        bytes.extend_from_slice(&u64::from(range.kind.e820_type()).to_le_bytes());
    }
    bytes
}

/// The map as Linux's `boot_e820_entry` array (arch/x86/include/uapi/asm/bootparam.h): 20 bytes each.
#[must_use]
pub fn e820_entries(map: &[MemoryRange]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(map.len().saturating_mul(20));
    for range in map {
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.len.to_le_bytes());
        bytes.extend_from_slice(&range.kind.e820_type().to_le_bytes());
    }
    bytes
}

/// The map as the IGVM parameter: entries sorted by address, then one of zero pages. Ranges are cut to whole pages.
#[must_use]
pub fn igvm_entries(map: &[MemoryRange]) -> Vec<u8> {
    let mut sorted = map.to_vec();
    sorted.sort_by_key(|range| range.start);
    let mut bytes = Vec::with_capacity(sorted.len().saturating_add(1).saturating_mul(24));
    for range in sorted {
        let first = range.start.div_ceil(PAGE_SIZE);
        let end = range.start.saturating_add(range.len) / PAGE_SIZE;
        if end <= first {
            continue;
        }
        bytes.extend_from_slice(entry(first, end.saturating_sub(first), range.kind).as_bytes());
    }
    bytes.extend_from_slice(entry(0, 0, MemoryKind::Ram).as_bytes());
    bytes
}

fn entry(starting_gpa_page_number: u64, number_of_pages: u64, kind: MemoryKind) -> IGVM_VHS_MEMORY_MAP_ENTRY {
    let entry_type = kind.igvm_type();
    IGVM_VHS_MEMORY_MAP_ENTRY {
        starting_gpa_page_number,
        number_of_pages,
        entry_type,
        flags: 0,
        reserved: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = layout::MEM_64BIT_DEVICES_START;

    #[test]
    fn small_pods_lie_below_the_hole() {
        assert_eq!(
            ram_ranges(2 << 30, LIMIT).unwrap(),
            [GpaRange { start: 0, len: 2 << 30 }]
        );
        assert_eq!(
            ram_ranges(3 << 30, LIMIT).unwrap(),
            [GpaRange { start: 0, len: 3 << 30 }]
        );
    }

    #[test]
    fn large_pods_go_on_at_4_gib() {
        let ranges = ram_ranges(5 << 30, LIMIT).unwrap();
        assert_eq!(
            ranges,
            [
                GpaRange { start: 0, len: 3 << 30 },
                GpaRange {
                    start: 4 << 30,
                    len: 2 << 30
                }
            ]
        );
        let map = memory_map(5 << 30, LIMIT).unwrap();
        let starts: Vec<_> = map.iter().map(|r| (r.start, r.len, r.kind)).collect();
        assert_eq!(
            starts,
            [
                (0, 0xA_0000, MemoryKind::Ram),
                (0x10_0000, 0xBFF0_0000, MemoryKind::Ram),
                (0xE800_0000, 0x1000_0000, MemoryKind::Reserved),
                (0x1_0000_0000, 2 << 30, MemoryKind::Ram),
            ]
        );
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert_eq!(ram_ranges(0, LIMIT), Err(MemoryMapError::Size(0)));
        assert_eq!(
            ram_ranges((2 << 20) + 1, LIMIT),
            Err(MemoryMapError::Size((2 << 20) + 1))
        );
        assert!(matches!(
            ram_ranges(1 << 40, LIMIT),
            Err(MemoryMapError::TooLarge { limit: LIMIT, .. })
        ));
        assert!(ram_ranges((1 << 40) - (1 << 30), LIMIT).is_ok());
        assert!(matches!(
            ram_ranges(!0xFFF, u64::MAX - 1),
            Err(MemoryMapError::TooLarge { .. })
        ));
    }

    #[test]
    fn the_forms_agree() {
        let map = memory_map(5 << 30, LIMIT).unwrap();
        let (pvh, e820) = (pvh_entries(&map), e820_entries(&map));
        assert_eq!((pvh.len(), e820.len()), (4 * 24, 4 * 20));
        for (pvh, e820) in pvh.chunks(24).zip(e820.chunks(20)) {
            assert_eq!((&pvh[..20], &pvh[20..]), (e820, &[0; 4][..]));
        }
        let igvm = igvm_entries(&map);
        assert_eq!(igvm.len(), 5 * 24);
        assert_eq!(igvm[24..40], [0x100u64, 0xBFF00].map(u64::to_le_bytes).concat());
        assert_eq!(igvm[2 * 24 + 16], 1);
        assert_eq!(igvm[4 * 24..], [0; 24]);
    }
}
