//! What is wrong with an IGVM file: which header, where, and why. One type for all of the reader.

use crate::vmsa::VmsaError;

/// An IGVM file that is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("IGVM {header}{} at file offset {offset:#x}: {reason}", self.number())]
pub struct IgvmError {
    /// Name of the header's type, as igvm_defs has it.
    pub header: &'static str,
    /// Position among the variable headers, from 0; none for the fixed header and the file as a whole.
    pub index: Option<usize>,
    /// Offset in bytes of the header in the file.
    pub offset: u64,
    /// What is wrong with it.
    pub reason: Reason,
}

impl IgvmError {
    pub(super) fn file(header: &'static str, offset: u64, reason: Reason) -> Self {
        Self {
            header,
            index: None,
            offset,
            reason,
        }
    }

    fn number(&self) -> String {
        self.index
            .map_or_else(String::new, |index| format!(" (header {index})"))
    }
}

/// Why a header is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Reason {
    /// Not enough bytes.
    #[error("{what} needs {needed} bytes, {have} are left")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        have: u64,
    },
    /// Not an IGVM file.
    #[error("the magic is {0:#010x}, not \"IGVM\"")]
    Magic(u32),
    /// The checksum over the headers is wrong.
    #[error("checksum {found:#010x} does not match the headers, whose CRC32 is {computed:#010x}")]
    Checksum {
        /// As the file has it.
        found: u32,
        /// As it should be.
        computed: u32,
    },
    /// A header's content has another length than its type.
    #[error("the content has {found} bytes; the type has {expected}")]
    Length {
        /// As the file has it.
        found: u32,
        /// As the type has it.
        expected: u64,
    },
    /// A header type of no section, or one not known here, without the optional bit.
    #[error("unknown header type {0:#x}, and it is not marked optional (bit 31)")]
    UnknownType(u32),
    /// Platform, initialization and directive headers must come in this order.
    #[error("{0} headers may not come after those of a later section")]
    SectionOrder(&'static str),
    /// Valid, but not something this monitor does.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    /// A field with a value it may not have.
    #[error("{field} is {value:#x}: {rule}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// Something that may be there once only.
    #[error("{what} {value:#x} was already given")]
    Duplicate {
        /// What.
        what: &'static str,
        /// Which.
        value: u64,
    },
    /// File data outside the file's data section.
    #[error(
        "file data {start:#x}+{len:#x} is not between the end of the headers {data_start:#x} and of the file {file_end:#x}"
    )]
    FileData {
        /// First byte.
        start: u64,
        /// Length.
        len: u64,
        /// Where file data may start.
        data_start: u64,
        /// Where the file ends.
        file_end: u64,
    },
    /// Two headers fill the same memory.
    #[error("memory {gpa:#x}+{len:#x} overlaps that of header {other} at file offset {other_offset:#x}")]
    Overlap {
        /// First byte.
        gpa: u64,
        /// Length.
        len: u64,
        /// Index of the other header.
        other: usize,
        /// Its offset.
        other_offset: u64,
    },
    /// A parameter area that was not declared.
    #[error("parameter area {0} was not declared")]
    NoSuchArea(u32),
    /// A parameter area that was put into the guest before.
    #[error("parameter area {0} was already inserted")]
    AreaInserted(u32),
    /// A parameter that does not fit into its area.
    #[error("a {needed}-byte value at byte offset {byte_offset:#x} does not fit into an area of {len:#x} bytes")]
    ParameterOutside {
        /// Offset in the area.
        byte_offset: u32,
        /// Smallest size of the value.
        needed: u64,
        /// Length of the area.
        len: u64,
    },
    /// A VMSA page that cannot be read.
    #[error("{0}")]
    Vmsa(VmsaError),
    /// The platform asked for is not in the file.
    #[error("the file has no {wanted} platform; it has: {has}")]
    NoPlatform {
        /// What was asked for.
        wanted: &'static str,
        /// What there is.
        has: String,
    },
}
