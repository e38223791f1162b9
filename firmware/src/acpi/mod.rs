//! The ACPI tables of a pod, laid out from the RSDP on. Hardware-reduced ACPI as Cloud Hypervisor describes its
//! machine, because images exist that rely on it; the AML is in `dsdt` and `memory`, the other tables are in `tables`.

pub mod baked;
mod dsdt;
mod memory;
pub mod tables;
#[cfg(test)]
mod tests;

use crate::layout::{self, DeviceArea};
use crate::plan::GpaRange;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiMachine {
    /// vCPUs at boot.
    pub vcpus: u32,
    /// vCPUs that can be plugged in all; at least `vcpus`, at most 4096.
    pub max_vcpus: u32,
    /// PCI segments, 1 to 96: as many as Cloud Hypervisor has.
    pub segments: u16,
    /// Memory devices that can be plugged, at most [`layout::MEMORY_SLOTS`]; 0 for a pod without memory hotplug, whose
    /// tables name no controller for it.
    pub memory_slots: u8,
    /// Width of the guest's physical addresses.
    pub phys_bits: u8,
    /// Whether COM1 exists.
    pub serial: bool,
}

impl AcpiMachine {
    /// Where the devices are.
    #[must_use]
    pub fn device_area(&self) -> DeviceArea {
        layout::device_area(self.phys_bits)
    }

    /// The two MMIO windows of a PCI segment, below and above 4 GiB. Segments share the lower one evenly.
    #[must_use]
    pub fn windows(&self, segment: u16) -> [GpaRange; 2] {
        self.windows_in(&self.device_area(), segment)
    }

    fn windows_in(&self, area: &DeviceArea, segment: u16) -> [GpaRange; 2] {
        let segments = u64::from(self.segments.max(1));
        let segment = u64::from(segment);
        // Whole pages, so that any BAR size below can be aligned.
        let low = layout::MEM_32BIT_DEVICES_SIZE / segments / 0x1000 * 0x1000;
        [
            GpaRange {
                start: layout::MEM_32BIT_DEVICES_START + segment * low,
                len: low,
            },
            GpaRange {
                start: area.mmio_start + segment * layout::MEM_64BIT_SEGMENT_SIZE,
                len: layout::MEM_64BIT_SEGMENT_SIZE,
            },
        ]
    }

    /// What is left of the device area above the segments' windows: files of the host lie there.
    #[must_use]
    pub fn file_area(&self) -> GpaRange {
        let area = self.device_area();
        let start = area.mmio_start + u64::from(self.segments) * layout::MEM_64BIT_SEGMENT_SIZE;
        GpaRange {
            start,
            len: area.mmio_end.saturating_sub(start),
        }
    }

    /// Whether tables can describe it.
    fn check(&self) -> Result<(), AcpiError> {
        let &Self {
            vcpus,
            max_vcpus,
            segments,
            phys_bits,
            ..
        } = self;
        if vcpus == 0 || vcpus > max_vcpus || max_vcpus > 4096 {
            return Err(AcpiError::Vcpus { vcpus, max_vcpus });
        }
        let max = self.device_area().max_segments().min(96);
        if segments == 0 || u64::from(segments) > max {
            return Err(AcpiError::Segments {
                segments,
                max,
                phys_bits,
            });
        }
        if self.memory_slots > layout::MEMORY_SLOTS {
            return Err(AcpiError::MemorySlots {
                slots: self.memory_slots,
            });
        }
        Ok(())
    }
}

/// A machine that cannot be described.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// vCPU counts.
    #[error("{vcpus} vCPUs of at most {max_vcpus}: at least 1, at most the maximum, and that at most 4096")]
    Vcpus {
        /// At boot.
        vcpus: u32,
        /// In all.
        max_vcpus: u32,
    },
    /// PCI segments.
    #[error("{segments} PCI segments: from 1 to {max} with {phys_bits} physical address bits")]
    Segments {
        /// Wanted.
        segments: u16,
        /// Possible.
        max: u64,
        /// Width of addresses.
        phys_bits: u8,
    },
    /// Memory devices.
    #[error("{slots} memory slots: at most {max}", max = layout::MEMORY_SLOTS)]
    MemorySlots {
        /// Wanted.
        slots: u8,
    },
    /// The tables do not fit below 1 MiB.
    #[error("the ACPI tables have {len} bytes; from {start:#x} to 1 MiB there is room for {room}", start = layout::ACPI_START)]
    TooLarge {
        /// Their size.
        len: usize,
        /// The room there is.
        room: u64,
    },
}

/// Finished tables: one run of bytes to put into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// GPA of the RSDP.
    pub rsdp_gpa: u64,
    /// GPA of the first byte.
    pub gpa: u64,
    /// The tables.
    pub bytes: Vec<u8>,
}

impl AcpiTables {
    /// Builds RSDP, DSDT, FADT, MADT, MCFG and XSDT for `machine`, from [`layout::ACPI_START`] on.
    ///
    /// # Errors
    /// [`AcpiError`].
    pub fn build(machine: &AcpiMachine) -> Result<Self, AcpiError> {
        machine.check()?;
        let gpa = layout::ACPI_START;
        // The RSDP comes first and is written last; tables start 16-aligned.
        let mut bytes = vec![0; tables::RSDP_LEN.next_multiple_of(16)];
        let mut append = |table: &[u8]| {
            let at = gpa + bytes.len() as u64;
            bytes.extend_from_slice(table);
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            at
        };
        let dsdt_at = append(&dsdt::dsdt(machine, &machine.device_area()));
        let listed = [
            append(&tables::fadt(dsdt_at)),
            append(&tables::madt(machine.vcpus, machine.max_vcpus)),
            append(&tables::mcfg(machine.segments)),
        ];
        let xsdt_at = append(&tables::xsdt(&listed));
        let rsdp = tables::rsdp(xsdt_at);
        if let Some(head) = bytes.get_mut(..rsdp.len()) {
            head.copy_from_slice(&rsdp);
        }
        let room = layout::HIGH_RAM_START - gpa;
        if bytes.len() as u64 > room {
            return Err(AcpiError::TooLarge { len: bytes.len(), room });
        }
        Ok(Self {
            rsdp_gpa: gpa,
            gpa,
            bytes,
        })
    }
}
