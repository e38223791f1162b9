//! The registers behind Cloud Hypervisor's ACPI memory hotplug methods (`MHPC`, 24 bytes). Reading: base and length of
//! the selected slot in four words, its proximity domain at 16, its state as bits of the byte at 20 (MEN, MINS, MRMV).
//! Writing: the slot at 0, at 20 the bits that clear MINS and MRMV and let go (MEJ0). The monitor fills the slots; the
//! guest reads them after a GED event. Nothing the guest writes changes which memory it has: it can only let go of
//! what it was asked for.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::HotplugSink;
use super::read_le;
use crate::bus::BusDevice;

/// Bytes of the controller.
pub const MEMORY_HOTPLUG_SIZE: u64 = 24;
/// Start and length of memory are multiples of this.
const PAGE: u64 = 4096;

const ENABLED: u8 = 1;
const INSERTING: u8 = 1 << 1;
const REMOVING: u8 = 1 << 2;
const EJECT: u8 = 1 << 3;

/// Why memory cannot be plugged or unplugged.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryHotplugError {
    /// Every slot is taken.
    #[error("all {slots} memory slots are taken; memory can be added no more in this life of the VM")]
    Full {
        /// How many there are.
        slots: usize,
    },
    /// The range is no range.
    #[error("memory {start:#x}+{len:#x}: empty, not of whole pages, or beyond the address space")]
    Range {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// There is memory already.
    #[error("memory {start:#x}+{len:#x} overlaps slot {slot}, {other:#x}+{other_len:#x}")]
    Overlap {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
        /// The slot that is there.
        slot: u8,
        /// Its first address.
        other: u64,
        /// Its bytes.
        other_len: u64,
    },
    /// Nothing is in this slot.
    #[error("memory slot {slot} is empty")]
    Empty {
        /// The slot.
        slot: u8,
    },
}

/// Memory in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PluggedMemory {
    /// The slot.
    pub slot: u8,
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether the guest was asked to let go of it.
    pub removing: bool,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Slot {
    start: u64,
    len: u64,
    /// The guest has not looked yet.
    inserting: bool,
    /// The guest is to be asked to let go.
    removing: bool,
    /// It was: it may eject.
    may_eject: bool,
}

/// The memory hotplug controller.
pub struct MemoryHotplug {
    slots: Vec<Option<Slot>>,
    selected: u32,
    sink: Arc<dyn HotplugSink>,
}

impl MemoryHotplug {
    /// A controller of `slots` empty slots.
    #[must_use]
    pub fn new(slots: u8, sink: Arc<dyn HotplugSink>) -> Self {
        Self {
            slots: vec![None; slots.into()],
            selected: 0,
            sink,
        }
    }

    /// Puts the memory `[start, start + len)`, which must be there already, into a free slot; which one. Raise
    /// [`super::GedEvent::Memory`] after it.
    ///
    /// # Errors
    /// When there is no slot, or the range is none or overlaps another; nothing is changed then.
    pub fn add(&mut self, start: u64, len: u64) -> Result<u8, MemoryHotplugError> {
        let end = start.checked_add(len).filter(|_| len != 0);
        let Some(end) = end.filter(|end| start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE)) else {
            return Err(MemoryHotplugError::Range { start, len });
        };
        let overlaps = |other: &PluggedMemory| start < other.start.saturating_add(other.len) && other.start < end;
        if let Some(other) = self.plugged().find(overlaps) {
            return Err(MemoryHotplugError::Overlap {
                start,
                len,
                slot: other.slot,
                other: other.start,
                other_len: other.len,
            });
        }
        let slots = self.slots.len();
        let mut free = (0..).zip(self.slots.iter_mut()).filter(|(_, slot)| slot.is_none());
        let (number, slot) = free.next().ok_or(MemoryHotplugError::Full { slots })?;
        *slot = Some(Slot {
            start,
            len,
            inserting: true,
            removing: false,
            may_eject: false,
        });
        Ok(number)
    }

    /// Asks the guest to let go of the memory in `slot`; [`HotplugSink::eject_memory`] follows if it does. Raise
    /// [`super::GedEvent::Memory`] after it.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn unplug(&mut self, slot: u8) -> Result<(), MemoryHotplugError> {
        let found = self.slots.get_mut(usize::from(slot)).and_then(Option::as_mut);
        let found = found.ok_or(MemoryHotplugError::Empty { slot })?;
        (found.removing, found.may_eject) = (true, true);
        Ok(())
    }

    /// What is in the slots, in their order.
    pub fn plugged(&self) -> impl Iterator<Item = PluggedMemory> + '_ {
        (0..).zip(&self.slots).filter_map(|(number, slot)| {
            slot.map(|slot| PluggedMemory {
                slot: number,
                start: slot.start,
                len: slot.len,
                removing: slot.may_eject,
            })
        })
    }

    fn selected(&mut self) -> Option<&mut Option<Slot>> {
        self.slots.get_mut(usize::try_from(self.selected).ok()?)
    }
}

impl BusDevice for MemoryHotplug {
    fn save(&self) -> Value {
        json!((self.selected, &self.slots))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let (selected, slots): (u32, Vec<Option<Slot>>) = serde_json::from_value(state)?;
        self.selected = selected;
        for (slot, saved) in self.slots.iter_mut().zip(slots) {
            *slot = saved;
        }
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let slot = self.selected().and_then(|slot| slot.as_ref());
        let half = |value: u64, high: bool| {
            let [low, upper] = [value & u64::from(u32::MAX), value >> 32];
            u32::try_from(if high { upper } else { low }).unwrap_or(0)
        };
        let value = slot.map_or(0, |slot| match offset {
            0 | 4 => half(slot.start, offset == 4),
            8 | 12 => half(slot.len, offset == 12),
            20 => {
                let inserting = if slot.inserting { INSERTING } else { 0 };
                let removing = if slot.removing { REMOVING } else { 0 };
                u32::from(ENABLED | inserting | removing)
            }
            // The proximity domain, at 16, is 0.
            _ => 0,
        });
        read_le(value, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => self.selected = u32::from_le_bytes([*a, *b, *c, *d]),
            (20, [flags, ..]) => {
                let Some(place) = self.selected() else { return };
                let Some(slot) = place else { return };
                slot.inserting &= flags & INSERTING == 0;
                slot.removing &= flags & REMOVING == 0;
                if flags & EJECT != 0 {
                    let (start, len) = (slot.start, slot.len);
                    if slot.may_eject {
                        *place = None;
                        self.sink.eject_memory(start, len);
                    } else {
                        tracing::debug!(start, len, "the guest ejects memory that it was not asked for");
                    }
                }
            }
            _ => {}
        }
    }
}
