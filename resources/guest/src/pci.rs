//! PCI: finds virtio devices on bus 0 through ECAM and reads where their registers are. BARs are as the monitor placed
//! them. Every access costs an exit, so nothing is read twice or without need.

use alloc::vec::Vec;

use crate::layout;
use crate::mmio::Registers;
use crate::paging::PageTables;
use crate::pod::device_type;

const VIRTIO_VENDOR: u32 = 0x1AF4;
const VIRTIO_MODERN: u32 = 0x1040;
/// Device and vendor of pvpanic.
const PVPANIC: u32 = 0x0011_1B36;
const SLOTS: u64 = 32;
const FUNCTION_SPAN: u64 = 1 << 15;
const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;
const VENDOR_CAPABILITY: u8 = 9;
const MSIX_CAPABILITY: u8 = 17;
/// Memory space, bus master, no INTx.
const COMMAND_ON: u16 = 0x406;

/// A virtio device's configuration space.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    registers: Registers,
    /// Virtio device type, or `device_type::PVPANIC`.
    pub kind: u16,
}

/// Where a structure lies: a BAR and an offset in it.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    bar: u8,
    offset: u32,
}

/// The register blocks of a device.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// Common configuration.
    pub common: Registers,
    /// Doorbells.
    pub notify: Registers,
    /// Bytes from one queue's doorbell to the next.
    pub notify_multiplier: u32,
    /// Device-specific configuration.
    pub device: Registers,
    /// The first entry of the MSI-X table.
    pub msix: Registers,
    /// Offset of the MSI-X capability.
    msix_capability: u64,
}

/// The virtio devices of bus 0, and pvpanic.
#[must_use]
pub fn scan(tables: &PageTables) -> Vec<Function> {
    let mut found = Vec::new();
    for slot in 0..SLOTS {
        let Some(registers) = Registers::map(tables, layout::ECAM_START + slot * FUNCTION_SPAN, 4096) else {
            break;
        };
        let id: u32 = registers.get(0);
        if id & 0xFFFF == VIRTIO_VENDOR && id >> 16 > VIRTIO_MODERN {
            found.push(Function {
                registers,
                kind: ((id >> 16) - VIRTIO_MODERN) as u16,
            });
        }
        if id == PVPANIC {
            found.push(Function {
                registers,
                kind: device_type::PVPANIC,
            });
        }
    }
    found
}

impl Function {
    /// Reads the capabilities, maps the register blocks and switches the device on.
    ///
    /// # Errors
    /// Says what the device lacks.
    pub fn open(&self, tables: &PageTables) -> Result<Blocks, &'static str> {
        let (mut common, mut notify, mut device, mut msix) = (None, None, None, None);
        let mut next = u64::from(self.registers.get::<u32>(CAPABILITIES) & 0xFC);
        for _ in 0..16 {
            if next < 0x40 || common.is_some() && notify.is_some() && device.is_some() && msix.is_some() {
                break;
            }
            let head: u32 = self.registers.get(next);
            let [id, following, _, kind] = head.to_le_bytes();
            match (id, kind) {
                (VENDOR_CAPABILITY, 1) => common = Some(self.place(next)),
                (VENDOR_CAPABILITY, 2) => notify = Some((self.place(next), self.registers.get::<u32>(next + 16))),
                (VENDOR_CAPABILITY, 4) => device = Some(self.place(next)),
                (MSIX_CAPABILITY, _) => {
                    let table: u32 = self.registers.get(next + 4);
                    msix = Some((
                        next,
                        Place {
                            bar: (table & 7) as u8,
                            offset: table & !7,
                        },
                    ));
                }
                _ => {}
            }
            next = u64::from(following & 0xFC);
        }
        let (Some(common), Some((notify, notify_multiplier)), Some(device), Some((msix_capability, msix))) =
            (common, notify, device, msix)
        else {
            return Err("virtio capabilities are missing");
        };
        self.registers.set(COMMAND, COMMAND_ON);
        let mut bars = [None; 6];
        let mut block = |place: Place, len: u64| -> Option<Registers> {
            let known = bars.get_mut(usize::from(place.bar))?;
            let base = *known.get_or_insert_with(|| self.bar(place.bar));
            Registers::map(tables, base.checked_add(place.offset.into())?, len)
        };
        let missing = "a BAR is not where devices may be";
        Ok(Blocks {
            common: block(common, 0x38).ok_or(missing)?,
            notify: block(notify, (u64::from(notify_multiplier) * 8).max(4)).ok_or(missing)?,
            notify_multiplier,
            device: block(device, 0x100).ok_or(missing)?,
            msix: block(msix, 16).ok_or(missing)?,
            msix_capability,
        })
    }

    /// Switches a device on that is no virtio device, and maps the first `len` bytes of its first BAR.
    ///
    /// # Errors
    /// When the BAR is not where devices may be.
    pub fn memory(&self, tables: &PageTables, len: u64) -> Result<Registers, &'static str> {
        self.registers.set(COMMAND, COMMAND_ON);
        Registers::map(tables, self.bar(0), len).ok_or("a BAR is not where devices may be")
    }

    fn place(&self, capability: u64) -> Place {
        Place {
            bar: self.registers.get::<u32>(capability + 4) as u8,
            offset: self.registers.get(capability + 8),
        }
    }

    fn bar(&self, index: u8) -> u64 {
        const IS_64_BIT: u32 = 4;
        if index > 5 {
            return 0;
        }
        let at = BAR0 + u64::from(index) * 4;
        let low: u32 = self.registers.get(at);
        let high = if low & 7 == IS_64_BIT && index < 5 {
            self.registers.get::<u32>(at + 4)
        } else {
            0
        };
        u64::from(high) << 32 | u64::from(low & !0xF)
    }

    /// Sends the device's interrupts, all by the first MSI-X entry, to this processor.
    pub fn route_interrupts(&self, blocks: &Blocks) {
        const ENABLE: u16 = 1 << 15;
        blocks.msix.set(0, layout::APIC_START as u32);
        blocks.msix.set(4, 0_u32);
        blocks.msix.set(8, layout::INTERRUPT_VECTOR);
        blocks.msix.set(12, 0_u32);
        self.registers.set(blocks.msix_capability + 2, ENABLE);
    }
}
