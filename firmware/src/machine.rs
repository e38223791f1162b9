//! What a guest is told about its machine, apart from any form in which it is told.

use crate::memory_map::{MemoryKind, MemoryRange};
use crate::plan::GpaRange;

/// A pod's machine, as parameters and boot information describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineDescription {
    /// vCPUs the pod starts with.
    pub vcpus: u32,
    /// vCPUs it can grow to; at least `vcpus`.
    pub max_vcpus: u32,
    /// The memory map, sorted by address.
    pub memory: Vec<MemoryRange>,
    /// The MMIO windows below and above 4 GiB, in bytes.
    pub mmio: [GpaRange; 2],
    /// The kernel command line, without a NUL.
    pub command_line: String,
    /// Whether all memory is shared with the host at the start (IGVM environment information).
    pub memory_is_shared: bool,
}

impl MachineDescription {
    /// Whether `[start, start + len)` lies in one range of RAM.
    #[must_use]
    pub fn is_ram(&self, start: u64, len: u64) -> bool {
        self.ram_range(start).is_some_and(|range| {
            start
                .checked_add(len)
                .is_some_and(|end| end <= range.start.saturating_add(range.len))
        })
    }

    /// The range of RAM that `address` lies in.
    #[must_use]
    pub fn ram_range(&self, address: u64) -> Option<&MemoryRange> {
        self.memory
            .iter()
            .find(|range| range.kind == MemoryKind::Ram && address >= range.start && address - range.start < range.len)
    }
}
