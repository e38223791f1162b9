//! What the two ways to boot a kernel directly have in common: which memory they need, where the initrd goes, how long a
//! command line may be, and the form of the plan. What the kernel is told, and how, is in `pvh` and `boot64`.

use std::borrow::Cow;

use crate::acpi::AcpiTables;
use crate::layout;
use crate::machine::MachineDescription;
use crate::plan::{LaunchPlan, PAGE_SIZE, PageKind, Platform, Step, VcpuState, VpContext};

/// What does not fit into the pod.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// The initrd has no room between kernel and end of low memory.
    #[error("an initrd of {len} bytes does not fit between the kernel's end {kernel_end:#x} and {ram_end:#x}")]
    Initrd {
        /// Its length.
        len: usize,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where the memory that an initrd may lie in ends.
        ram_end: u64,
    },
    /// A command line that the kernel could not read whole.
    #[error("a command line of {len} bytes: at most {max}, and no NUL")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The longest there may be.
        max: usize,
    },
    /// A memory map with more entries than there is room for.
    #[error("a memory map of {entries} entries: at most {max}")]
    MemoryMap {
        /// How many there are.
        entries: usize,
        /// How many there may be.
        max: usize,
    },
    /// The pod's memory does not hold what the boot needs there.
    #[error("{what} needs RAM at {start:#x}+{len:#x}, which the pod does not have; give the pod more memory")]
    NoRam {
        /// What.
        what: &'static str,
        /// First byte.
        start: u64,
        /// Length.
        len: u64,
    },
}

/// What a kernel is booted with.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a, 'm> {
    /// The initrd.
    pub initrd: Option<&'a [u8]>,
    /// The command line, without a NUL.
    pub cmdline: &'m str,
    /// The pod.
    pub machine: &'m MachineDescription,
    /// Its ACPI tables.
    pub acpi: Option<&'m AcpiTables>,
}

/// Boot information is below this, apart from the command line.
const LOW_END: u64 = layout::CMDLINE_START + layout::CMDLINE_MAX_SIZE as u64;

impl<'a> Given<'a, '_> {
    /// The command line with its NUL, if the kernel takes one of up to `max` bytes, and if there is room for the boot
    /// information.
    pub(super) fn command_line(&self, max: usize) -> Result<Vec<u8>, PlaceError> {
        let max = max.min(layout::CMDLINE_MAX_SIZE - 1);
        if self.cmdline.len() > max || self.cmdline.contains('\0') {
            let len = self.cmdline.len();
            return Err(PlaceError::CommandLine { len, max });
        }
        self.need_ram("boot information", 0, LOW_END)?;
        let mut line = self.cmdline.as_bytes().to_vec();
        line.push(0);
        Ok(line)
    }

    /// That `[start, start + len)` is RAM.
    pub(super) fn need_ram(&self, what: &'static str, start: u64, len: u64) -> Result<(), PlaceError> {
        if self.machine.is_ram(start, len) {
            Ok(())
        } else {
            Err(PlaceError::NoRam { what, start, len })
        }
    }

    /// Puts the initrd as high as it can be below `limit` in low memory, behind the kernel: its address, and itself.
    pub(super) fn place_initrd(&self, kernel_end: u64, limit: u64) -> Result<Option<(u64, &'a [u8])>, PlaceError> {
        let Some(initrd) = self.initrd else { return Ok(None) };
        let ram_end = self
            .machine
            .ram_range(layout::HIGH_RAM_START)
            .map_or(layout::HIGH_RAM_START, |range| range.start.saturating_add(range.len))
            .min(layout::MEM_32BIT_RESERVED_START)
            .min(limit);
        // The kernel's end counts when it is in low memory only.
        let kernel_end = if kernel_end > layout::RAM_64BIT_START {
            layout::HIGH_RAM_START
        } else {
            kernel_end
        };
        let len = initrd.len();
        let start = ram_end.checked_sub(len as u64).map(|start| start - start % PAGE_SIZE);
        match start.filter(|start| *start >= kernel_end) {
            Some(start) => Ok(Some((start, initrd))),
            None => Err(PlaceError::Initrd {
                len,
                kernel_end,
                ram_end,
            }),
        }
    }
}

/// A plan in the making.
pub(super) struct Plan<'a>(LaunchPlan<'a>);

impl<'a> Plan<'a> {
    pub(super) fn new() -> Self {
        Self(LaunchPlan::new(Platform::Native))
    }

    /// `data` at `gpa`, zeros behind it up to `len` bytes.
    pub(super) fn put(&mut self, gpa: u64, len: u64, data: impl Into<Cow<'a, [u8]>>) {
        self.0.steps.push(Step::Pages {
            gpa,
            len,
            kind: PageKind::Normal,
            data: data.into(),
        });
    }

    /// All of `data` at `gpa`.
    pub(super) fn put_all(&mut self, gpa: u64, data: impl Into<Cow<'a, [u8]>>) {
        let data = data.into();
        self.put(gpa, data.len() as u64, data);
    }

    /// The plan, with the ACPI tables and the state that vCPU 0 starts in.
    pub(super) fn finish(mut self, acpi: Option<&AcpiTables>, state: VcpuState) -> LaunchPlan<'a> {
        if let Some(acpi) = acpi {
            self.put_all(acpi.gpa, acpi.bytes.clone());
        }
        self.0.steps.push(Step::Vcpu { vp: 0 });
        self.0.vps.push(VpContext {
            index: 0,
            gpa: 0,
            state,
            vmsa: Cow::Borrowed(&[]),
        });
        self.0
    }
}
