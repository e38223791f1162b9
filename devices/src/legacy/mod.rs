//! What a PC has beside PCI: serial port, i8042, CMOS clock, debug port, and the ACPI registers of Cloud Hypervisor's
//! machine (power, timer, generic events, PCI, CPU and memory hotplug). Addresses are the monitor's.

pub mod acpi_pm;
pub mod cmos;
pub mod debug_console;
pub mod debug_port;
pub mod ged;
pub mod hotplug;
pub mod i8042;
pub mod ioapic;
pub mod memory_hotplug;
pub mod pvpanic;
pub mod serial;

pub use acpi_pm::{AcpiPower, PmTimer};
pub use cmos::Cmos;
pub use debug_console::DebugConsole;
pub use debug_port::DebugPort;
pub use ged::{Ged, GedEvent};
pub use hotplug::{CpuHotplug, HotplugSink, PciHotplug};
pub use i8042::I8042;
pub use ioapic::IoApic;
pub use memory_hotplug::{MemoryHotplug, MemoryHotplugError, PluggedMemory};
pub use pvpanic::{GuestPanic, PanicSink, PvPanic};
pub use serial::{Serial, SerialSubscriber};

/// How the guest asks to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset: the pod starts again.
    Reset,
    /// stage0 does not boot what it was given, for the reason of this code.
    Refused(u8),
}

/// Takes the guest's wish to end; called on a vCPU thread, so it only passes it on.
pub trait ExitSink: Send + Sync {
    /// The guest asked for `reason`. May be called any number of times.
    fn exit(&self, reason: ExitReason);
}

/// Reads `value` as a little-endian register: the bytes of `data` from its start, zeros beyond.
fn read_le(value: u32, data: &mut [u8]) {
    data.fill(0);
    for (d, v) in data.iter_mut().zip(value.to_le_bytes()) {
        *d = v;
    }
}

#[cfg(test)]
mod tests;
