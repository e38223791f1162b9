//! The page gate: what a guest may name that is not shared RAM, by every way a device can reach memory.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::{Bytes, GuestMemory};

use super::*;
use crate::virtio::testing::PageGate;

const PAGE: u64 = 4096;
/// Two regions with a hole: 16 pages at 0, 16 pages at 1 MiB; and one that adjoins the second.
const REGIONS: [(u64, u64); 3] = [(0, 16 * PAGE), (1 << 20, 16 * PAGE), ((1 << 20) + 16 * PAGE, 4 * PAGE)];

fn pod() -> (Arc<PageGate>, Arc<PodMemory>) {
    let gate = Arc::new(PageGate::default());
    let regions = REGIONS
        .iter()
        .map(|(start, len)| {
            let inner = GuestRegionMmap::from_range(GuestAddress(*start), *len as usize, None).unwrap();
            PodRegion::new(Arc::new(inner), Some(Arc::clone(&gate) as Arc<dyn SharedPages>))
        })
        .collect();
    (gate, Arc::new(PodMemory::from_regions(regions).unwrap()))
}

/// Whether each way of access works; all must agree.
fn reachable(memory: &PodMemory, gpa: u64, len: usize) -> bool {
    let at = GuestAddress(gpa);
    let mut data = vec![0; len];
    let ways = [
        memory.read_slice(&mut data, at).is_ok(),
        memory.write_slice(&data, at).is_ok(),
        memory.get_slices(at, len).all(|s| s.is_ok()),
        memory.check_range(at, len),
        memory.read_exact_volatile_from(at, &mut data.as_slice(), len).is_ok(),
        memory.write_all_volatile_to(at, &mut Vec::new(), len).is_ok(),
    ];
    assert!(ways.iter().all(|w| *w == ways[0]), "{gpa:#x}+{len:#x}: {ways:?}");
    ways[0]
}

#[test]
fn private_straddling_absent_and_wrapping_addresses_fail_everywhere() {
    let (gate, memory) = pod();
    gate.make_private(3 * PAGE, PAGE);
    for (gpa, len, expected) in [
        (2 * PAGE, 4096, true),
        (3 * PAGE, 1, false),
        (3 * PAGE + 4095, 1, false),
        (4 * PAGE, 1, true),
        (3 * PAGE - 1, 2, false),
        (4 * PAGE - 1, 2, false),
        (2 * PAGE, 3 * 4096, false),
        (16 * PAGE - 1, 1, true),
        (16 * PAGE - 1, 2, false),
        (16 * PAGE, 1, false),
        ((1 << 20) + 16 * PAGE - 8, 16, true),
        ((1 << 20) + 20 * PAGE - 8, 16, false),
        (u64::MAX, 1, false),
        (u64::MAX - 7, 16, false),
    ] {
        assert_eq!(reachable(&memory, gpa, len), expected, "{gpa:#x}+{len:#x}");
    }
    gate.make_shared(3 * PAGE, PAGE);
    assert!(reachable(&memory, 2 * PAGE, 3 * 4096));
    gate.make_private((1 << 20) + 16 * PAGE, 1);
    assert!(
        !reachable(&memory, (1 << 20) + 16 * PAGE - 8, 16),
        "private in the next region"
    );
}

#[test]
fn atomics_and_single_slices_stop_at_the_gate_too() {
    let (gate, memory) = pod();
    gate.make_private(3 * PAGE, PAGE);
    let at = GuestAddress(3 * PAGE + 8);
    assert!(memory.load::<u32>(at, Ordering::Acquire).is_err());
    assert!(memory.store(1u32, at, Ordering::Release).is_err());
    assert!(memory.get_slice(at, 1).is_err());
    assert!(memory.get_slice(GuestAddress(3 * PAGE - 4), 8).is_err());
    assert!(
        memory
            .load::<u64>(GuestAddress(u64::MAX - 7), Ordering::Acquire)
            .is_err()
    );
    memory.store(7u32, GuestAddress(4 * PAGE), Ordering::Release).unwrap();
    assert_eq!(
        memory.load::<u32>(GuestAddress(4 * PAGE), Ordering::Acquire).unwrap(),
        7
    );
    let region = memory.find_region(at).unwrap();
    assert!(
        region.get_host_address(MemoryRegionAddress(0)).is_err(),
        "no way around the gate"
    );
    assert!(
        region.as_volatile_slice().is_err(),
        "a region with a private page is not one slice"
    );
    assert!(region.get_slice(MemoryRegionAddress(u64::MAX), 2).is_err());
    assert!(region.get_slice(MemoryRegionAddress(0), usize::MAX).is_err());
}

#[test]
fn access_by_region_offset_fails_closed() {
    let (gate, memory) = pod();
    let region = memory.find_region(GuestAddress(1 << 20)).unwrap();
    let mut data = [0; 8];
    region.write_slice(&[5; 8], MemoryRegionAddress(8)).unwrap();
    region.read_slice(&mut data, MemoryRegionAddress(8)).unwrap();
    assert_eq!(data, [5; 8]);
    // vm-memory goes through one slice of the whole region here: one private page closes all of it.
    gate.make_private((1 << 20) + PAGE, PAGE);
    assert!(region.read_slice(&mut data, MemoryRegionAddress(8)).is_err());
    assert!(region.write_slice(&data, MemoryRegionAddress(PAGE)).is_err());
    assert!(
        region
            .store(1u16, MemoryRegionAddress(PAGE), Ordering::Relaxed)
            .is_err()
    );
    assert!(
        region
            .load::<u64>(MemoryRegionAddress(PAGE), Ordering::Relaxed)
            .is_err()
    );
    assert!(region.read(&mut data, MemoryRegionAddress(u64::MAX)).is_err());
}

#[test]
fn a_pod_that_is_not_confidential_reaches_all_ram() {
    let inner = GuestRegionMmap::from_range(GuestAddress(0), 4096, None).unwrap();
    let memory = PodMemory::from_regions(vec![PodRegion::new(Arc::new(inner), None)]).unwrap();
    assert!(reachable(&memory, 0, 4096) && !reachable(&memory, 1, 4096));
}

fn queue(desc: u64, avail: u64, used: u64) -> Queue {
    let mut q = Queue::new(16).unwrap();
    q.try_set_desc_table_address(GuestAddress(desc)).unwrap();
    q.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
    q.try_set_used_ring_address(GuestAddress(used)).unwrap();
    q.set_ready(true);
    q
}

#[test]
fn virtqueues_reach_shared_pages_only() {
    let (gate, memory) = pod();
    let mut q = queue(PAGE, 2 * PAGE, 3 * PAGE);
    let desc = |i: u64, gpa, len, flags, next| {
        let raw = RawDescriptor::from(Descriptor::new(gpa, len, flags, next));
        memory.write_obj(raw, GuestAddress(PAGE + 16 * i)).unwrap();
    };
    memory.write_obj(1u16, GuestAddress(2 * PAGE + 2)).unwrap();
    // A readable buffer that runs into a private page, then a writable one that is private.
    desc(0, 5 * PAGE - 8, 16, 1, 1);
    desc(1, 5 * PAGE, 16, 2, 0);
    memory.write_slice(&[0x77; 16], GuestAddress(5 * PAGE)).unwrap();
    gate.make_private(5 * PAGE, PAGE);
    let chain = q.iter(Arc::clone(&memory)).unwrap().next().unwrap();
    assert_eq!(chain.clone().count(), 2, "the chain itself is readable");
    assert!(Reader::new(memory.as_ref(), chain.clone()).is_err());
    assert!(Writer::new(memory.as_ref(), chain.clone()).is_err());

    gate.make_private(3 * PAGE, 1);
    assert!(q.add_used(memory.as_ref(), 0, 0).is_err());
    assert!(q.disable_notification(memory.as_ref()).is_err());
    gate.make_private(PAGE, 1);
    q.set_next_avail(0);
    let hidden = q.iter(Arc::clone(&memory)).unwrap().next().unwrap();
    assert_eq!(hidden.count(), 0, "no descriptor comes from a private table");
    gate.make_private(2 * PAGE, 1);
    assert!(q.iter(Arc::clone(&memory)).is_err());
    gate.make_shared(5 * PAGE, PAGE);
    let mut untouched = [0; 16];
    memory.read_slice(&mut untouched, GuestAddress(5 * PAGE)).unwrap();
    assert_eq!(untouched, [0x77; 16]);
}

proptest! {
    #[test]
    fn the_gate_agrees_with_a_page_list(
        private in proptest::collection::btree_set(0u64..16, 0..8),
        gpa in 0u64..17 * PAGE,
        len in 1usize..3 * 4096,
    ) {
        let (gate, memory) = pod();
        for page in &private {
            gate.make_private(page * PAGE, PAGE);
        }
        let last = gpa + len as u64 - 1;
        let expected = last < 16 * PAGE && (gpa / PAGE..=last / PAGE).all(|p| !private.contains(&p));
        prop_assert_eq!(reachable(&memory, gpa, len), expected);
    }
}
