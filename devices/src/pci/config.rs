//! A type-0 configuration space (PCI Local Bus 3.0 chapter 6): bytes, and which bits of each byte the guest may
//! write. BAR sizing needs no state of its own: the address bits below a BAR's size are read-only zeros.

/// Bytes of conventional configuration space; the extended space of ECAM reads as zeros.
pub const CONFIG_SIZE: usize = 256;
/// BARs of a type-0 function.
pub const BARS: usize = 6;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CACHE_LINE: usize = 0x0C;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2C;
const SUBSYSTEM_ID: usize = 0x2E;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const FIRST_CAPABILITY: u8 = 0x40;

/// Command register: memory space enable.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory, bus master, parity, SERR, INTx disable. I/O space stays off: there are no I/O BARs.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// BAR type bits: 64-bit, prefetchable.
const BAR_MEM64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// What identifies a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Why a configuration space cannot be built so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No room for the capability.
    #[error("no room for PCI capability {id:#04x} of {len} bytes")]
    CapabilityRoom {
        /// Capability id.
        id: u8,
        /// Its length in bytes.
        len: usize,
    },
    /// The BAR's size or number cannot be.
    #[error("BAR {bar} of {size:#x} bytes: a 64-bit BAR is even-numbered, a power of two, at least 4096 bytes, once")]
    Bar {
        /// BAR number.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
}

/// A type-0 configuration space.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bar_sizes: [Option<u64>; BARS],
    last_capability: Option<u8>,
    next_capability: u8,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut this = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bar_sizes: [None; BARS],
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        let [base, sub, interface] = identity.class;
        this.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        this.set(DEVICE_ID, &identity.device.to_le_bytes());
        this.set(REVISION, &[identity.revision, interface, sub, base]);
        this.set(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        this.set(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        this.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        this.set_writable(CACHE_LINE, &[0xFF, 0xFF]);
        this.set_writable(INTERRUPT_LINE, &[0xFF]);
        this
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        for (byte, v) in self.bytes.iter_mut().skip(at).zip(value) {
            *byte = *v;
        }
    }

    fn set_writable(&mut self, at: usize, mask: &[u8]) {
        for (byte, m) in self.writable.iter_mut().skip(at).zip(mask) {
            *byte = *m;
        }
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        for (o, b) in out.iter_mut().zip(self.bytes.iter().skip(at)) {
            *o = *b;
        }
        out
    }

    /// Declares a 64-bit memory BAR of `size` bytes.
    ///
    /// # Errors
    /// When the number is odd or taken, or the size is not a power of two of at least a page.
    pub fn add_bar(&mut self, bar: usize, size: u64, prefetchable: bool) -> Result<(), ConfigError> {
        let slot = self
            .bar_sizes
            .get_mut(bar)
            .filter(|s| s.is_none() && bar.is_multiple_of(2));
        let Some(slot) = slot.filter(|_| size.is_power_of_two() && size >= 4096) else {
            return Err(ConfigError::Bar { bar, size });
        };
        *slot = Some(size);
        let kind = BAR_MEM64 | if prefetchable { BAR_PREFETCHABLE } else { 0 };
        self.set(BAR0 + 4 * bar, &kind.to_le_bytes());
        self.set_writable(BAR0 + 4 * bar, &(!(size - 1) & !0xF).to_le_bytes());
        Ok(())
    }

    /// The size of `bar` in bytes, if it is one.
    #[must_use]
    pub fn bar_size(&self, bar: usize) -> Option<u64> {
        self.bar_sizes.get(bar).copied().flatten()
    }

    /// The address in the register of `bar`.
    #[must_use]
    pub fn bar_address(&self, bar: usize) -> u64 {
        if self.bar_size(bar).is_none() {
            return 0;
        }
        u64::from_le_bytes(self.get(BAR0 + 4 * bar)) & !0xF
    }

    /// Puts `address` into the register of `bar`; bits below the BAR's size are dropped.
    pub fn set_bar_address(&mut self, bar: usize, address: u64) {
        if let Some(at) = self.bar_size(bar).and(u16::try_from(BAR0 + 4 * bar).ok()) {
            self.write(at, &address.to_le_bytes());
        }
    }

    /// Where `bar` should answer: its address while the memory-space bit of the command register is set.
    #[must_use]
    pub fn bar_target(&self, bar: usize) -> Option<u64> {
        let enabled = u16::from_le_bytes(self.get(COMMAND)) & COMMAND_MEMORY != 0;
        (enabled && self.bar_size(bar).is_some()).then(|| self.bar_address(bar))
    }

    /// Appends a capability. `body` follows the id and next bytes; `writable` masks `body`. Returns its offset.
    ///
    /// # Errors
    /// When the configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, ConfigError> {
        let len = body.len() + 2;
        let at = self.next_capability;
        let end = (usize::from(at) + len).next_multiple_of(4);
        let full = ConfigError::CapabilityRoom { id, len };
        if end > CONFIG_SIZE {
            return Err(full);
        }
        self.set(usize::from(at), &[id, 0]);
        self.set(usize::from(at) + 2, body);
        self.set_writable(usize::from(at) + 2, writable);
        match self.last_capability {
            Some(last) => self.set(usize::from(last) + 1, &[at]),
            None => {
                self.set(CAPABILITIES, &[at]);
                self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        self.last_capability = Some(at);
        // A space filled to its last byte leaves no room for another: 0xFC + 2 bytes always round up past the end.
        self.next_capability = u8::try_from(end).unwrap_or(0xFF);
        Ok(at)
    }

    /// Reads at `offset`; beyond conventional configuration space there are zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let mut bytes = self.bytes.iter().skip(usize::from(offset));
        for d in data {
            *d = bytes.next().copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits at `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, mask), d) in bytes.zip(data) {
            *byte = (*byte & !mask) | (d & mask);
        }
    }
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConfigSpace({:02x?})", &self.get::<64>(0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut c = ConfigSpace::new(&Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1042,
        });
        c.add_bar(0, 0x8_0000, false).unwrap();
        c
    }

    fn read32(c: &ConfigSpace, at: u16) -> u32 {
        let mut d = [0; 4];
        c.read(at, &mut d);
        u32::from_le_bytes(d)
    }

    #[test]
    fn sizing_tells_the_size_and_addresses_stick() {
        let mut c = space();
        c.write(0x10, &[0xFF; 4]);
        c.write(0x14, &[0xFF; 4]);
        assert_eq!(read32(&c, 0x10), 0xFFF8_0004);
        assert_eq!(read32(&c, 0x14), 0xFFFF_FFFF);
        c.write(0x10, &0xE010_0000u32.to_le_bytes());
        c.write(0x14, &0x100u32.to_le_bytes());
        assert_eq!(c.bar_address(0), 0x100_E010_0000);
        assert_eq!(c.bar_target(0), None);
        c.write(4, &[2, 0]);
        assert_eq!(c.bar_target(0), Some(0x100_E010_0000));
        assert_eq!(read32(&c, 0x18), 0, "BAR 2 is not there");
    }

    #[test]
    fn capabilities_are_a_list_that_ends() {
        let mut c = space();
        assert_eq!(c.add_capability(9, &[1, 2, 3, 4, 5], &[]), Ok(0x40));
        assert_eq!(c.add_capability(0x11, &[0; 10], &[]), Ok(0x48));
        assert_eq!(read32(&c, 0x34), 0x40);
        assert_eq!(read32(&c, 0x40) & 0xFFFF, 0x4809);
        assert_eq!(read32(&c, 0x48) & 0xFFFF, 0x0011);
        assert_eq!(read32(&c, 4) >> 16, 0x10);
        assert!(c.add_capability(9, &[0; 200], &[]).is_err());
        assert_eq!(c.add_capability(9, &[0; 166], &[]), Ok(0x54));
        c.add_capability(9, &[], &[]).unwrap();
        assert!(c.add_capability(9, &[], &[]).is_err());
    }

    #[test]
    fn bars_are_checked() {
        let mut c = space();
        for (bar, size) in [(0, 0x1000), (1, 0x1000), (2, 0x800), (2, 0x1800), (6, 0x1000)] {
            assert_eq!(c.add_bar(bar, size, false), Err(ConfigError::Bar { bar, size }));
        }
        c.add_bar(2, 0x1000, true).unwrap();
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_read_only(writes in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..40)) {
            let mut c = space();
            let before = c.clone();
            for (at, data) in writes {
                c.write(at, &data);
            }
            for i in 0..CONFIG_SIZE {
                prop_assert_eq!(c.bytes[i] & !c.writable[i], before.bytes[i] & !before.writable[i]);
            }
            prop_assert_eq!(c.bar_address(0) % 0x8_0000, 0);
        }
    }
}
