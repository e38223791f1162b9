//! A plain VM: nothing is accepted, nothing is agreed on.

use stage0::layout;
use stage0::manifest::Range;
use stage0::refusal::Refusal;

use super::{Platform, Stuck};
use crate::machine::cpu;

/// A plain VM.
pub(crate) struct Native;

impl Platform for Native {
    fn confidential(&self) -> bool {
        false
    }

    fn start(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [most, ..] = cpu::cpuid(leaf & 0x8000_0000, 0);
        if leaf > most { [0; 4] } else { cpu::cpuid(leaf, subleaf) }
    }

    fn port_write(&self, port: u16, value: u8) {
        cpu::out8(port, value);
    }

    fn starts_others(&self) -> bool {
        true
    }

    fn accept(&self, _range: &Range) -> Result<(), Stuck> {
        Ok(())
    }

    fn take_back(&self, _range: &Range) -> Result<(), Refusal> {
        Ok(())
    }

    fn hand_over(&self) -> Result<(), Refusal> {
        Ok(())
    }

    /// A sleep type that podvisor's monitor takes for a refusal; S5 is for others.
    fn end(&self, code: u8) -> ! {
        cpu::out16(
            layout::ACPI_SHUTDOWN_PORT,
            u16::from_le_bytes([layout::ACPI_REFUSED, code]),
        );
        cpu::out8(layout::ACPI_SHUTDOWN_PORT, layout::ACPI_S5);
        cpu::stop()
    }
}
