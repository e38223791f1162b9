//! The root bus of one PCI segment: 32 slots of single-function devices behind a host bridge at slot 0, configuration
//! access by ECAM and by ports 0xCF8/0xCFC, and the places of BARs. A guest may move a BAR anywhere inside the
//! segment's windows; the bus follows.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use super::config::{BARS, ConfigSpace, Identity};
use super::{PciFunction, config::ConfigError};
use serde_json::{Value, json};

use crate::bus::{Bus, BusDevice, SharedBusDevice};
use crate::sync::lock;

/// Slots of a segment; slot 0 is the host bridge.
pub const SLOTS: u8 = 32;
/// ECAM bytes of one function.
const ECAM_FUNCTION: u64 = 4096;
/// ECAM bytes of bus 0 of a segment.
pub const ECAM_SEGMENT_SIZE: u64 = 1 << 20;
/// Ports from 0xCF8: the address register and the data register.
pub const CONFIG_PORTS: u64 = 8;
/// The host bridge, as Cloud Hypervisor identifies it.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0D57,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A range of guest physical addresses that BARs may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub start: u64,
    /// Length in bytes; 0 for none.
    pub len: u64,
}

impl Window {
    fn contains(&self, start: u64, len: u64) -> bool {
        let end = start.checked_add(len);
        start >= self.start && end.is_some_and(|end| end <= self.start.saturating_add(self.len))
    }
}

/// Where a function sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Segment (domain).
    pub segment: u16,
    /// Slot on bus 0.
    pub slot: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:00:{:02x}.0", self.segment, self.slot)
    }
}

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// All slots are taken.
    #[error("PCI segment {0} is full: all 31 slots are taken; remove a device first")]
    Full(u16),
    /// The slot asked for is taken or does not exist.
    #[error("PCI slot {slot} is taken or not in 1..=31")]
    Slot {
        /// The slot.
        slot: u8,
    },
    /// No window has room for a BAR.
    #[error("no room for BAR {bar} of {size:#x} bytes in the PCI windows of the segment")]
    Room {
        /// The BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// The function's own configuration space is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

struct Slot {
    function: Arc<Mutex<dyn PciFunction>>,
    /// Where each BAR is on the bus now.
    mapped: [Option<u64>; BARS],
}

/// One segment. Lock order: slots, then a function; the bus map is locked by neither while a function runs.
pub struct PciRoot {
    segment: u16,
    windows: [Window; 2],
    mmio: Arc<Bus>,
    bridge: Mutex<ConfigSpace>,
    slots: Mutex<BTreeMap<u8, Slot>>,
}

/// A BAR on the MMIO bus.
struct Bar {
    function: Arc<Mutex<dyn PciFunction>>,
    bar: usize,
}

impl BusDevice for Bar {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.function).read_bar(self.bar, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.function).write_bar(self.bar, offset, data);
    }
}

impl PciRoot {
    /// A segment with its host bridge. BARs are placed on `mmio`, in `window64` first, else in `window32`.
    #[must_use]
    pub fn new(segment: u16, mmio: Arc<Bus>, window64: Window, window32: Window) -> Arc<Self> {
        Arc::new(Self {
            segment,
            windows: [window64, window32],
            mmio,
            bridge: Mutex::new(ConfigSpace::new(&HOST_BRIDGE)),
            slots: Mutex::default(),
        })
    }

    /// The segment's number.
    #[must_use]
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// Puts `function` into `slot`, or into the first free one, and gives its BARs addresses. The guest enables them.
    ///
    /// # Errors
    /// When the slot is taken or all are, or the windows have no room; nothing is changed then.
    pub fn add(&self, function: Arc<Mutex<dyn PciFunction>>, slot: Option<u8>) -> Result<Bdf, PciError> {
        let mut slots = lock(&self.slots);
        let slot = match slot {
            Some(slot) if slot == 0 || slot >= SLOTS || slots.contains_key(&slot) => {
                return Err(PciError::Slot { slot });
            }
            Some(slot) => slot,
            None => (1..SLOTS)
                .find(|s| !slots.contains_key(s))
                .ok_or(PciError::Full(self.segment))?,
        };
        let mut used = occupied(&slots);
        let mut config = lock(&function);
        let mut places = Vec::new();
        for bar in 0..BARS {
            if let Some(size) = config.config().bar_size(bar) {
                let at = self.place(&used, size).ok_or(PciError::Room { bar, size })?;
                used.push((at, size));
                places.push((bar, at));
            }
        }
        for (bar, at) in places {
            config.config_mut().set_bar_address(bar, at);
        }
        drop(config);
        slots.insert(
            slot,
            Slot {
                function,
                mapped: [None; BARS],
            },
        );
        Ok(Bdf {
            segment: self.segment,
            slot,
        })
    }

    /// Finds the first gap of `size` bytes, aligned to it, that no BAR register and no device on the bus covers.
    fn place(&self, used: &[(u64, u64)], size: u64) -> Option<u64> {
        let mut taken: Vec<(u64, u64)> = used.to_vec();
        taken.extend(self.mmio.ranges());
        taken.sort_unstable();
        self.windows.iter().find_map(|window| {
            let mut at = window.start.checked_next_multiple_of(size)?;
            for (start, len) in &taken {
                let end = start.saturating_add(*len);
                if *start < at.checked_add(size)? && end > at {
                    at = end.checked_next_multiple_of(size)?;
                }
            }
            window.contains(at, size).then_some(at)
        })
    }

    /// Takes the function in `slot` off the bus, stops it, and returns it.
    pub fn remove(&self, slot: u8) -> Option<Arc<Mutex<dyn PciFunction>>> {
        let mut slots = lock(&self.slots);
        let gone = slots.remove(&slot)?;
        for (bar, address) in gone.mapped.iter().enumerate() {
            if let Some(address) = address {
                self.unmap(&gone.function, bar, *address);
            }
        }
        lock(&gone.function).detach();
        self.settle(&mut slots);
        Some(gone.function)
    }

    /// The function in `slot`.
    pub fn get(&self, slot: u8) -> Option<Arc<Mutex<dyn PciFunction>>> {
        lock(&self.slots).get(&slot).map(|s| Arc::clone(&s.function))
    }

    /// The slot of the function named `id`.
    pub fn find(&self, id: &str) -> Option<Bdf> {
        let slots = lock(&self.slots);
        let slot = slots.iter().find(|(_, s)| lock(&s.function).id() == id)?;
        Some(Bdf {
            segment: self.segment,
            slot: *slot.0,
        })
    }

    /// The counters of every function that has some, by its id.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
        let slots = lock(&self.slots);
        slots
            .values()
            .map(|s| {
                let function = lock(&s.function);
                (function.id().to_owned(), function.counters().into_iter().collect())
            })
            .filter(|(_, counters): &(_, BTreeMap<_, _>)| !counters.is_empty())
            .collect()
    }

    /// Reads configuration space. What is not there reads as all ones.
    pub fn read_config(&self, slot: u8, function: u8, offset: u16, data: &mut [u8]) {
        if function != 0 {
            return data.fill(0xFF);
        }
        if slot == 0 {
            return lock(&self.bridge).read(offset, data);
        }
        match self.get(slot) {
            Some(function) => lock(&function).read_config(offset, data),
            None => data.fill(0xFF),
        }
    }

    /// Writes configuration space, and moves BARs where the guest put them.
    pub fn write_config(&self, slot: u8, function: u8, offset: u16, data: &[u8]) {
        if function != 0 {
            return;
        }
        if slot == 0 {
            return lock(&self.bridge).write(offset, data);
        }
        let mut slots = lock(&self.slots);
        let Some(entry) = slots.get(&slot) else { return };
        lock(&entry.function).write_config(offset, data);
        if moves_bars(offset, data.len()) {
            self.settle(&mut slots);
        }
    }

    fn unmap(&self, function: &Arc<Mutex<dyn PciFunction>>, bar: usize, address: u64) {
        if let Err(error) = self.mmio.remove(address) {
            tracing::warn!(%error, "a BAR was not where it should be");
        }
        lock(function).bar_mapped(bar, None);
    }

    /// Brings the bus to what the BAR registers say. First everything that is not wanted goes, then everything that
    /// has room comes: a BAR laid over another one waits until that moves away.
    fn settle(&self, slots: &mut BTreeMap<u8, Slot>) {
        let targets: Vec<[Option<u64>; BARS]> = slots
            .values()
            .map(|s| {
                let function = lock(&s.function);
                std::array::from_fn(|bar| self.target(function.config(), bar))
            })
            .collect();
        for (slot, target) in slots.values_mut().zip(&targets) {
            for (bar, (mapped, target)) in slot.mapped.iter_mut().zip(target).enumerate() {
                if let Some(address) = mapped.take_if(|m| Some(*m) != *target) {
                    self.unmap(&slot.function, bar, address);
                }
            }
        }
        for (slot, target) in slots.values_mut().zip(&targets) {
            for (bar, (mapped, target)) in slot.mapped.iter_mut().zip(target).enumerate() {
                if let (None, Some(address)) = (*mapped, *target) {
                    *mapped = self.map(&slot.function, bar, address);
                }
            }
        }
    }

    /// The address at which `bar` should answer, if the guest chose one inside a window.
    fn target(&self, config: &ConfigSpace, bar: usize) -> Option<u64> {
        let (address, size) = (config.bar_target(bar)?, config.bar_size(bar)?);
        self.windows
            .iter()
            .any(|w| w.contains(address, size))
            .then_some(address)
    }

    fn map(&self, function: &Arc<Mutex<dyn PciFunction>>, bar: usize, address: u64) -> Option<u64> {
        let size = lock(function).config().bar_size(bar)?;
        let device: SharedBusDevice = Arc::new(Mutex::new(Bar {
            function: Arc::clone(function),
            bar,
        }));
        if let Err(error) = self.mmio.insert(address, size, device) {
            tracing::debug!(%error, bar, "a BAR cannot answer where the guest put it");
            return None;
        }
        lock(function).bar_mapped(bar, Some(address));
        Some(address)
    }

    /// The ECAM window's device: register it at the segment's ECAM address, [`ECAM_SEGMENT_SIZE`] bytes.
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> SharedBusDevice {
        Arc::new(Mutex::new(Ecam(Arc::clone(self))))
    }

    /// The device of ports 0xCF8 to 0xCFF ([`CONFIG_PORTS`]); segment 0 only.
    #[must_use]
    pub fn config_ports(self: &Arc<Self>) -> SharedBusDevice {
        Arc::new(Mutex::new(ConfigPorts {
            root: Arc::clone(self),
            address: 0,
        }))
    }
}

/// BAR registers of all functions: (address, size).
fn occupied(slots: &BTreeMap<u8, Slot>) -> Vec<(u64, u64)> {
    let mut used = Vec::new();
    for slot in slots.values() {
        let function = lock(&slot.function);
        let config = function.config();
        used.extend((0..BARS).filter_map(|bar| Some((config.bar_address(bar), config.bar_size(bar)?))));
    }
    used
}

/// Whether a write touches the command register or a BAR.
fn moves_bars(offset: u16, len: usize) -> bool {
    let (start, end) = (usize::from(offset), usize::from(offset).saturating_add(len));
    let touches = |first: usize, last: usize| start < last && end > first;
    touches(0x04, 0x06) || touches(0x10, 0x28)
}

struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// (slot, function, register), by the PCIe ECAM layout; bus 0 only.
    fn decode(offset: u64) -> Option<(u8, u8, u16)> {
        if offset >= ECAM_SEGMENT_SIZE {
            return None;
        }
        let slot = u8::try_from(offset >> 15 & 0x1F).ok()?;
        let function = u8::try_from(offset >> 12 & 7).ok()?;
        let register = u16::try_from(offset % ECAM_FUNCTION).ok()?;
        Some((slot, function, register))
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Self::decode(offset) {
            Some((slot, function, register)) => self.0.read_config(slot, function, register, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, function, register)) = Self::decode(offset) {
            self.0.write_config(slot, function, register, data);
        }
    }
}

/// PCI configuration mechanism #1.
struct ConfigPorts {
    root: Arc<PciRoot>,
    address: u32,
}

impl ConfigPorts {
    /// (slot, function, register) for an access to data port byte `byte`; None while disabled or for another bus.
    fn decode(&self, byte: u64) -> Option<(u8, u8, u16)> {
        if self.address >> 31 == 0 || self.address >> 16 & 0xFF != 0 {
            return None;
        }
        let slot = u8::try_from(self.address >> 11 & 0x1F).ok()?;
        let function = u8::try_from(self.address >> 8 & 7).ok()?;
        let register = u16::try_from(self.address & 0xFC).ok()? + u16::try_from(byte).ok()?;
        Some((slot, function, register))
    }
}

impl BusDevice for ConfigPorts {
    fn save(&self) -> Value {
        json!(self.address)
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        self.address = serde_json::from_value(state)?;
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(byte) = offset.checked_sub(4) {
            match self.decode(byte) {
                Some((slot, function, register)) => self.root.read_config(slot, function, register, data),
                None => data.fill(0xFF),
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else {
            data.fill(0xFF);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(byte) = offset.checked_sub(4) {
            if let Some((slot, function, register)) = self.decode(byte) {
                self.root.write_config(slot, function, register, data);
            }
        } else if let (0, Ok(address)) = (offset, data.try_into()) {
            self.address = u32::from_le_bytes(address) & 0x80FF_FFFC;
        }
    }
}

#[cfg(test)]
mod tests;
