//! The ACPI tables that are plain data (ACPI 6.5 chapter 5): RSDP, XSDT, FADT, MADT, MCFG, and SRAT, SLIT and PPTT
//! for images that ask for them. Each function returns one finished table with its checksum.

use acpi_tables::sdt::{GenericAddress, Sdt};
use zerocopy::{Immutable, IntoBytes};

use crate::layout;
use crate::memory_map::{MemoryKind, MemoryRange};

/// OEM of every table.
pub(super) const OEM_ID: [u8; 6] = *b"PODVSR";
/// OEM's name of the tables.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"PODVISOR";
/// Bytes in an RSDP.
pub const RSDP_LEN: usize = 36;
const HEADER_LEN: u32 = 36;

/// A table of `signature` with `body` behind the header.
pub(super) fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, HEADER_LEN, revision, OEM_ID, OEM_TABLE_ID, 1);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

/// Root pointer, revision 2.
#[must_use]
pub fn rsdp(xsdt_gpa: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    acpi_tables::Aml::to_aml_bytes(&acpi_tables::rsdp::Rsdp::new(OEM_ID, xsdt_gpa), &mut bytes);
    bytes
}

/// Extended system description table: the addresses of the others.
#[must_use]
pub fn xsdt(tables: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|gpa| gpa.to_le_bytes()).collect();
    table(*b"XSDT", 1, &body)
}

/// Fixed description: hardware-reduced, sleep and reset register at port 0x600 (0x34 is S5, 1 resets), timer at
/// 0x608.
#[must_use]
pub fn fadt(dsdt_gpa: u64) -> Vec<u8> {
    const RESET_REG_SUP: u32 = 1 << 10;
    const HW_REDUCED_ACPI: u32 = 1 << 20;
    // IAPC_BOOT_ARCH (table 5.11): no VGA, no CMOS clock to drive; and, by the bits that are not set, no legacy devices and
    // no 8042. A kernel does not look for what is not there.
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    let sleep_register = || GenericAddress::io_port_address::<u8>(layout::ACPI_SHUTDOWN_PORT);
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE_ID, 1);
    fadt.write_u32(76, u32::from(layout::ACPI_PM_TIMER_PORT));
    fadt.write_u8(91, 4); // PM_TMR_LEN
    fadt.write_u16(109, VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT);
    fadt.write_u32(112, RESET_REG_SUP | HW_REDUCED_ACPI);
    fadt.write(116, sleep_register()); // RESET_REG
    fadt.write_u8(128, 1); // RESET_VALUE
    fadt.write_u8(131, 3); // minor version
    fadt.write_u64(140, dsdt_gpa); // X_DSDT
    fadt.write(208, GenericAddress::io_port_address::<u32>(layout::ACPI_PM_TIMER_PORT)); // X_PM_TMR_BLK
    fadt.write(244, sleep_register()); // SLEEP_CONTROL_REG
    fadt.write(256, sleep_register()); // SLEEP_STATUS_REG
    fadt.write_bytes(268, &OEM_TABLE_ID); // hypervisor vendor identity
    fadt.as_slice().to_vec()
}

/// A local x2APIC entry of the MADT, also what `_MAT` of a CPU returns.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2Apic {
    typ: u8,
    len: u8,
    reserved: u16,
    apic_id: u32,
    flags: u32,
    uid: u32,
}

/// MADT entry of one vCPU: enabled at boot, or online capable.
pub(super) fn local_x2apic(vcpu: u32, enabled: bool) -> Vec<u8> {
    let flags = if enabled { 1 } else { 2 };
    LocalX2Apic {
        typ: 9,
        len: 16,
        reserved: 0,
        apic_id: vcpu,
        flags,
        uid: vcpu,
    }
    .as_bytes()
    .to_vec()
}

/// Interrupt controllers: a local x2APIC per vCPU, the I/O APIC, and COM1's interrupt as it is.
#[must_use]
pub fn madt(vcpus: u32, max_vcpus: u32) -> Vec<u8> {
    let low_word = |address: u64| u32::try_from(address).unwrap_or(0).to_le_bytes();
    let mut body = Vec::new();
    body.extend_from_slice(&low_word(layout::APIC_START));
    body.extend_from_slice(&0u32.to_le_bytes());
    for vcpu in 0..max_vcpus.max(vcpus) {
        body.extend_from_slice(&local_x2apic(vcpu, vcpu < vcpus));
    }
    // I/O APIC 0 from GSI 0.
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&low_word(layout::IOAPIC_START));
    body.extend_from_slice(&0u32.to_le_bytes());
    // ISA interrupt override: bus 0, source 4 to GSI 4, as the bus has it.
    body.extend_from_slice(&[2, 10, 0, 4]);
    body.extend_from_slice(&layout::SERIAL_IRQ.to_le_bytes());
    body.extend_from_slice(&0u16.to_le_bytes());
    table(*b"APIC", 5, &body)
}

/// PCI configuration space: a mebibyte (bus 0) a segment.
#[must_use]
pub fn mcfg(segments: u16) -> Vec<u8> {
    let mut body = vec![0; 8];
    for segment in 0..segments {
        let base = layout::PCI_MMCONFIG_START + u64::from(segment) * layout::PCI_MMCONFIG_SEGMENT_SIZE;
        body.extend_from_slice(&base.to_le_bytes());
        body.extend_from_slice(&segment.to_le_bytes());
        body.extend_from_slice(&[0; 6]);
    }
    table(*b"MCFG", 1, &body)
}

/// Affinity: all vCPUs and all RAM in proximity domain 0.
#[must_use]
pub fn srat(max_vcpus: u32, memory: &[MemoryRange]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&1u32.to_le_bytes());
    body.extend_from_slice(&[0; 8]);
    for vcpu in 0..max_vcpus {
        // Processor local x2APIC affinity (type 2): domain 0, enabled.
        body.extend_from_slice(&[2, 24, 0, 0, 0, 0, 0, 0]);
        body.extend_from_slice(&vcpu.to_le_bytes());
        body.extend_from_slice(&1u32.to_le_bytes());
        body.extend_from_slice(&[0; 8]);
    }
    for range in memory.iter().filter(|range| range.kind == MemoryKind::Ram) {
        // Memory affinity (type 1): domain 0, enabled.
        body.extend_from_slice(&[1, 40, 0, 0, 0, 0, 0, 0]);
        body.extend_from_slice(&range.start.to_le_bytes());
        body.extend_from_slice(&range.len.to_le_bytes());
        body.extend_from_slice(&0u32.to_le_bytes());
        body.extend_from_slice(&1u32.to_le_bytes());
        body.extend_from_slice(&[0; 8]);
    }
    table(*b"SRAT", 3, &body)
}

/// Distances: one locality, 10 from itself.
#[must_use]
pub fn slit() -> Vec<u8> {
    let mut body = 1u64.to_le_bytes().to_vec();
    body.push(10);
    table(*b"SLIT", 1, &body)
}

/// Topology: one package, each vCPU a core of its own.
#[must_use]
pub fn pptt(max_vcpus: u32) -> Vec<u8> {
    const PHYSICAL_PACKAGE: u32 = 1;
    const ID_VALID: u32 = 1 << 1;
    const LEAF: u32 = 1 << 3;
    const IDENTICAL: u32 = 1 << 4;
    let node = |flags: u32, parent: u32, id: u32| [0x0000_1400u32, flags, parent, id, 0].map(u32::to_le_bytes);
    let mut body = node(PHYSICAL_PACKAGE | IDENTICAL, 0, 0).concat();
    for vcpu in 0..max_vcpus {
        body.extend_from_slice(&node(ID_VALID | LEAF, HEADER_LEN, vcpu).concat());
    }
    table(*b"PPTT", 2, &body)
}
