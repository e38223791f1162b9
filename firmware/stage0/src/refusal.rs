//! Why stage0 does not boot what it was given: the reasons, and their words; their codes are in `codes`.

use core::fmt;

use crate::codes;

/// Which payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The kernel.
    Kernel,
    /// The initrd.
    Initrd,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// A reason to refuse. Words are one line; numbers are in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The CPUID page is not one that this image can run with. The entry code gives this code too.
    Cpuid(&'static str),
    /// A page did not change when it was accepted, or could not be: it was accepted before (an attack), or is not RAM.
    Accept {
        /// First byte of the range.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// PVALIDATE's return code.
        code: u32,
        /// Whether a page was valid before.
        unchanged: bool,
    },
    /// The hypervisor did not do its part of the GHCB protocol.
    Ghcb {
        /// Which part.
        what: &'static str,
        /// What it answered.
        answer: u64,
    },
    /// The manifest is not one.
    Manifest {
        /// What is wrong.
        what: &'static str,
        /// The value that it has.
        value: u64,
    },
    /// An entry of the host's memory map.
    MemoryMap {
        /// What is wrong.
        what: &'static str,
        /// Its index.
        entry: usize,
        /// Its first byte.
        start: u64,
        /// One past its last byte, wrapping.
        end: u64,
    },
    /// The host's vCPU count.
    VcpuCount {
        /// What is wrong.
        what: &'static str,
        /// The count.
        count: u32,
    },
    /// The host's MADT.
    Madt {
        /// What is wrong.
        what: &'static str,
        /// Offset in the table.
        offset: usize,
        /// The value there.
        value: u64,
    },
    /// Memory that the image needs is not RAM in the host's memory map.
    NotRam {
        /// What it is for.
        what: &'static str,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The list of chunk digests is not the one that was measured.
    ChunkList,
    /// A payload is not the one that was measured.
    Payload {
        /// Which.
        what: What,
        /// The first chunk, of a mebibyte, that differs.
        chunk: usize,
    },
    /// The measured ACPI tables do not fit together.
    Acpi(&'static str),
    /// The boot parameters have no room for the memory map.
    BootParams(&'static str),
    /// A processor exception.
    Exception {
        /// Its vector.
        vector: u64,
        /// First word of its frame: the error code where there is one, else the instruction.
        first: u64,
        /// Second word.
        second: u64,
        /// CR2.
        address: u64,
    },
    /// An error of stage0 itself.
    Internal(&'static str),
}

impl Refusal {
    /// The code of the termination request.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Cpuid(_) => codes::CPUID,
            Self::Accept { .. } => codes::ACCEPT,
            Self::Ghcb { .. } => codes::GHCB,
            Self::Manifest { .. } => codes::MANIFEST,
            Self::MemoryMap { .. } => codes::MEMORY_MAP,
            Self::VcpuCount { .. } => codes::VCPU_COUNT,
            Self::Madt { .. } => codes::MADT,
            Self::NotRam { .. } => codes::NOT_RAM,
            Self::ChunkList => codes::CHUNK_LIST,
            Self::Payload { .. } => codes::PAYLOAD,
            Self::Acpi(_) => codes::ACPI,
            Self::BootParams(_) => codes::BOOT_PARAMS,
            Self::Exception { .. } => codes::EXCEPTION,
            Self::Internal(_) => codes::INTERNAL,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Cpuid(what) => write!(f, "CPUID page: {what}"),
            Self::Accept {
                start,
                end,
                code,
                unchanged: false,
            } => write!(f, "memory {start:#x}..{end:#x} cannot be accepted: code {code:#x}"),
            Self::Accept {
                start,
                end,
                unchanged: true,
                ..
            } => write!(f, "memory {start:#x}..{end:#x} was accepted before"),
            Self::Ghcb { what, answer } => write!(f, "hypervisor: {what}: answer {answer:#x}"),
            Self::Manifest { what, value } => write!(f, "manifest: {what}: {value:#x}"),
            Self::MemoryMap {
                what,
                entry,
                start,
                end,
            } => write!(f, "memory map: {what}: entry {entry} {start:#x}..{end:#x}"),
            Self::VcpuCount { what, count } => write!(f, "vCPU count: {what}: {count}"),
            Self::Madt { what, offset, value } => write!(f, "MADT: {what}: {value:#x} at offset {offset:#x}"),
            Self::NotRam { what, start, end } => {
                write!(f, "memory map: no RAM for the {what}: {start:#x}..{end:#x}")
            }
            Self::ChunkList => write!(f, "the chunk list is not the measured one"),
            Self::Payload { what, chunk } => write!(f, "the {what} is not the measured one: chunk {chunk} differs"),
            Self::Acpi(what) => write!(f, "ACPI tables: {what}"),
            Self::BootParams(what) => write!(f, "boot parameters: {what}"),
            Self::Exception {
                vector,
                first,
                second,
                address,
            } => write!(f, "exception {vector} ({first:#x} {second:#x}), cr2 {address:#x}"),
            Self::Internal(what) => write!(f, "internal error: {what}"),
        }
    }
}
