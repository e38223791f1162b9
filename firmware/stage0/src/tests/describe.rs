//! ACPI tables and boot parameters.

use proptest::prelude::*;

use super::{manifest, map_page};
use crate::boot_params::{self, Facts, Kept, Kind};
use crate::codes;
use crate::manifest::{Range, read};
use crate::map::MemoryMap;
use crate::{acpi, layout, madt, number};

const AREA: u64 = 0x1E_0000;

#[test]
fn tables_point_at_each_other() {
    let bytes = manifest(|_| {});
    let image = read(&bytes, true).unwrap();
    let mut host = vec![0xEE; 200];
    let len = madt::make(&mut host, 3).unwrap();
    for given in [None, Some(&host[..len])] {
        let mut area = vec![0xAA; 0x1000];
        let tables = acpi::lay_out(&mut area, AREA, &image, given, 3, 40).unwrap();
        assert!(area[tables.len..].iter().all(|byte| *byte == 0xAA));
        let at = |gpa: u64| usize::try_from(gpa - AREA).unwrap();
        let table = |gpa: u64| {
            let len = number::<4>(&area, at(gpa) + 4).unwrap();
            let table = &area[at(gpa)..at(gpa + len)];
            assert_eq!(madt::sum(table), 0);
            table
        };
        let rsdp = &area[at(tables.rsdp)..][..36];
        assert_eq!(
            (&rsdp[..8], madt::sum(&rsdp[..20]), madt::sum(rsdp)),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(number::<8>(rsdp, 24).unwrap());
        let [fadt, apic, mcfg] = [36, 44, 52].map(|offset| table(number::<8>(xsdt, offset).unwrap()));
        assert_eq!((&fadt[..4], &mcfg[..4]), (&b"FACP"[..], &b"MCFG"[..]));
        assert_eq!(apic, &host[..len]);
        let dsdt = table(number::<8>(fadt, 140).unwrap());
        let wanted = layout::device_area(40).mmio_start - 1;
        assert_eq!(number::<8>(dsdt, 40), Some(wanted));
    }
    let mut small = vec![0; 500];
    let refusal = acpi::lay_out(&mut small, AREA, &image, None, 3, 40).unwrap_err();
    assert_eq!(refusal.code(), codes::ACPI);
}

#[test]
fn the_top_of_the_address_space_is_a_power_of_two() {
    for bits in 30..=52u8 {
        let area = layout::device_area(bits);
        assert_eq!(area.mmio_end + (128 << 10), 1 << bits.clamp(36, 43));
    }
}

#[test]
fn a_wrong_fixup_or_table_is_refused() {
    let bytes = manifest(|_| {});
    let image = read(&bytes, true).unwrap();
    let mut area = vec![0; 0x1000];
    for (offset, base) in [(30, 0), (93, 0), (u32::MAX, 0), (40, 2)] {
        let fixups = [crate::abi::Fixup {
            offset,
            base,
            addend: 0,
        }];
        let image = crate::manifest::Image {
            fixups: &fixups,
            ..image
        };
        assert!(
            acpi::lay_out(&mut area, AREA, &image, None, 1, 40).is_err(),
            "{offset} {base}"
        );
    }
    for at in [0, 5, 112, 117, 400] {
        let mut tables = image.acpi.to_vec();
        tables[at] ^= 0x40;
        let image = crate::manifest::Image { acpi: &tables, ..image };
        assert!(acpi::lay_out(&mut area, AREA, &image, None, 1, 40).is_err(), "{at}");
    }
}

#[test]
fn boot_params_say_where_everything_is() {
    let bytes = manifest(|_| {});
    let image = read(&bytes, true).unwrap();
    let map = MemoryMap::read(&map_page(&[(0, 0xA_0000, 0), (0x10_0000, 0x800_0000, 0)]), 40).unwrap();
    let mut page = [0xEE; 4096];
    let facts = Facts {
        image: &image,
        map: &map,
        kept: &[],
        rsdp: 0x1E_0100,
        setup_data: 0x1D_F000,
    };
    boot_params::fill(&mut page, &facts).unwrap();
    let field = |offset| number::<4>(&page, offset).unwrap();
    assert_eq!((field(0x70), field(0x250)), (0x1E_0100, 0x1D_F000));
    assert_eq!((field(0x218), field(0x21C)), (image.initrd.dest, 10));
    assert_eq!((field(0x214), field(0x228)), (image.kernel.dest, image.command_line));
    assert_eq!((page[0x210], page[0x1EF], page[0x1E8]), (0xFF, 0, 2));
    assert_eq!(page[0x202..0x206], *b"HdrS");
}

#[test]
fn the_blob_is_as_linux_reads_it() {
    let mut page = [0xEE; 4096];
    boot_params::cc_blob(&mut page, 0x1D_F000, 0x10_1000, 0x10_0000).unwrap();
    let word = |offset| number::<4>(&page, offset).unwrap();
    assert_eq!((number::<8>(&page, 0), word(8), word(12)), (Some(0), 7, 4));
    let blob = usize::try_from(word(16) - 0x1D_F000).unwrap();
    assert_eq!(
        (word(blob), word(blob + 16), word(blob + 32)),
        (0x4544_4D41, 4096, 4096)
    );
    assert_eq!(
        (number::<8>(&page, blob + 8), number::<8>(&page, blob + 24)),
        (Some(0x10_1000), Some(0x10_0000))
    );
}

proptest! {
    #[test]
    fn e820_has_all_ram_and_what_is_kept_of_it(parts in prop::collection::vec((0u64..64, 1u64..64, any::<bool>()), 1..60)) {
        let bytes = manifest(|_| {});
        let image = read(&bytes, true).unwrap();
        let mut at = 0x100;
        let mut entries = Vec::new();
        for (gap, len, ram) in parts {
            let start = at + gap;
            at = start + len;
            entries.push((start << 12, at << 12, u64::from(!ram)));
        }
        let map = MemoryMap::read(&map_page(&entries), 40).unwrap();
        // The first and the last page of the first range of RAM.
        let Some(first) = map.ram().next().copied().filter(|range| range.len() > 0x1000) else { return Ok(()) };
        let kept = [(first.start, Kind::Reserved), (first.end - 0x1000, Kind::Acpi)].map(|(start, kind)| Kept {
            range: Range { start, end: start + 0x1000 },
            kind,
        });
        let mut page = [0; 4096];
        let facts = Facts { image: &image, map: &map, kept: &kept, rsdp: 0, setup_data: 0 };
        boot_params::fill(&mut page, &facts).unwrap();
        let mut above = 0;
        let mut sums = [0; 4];
        for index in 0..usize::from(page[0x1E8]) {
            let at = 0x2D0 + index * 20;
            let (start, len) = (number::<8>(&page, at).unwrap(), number::<8>(&page, at + 8).unwrap());
            prop_assert!(start >= above && len > 0);
            above = start + len;
            sums[usize::from(page[at + 16])] += len;
        }
        let ram: u64 = map.ram().map(Range::len).sum();
        let reserved: u64 = map.ranges().filter(|(_, ram)| !ram).map(|(range, _)| range.len()).sum();
        prop_assert_eq!(sums, [0, ram - 0x2000, reserved + 0x1000, 0x1000]);
    }
}
