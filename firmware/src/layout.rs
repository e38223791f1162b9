//! The guest's address map, the one place that holds it. It is Cloud Hypervisor's, because images exist that have
//! ACPI tables with these addresses baked in. ACPI, PCI and the monitor read it from here; nothing is computed here
//! that depends on a pod's configuration beyond its memory size and physical address width.

/// Start of the 32-bit hole: RAM below it, devices inside it, more RAM from 4 GiB on.
pub const MEM_32BIT_RESERVED_START: u64 = 0xC000_0000;
/// Size of the 32-bit hole.
pub const MEM_32BIT_RESERVED_SIZE: u64 = 0x4000_0000;
/// 32-bit MMIO window for BARs: 640 MiB.
pub const MEM_32BIT_DEVICES_START: u64 = MEM_32BIT_RESERVED_START;
/// Length of the 32-bit MMIO window.
pub const MEM_32BIT_DEVICES_SIZE: u64 = 640 << 20;
/// PCI ECAM (MMCONFIG), 256 MiB reserved.
pub const PCI_MMCONFIG_START: u64 = 0xE800_0000;
/// ECAM bytes of one segment: bus 0 only.
pub const PCI_MMCONFIG_SEGMENT_SIZE: u64 = 1 << 20;
/// I/O APIC.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Size of the I/O APIC window.
pub const IOAPIC_SIZE: u64 = 0x20;
/// Local APIC.
pub const APIC_START: u64 = 0xFEE0_0000;
/// KVM's TSS (three pages).
pub const KVM_TSS_START: u64 = 0xFEFF_B000;
/// KVM's identity map page.
pub const KVM_IDENTITY_MAP_START: u64 = 0xFEFF_F000;
/// RAM above the hole starts here.
pub const RAM_64BIT_START: u64 = 0x1_0000_0000;
/// Start of 64-bit MMIO when the physical address space is large enough: 1 TiB, 4 GiB a segment.
pub const MEM_64BIT_DEVICES_START: u64 = 0x100_0000_0000;
/// 64-bit MMIO of one segment.
pub const MEM_64BIT_SEGMENT_SIZE: u64 = 4 << 30;

/// EBDA start: low RAM ends here.
pub const EBDA_START: u64 = 0xA_0000;
/// RSDP address (PVH, bzImage).
pub const RSDP_POINTER: u64 = EBDA_START;
/// Start of the ACPI tables in guest memory.
pub const ACPI_START: u64 = EBDA_START;
/// RAM resumes here.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// PVH start info.
pub const PVH_INFO_START: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODLIST_START: u64 = 0x6040;
/// PVH memory map table.
pub const PVH_MEMMAP_START: u64 = 0x7000;
/// Boot GDT.
pub const BOOT_GDT_START: u64 = 0x500;
/// Boot IDT.
pub const BOOT_IDT_START: u64 = 0x520;
/// boot_params ("zero page") for bzImage.
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Largest command line, with its NUL.
pub const CMDLINE_MAX_SIZE: usize = 0x1_0000;
/// Boot page tables (64-bit entry): PML4.
pub const PML4_START: u64 = 0x9000;
/// Boot page tables: PDPT.
pub const PDPTE_START: u64 = 0xA000;
/// Boot page tables: four page directories.
pub const PDE_START: u64 = 0xB000;
/// Initial stack.
pub const BOOT_STACK_POINTER: u64 = 0x8FF0;

/// Offsets below the end of the 64-bit device area, as Cloud Hypervisor places its ACPI devices with a 43-bit
/// device window: GED byte at 0x7FF_FFFE_D000, CPU hotplug at ..E000, PCI hotplug at ..F000. Baked tables have no
/// memory hotplug controller; ours is below the others, at ..C000.
pub const GED_START: u64 = 0x7FF_FFFE_D000;
/// Length of the GED register.
pub const GED_SIZE: u64 = 1;
/// CPU hotplug controller (12 bytes).
pub const CPU_HOTPLUG_START: u64 = 0x7FF_FFFE_E000;
/// Length of the CPU hotplug controller.
pub const CPU_HOTPLUG_SIZE: u64 = 12;
/// PCI hotplug controller (16 bytes).
pub const PCI_HOTPLUG_START: u64 = 0x7FF_FFFE_F000;
/// Length of the PCI hotplug controller.
pub const PCI_HOTPLUG_SIZE: u64 = 16;
/// Memory hotplug controller (24 bytes).
pub const MEMORY_HOTPLUG_START: u64 = 0x7FF_FFFE_C000;
/// Length of the memory hotplug controller.
pub const MEMORY_HOTPLUG_SIZE: u64 = 24;
/// Memory devices that can be plugged in one life of a pod, as Cloud Hypervisor has it.
pub const MEMORY_SLOTS: u8 = 8;
/// Start and size of plugged memory are multiples of this: Linux's memory block on x86-64 (128 MiB).
pub const MEMORY_BLOCK_SIZE: u64 = 128 << 20;

/// COM1 port.
pub const SERIAL_PORT: u16 = 0x3F8;
/// COM1 interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// GED interrupt (edge).
pub const GED_IRQ: u32 = 5;
/// ACPI shutdown and reset register: 0x34 powers off (S5), 1 resets.
pub const ACPI_SHUTDOWN_PORT: u16 = 0x600;
/// Written to [`ACPI_SHUTDOWN_PORT`]: SLP_EN with the sleep type of S5, power off.
pub const ACPI_S5: u8 = 0x34;
/// Low byte of what a guest that does not boot what it was given writes to [`ACPI_SHUTDOWN_PORT`]: SLP_EN with a sleep type of
/// podvisor's own (6). The high byte is the reason code (`docs/stage0.md`).
pub const ACPI_REFUSED: u8 = 0x38;
/// ACPI power-management timer.
pub const ACPI_PM_TIMER_PORT: u16 = 0x608;
/// i8042 command port; 0xFE resets.
pub const I8042_PORT: u16 = 0x61;
/// CMOS index port.
pub const CMOS_PORT: u16 = 0x70;
/// Debug port.
pub const DEBUG_PORT: u16 = 0x80;
/// PCI configuration address port.
pub const PCI_CONFIG_IO_PORT: u16 = 0xCF8;
/// First GSI that MSI routing may use.
pub const FIRST_MSI_GSI: u32 = 24;
/// PCI slots of a segment.
pub const PCI_SLOTS: u8 = 32;

/// The part of the guest physical address space that holds 64-bit MMIO and, at its top, the ACPI devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceArea {
    /// Start of the 64-bit MMIO window; RAM must end at or below it.
    pub mmio_start: u64,
    /// End of the 64-bit MMIO window.
    pub mmio_end: u64,
    /// GED event byte.
    pub ged: u64,
    /// CPU hotplug controller.
    pub cpu_hotplug: u64,
    /// PCI hotplug controller.
    pub pci_hotplug: u64,
    /// Memory hotplug controller.
    pub memory_hotplug: u64,
}

/// Where devices are in a guest of `phys_bits` physical address bits (36 to 52; others count as the nearest). From
/// 43 bits on it is what the constants of this file say; a smaller address space has the same area below its own
/// top, and its window starts at half of the space.
#[must_use]
pub fn device_area(phys_bits: u8) -> DeviceArea {
    const BAKED_BITS: u8 = 43;
    let bits = phys_bits.clamp(36, BAKED_BITS);
    let top = 1u64 << bits;
    let lowered = (1u64 << BAKED_BITS) - top;
    DeviceArea {
        mmio_start: MEM_64BIT_DEVICES_START.min(top / 2),
        // The ACPI devices are in the last 128 KiB.
        mmio_end: top - (128 << 10),
        ged: GED_START - lowered,
        cpu_hotplug: CPU_HOTPLUG_START - lowered,
        pci_hotplug: PCI_HOTPLUG_START - lowered,
        memory_hotplug: MEMORY_HOTPLUG_START - lowered,
    }
}

impl DeviceArea {
    /// How many PCI segments of [`MEM_64BIT_SEGMENT_SIZE`] fit.
    #[must_use]
    pub fn max_segments(&self) -> u64 {
        (self.mmio_end - self.mmio_start) / MEM_64BIT_SEGMENT_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_address_spaces_have_the_baked_addresses() {
        for bits in [43, 44, 48, 52, 255] {
            let area = device_area(bits);
            assert_eq!(area.mmio_start, MEM_64BIT_DEVICES_START);
            assert_eq!(
                (area.ged, area.cpu_hotplug, area.pci_hotplug, area.memory_hotplug),
                (GED_START, CPU_HOTPLUG_START, PCI_HOTPLUG_START, MEMORY_HOTPLUG_START)
            );
            assert!(area.max_segments() >= 16);
        }
    }

    #[test]
    fn narrow_ones_have_everything_below_their_top() {
        for bits in 36..43 {
            let area = device_area(bits);
            assert!(area.pci_hotplug + PCI_HOTPLUG_SIZE < 1 << bits, "{bits}");
            assert!(
                area.mmio_end <= area.memory_hotplug
                    && area.mmio_start < area.mmio_end
                    && area.mmio_start > RAM_64BIT_START
            );
            assert!(area.memory_hotplug + MEMORY_HOTPLUG_SIZE <= area.ged);
            assert!(area.max_segments() >= 1);
        }
    }
}
