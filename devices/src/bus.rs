//! The bus: which device answers at an address (port I/O or MMIO), and the trait it answers through. vCPU threads
//! look devices up; the control thread and PCI BAR moves change the map at run time.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde_json::Value;

use crate::sync::lock;

/// A device on a bus. Offsets are relative to the range it was registered for.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`. What is not backed reads as all ones or zeros, never an error.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// What the guest made of the device, for a snapshot; null for one that keeps nothing.
    fn save(&self) -> Value {
        Value::Null
    }
    /// Takes over what [`BusDevice::save`] gave.
    ///
    /// # Errors
    /// When it is not that.
    fn restore(&mut self, _state: Value) -> Result<(), serde_json::Error> {
        Ok(())
    }
}

/// A device as the bus holds it.
pub type SharedBusDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or ends beyond the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps around")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range overlaps another.
    #[error("bus range {base:#x}+{len:#x} overlaps the device at {other:#x}+{other_len:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that is there.
        other: u64,
        /// Its length in bytes.
        other_len: u64,
    },
    /// No range starts at this address.
    #[error("no bus range starts at {base:#x}")]
    Absent {
        /// The address.
        base: u64,
    },
}

#[derive(Clone)]
struct Entry {
    base: u64,
    len: u64,
    device: SharedBusDevice,
}

/// A map from address ranges to devices. Look-ups hold a read lock for a binary search only, never while a device
/// runs, so that a device may change the map it is on.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<Vec<Entry>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `[base, base + len)`.
    ///
    /// # Errors
    /// When the range is empty, wraps around, or overlaps another.
    pub fn insert(&self, base: u64, len: u64, device: SharedBusDevice) -> Result<(), BusError> {
        if len == 0 || base.checked_add(len - 1).is_none() {
            return Err(BusError::Range { base, len });
        }
        let last = base + (len - 1);
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| entries.get(i));
        let overlapping = before
            .filter(|e| e.base + (e.len - 1) >= base)
            .or_else(|| entries.get(at).filter(|e| e.base <= last));
        if let Some(e) = overlapping {
            return Err(BusError::Overlap {
                base,
                len,
                other: e.base,
                other_len: e.len,
            });
        }
        entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Takes the device whose range starts at `base` off the bus. A look-up that found it before may still run.
    ///
    /// # Errors
    /// When no range starts there.
    pub fn remove(&self, base: u64) -> Result<SharedBusDevice, BusError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        match entries.binary_search_by_key(&base, |e| e.base) {
            Ok(at) => Ok(entries.remove(at).device),
            Err(_) => Err(BusError::Absent { base }),
        }
    }

    /// The devices, with the address at which each begins.
    #[must_use]
    pub fn devices(&self) -> Vec<(u64, SharedBusDevice)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|e| (e.base, Arc::clone(&e.device))).collect()
    }

    fn find(&self, address: u64) -> Option<(u64, SharedBusDevice)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|e| e.base <= address);
        let entry = entries.get(at.checked_sub(1)?)?;
        let offset = address - entry.base;
        (offset < entry.len).then(|| (offset, Arc::clone(&entry.device)))
    }

    /// Reads from the device at `address`. An access that begins in a range is the device's whatever its length.
    /// False when nothing is there: `data` is then all ones, as an empty bus reads.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                lock(&device).read(offset, data);
                true
            }
            None => {
                data.fill(0xFF);
                false
            }
        }
    }

    /// Writes to the device at `address`; false when nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address) {
            Some((offset, device)) => {
                lock(&device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The ranges on the bus, (first address, length), in order.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|e| (e.base, e.len)).collect()
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Tag(u8);
    impl BusDevice for Tag {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0);
            data[0] = offset as u8;
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn tag(v: u8) -> SharedBusDevice {
        Arc::new(Mutex::new(Tag(v)))
    }

    #[test]
    fn ends_of_ranges_are_exact() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, tag(1)).unwrap();
        bus.insert(0x110, 1, tag(2)).unwrap();
        bus.insert(u64::MAX, 1, tag(3)).unwrap();
        let read = |a| {
            let mut d = [0; 2];
            (bus.read(a, &mut d), d)
        };
        assert_eq!(read(0xFF), (false, [0xFF, 0xFF]));
        assert_eq!(read(0x100), (true, [0, 1]));
        assert_eq!(read(0x10F), (true, [15, 1]));
        assert_eq!(read(0x110), (true, [0, 2]));
        assert_eq!(read(0x111), (false, [0xFF, 0xFF]));
        assert_eq!(read(u64::MAX), (true, [0, 3]));
        assert!(bus.write(0x105, &[7]));
        assert_eq!(read(0x100), (true, [0, 7]));
        bus.remove(0x100).unwrap();
        assert!(!bus.write(0x105, &[7]));
        assert_eq!(bus.remove(0x101).err(), Some(BusError::Absent { base: 0x101 }));
    }

    #[test]
    fn a_wrapping_or_empty_range_is_refused() {
        let bus = Bus::new();
        assert!(matches!(bus.insert(0, 0, tag(0)), Err(BusError::Range { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, tag(0)), Err(BusError::Range { .. })));
    }

    proptest! {
        #[test]
        fn the_bus_agrees_with_a_linear_list(ops in proptest::collection::vec((0u64..64, 1u64..8, any::<bool>()), 1..60)) {
            let bus = Bus::new();
            let mut list: Vec<(u64, u64)> = Vec::new();
            for (base, len, insert) in ops {
                if insert {
                    let free = list.iter().all(|(b, l)| base + len <= *b || b + l <= base);
                    prop_assert_eq!(bus.insert(base, len, tag(0)).is_ok(), free);
                    if free {
                        list.push((base, len));
                    }
                } else {
                    let there = list.iter().position(|(b, _)| *b == base);
                    prop_assert_eq!(bus.remove(base).is_ok(), there.is_some());
                    if let Some(i) = there {
                        list.swap_remove(i);
                    }
                }
                for address in 0..80 {
                    let hit = list.iter().find(|(b, l)| (*b..b + l).contains(&address));
                    let mut data = [0xEE];
                    prop_assert_eq!(bus.read(address, &mut data), hit.is_some());
                    prop_assert_eq!(data[0], hit.map_or(0xFF, |(b, _)| (address - b) as u8));
                }
            }
        }
    }
}
