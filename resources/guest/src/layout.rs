//! Where the pod guest expects things in memory. `vmm/build.rs` places them there; the machine's own addresses are
//! Cloud Hypervisor's (`firmware/src/layout.rs`).

/// The CPUID page (SEV-SNP only).
pub const CPUID_PAGE: u64 = 0x10_0000;
/// The secrets page (SEV-SNP only).
pub const SECRETS_PAGE: u64 = 0x10_1000;
/// The `VP_COUNT` parameter: one u32.
pub const VP_COUNT_PAGE: u64 = 0x10_2000;
/// The `MEMORY_MAP` parameter.
pub const MEMORY_MAP_PAGE: u64 = 0x10_3000;
/// The `COMMAND_LINE` parameter.
pub const COMMAND_LINE_PAGE: u64 = 0x10_4000;
/// The image itself.
pub const IMAGE_START: u64 = 0x20_0000;
/// Memory shared with the host: 2 MiB aligned. The GHCB is its first page.
pub const WINDOW_START: u64 = 0x40_0000;
/// Length of the shared window.
pub const WINDOW_LEN: u64 = 16 << 20;
/// The heap, private.
pub const HEAP_START: u64 = WINDOW_START + WINDOW_LEN;
/// Length of the heap.
pub const HEAP_LEN: u64 = 32 << 20;
/// Private pages that the `convert` command may flip.
pub const CONVERT_START: u64 = HEAP_START + HEAP_LEN;
/// Length of that range.
pub const CONVERT_LEN: u64 = 8 << 20;
/// Everything below this must be RAM.
pub const USED_END: u64 = CONVERT_START + CONVERT_LEN;

/// PCI ECAM.
pub const ECAM_START: u64 = 0xE800_0000;
/// Local APIC.
pub const APIC_START: u64 = 0xFEE0_0000;
/// Where memory-mapped I/O may be: below 4 GiB, and from 32 GiB (half of the smallest address space) up to 1.5 TiB. The pod
/// uses no RAM there.
pub const MMIO_REACH: [(u64, u64); 2] = [(0xC000_0000, 0x1_0000_0000), (0x8_0000_0000, 0x180_0000_0000)];
/// COM1.
pub const SERIAL_PORT: u16 = 0x3F8;
/// ACPI shutdown and reset register.
pub const SHUTDOWN_PORT: u16 = 0x600;
/// The vector of all device interrupts (`boot.s`).
pub const INTERRUPT_VECTOR: u32 = 0x50;
/// The spurious vector of the local APIC (`boot.s`).
pub const SPURIOUS_VECTOR: u32 = 0x5E;
