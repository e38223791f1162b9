//! The I/O APIC (Intel 82093AA) in user space: pins become messages by the redirection table that the guest programs.
//! The devices on pins here (serial port, GED) raise edges; a pin programmed as level-triggered is delivered once an
//! edge too and never waits for an end of interrupt. (KVM's own I/O APIC costs every pod over ten milliseconds when its
//! VM is destroyed.)

use std::io;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::platform::{IrqLine, MsiMessage};
use crate::sync::lock;

/// Pins. As many as there are devices with an interrupt pin, up to the GED's; Linux reads and writes each entry about a
/// dozen times at boot, and each time leaves the guest twice.
pub const IOAPIC_PINS: usize = 8;
/// Register window: the index, and the data 16 bytes behind it.
const INDEX: u64 = 0x00;
const DATA: u64 = 0x10;
/// Register indices.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;
/// Version 0x11, and the highest entry's number in bits 23:16.
const VERSION_VALUE: u32 = 0x11 | 7 << 16;
/// Redirection entry: what the guest can write (delivery status and remote IRR are the chip's).
const WRITABLE: u64 = !(1 << 12 | 1 << 14);
const MASKED: u64 = 1 << 16;
/// Where messages go (Intel SDM vol. 3, 11.11.1).
const MSI_BASE: u64 = 0xFEE0_0000;

/// Sends a message-signalled interrupt.
pub type SendMsi = Box<dyn Fn(MsiMessage) -> io::Result<()> + Send>;

/// The controller.
pub struct IoApic {
    id: u32,
    index: u8,
    table: [u64; IOAPIC_PINS],
    send: SendMsi,
}

impl IoApic {
    /// A controller after reset: every pin masked.
    #[must_use]
    pub fn new(send: SendMsi) -> Self {
        Self {
            id: 0,
            index: 0,
            table: [MASKED; IOAPIC_PINS],
            send,
        }
    }

    /// Pin `pin` of `ioapic` as an interrupt line.
    #[must_use]
    pub fn line(ioapic: &Arc<Mutex<Self>>, pin: usize) -> Arc<dyn IrqLine> {
        Arc::new(Pin {
            ioapic: Arc::clone(ioapic),
            pin,
        })
    }

    /// An edge on `pin`: a message if the pin is not masked; a masked edge is lost, as on the chip.
    fn edge(&self, pin: usize) -> io::Result<()> {
        match self.table.get(pin) {
            Some(entry) if entry & MASKED == 0 => (self.send)(message(*entry)),
            _ => Ok(()),
        }
    }

    /// The table's entry and which half of it the index selects.
    fn selected(&self) -> Option<(usize, bool)> {
        let at = self.index.checked_sub(TABLE)?;
        let entry = usize::from(at / 2);
        (entry < IOAPIC_PINS).then_some((entry, at % 2 == 1))
    }

    fn read_register(&self) -> u32 {
        match self.index {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            _ => self.selected().map_or(0, |(entry, high)| {
                let value = self.table.get(entry).copied().unwrap_or(MASKED);
                let half = if high { value >> 32 } else { value & 0xFFFF_FFFF };
                u32::try_from(half).unwrap_or(0)
            }),
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.index == ID {
            self.id = value & 0x0F00_0000;
        } else if let Some((entry, high)) = self.selected()
            && let Some(slot) = self.table.get_mut(entry)
        {
            let value = u64::from(value);
            *slot = if high {
                *slot & 0xFFFF_FFFF | value << 32
            } else {
                *slot & !0xFFFF_FFFF | value & WRITABLE
            };
        }
    }
}

/// The message that an unmasked entry stands for: destination and its mode into the address; vector, delivery mode and
/// an edge into the data.
fn message(entry: u64) -> MsiMessage {
    let destination = entry >> 56 & 0xFF;
    let logical = entry >> 11 & 1;
    let data = entry & 0x7FF;
    MsiMessage {
        address: MSI_BASE | destination << 12 | logical << 2,
        data: u32::try_from(data).unwrap_or(0),
    }
}

impl BusDevice for IoApic {
    fn save(&self) -> Value {
        json!((self.id, self.index, self.table))
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        (self.id, self.index, self.table) = serde_json::from_value(state)?;
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            INDEX => u32::from(self.index),
            DATA => self.read_register(),
            _ => 0,
        };
        super::read_le(value, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (INDEX, [index, ..]) => self.index = *index,
            (DATA, &[a, b, c, d]) => self.write_register(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

struct Pin {
    ioapic: Arc<Mutex<IoApic>>,
    pin: usize,
}

impl IrqLine for Pin {
    fn trigger(&self) -> io::Result<()> {
        lock(&self.ioapic).edge(self.pin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Sent = Arc<Mutex<Vec<MsiMessage>>>;

    fn ioapic() -> (Arc<Mutex<IoApic>>, Sent) {
        let sent = Sent::default();
        let log = Arc::clone(&sent);
        let send = Box::new(move |message| {
            lock(&log).push(message);
            Ok(())
        });
        (Arc::new(Mutex::new(IoApic::new(send))), sent)
    }

    fn write(ioapic: &Mutex<IoApic>, register: u8, value: u32) {
        let mut chip = lock(ioapic);
        chip.write(INDEX, &[register, 0, 0, 0]);
        chip.write(DATA, &value.to_le_bytes());
    }

    fn read(ioapic: &Mutex<IoApic>, register: u8) -> u32 {
        let mut chip = lock(ioapic);
        chip.write(INDEX, &[register]);
        let mut data = [0; 4];
        chip.read(DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_pin_is_delivered_as_its_entry_says() {
        let (chip, sent) = ioapic();
        let line = IoApic::line(&chip, 4);
        line.trigger().unwrap();
        assert!(lock(&sent).is_empty(), "pins are masked after reset");
        // vector 0x24, lowest priority, logical destination 3
        write(&chip, 0x10 + 9, 3 << 24);
        write(&chip, 0x10 + 8, 0x24 | 1 << 8 | 1 << 11);
        line.trigger().unwrap();
        let expected = MsiMessage {
            address: 0xFEE0_3004,
            data: 0x124,
        };
        assert_eq!(*lock(&sent), [expected]);
        write(&chip, 0x10 + 8, 0x1_0024);
        line.trigger().unwrap();
        assert_eq!(lock(&sent).len(), 1);
    }

    #[test]
    fn registers_read_back_and_the_chips_own_bits_do_not_change() {
        let (chip, _) = ioapic();
        assert_eq!(usize::try_from(VERSION_VALUE >> 16).unwrap(), IOAPIC_PINS - 1);
        assert_eq!(read(&chip, VERSION), 0x07_0011);
        assert_eq!(read(&chip, 0x10), 1 << 16);
        write(&chip, 0x10, u32::MAX);
        assert_eq!(read(&chip, 0x10), !(1 << 12 | 1 << 14));
        write(&chip, ID, u32::MAX);
        assert_eq!(read(&chip, ID), 0x0F00_0000);
        assert_eq!(read(&chip, ARBITRATION), 0x0F00_0000);
    }

    #[test]
    fn whatever_is_accessed_nothing_breaks() {
        let (chip, sent) = ioapic();
        for register in 0..=255 {
            write(&chip, register, 0x55);
            read(&chip, register);
        }
        for (offset, len) in [(DATA, 1), (DATA, 8), (INDEX, 0), (0x1F, 8), (u64::MAX, 4)] {
            lock(&chip).write(offset, &vec![0xFF; len]);
            lock(&chip).read(offset, &mut vec![0; len]);
        }
        IoApic::line(&chip, IOAPIC_PINS).trigger().unwrap();
        assert!(lock(&sent).is_empty());
    }
}
