//! Exits, events and hotplug registers as a guest's kernel and ACPI methods use them.

use std::sync::{Arc, Mutex};

use super::*;
use crate::bus::{Bus, BusDevice};
use crate::mock::CountedLine;
use crate::sync::lock;

/// Remembers exits.
#[derive(Default)]
pub(super) struct Exits(Mutex<Vec<ExitReason>>);

impl Exits {
    pub(super) fn take(&self) -> Vec<ExitReason> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl ExitSink for Exits {
    fn exit(&self, reason: ExitReason) {
        lock(&self.0).push(reason);
    }
}

#[derive(Default)]
struct Ejected(Mutex<Vec<(u16, u32)>>);

impl HotplugSink for Ejected {
    fn eject_slot(&self, segment: u16, slot: u8) {
        lock(&self.0).push((segment, slot.into()));
    }
    fn eject_vcpu(&self, index: u32) {
        lock(&self.0).push((0xFFFF, index));
    }
    fn eject_memory(&self, start: u64, len: u64) {
        lock(&self.0).push(((start >> 20) as u16, (len >> 20) as u32));
    }
}

#[test]
fn power_off_and_the_two_resets() {
    let exits = Arc::new(Exits::default());
    let ports = Bus::new();
    ports
        .insert(
            0x600,
            acpi_pm::ACPI_POWER_SIZE,
            Arc::new(Mutex::new(AcpiPower::new(exits.clone()))),
        )
        .unwrap();
    ports
        .insert(0x61, i8042::I8042_SIZE, Arc::new(Mutex::new(I8042::new(exits.clone()))))
        .unwrap();
    ports.write(0x600, &[0x34]);
    ports.write(0x600, &[1]);
    ports.write(0x64, &[0xFE]);
    ports.write(0x600, &[0x38, 10]);
    assert_eq!(
        exits.take(),
        [
            ExitReason::PowerOff,
            ExitReason::Reset,
            ExitReason::Reset,
            ExitReason::Refused(10)
        ]
    );
    for (port, byte) in [
        (0x600, 0),
        (0x600, 0x14),
        (0x600, 0x38),
        (0x601, 0x34),
        (0x64, 0xD1),
        (0x60, 0xFE),
        (0x61, 0xFE),
    ] {
        ports.write(port, &[byte]);
    }
    ports.write(0x64, &[0xFE, 0]);
    ports.write(0x600, &[]);
    assert_eq!(exits.take(), []);
    let mut d = [0xEE];
    ports.read(0x64, &mut d);
    assert_eq!(d, [0]);
    ports.read(0x61, &mut d);
    assert_eq!(d, [0x20]);
}

#[test]
fn ged_events_add_up_until_they_are_read() {
    let line = Arc::new(CountedLine::default());
    let mut ged = Ged::new(line.clone());
    ged.notify(GedEvent::Pci).unwrap();
    ged.notify(GedEvent::PowerButton).unwrap();
    assert_eq!(line.count(), 2);
    let mut d = [0xEE];
    ged.write(0, &[0xFF]);
    ged.read(0, &mut d);
    assert_eq!(d, [0b1100]);
    ged.read(0, &mut d);
    assert_eq!(d, [0]);
}

fn read32(device: &mut dyn BusDevice, at: u64) -> u32 {
    let mut d = [0xEE; 4];
    device.read(at, &mut d);
    u32::from_le_bytes(d)
}

#[test]
fn pci_slots_come_and_go_by_segment() {
    let ejected = Arc::new(Ejected::default());
    let mut h = PciHotplug::new(2, ejected.clone());
    assert!(h.plugged(0, 3) && h.plugged(0, 31) && h.unplug(1, 4));
    assert!(!h.plugged(2, 1) && !h.plugged(0, 32));
    assert_eq!(read32(&mut h, 0), 1 << 31 | 1 << 3);
    assert_eq!((read32(&mut h, 0), read32(&mut h, 4)), (0, 0));
    h.write(12, &1u32.to_le_bytes());
    assert_eq!((read32(&mut h, 12), read32(&mut h, 4)), (1, 1 << 4));
    h.write(12, &2u32.to_le_bytes());
    h.write(12, &u32::MAX.to_le_bytes());
    assert_eq!(read32(&mut h, 12), 1, "no such segment");
    h.write(8, &(1u32 << 4 | 1 << 9).to_le_bytes());
    h.write(8, &[0xFF]);
    h.write(0, &[0xFF; 4]);
    assert_eq!(*lock(&ejected.0), [(1, 4), (1, 9)]);
    assert_eq!(read32(&mut h, 8), 0);
    assert_eq!(read32(&mut h, 13), 0);
}

#[test]
fn vcpus_are_scanned_inserted_and_ejected_as_the_acpi_methods_do() {
    let ejected = Arc::new(Ejected::default());
    let mut c = CpuHotplug::new(1, 4, ejected.clone());
    let select = |c: &mut CpuHotplug, i: u32| c.write(0, &i.to_le_bytes());
    let status = |c: &mut CpuHotplug| {
        let mut d = [0xEE];
        c.read(4, &mut d);
        d[0]
    };
    assert_eq!((status(&mut c), read32(&mut c, 0)), (1, 0));
    assert!(c.plugged(2) && !c.plugged(4) && !c.unplug(1));
    select(&mut c, 2);
    assert_eq!((read32(&mut c, 0), status(&mut c)), (2, 0b11));
    c.write(4, &[0b10]);
    assert_eq!(status(&mut c), 1);
    c.write(4, &[0b1000]);
    assert_eq!(status(&mut c), 1, "an ejection that nobody asked for");
    assert!(c.unplug(2) && c.plugged(2));
    c.write(4, &[0b1010]);
    assert_eq!(status(&mut c), 1, "nor one that is not asked for any more");
    assert!(c.unplug(2));
    assert_eq!(status(&mut c), 0b101);
    c.write(4, &[0b100]);
    c.write(4, &[0b1000]);
    assert_eq!(status(&mut c), 0);
    c.write(4, &[0b1000]);
    assert_eq!(*lock(&ejected.0), [(0xFFFF, 2)], "ejected once");
    select(&mut c, u32::MAX);
    c.write(4, &[0xFF]);
    c.write(0, &[1]);
    assert_eq!((status(&mut c), read32(&mut c, 8)), (0, 0));
}

/// The slot's state as MCRS and MSTA read it: base, length, flags.
fn memory_slot(h: &mut MemoryHotplug, slot: u32) -> (u64, u64, u8) {
    h.write(0, &slot.to_le_bytes());
    let words = [0, 4, 8, 12].map(|at| u64::from(read32(h, at)));
    let mut flags = [0xEE];
    h.read(20, &mut flags);
    (words[1] << 32 | words[0], words[3] << 32 | words[2], flags[0])
}

const GIB: u64 = 1 << 30;

#[test]
fn memory_is_scanned_inserted_and_ejected_as_the_acpi_methods_do() {
    let ejected = Arc::new(Ejected::default());
    let mut h = MemoryHotplug::new(8, ejected.clone());
    assert_eq!(memory_slot(&mut h, 0), (0, 0, 0));
    assert_eq!(h.add(4 * GIB, 5 * GIB), Ok(0));
    assert_eq!(h.add(9 * GIB, 128 << 20), Ok(1));
    assert_eq!(memory_slot(&mut h, 0), (4 * GIB, 5 * GIB, 0b11));
    // MSCN: MINS is cleared by writing it.
    h.write(20, &[0b10]);
    assert_eq!(memory_slot(&mut h, 0).2, 0b1);
    assert_eq!(memory_slot(&mut h, 1), (9 * GIB, 128 << 20, 0b11));
    // An ejection that nobody asked for changes nothing.
    h.write(20, &[0b1000]);
    assert_eq!(memory_slot(&mut h, 1).2, 0b11);
    assert!(lock(&ejected.0).is_empty());
    h.unplug(1).unwrap();
    assert_eq!(memory_slot(&mut h, 1).2, 0b111);
    h.write(20, &[0b100]);
    assert_eq!(memory_slot(&mut h, 1).2, 0b011);
    assert_eq!(
        h.plugged().map(|m| (m.slot, m.removing)).collect::<Vec<_>>(),
        [(0, false), (1, true)]
    );
    h.write(20, &[0b1000]);
    h.write(20, &[0b1000]);
    assert_eq!(memory_slot(&mut h, 1), (0, 0, 0));
    assert_eq!(*lock(&ejected.0), [(9 << 10, 128)], "ejected once");
    assert_eq!(h.add(9 * GIB, 128 << 20), Ok(1), "the slot is free again");
}

#[test]
fn hotplug_controllers_go_on_from_a_snapshot() {
    let sink = || Arc::new(Ejected::default());
    let ejected = sink();
    let mut h = MemoryHotplug::new(8, sink());
    h.add(4 * GIB, GIB).unwrap();
    h.add(6 * GIB, GIB).unwrap();
    h.unplug(1).unwrap();
    h.write(0, &1u32.to_le_bytes());
    h.write(20, &[0b110]);
    let mut again = MemoryHotplug::new(8, ejected.clone());
    again.restore(h.save()).unwrap();
    assert_eq!(again.save(), h.save());
    assert_eq!(again.plugged().collect::<Vec<_>>(), h.plugged().collect::<Vec<_>>());
    // The selected slot is restored too: it is the one that goes.
    again.write(20, &[0b1000]);
    assert_eq!(memory_slot(&mut again, 0), (4 * GIB, GIB, 0b11));
    let mut c = CpuHotplug::new(2, 4, sink());
    assert!(c.plugged(3) && c.unplug(1));
    c.write(0, &1u32.to_le_bytes());
    let mut again = CpuHotplug::new(1, 4, ejected.clone());
    again.restore(c.save()).unwrap();
    again.write(4, &[0b1000]);
    assert_eq!(*lock(&ejected.0), [(6 << 10, 1024), (0xFFFF, 1)]);
    assert!(again.restore(serde_json::json!("no state")).is_err() && h.restore(serde_json::json!([0])).is_err());
}

#[test]
fn memory_slots_are_bounded() {
    let mut h = MemoryHotplug::new(8, Arc::new(Ejected::default()));
    for (start, len) in [(0, 0), (1, 4096), (4096, 1), (u64::MAX - 4095, 4096), (4096, u64::MAX)] {
        assert_eq!(h.add(start, len), Err(MemoryHotplugError::Range { start, len }));
    }
    for slot in 0..8 {
        assert_eq!(h.add((4 + u64::from(slot)) * GIB, GIB), Ok(slot));
    }
    for (start, slot) in [(4 * GIB, 0), (12 * GIB - 4096, 7), (3 * GIB, 0)] {
        let error = h.add(start, 2 * GIB).unwrap_err();
        assert!(
            matches!(error, MemoryHotplugError::Overlap { slot: s, .. } if s == slot),
            "{start:#x}: {error}"
        );
    }
    assert_eq!(h.add(12 * GIB, GIB), Err(MemoryHotplugError::Full { slots: 8 }));
    assert_eq!(h.unplug(8), Err(MemoryHotplugError::Empty { slot: 8 }));
    assert_eq!(h.plugged().map(|m| m.len).sum::<u64>(), 8 * GIB);
}

#[test]
fn odd_accesses_to_the_memory_controller_change_nothing() {
    let mut h = MemoryHotplug::new(8, Arc::new(Ejected::default()));
    h.add(GIB, GIB).unwrap();
    for slot in [8, 255, u32::MAX] {
        assert_eq!(memory_slot(&mut h, slot), (0, 0, 0));
        h.write(20, &[0xFF]);
    }
    h.write(0, &[0]);
    h.write(0, &[0; 8]);
    h.write(20, &[]);
    h.write(16, &[0xFF; 4]);
    assert_eq!(read32(&mut h, 0), 0, "slot u32::MAX is still selected");
    assert_eq!(memory_slot(&mut h, 0), (GIB, GIB, 0b11));
    assert_eq!((read32(&mut h, 1), read32(&mut h, 16), read32(&mut h, 24)), (0, 0, 0));
    let mut wide = [0xEE; 8];
    h.read(0, &mut wide);
    assert_eq!(wide, [0, 0, 0, 0x40, 0, 0, 0, 0]);
}

#[test]
fn the_debug_port_swallows() {
    let mut p = DebugPort;
    let mut d = [0];
    p.write(0, &[1, 2]);
    p.read(0, &mut d);
    assert_eq!(d, [0xFF]);
}

#[test]
fn a_memory_controller_without_slots_has_nothing() {
    let mut h = MemoryHotplug::new(0, Arc::new(Ejected::default()));
    h.write(0, &7u32.to_le_bytes());
    h.write(20, &[0xFF]);
    for offset in (0..memory_hotplug::MEMORY_HOTPLUG_SIZE).step_by(4) {
        let mut word = [0xFF; 4];
        h.read(offset, &mut word);
        assert_eq!(word, [0; 4], "register {offset}");
    }
    assert!(h.add(0x1_0000_0000, 128 << 20).is_err());
}
