//! The area's places, pieces and chunks, over a VM of KVM where there is one.

use podvisor_devices::memory::PodMemory;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SLOTS: Range<u32> = 64..END_SLOT;

#[test]
fn an_area_lies_behind_ram_and_below_the_devices() {
    let place = |end, size, filling| place(end, size, 1 << 40, filling);
    assert_eq!(place(GIB, 512 * MIB, Filling::ByPiece), 4 * GIB..4 * GIB + 512 * MIB);
    assert_eq!(place(5 * GIB + 1, GIB, Filling::ByPiece).start, 5 * GIB + 128 * MIB);
    let all = place(GIB, 1 << 50, Filling::ByPiece);
    assert_eq!(all, 4 * GIB..1 << 40, "what does not fit is left out");
    assert!(place(GIB, 127 * MIB, Filling::ByPiece).is_empty());
    assert_eq!(place(GIB, 3 * MIB, Filling::ByGuest), 4 * GIB..4 * GIB + 2 * MIB);
    for end in [(1 << 40) - 1, 1 << 40, u64::MAX] {
        assert!(place(end, GIB, Filling::ByPiece).is_empty(), "{end:#x}");
    }
}

fn area(len: u64, filling: Filling, options: &RamOptions) -> Option<HotplugArea> {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        println!("skipped: no /dev/kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    Some(HotplugArea::reserve(vm, SLOTS, 4 * GIB..4 * GIB + len, filling, options).unwrap())
}

fn memory(area: &HotplugArea) -> PodMemory {
    PodMemory::from_regions(vec![area.pod_region()]).unwrap()
}

#[test]
fn pieces_come_and_are_taken_back() {
    for shared in [false, true] {
        let options = RamOptions {
            shared,
            thp: true,
            ..RamOptions::default()
        };
        let Some(area) = area(GIB, Filling::ByPiece, &options) else {
            return;
        };
        let (memory, at) = (memory(&area), GuestAddress(4 * GIB + 128 * MIB));
        assert!(memory.write_obj(1u64, at).is_err(), "nothing is there");
        assert!(area.pod_region().lendable().is_empty());
        area.fill(0, at.0, 256 * MIB).unwrap();
        memory.write_obj(0x55u64, at).unwrap();
        assert!(memory.write_obj(1u64, GuestAddress(at.0 - 8)).is_err());
        assert!(memory.write_obj(1u64, GuestAddress(at.0 + 256 * MIB - 4)).is_err());
        assert_eq!(area.pod_region().lendable(), [(at.0, 256 * MIB)]);
        for (gpa, len) in [
            (at.0, 128 * MIB),
            (at.0 - 128 * MIB, 256 * MIB),
            (at.0, MIB),
            (0, 128 * MIB),
        ] {
            assert!(area.fill(1, gpa, len).is_err(), "{gpa:#x} {len:#x}");
        }
        area.empty(0, at.0, 256 * MIB);
        assert!(memory.read_obj::<u64>(at).is_err());
        area.fill(0, at.0, 128 * MIB).unwrap();
        assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0, "what was in it is gone");
    }
}

#[test]
fn a_guest_is_given_chunks_for_what_it_was_allowed() {
    for (shared, prefault) in [(false, false), (true, false), (true, true)] {
        let options = RamOptions {
            shared,
            prefault,
            ..RamOptions::default()
        };
        let Some(area) = area(GIB, Filling::ByGuest, &options) else {
            return;
        };
        let mapped = || area.mapped.lock().unwrap().len();
        let plug = |gpa, len| {
            area.provide(gpa, len).unwrap();
            area.blocks.set(area.blocks.range(gpa, len / BLOCK_SIZE).unwrap(), true);
        };
        let unplug = |gpa, len| {
            area.discard(gpa, len).unwrap();
            area.blocks
                .set(area.blocks.range(gpa, len / BLOCK_SIZE).unwrap(), false);
        };
        let (start, block) = (4 * GIB, BLOCK_SIZE);
        assert!(area.provide(start, block).is_err(), "nothing was allowed");
        area.allow(130 * MIB);
        plug(start, block);
        plug(start + 126 * MIB, 4 * MIB);
        assert_eq!(mapped(), 2);
        assert!(
            area.provide(start + 256 * MIB, block).is_err(),
            "a third chunk for 6 MiB"
        );
        let memory = memory(&area);
        memory.write_obj(7u32, GuestAddress(start + 126 * MIB)).unwrap();
        unplug(start + 126 * MIB, block);
        assert_eq!(mapped(), 2, "each has a block left");
        unplug(start, block);
        assert_eq!(mapped(), 1);
        plug(start + 256 * MIB, block);
        assert!(memory.read_obj::<u32>(GuestAddress(start + 126 * MIB)).is_err());
        unplug(start, GIB);
        assert_eq!(mapped(), 0);
        plug(start + 126 * MIB, block);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(start + 126 * MIB)).unwrap(), 0);
        for (gpa, len) in [
            (start - block, block),
            (start + 1, block),
            (start, 1),
            (start, 2 * GIB),
            (u64::MAX, block),
        ] {
            assert!(
                area.provide(gpa, len).is_err() && area.discard(gpa, len).is_err(),
                "{gpa:#x} {len:#x}"
            );
        }
    }
}

#[test]
fn a_large_area_has_chunks_for_the_slots_there_are() {
    let size = 2 << 40;
    let Some(area) = area(size, Filling::ByGuest, &RamOptions::default()) else {
        return;
    };
    assert!(size / area.chunk <= 960 && area.chunk >= layout::MEMORY_BLOCK_SIZE);
    area.allow(size);
    let last = 4 * GIB + size - BLOCK_SIZE;
    area.provide(last, BLOCK_SIZE).unwrap();
    area.discard(last, BLOCK_SIZE).unwrap();
}

#[test]
fn only_blocks_that_a_guest_plugs_come_at_once() {
    let options = RamOptions {
        shared: true,
        prefault: true,
        ..RamOptions::default()
    };
    let Some(area) = area(GIB, Filling::ByGuest, &options) else {
        return;
    };
    let file = area.region.file_offset().unwrap().file();
    let bytes = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    assert_eq!(bytes(), 0, "a reserved area is address space");
    area.allow(GIB);
    area.provide(4 * GIB + 6 * MIB, 4 * MIB).unwrap();
    assert_eq!(bytes(), 4 * MIB);
    area.discard(4 * GIB + 6 * MIB, 2 * MIB).unwrap();
    assert_eq!(bytes(), 2 * MIB, "what is unplugged is given back at once");
}
