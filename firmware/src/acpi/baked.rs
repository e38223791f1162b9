//! ACPI tables for an image that is built before anybody knows the machine it runs on: the tables of one machine, and where
//! in its DSDT the numbers are that depend on the width of physical addresses. What moves those numbers at the boot is
//! stage0; MADT, XSDT and RSDP are its too.

use super::{AcpiError, AcpiMachine, dsdt, tables};
use crate::layout::{self, DeviceArea};
use crate::stage0::abi::{FIXUP_MMIO_START, FIXUP_TOP, Fixup};

/// Tables for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BakedTables {
    /// DSDT, FADT (whose pointer to the DSDT is 0) and MCFG, each 16-aligned from the start.
    pub bytes: Vec<u8>,
    /// Length of the DSDT.
    pub dsdt_len: usize,
    /// What differs in the DSDT of a machine with other address bits than 43, apart from the table's checksum.
    pub fixups: Vec<Fixup>,
}

/// Made-up places, which no other number in a table comes near.
const MMIO_SENTINEL: u64 = 0x5A17_A3C0_0000_0000;
const TOP_SENTINEL: u64 = 0x6B29_D5E0_0000_0000;
/// Farther from its base than this, a number is something else: 96 segments of 4 GiB.
const REACH: u64 = 96 * layout::MEM_64BIT_SEGMENT_SIZE;
const BAKED_BITS: u8 = 43;

impl BakedTables {
    /// The tables of `machine`, whose `phys_bits` do not count: they are made for 43 bits and wider.
    ///
    /// # Errors
    /// [`AcpiError`].
    pub fn build(machine: &AcpiMachine) -> Result<Self, AcpiError> {
        let machine = AcpiMachine {
            phys_bits: BAKED_BITS,
            ..machine.clone()
        };
        machine.check()?;
        let real = machine.device_area();
        let top = 1u64 << BAKED_BITS;
        let lifted = |address: u64| TOP_SENTINEL - (top - address);
        let made_up = DeviceArea {
            mmio_start: MMIO_SENTINEL,
            mmio_end: lifted(real.mmio_end),
            ged: lifted(real.ged),
            cpu_hotplug: lifted(real.cpu_hotplug),
            pci_hotplug: lifted(real.pci_hotplug),
            memory_hotplug: lifted(real.memory_hotplug),
        };
        let fixups = fixups(&dsdt::dsdt(&machine, &made_up));
        let mut bytes = dsdt::dsdt(&machine, &real);
        let dsdt_len = bytes.len();
        for table in [tables::fadt(0), tables::mcfg(machine.segments)] {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            bytes.extend_from_slice(&table);
        }
        Ok(Self {
            bytes,
            dsdt_len,
            fixups,
        })
    }
}

/// The places of sentinels in `dsdt`.
fn fixups(dsdt: &[u8]) -> Vec<Fixup> {
    let number = |bytes: &[u8]| {
        let value = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        [(FIXUP_MMIO_START, MMIO_SENTINEL), (FIXUP_TOP, TOP_SENTINEL)]
            .into_iter()
            .find(|(_, base)| value.abs_diff(*base) <= REACH)
            .map(|(base, sentinel)| (base, value.wrapping_sub(sentinel)))
    };
    (0..)
        .zip(dsdt.windows(8))
        .filter_map(|(offset, bytes)| number(bytes).map(|(base, addend)| Fixup { offset, base, addend }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What stage0 does.
    fn moved(tables: &BakedTables, phys_bits: u8) -> Vec<u8> {
        let mut dsdt = tables.bytes[..tables.dsdt_len].to_vec();
        for fixup in &tables.fixups {
            let base = match fixup.base {
                FIXUP_MMIO_START => layout::device_area(phys_bits).mmio_start,
                FIXUP_TOP => 1 << phys_bits.min(43),
                other => panic!("base {other}"),
            };
            let at = fixup.offset as usize;
            dsdt[at..at + 8].copy_from_slice(&base.wrapping_add(fixup.addend).to_le_bytes());
        }
        dsdt[9] = 0;
        dsdt[9] = 0u8.wrapping_sub(dsdt.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
        dsdt
    }

    #[test]
    fn moved_tables_are_those_of_the_machine() {
        for (max_vcpus, segments, memory_slots, serial) in
            [(1, 1, 0, true), (16, 1, 8, true), (240, 7, 8, false), (3, 2, 1, true)]
        {
            for phys_bits in 36..=48 {
                let machine = AcpiMachine {
                    vcpus: 1,
                    max_vcpus,
                    segments,
                    memory_slots,
                    phys_bits,
                    serial,
                };
                let baked = BakedTables::build(&machine).unwrap();
                assert_eq!(moved(&baked, phys_bits), dsdt::dsdt(&machine, &machine.device_area()));
                // Windows of each segment, and three or four controllers with a descriptor and a region each.
                let controllers = if memory_slots > 0 { 4 } else { 3 };
                assert_eq!(baked.fixups.len(), usize::from(segments) * 2 + controllers * 3);
            }
        }
    }

    #[test]
    fn each_table_begins_where_stage0_looks() {
        let machine = AcpiMachine {
            vcpus: 1,
            max_vcpus: 4,
            segments: 1,
            memory_slots: 0,
            phys_bits: 36,
            serial: true,
        };
        let baked = BakedTables::build(&machine).unwrap();
        let mut at = 0;
        for signature in [b"DSDT", b"FACP", b"MCFG"] {
            let table = &baked.bytes[at..];
            assert_eq!(&table[..4], signature);
            at += u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
            at = at.next_multiple_of(16);
        }
        assert_eq!(at, baked.bytes.len().next_multiple_of(16));
        let refused = BakedTables::build(&AcpiMachine {
            max_vcpus: 0,
            ..machine
        });
        assert!(refused.is_err());
    }
}
