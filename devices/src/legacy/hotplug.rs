//! The registers behind Cloud Hypervisor's ACPI hotplug methods: PCI slots (`PHPR`, 16 bytes: PCIU, PCID, B0EJ, PSEG)
//! and vCPUs (`PRES`, 12 bytes: CSEL, then CPEN, CINS, CRMV, CEJ0 as bits of a byte, then CDAT); those of memory are in
//! `memory_hotplug`. The monitor fills the state; the guest reads it after a GED event and answers with ejections, which
//! are passed to the monitor.

use std::sync::Arc;

use serde_json::{Value, json};

use super::read_le;
use crate::bus::BusDevice;

/// Bytes of the PCI hotplug controller.
pub const PCI_HOTPLUG_SIZE: u64 = 16;
/// Bytes of the CPU hotplug controller.
pub const CPU_HOTPLUG_SIZE: u64 = 12;

/// Takes the guest's ejections; called on a vCPU thread.
pub trait HotplugSink: Send + Sync {
    /// The guest lets go of `slot` of `segment`.
    fn eject_slot(&self, segment: u16, slot: u8);
    /// The guest lets go of vCPU `index`, which it was asked for.
    fn eject_vcpu(&self, index: u32);
    /// The guest lets go of the memory `[start, start + len)`, which it was asked for: it is in no slot any more.
    fn eject_memory(&self, _start: u64, _len: u64) {}
}

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    up: u32,
    down: u32,
}

/// The PCI hotplug controller.
pub struct PciHotplug {
    segments: Vec<Segment>,
    selected: usize,
    sink: Arc<dyn HotplugSink>,
}

impl PciHotplug {
    /// A controller for `segments` segments.
    #[must_use]
    pub fn new(segments: u16, sink: Arc<dyn HotplugSink>) -> Self {
        Self {
            segments: vec![Segment::default(); usize::from(segments)],
            selected: 0,
            sink,
        }
    }

    fn mark(&mut self, segment: u16, slot: u8, bits: impl FnOnce(&mut Segment) -> &mut u32) -> bool {
        match (
            self.segments.get_mut(usize::from(segment)),
            1u32.checked_shl(slot.into()),
        ) {
            (Some(segment), Some(bit)) => {
                *bits(segment) |= bit;
                true
            }
            _ => false,
        }
    }

    /// A device came into `slot`; false if there is no such slot. Raise [`super::GedEvent::Pci`] after it.
    pub fn plugged(&mut self, segment: u16, slot: u8) -> bool {
        self.mark(segment, slot, |s| &mut s.up)
    }

    /// The device in `slot` should go; false if there is no such slot. Raise [`super::GedEvent::Pci`] after it.
    pub fn unplug(&mut self, segment: u16, slot: u8) -> bool {
        self.mark(segment, slot, |s| &mut s.down)
    }
}

impl BusDevice for PciHotplug {
    fn save(&self) -> Value {
        let segments: Vec<_> = self.segments.iter().map(|s| (s.up, s.down)).collect();
        json!((self.selected, segments))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let (selected, segments): (usize, Vec<(u32, u32)>) = serde_json::from_value(state)?;
        self.selected = selected;
        for (segment, (up, down)) in self.segments.iter_mut().zip(segments) {
            *segment = Segment { up, down };
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let selected = self.segments.get_mut(self.selected);
        let value = match offset {
            // Reading takes the bitmap: each event is seen once.
            0 => selected.map_or(0, |s| std::mem::take(&mut s.up)),
            4 => selected.map_or(0, |s| std::mem::take(&mut s.down)),
            12 => u32::try_from(self.selected).unwrap_or(0),
            // B0EJ: ejections are taken when they are written.
            _ => 0,
        };
        read_le(value, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            8 => {
                let Ok(segment) = u16::try_from(self.selected) else {
                    return;
                };
                for slot in (0..32u8).filter(|slot| value >> slot & 1 != 0) {
                    self.sink.eject_slot(segment, slot);
                }
            }
            12 => match usize::try_from(value) {
                Ok(index) if index < self.segments.len() => self.selected = index,
                _ => tracing::debug!(segment = value, "the guest selects a PCI segment that is not there"),
            },
            _ => {}
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Vcpu {
    enabled: bool,
    inserting: bool,
    removing: bool,
    /// The guest was asked to let go of it, so it may eject it.
    may_eject: bool,
}

const CPU_ENABLED: u8 = 1;
const CPU_INSERTING: u8 = 1 << 1;
const CPU_REMOVING: u8 = 1 << 2;
const CPU_EJECT: u8 = 1 << 3;

/// The CPU hotplug controller.
pub struct CpuHotplug {
    vcpus: Vec<Vcpu>,
    selected: u32,
    sink: Arc<dyn HotplugSink>,
}

impl CpuHotplug {
    /// A controller for `max` vCPUs, the first `boot` of which run.
    #[must_use]
    pub fn new(boot: u16, max: u16, sink: Arc<dyn HotplugSink>) -> Self {
        let vcpu = |index| Vcpu {
            enabled: index < boot,
            ..Vcpu::default()
        };
        Self {
            vcpus: (0..max).map(vcpu).collect(),
            selected: 0,
            sink,
        }
    }

    fn vcpu(&mut self, index: u32) -> Option<&mut Vcpu> {
        self.vcpus.get_mut(usize::try_from(index).ok()?)
    }

    /// vCPU `index` now runs, or need not go after all; false if there is none. Raise [`super::GedEvent::Cpu`] after it.
    pub fn plugged(&mut self, index: u32) -> bool {
        self.vcpu(index).is_some_and(|v| {
            *v = Vcpu {
                enabled: true,
                inserting: true,
                ..Vcpu::default()
            };
            true
        })
    }

    /// vCPU `index` should go; false if it does not run. Raise [`super::GedEvent::Cpu`] after it;
    /// [`HotplugSink::eject_vcpu`] follows when the guest lets go, and only then.
    pub fn unplug(&mut self, index: u32) -> bool {
        self.vcpu(index).filter(|v| v.enabled).is_some_and(|v| {
            (v.removing, v.may_eject) = (true, true);
            true
        })
    }
}

impl BusDevice for CpuHotplug {
    fn save(&self) -> Value {
        let vcpus: Vec<_> = self
            .vcpus
            .iter()
            .map(|v| (v.enabled, v.inserting, v.removing, v.may_eject))
            .collect();
        json!((self.selected, vcpus))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let (selected, vcpus): (u32, Vec<(bool, bool, bool, bool)>) = serde_json::from_value(state)?;
        self.selected = selected;
        for (vcpu, (enabled, inserting, removing, may_eject)) in self.vcpus.iter_mut().zip(vcpus) {
            *vcpu = Vcpu {
                enabled,
                inserting,
                removing,
                may_eject,
            };
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let selected = self.selected;
        let value = match offset {
            0 => selected,
            4 => self.vcpu(selected).map_or(0, |v| {
                let bits = [
                    (v.enabled, CPU_ENABLED),
                    (v.inserting, CPU_INSERTING),
                    (v.removing, CPU_REMOVING),
                ];
                bits.iter().map(|(on, bit)| if *on { u32::from(*bit) } else { 0 }).sum()
            }),
            _ => 0,
        };
        read_le(value, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => self.selected = u32::from_le_bytes([*a, *b, *c, *d]),
            (4, [flags, ..]) => {
                let index = self.selected;
                let Some(vcpu) = self.vcpu(index) else { return };
                if flags & CPU_INSERTING != 0 {
                    vcpu.inserting = false;
                }
                if flags & CPU_REMOVING != 0 {
                    vcpu.removing = false;
                }
                if flags & CPU_EJECT != 0 && vcpu.may_eject {
                    *vcpu = Vcpu::default();
                    self.sink.eject_vcpu(index);
                }
            }
            _ => {}
        }
    }
}
