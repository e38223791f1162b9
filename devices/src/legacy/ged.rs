//! The generic event device (ACPI 6.5 5.6.9) as Cloud Hypervisor has it: one byte that tells what happened, cleared
//! by reading, and an edge interrupt.

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::platform::IrqLine;

/// Bytes of the register.
pub const GED_SIZE: u64 = 1;

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GedEvent {
    /// vCPUs came or are asked to go.
    Cpu = 1,
    /// Memory came.
    Memory = 1 << 1,
    /// PCI devices came or are asked to go.
    Pci = 1 << 2,
    /// The power button was pressed.
    PowerButton = 1 << 3,
}

/// The generic event device.
pub struct Ged {
    pending: u8,
    line: Arc<dyn IrqLine>,
}

impl Ged {
    /// A device on interrupt `line`.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { pending: 0, line }
    }

    /// Tells the guest of `event`.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn notify(&mut self, event: GedEvent) -> io::Result<()> {
        self.pending |= event as u8;
        self.line.trigger()
    }
}

impl BusDevice for Ged {
    fn save(&self) -> Value {
        json!(self.pending)
    }

    fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        self.pending = serde_json::from_value(state)?;
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = std::mem::take(&mut self.pending);
        }
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}
