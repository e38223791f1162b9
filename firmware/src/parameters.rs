//! Fills IGVM parameter areas from the machine. The values are the host's, unmeasured, and the guest must not
//! trust them.

use igvm_defs::{IGVM_VHS_MEMORY_RANGE, IGVM_VHS_MMIO_RANGES};
use zerocopy::IntoBytes;

use crate::acpi::tables;
use crate::machine::MachineDescription;
use crate::memory_map::igvm_entries;
use crate::plan::{PAGE_SIZE, ParameterArea, ParameterKind};

/// Why an area cannot be filled.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParameterError {
    /// A value longer than the room from its offset to the end of the area.
    #[error("parameter {kind:?} of {needed} bytes at offset {offset:#x} does not fit into its area of {len:#x} bytes")]
    TooLong {
        /// Which.
        kind: ParameterKind,
        /// Offset in the area.
        offset: u32,
        /// Bytes of the value.
        needed: usize,
        /// Bytes of the area.
        len: u64,
    },
    /// The command line is not what the format holds.
    #[error("command line byte {position} is {byte:#04x}; IGVM takes ASCII without NUL")]
    CommandLine {
        /// Where.
        position: usize,
        /// What.
        byte: u8,
    },
    /// The area is larger than the host's memory, or smaller than its contents.
    #[error("a parameter area of {0} bytes")]
    Area(u64),
}

/// The bytes of `area` as they go into the guest: its initial contents, and over them the values, in order.
///
/// # Errors
/// [`ParameterError`] naming the parameter.
pub fn fill(area: &ParameterArea<'_>, machine: &MachineDescription) -> Result<Vec<u8>, ParameterError> {
    let len = usize::try_from(area.len).ok().filter(|len| *len >= area.initial.len());
    let len = len.ok_or(ParameterError::Area(area.len))?;
    let mut bytes = area.initial.to_vec();
    bytes.resize(len, 0);
    for parameter in &area.parameters {
        let value = value(parameter.kind, machine)?;
        let room = bytes
            .get_mut(parameter.offset as usize..)
            .and_then(|room| room.get_mut(..value.len()));
        let room = room.ok_or(ParameterError::TooLong {
            kind: parameter.kind,
            offset: parameter.offset,
            needed: value.len(),
            len: area.len,
        })?;
        room.copy_from_slice(&value);
    }
    Ok(bytes)
}

/// The value of one parameter, in the form igvm_defs gives for its type.
///
/// # Errors
/// [`ParameterError::CommandLine`].
pub fn value(kind: ParameterKind, machine: &MachineDescription) -> Result<Vec<u8>, ParameterError> {
    Ok(match kind {
        ParameterKind::VpCount => machine.vcpus.to_le_bytes().to_vec(),
        ParameterKind::MemoryMap => igvm_entries(&machine.memory),
        ParameterKind::CommandLine => command_line(&machine.command_line)?,
        ParameterKind::Madt => tables::madt(machine.vcpus, machine.max_vcpus),
        ParameterKind::Srat => tables::srat(machine.max_vcpus, &machine.memory),
        ParameterKind::Slit => tables::slit(),
        ParameterKind::Pptt => tables::pptt(machine.max_vcpus),
        ParameterKind::MmioRanges => {
            let mmio_ranges = machine.mmio.map(|range| IGVM_VHS_MEMORY_RANGE {
                starting_gpa_page_number: range.start / PAGE_SIZE,
                number_of_pages: range.len / PAGE_SIZE,
            });
            IGVM_VHS_MMIO_RANGES { mmio_ranges }.as_bytes().to_vec()
        }
        ParameterKind::EnvironmentInfo => u32::from(machine.memory_is_shared).to_le_bytes().to_vec(),
    })
}

fn command_line(text: &str) -> Result<Vec<u8>, ParameterError> {
    if let Some((position, byte)) = text
        .bytes()
        .enumerate()
        .find(|(_, byte)| *byte == 0 || !byte.is_ascii())
    {
        return Err(ParameterError::CommandLine { position, byte });
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::layout;
    use crate::memory_map::memory_map;
    use crate::plan::{GpaRange, Parameter};

    fn machine() -> MachineDescription {
        MachineDescription {
            vcpus: 2,
            max_vcpus: 4,
            memory: memory_map(512 << 20, layout::MEM_64BIT_DEVICES_START).unwrap(),
            mmio: [
                GpaRange {
                    start: layout::MEM_32BIT_DEVICES_START,
                    len: layout::MEM_32BIT_DEVICES_SIZE,
                },
                GpaRange {
                    start: layout::MEM_64BIT_DEVICES_START,
                    len: layout::MEM_64BIT_SEGMENT_SIZE,
                },
            ],
            command_line: "console=ttyS0 quiet".to_owned(),
            memory_is_shared: true,
        }
    }

    fn area(parameters: &[(ParameterKind, u32)]) -> ParameterArea<'static> {
        ParameterArea {
            len: 0x1000,
            initial: Cow::Borrowed(&[0xEE; 16]),
            parameters: parameters
                .iter()
                .map(|(kind, offset)| Parameter {
                    kind: *kind,
                    offset: *offset,
                })
                .collect(),
        }
    }

    #[test]
    fn values_lie_where_the_image_wants_them() {
        let kinds = [
            (ParameterKind::VpCount, 4),
            (ParameterKind::MemoryMap, 0x100),
            (ParameterKind::CommandLine, 0x200),
            (ParameterKind::MmioRanges, 0x300),
            (ParameterKind::EnvironmentInfo, 0x400),
            (ParameterKind::Madt, 0x500),
            (ParameterKind::Srat, 0x600),
            (ParameterKind::Slit, 0x900),
            (ParameterKind::Pptt, 0xA00),
        ];
        let bytes = fill(&area(&kinds), &machine()).unwrap();
        assert_eq!(bytes.len(), 0x1000);
        assert_eq!(
            bytes[..16],
            [
                0xEE, 0xEE, 0xEE, 0xEE, 2, 0, 0, 0, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE, 0xEE
            ]
        );
        // 0..640 KiB: page 0, 160 pages of memory.
        assert_eq!(
            bytes[0x100..0x118],
            [[0u64, 160, 0].map(u64::to_le_bytes).concat()].concat()
        );
        assert_eq!(&bytes[0x200..0x214], b"console=ttyS0 quiet\0");
        assert_eq!(
            bytes[0x300..0x310],
            [0xC_0000u64, 0x2_8000].map(u64::to_le_bytes).concat()
        );
        assert_eq!(bytes[0x400..0x404], [1, 0, 0, 0]);
        for (at, signature) in [(0x500, b"APIC"), (0x600, b"SRAT"), (0x900, b"SLIT"), (0xA00, b"PPTT")] {
            assert_eq!(&bytes[at..at + 4], signature);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let refused = fill(&area(&[(ParameterKind::CommandLine, 0xFF0)]), &machine()).unwrap_err();
        assert_eq!(
            refused,
            ParameterError::TooLong {
                kind: ParameterKind::CommandLine,
                offset: 0xFF0,
                needed: 20,
                len: 0x1000
            }
        );
        assert!(fill(&area(&[(ParameterKind::CommandLine, 0x1000 - 20)]), &machine()).is_ok());
        assert!(fill(&area(&[(ParameterKind::VpCount, u32::MAX)]), &machine()).is_err());
        let odd = MachineDescription {
            command_line: "a\u{e9}".into(),
            ..machine()
        };
        let refused = fill(&area(&[(ParameterKind::CommandLine, 0)]), &odd).unwrap_err();
        assert_eq!(
            refused,
            ParameterError::CommandLine {
                position: 1,
                byte: 0xC3
            }
        );
    }
}
