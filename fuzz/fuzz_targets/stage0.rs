//! What stage0 reads of a host that may lie, and its manifest: nothing panics, and whatever is taken goes through to the
//! tables and boot parameters.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stage0::accept::Ranges;
use stage0::boot_params::{Facts, fill};
use stage0::map::MemoryMap;
use stage0::{acpi, madt, manifest};

fuzz_target!(|data: &[u8]| {
    let [bits, vcpus, map_len, rest @ ..] = data else { return };
    let (vcpus, phys_bits) = (u32::from(*vcpus), bits % 64);
    let page = |bytes: &[u8]| {
        let mut page = vec![0; 4096];
        let len = bytes.len().min(4096);
        page[..len].copy_from_slice(&bytes[..len]);
        page
    };
    let (map, rest) = rest.split_at(rest.len().min(usize::from(*map_len) * 24));
    let (table, image) = rest.split_at(rest.len().min(160));
    let map = MemoryMap::read(&page(map), phys_bits);
    let table = page(table);
    let madt = madt::check_count(vcpus).and_then(|()| madt::check(&table, vcpus));
    if let Ok(map) = &map {
        let left = Ranges::remaining(map, &Ranges::default()).unwrap();
        assert!((0..left.pieces().min(1000)).all(|index| left.piece(index).is_some()));
    }
    let Ok(image) = manifest::read(image, true) else { return };
    let host = madt.ok().flatten().and_then(|len| table.get(..len));
    let mut area = vec![0; 0x2_0000];
    let tables = acpi::lay_out(&mut area, 0x1E_0000, &image, host, vcpus, phys_bits);
    if let (Ok(map), Ok(tables)) = (map, tables) {
        let facts = Facts {
            image: &image,
            map: &map,
            kept: &[],
            rsdp: tables.rsdp,
            setup_data: 0,
        };
        let _ = fill(&mut [0; 4096], &facts);
    }
});
